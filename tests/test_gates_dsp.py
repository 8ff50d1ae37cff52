"""Differentiable subset pruning: what it samples and keeps, its presets, and whether it learns."""

from __future__ import annotations

import math

import gate_reference
import pytest
import torch
from gate_inputs import LAYER_OF, UNEVEN, train
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_heads.gates import DSPConfig
from sparse_heads.gates.noise import uniform_noise

pytestmark = pytest.mark.usefixtures("one_thread")
few_examples = settings(max_examples=25, deadline=None)


@pytest.mark.parametrize("step", [0, 30, 60, 100, 5000])
def test_dsp_samples_the_annealed_relaxation(step: int):
    gates = DSPConfig(k=9, anneal_steps=100, seed=3).build(LAYER_OF)
    gates.steps_done = step
    temperature = math.exp(math.log(1000) - min(1, step / 100) * (math.log(1000) - math.log(1e-8)))
    assert gates.temperature == pytest.approx(temperature, rel=1e-12)
    noise = gate_reference.gumbel(uniform_noise(24, 3, step).numpy())
    expected = gate_reference.soft_top_k(gates.rank().numpy() + noise, 9, gates.temperature)
    torch.testing.assert_close(gates.sample().detach(), torch.from_numpy(expected), rtol=0, atol=1e-12)
    assert abs(gates.sample().sum().item() - 9) < 1e-9


@given(st.integers(0, 2**40), st.sampled_from(["gumbel", "ste"]))
@few_examples
def test_dsp_keeps_exactly_k(seed: int, estimator: str):
    for k in range(len(UNEVEN) + 1):
        gates = DSPConfig(k=k, estimator=estimator, seed=seed).build(UNEVEN)
        assert int(gates.keep().sum()) == k and float(gates.settled().sum()) == k
        gates.importances.data.fill_(0.5)
        assert int(gates.keep().sum()) == k and abs(gates.sample().sum().item() - k) < 1e-9


def test_straight_through_has_neither_noise_nor_temperature():
    gates = DSPConfig(k=5, estimator="ste").build(LAYER_OF)
    assert gates.temperature is None and gates.schedule_steps == 0
    assert torch.equal(gates.sample(), gates.settled())


@pytest.mark.parametrize(
    "name, mode, start, steps, gate_lr",
    [
        ("bert_joint", "joint", 1000.0, 25_000, 0.5),
        ("bert_pipelined", "pipelined", 1000.0, 8_333, 0.5),
        ("iwslt_joint", "joint", 0.1, 15_000, 0.2),
        ("iwslt_pipelined", "pipelined", 0.1, 250, 0.2),
    ],
)
def test_dsp_presets(name: str, mode: str, start: float, steps: int, gate_lr: float):
    config = DSPConfig.from_preset(name, k=12)
    assert config == DSPConfig(12, mode, "gumbel", steps, start, 1e-8, gate_lr=gate_lr)
    assert DSPConfig.from_preset(name, k=12, seed=4, anneal_steps=10).anneal_steps == 10
    assert config.build(LAYER_OF).schedule_steps == steps


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("estimator", ["gumbel", "ste"])
def test_dsp_finds_the_gates_that_are_worth_it(estimator: str, seed: int):
    config = DSPConfig(k=6, estimator=estimator, anneal_steps=120, seed=seed)
    gates = config.build(LAYER_OF)
    worth = torch.zeros(24, dtype=torch.float64)
    worth[torch.randperm(24)[:6]] = 1.0
    train(gates, torch.optim.Adam(gates.parameter_groups()), worth, 150)
    assert torch.equal(gates.keep(), worth.bool())

"""Hard-concrete gates: samples, penalties and multipliers against the papers' formulas, and whether they learn."""

from __future__ import annotations

import math

import gate_reference
import pytest
import torch
from gate_inputs import LAYER_OF, UNEVEN, build, optimizer_of, train
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_heads.gates import GateConfig, HardConcreteConfig, LayerwiseConfig
from sparse_heads.gates.hard_concrete import open_probability
from sparse_heads.gates.noise import uniform_noise

pytestmark = pytest.mark.usefixtures("one_thread")
few_examples = settings(max_examples=25, deadline=None)
VOITA = {"beta": 0.33, "gamma": -0.1, "zeta": 1.1}


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_hard_concrete_agrees_with_the_formulas(spread: float):
    gates = build(HardConcreteConfig.from_preset("voita", seed=2), spread=spread)
    gates.steps_done = 17
    log_alpha = gates.rank().numpy()
    uniform = 1e-6 + (1 - 2e-6) * uniform_noise(24, 2, 17).numpy()
    expected = gate_reference.hard_concrete(log_alpha, uniform, **VOITA)
    sampled = gates.sample().detach()
    torch.testing.assert_close(sampled, torch.from_numpy(expected), rtol=0, atol=1e-12)
    assert torch.equal(sampled == 0, torch.from_numpy(expected == 0))
    penalty = 0.0015 * gate_reference.open_probability(log_alpha, **VOITA).sum()
    assert gates.penalty().item() == pytest.approx(penalty, abs=1e-12, rel=0)
    settled = torch.from_numpy(gate_reference.settled(log_alpha, -0.1, 1.1))
    torch.testing.assert_close(gates.settled(), settled * (settled > 0.5), rtol=0, atol=1e-12)
    assert torch.equal(gates.keep(), settled > 0.5) and gates.skips_zeros


@pytest.mark.parametrize("config", [HardConcreteConfig(), HardConcreteConfig(target=4.0), LayerwiseConfig()], ids=repr)
def test_penalties_and_hard_concrete_gates_gradcheck(config: GateConfig):
    gates = build(config, UNEVEN, spread=1.0)
    parameters = list(gates.parameters())
    if len(parameters) > 1:
        parameters[1].data.copy_(torch.tensor([0.7, -0.4]))
    assert torch.autograd.gradcheck(lambda *_: gates.penalty(), parameters[:1])
    if isinstance(config, HardConcreteConfig):
        assert torch.autograd.gradcheck(lambda *_: gates.sample(), parameters[:1])


def test_the_multipliers_ascend_where_the_importances_descend():
    """The Lagrangian a * x + b * x^2 has derivatives x and x^2; an optimizer that minimizes gets their opposites."""
    gates = build(HardConcreteConfig(target=4.0), UNEVEN, spread=1.0)
    excess = (open_probability(gates.importances, 0.33, (-0.1, 1.1)).sum().item() - 4.0) / math.sqrt(
        len(gates.importances)
    )
    gates.penalty().backward()
    assert gates.multipliers.grad.tolist() == pytest.approx([-excess, -(excess**2)], rel=1e-12)


def test_closed_and_wide_open_gates_have_derivative_zero():
    gates = build(HardConcreteConfig(), spread=2.0)
    sampled = gates.sample()
    sampled.sum().backward()
    clamped = (sampled == 0) | (sampled == 1)
    assert 4 < int(clamped.sum()) < 24
    assert torch.equal(gates.importances.grad == 0, clamped)


@given(st.integers(0, 2**40))
@few_examples
def test_hard_concrete_keeps_exactly_k_where_it_is_given(seed: int):
    for k in range(len(UNEVEN) + 1):
        gates = HardConcreteConfig(k=k, seed=seed).build(UNEVEN)
        gates.importances.data.sub_(20.0)  # every gate settled at 0
        assert int(gates.keep().sum()) == k and torch.equal(gates.settled(), gates.keep().double())


def test_hard_concrete_presets():
    voita, louizos = (HardConcreteConfig.from_preset(name) for name in ("voita", "louizos"))
    assert (voita.temperature, voita.stretch, voita.initial) == (0.33, (-0.1, 1.1), "xavier")
    assert (voita.penalty, voita.gate_lr) == (0.0015, 0.1)
    assert (louizos.temperature, louizos.stretch) == (2 / 3, (-0.1, 1.1))
    drawn = louizos.build(torch.arange(10).repeat_interleave(100)).rank()
    assert abs(float(drawn.mean())) < 0.002 and float(drawn.std()) == pytest.approx(0.01, rel=0.1)
    assert HardConcreteConfig.from_preset("louizos", penalty=0.3).penalty == 0.3


def test_a_penalty_closes_what_is_worth_little():
    gates = HardConcreteConfig(penalty=0.3).build(LAYER_OF)
    worth = torch.zeros(24, dtype=torch.float64)
    worth[[1, 5, 22]] = 2.0
    train(gates, optimizer_of(gates), worth, 150)
    assert torch.equal(gates.keep(), worth.bool())


@pytest.mark.parametrize("target", [4, 12, 20])
def test_multipliers_steer_to_the_target(target: int):
    gates = HardConcreteConfig(target=target).build(LAYER_OF)
    assert gates.penalty().item() == 0 and gates.config.penalty == 0
    train(gates, optimizer_of(gates), torch.linspace(0.0, 0.2, 24, dtype=torch.float64), 400)
    expected = gate_reference.open_probability(gates.rank().numpy(), **VOITA).sum()
    assert abs(expected - target) < 0.5
    assert abs(int(gates.keep().sum()) - target) <= 1
    excess = (expected - target) / 24**0.5
    first, second = gates.multipliers.tolist()
    assert gates.penalty().item() == pytest.approx(first * excess + second * excess**2, abs=1e-12)

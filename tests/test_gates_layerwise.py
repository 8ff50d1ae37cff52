"""Layer-wise pruning: samples, penalty and output scale against the paper's formulas, and whether it learns."""

from __future__ import annotations

import gate_reference
import pytest
import torch
from gate_inputs import LAYER_OF, UNEVEN, build, optimizer_of, train

from sparse_heads.gates import LayerwiseConfig
from sparse_heads.gates.noise import uniform_noise

pytestmark = pytest.mark.usefixtures("one_thread")
SHIM = {"beta": 1 / 3, "gamma": -0.1, "zeta": 1.1}


@pytest.mark.parametrize("scaling", [True, False])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_layerwise_agrees_with_the_formulas(spread: float, scaling: bool):
    gates = build(LayerwiseConfig(seed=2, output_scaling=scaling), UNEVEN, spread)
    gates.steps_done = 17
    log_alpha, layer_of = gates.rank().numpy(), UNEVEN.numpy()
    soft = gate_reference.stretched(log_alpha, uniform_noise(9, 2, 17).numpy(), **SHIM)
    is_open = soft >= 0.5
    scale = gate_reference.output_scale(is_open, layer_of) if scaling else 1.0
    assert torch.equal(gates.sample().detach(), torch.from_numpy(is_open * scale))
    kept = log_alpha >= 0
    scale = gate_reference.output_scale(kept, layer_of) if scaling else 1.0
    assert torch.equal(gates.keep(), torch.from_numpy(kept))
    assert torch.equal(gates.settled(), torch.from_numpy(kept * scale))
    assert not gates.skips_zeros


def test_layerwise_gradient_is_the_soft_gates_times_the_detached_scale():
    gates = build(LayerwiseConfig(seed=1), UNEVEN, spread=1.0)
    weights = torch.randn(9, dtype=torch.float64)
    sampled = gates.sample()
    (sampled * weights).sum().backward()
    log_alpha = gates.importances.detach().clone().requires_grad_()
    uniform = uniform_noise(9, 1, 0)
    soft = torch.sigmoid((uniform.log() - (1 - uniform).log() + log_alpha) * 3) * 1.2 - 0.1
    scale = torch.from_numpy(gate_reference.output_scale(soft.detach().numpy() >= 0.5, UNEVEN.numpy()))
    (soft.clamp(1e-6, 1) * scale * weights).sum().backward()
    torch.testing.assert_close(gates.importances.grad, log_alpha.grad, rtol=1e-10, atol=1e-12)
    assert gates.importances.grad[sampled == 0].any()


def test_a_layer_without_open_gates_is_all_zeros():
    gates = LayerwiseConfig().build(UNEVEN)
    gates.importances.data[3:5] = -100.0
    assert torch.equal(gates.sample()[3:5], torch.zeros(2, dtype=torch.float64))
    assert gates.settled().tolist() == [1, 1, 1, 0, 0, 1, 1, 1, 1]
    gates.importances.data[5:8] = -100.0
    assert gates.settled()[8] == pytest.approx(4 / 1.001)


def test_layerwise_penalty_warms_up():
    gates = LayerwiseConfig(penalty=0.5, warmup_start=3, warmup_steps=10).build(LAYER_OF)
    full = 0.5 * float(gate_reference.open_probability(gates.rank().numpy(), **SHIM).sum())
    assert gates.schedule_steps == 13
    for step, share in ((0, 0), (2, 0), (3, 0.1), (12, 1), (500, 1)):
        gates.steps_done = step
        assert gates.penalty().item() == pytest.approx(share * full, abs=1e-12)


def test_layerwise_begins_open_unless_told_otherwise():
    assert LayerwiseConfig().build(LAYER_OF).rank().tolist() == [2.0] * 24
    assert LayerwiseConfig(initial=-1).build(LAYER_OF).rank().tolist() == [-1.0] * 24


def test_layerwise_closes_what_is_worth_little():
    gates = LayerwiseConfig(penalty=0.3, warmup_steps=20, output_scaling=False).build(LAYER_OF)
    worth = torch.zeros(24, dtype=torch.float64)
    worth[[1, 5, 22]] = 2.0
    train(gates, optimizer_of(gates, gate_lr=0.1), worth, 150)
    assert torch.equal(gates.keep(), worth.bool())

"""What every gate method keeps to: noise, evaluation, precision, state."""

from __future__ import annotations

import copy
import io
import json
import math

import pytest
import torch
from gate_inputs import LAYER_OF, UNEVEN, build, optimizer_of, train
from torch import Tensor, nn

from sparse_heads.errors import InvalidArgumentError
from sparse_heads.gates import DSPConfig, GateConfig, HardConcreteConfig, LayerwiseConfig

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = [
    DSPConfig(k=7),
    DSPConfig(k=7, estimator="ste"),
    HardConcreteConfig(),
    HardConcreteConfig(k=7, penalty=0.0),
    HardConcreteConfig(target=6.0),
    LayerwiseConfig(),
    LayerwiseConfig(output_scaling=False, initial="xavier", warmup_steps=0),
]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=repr)


@each_config
def test_training_gates_are_a_function_of_seed_and_step(config: GateConfig):
    gates, same = build(config), build(config)
    state = torch.get_rng_state()
    first = gates.sample()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(first, gates.sample()) and torch.equal(first, same.sample())
    gates.advance()
    assert torch.equal(first, gates.sample()) == (gates.temperature is None)
    assert gates.steps_done == 1


@each_config
def test_each_sample_has_a_graph_of_its_own(config: GateConfig):
    gates, once = build(config, spread=1.0), build(config)
    once.load_state_dict(gates.state_dict())
    weights = torch.linspace(-1, 1, len(LAYER_OF), dtype=torch.float64)
    for _ in range(2):
        (gates.sample() * weights).sum().backward()
    (once.sample() * weights).sum().backward()
    assert torch.equal(gates.importances.grad, 2 * once.importances.grad) and once.importances.grad.any()


@each_config
def test_evaluation_has_no_noise_and_no_graph(config: GateConfig):
    gates = build(config, spread=3.0)
    settled, keep, rank = gates.settled(), gates.keep(), gates.rank()
    gates.advance()
    assert torch.equal(settled, gates.settled()) and torch.equal(keep, gates.keep())
    assert settled.dtype == torch.float64 and keep.dtype == torch.bool
    assert not settled.requires_grad and not rank.requires_grad
    assert torch.equal(settled != 0, keep)
    assert rank[keep].min() > rank[~keep].max()
    rank.zero_()
    assert gates.importances.all()


@each_config
def test_importances_stay_float64(config: GateConfig):
    parent = nn.ModuleDict({"gates": build(config), "linear": nn.Linear(2, 2)})
    before = parent["gates"].importances.detach().clone()
    for cast in (parent.half, parent.bfloat16, parent.float, lambda: parent.to(torch.float16), parent.double):
        cast()
        assert all(parameter.dtype == torch.float64 for parameter in parent["gates"].parameters())
    parent["gates"].type(torch.float16)
    assert torch.equal(parent["gates"].importances, before) and parent["gates"].sample().dtype == torch.float64
    parent.half()
    assert parent["linear"].weight.dtype == torch.float16
    parent.to("meta")
    assert all(tensor.is_meta for tensor in [*parent["gates"].parameters(), *parent["gates"].buffers()])


@each_config
def test_autocast_does_not_touch_gates(config: GateConfig):
    gates = build(config)
    expected = gates.sample()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gates.sample(), expected) and gates.penalty().dtype == torch.float64


@each_config
def test_state_continues_bit_for_bit(config: GateConfig):
    worth = torch.linspace(-1, 1, len(LAYER_OF), dtype=torch.float64)
    gates = build(config)
    optimizer = optimizer_of(gates)
    train(gates, optimizer, worth, 4)
    file = io.BytesIO()
    torch.save({"gates": gates.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(gates, optimizer, worth, 4)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = build(config)
    resumed.load_state_dict(saved["gates"])
    resumed_optimizer = optimizer_of(resumed)
    resumed_optimizer.load_state_dict(saved["optimizer"])
    train(resumed, resumed_optimizer, worth, 4)
    assert resumed.steps_done == gates.steps_done == 8
    for mine, theirs in zip(resumed.parameters(), gates.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine.any()
    assert torch.equal(resumed.sample(), gates.sample()) and torch.equal(resumed.penalty(), gates.penalty())


@each_config
def test_the_configuration_goes_through_json(config: GateConfig):
    stored = json.loads(json.dumps(config.to_dict()))
    assert stored.pop("method") == type(config).__name__
    assert type(config)(**stored) == config
    assert copy.deepcopy(build(config)).config == config


@each_config
def test_a_value_that_is_not_finite_is_noticed(config: GateConfig):
    gates = build(config)
    assert gates.is_finite()
    list(gates.parameters())[-1].data[1] = math.inf
    assert not gates.is_finite()


@each_config
def test_importances_get_their_own_learning_rate_and_no_decay(config: GateConfig):
    gates = build(config)
    for gate_lr, expected in ((None, config.gate_lr), (0.25, 0.25)):
        groups = gates.parameter_groups(gate_lr)
        assert [parameter for group in groups for parameter in group["params"]] == list(gates.parameters())
        assert all(group["lr"] == expected and group["weight_decay"] == 0 for group in groups)


def test_first_draws_follow_the_seed_and_xaviers_bound():
    for config in (DSPConfig(k=1), HardConcreteConfig(), LayerwiseConfig(initial="xavier")):
        layer_of = torch.arange(12).repeat_interleave(12)
        drawn = [type(config)(**{**vars(config), "seed": seed}).build(layer_of).importances for seed in (0, 0, 1)]
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
        assert 0.48 < drawn[0].abs().max() <= 0.5
    bound = math.sqrt(6 / (3 + 4))  # rows that count, and the most heads in one
    drawn = torch.cat([DSPConfig(k=1, seed=seed).build(UNEVEN).importances.detach() for seed in range(30)])
    assert 0.97 * bound < drawn.abs().max() <= bound


@pytest.mark.parametrize(
    "config, layer_of, message",
    [
        (DSPConfig(k=7), UNEVEN, r"state_dict: wanted the state of 24 gates, got a float64 tensor \[9\]"),
        (DSPConfig(k=8), LAYER_OF, "state_dict: wanted gates of the same configuration, got k 8 against 7"),
        (DSPConfig(k=7, seed=1, mode="pipelined"), LAYER_OF, "got mode 'pipelined' against 'joint', seed 1 against 0"),
        (HardConcreteConfig(), LAYER_OF, "got method 'HardConcreteConfig' against 'DSPConfig', k None against 7"),
    ],
)
def test_the_state_of_other_gates_is_refused(config: GateConfig, layer_of: Tensor, message: str):
    gates = DSPConfig(k=7).build(LAYER_OF)
    before = gates.rank()
    with pytest.raises(InvalidArgumentError, match=message):
        gates.load_state_dict(config.build(layer_of).state_dict())
    assert torch.equal(gates.rank(), before)


def test_a_state_without_its_steps_is_refused():
    gates = DSPConfig(k=7).build(LAYER_OF)
    with pytest.raises(InvalidArgumentError, match="state_dict: wanted the state of gates, with config and steps_done"):
        gates.load_state_dict({"importances": gates.rank()})

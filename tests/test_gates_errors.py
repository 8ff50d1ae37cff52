"""What configurations refuse, and in which words."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_heads.errors import InvalidArgumentError, InvalidTypeError
from sparse_heads.gates import DSPConfig, GateConfig, HardConcreteConfig, LayerwiseConfig

LAYER_OF = torch.arange(6).repeat_interleave(4)
EVERY = [(DSPConfig, {"k": 3}), (HardConcreteConfig, {}), (LayerwiseConfig, {})]


@pytest.mark.parametrize("config, needed", EVERY)
@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"mode": "both"}, InvalidArgumentError, "mode: wanted 'joint' or 'pipelined', got 'both'"),
        ({"mode": None}, InvalidTypeError, "mode: wanted 'joint' or 'pipelined', got NoneType None"),
        ({"kinds": "self"}, InvalidTypeError, "kinds: wanted a tuple of 'self', 'cross' or .* got str 'self'"),
        ({"kinds": ()}, InvalidArgumentError, "kinds: wanted a tuple of .* got none"),
        ({"kinds": ("selves",)}, InvalidArgumentError, "kinds: wanted a tuple of .* got str 'selves'"),
        ({"kinds": (("decoder", "both"),)}, InvalidArgumentError, r"kinds: .* got tuple \('decoder', 'both'\)"),
        ({"kinds": (3,)}, InvalidArgumentError, "kinds: wanted a tuple of .* got int 3"),
        ({"gate_lr": 0.0}, InvalidArgumentError, "gate_lr: wanted above 0, got float 0.0"),
        ({"gate_lr": True}, InvalidTypeError, "gate_lr: wanted a number, got bool True"),
        ({"gate_lr": math.inf}, InvalidArgumentError, "gate_lr: wanted a finite number, got float inf"),
        ({"seed": -1}, InvalidArgumentError, "seed: wanted at least 0, got int -1"),
        ({"seed": 0.5}, InvalidTypeError, "seed: wanted an int, got float 0.5"),
    ],
)
def test_every_configuration_refuses(config, needed, changes, error, message):
    with pytest.raises(error, match=message):
        config(**needed, **changes)


@pytest.mark.parametrize("config, needed", EVERY)
def test_kinds_are_kept_as_tuples(config, needed):
    assert config(**needed).kinds is None
    assert config(**needed, kinds=["self", ["decoder", "cross"]]).kinds == ("self", ("decoder", "cross"))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"k": -1}, InvalidArgumentError, "k: wanted at least 0, got int -1"),
        ({"k": True}, InvalidTypeError, "k: wanted an int, got bool True"),
        ({"k": 3.0}, InvalidTypeError, "k: wanted an int, got float 3.0"),
        ({"estimator": "st"}, InvalidArgumentError, "estimator: wanted 'gumbel' or 'ste', got 'st'"),
        ({"anneal_steps": -5}, InvalidArgumentError, "anneal_steps: wanted at least 0, got int -5"),
        ({"anneal_steps": 1e3}, InvalidTypeError, "anneal_steps: wanted an int, got float 1000.0"),
        ({"start_temperature": 0}, InvalidArgumentError, "start_temperature: wanted above 0, got float 0.0"),
        ({"end_temperature": -1.0}, InvalidArgumentError, "end_temperature: wanted above 0, got float -1.0"),
        ({"end_temperature": 1e-320}, InvalidArgumentError, "end_temperature: wanted at least 1e-100, got float"),
        ({"end_temperature": math.nan}, InvalidArgumentError, "end_temperature: wanted a finite number, got float nan"),
    ],
)
def test_dsp_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        DSPConfig(**{"k": 3, **changes})


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"penalty": -0.1}, InvalidArgumentError, "penalty: wanted at least 0, got float -0.1"),
        ({"penalty": math.nan}, InvalidArgumentError, "penalty: wanted a finite number, got float nan"),
        ({"penalty": 0.1, "target": 3}, InvalidArgumentError, "penalty: wanted 0 with a target, .* got float 0.1"),
        ({"temperature": 0.0}, InvalidArgumentError, "temperature: wanted above 0, got float 0.0"),
        ({"stretch": (0.0, 1.1)}, InvalidArgumentError, r"stretch: wanted a pair .* got tuple \(0.0, 1.1\)"),
        ({"stretch": (-0.1, 1)}, InvalidArgumentError, r"wanted a pair \(below 0, above 1\), got tuple \(-0.1, 1.0\)"),
        ({"stretch": (-0.1, math.inf)}, InvalidArgumentError, "stretch: wanted a finite number, got float inf"),
        ({"stretch": 1.1}, InvalidTypeError, "stretch: wanted a pair .* got float 1.1"),
        ({"initial": "normal"}, InvalidArgumentError, "initial: wanted 'xavier' or a number, got 'normal'"),
        ({"initial": None}, InvalidTypeError, "initial: wanted 'xavier' or a number, got NoneType None"),
        ({"initial_std": 0.1}, InvalidArgumentError, "initial_std: wanted 0 with initial 'xavier', got float 0.1"),
        ({"initial": 1.0, "initial_std": -1}, InvalidArgumentError, "initial_std: wanted at least 0, got float -1.0"),
        ({"k": -1}, InvalidArgumentError, "k: wanted at least 0, got int -1"),
        ({"k": False}, InvalidTypeError, "k: wanted an int, got bool False"),
        ({"target": -1}, InvalidArgumentError, "target: wanted at least 0, got float -1.0"),
    ],
)
def test_hard_concrete_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        HardConcreteConfig(**changes)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"penalty": -1}, InvalidArgumentError, "penalty: wanted at least 0, got float -1.0"),
        ({"warmup_start": -1}, InvalidArgumentError, "warmup_start: wanted at least 0, got int -1"),
        ({"warmup_steps": 2.5}, InvalidTypeError, "warmup_steps: wanted an int, got float 2.5"),
        ({"initial": math.inf}, InvalidArgumentError, "initial: wanted a finite number, got float inf"),
        ({"initial": "open"}, InvalidArgumentError, "initial: wanted 'xavier' or a number, got 'open'"),
        ({"temperature": -1}, InvalidArgumentError, "temperature: wanted above 0, got float -1.0"),
        ({"stretch": (0.1, 0.9)}, InvalidArgumentError, r"stretch: wanted a pair .* got tuple \(0.1, 0.9\)"),
    ],
)
def test_layerwise_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        LayerwiseConfig(**changes)


@pytest.mark.parametrize(
    "config, message",
    [
        (DSPConfig(k=25), "k: wanted at most 24, the number of gates, got int 25"),
        (HardConcreteConfig(k=25), "k: wanted at most 24, the number of gates, got int 25"),
        (HardConcreteConfig(target=24.5), "target: wanted at most 24, the number of gates, got float 24.5"),
    ],
)
def test_more_than_there_are_gates_is_refused(config: GateConfig, message: str):
    with pytest.raises(InvalidArgumentError, match=message):
        config.build(LAYER_OF)


@pytest.mark.parametrize("config, needed", EVERY)
@pytest.mark.parametrize(
    "layer_of, error, message",
    [
        ([0, 1], InvalidTypeError, r"layer_of: wanted an int64 tensor \[n\], got list"),
        (LAYER_OF.int(), InvalidTypeError, r"layer_of: wanted an int64 tensor \[n\], got a int32 tensor \[24\]"),
        (LAYER_OF[None], InvalidArgumentError, r"layer_of: wanted one row .* got a int64 tensor \[1, 24\]"),
        (LAYER_OF[:0], InvalidArgumentError, r"layer_of: wanted one row .* got a int64 tensor \[0\]"),
        (LAYER_OF - 1, InvalidArgumentError, r"layer_of: wanted one row \(0 or above\) for each of at least one gate"),
    ],
)
def test_rows_that_are_none_are_refused(config, needed, layer_of, error, message):
    with pytest.raises(error, match=message):
        config(**needed).build(layer_of)


@pytest.mark.parametrize("config, needed", EVERY[:2])
def test_unknown_presets_are_refused(config, needed):
    with pytest.raises(InvalidArgumentError, match="preset: wanted '.*' or '.*', got 'bert'"):
        config.from_preset("bert", **needed)

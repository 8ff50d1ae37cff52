"""What the configurations of all gate methods share: four fields and their checks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import describe, invalid, invalid_type
from ..layers import KINDS, whole_number

if TYPE_CHECKING:
    from .method import GateMethod

MODES = ("joint", "pipelined")
_SMALLEST_TEMPERATURE = 1e-100  # what is divided by less overflows


class GateConfig:
    """Base of the frozen dataclasses that describe a gate method.

    mode: "joint" (the model's weights train too) or "pipelined" (they are frozen).
    kinds: which layers get gates: "self" or "cross", or (stack, kind) pairs such as ("decoder", "cross"); None = all.
    gate_lr: learning rate of the importances.
    seed: of the importances' first draw and of the noise.
    """

    mode: str
    kinds: tuple[str | tuple[str, str], ...] | None
    gate_lr: float
    seed: int

    def __post_init__(self) -> None:
        one_of("mode", self.mode, MODES)
        self._set(
            kinds=_checked_kinds(self.kinds),
            gate_lr=positive_number("gate_lr", self.gate_lr),
            seed=whole_number("seed", self.seed, 0),
        )

    def build(self, layer_of: Tensor) -> GateMethod:
        """The gates: layer_of int64 [n] gives the row (layer) of each."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The class's name as "method" and all fields, in what JSON can hold."""
        fields = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        if self.kinds is not None:
            fields["kinds"] = [kind if isinstance(kind, str) else list(kind) for kind in self.kinds]
        return {"method": type(self).__name__, **fields}

    def _set(self, **checked: Any) -> None:
        """Put the checked fields in place, which a frozen dataclass otherwise forbids."""
        for field, value in checked.items():
            object.__setattr__(self, field, value)


def preset_fields(presets: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """The fields of the preset `name`."""
    return presets[one_of("preset", name, presets)]


def one_of(argument: str, value: object, choices: Iterable[str]) -> str:
    """`value`, if it is one of `choices`."""
    choices = tuple(choices)
    if not isinstance(value, str):
        raise invalid_type(argument, " or ".join(map(repr, choices)), describe(value))
    if value not in choices:
        raise invalid(argument, " or ".join(map(repr, choices)), repr(value))
    return value


def finite_number(argument: str, value: object) -> float:
    """`value` as a float, if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise invalid_type(argument, "a number", describe(value))
    if not math.isfinite(value):
        raise invalid(argument, "a finite number", value)
    return float(value)


def positive_number(argument: str, value: object) -> float:
    """`value` as a float, if it is finite and above 0."""
    number = finite_number(argument, value)
    if number <= 0:
        raise invalid(argument, "above 0", number)
    return number


def temperature_above_zero(argument: str, value: object) -> float:
    """`value` as a float, if scores may be divided by it."""
    number = positive_number(argument, value)
    if number < _SMALLEST_TEMPERATURE:
        raise invalid(argument, f"at least {_SMALLEST_TEMPERATURE}", number)
    return number


def number_from_zero(argument: str, value: object) -> float:
    """`value` as a float, if it is finite and at least 0."""
    number = finite_number(argument, value)
    if number < 0:
        raise invalid(argument, "at least 0", number)
    return number


def stretch_interval(value: object) -> tuple[float, float]:
    """`value` as (gamma, zeta), if it reaches beyond [0, 1] on both sides."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise invalid_type("stretch", "a pair (below 0, above 1)", describe(value))
    low, high = (finite_number("stretch", end) for end in value)
    if not (low < 0 and high > 1):
        raise invalid("stretch", "a pair (below 0, above 1)", (low, high))
    return low, high


def initial_log_alpha(value: object) -> str | float:
    """`value`, if it is "xavier" or a finite number."""
    if value == "xavier":
        return "xavier"
    if isinstance(value, str):
        raise invalid("initial", "'xavier' or a number", repr(value))
    if isinstance(value, bool) or not isinstance(value, Real):
        raise invalid_type("initial", "'xavier' or a number", describe(value))
    return finite_number("initial", value)


def _checked_kinds(kinds: object) -> tuple[str | tuple[str, str], ...] | None:
    if kinds is None:
        return None
    wanted = "a tuple of 'self', 'cross' or (stack, kind) pairs, or None"
    if not isinstance(kinds, (tuple, list)):
        raise invalid_type("kinds", wanted, describe(kinds))
    checked = tuple(tuple(kind) if isinstance(kind, list) else kind for kind in kinds)
    for kind in checked:
        pair = isinstance(kind, tuple) and len(kind) == 2 and isinstance(kind[0], str)
        if (kind[1] if pair else kind) not in KINDS:
            raise invalid("kinds", wanted, describe(kind))
    if not checked:
        raise invalid("kinds", wanted, "none")
    return checked


def fields_that_differ(mine: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """For a message: the fields of two configurations that differ, with the values of both."""
    keys = [key for key in {**mine, **other} if mine.get(key) != other.get(key)]
    return ", ".join(f"{key} {other.get(key)!r} against {mine.get(key)!r}" for key in keys)

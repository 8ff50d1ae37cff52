"""L0 regularisation with hard-concrete gates (Louizos et al. 2018; for heads Voita et al. 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import invalid
from ..layers import whole_number
from .config import (
    GateConfig,
    initial_log_alpha,
    number_from_zero,
    preset_fields,
    stretch_interval,
    temperature_above_zero,
)
from .hard_concrete import hard_concrete, open_probability, settled_gate
from .method import GateMethod, checked_layer_of, initial_generator, xavier_uniform
from .top_k import top_k

_NOISE_MARGIN = 1e-6  # the papers draw from (margin, 1 - margin)
_PRESETS: dict[str, dict[str, Any]] = {
    "voita": {"temperature": 0.33, "initial": "xavier", "penalty": 0.0015, "gate_lr": 0.1},
    "louizos": {"temperature": 2 / 3, "initial": 0.0, "initial_std": 0.01},
}


@dataclass(frozen=True)
class HardConcreteConfig(GateConfig):
    """Close heads by a penalty on the expected number of open gates.

    penalty: weight of that number, summed over all gates; 0.0015 unless given. (Voita's code averages over layers, so
        its lambda is this times the number of layers.)
    temperature, stretch: of the hard-concrete distribution.
    initial: the first log_alpha: "xavier", or a mean (logit of the probability to be open, before the stretch) around
        which they are drawn with the standard deviation `initial_std`.
    k: keep exactly the k largest log_alpha, as plain heads without a scale. None: the heads whose settled gate is
        above 0.5, scaled by it; how many follows from the penalty.
    target: steer the expected number of open gates to this one, by two multipliers that are trained in the opposite
        direction, instead of `penalty`, which is 0 then.
    mode, kinds, gate_lr, seed: see `GateConfig`.
    """

    penalty: float | None = None
    temperature: float = 0.33
    stretch: tuple[float, float] = (-0.1, 1.1)
    initial: str | float = "xavier"
    initial_std: float = 0.0
    k: int | None = None
    target: float | None = None
    mode: str = "joint"
    kinds: tuple[str | tuple[str, str], ...] | None = None
    gate_lr: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty is None:
            self._set(penalty=0.0015 if self.target is None else 0.0)
        self._set(
            initial=initial_log_alpha(self.initial),
            penalty=number_from_zero("penalty", self.penalty),
            temperature=temperature_above_zero("temperature", self.temperature),
            stretch=stretch_interval(self.stretch),
            initial_std=number_from_zero("initial_std", self.initial_std),
            k=None if self.k is None else whole_number("k", self.k, 0),
            target=None if self.target is None else number_from_zero("target", self.target),
        )
        if self.target is not None and self.penalty:
            raise invalid("penalty", "0 with a target, whose multipliers take its place", self.penalty)
        if self.initial == "xavier" and self.initial_std:
            raise invalid("initial_std", "0 with initial 'xavier'", self.initial_std)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> HardConcreteConfig:
        """The setting "voita" (as Li et al. 2021 ran it on BERT) or "louizos" (distribution and first draw)."""
        return cls(**{**preset_fields(_PRESETS, name), **changes})

    def build(self, layer_of: Tensor) -> HardConcreteGates:
        layer_of = checked_layer_of(layer_of)
        for field in ("k", "target"):
            value = getattr(self, field)
            if value is not None and value > len(layer_of):
                raise invalid(field, f"at most {len(layer_of)}, the number of gates", value)
        return HardConcreteGates(self, self._draw(layer_of))

    def _draw(self, layer_of: Tensor) -> Tensor:
        if self.initial == "xavier":
            return xavier_uniform(layer_of, self.seed)
        generator = initial_generator(self.seed)
        noise = torch.randn(len(layer_of), dtype=torch.float64, device="cpu", generator=generator)
        return self.initial + self.initial_std * noise


class HardConcreteGates(GateMethod):
    """Gates in [0, 1], many of them exactly 0; the importances are the log_alpha of the papers."""

    config: HardConcreteConfig
    skips_zeros = True

    def __init__(self, config: HardConcreteConfig, importances: Tensor) -> None:
        super().__init__(config, importances)
        if config.target is not None:
            self.multipliers = nn.Parameter(torch.zeros(2, dtype=torch.float64, device="cpu"))

    @property
    def temperature(self) -> float:
        return self.config.temperature

    def sample(self) -> Tensor:
        uniform = _NOISE_MARGIN + (1.0 - 2.0 * _NOISE_MARGIN) * self._uniform()
        return hard_concrete(self.importances, uniform, self.config.temperature, self.config.stretch)

    def penalty(self) -> Tensor:
        """penalty * (expected open gates); or with a target the Lagrangian a * excess + b * excess^2.

        excess = (expected open gates - target) / sqrt(n). The root only sets how fast the multipliers a and b act:
        without it the gates close before they have learned, with n instead the number swings for hundreds of steps.
        """
        expected = open_probability(self.importances, self.config.temperature, self.config.stretch).sum()
        if self.config.target is None:
            return self.config.penalty * expected
        excess = (expected - self.config.target) / math.sqrt(len(self.importances))
        linear, quadratic = _Reversed.apply(self.multipliers)
        return linear * excess + quadratic * excess.square()

    def keep(self) -> Tensor:
        if self.config.k is not None:
            return top_k(self.importances, self.config.k)
        return settled_gate(self.importances.detach(), self.config.stretch) > 0.5

    def settled(self) -> Tensor:
        keep = self.keep()
        if self.config.k is not None:
            return keep.double()
        return settled_gate(self.importances.detach(), self.config.stretch) * keep

    def parameter_groups(self, gate_lr: float | None = None) -> list[dict[str, Any]]:
        """As everywhere; with a target the multipliers too."""
        groups = super().parameter_groups(gate_lr)
        if self.config.target is not None:
            groups[0]["params"].append(self.multipliers)
        return groups


class _Reversed(torch.autograd.Function):
    """The multipliers themselves, with the opposite gradient: what descends on the loss ascends on them."""

    @staticmethod
    def forward(ctx: Any, multipliers: Tensor) -> Tensor:
        return multipliers.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad

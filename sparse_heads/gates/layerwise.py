"""Layer-wise pruning (Shim et al. 2021): straight-through hard-concrete gates, and three aids to their training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers import whole_number
from .config import GateConfig, initial_log_alpha, number_from_zero, stretch_interval, temperature_above_zero
from .hard_concrete import open_probability, stretched_concrete
from .method import GateMethod, checked_layer_of, xavier_uniform
from .schedule import linear_warmup


@dataclass(frozen=True)
class LayerwiseConfig(GateConfig):
    """Close heads by a penalty, with gates that are 0 or 1 in training too.

    penalty: weight of the expected number of open gates, summed over all gates.
    warmup_start, warmup_steps: the penalty is 0 before step `warmup_start` and rises linearly over `warmup_steps`; by
        default over about an epoch of the published setting; 0 and 0 switch the warm-up off.
    initial: the first log_alpha of every gate, or "xavier" for random ones.
    output_scaling: multiply the open gates of a layer by (its heads / its open heads).
    temperature, stretch: of the hard-concrete distribution.
    mode, kinds, gate_lr, seed: see `GateConfig`. As published, gate_lr is ten times the weights' learning rate.
    """

    penalty: float = 0.02
    warmup_start: int = 0
    warmup_steps: int = 2_800
    initial: str | float = 2.0
    output_scaling: bool = True
    temperature: float = 1 / 3
    stretch: tuple[float, float] = (-0.1, 1.1)
    mode: str = "joint"
    kinds: tuple[str | tuple[str, str], ...] | None = None
    gate_lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(
            initial=initial_log_alpha(self.initial),
            penalty=number_from_zero("penalty", self.penalty),
            warmup_start=whole_number("warmup_start", self.warmup_start, 0),
            warmup_steps=whole_number("warmup_steps", self.warmup_steps, 0),
            temperature=temperature_above_zero("temperature", self.temperature),
            stretch=stretch_interval(self.stretch),
        )

    def build(self, layer_of: Tensor) -> LayerwiseGates:
        layer_of = checked_layer_of(layer_of)
        if self.initial == "xavier":
            return LayerwiseGates(self, xavier_uniform(layer_of, self.seed), layer_of)
        filled = torch.full((len(layer_of),), self.initial, dtype=torch.float64, device="cpu")
        return LayerwiseGates(self, filled, layer_of)


class LayerwiseGates(GateMethod):
    """Gates of 0 or 1, times the layer's output scale; the importances are the log_alpha of the papers.

    Closed heads get gradients too, so they have to be computed in training. A head is kept if its gate is open at
    least half of the time: if log_alpha is at least 0.
    """

    config: LayerwiseConfig

    def __init__(self, config: LayerwiseConfig, importances: Tensor, layer_of: Tensor) -> None:
        super().__init__(config, importances)
        self.register_buffer("layer_of", torch.unique(layer_of, return_inverse=True)[1], persistent=False)
        self.register_buffer("heads", self._in_layer(torch.ones_like(importances)), persistent=False)

    @property
    def schedule_steps(self) -> int:
        return self.config.warmup_start + self.config.warmup_steps

    @property
    def temperature(self) -> float:
        return self.config.temperature

    def sample(self) -> Tensor:
        config = self.config
        gate = stretched_concrete(self.importances, self._uniform(), config.temperature, config.stretch)
        gate = gate.clamp(1e-6, 1.0)
        is_open = gate.detach() >= 0.5
        return (is_open + (gate - gate.detach())) * self._output_scale(is_open)

    def penalty(self) -> Tensor:
        config = self.config
        weight = config.penalty * linear_warmup(self.steps_done, config.warmup_start, config.warmup_steps)
        return weight * open_probability(self.importances, config.temperature, config.stretch).sum()

    def keep(self) -> Tensor:
        return self.importances.detach() >= 0

    def settled(self) -> Tensor:
        keep = self.keep()
        return keep * self._output_scale(keep)

    def _output_scale(self, is_open: Tensor) -> Tensor:
        """float64 [n]: for each gate its layer's heads / open heads, between 1 and the heads."""
        if not self.config.output_scaling:
            return torch.ones_like(self.heads)
        return (self.heads / (self._in_layer(is_open.double()) + 1e-3)).clamp_min(1.0).minimum(self.heads)

    def _in_layer(self, values: Tensor) -> Tensor:
        """For each gate, the sum of values [n] over the gates of its layer."""
        return torch.zeros_like(values).index_add(0, self.layer_of, values)[self.layer_of]

"""Differentiable subset pruning (Li, Cotterell & Sachan 2021): exactly k heads, learned through a relaxed top-k."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import invalid
from ..layers import whole_number
from .config import GateConfig, one_of, preset_fields, temperature_above_zero
from .method import GateMethod, checked_layer_of, xavier_uniform
from .noise import gumbel
from .schedule import geometric
from .top_k import soft_top_k, straight_through_top_k, top_k

# The authors' settings, for BERT on MNLI and a Transformer on IWSLT14.
_PRESETS: dict[str, dict[str, Any]] = {
    "bert_joint": {"mode": "joint", "anneal_steps": 25_000, "start_temperature": 1000.0, "gate_lr": 0.5},
    "bert_pipelined": {"mode": "pipelined", "anneal_steps": 8_333, "start_temperature": 1000.0, "gate_lr": 0.5},
    "iwslt_joint": {"mode": "joint", "anneal_steps": 15_000, "start_temperature": 0.1, "gate_lr": 0.2},
    "iwslt_pipelined": {"mode": "pipelined", "anneal_steps": 250, "start_temperature": 0.1, "gate_lr": 0.2},
}


@dataclass(frozen=True)
class DSPConfig(GateConfig):
    """Keep exactly `k` heads of all that have gates.

    estimator: "gumbel", the relaxation with noise and a temperature; or "ste", the hard top-k with a straight-through
        gradient, without either.
    anneal_steps: over how many steps the temperature falls, by equal factors; 0 = `end_temperature` throughout. The
        importances learn while it falls, so let the schedule end within the training.
    mode, kinds, gate_lr, seed: see `GateConfig`.
    """

    k: int
    mode: str = "joint"
    estimator: str = "gumbel"
    anneal_steps: int = 25_000
    start_temperature: float = 1000.0
    end_temperature: float = 1e-8
    kinds: tuple[str | tuple[str, str], ...] | None = None
    gate_lr: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("estimator", self.estimator, ("gumbel", "ste"))
        self._set(
            k=whole_number("k", self.k, 0),
            anneal_steps=whole_number("anneal_steps", self.anneal_steps, 0),
            start_temperature=temperature_above_zero("start_temperature", self.start_temperature),
            end_temperature=temperature_above_zero("end_temperature", self.end_temperature),
        )

    @classmethod
    def from_preset(cls, name: str, k: int, **changes: Any) -> DSPConfig:
        """The published setting "bert_joint", "bert_pipelined", "iwslt_joint" or "iwslt_pipelined", with changes."""
        return cls(k, **{**preset_fields(_PRESETS, name), **changes})

    def build(self, layer_of: Tensor) -> DSPGates:
        layer_of = checked_layer_of(layer_of)
        if self.k > len(layer_of):
            raise invalid("k", f"at most {len(layer_of)}, the number of gates", self.k)
        return DSPGates(self, xavier_uniform(layer_of, self.seed))


class DSPGates(GateMethod):
    """Gates that sum to k in training; the k largest importances are kept."""

    config: DSPConfig

    @property
    def schedule_steps(self) -> int:
        return self.config.anneal_steps if self.config.estimator == "gumbel" else 0

    @property
    def temperature(self) -> float | None:
        if self.config.estimator == "ste":
            return None
        config = self.config
        return geometric(self.steps_done, config.anneal_steps, config.start_temperature, config.end_temperature)

    def sample(self) -> Tensor:
        if self.config.estimator == "ste":
            return straight_through_top_k(self.importances, self.config.k)
        return soft_top_k(self.importances + gumbel(self._uniform()), self.config.k, self.temperature)

    def keep(self) -> Tensor:
        return top_k(self.importances, self.config.k)

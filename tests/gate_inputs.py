"""Gates to test, and a loss to train them with."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_heads.gates import GateConfig, GateMethod

LAYER_OF = torch.arange(6).repeat_interleave(4)
UNEVEN = torch.tensor([0, 0, 0, 2, 2, 5, 5, 5, 5])


def build(config: GateConfig, layer_of: Tensor = LAYER_OF, spread: float | None = None) -> GateMethod:
    """The gates of `config`; with `spread`, with importances of that standard deviation."""
    gates = config.build(layer_of)
    if spread is not None:
        gates.importances.data = torch.randn(len(layer_of), dtype=torch.float64) * spread
    return gates


def train(gates: GateMethod, optimizer: torch.optim.Optimizer, worth: Tensor, steps: int) -> None:
    """Minimise the negative worth of the open gates, plus the penalty."""
    for _ in range(steps):
        optimizer.zero_grad()
        (gates.penalty() - (gates.sample() * worth).sum()).backward()
        optimizer.step()
        gates.advance()


def optimizer_of(gates: GateMethod, **changes: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(gates.parameter_groups(**changes))

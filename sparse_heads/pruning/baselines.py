"""Scores that need no data: weight magnitude, and chance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layers import whole_number


def magnitude(handle: Any, batches: Any) -> Tensor:
    """Frobenius norm of a head's query, key, value and output weights together: float64 `[L, H]`."""
    scores = torch.zeros(len(handle.layers), handle.layers.max_heads, dtype=torch.float64)
    for row, (site, layer) in enumerate(zip(handle.sites, handle.layers, strict=True)):
        squares = torch.zeros(layer.num_heads, dtype=torch.float64)
        for role, projection in site.projections.items():
            weight = projection.weight.detach()
            weight = weight.t() if role == "output" else weight
            heads = layer.num_heads if role in ("query", "output") else layer.num_kv_heads
            blocks = weight.double().reshape(heads, -1).square().sum(1).cpu()
            squares += blocks.repeat_interleave(layer.num_heads // heads)
        scores[row, : layer.num_heads] = squares.sqrt()
    return scores


def random(handle: Any, batches: Any, *, seed: int = 0) -> Tensor:
    """Uniform scores from a generator of their own: float64 `[L, H]`."""
    generator = torch.Generator().manual_seed(whole_number("seed", seed, 0))
    return torch.rand(len(handle.layers), handle.layers.max_heads, dtype=torch.float64, generator=generator)

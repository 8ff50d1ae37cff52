"""Reference projections: torch only, any device and dtype, differentiable; the oracle of every other backend.

Token-major layout: a projection's heads stand side by side in the last dimension, `[..., kept * head_dim]`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import gather_blocks, scatter_blocks


def in_projection(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], kept: Sequence[Tensor], head_dim: int
) -> list[Tensor]:
    """`x [..., E]` through the kept heads' rows of each `weight [H*D, E]`: a list of `[..., kept*D]`."""
    outputs = []
    for weight, bias, heads in zip(weights, biases, kept, strict=True):
        rows = gather_blocks(weight, heads, head_dim, 0)
        outputs.append(F.linear(x, rows, None if bias is None else gather_blocks(bias, heads, head_dim, 0)))
    return outputs


def out_projection(heads: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor, head_dim: int) -> Tensor:
    """Kept heads `[..., kept*D]`, or all heads `[..., H*D]` of which the kept are read, through `weight [E, H*D]`."""
    if heads.shape[-1] != kept.shape[0] * head_dim:
        heads = gather_blocks(heads, kept, head_dim, -1)
    return F.linear(heads, gather_blocks(weight, kept, head_dim, 1), bias)


def in_projection_per_request(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], masks: Sequence[Tensor], head_dim: int
) -> list[Tensor]:
    """As `in_projection` with one row of each bool `mask [B, H]` a request: `[B, T, H*D]`, zeros where masked."""
    outputs = []
    for weight, bias, mask in zip(weights, biases, masks, strict=True):
        # No request's rows come first: an empty batch has a shape, a dtype and gradients too.
        rows = [F.linear(x[:0], weight, bias)]
        for request, heads in enumerate(mask):
            kept = heads.nonzero()[:, 0]
            (compact,) = in_projection(x[request : request + 1], [weight], [bias], [kept], head_dim)
            rows.append(scatter_blocks(compact, kept, head_dim, weight.shape[0], -1))
        outputs.append(torch.cat(rows))
    return outputs


def out_projection_per_request(
    heads: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, head_dim: int
) -> Tensor:
    """As `out_projection` with one row of the bool `mask [B, H]` a request; `heads [B, T, H*D]`."""
    rows = [F.linear(heads[:0], weight, bias)]
    for request, kept in enumerate(mask):
        rows.append(out_projection(heads[request : request + 1], weight, bias, kept.nonzero()[:, 0], head_dim))
    return torch.cat(rows)

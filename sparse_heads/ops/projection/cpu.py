"""Projections by the C++ extension (`csrc/cpu`); layout and meaning as in `reference.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import operators


def in_projection(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], kept: Sequence[Tensor], head_dim: int
) -> list[Tensor]:
    """As `reference.in_projection`; one pass over `x` for all weights."""
    operator = operators.in_projection_forward
    if torch.is_grad_enabled() and (
        x.requires_grad or any(tensor is not None and tensor.requires_grad for tensor in (*weights, *biases))
    ):
        operator = operators.in_projection
        pairs = zip(weights, biases, strict=True)
        biases = [weight.new_zeros(weight.shape[0]) if bias is None else bias for weight, bias in pairs]
    return operator(x, weights, biases, kept, head_dim)


def out_projection(heads: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor, head_dim: int) -> Tensor:
    """As `reference.out_projection`."""
    operator = operators.out_projection_forward
    if torch.is_grad_enabled() and (
        heads.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        operator = operators.out_projection
    return operator(heads, weight, bias, kept, head_dim)

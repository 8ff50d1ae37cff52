"""Projections by the C++ extension (`csrc/cpu`); layout and meaning as in `reference.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import operators, operators_per_request


def in_projection(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], kept: Sequence[Tensor], head_dim: int
) -> list[Tensor]:
    """As `reference.in_projection`; one pass over `x` for all weights."""
    if _any_requires_grad(x, *weights, *biases):
        return operators.in_projection(x, weights, _without_none(biases, weights), kept, head_dim)
    return operators.in_projection_forward(x, weights, biases, kept, head_dim)


def out_projection(heads: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor, head_dim: int) -> Tensor:
    """As `reference.out_projection`."""
    if _any_requires_grad(heads, weight, bias):
        return operators.out_projection(heads, weight, bias, kept, head_dim)
    return operators.out_projection_forward(heads, weight, bias, kept, head_dim)


def in_projection_per_request(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], masks: Sequence[Tensor], head_dim: int
) -> list[Tensor]:
    """As `reference.in_projection_per_request`; one call for all requests and weights."""
    if _any_requires_grad(x, *weights, *biases):
        biases = _without_none(biases, weights)
        return operators_per_request.in_projection(x, weights, biases, masks, head_dim)
    return operators_per_request.in_projection_forward(x, weights, biases, masks, head_dim)


def out_projection_per_request(
    heads: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, head_dim: int
) -> Tensor:
    """As `reference.out_projection_per_request`; one call for all requests."""
    if _any_requires_grad(heads, weight, bias):
        return operators_per_request.out_projection(heads, weight, bias, mask, head_dim)
    return operators_per_request.out_projection_forward(heads, weight, bias, mask, head_dim)


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _without_none(biases: Sequence[Tensor | None], weights: Sequence[Tensor]) -> list[Tensor]:
    """The operators with a backward take tensors only."""
    pairs = zip(weights, biases, strict=True)
    return [weight.new_zeros(weight.shape[0]) if bias is None else bias for weight, bias in pairs]

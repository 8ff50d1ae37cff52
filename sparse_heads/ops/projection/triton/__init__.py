"""Projections by Triton kernels; layout and meaning as in `reference.py`.

Beyond it, the output projection takes heads `[B, T, n, D]` with any strides as well as `[..., n*D]`, and the gate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...._triton import allows_tf32
from . import operators


def in_projection(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], kept: Sequence[Tensor], head_dim: int
) -> list[Tensor]:
    """As `reference.in_projection`; one launch for all weights."""
    # Kernels want [B, T, E]; other leading dimensions are those of a batch of one row.
    tokens = x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
    outputs = _in_projection(tokens, weights, biases, kept, head_dim)
    return [output.reshape(*x.shape[:-1], output.shape[2] * head_dim) for output in outputs]


def in_projection_per_request(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], masks: Sequence[Tensor], head_dim: int
) -> list[Tensor]:
    """As `reference.in_projection_per_request`; one launch for all requests and weights."""
    return [output.flatten(2) for output in _in_projection(x, weights, biases, masks, head_dim)]


def out_projection(
    heads: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor, head_dim: int, gate: Tensor | None = None
) -> Tensor:
    """As `reference.out_projection`; gate `[H]` or `[B, H]` multiplies heads first."""
    leading = heads.shape[:2] if heads.dim() == 4 else heads.shape[:-1]
    if heads.dim() < 3:
        heads = heads.reshape(1, -1, heads.shape[-1])
    heads = _as_heads(heads, head_dim)
    if gate is not None and gate.dim() == 2:
        # A request's own gate under a shared subset: the kernels' gates follow what their lists follow.
        if heads.shape[2] != kept.shape[0]:
            heads = heads.index_select(2, kept)
        scale = gate.index_select(1, kept)[:, None, :, None]
        heads = (heads * scale.to(torch.promote_types(gate.dtype, torch.float32))).to(heads.dtype)
        gate = None
    gate = None if gate is None else gate.unsqueeze(0)
    return _out_projection(heads, weight, bias, gate, kept).reshape(*leading, weight.shape[0])


def out_projection_per_request(
    heads: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, head_dim: int, gate: Tensor | None = None
) -> Tensor:
    """As `reference.out_projection_per_request`; gate `[H]` or `[B, H]` multiplies heads first."""
    gate = None if gate is None else gate.expand(mask.shape)
    return _out_projection(_as_heads(heads, head_dim), weight, bias, gate, mask)


def _in_projection(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], heads: Sequence[Tensor], head_dim: int
) -> list[Tensor]:
    x, *weights = _autocast(x, *weights)
    biased = [bias is not None for bias in biases]
    given = _autocast(*(bias for bias in biases if bias is not None))
    operator = operators.in_projection if _any_requires_grad(x, *weights, *given) else operators.in_projection_forward
    return operator(x, weights, given, biased, heads, head_dim, allows_tf32())


def _out_projection(heads: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, kept: Tensor) -> Tensor:
    heads, weight, bias = _autocast(heads, weight, bias)
    # Products with the gate are formed in float32, and so is its gradient.
    gate = None if gate is None else gate.float()
    with_gradient = _any_requires_grad(heads, weight, bias, gate)
    operator = operators.out_projection if with_gradient else operators.out_projection_forward
    return operator(heads, weight, bias, gate, kept, allows_tf32())


def _as_heads(heads: Tensor, head_dim: int) -> Tensor:
    """`[B, T, n, D]` of that, or of `[B, T, n*D]`."""
    return heads if heads.dim() == 4 else heads.unflatten(-1, (heads.shape[-1] // head_dim, head_dim))


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What a matrix product of torch would take here; operators of other libraries are not cast for."""
    device = next((tensor.device.type for tensor in tensors if tensor is not None), "cuda")
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)

"""Attention by the C++ extension (`csrc/cpu`): the (request, head) pairs that are on, and no other."""

from __future__ import annotations

import math

import torch

from . import operators


def attention_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_mask: torch.Tensor | None,
    *,
    kv_heads: torch.Tensor | None,
    gate: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    span: tuple[int, int],
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`attend` on CPU tensors. Keys and values are read where they lie, and those of groups that are off are not read.

    float16 and bfloat16 inputs are computed in float32. The result is laid out as [B, T, H, Dv].
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    gate = None if gate is None else gate.to(dtype)
    sinks = None if sinks is None else sinks.to(dtype)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    tensors = (query, key, value, head_mask, kv_heads, gate, attn_mask, sinks)
    operator = operators.attention_forward
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        operator = operators.attention
    return operator(*tensors, *span, scale, softcap or 0.0)

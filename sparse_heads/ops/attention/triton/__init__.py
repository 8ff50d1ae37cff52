"""Attention by Triton kernels: the (request, key/value head) pairs that are on, and no other."""

from __future__ import annotations

import math

import torch

from ...._triton import allows_tf32
from . import operators

__all__ = ["attention_triton"]


def attention_triton(
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
    """`attend` on CUDA tensors of float16, bfloat16 or float32, and in Triton's interpreter on CPU tensors.

    Strides are free. Sums are float32. The result is laid out as [B, T, H, Dv].
    """
    gate = None if gate is None else gate.float()
    sinks = None if sinks is None else sinks.float()
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    tf32 = query.dtype == torch.float32 and allows_tf32()
    tensors = (query, key, value, head_mask, kv_heads, gate, attn_mask, sinks)
    arguments = (*tensors, *span, scale, softcap or 0.0, tf32)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return operators.attention_triton(*arguments)[0]
    return operators.attention_triton_forward(*arguments)

"""Decoding by the C++ extension (`csrc/cpu`): it reads the cache of key/value heads that some query head uses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import operators


def decode_cpu(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    head_mask: Tensor | None,
    *,
    kv_heads: Tensor | None,
    block_table: Tensor | None,
    gate: Tensor | None,
    left: int,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`decode` on CPU tensors. float16 and bfloat16 are computed in float32; the output lies as [B, T, H, Dv]."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return operators.attention_decode(
        query,
        key_cache,
        value_cache,
        cache_lengths,
        head_mask,
        kv_heads,
        block_table,
        None if gate is None else gate.to(dtype),
        None if sinks is None else sinks.to(dtype),
        left,
        1 / math.sqrt(query.shape[-1]) if scale is None else scale,
        softcap or 0.0,
    )

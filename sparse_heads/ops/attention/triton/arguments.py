"""The arguments that the kernels of both directions share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...._triton.work_list import WorkList
from .configs import Config, padded, turns


def group_size(query: Tensor, key: Tensor, kv_heads: Tensor | None) -> int:
    """The most query heads that can share a key/value head."""
    return query.shape[1] if kv_heads is not None else query.shape[1] // max(1, key.shape[1])


def shared_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    work: WorkList | None,
    config: Config,
    *,
    span: tuple[int, int],
    scale: float,
    softcap: float,
    group: int,
    tf32: bool,
) -> dict[str, Any]:
    """By the names that the kernels give them; what is absent is None. work: None = every head runs."""
    batch, heads, tokens, head_dim = query.shape
    kv_heads, keys, value_dim = value.shape[1:]
    attn_mask = None if attn_mask is None else attn_mask.expand(batch, heads, tokens, keys)
    left, right = span
    return {
        "query": query,
        "query_strides": query.stride(),
        "key": key,
        "key_strides": key.stride(),
        "value": value,
        "value_strides": value.stride(),
        "attn_mask": attn_mask,
        "mask_strides": None if attn_mask is None else attn_mask.stride(),
        "heads": work and work.heads,
        "items": work and work.items,
        "item_count": work.count if work else batch * kv_heads,
        "num_heads": heads,
        "kv_heads": kv_heads,
        "tokens": tokens,
        "keys": keys,
        # A side that hides nothing costs nothing.
        "left": None if left < 0 or left >= keys - 1 else left,
        "right": None if right < 0 or right >= tokens - 1 else right,
        "scale": scale,
        "softcap": softcap or None,
        "turns": min(turns(keys, head_dim, value_dim, key.element_size()), max(1, batch * kv_heads)),
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": padded(head_dim),
        "BLOCK_V": padded(value_dim),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PRECISION": "tf32" if tf32 else "ieee",
    }

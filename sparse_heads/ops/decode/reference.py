"""The oracle: decoding in plain PyTorch, on any device. Masked heads cost as much as others."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def decode_reference(
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
    """`decode` without a look at values: a request with a length or a needed page outside the cache gets NaN.

    float16 and bfloat16 inputs are computed in float32; the result has the inputs' dtype.
    """
    input_dtype = query.dtype
    dtype = torch.promote_types(input_dtype, torch.float32)
    batch, heads, queries, head_dim = query.shape
    lengths = cache_lengths.long()
    if block_table is None:
        pages_exist = torch.ones_like(lengths, dtype=torch.bool)
    else:
        pages_exist = _pages_exist(block_table, lengths, key_cache.shape[0], key_cache.shape[2])
        key_cache, value_cache = (_gather_pages(cache, block_table) for cache in (key_cache, value_cache))
    positions = key_cache.shape[2]
    exists = pages_exist & (lengths >= queries) & (lengths <= positions)

    # bool [B, T, S]: what each query sees, its own position and those before.
    own = lengths[:, None, None] + torch.arange(-queries, 0, device=query.device)[:, None]
    position = torch.arange(positions, device=query.device)
    visible = position <= own
    if left >= 0:
        visible = visible & (position >= own - left)
    if head_mask is None:
        head_mask = torch.ones(heads, dtype=torch.bool, device=query.device)
    on = head_mask.expand(batch, heads)[..., None, None]

    if kv_heads is None:
        kv_heads = torch.arange(heads, device=query.device) // (heads // key_cache.shape[1] if heads else 1)
    # Filled rather than multiplied by zero: what is hidden from all queries, or masked, may hold NaN.
    used = on & visible.any(1)[:, None, :, None]
    key, value = (cache.index_select(1, kv_heads).to(dtype).masked_fill(~used, 0) for cache in (key_cache, value_cache))
    query = query.to(dtype).masked_fill(~on, 0)

    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(head_dim) if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None], -math.inf)
    # Keys may give every score of a row -inf, which would be 0 / 0.
    sees_a_key = (scores != -math.inf).any(dim=-1, keepdim=True)
    scores = torch.where(sees_a_key, scores, 0.0)
    if sinks is not None:
        sinks = sinks.to(dtype)[:, None, None].expand(batch, heads, queries, 1)
        scores = torch.cat([scores, sinks.masked_fill(~on, 0)], dim=-1)
    probabilities = scores.softmax(dim=-1)[..., :positions]
    output = torch.where(sees_a_key, probabilities @ value, 0.0)
    if gate is not None:
        output = output * gate.to(dtype).expand(batch, heads)[..., None, None]
    output = output.masked_fill(~exists[:, None, None, None], math.nan)
    return output.masked_fill(~on, 0).to(input_dtype)


def _gather_pages(cache: Tensor, block_table: Tensor) -> Tensor:
    """[B, H_kv, S, D] of pages [pages, H_kv, page_size, D]; entries of the table that name no page give any other."""
    batch, pages = block_table.shape
    named = block_table.long().clamp(0, max(0, cache.shape[0] - 1))
    gathered = cache.index_select(0, named.flatten()).unflatten(0, (batch, pages))
    return gathered.transpose(1, 2).flatten(2, 3)


def _pages_exist(block_table: Tensor, lengths: Tensor, pages: int, page_size: int) -> Tensor:
    """bool [B]: whether the table names a page for each position of a request."""
    first = torch.arange(block_table.shape[1], device=lengths.device) * page_size
    unneeded = first >= lengths[:, None]
    return (unneeded | ((block_table >= 0) & (block_table < pages))).all(1)

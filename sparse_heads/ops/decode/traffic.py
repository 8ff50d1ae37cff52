"""The bytes that a decode call must move: what its time is measured against, as decoding is bound by memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._attention_arguments import visible_span


class DecodeBytes(NamedTuple):
    """int64 [B]: bytes of each request. Masks, lengths and block tables are left out: they are too small to matter."""

    cache: Tensor  # read: keys and values that some query sees, of key/value heads that some query head uses
    queries: Tensor  # read, of heads that run
    output: Tensor  # written, zeros of heads that do not run too

    def total(self) -> int:
        """Of all requests together; waits for a GPU."""
        return int(sum(self).sum())


def decode_bytes(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    head_mask: Tensor | None = None,
    *,
    block_table: Tensor | None = None,
    window: int | tuple[int, int] | None = None,
) -> DecodeBytes:
    """What `attention_decode` must move on these arguments, which are taken to be right; of caches only shapes matter.

    A key/value head counts once, however many of its query heads run. Whole rows count: no page or cache line is
    rounded up.
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, value_dim = key_cache.shape[1 if block_table is None else 2], value_cache.shape[3]
    if head_mask is None:
        head_mask = torch.ones(batch, heads, dtype=torch.bool, device=query.device)
    head_mask = head_mask.expand(batch, heads)
    groups = head_mask.reshape(batch, kv_heads, heads // max(1, kv_heads)).any(-1).sum(-1)
    positions = cache_lengths.long()
    left, _ = visible_span(True, window)
    if left >= 0:
        positions = positions.clamp(max=left + queries)
    size = query.element_size()
    return DecodeBytes(
        cache=groups * positions * ((head_dim + value_dim) * size),
        queries=head_mask.sum(-1) * (queries * head_dim * size),
        output=torch.full_like(positions, heads * queries * value_dim * size),
    )

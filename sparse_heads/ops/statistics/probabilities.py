"""Attention probabilities of some queries at a time, so that memory stays linear in the number of queries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..._attention_arguments import span_mask

# Scores at a time, as far as one query's do not exceed them: some MiB.
CHUNK_SCORES = 1 << 20


class Rows(NamedTuple):
    """Of C neighbouring queries; what is not counted may hold anything."""

    first: int
    probabilities: Tensor  # [B, H, C, S], float32, or float64 for float64 inputs
    visible: Tensor  # int64 [B, H, C], the keys that a query sees
    counted: Tensor  # bool [B, H, C]


def probability_rows(
    query: Tensor,
    key: Tensor,
    head_mask: Tensor | None,
    *,
    attn_mask: Tensor | None,
    span: tuple[int, int],
    scale: float | None,
    softcap: float | None,
    query_mask: Tensor | None,
) -> Iterator[Rows]:
    """All queries in pieces, on checked arguments; `span` is `visible_span(is_causal, window)`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    key = key.to(dtype).repeat_interleave(heads // key.shape[1] if heads else 1, dim=1).transpose(-2, -1)
    if head_mask is not None:
        head_mask = head_mask.expand(batch, heads)[..., None]
        key = key.masked_fill(~head_mask[..., None], 0)
    attn_mask = None if attn_mask is None else attn_mask[(None,) * (4 - attn_mask.dim())]
    size = max(1, CHUNK_SCORES // max(1, batch * heads * keys))
    for first in range(0, queries, size):
        rows = slice(first, min(first + size, queries))
        scores = query[:, :, rows].to(dtype) @ key * (1 / math.sqrt(head_dim) if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if attn_mask is not None:
            scores = _apply_mask(scores, attn_mask if attn_mask.shape[2] == 1 else attn_mask[:, :, rows])
        seen = span_mask(queries, keys, span, query.device, rows.start, rows.stop)
        if seen is not None:
            scores = scores.masked_fill(~seen, -math.inf)
        visible = (scores != -math.inf).sum(-1)
        counted = visible > 1
        if query_mask is not None:
            counted = counted & query_mask[:, None, rows]
        if head_mask is not None:
            counted = counted & head_mask
        yield Rows(first, scores.softmax(-1), visible, counted)


def hidden_scores(attn_mask: Tensor | None) -> float:
    """Masked scores from here down are hidden, -inf or not: transformers' eager masks add the dtype's minimum."""
    return -math.inf if attn_mask is None or attn_mask.dtype == torch.bool else torch.finfo(attn_mask.dtype).min / 2


def _apply_mask(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -math.inf)
    scores = scores + mask.to(scores.dtype)
    return scores.masked_fill(scores <= hidden_scores(mask), -math.inf)

"""The oracle: statistics from the probabilities of some queries at a time, in plain PyTorch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .probabilities import probability_rows


def statistics_reference(
    query: Tensor,
    key: Tensor,
    head_mask: Tensor | None,
    *,
    attn_mask: Tensor | None,
    span: tuple[int, int],
    scale: float | None,
    softcap: float | None,
    query_mask: Tensor | None,
    key_groups: Tensor | None,
    num_groups: int,
) -> Tensor:
    """Sums over the counted queries, float64 [B, H, 7 + G]; `operators.py` has the columns."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    sums = torch.zeros(batch, heads, 7, dtype=torch.float64, device=query.device)
    key_sums = torch.zeros(batch, heads, keys, dtype=torch.float64, device=query.device)
    for first, probabilities, visible, counted in probability_rows(
        query, key, head_mask, attn_mask=attn_mask, span=span, scale=scale, softcap=softcap, query_mask=query_mask
    ):
        if keys == 0:
            break
        probabilities = probabilities.masked_fill(~counted[..., None], 0)
        visible = visible.to(probabilities.dtype)
        root = visible.sqrt()
        entropy = torch.special.entr(probabilities).sum(-1) / visible.log()
        sparsity = (root - 1 / probabilities.norm(dim=-1)) / (root - 1)
        confidence = probabilities.amax(-1)
        own = torch.arange(first, first + counted.shape[2], device=query.device) + (keys - queries)
        near = [_probability_at(probabilities, own + offset) for offset in (-1, 0, 1)]
        rows = torch.stack([torch.ones_like(entropy), entropy, sparsity, confidence, *near], dim=-1)
        sums += torch.where(counted[..., None], rows, 0).double().sum(2)
        if key_groups is not None:
            key_sums += probabilities.sum(2, dtype=torch.float64)
    if key_groups is None:
        return sums
    # A group at a time: scattered sums would leave their order to a GPU's threads.
    masses = [key_sums.where((key_groups == group)[:, None], 0).sum(-1) for group in range(num_groups)]
    return torch.cat([sums, *(mass[..., None] for mass in masses)], dim=-1)


def _probability_at(probabilities: Tensor, position: Tensor) -> Tensor:
    """[B, H, C]: each query's probability of its own one of the positions [C], 0 where there is no such key."""
    batch, heads, _, keys = probabilities.shape
    exists = (position >= 0) & (position < keys)
    index = position.clamp(0, keys - 1)[:, None].expand(batch, heads, -1, 1)
    return torch.where(exists, probabilities.gather(-1, index)[..., 0], 0)

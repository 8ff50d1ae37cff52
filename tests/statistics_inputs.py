"""Inputs of the tests of attention statistics, and the same statistics query by query in float64."""

from __future__ import annotations

import math

import torch

from sparse_heads.ops.statistics import AttentionStatistics
from sparse_heads.testing import random_attention_inputs

FIELDS = ("entropy", "sparsity", "confidence", "position_mass", "group_mass")
HEAD_MASK = torch.tensor([[True, False, True, True, False, True], [False, True, True, False, True, True]])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_mask(*shape: int, seed: int = 0) -> torch.Tensor:
    """bool, about two thirds True."""
    return draw(*shape, seed=100 + seed) > -0.4


def draw_inputs(
    batch: int, heads: int, kv_heads: int, queries: int, keys: int, head_dim: int, seed: int = 0
) -> dict[str, torch.Tensor]:
    """float64 query and key, strided as projections leave them."""
    query, key, _ = random_attention_inputs(
        batch, heads, kv_heads, queries, keys, head_dim, 1, dtype=torch.float64, seed=seed
    )
    return {"query": query.detach(), "key": key.detach()}


def draw_groups(batch: int, keys: int, groups: int) -> torch.Tensor:
    """Every group and none (-1) by turns, each request another turn."""
    return (torch.arange(keys) + torch.arange(batch)[:, None]) % (groups + 1) - 1


def stack(statistics: AttentionStatistics) -> torch.Tensor:
    """[B, H, 6 + G]: all fields but the count."""
    fields = [statistics.entropy, statistics.sparsity, statistics.confidence]
    masses = [mass for mass in (statistics.position_mass, statistics.group_mass) if mass is not None]
    return torch.cat([torch.stack(fields, dim=-1), *masses], dim=-1)


def by_hand(
    query: torch.Tensor,
    key: torch.Tensor,
    head_mask: torch.Tensor | None = None,
    *,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | tuple[int, int] | None = None,
    query_mask: torch.Tensor | None = None,
    key_groups: torch.Tensor | None = None,
) -> AttentionStatistics:
    """The definitions, a query at a time, with all numbers in float64."""
    batch, heads, queries, head_dim = query.shape
    keys, group = key.shape[2], heads // key.shape[1]
    groups = 0 if key_groups is None else int(key_groups.max()) + 1
    means = torch.full((batch, heads, 6 + groups), math.nan, dtype=torch.float64)
    count = torch.zeros(batch, dtype=torch.int64)
    left, right = window if isinstance(window, tuple) else (-1 if window is None else window - 1, 0)
    right = -1 if window is None else right
    full = None if attn_mask is None else attn_mask.expand(batch, heads, queries, keys)
    for b in range(batch):
        for h in range(heads):
            if head_mask is not None and not head_mask.expand(batch, heads)[b, h]:
                continue
            rows = []
            for t in range(queries):
                own = keys - queries + t
                scores = key[b, h // group].double() @ query[b, h, t].double()
                scores = scores * (head_dim**-0.5 if scale is None else scale)
                scores = scores if softcap is None else softcap * (scores / softcap).tanh()
                seen = torch.tensor(
                    [
                        (not is_causal or s <= own)
                        and (left < 0 or s >= own - left)
                        and (right < 0 or s <= own + right)
                        for s in range(keys)
                    ],
                    dtype=torch.bool,
                )
                if full is not None and full.dtype == torch.bool:
                    seen &= full[b, h, t]
                elif full is not None:
                    scores = scores + full[b, h, t].double()
                    seen &= full[b, h, t] > torch.finfo(full.dtype).min / 2
                n = int(seen.sum())
                if n < 2 or (query_mask is not None and not query_mask[b, t]):
                    continue
                p = torch.zeros(keys, dtype=torch.float64)
                p[seen] = scores[seen].softmax(0)
                rows.append(
                    [
                        -sum(x * math.log(x) for x in p.tolist() if x > 0) / math.log(n),
                        (n**0.5 - 1 / p.square().sum().sqrt().item()) / (n**0.5 - 1),
                        p.max().item(),
                        *(p[s].item() if 0 <= s < keys else 0.0 for s in (own - 1, own, own + 1)),
                        *(p[key_groups[b] == g].sum().item() for g in range(groups)),
                    ]
                )
            count[b] = max(int(count[b]), len(rows))
            if rows:
                means[b, h] = torch.tensor(rows, dtype=torch.float64).mean(0)
    masses = means[..., 6:] if key_groups is not None else None
    return AttentionStatistics(means[..., 0], means[..., 1], means[..., 2], count, means[..., 3:6], masses)

"""Inputs for decoding, and the same attention by plain operators, a request at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_heads.ops.attention import attention


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_mask(*shape: int, seed: int = 0) -> Tensor:
    """bool, about two thirds True."""
    return draw(*shape, seed=100 + seed) > -0.4


def draw_inputs(
    heads: int, kv_heads: int, queries: int, lengths: list[int], head_dim: int, value_dim: int | None = None,
    *, room: int | None = None, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """float64 query, caches and lengths; what lies behind a request's length is NaN."""
    room = max(lengths) if room is None else room
    batch, value_dim = len(lengths), head_dim if value_dim is None else value_dim
    behind = torch.arange(room) >= torch.tensor(lengths, dtype=torch.int64)[:, None]
    caches = (draw(batch, kv_heads, room, size, seed=seed + i) for i, size in ((1, head_dim), (2, value_dim)))
    key_cache, value_cache = (cache.masked_fill(behind[:, None, :, None], torch.nan) for cache in caches)
    return {
        "query": draw(batch, heads, queries, head_dim, seed=seed),
        "key_cache": key_cache,
        "value_cache": value_cache,
        "cache_lengths": torch.tensor(lengths, dtype=torch.int64),
    }


def converted(arguments: dict, dtype: torch.dtype) -> dict:
    """query and caches in `dtype`, other floating tensors in at least float32; strides stay."""
    low = ("query", "key_cache", "value_cache")
    return {
        name: value.to(dtype if name in low else torch.promote_types(dtype, torch.float32))
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }


def in_pages(arguments: dict, page_size: int, seed: int = 0) -> dict:
    """The same caches in shuffled pages of [pages, page_size, H_kv, D]; what no request needs is NaN, or no page."""
    lengths = arguments["cache_lengths"].tolist()
    needed = [-(-length // page_size) for length in lengths]
    spare = 3
    order = torch.randperm(sum(needed) + spare, generator=torch.Generator().manual_seed(seed)).tolist()
    table = torch.full((len(lengths), max(needed, default=0) + 1), 2**30, dtype=torch.int32)
    for request, count in enumerate(needed):
        table[request, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
    paged = {**arguments, "block_table": table}
    for name in ("key_cache", "value_cache"):
        cache = arguments[name]
        pages = cache.new_full((sum(needed) + spare, page_size, cache.shape[1], cache.shape[3]), torch.nan)
        for request, count in enumerate(needed):
            for place in range(count):
                rows = cache[request, :, place * page_size : (place + 1) * page_size].transpose(0, 1)
                pages[table[request, place], : rows.shape[0]] = rows
        paged[name] = pages
    return paged


def plain_decode(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_lengths: Tensor, head_mask: Tensor | None = None,
    *, gate: Tensor | None = None, **options: object,
) -> Tensor:  # fmt: skip
    """Every request by itself, through `attention`'s own reference."""
    outputs = []
    for request, length in enumerate(cache_lengths.tolist()):
        own = {
            name: each if each is None or each.dim() == 1 else each[request]
            for name, each in (("head_mask", head_mask), ("gate", gate))
        }
        key, value = (cache[request : request + 1, :, :length] for cache in (key_cache, value_cache))
        outputs.append(
            attention(query[request : request + 1], key, value, is_causal=True, backend="reference", **own, **options)
        )
    return torch.cat(outputs)

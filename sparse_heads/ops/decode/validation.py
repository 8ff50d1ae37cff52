"""Checks of the arguments of `attention_decode` that no other operator has."""

from __future__ import annotations

import torch

from ..._attention_arguments import check_heads, check_placed
from ...errors import BackendUnavailableError, UnsupportedError, invalid, invalid_type

BACKENDS = ("auto", "reference", "cpu")
NOT_BUILT = ("triton", "cuda")
MOST_QUERIES = 8
PAGE_MULTIPLE = 16


def check_backend(backend: object) -> None:
    """A known backend."""
    wanted = f"one of {', '.join(map(repr, BACKENDS))}"
    if backend in NOT_BUILT:
        raise BackendUnavailableError(f"backend: wanted {wanted}, got {backend!r}, which has no decode kernel yet")
    if backend not in BACKENDS:
        raise invalid("backend", wanted, backend)


def check_inputs(
    query: object, key_cache: object, value_cache: object, cache_lengths: object, block_table: object
) -> None:
    """query [B, H, T_q, D], and caches [B, H_kv, S_max, D], or [pages, page_size, H_kv, D] with a block table.

    On a CPU lengths lie between T_q and what the cache has room for, and the pages that they need exist.
    """
    paged = block_table is not None
    layout = "[pages, page_size, H_kv, {}]" if paged else "[B, H_kv, S_max, {}]"
    check_heads("query", "[B, H, T_q, D]", query, query)
    check_heads("key_cache", layout.format("D"), key_cache, query)
    check_heads("value_cache", layout.format("Dv"), value_cache, query)
    batch, heads, queries, head_dim = query.shape
    if head_dim == 0:
        raise invalid("query", "a head dimension of 1 or more", query)
    if not 1 <= queries <= MOST_QUERIES:
        raise invalid("query", f"T_q from 1 to {MOST_QUERIES} positions in [B, H, T_q, D]", query)
    sizes = (*key_cache.shape[:3], head_dim) if paged else (batch, *key_cache.shape[1:3], head_dim)
    if key_cache.shape != sizes:
        wanted = layout.format(head_dim).replace("[B", f"[{batch}")
        raise invalid("key_cache", f"{wanted} to go with query {list(query.shape)}", key_cache)
    if value_cache.shape[:3] != key_cache.shape[:3]:
        wanted = f"[{', '.join(map(str, key_cache.shape[:3]))}, Dv]"
        raise invalid("value_cache", f"{wanted} to go with key_cache {list(key_cache.shape)}", value_cache)
    kv_heads = key_cache.shape[2 if paged else 1]
    if heads != kv_heads and (kv_heads == 0 or heads == 0 or heads % kv_heads):
        raise invalid("key_cache", f"a number of heads H_kv in {layout.format('D')} that divides the {heads} of query",
                      key_cache)  # fmt: skip
    if paged:
        _check_block_table(query, key_cache, block_table)
    _check_lengths(query, key_cache, cache_lengths, block_table)


def check_no_gradient(**tensors: object) -> None:
    """Nobody expects a gradient to come back."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            raise UnsupportedError(
                f"{name}: wanted a tensor that needs no gradient, which attention_decode does not give, got one with"
                " requires_grad; call it under torch.no_grad(), or train with attention"
            )


def _check_block_table(query: torch.Tensor, key_cache: torch.Tensor, block_table: object) -> None:
    batch = query.shape[0]
    pages, page_size = key_cache.shape[:2]
    if page_size == 0 or page_size % PAGE_MULTIPLE:
        wanted = f"a page_size that is a multiple of {PAGE_MULTIPLE} in [pages, page_size, H_kv, D]"
        raise invalid("key_cache", wanted, key_cache)
    if pages == 0 and batch > 0:
        raise invalid("key_cache", "1 page or more in [pages, page_size, H_kv, D]", key_cache)
    wanted = f"[B, pages_per_request] = [{batch}, pages_per_request]"
    if not isinstance(block_table, torch.Tensor) or block_table.dtype != torch.int32:
        raise invalid_type("block_table", f"an int32 tensor {wanted}, or None", block_table)
    check_placed("block_table", block_table, query)
    if block_table.dim() != 2 or block_table.shape[0] != batch:
        raise invalid("block_table", wanted, block_table)


def _check_lengths(
    query: torch.Tensor, key_cache: torch.Tensor, cache_lengths: object, block_table: torch.Tensor | None
) -> None:
    batch, queries = query.shape[0], query.shape[2]
    if not isinstance(cache_lengths, torch.Tensor) or cache_lengths.dtype not in (torch.int32, torch.int64):
        raise invalid_type("cache_lengths", f"an int32 or int64 tensor [B] = [{batch}]", cache_lengths)
    check_placed("cache_lengths", cache_lengths, query)
    if cache_lengths.shape != (batch,):
        raise invalid("cache_lengths", f"[B] = [{batch}]", cache_lengths)
    # Elsewhere a look at the values would synchronise, or break the graph that is being compiled.
    if cache_lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if block_table is None:
        room, of = key_cache.shape[2], "S_max"
    else:
        room, of = block_table.shape[1] * key_cache.shape[1], "pages_per_request * page_size"
    # A list, as most batches are small: operators on tensors would take longer.
    for request, length in enumerate(cache_lengths.tolist()):
        if not queries <= length <= room:
            wanted = f"lengths from T_q = {queries} to {of} = {room}"
            raise invalid("cache_lengths", wanted, f"{length} for request {request}")
    if block_table is not None:
        _check_pages(block_table, cache_lengths, *key_cache.shape[:2])


def _check_pages(block_table: torch.Tensor, lengths: torch.Tensor, pages: int, page_size: int) -> None:
    """Entries behind a request's length may hold anything."""
    wrong = (block_table < 0) | (block_table >= pages)
    if not wrong.any():
        return
    wrong &= torch.arange(block_table.shape[1]) * page_size < lengths[:, None]
    if not wrong.any():
        return
    request, place = wrong.nonzero()[0].tolist()
    got = f"{int(block_table[request, place])} at [{request}, {place}], which length {int(lengths[request])} needs"
    raise invalid("block_table", f"pages from 0 to {pages - 1}", got)

"""The public operator: checks its arguments, chooses the implementation, runs it."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from ..._attention_arguments import check_head_arguments, check_score_arguments, visible_span, without_autocast
from ...errors import BackendUnavailableError, warn_of_reference
from .cpu import decode_cpu
from .reference import decode_reference
from .validation import check_backend, check_inputs, check_no_gradient


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    head_mask: Tensor | None = None,
    *,
    block_table: Tensor | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | tuple[int, int] | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of each request's last few positions to its cache, of which a masked head reads nothing.

    Equivalent to the following for each request i, whose cache holds its last T_q positions too::

        length = cache_lengths[i]
        if block_table is None:
            key, value = key_cache[i, :, :length], value_cache[i, :, :length]
        else:                                                # [pages, page_size, H_kv, D] -> [H_kv, length, D]
            key, value = (t[block_table[i]].flatten(0, 1)[:length].transpose(0, 1) for t in (key_cache, value_cache))
        out[i] = attention(
            query[i : i + 1], key[None], value[None], head_mask_of_i, gate=gate_of_i, is_causal=True,
            scale=scale, softcap=softcap, window=window, sinks=sinks,
        )[0]

    Shapes: B requests, H query heads, H_kv key/value heads that divide H (query head h reads key/value head
    h // (H / H_kv)), T_q new positions of every request. B, H and Dv may be 0. Strides are free; rows of keys and
    values whose elements are neighbours are read where they lie.

    Args:
        query: [B, H, T_q, D], float16, bfloat16, float32 or float64: the last T_q positions of each sequence, from 1 to
            8, of which each sees itself and those before.
        key_cache: [B, H_kv, S_max, D], or [pages, page_size, H_kv, D] with a block table; dtype and device of query.
        value_cache: the same with Dv columns.
        cache_lengths: int32 or int64 [B], each request's positions in the cache, those of query included: from T_q to
            S_max, or to pages_per_request * page_size. Nothing behind is read.
        head_mask: bool, True = the head runs; [H] for all requests, or [B, H] with any number of heads a request, none
            included. A masked head's output is exact zeros; the cache of a key/value head is not read where all its
            query heads are off, whatever it holds (NaN included).
        block_table: int32 [B, pages_per_request], the page that holds each page_size positions of a request; page_size
            is a multiple of 16. Entries behind a request's length may hold anything. Requests may share pages. None:
            caches without pages.
        gate: floating [H] or [B, H], multiplies the heads' outputs.
        scale: multiplies the scores, 1 / sqrt(D) by default.
        softcap: bounds the scaled scores by softcap * tanh(scores / softcap).
        window: w, or (left, right) as of `attention`: a position sees itself and the w - 1 (or left) before it, and
            what no query sees is not read; -1 = unlimited.
        sinks: floating [H], one logit a head that takes part in the softmax sum and in nothing else; -inf = none.
        backend: "reference": plain PyTorch, which gathers pages and computes masked heads too. "cpu": the C++
            extension, in parallel over requests, key/value heads and pieces of the cache; all query heads of a
            key/value head share one pass over its cache. "auto": cpu for tensors on a CPU where the extension is
            available, else the reference.

    Returns:
        [B, H, T_q, Dv] in the dtype of query, under autocast too. With the C++ extension a request's output is the same
        bit by bit whatever other requests there are, and whether its cache is in pages.

    Raises:
        InvalidTypeError: an argument of the wrong type or dtype.
        InvalidArgumentError: a wrong shape, device or value, or an unknown backend. Values (lengths, the pages that
            they need, gates, sinks) are looked at on a CPU only. Elsewhere a request whose length or pages are outside
            the cache gets NaN in the heads that run, and nothing outside is read.
        UnsupportedError: an input that requires grad where grad mode is on: decoding has no gradient.
        BackendUnavailableError: "cpu" without the extension or for tensors elsewhere; "triton" and "cuda", which have
            no decode kernel yet.

    Sources: FlashDecoding (the cache in pieces, merged in a fixed order), vLLM, arXiv 2309.06180 (pages).
    """
    check_inputs(query, key_cache, value_cache, cache_lengths, block_table)
    check_head_arguments(query, head_mask, gate, sinks)
    check_score_arguments(query, 0, None, True, scale, softcap, window)
    check_no_gradient(query=query, key_cache=key_cache, value_cache=value_cache, gate=gate, sinks=sinks)
    check_backend(backend)
    if block_table is not None:
        key_cache, value_cache = key_cache.transpose(1, 2), value_cache.transpose(1, 2)
    return decode(
        query,
        key_cache,
        value_cache,
        cache_lengths,
        head_mask,
        block_table=block_table,
        gate=gate,
        left=visible_span(True, window)[0],
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        backend=backend,
    )


def decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    head_mask: Tensor | None = None,
    *,
    kv_heads: Tensor | None = None,
    block_table: Tensor | None = None,
    gate: Tensor | None = None,
    left: int = -1,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`attention_decode` on checked arguments, which chooses the implementation and runs it.

    Pages come as [pages, H_kv, page_size, D], in any strides.

    kv_heads: int64 [H], the key/value head that each query head reads; None = h // (H / H_kv).
    left: how many positions before its own a query sees, -1 = all.
    """
    run = decode_cpu if _choose(backend, query) == "cpu" else decode_reference
    with torch.no_grad(), without_autocast(query.device.type):
        return run(
            query,
            key_cache,
            value_cache,
            cache_lengths,
            head_mask,
            kv_heads=kv_heads,
            block_table=block_table,
            gate=gate,
            left=left,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
        )


def _choose(backend: str, query: Tensor) -> str:
    """One of "reference" and "cpu"; raises where the kernel is asked for by name and cannot run."""
    on_cpu = query.device.type == "cpu"
    if backend == "cpu":
        _native.load()
        if not on_cpu:
            raise BackendUnavailableError(f"backend: 'cpu' needs tensors on the CPU, got {query.device}")
        return "cpu"
    if backend == "reference" or not on_cpu:
        return "reference"
    if _native.available():
        return "cpu"
    warn_of_reference("attention_decode runs", "the C++ extension", _native.why_unavailable(), stacklevel=4)
    return "reference"

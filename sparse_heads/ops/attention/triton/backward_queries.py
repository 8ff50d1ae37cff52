"""Gradients of queries and of an additive mask: a program goes over every key that its tile of packed rows sees."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import Launch
from ...._triton.primitives import dot
from ...._triton.work_list import WorkList
from .backward_arguments import backward_arguments
from .backward_primitives import block_count, block_start, gated_probabilities, product_gradients, score_gradients
from .configs import Config
from .primitives import key_range, load_rows, packed_rows, store_rows, work_item


@triton.jit
def _add_keys(
    query_sums, q, g, log2_sum, delta, gate, key, key_strides, value, value_strides, attn_mask, mask_strides,
    mask_gradient, valid, low, full_low, full_high, high, position, keys, left, right, scale, softcap,
    BOUNDARY: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, EMPTY_ROWS: tl.constexpr, WANT_QUERY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums, and what the keys add to them that need masks (BOUNDARY) or need none; writes the mask's gradient."""
    for block in range(block_count(low, full_low, full_high, high, BLOCK_N, BOUNDARY)):
        index = block_start(block, low, full_low, full_high, BLOCK_N, BOUNDARY) + tl.arange(0, BLOCK_N)
        exists = index < keys if BOUNDARY else None
        row = index.to(tl.int64)
        k = load_rows(key + row * key_strides[2], key_strides[3], exists, HEAD_DIM, BLOCK_D)
        v = load_rows(value + row * value_strides[2], value_strides[3], exists, VALUE_DIM, BLOCK_V)
        zeros = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
        products = dot(q, tl.trans(k), zeros, PRECISION)
        value_products = dot(g, tl.trans(v), zeros, PRECISION)
        key_stride = None if attn_mask is None else mask_strides[3]
        # Rows have one gate each, so that it can wait until their sums are there.
        probabilities = gated_probabilities(
            products, log2_sum, None, scale, softcap, attn_mask, key_stride, position, index[None, :], keys, left,
            right, BOUNDARY,
        )  # fmt: skip
        gradients = score_gradients(probabilities, value_products, log2_sum, delta, EMPTY_ROWS)
        if mask_gradient is not None:
            written = valid[:, None] & (index < keys)[None, :]
            written_gradients = gradients if gate is None else gradients * gate
            tl.store(mask_gradient[:, None] + row[None, :], written_gradients, mask=written)
        if WANT_QUERY:
            gradients = product_gradients(gradients, products, log2_sum, scale, softcap, EMPTY_ROWS)
            query_sums = dot(gradients.to(k.dtype), k, query_sums, PRECISION)
    return query_sums


@triton.jit
def _attention_backward_queries(
    query, query_strides, key, key_strides, value, value_strides, attn_mask, mask_strides,
    grad, grad_strides, statistics, delta_offset, padded_tokens, gate, gate_strides,
    query_gradient, query_gradient_strides, mask_gradient,
    heads, items, item_count, num_heads, kv_heads, tokens, keys, left, right, scale, softcap, tiles, turns,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EMPTY_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of packed rows of one work item."""
    request, kv_head, start, count, rank = work_item(items, item_count, kv_heads, tiles, turns, GROUP)
    # Under a causal mask the last tile of rows is the longest.
    first_row = (tiles - 1 - rank) * BLOCK_M
    if first_row >= tokens * count:
        return
    token, head, valid = packed_rows(heads, num_heads, request, start, count, tokens, first_row, BLOCK_M, GROUP)
    request, kv_head, head = request.to(tl.int64), kv_head.to(tl.int64), head.to(tl.int64)
    row = token.to(tl.int64)
    query += request * query_strides[0] + head * query_strides[1] + row * query_strides[2]
    grad += request * grad_strides[0] + head * grad_strides[1] + row * grad_strides[2]
    q = load_rows(query, query_strides[3], None, HEAD_DIM, BLOCK_D)
    g = load_rows(grad, grad_strides[3], None, VALUE_DIM, BLOCK_V)
    statistics += (request * num_heads + head) * padded_tokens + row
    log2_sum = tl.load(statistics)[:, None]
    delta = tl.load(statistics + delta_offset)[:, None]
    key += request * key_strides[0] + kv_head * key_strides[1]
    value += request * value_strides[0] + kv_head * value_strides[1]
    if attn_mask is not None:
        attn_mask += request * mask_strides[0] + (head * mask_strides[1] + row * mask_strides[2])[:, None]
    row_gate = None
    if gate is not None:
        row_gate = tl.load(gate + request * gate_strides[0] + head * gate_strides[1])[:, None]
    if mask_gradient is not None:
        mask_gradient += ((request * num_heads + head) * tokens + row) * keys

    last_row = tl.minimum(first_row + BLOCK_M, tokens * count) - 1
    low, full_low, full_high, high = key_range(
        first_row // count, last_row // count, tokens, keys, left, right, BLOCK_N
    )
    query_sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for BOUNDARY in tl.static_range(2):
        query_sums = _add_keys(
            query_sums, q, g, log2_sum, delta, row_gate,
            key, key_strides, value, value_strides, attn_mask, mask_strides, mask_gradient, valid,
            low, full_low, full_high, high, (token + keys - tokens)[:, None], keys, left, right, scale, softcap,
            BOUNDARY, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, EMPTY_ROWS, query_gradient is not None, PRECISION,
        )  # fmt: skip

    if query_gradient is not None:
        query_sums *= scale if gate is None else scale * row_gate
        if EMPTY_ROWS:
            # Where no key is seen, keys may hold anything.
            query_sums = tl.where(log2_sum == float("inf"), 0.0, query_sums)
        query_gradient += request * query_gradient_strides[0] + head * query_gradient_strides[1]
        rows = query_gradient + row * query_gradient_strides[2]
        store_rows(rows, query_gradient_strides[3], query_sums, valid, HEAD_DIM, BLOCK_D)


def queries_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    grad: Tensor,
    statistics: Tensor,
    gate: Tensor | None,
    query_gradient: Tensor | None,
    mask_gradient: Tensor | None,
    work: WorkList | None,
    config: Config,
    *,
    group: int,
    **options: Any,
) -> Launch:
    """Fills the gradients that are wanted (None = not) of the query heads in work (None = all).

    mask_gradient [B, H, T, S]: contiguous float32, zeros before, of which what is visible is written. statistics: as
    `prepare_launch` fills them; options: as in `backward_arguments`.
    """
    batch, _, tokens, _ = query.shape
    tiles = triton.cdiv(tokens * group, config.block_m)
    arguments = {
        **backward_arguments(
            query, key, value, attn_mask, grad, statistics, gate, work, config, group=group, **options
        ),
        "query_gradient": query_gradient,
        "query_gradient_strides": None if query_gradient is None else query_gradient.stride(),
        "mask_gradient": mask_gradient,
        "tiles": tiles,
    }
    return Launch(_attention_backward_queries, (batch * key.shape[1] * tiles,), arguments, config.options)

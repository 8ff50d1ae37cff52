"""Gradients of keys and values: a program sums over every query that sees its tile of keys."""

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
from .primitives import load_rows, store_rows, work_item


@triton.jit
def query_range(first_key, last_key, tokens, keys, left, right, BLOCK: tl.constexpr):
    """(low, full_low, full_high, high): as `key_range`, for the tokens that see first to last key.

    Tokens past the end need no mask: what is loaded for them adds nothing.
    """
    offset = keys - tokens
    low = 0
    full_low = 0
    high = tokens
    full_high = tl.cdiv(tokens, BLOCK) * BLOCK
    if right is not None:
        low = tl.maximum(first_key - right - offset, 0)
        full_low = tl.maximum(last_key - right - offset, 0)
    if left is not None:
        high = tl.maximum(tl.minimum(last_key + left + 1 - offset, tokens), 0)
        seen_by_all = tl.maximum(first_key + left + 1 - offset, 0)
        full_high = tl.where(seen_by_all >= tokens, full_high, seen_by_all // BLOCK * BLOCK)
    low = low // BLOCK * BLOCK
    full_high = tl.maximum(full_high, low)
    full_low = tl.minimum(tl.cdiv(full_low, BLOCK) * BLOCK, full_high)
    return low, full_low, full_high, high


@triton.jit
def _add_tokens(
    key_sums, value_sums, k, v, query, query_strides, grad, grad_strides, statistics, delta_offset, padded_tokens,
    gate, gate_stride, attn_mask, mask_strides, heads, start, count, low, full_low, full_high, high,
    index, tokens, keys, left, right, scale, softcap,
    BOUNDARY: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, EMPTY_ROWS: tl.constexpr, WANT_KEY: tl.constexpr,
    WANT_VALUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums, and what the tokens that need masks (BOUNDARY), or need none, add to them, head after head.

    GROUP: the most heads that there can be; a single one's gate is left to the caller.
    """
    blocks = block_count(low, full_low, full_high, high, BLOCK_M, BOUNDARY)
    # One loop over heads and tokens: a loop in a loop keeps two sets of addresses, and registers are short.
    place, block = start, 0
    for _ in range(count * blocks):
        head = (place if heads is None else tl.load(heads + place)).to(tl.int64)
        token = block_start(block, low, full_low, full_high, BLOCK_M, BOUNDARY) + tl.arange(0, BLOCK_M)
        exists = token < tokens
        row = token.to(tl.int64)
        query_rows = query + head * query_strides[1] + row * query_strides[2]
        grad_rows = grad + head * grad_strides[1] + row * grad_strides[2]
        q = load_rows(query_rows, query_strides[3], exists, HEAD_DIM, BLOCK_D)
        g = load_rows(grad_rows, grad_strides[3], exists, VALUE_DIM, BLOCK_V)
        log2_sums = statistics + head * padded_tokens + token
        log2_sum = tl.load(log2_sums)[None, :]
        if EMPTY_ROWS:
            # Where no key is seen, queries and the gradients of outputs may hold anything.
            sees_a_key = tl.trans(log2_sum != float("inf"))
            q = tl.where(sees_a_key, q, 0.0).to(q.dtype)
            g = tl.where(sees_a_key, g, 0.0).to(g.dtype)
        mask_rows, key_stride, head_gate = None, None, None
        if attn_mask is not None:
            mask_row = head * mask_strides[1] + tl.minimum(row, tokens - 1) * mask_strides[2]
            mask_rows, key_stride = attn_mask + mask_row[None, :], mask_strides[3]
        if (gate is not None) and (GROUP > 1):
            head_gate = tl.load(gate + head * gate_stride)
        # Tiles of scores lie [keys, tokens]: both sums multiply what is in registers already.
        zeros = tl.zeros([k.shape[0], BLOCK_M], tl.float32)
        products = dot(k, tl.trans(q), zeros, PRECISION)
        probabilities = gated_probabilities(
            products, log2_sum, head_gate, scale, softcap, mask_rows, key_stride, (token + keys - tokens)[None, :],
            index[:, None], keys, left, right, BOUNDARY,
        )  # fmt: skip
        # Rounded once for both sums: kept in float32 the tile would not fit into the registers beside them.
        probabilities = probabilities.to(g.dtype)
        if WANT_VALUE:
            value_sums = dot(probabilities, g, value_sums, PRECISION)
        if WANT_KEY:
            value_products = dot(v, tl.trans(g), zeros, PRECISION)
            delta = tl.load(log2_sums + delta_offset)[None, :]
            gradients = score_gradients(probabilities.to(tl.float32), value_products, log2_sum, delta, EMPTY_ROWS)
            gradients = product_gradients(gradients, products, log2_sum, scale, softcap, EMPTY_ROWS)
            key_sums = dot(gradients.to(q.dtype), q, key_sums, PRECISION)
        block += 1
        if GROUP > 1:
            place = tl.where(block == blocks, place + 1, place)
            block = tl.where(block == blocks, 0, block)
    return key_sums, value_sums


@triton.jit
def _attention_backward_keys(
    query, query_strides, key, key_strides, value, value_strides, attn_mask, mask_strides,
    grad, grad_strides, statistics, delta_offset, padded_tokens, gate, gate_strides,
    key_gradient, key_gradient_strides, value_gradient, value_gradient_strides,
    heads, items, item_count, num_heads, kv_heads, tokens, keys, left, right, scale, softcap, tiles, turns,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EMPTY_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one work item, over all tokens of its active query heads that see some of them."""
    request, kv_head, start, count, rank = work_item(items, item_count, kv_heads, tiles, turns, GROUP)
    if count == 0:
        return
    request, kv_head = request.to(tl.int64), kv_head.to(tl.int64)
    # Under a causal mask the first tile of keys is the longest.
    first_key = rank * BLOCK_N
    index = first_key + tl.arange(0, BLOCK_N)
    row = index.to(tl.int64)
    key += request * key_strides[0] + kv_head * key_strides[1]
    value += request * value_strides[0] + kv_head * value_strides[1]
    k = load_rows(key + row * key_strides[2], key_strides[3], index < keys, HEAD_DIM, BLOCK_D)
    v = load_rows(value + row * value_strides[2], value_strides[3], index < keys, VALUE_DIM, BLOCK_V)
    query += request * query_strides[0]
    grad += request * grad_strides[0]
    statistics += request * num_heads * padded_tokens
    if heads is not None:
        heads += request * num_heads
    if gate is not None:
        gate += request * gate_strides[0]
    if attn_mask is not None:
        attn_mask += request * mask_strides[0]
        # Keys past the end repeat the last: what they sum up is not stored.
        index = tl.minimum(index, keys - 1)
    gate_stride = None if gate is None else gate_strides[1]

    last_key = tl.minimum(first_key + BLOCK_N, keys) - 1
    low, full_low, full_high, high = query_range(first_key, last_key, tokens, keys, left, right, BLOCK_M)
    key_sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_sums = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for BOUNDARY in tl.static_range(2):
        if (left is not None) | (right is not None) | (not BOUNDARY):
            key_sums, value_sums = _add_tokens(
                key_sums, value_sums, k, v, query, query_strides, grad, grad_strides,
                statistics, delta_offset, padded_tokens, gate, gate_stride, attn_mask, mask_strides,
                heads, start, count, low, full_low, full_high, high, index, tokens, keys, left, right, scale, softcap,
                BOUNDARY, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, GROUP, EMPTY_ROWS,
                key_gradient is not None, value_gradient is not None, PRECISION,
            )  # fmt: skip

    if (gate is not None) and (GROUP == 1):
        head = (start if heads is None else tl.load(heads + start)).to(tl.int64)
        head_gate = tl.load(gate + head * gate_stride)
        key_sums *= head_gate
        value_sums *= head_gate
    # The same numbers again, which the compiler cannot tell: kept through the loops they would cost registers.
    index = first_key + tl.minimum(count, 0) + tl.arange(0, BLOCK_N)
    row = index.to(tl.int64)
    exists = index < keys
    if key_gradient is not None:
        key_gradient += request * key_gradient_strides[0] + kv_head * key_gradient_strides[1]
        rows = key_gradient + row * key_gradient_strides[2]
        store_rows(rows, key_gradient_strides[3], key_sums * scale, exists, HEAD_DIM, BLOCK_D)
    if value_gradient is not None:
        value_gradient += request * value_gradient_strides[0] + kv_head * value_gradient_strides[1]
        rows = value_gradient + row * value_gradient_strides[2]
        store_rows(rows, value_gradient_strides[3], value_sums, exists, VALUE_DIM, BLOCK_V)


def keys_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    grad: Tensor,
    statistics: Tensor,
    gate: Tensor | None,
    key_gradient: Tensor | None,
    value_gradient: Tensor | None,
    work: WorkList | None,
    config: Config,
    **options: Any,
) -> Launch:
    """Fills the gradients that are wanted (None = not) of the key/value heads in work (None = all).

    statistics: as `prepare_launch` fills them, padded to whole tiles; options: as in `backward_arguments`.
    """
    tiles = triton.cdiv(key.shape[2], config.block_n)
    arguments = {
        **backward_arguments(query, key, value, attn_mask, grad, statistics, gate, work, config, **options),
        "key_gradient": key_gradient,
        "key_gradient_strides": None if key_gradient is None else key_gradient.stride(),
        "value_gradient": value_gradient,
        "value_gradient_strides": None if value_gradient is None else value_gradient.stride(),
        "tiles": tiles,
    }
    return Launch(_attention_backward_keys, (key.shape[0] * key.shape[1] * tiles,), arguments, config.options)

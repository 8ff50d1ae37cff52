"""Forward kernel: a program attends with one tile of packed query rows over the keys that they see."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton import capability
from ...._triton.launch import Launch
from ...._triton.primitives import dot
from ...._triton.work_list import WorkList, attention_work_list
from .arguments import group_size, shared_arguments
from .configs import Config, choose
from .primitives import (
    LN_2,
    LOG2_E,
    SIZES,
    key_range,
    load_rows,
    log2_scores,
    masked,
    packed_rows,
    store_rows,
    work_item,
)


@triton.jit
def _attend(
    accumulator, row_sum, row_max, q, key, key_strides, value, value_strides, attn_mask, mask_strides,
    low, high, position, keys, left, right, scale, softcap,
    BOUNDARY: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax carried over the blocks of keys from low to high."""
    for first_key in tl.range(low, high, BLOCK_N):
        index = first_key + tl.arange(0, BLOCK_N)
        inside = index < keys if BOUNDARY else None
        k = load_rows(key + index.to(tl.int64) * key_strides[2], key_strides[3], inside, HEAD_DIM, BLOCK_D)
        products = dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32), PRECISION)
        scores = log2_scores(products, scale, softcap)
        key_stride = None if mask_strides is None else mask_strides[3]
        scores = masked(scores, attn_mask, key_stride, position, index[None, :], keys, left, right, BOUNDARY)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # Rows that have seen no key yet subtract 0, not infinity from infinity.
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        weights = tl.exp2(scores - shift[:, None])
        correction = tl.exp2(row_max - shift)
        row_sum = row_sum * correction + tl.sum(weights, 1)
        v = load_rows(value + index.to(tl.int64) * value_strides[2], value_strides[3], inside, VALUE_DIM, BLOCK_V)
        accumulator = dot(weights.to(v.dtype), v, accumulator * correction[:, None], PRECISION)
        row_max = new_max
    return accumulator, row_sum, row_max


@triton.jit(do_not_specialize=SIZES)
def _attention_forward(
    query, query_strides, key, key_strides, value, value_strides, attn_mask, mask_strides,
    gate, gate_strides, sinks, sink_stride, output, output_strides, ungated, logsumexp,
    heads, items, item_count, num_heads, kv_heads, tokens, keys, left, right, scale, softcap, tiles, turns,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one work item: output, and where asked the output before the gate and the logsumexp."""
    request, kv_head, start, count, rank = work_item(items, item_count, kv_heads, tiles, turns, GROUP)
    # Under a causal mask the last tile of rows is the longest.
    first_row = (tiles - 1 - rank) * BLOCK_M
    if first_row >= tokens * count:
        return
    token, head, valid = packed_rows(heads, num_heads, request, start, count, tokens, first_row, BLOCK_M, GROUP)
    request, kv_head, head = request.to(tl.int64), kv_head.to(tl.int64), head.to(tl.int64)
    rows = query + request * query_strides[0] + head * query_strides[1] + token.to(tl.int64) * query_strides[2]
    q = load_rows(rows, query_strides[3], None, HEAD_DIM, BLOCK_D)
    key += request * key_strides[0] + kv_head * key_strides[1]
    value += request * value_strides[0] + kv_head * value_strides[1]
    if attn_mask is not None:
        attn_mask += (
            request * mask_strides[0] + (head * mask_strides[1] + token.to(tl.int64) * mask_strides[2])[:, None]
        )
    position = (token + keys - tokens)[:, None]
    last_row = tl.minimum(first_row + BLOCK_M, tokens * count) - 1
    low, full_low, full_high, high = key_range(
        first_row // count, last_row // count, tokens, keys, left, right, BLOCK_N
    )

    accumulator = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    if left is not None:
        accumulator, row_sum, row_max = _attend(
            accumulator, row_sum, row_max, q, key, key_strides, value, value_strides, attn_mask, mask_strides,
            low, full_low, position, keys, left, right, scale, softcap,
            True, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, PRECISION,
        )  # fmt: skip
    accumulator, row_sum, row_max = _attend(
        accumulator, row_sum, row_max, q, key, key_strides, value, value_strides, attn_mask, mask_strides,
        full_low, full_high, position, keys, left, right, scale, softcap,
        False, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, PRECISION,
    )  # fmt: skip
    accumulator, row_sum, row_max = _attend(
        accumulator, row_sum, row_max, q, key, key_strides, value, value_strides, attn_mask, mask_strides,
        full_high, high, position, keys, left, right, scale, softcap,
        True, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N, PRECISION,
    )  # fmt: skip

    sees_a_key = row_sum != 0
    if sinks is not None:
        sink = tl.load(sinks + head * sink_stride) * LOG2_E
        top = tl.maximum(row_max, sink)
        correction = tl.exp2(row_max - top)
        row_sum = row_sum * correction + tl.exp2(sink - top)
        accumulator *= correction[:, None]
        row_max = top
    row_sum = tl.where(sees_a_key, row_sum, 1.0)
    attended = tl.where(sees_a_key[:, None], accumulator * (1.0 / row_sum)[:, None], 0.0)
    place = request * output_strides[0] + head * output_strides[1] + token.to(tl.int64) * output_strides[2]
    if ungated is not None:
        store_rows(ungated + place, output_strides[3], attended, valid, VALUE_DIM, BLOCK_V)
    if gate is not None:
        attended *= tl.load(gate + request * gate_strides[0] + head * gate_strides[1])[:, None]
    store_rows(output + place, output_strides[3], attended, valid, VALUE_DIM, BLOCK_V)
    if logsumexp is not None:
        total = tl.where(sees_a_key, (row_max + tl.log2(row_sum)) * LN_2, float("inf"))
        tl.store(logsumexp + (request * num_heads + head) * tokens + token, total, mask=valid)


def forward_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    output: Tensor,
    ungated: Tensor | None,
    logsumexp: Tensor | None,
    work: WorkList | None,
    *,
    span: tuple[int, int],
    scale: float,
    softcap: float,
    group: int,
    tf32: bool,
    config: Config,
) -> Launch:
    """Fills output, and ungated (laid out like it) and logsumexp where given, of the heads in work (None = all)."""
    batch, _, tokens, _ = query.shape
    gate = None if gate is None else gate.expand(batch, query.shape[1])
    tiles = triton.cdiv(tokens * group, config.block_m)
    arguments = {
        **shared_arguments(
            query, key, value, attn_mask, work, config, span=span, scale=scale, softcap=softcap, group=group, tf32=tf32
        ),
        "gate": gate,
        "gate_strides": None if gate is None else gate.stride(),
        "sinks": sinks,
        "sink_stride": None if sinks is None else sinks.stride(0),
        "output": output,
        "output_strides": output.stride(),
        "ungated": ungated,
        "logsumexp": logsumexp,
        "tiles": tiles,
    }
    return Launch(_attention_forward, (batch * key.shape[1] * tiles,), arguments, config.options)


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_mask: Tensor | None,
    kv_heads: Tensor | None,
    gate: Tensor | None,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    tf32: bool,
    *,
    training: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output; and for the backward, where training, the output before the gate (if there is one) and the logsumexp."""
    batch, heads, tokens, head_dim = query.shape
    value_dim = value.shape[3]
    group = group_size(query, key, kv_heads)
    if config is None:
        device = capability(query.device)
        config = choose("forward", head_dim, value_dim, query.element_size(), tokens * group, device)
    work = None
    if head_mask is not None or kv_heads is not None:
        work = attention_work_list(head_mask, kv_heads, batch, heads, key.shape[1], query.device)

    def rows() -> Tensor:
        new = query.new_empty if head_mask is None else query.new_zeros
        return new((batch, tokens, heads, value_dim)).transpose(1, 2)

    output = rows()
    ungated = rows() if training and gate is not None else None
    logsumexp = query.new_empty((batch, heads, tokens), dtype=torch.float32) if training else None
    if logsumexp is not None and head_mask is not None:
        logsumexp.fill_(math.inf)
    forward_launch(
        query, key, value, gate, attn_mask, sinks, output, ungated, logsumexp, work,
        span=(left, right), scale=scale, softcap=softcap, group=group, tf32=tf32, config=config,
    ).run()  # fmt: skip
    return output, ungated, logsumexp

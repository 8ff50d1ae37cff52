"""Device functions of the projections: which tile a program has, which tokens and heads lie in it, and its sums.

A list of heads holds those that run first, `count` of them: slot s of the compact order is head list[s]. Columns and
terms of a sum are numbered in that order, slot * HEAD_DIM + dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...._triton.primitives import dot


@triton.jit
def tile_of(program, row_tiles, column_tiles, GROUP_M: tl.constexpr):
    """(request, tile of rows, tile of columns); programs that run together share rows and columns."""
    request = program // (row_tiles * column_tiles)
    place = program % (row_tiles * column_tiles)
    first = place // (GROUP_M * column_tiles) * GROUP_M
    rows = tl.minimum(row_tiles - first, GROUP_M)
    place = place % (GROUP_M * column_tiles)
    return request, first + place % rows, place // rows


@triton.jit
def tokens_of(request, row_tile, request_tokens, tokens, BLOCK_M: tl.constexpr):
    """(row of the batch, token in it, whether there is such a token); those past the end repeat the last.

    A request has request_tokens tokens, of rows of the batch with `tokens` each: one row, or all.
    """
    token = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = token < request_tokens
    token = request * request_tokens + tl.minimum(token, request_tokens - 1)
    return (token // tokens).to(tl.int64), (token % tokens).to(tl.int64), valid


@triton.jit
def slots_of(term, count, HEAD_DIM: tl.constexpr):
    """The slots of terms in compact order; those past the end repeat the last slot."""
    RUN: tl.constexpr = min(HEAD_DIM & -HEAD_DIM, 16)
    # The compiler cannot see this through the minimum, and would load one number at a time.
    return tl.max_constancy(tl.minimum(term // HEAD_DIM, tl.maximum(count - 1, 0)), RUN)


@triton.jit
def heads_of(heads, term, count, HEAD_DIM: tl.constexpr):
    """The heads of terms in compact order, as slots_of; an empty list is not read."""
    RUN: tl.constexpr = min(HEAD_DIM & -HEAD_DIM, 16)
    slot = slots_of(term, count, HEAD_DIM)
    return tl.max_constancy(tl.load(heads + slot, mask=slot < count, other=0), RUN).to(tl.int64)


@triton.jit
def sum_over_width(
    x_rows, weight_rows, width, x_stride, weight_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x @ weight.T in float32, of pointers to rows of both, `width` numbers each."""
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        left_pointers = x_rows[:, None] + column[None, :].to(tl.int64) * x_stride
        right_pointers = weight_rows[None, :] + column[:, None].to(tl.int64) * weight_stride
        if EVEN_K:
            left = tl.load(left_pointers)
            right = tl.load(right_pointers)
        else:
            left = tl.load(left_pointers, mask=column[None, :] < width, other=0.0)
            right = tl.load(right_pointers, mask=column[:, None] < width, other=0.0)
        accumulator = dot(left, right, accumulator, PRECISION)
    return accumulator


@triton.jit
def add_sum_over_heads(
    accumulator, source_rows, weight_columns, column_valid, heads, count, gate,
    source_head_stride, source_dim_stride, weight_stride, gate_stride,
    HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, BLOCK_K: tl.constexpr, ALIGNED: tl.constexpr,
    EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """accumulator + sum over the listed heads of gate * source @ weight.T.

    source_rows: pointers to rows of [heads, HEAD_DIM], all heads if WIDE, else the slots; weight_columns: pointers to
    the first of HEADS * HEAD_DIM numbers. ALIGNED: BLOCK_K divides HEAD_DIM, so a tile lies in one head.
    """
    # Looked up a step ahead: else the pipeline would spend a stage on it.
    if ALIGNED:
        head = tl.load(heads, mask=count > 0, other=0).to(tl.int64)
    else:
        head = heads_of(heads, tl.arange(0, BLOCK_K), count, HEAD_DIM)
    for start in range(0, count * HEAD_DIM, BLOCK_K):
        if ALIGNED:
            slot = start // HEAD_DIM
            # Triton 3.6 does not see it, and would load one number at a time.
            dimension = tl.multiple_of(start % HEAD_DIM + tl.arange(0, BLOCK_K), BLOCK_K)
            next_head = tl.load(heads + tl.minimum((start + BLOCK_K) // HEAD_DIM, count - 1)).to(tl.int64)
        else:
            term = start + tl.arange(0, BLOCK_K)
            slot = slots_of(term, count, HEAD_DIM)
            dimension = term % HEAD_DIM
            next_head = heads_of(heads, term + BLOCK_K, count, HEAD_DIM)
        place = (head if WIDE else slot.to(tl.int64)) * source_head_stride + dimension.to(tl.int64) * source_dim_stride
        left_pointers = source_rows[:, None] + place[None, :]
        right_pointers = weight_columns[None, :] + ((head * HEAD_DIM + dimension) * weight_stride)[:, None]
        if ALIGNED:
            left = tl.load(left_pointers)
            if EVEN_N:
                right = tl.load(right_pointers)
            else:
                right = tl.load(right_pointers, mask=column_valid[None, :], other=0.0)
        else:
            exists = term < count * HEAD_DIM
            left = tl.load(left_pointers, mask=exists[None, :], other=0.0)
            right = tl.load(right_pointers, mask=exists[:, None] & column_valid[None, :], other=0.0)
        if gate is not None:
            scale = tl.load(gate + head * gate_stride)
            left = (left.to(tl.float32) * (scale if ALIGNED else scale[None, :])).to(left.dtype)
        accumulator = dot(left, right, accumulator, PRECISION)
        head = next_head
    return accumulator

"""In-projection, forward: queries, keys and values of the listed heads in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ...._triton import Capability, capability
from ...._triton.launch import Launch
from .configs import Config, choose, precision
from .lists import HeadList, lists_of
from .primitives import heads_of, sum_over_width, tile_of, tokens_of

MOST_WEIGHTS = 3


@triton.jit
def in_projection_kernel(
    x, weights, biases, heads, counts, outputs, x_strides, weight_strides, slots, request_tokens, tokens, width,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Projects a tile of one request's tokens to a tile of one weight's listed heads; zeros for those that are off."""
    column_tiles = 0
    for i in tl.static_range(len(weights)):
        column_tiles += tl.cdiv(slots[i] * HEAD_DIM, BLOCK_N)
    row_tiles = tl.cdiv(request_tokens, BLOCK_M)
    request, row_tile, column_tile = tile_of(tl.program_id(0), row_tiles, column_tiles, GROUP_M)

    weight, listed, output, length = weights[0], heads[0], outputs[0], slots[0]
    segment = tl.full((), 0, tl.int32)
    first = tl.full((), 0, tl.int32)
    next_first = 0
    if counts is not None:
        count = counts[0]
    for i in tl.static_range(1, len(weights)):
        next_first += tl.cdiv(slots[i - 1] * HEAD_DIM, BLOCK_N)
        later = column_tile >= next_first
        weight = tl.where(later, weights[i], weight)
        listed = tl.where(later, heads[i], listed)
        output = tl.where(later, outputs[i], output)
        length = tl.where(later, slots[i], length)
        segment = tl.where(later, i, segment)
        first = tl.where(later, next_first, first)
        if counts is not None:
            count = tl.where(later, counts[i], count)
    if counts is not None:
        listed += request.to(tl.int64) * length
        runs = tl.load(count + request)
    else:
        runs = length

    term = (column_tile - first) * BLOCK_N + tl.arange(0, BLOCK_N)
    dimension = term % HEAD_DIM
    head = heads_of(listed, term, runs, HEAD_DIM)
    batch, token, row_valid = tokens_of(request, row_tile, request_tokens, tokens, BLOCK_M)
    accumulator = sum_over_width(
        x + batch * x_strides[0] + token * x_strides[1],
        weight + (head * HEAD_DIM + dimension) * weight_strides[0],
        tl.where((column_tile - first) * BLOCK_N < runs * HEAD_DIM, width, 0),
        x_strides[2], weight_strides[1], BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    column_runs = term < runs * HEAD_DIM
    bias = tl.zeros([BLOCK_N], tl.float32)
    # Triton 3.6 knows no length of a tuple with None in it.
    for i in tl.static_range(len(weights)):
        if biases[i] is not None:
            own = term < tl.where(segment == i, runs * HEAD_DIM, 0)
            bias += tl.load(biases[i] + head * HEAD_DIM + dimension, mask=own, other=0.0)
    accumulator = tl.where(column_runs[None, :], accumulator + bias[None, :], 0.0)
    if counts is not None:
        column = heads_of(listed, term, length, HEAD_DIM) * HEAD_DIM + dimension
    else:
        column = term
    pointers = output + ((batch * tokens + token) * length * HEAD_DIM)[:, None] + column[None, :]
    valid = row_valid[:, None] & (term < length * HEAD_DIM)[None, :]
    tl.store(pointers, accumulator.to(output.dtype.element_ty), mask=valid)


def in_projection_launch(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lists: Sequence[HeadList],
    outputs: Sequence[Tensor],
    head_dim: int,
    tf32: bool,
    capability: Capability,
    config: Config | None = None,
) -> Launch:
    """Fills outputs [B, T, slots, D] from x [B, T, E] and up to three weights [H*D, E] of the same strides."""
    batch, tokens, width = x.shape
    requests = lists[0].requests
    request_tokens = batch * tokens // max(1, requests)
    columns = sum(each.slots for each in lists) * head_dim
    config = config or choose("tokens", request_tokens, batch * tokens * columns, (x, *weights), tf32, capability)
    arguments = {
        "x": x,
        "weights": tuple(weights),
        "biases": tuple(biases),
        "heads": tuple(each.heads for each in lists),
        "counts": None if lists[0].counts is None else tuple(each.counts for each in lists),
        "outputs": tuple(outputs),
        "x_strides": x.stride(),
        "weight_strides": weights[0].stride(),
        "slots": tuple(each.slots for each in lists),
        "request_tokens": request_tokens,
        "tokens": tokens,
        "width": width,
        "HEAD_DIM": head_dim,
        **config.blocks,
        "EVEN_K": width % config.block_k == 0,
        "PRECISION": precision(x.dtype, tf32),
    }
    column_tiles = sum(triton.cdiv(each.slots * head_dim, config.block_n) for each in lists)
    grid = (requests * triton.cdiv(request_tokens, config.block_m) * column_tiles,)
    return Launch(in_projection_kernel, grid, arguments, config.options)


def in_projection(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    heads: Sequence[Tensor],
    head_dim: int,
    tf32: bool,
) -> list[Tensor]:
    """[B, T, kept, D] of each weight under int64 [kept], [B, T, H, D] with zeros under bool [B, H]."""
    lists = lists_of(heads)
    outputs = [x.new_empty((*x.shape[:2], each.slots, head_dim)) for each in lists]
    for part in launch_groups(weights):
        in_projection_launch(
            x, weights[part], biases[part], lists[part], outputs[part], head_dim, tf32, capability(x.device)
        ).run()
    return outputs


def launch_groups(weights: Sequence[Tensor]) -> list[slice]:
    """Neighbouring weights that one launch takes: those with the same strides, up to three."""
    groups: list[slice] = []
    for i, weight in enumerate(weights):
        if groups and weight.stride() == weights[i - 1].stride() and i - groups[-1].start < MOST_WEIGHTS:
            groups[-1] = slice(groups[-1].start, i + 1)
        else:
            groups.append(slice(i, i + 1))
    return groups

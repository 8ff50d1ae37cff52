"""The gradient of a projection's weight: a sum over tokens, of either projection."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...._triton import Capability, capability
from ...._triton.launch import Launch
from ...._triton.primitives import dot
from .configs import Config, choose, precision
from .lists import HeadList
from .primitives import heads_of, slots_of, tile_of


@triton.jit
def weight_gradient_kernel(
    source, other, gate, heads, requests, request_counts, output,
    source_strides, other_strides, gate_strides, output_strides, slots, batch, tokens, width,
    HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient, part of the width by listed heads' dimensions (shared), or one head's (per request).

    other.T @ (gate * source), over all tokens or over those of the requests that run the head, in their order.
    """
    if requests is None:
        column_tiles = tl.cdiv(slots * HEAD_DIM, BLOCK_N)
    else:
        column_tiles = slots * tl.cdiv(HEAD_DIM, BLOCK_N)
    _, row_tile, column_tile = tile_of(tl.program_id(0), tl.cdiv(width, BLOCK_M), column_tiles, GROUP_M)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if requests is None:
        term = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        column_valid = term < slots * HEAD_DIM
        head = heads_of(heads, term, slots, HEAD_DIM)
        place = head if WIDE else slots_of(term, slots, HEAD_DIM).to(tl.int64)
        dimension = term % HEAD_DIM
        count = batch
        request = tl.full((), 0, tl.int64)
    else:
        head = (column_tile // tl.cdiv(HEAD_DIM, BLOCK_N)).to(tl.int64)
        place = head
        dimension = column_tile % tl.cdiv(HEAD_DIM, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
        column_valid = dimension < HEAD_DIM
        requests += head * batch
        count = tl.load(request_counts + head)
        # Looked up a step ahead: else the pipeline would spend a stage on it.
        request = tl.load(requests, mask=count > 0, other=0).to(tl.int64)
    source_columns = source + place * source_strides[2] + dimension.to(tl.int64) * source_strides[3]
    other_columns = other + row.to(tl.int64) * other_strides[2]
    token_tiles = tl.cdiv(tokens, BLOCK_K)
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, count * token_tiles):
        token = step % token_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
        source_rows = request * source_strides[0] + token.to(tl.int64) * source_strides[1]
        other_rows = request * other_strides[0] + token.to(tl.int64) * other_strides[1]
        left_pointers = other_columns[:, None] + other_rows[None, :]
        right_pointers = source_columns[None, :] + source_rows[:, None]
        if EVEN:
            left = tl.load(left_pointers)
            right = tl.load(right_pointers)
        else:
            exists = token < tokens
            left = tl.load(left_pointers, mask=exists[None, :] & (row < width)[:, None], other=0.0)
            right = tl.load(right_pointers, mask=exists[:, None] & column_valid[None, :], other=0.0)
        if requests is None:
            request = ((step + 1) // token_tiles).to(tl.int64)
        else:
            if gate is not None:
                scale = tl.load(gate + request * gate_strides[0] + head * gate_strides[1])
                right = (right.to(tl.float32) * scale).to(right.dtype)
            request = tl.load(requests + tl.minimum((step + 1) // token_tiles, count - 1)).to(tl.int64)
        accumulator = dot(left, right, accumulator, PRECISION)
    if requests is None:
        # Not kept since before the loop: it would not fit beside the sums.
        head = heads_of(heads, column_tile * BLOCK_N + tl.arange(0, BLOCK_N), slots, HEAD_DIM)
        if gate is not None:
            accumulator *= tl.load(gate + head * gate_strides[1], mask=column_valid, other=0.0)[None, :]
    column = head * HEAD_DIM + dimension
    pointers = output + row.to(tl.int64)[:, None] * output_strides[0] + column[None, :] * output_strides[1]
    tl.store(pointers, accumulator.to(output.dtype.element_ty), mask=(row < width)[:, None] & column_valid[None, :])


def weight_gradient_launch(
    source: Tensor,
    other: Tensor,
    gate: Tensor | None,
    heads: Tensor,
    requests: HeadList | None,
    output: Tensor,
    tf32: bool,
    capability: Capability,
    config: Config | None = None,
) -> Launch:
    """Fills output [E, H*D], of any strides, from source [B, T, n, D] and other [B, T, E].

    heads: those that all requests run; or requests: of every head, those that run it.
    """
    width, head_dim = other.shape[2], source.shape[3]
    wide = requests is not None or source.shape[2] != heads.shape[0]
    slots = source.shape[2] if requests is not None else heads.shape[0]
    if requests is None:
        source, other = merge_tokens(source, other)
    batch, tokens = source.shape[:2]
    columns = slots * head_dim if requests is None else head_dim
    config = config or choose("weight", columns, width * slots * head_dim, (source, other), tf32, capability)
    # No product of a step is worth more than the tokens that a request has.
    block_k = min(config.block_k, max(16, triton.next_power_of_2(tokens)))
    even_columns = requests is None or head_dim % config.block_n == 0
    column_tiles = triton.cdiv(columns, config.block_n) * (1 if requests is None else slots)
    arguments = {
        "source": source,
        "other": other,
        "gate": gate,
        "heads": heads if requests is None else None,
        "requests": None if requests is None else requests.heads,
        "request_counts": None if requests is None else requests.counts,
        "output": output,
        "source_strides": source.stride(),
        "other_strides": other.stride(),
        "gate_strides": None if gate is None else gate.stride(),
        "output_strides": output.stride(),
        "slots": slots,
        "batch": batch,
        "tokens": tokens,
        "width": width,
        "HEAD_DIM": head_dim,
        "WIDE": wide,
        "EVEN": tokens % block_k == 0 and width % config.block_m == 0 and even_columns,
        **config.blocks,
        "BLOCK_K": block_k,
        "PRECISION": precision(source.dtype, tf32),
    }
    grid = (triton.cdiv(width, config.block_m) * column_tiles,)
    return Launch(weight_gradient_kernel, grid, arguments, config.options)


def merge_tokens(*tensors: Tensor) -> list[Tensor]:
    """[B, T, ...] as [1, B * T, ...] where all strides allow it: then tiles of tokens span rows of the batch."""
    if all(1 in each.shape[:2] or each.stride(0) == each.shape[1] * each.stride(1) for each in tensors):
        return [each.flatten(0, 1).unsqueeze(0) for each in tensors]
    return list(tensors)


def weight_gradient(
    source: Tensor,
    other: Tensor,
    gate: Tensor | None,
    heads: Tensor,
    requests: HeadList | None,
    transposed: bool,
    num_heads: int,
    tf32: bool,
) -> Tensor:
    """other.T @ (gate * source), [E, H*D], or [H*D, E] if transposed; zeros for heads that nothing runs."""
    shape = (other.shape[2], num_heads * source.shape[3])
    every = requests is not None or heads.shape[0] == num_heads
    allocate = other.new_empty if every else other.new_zeros
    found = allocate(shape[::-1] if transposed else shape)
    output = found.t() if transposed else found
    weight_gradient_launch(source, other, gate, heads, requests, output, tf32, capability(other.device)).run()
    return found

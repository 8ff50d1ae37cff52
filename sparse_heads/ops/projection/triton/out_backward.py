"""Output projection, backward: the gradients of the heads, of the gate and of the weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton import Capability, capability
from ...._triton.launch import Launch
from .configs import Config, choose, precision
from .lists import HeadList, lists_of, requests_of
from .out_forward import is_wide
from .primitives import heads_of, slots_of, sum_over_width, tile_of, tokens_of
from .weight_gradient import weight_gradient


@triton.jit
def out_projection_backward_kernel(
    grad, weight, source, gate, heads, counts, output, partials,
    grad_strides, weight_strides, source_strides, gate_strides, slots, output_heads, request_tokens, tokens, width,
    HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the listed heads at a tile of one request's tokens; zeros for those that are off.

    With a gate also the tile's sums over tokens of the ungated gradient times the heads, for the gate's gradient.
    """
    row_tiles = tl.cdiv(request_tokens, BLOCK_M)
    request, row_tile, column_tile = tile_of(tl.program_id(0), row_tiles, tl.cdiv(slots * HEAD_DIM, BLOCK_N), GROUP_M)
    batch, token, row_valid = tokens_of(request, row_tile, request_tokens, tokens, BLOCK_M)
    request = request.to(tl.int64)
    count = slots
    if counts is not None:
        heads += request * slots
        count = tl.load(counts + request)
    term = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    dimension = term % HEAD_DIM
    head = heads_of(heads, term, count, HEAD_DIM)
    column_runs = term < count * HEAD_DIM
    accumulator = sum_over_width(
        grad + batch * grad_strides[0] + token * grad_strides[1],
        weight + (head * HEAD_DIM + dimension) * weight_strides[1],
        tl.where(column_tile * BLOCK_N < count * HEAD_DIM, width, 0),
        grad_strides[2], weight_strides[0], BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    accumulator = tl.where(column_runs[None, :], accumulator, 0.0)
    # Off heads too have a place, where zeros go.
    place = heads_of(heads, term, slots, HEAD_DIM) if WIDE else slots_of(term, slots, HEAD_DIM).to(tl.int64)
    column = place * HEAD_DIM + dimension
    column_valid = term < slots * HEAD_DIM
    if gate is not None:
        source_rows = source + batch * source_strides[0] + token * source_strides[1]
        source_columns = place * source_strides[2] + dimension.to(tl.int64) * source_strides[3]
        mask = row_valid[:, None] & column_runs[None, :]
        ungated = tl.load(source_rows[:, None] + source_columns[None, :], mask=mask, other=0.0).to(tl.float32)
        partial = partials + (request * row_tiles + row_tile) * output_heads * HEAD_DIM + column
        tl.store(partial, tl.sum(accumulator * ungated, 0), mask=column_valid)
        accumulator *= tl.load(gate + request * gate_strides[0] + head * gate_strides[1], mask=column_runs, other=0.0)[
            None, :
        ]
    pointers = output + ((batch * tokens + token) * output_heads * HEAD_DIM)[:, None] + column[None, :]
    tl.store(pointers, accumulator.to(output.dtype.element_ty), mask=row_valid[:, None] & column_valid[None, :])


def out_projection_backward_launch(
    grad: Tensor,
    heads: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    listed: HeadList,
    output: Tensor,
    tf32: bool,
    capability: Capability,
    config: Config | None = None,
) -> tuple[Launch, Tensor | None]:
    """Fills output [B, T, n, D], the gradient of heads, and with a gate the partials [requests, tiles, n, D]."""
    batch, tokens, output_heads, head_dim = heads.shape
    width = weight.shape[0]
    requests = listed.requests
    request_tokens = batch * tokens // max(1, requests)
    kernel = "tokens" if gate is None else "tokens, gated"
    outputs = batch * tokens * listed.slots * head_dim
    config = config or choose(kernel, request_tokens, outputs, (grad, weight), tf32, capability)
    row_tiles = triton.cdiv(request_tokens, config.block_m)
    partials = None
    if gate is not None:
        allocate = heads.new_empty if output_heads == listed.slots else heads.new_zeros
        partials = allocate((requests, row_tiles, output_heads, head_dim), dtype=torch.float32)
    arguments = {
        "grad": grad,
        "weight": weight,
        "source": heads,
        "gate": gate,
        "heads": listed.heads,
        "counts": listed.counts,
        "output": output,
        "partials": partials,
        "grad_strides": grad.stride(),
        "weight_strides": weight.stride(),
        "source_strides": heads.stride(),
        "gate_strides": None if gate is None else gate.stride(),
        "slots": listed.slots,
        "output_heads": output_heads,
        "request_tokens": request_tokens,
        "tokens": tokens,
        "width": width,
        "HEAD_DIM": head_dim,
        "WIDE": is_wide(heads, listed),
        "EVEN_K": width % config.block_k == 0,
        **config.blocks,
        "PRECISION": precision(heads.dtype, tf32),
    }
    grid = (requests * row_tiles * triton.cdiv(listed.slots * head_dim, config.block_n),)
    return Launch(out_projection_backward_kernel, grid, arguments, config.options), partials


def out_projection_backward(
    grad: Tensor,
    heads: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    kept: Tensor,
    tf32: bool,
    wanted_heads: bool,
    wanted_weight: bool,
    wanted_gate: bool,
) -> list[Tensor]:
    """The wanted gradients of heads [B, T, n, D], weight [E, H*D] and gate [1 or B, H]; zeros where nothing runs."""
    found = []
    if wanted_heads or wanted_gate:
        (listed,) = lists_of([kept])
        allocate = heads.new_empty if heads.shape[2] == listed.slots else heads.new_zeros
        output = allocate(heads.shape)
        launch, partials = out_projection_backward_launch(
            grad, heads, weight, gate, listed, output, tf32, capability(heads.device)
        )
        launch.run()
        if wanted_heads:
            found.append(output)
    if wanted_weight:
        num_heads = weight.shape[1] // heads.shape[3]
        (requests,) = requests_of([kept])
        found.append(
            weight_gradient(heads, grad, gate, kept, requests, transposed=False, num_heads=num_heads, tf32=tf32)
        )
    if wanted_gate:
        sums = partials.sum((1, 3))
        if sums.shape[1] != gate.shape[1]:
            sums = sums.new_zeros(gate.shape).index_copy_(1, kept, sums)
        found.append(sums.to(gate.dtype))
    return found

"""Output projection, forward: a sum over the listed heads of each request."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...._triton import Capability, capability
from ...._triton.launch import Launch
from .configs import Config, choose, head_block, precision
from .lists import HeadList, lists_of
from .primitives import add_sum_over_heads, tile_of, tokens_of


@triton.jit
def out_projection_kernel(
    source, weight, bias, gate, heads, counts, output, source_strides, weight_strides, gate_strides,
    slots, request_tokens, tokens, width,
    HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, ALIGNED: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Projects the listed heads of a tile of one request's tokens to a tile of the width."""
    request, row_tile, column_tile = tile_of(
        tl.program_id(0), tl.cdiv(request_tokens, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP_M
    )
    batch, token, row_valid = tokens_of(request, row_tile, request_tokens, tokens, BLOCK_M)
    request = request.to(tl.int64)
    count = slots
    if counts is not None:
        heads += request * slots
        count = tl.load(counts + request)
    if gate is not None:
        gate += request * gate_strides[0]
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column_valid = column < width
    accumulator = add_sum_over_heads(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
        source + batch * source_strides[0] + token * source_strides[1],
        weight + column.to(tl.int64) * weight_strides[0],
        column_valid, heads, count, gate, source_strides[2], source_strides[3], weight_strides[1],
        gate_strides[1] if gate is not None else 0,
        HEAD_DIM, WIDE, BLOCK_K, ALIGNED, EVEN_N, PRECISION,
    )  # fmt: skip
    if bias is not None:
        accumulator += tl.load(bias + column, mask=column_valid, other=0.0).to(tl.float32)[None, :]
    pointers = output + ((batch * tokens + token) * width)[:, None] + column[None, :]
    tl.store(pointers, accumulator.to(output.dtype.element_ty), mask=row_valid[:, None] & column_valid[None, :])


def out_projection_launch(
    heads: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    listed: HeadList,
    output: Tensor,
    tf32: bool,
    capability: Capability,
    config: Config | None = None,
) -> Launch:
    """Fills output [B, T, E] from heads [B, T, H or slots, D], weight [E, H*D] and gate [requests, H]."""
    batch, tokens, _, head_dim = heads.shape
    width = weight.shape[0]
    requests = listed.requests
    request_tokens = batch * tokens // max(1, requests)
    config = config or choose("tokens", request_tokens, output.numel(), (heads, weight, output), tf32, capability)
    block_k, aligned = head_block(config, head_dim)
    arguments = {
        "source": heads,
        "weight": weight,
        "bias": bias,
        "gate": gate,
        "heads": listed.heads,
        "counts": listed.counts,
        "output": output,
        "source_strides": heads.stride(),
        "weight_strides": weight.stride(),
        "gate_strides": None if gate is None else gate.stride(),
        "slots": listed.slots,
        "request_tokens": request_tokens,
        "tokens": tokens,
        "width": width,
        "HEAD_DIM": head_dim,
        "WIDE": is_wide(heads, listed),
        **config.blocks,
        "BLOCK_K": block_k,
        "ALIGNED": aligned,
        "EVEN_N": width % config.block_n == 0,
        "PRECISION": precision(heads.dtype, tf32),
    }
    grid = (requests * triton.cdiv(request_tokens, config.block_m) * triton.cdiv(width, config.block_n),)
    return Launch(out_projection_kernel, grid, arguments, config.options)


def is_wide(heads: Tensor, listed: HeadList) -> bool:
    """Whether heads [B, T, n, D] are all heads, each at its own place, and not the listed ones alone."""
    return listed.counts is not None or heads.shape[2] != listed.slots


def out_projection(
    heads: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, kept: Tensor, tf32: bool
) -> Tensor:
    """[B, T, E] of heads [B, T, n, D]: the kept [kept] or all of them under int64 [kept], all under bool [B, H]."""
    output = heads.new_empty((*heads.shape[:2], weight.shape[0]))
    (listed,) = lists_of([kept])
    out_projection_launch(heads, weight, bias, gate, listed, output, tf32, capability(heads.device)).run()
    return output

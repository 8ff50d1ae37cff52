"""In-projection, backward: the gradients of the input, of the weights and of the biases."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ...._triton import Capability, capability
from ...._triton.launch import Launch
from .bias_gradient import bias_gradient
from .configs import Config, choose, head_block, precision
from .lists import HeadList, lists_of, requests_of
from .primitives import add_sum_over_heads, tile_of, tokens_of
from .weight_gradient import weight_gradient


@triton.jit
def in_projection_backward_kernel(
    grads, weights, heads, counts, output, grad_strides, weight_strides, slots, request_tokens, tokens, width,
    HEAD_DIM: tl.constexpr, ALIGNED: tl.constexpr, EVEN_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The input's gradient at a tile of one request's tokens and of the width: a sum over all weights' listed heads."""
    request, row_tile, column_tile = tile_of(
        tl.program_id(0), tl.cdiv(request_tokens, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP_M
    )
    batch, token, row_valid = tokens_of(request, row_tile, request_tokens, tokens, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column_valid = column < width
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in tl.static_range(len(weights)):
        listed = heads[i]
        count = slots[i]
        if counts is not None:
            listed += request.to(tl.int64) * slots[i]
            count = tl.load(counts[i] + request)
        accumulator = add_sum_over_heads(
            accumulator,
            grads[i] + batch * grad_strides[i][0] + token * grad_strides[i][1],
            weights[i] + column.to(tl.int64) * weight_strides[i][1],
            column_valid, listed, count, None, grad_strides[i][2], grad_strides[i][3], weight_strides[i][0], 0,
            HEAD_DIM, counts is not None, BLOCK_K, ALIGNED, EVEN_N, PRECISION,
        )  # fmt: skip
    pointers = output + ((batch * tokens + token) * width)[:, None] + column[None, :]
    tl.store(pointers, accumulator.to(output.dtype.element_ty), mask=row_valid[:, None] & column_valid[None, :])


def in_projection_backward_launch(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    lists: Sequence[HeadList],
    output: Tensor,
    head_dim: int,
    tf32: bool,
    capability: Capability,
    config: Config | None = None,
) -> Launch:
    """Fills output [B, T, E], the input's gradient, from grads [B, T, slots, D] and weights [H*D, E]."""
    batch, tokens, width = output.shape
    requests = lists[0].requests
    request_tokens = batch * tokens // max(1, requests)
    config = config or choose("tokens", request_tokens, output.numel(), (*grads, *weights, output), tf32, capability)
    block_k, aligned = head_block(config, head_dim)
    arguments = {
        "grads": tuple(grads),
        "weights": tuple(weights),
        "heads": tuple(each.heads for each in lists),
        "counts": None if lists[0].counts is None else tuple(each.counts for each in lists),
        "output": output,
        "grad_strides": tuple(grad.stride() for grad in grads),
        "weight_strides": tuple(weight.stride() for weight in weights),
        "slots": tuple(each.slots for each in lists),
        "request_tokens": request_tokens,
        "tokens": tokens,
        "width": width,
        "HEAD_DIM": head_dim,
        "ALIGNED": aligned,
        "EVEN_N": width % config.block_n == 0,
        **config.blocks,
        "BLOCK_K": block_k,
        "PRECISION": precision(output.dtype, tf32),
    }
    grid = (requests * triton.cdiv(request_tokens, config.block_m) * triton.cdiv(width, config.block_n),)
    return Launch(in_projection_backward_kernel, grid, arguments, config.options)


def in_projection_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    heads: Sequence[Tensor],
    head_dim: int,
    tf32: bool,
    wanted_x: bool,
    wanted_weights: Sequence[bool],
    wanted_biases: Sequence[bool],
) -> list[Tensor]:
    """The wanted gradients of x, the weights and their biases; grads [B, T, n, D] as in_projection's outputs."""
    found = []
    lists = lists_of(heads)
    if wanted_x:
        found.append(x.new_empty(x.shape))
        in_projection_backward_launch(grads, weights, lists, found[0], head_dim, tf32, capability(x.device)).run()
    needed = [i for i, wanted in enumerate(wanted_weights) if wanted]
    for i, requests in zip(needed, requests_of([heads[i] for i in needed]), strict=True):
        num_heads = weights[i].shape[0] // head_dim
        found.append(
            weight_gradient(grads[i], x, None, heads[i], requests, transposed=True, num_heads=num_heads, tf32=tf32)
        )
    for i, wanted in enumerate(wanted_biases):
        if wanted:
            found.append(bias_gradient(grads[i], lists[i], weights[i].shape[0], head_dim))
    return found

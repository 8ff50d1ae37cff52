"""The gradient of an in-projection's bias: a sum over the tokens of the requests that run each head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import Launch
from .lists import HeadList
from .primitives import heads_of

CHUNK = 512  # tokens that one program sums


@triton.jit
def bias_gradient_kernel(
    grad, heads, counts, partials, grad_strides, slots, tokens, chunks,
    HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums a chunk of one request's tokens at a tile of its heads; zeros for those that are off."""
    request = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * CHUNK
    count = tl.load(counts + request)
    term = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = heads_of(heads + request * slots, term, slots, HEAD_DIM)
    dimension = term % HEAD_DIM
    column_runs = term < count * HEAD_DIM
    columns = grad + request * grad_strides[0] + head * grad_strides[2] + dimension.to(tl.int64) * grad_strides[3]
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(first, tl.minimum(first + CHUNK, tokens), BLOCK_M):
        token = start + tl.arange(0, BLOCK_M)
        pointers = columns[None, :] + token.to(tl.int64)[:, None] * grad_strides[1]
        values = tl.load(pointers, mask=(token < tokens)[:, None] & column_runs[None, :], other=0.0)
        total += tl.sum(values.to(tl.float32), 0)
    row = partials + tl.program_id(0).to(tl.int64) * slots * HEAD_DIM
    tl.store(row + head * HEAD_DIM + dimension, total, mask=term < slots * HEAD_DIM)


def bias_gradient_launch(grad: Tensor, listed: HeadList, partials: Tensor) -> Launch:
    """Fills partials [B * chunks, H * D], float32, from grad [B, T, H, D]."""
    tokens, num_heads, head_dim = grad.shape[1:]
    arguments = {
        "grad": grad,
        "heads": listed.heads,
        "counts": listed.counts,
        "partials": partials,
        "grad_strides": grad.stride(),
        "slots": num_heads,
        "tokens": tokens,
        "chunks": triton.cdiv(tokens, CHUNK),
        "HEAD_DIM": head_dim,
        "CHUNK": CHUNK,
        "BLOCK_M": 32,
        "BLOCK_N": 128,
    }
    grid = (partials.shape[0], triton.cdiv(num_heads * head_dim, 128))
    return Launch(bias_gradient_kernel, grid, arguments, {"num_warps": 4, "num_stages": 3})


def bias_gradient(grad: Tensor, listed: HeadList, columns: int, head_dim: int) -> Tensor:
    """[H * D] of grad [B, T, n, D]; zeros for heads that no request runs."""
    if listed.counts is None:
        sums = grad.new_zeros(columns // head_dim, head_dim)
        return sums.index_copy_(0, listed.heads, grad.sum((0, 1))).flatten()
    partials = torch.empty(
        (grad.shape[0] * triton.cdiv(grad.shape[1], CHUNK), columns), dtype=torch.float32, device=grad.device
    )
    bias_gradient_launch(grad, listed, partials).run()
    return partials.sum(0).to(grad.dtype)

"""Schemas, fakes and autograd of the projection operators; the extension registers the CPU kernels.

`*_forward` is the kernel alone, called where nothing needs a gradient: an operator with a registered backward costs
some 8 microseconds more a call even then. Layout as in `reference.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import gather_blocks, scatter_blocks

_IN = "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] kept, int head_dim) -> Tensor[]"
# Autograd takes lists of tensors only, so here a missing bias is zeros.
_IN_WITH_BACKWARD = _IN.replace("Tensor?[]", "Tensor[]")
_OUT = "(Tensor heads, Tensor weight, Tensor? bias, Tensor kept, int head_dim) -> Tensor"

torch.library.define("sparse_heads::in_projection_forward", _IN)
torch.library.define("sparse_heads::in_projection", _IN_WITH_BACKWARD)
torch.library.define("sparse_heads::out_projection_forward", _OUT)
torch.library.define("sparse_heads::out_projection", _OUT)
torch.library.define("sparse_heads::items_run", "(bool reset) -> int[]")

in_projection_forward = torch.ops.sparse_heads.in_projection_forward.default
in_projection = torch.ops.sparse_heads.in_projection.default
out_projection_forward = torch.ops.sparse_heads.out_projection_forward.default
out_projection = torch.ops.sparse_heads.out_projection.default

torch.library.impl("sparse_heads::in_projection", "CPU")(lambda *arguments: in_projection_forward(*arguments))
torch.library.impl("sparse_heads::out_projection", "CPU")(lambda *arguments: out_projection_forward(*arguments))


@torch.library.register_fake("sparse_heads::in_projection_forward")
@torch.library.register_fake("sparse_heads::in_projection")
def _(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], kept: Sequence[Tensor], head_dim: int
) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], heads.shape[0] * head_dim)) for heads in kept]


@torch.library.register_fake("sparse_heads::out_projection_forward")
@torch.library.register_fake("sparse_heads::out_projection")
def _(heads: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor, head_dim: int) -> Tensor:
    return heads.new_empty((*heads.shape[:-1], weight.shape[0]))


def _in_projection_context(ctx, inputs, output) -> None:
    x, weights, _, kept, ctx.head_dim = inputs
    ctx.count = len(weights)
    ctx.save_for_backward(x, *weights, *kept)


def _in_projection_backward(ctx, grads):
    x, *saved = ctx.saved_tensors
    weights, kept = saved[: ctx.count], saved[ctx.count :]
    need_x, need_weights, need_biases = ctx.needs_input_grad[:3]
    tokens = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    grads = [grad.reshape(tokens.shape[0], grad.shape[-1]) for grad in grads]
    grad_x = None
    if need_x:
        rows = [gather_blocks(weight, heads, ctx.head_dim, 0) for weight, heads in zip(weights, kept, strict=True)]
        grad_x = (torch.cat(grads, 1) @ torch.cat(rows)).reshape(x.shape)
    grad_weights: list[Tensor | None] = [None] * ctx.count
    grad_biases: list[Tensor | None] = [None] * ctx.count
    for i, (grad, weight, heads) in enumerate(zip(grads, weights, kept, strict=True)):
        if need_weights[i]:
            grad_weights[i] = scatter_blocks(grad.t() @ tokens, heads, ctx.head_dim, weight.shape[0], 0)
        if need_biases[i]:
            grad_biases[i] = scatter_blocks(grad.sum(0), heads, ctx.head_dim, weight.shape[0], 0)
    return grad_x, grad_weights, grad_biases, [None] * ctx.count, None


def _out_projection_context(ctx, inputs, output) -> None:
    heads, weight, _, kept, ctx.head_dim = inputs
    ctx.save_for_backward(heads, weight, kept)


def _out_projection_backward(ctx, grad):
    heads, weight, kept = ctx.saved_tensors
    need_heads, need_weight, need_bias = ctx.needs_input_grad[:3]
    tokens = grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1])
    wide = heads.shape[-1] != kept.shape[0] * ctx.head_dim
    grad_heads = grad_weight = None
    if need_heads:
        grad_heads = tokens @ gather_blocks(weight, kept, ctx.head_dim, 1)
        if wide:
            grad_heads = scatter_blocks(grad_heads, kept, ctx.head_dim, heads.shape[-1], 1)
        grad_heads = grad_heads.reshape(heads.shape)
    if need_weight:
        inputs = gather_blocks(heads, kept, ctx.head_dim, -1) if wide else heads
        columns = tokens.t() @ inputs.reshape(tokens.shape[0], inputs.shape[-1])
        grad_weight = scatter_blocks(columns, kept, ctx.head_dim, weight.shape[1], 1)
    return grad_heads, grad_weight, tokens.sum(0) if need_bias else None, None, None


torch.library.register_autograd(
    "sparse_heads::in_projection", _in_projection_backward, setup_context=_in_projection_context
)
torch.library.register_autograd(
    "sparse_heads::out_projection", _out_projection_backward, setup_context=_out_projection_context
)

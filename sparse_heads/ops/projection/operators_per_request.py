"""Schemas, fakes and autograd of the projection operators that take a mask `[B, H]`; see `operators.py`.

Inputs `[B, T, ...]`; outputs span all heads, with exact zeros for those that are masked, which no gradient is read for.
The extension registers the CPU kernels, backward too. A second derivative raises.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import UnsupportedError

_IN = "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] masks, int head_dim) -> Tensor[]"
# Autograd takes lists of tensors only, so here a missing bias is zeros.
_IN_WITH_BACKWARD = _IN.replace("Tensor?[]", "Tensor[]")
_IN_BACKWARD = (
    "(Tensor[] grads, Tensor x, Tensor[] weights, Tensor[] masks, int head_dim, bool need_x, int[] need_weights, "
    "int[] need_biases) -> Tensor[]"
)
_OUT = "(Tensor heads, Tensor weight, Tensor? bias, Tensor mask, int head_dim) -> Tensor"
_OUT_BACKWARD = (
    "(Tensor grad, Tensor heads, Tensor weight, Tensor mask, int head_dim, bool need_heads, bool need_weight) "
    "-> Tensor[]"
)

torch.library.define("sparse_heads::in_projection_per_request_forward", _IN)
torch.library.define("sparse_heads::in_projection_per_request", _IN_WITH_BACKWARD)
torch.library.define("sparse_heads::in_projection_per_request_backward", _IN_BACKWARD)
torch.library.define("sparse_heads::out_projection_per_request_forward", _OUT)
torch.library.define("sparse_heads::out_projection_per_request", _OUT)
torch.library.define("sparse_heads::out_projection_per_request_backward", _OUT_BACKWARD)

_operators = torch.ops.sparse_heads
in_projection_forward = _operators.in_projection_per_request_forward.default
in_projection = _operators.in_projection_per_request.default
in_projection_backward = _operators.in_projection_per_request_backward.default
out_projection_forward = _operators.out_projection_per_request_forward.default
out_projection = _operators.out_projection_per_request.default
out_projection_backward = _operators.out_projection_per_request_backward.default

torch.library.impl("sparse_heads::in_projection_per_request", "CPU")(
    lambda *arguments: in_projection_forward(*arguments)
)
torch.library.impl("sparse_heads::out_projection_per_request", "CPU")(
    lambda *arguments: out_projection_forward(*arguments)
)


@torch.library.register_fake("sparse_heads::in_projection_per_request_forward")
@torch.library.register_fake("sparse_heads::in_projection_per_request")
def _(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], masks: Sequence[Tensor], head_dim: int
) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


@torch.library.register_fake("sparse_heads::in_projection_per_request_backward")
def _(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    head_dim: int,
    need_x: bool,
    need_weights: Sequence[int],
    need_biases: Sequence[int],
) -> list[Tensor]:
    shapes = [x.shape] if need_x else []
    shapes += [weight.shape for weight, needed in zip(weights, need_weights, strict=True) if needed]
    shapes += [weight.shape[:1] for weight, needed in zip(weights, need_biases, strict=True) if needed]
    return [x.new_empty(shape) for shape in shapes]


@torch.library.register_fake("sparse_heads::out_projection_per_request_forward")
@torch.library.register_fake("sparse_heads::out_projection_per_request")
def _(heads: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, head_dim: int) -> Tensor:
    return heads.new_empty((*heads.shape[:-1], weight.shape[0]))


@torch.library.register_fake("sparse_heads::out_projection_per_request_backward")
def _(
    grad: Tensor, heads: Tensor, weight: Tensor, mask: Tensor, head_dim: int, need_heads: bool, need_weight: bool
) -> list[Tensor]:
    return [heads.new_empty(like.shape) for like, needed in ((heads, need_heads), (weight, need_weight)) if needed]


def _in_projection_context(ctx, inputs, output) -> None:
    x, weights, _, masks, ctx.head_dim = inputs
    ctx.count = len(weights)
    ctx.save_for_backward(x, *weights, *masks)


def _in_projection_backward(ctx, grads):
    x, *saved = ctx.saved_tensors
    weights, masks = saved[: ctx.count], saved[ctx.count :]
    need_x, need_weights, need_biases = ctx.needs_input_grad[:3]
    arguments = (list(grads), x, weights, masks, ctx.head_dim, need_x, list(need_weights), list(need_biases))
    computed = iter(in_projection_backward(*arguments))
    grad_x = next(computed) if need_x else None
    grad_weights = [next(computed) if needed else None for needed in need_weights]
    grad_biases = [next(computed) if needed else None for needed in need_biases]
    return grad_x, grad_weights, grad_biases, [None] * ctx.count, None


def _out_projection_context(ctx, inputs, output) -> None:
    heads, weight, _, mask, ctx.head_dim = inputs
    ctx.save_for_backward(heads, weight, mask)


def _out_projection_backward(ctx, grad):
    heads, weight, mask = ctx.saved_tensors
    need_heads, need_weight, need_bias = ctx.needs_input_grad[:3]
    computed = iter(())
    if need_heads or need_weight:
        computed = iter(out_projection_backward(grad, heads, weight, mask, ctx.head_dim, need_heads, need_weight))
    grad_heads = next(computed) if need_heads else None
    grad_weight = next(computed) if need_weight else None
    return grad_heads, grad_weight, grad.sum((0, 1)) if need_bias else None, None, None


def _no_second_derivative(ctx, *grads):
    raise UnsupportedError(
        "head_mask: the 'cpu' projections have no second derivative under a mask [B, H]; use backend='reference'"
    )


torch.library.register_autograd(
    "sparse_heads::in_projection_per_request", _in_projection_backward, setup_context=_in_projection_context
)
torch.library.register_autograd(
    "sparse_heads::out_projection_per_request", _out_projection_backward, setup_context=_out_projection_context
)
torch.library.register_autograd("sparse_heads::in_projection_per_request_backward", _no_second_derivative)
torch.library.register_autograd("sparse_heads::out_projection_per_request_backward", _no_second_derivative)

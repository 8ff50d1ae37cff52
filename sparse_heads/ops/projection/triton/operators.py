"""Schemas, fakes and autograd of the Triton projections, for CUDA tensors and, in the interpreter, for CPU ones.

`heads` says which heads run: int64 [kept], shared by the batch, or bool [B, H], a row a request. Heads have the layout
[B, T, n, D] with any strides; n are the kept heads, or all where `heads` is bool, zeros where masked. A second
derivative raises. `*_forward` is the kernel alone, for where nothing needs a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....errors import UnsupportedError

# Autograd takes lists of tensors without None: `biased` says which weights the biases belong to.
_IN = (
    "(Tensor x, Tensor[] weights, Tensor[] biases, bool[] biased, Tensor[] heads, int head_dim, bool tf32) -> Tensor[]"
)
_IN_BACKWARD = (
    "(Tensor[] grads, Tensor x, Tensor[] weights, Tensor[] heads, int head_dim, bool tf32, bool wanted_x, "
    "bool[] wanted_weights, bool[] wanted_biases) -> Tensor[]"
)
_OUT = "(Tensor heads, Tensor weight, Tensor? bias, Tensor? gate, Tensor kept, bool tf32) -> Tensor"
_OUT_BACKWARD = (
    "(Tensor grad, Tensor heads, Tensor weight, Tensor? gate, Tensor kept, bool tf32, bool wanted_heads, "
    "bool wanted_weight, bool wanted_gate) -> Tensor[]"
)

torch.library.define("sparse_heads::in_projection_triton_forward", _IN)
torch.library.define("sparse_heads::in_projection_triton", _IN)
torch.library.define("sparse_heads::in_projection_triton_backward", _IN_BACKWARD)
torch.library.define("sparse_heads::out_projection_triton_forward", _OUT)
torch.library.define("sparse_heads::out_projection_triton", _OUT)
torch.library.define("sparse_heads::out_projection_triton_backward", _OUT_BACKWARD)

_operators = torch.ops.sparse_heads
in_projection_forward = _operators.in_projection_triton_forward.default
in_projection = _operators.in_projection_triton.default
in_projection_backward = _operators.in_projection_triton_backward.default
out_projection_forward = _operators.out_projection_triton_forward.default
out_projection = _operators.out_projection_triton.default
out_projection_backward = _operators.out_projection_triton_backward.default


# The launchers are imported where they run: Triton may be absent.
def _run_in_projection(x, weights, biases, biased, heads, head_dim, tf32):
    from .in_forward import in_projection

    remaining = iter(biases)
    # Kernels read biases one number after the other.
    optional = [next(remaining).contiguous() if has_bias else None for has_bias in biased]
    return in_projection(x, weights, optional, heads, head_dim, tf32)


def _run_in_projection_backward(*arguments):
    from .in_backward import in_projection_backward

    return in_projection_backward(*arguments)


def _run_out_projection(heads, weight, bias, gate, kept, tf32):
    from .out_forward import out_projection

    return out_projection(heads, weight, None if bias is None else bias.contiguous(), gate, kept, tf32)


def _run_out_projection_backward(*arguments):
    from .out_backward import out_projection_backward

    return out_projection_backward(*arguments)


_DEVICES = ("cuda", "cpu")
torch.library.impl("sparse_heads::in_projection_triton_forward", _DEVICES, _run_in_projection)
torch.library.impl("sparse_heads::in_projection_triton", _DEVICES, _run_in_projection)
torch.library.impl("sparse_heads::in_projection_triton_backward", _DEVICES, _run_in_projection_backward)
torch.library.impl("sparse_heads::out_projection_triton_forward", _DEVICES, _run_out_projection)
torch.library.impl("sparse_heads::out_projection_triton", _DEVICES, _run_out_projection)
torch.library.impl("sparse_heads::out_projection_triton_backward", _DEVICES, _run_out_projection_backward)


@torch.library.register_fake("sparse_heads::in_projection_triton_forward")
@torch.library.register_fake("sparse_heads::in_projection_triton")
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    biased: Sequence[bool],
    heads: Sequence[Tensor],
    head_dim: int,
    tf32: bool,
) -> list[Tensor]:
    return [x.new_empty((*x.shape[:2], each.shape[-1], head_dim)) for each in heads]


@torch.library.register_fake("sparse_heads::in_projection_triton_backward")
def _(
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
    shapes = [x.shape] if wanted_x else []
    shapes += [weight.shape for weight, wanted in zip(weights, wanted_weights, strict=True) if wanted]
    shapes += [weight.shape[:1] for weight, wanted in zip(weights, wanted_biases, strict=True) if wanted]
    return [x.new_empty(shape) for shape in shapes]


@torch.library.register_fake("sparse_heads::out_projection_triton_forward")
@torch.library.register_fake("sparse_heads::out_projection_triton")
def _(heads: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, kept: Tensor, tf32: bool) -> Tensor:
    return heads.new_empty((*heads.shape[:2], weight.shape[0]))


@torch.library.register_fake("sparse_heads::out_projection_triton_backward")
def _(
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
    wanted = ((heads, wanted_heads), (weight, wanted_weight), (gate, wanted_gate))
    return [like.new_empty(like.shape) for like, needed in wanted if needed]


def _in_projection_context(ctx, inputs, output) -> None:
    x, weights, _, ctx.biased, heads, ctx.head_dim, ctx.tf32 = inputs
    ctx.count = len(weights)
    ctx.save_for_backward(x, *weights, *heads)


def _in_projection_backward(ctx, grads):
    x, *saved = ctx.saved_tensors
    weights, heads = saved[: ctx.count], saved[ctx.count :]
    need_x, need_weights, need_biases = ctx.needs_input_grad[:3]
    remaining = iter(need_biases)
    wanted_biases = [has_bias and next(remaining) for has_bias in ctx.biased]
    arguments = (list(grads), x, weights, heads, ctx.head_dim, ctx.tf32, need_x, list(need_weights), wanted_biases)
    computed = iter(in_projection_backward(*arguments))
    grad_x = next(computed) if need_x else None
    grad_weights = [next(computed) if needed else None for needed in need_weights]
    grad_biases = [next(computed) if needed else None for needed in need_biases]
    return grad_x, grad_weights, grad_biases, None, [None] * ctx.count, None, None


def _out_projection_context(ctx, inputs, output) -> None:
    heads, weight, _, gate, kept, ctx.tf32 = inputs
    ctx.save_for_backward(heads, weight, gate, kept)


def _out_projection_backward(ctx, grad):
    heads, weight, gate, kept = ctx.saved_tensors
    need_heads, need_weight, need_bias, need_gate = ctx.needs_input_grad[:4]
    computed = iter(
        out_projection_backward(grad, heads, weight, gate, kept, ctx.tf32, need_heads, need_weight, need_gate)
    )
    grad_heads = next(computed) if need_heads else None
    grad_weight = next(computed) if need_weight else None
    grad_gate = next(computed) if need_gate else None
    return grad_heads, grad_weight, grad.sum((0, 1)) if need_bias else None, grad_gate, None, None


def _no_second_derivative(ctx, *grads):
    raise UnsupportedError("backend: the 'triton' projections have no second derivative; use backend='reference'")


torch.library.register_autograd(
    "sparse_heads::in_projection_triton", _in_projection_backward, setup_context=_in_projection_context
)
torch.library.register_autograd(
    "sparse_heads::out_projection_triton", _out_projection_backward, setup_context=_out_projection_context
)
torch.library.register_autograd("sparse_heads::in_projection_triton_backward", _no_second_derivative)
torch.library.register_autograd("sparse_heads::out_projection_triton_backward", _no_second_derivative)

"""Schemas, fakes and autograd of the attention operators that run Triton kernels; importing this imports no Triton.

As `..operators`, with float32 for gate, sinks and their gradients and for that of attn_mask, but: `tf32` lets float32
products be TF32; and `attention_triton` also returns what its backward needs, the output before the gate (without a
gate the output itself is that, and the tensor is empty) and the logsumexp of the scores, float32 [B, H, T], sinks in
it, inf where a query sees no key and in masked heads. It is differentiable in its first output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....errors import UnsupportedError

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? head_mask, Tensor? kv_heads, Tensor? gate, Tensor? attn_mask,"
    " Tensor? sinks, int left, int right, float scale, float softcap, bool tf32"
)
# The tensors among them that gradients go to, and their places.
_DIFFERENTIABLE = {"query": 0, "key": 1, "value": 2, "gate": 5, "attn_mask": 6, "sinks": 7}
_TENSORS = 8

torch.library.define("sparse_heads::attention_triton_forward", f"({_INPUTS}) -> Tensor")
torch.library.define("sparse_heads::attention_triton", f"({_INPUTS}) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "sparse_heads::attention_triton_backward",
    f"(Tensor grad, {_INPUTS}, Tensor output_ungated, Tensor logsumexp, bool[] wanted) -> Tensor[]",
)

attention_triton_forward = torch.ops.sparse_heads.attention_triton_forward.default
attention_triton = torch.ops.sparse_heads.attention_triton.default
attention_triton_backward = torch.ops.sparse_heads.attention_triton_backward.default

# Tensors on the CPU are for Triton's interpreter.
_DEVICES = ("CUDA", "CPU")


@torch.library.impl("sparse_heads::attention_triton_forward", _DEVICES)
def _(*inputs):
    from .forward import attention_forward

    return attention_forward(*inputs, training=False)[0]


@torch.library.impl("sparse_heads::attention_triton", _DEVICES)
def _(query: Tensor, *inputs):
    from .forward import attention_forward

    output, ungated, logsumexp = attention_forward(query, *inputs, training=True)
    return output, query.new_empty(0) if ungated is None else ungated, logsumexp


@torch.library.impl("sparse_heads::attention_triton_backward", _DEVICES)
def _(*inputs):
    from .backward import attention_backward

    return attention_backward(*inputs)


def _empty_heads(like: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """[B, H, L, C], laid out as [B, L, H, C]."""
    batch, heads, length, columns = sizes
    return like.new_empty((batch, length, heads, columns)).transpose(1, 2)


@torch.library.register_fake("sparse_heads::attention_triton_forward")
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return _empty_heads(query, (*query.shape[:3], value.shape[3]))


@torch.library.register_fake("sparse_heads::attention_triton")
def _(query: Tensor, key: Tensor, value: Tensor, head_mask, kv_heads, gate, *_: object) -> tuple[Tensor, ...]:
    output, ungated = (_empty_heads(query, (*query.shape[:3], value.shape[3])) for _ in range(2))
    logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
    return output, query.new_empty(0) if gate is None else ungated, logsumexp


@torch.library.register_fake("sparse_heads::attention_triton_backward")
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest) -> list[Tensor]:
    gradients = [
        *(_empty_heads(tensor, tensor.shape) for tensor in (query, key, value)),
        query.new_empty(query.shape[:2], dtype=torch.float32),
        query.new_empty((*query.shape[:3], key.shape[2]), dtype=torch.float32),
        query.new_empty(query.shape[:2], dtype=torch.float32),
    ]
    return [gradient for gradient, wanted in zip(gradients, rest[-1], strict=True) if wanted]


def _context(ctx, inputs, output) -> None:
    tensors, ctx.numbers = inputs[:_TENSORS], inputs[_TENSORS:]
    attended, ungated, logsumexp = output
    ctx.save_for_backward(*tensors, attended if tensors[5] is None else ungated, logsumexp)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    *inputs, ungated, logsumexp = ctx.saved_tensors
    results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if grad is None:
        return tuple(results)
    wanted = [ctx.needs_input_grad[place] for place in _DIFFERENTIABLE.values()]
    gradients = iter(attention_triton_backward(grad, *inputs, *ctx.numbers, ungated, logsumexp, wanted))
    for (name, place), needed in zip(_DIFFERENTIABLE.items(), wanted, strict=True):
        if needed:
            gradient = next(gradients)
            # gate, sinks and attn_mask come with all dimensions that they were broadcast over.
            reduced = gradient if name in ("query", "key", "value") else gradient.sum_to_size(inputs[place].shape)
            results[place] = reduced.to(inputs[place].dtype)
    return tuple(results)


def _refuse_second_derivative(ctx, *grads):
    raise UnsupportedError(
        "backend: 'triton' has first derivatives only; use 'reference' for gradients of gradients (create_graph)"
    )


torch.library.register_autograd("sparse_heads::attention_triton", _backward, setup_context=_context)
torch.library.register_autograd("sparse_heads::attention_triton_backward", _refuse_second_derivative)

"""Schemas, fakes and autograd of the attention operators; the extension registers the CPU kernels.

`attention_forward` is the kernel alone, called where nothing needs a gradient: an operator with a registered backward
costs some microseconds more a call even then.

Shapes and dtypes as in `api.attention`, on checked arguments, but: gate and sinks have the dtype of the arithmetic
(float64 for float64 inputs, else float32); kv_heads int64 [H] names the key/value head of every query head, None =
h // (H / H_kv); left and right are `visible_span`; softcap 0 is none. The output is laid out as [B, T, H, Dv].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import UnsupportedError

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? head_mask, Tensor? kv_heads, Tensor? gate, Tensor? attn_mask,"
    " Tensor? sinks, int left, int right, float scale, float softcap"
)
# The tensors among them that gradients go to, and their places.
_DIFFERENTIABLE = {"query": 0, "key": 1, "value": 2, "gate": 5, "attn_mask": 6, "sinks": 7}

torch.library.define("sparse_heads::attention_forward", f"({_INPUTS}) -> Tensor")
torch.library.define("sparse_heads::attention", f"({_INPUTS}) -> Tensor")
torch.library.define("sparse_heads::attention_backward", f"(Tensor grad, {_INPUTS}, bool[] wanted) -> Tensor[]")

attention_forward = torch.ops.sparse_heads.attention_forward.default
attention = torch.ops.sparse_heads.attention.default
attention_backward = torch.ops.sparse_heads.attention_backward.default

torch.library.impl("sparse_heads::attention", "CPU")(lambda *inputs: attention_forward(*inputs))


def _empty_heads(like: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """[B, H, L, C], laid out as [B, L, H, C]."""
    batch, heads, length, columns = sizes
    return like.new_empty((batch, length, heads, columns)).transpose(1, 2)


@torch.library.register_fake("sparse_heads::attention_forward")
@torch.library.register_fake("sparse_heads::attention")
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return _empty_heads(query, (*query.shape[:3], value.shape[3]))


@torch.library.register_fake("sparse_heads::attention_backward")
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, head_mask, kv_heads, gate, attn_mask, *rest: object
) -> list[Tensor]:
    gradients = [
        *(_empty_heads(tensor, tensor.shape) for tensor in (query, key, value)),
        query.new_empty(query.shape[:2], dtype=torch.float64),
        query.new_empty((*query.shape[:3], key.shape[2]), dtype=torch.promote_types(query.dtype, torch.float32)),
        query.new_empty(query.shape[:2], dtype=torch.float64),
    ]
    return [gradient for gradient, wanted in zip(gradients, rest[-1], strict=True) if wanted]


def _context(ctx, inputs, output) -> None:
    query, key, value, head_mask, kv_heads, gate, attn_mask, sinks, *ctx.numbers = inputs
    ctx.save_for_backward(query, key, value, head_mask, kv_heads, gate, attn_mask, sinks)


def _backward(ctx, grad):
    inputs = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[place] for place in _DIFFERENTIABLE.values()]
    gradients = iter(attention_backward(grad, *inputs, *ctx.numbers, wanted))
    results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for (name, place), needed in zip(_DIFFERENTIABLE.items(), wanted, strict=True):
        if needed:
            gradient = next(gradients)
            # gate, sinks and attn_mask come with all dimensions that they were broadcast over.
            reduced = gradient if name in ("query", "key", "value") else gradient.sum_to_size(inputs[place].shape)
            results[place] = reduced.to(inputs[place].dtype)
    return tuple(results)


def _refuse_second_derivative(ctx, *grads):
    raise UnsupportedError(
        "backend: 'cpu' has first derivatives only; use 'reference' for gradients of gradients (create_graph)"
    )


torch.library.register_autograd("sparse_heads::attention", _backward, setup_context=_context)
torch.library.register_autograd("sparse_heads::attention_backward", _refuse_second_derivative)

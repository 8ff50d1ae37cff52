"""Are the operators registered as `torch.library` wants: schema, fake, autograd, and compiled with dynamic shapes?"""

from __future__ import annotations

import pytest
import torch
from projection_inputs import MASKS, PER_REQUEST, draw, draw_weights

from sparse_heads import _native
from sparse_heads.ops.projection import operators, operators_per_request

KEPT = [MASKS[name].nonzero()[:, 0] for name in ("scattered", "none", "all")]


@pytest.fixture(autouse=True)
def extension():
    _native.load()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_backward", [False, True])
@pytest.mark.parametrize("tokens", [2, 11])
def test_in_projection(tokens, with_backward, dtype):
    x, weights = draw(3, tokens, 10, dtype=dtype), draw_weights([(24, 10)] * 3, dtype)
    biases = [draw(24, seed=i, dtype=dtype) for i in range(3)]
    if with_backward:
        for tensor in (x, *weights, *biases):
            tensor.requires_grad_()
        torch.library.opcheck(operators.in_projection, (x, list(weights), biases, KEPT, 4))
    else:
        biases[1] = None
        torch.library.opcheck(operators.in_projection_forward, (x, list(weights), biases, KEPT, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_backward", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_out_projection(with_bias, wide, with_backward, dtype):
    kept = KEPT[0]
    heads = draw(3, 5, (6 if wide else len(kept)) * 4, dtype=dtype)
    (weight,) = draw_weights([(10, 24)], dtype)
    bias = draw(10, seed=1, dtype=dtype) if with_bias else None
    operator = operators.out_projection if with_backward else operators.out_projection_forward
    if with_backward:
        for tensor in (heads, weight, bias):
            if tensor is not None:
                tensor.requires_grad_()
    torch.library.opcheck(operator, (heads, weight, bias, kept, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_backward", [False, True])
@pytest.mark.parametrize("tokens", [2, 11])
def test_in_projection_per_request(tokens, with_backward, dtype):
    x, weights = draw(4, tokens, 10, dtype=dtype), draw_weights([(24, 10)] * 3, dtype)
    biases = [draw(24, seed=i, dtype=dtype) for i in range(3)]
    masks = [PER_REQUEST, PER_REQUEST.flip(0), torch.zeros_like(PER_REQUEST)]
    operator = operators_per_request.in_projection_forward
    if with_backward:
        operator = operators_per_request.in_projection
        for tensor in (x, *weights, *biases):
            tensor.requires_grad_()
    else:
        biases[1] = None
    torch.library.opcheck(operator, (x, list(weights), biases, masks, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_backward", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_out_projection_per_request(with_bias, with_backward, dtype):
    heads, (weight,) = draw(4, 5, 24, dtype=dtype), draw_weights([(10, 24)], dtype)
    bias = draw(10, seed=1, dtype=dtype) if with_bias else None
    operator = operators_per_request.out_projection_forward
    if with_backward:
        operator = operators_per_request.out_projection
        for tensor in (heads, weight, bias):
            if tensor is not None:
                tensor.requires_grad_()
    torch.library.opcheck(operator, (heads, weight, bias, PER_REQUEST, 4))


@pytest.mark.parametrize("needs", [(True, [1, 0], [0, 1]), (False, [0, 1], [0, 0])], ids=str)
def test_backwards_per_request(needs):
    x, weights = draw(4, 5, 10), list(draw_weights([(24, 10)] * 2))
    grads = [draw(4, 5, 24, seed=i) for i in range(2)]
    arguments = (grads, x, weights, [PER_REQUEST] * 2, 4, *needs)
    torch.library.opcheck(operators_per_request.in_projection_backward, arguments)
    heads, (weight,) = draw(4, 5, 24), draw_weights([(10, 24)])
    arguments = (draw(4, 5, 10), heads, weight, PER_REQUEST, 4, needs[0], True)
    torch.library.opcheck(operators_per_request.out_projection_backward, arguments)

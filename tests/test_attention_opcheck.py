"""Are the attention operators registered as `torch.library` wants: schema, fake, autograd, and compiled?"""

from __future__ import annotations

import pytest
import torch

from sparse_heads import _native
from sparse_heads.ops.attention import attention, operators
from sparse_heads.testing import random_attention_inputs

HEAD_MASK = torch.tensor([[True, False, True, True], [False, False, False, True]])
OPTIONS = {
    "plain": [None] * 5,
    "everything": [
        HEAD_MASK,
        torch.tensor([0, 0, 0, 1]),
        torch.tensor([[0.5, 1.0, 0.0, 2.0]] * 2),
        torch.ones(2, 1, 1, 6),
        torch.tensor([0.0, 1.0, 2.0, -1.0]),
    ],
}


@pytest.fixture(autouse=True)
def extension():
    _native.load()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("operator", ["attention", "attention_forward", "attention_backward"])
def test_operators(operator, case, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    inputs = [tensor.detach() for tensor in random_attention_inputs(2, 4, 2, 5, 6, 8, 3, dtype=dtype)]
    options = [
        option.detach().to(wide) if isinstance(option, torch.Tensor) and option.is_floating_point() else option
        for option in OPTIONS[case]
    ]
    numbers = [-1, 0, 0.5, 3.0]
    if operator == "attention_backward":
        grad = torch.ones(2, 4, 5, 3, dtype=dtype)
        wanted = [True, True, True, *([option is not None for option in options[2:]])]
        torch.library.opcheck(operators.attention_backward, (grad, *inputs, *options, *numbers, wanted))
        return
    if operator == "attention":
        for tensor in (*inputs, *options):
            if tensor is not None and tensor.is_floating_point():
                tensor.requires_grad_()
    torch.library.opcheck(getattr(operators, operator), (*inputs, *options, *numbers))


def test_compiled_attention_is_the_operator():
    inputs = random_attention_inputs(2, 4, 2, 5, 6, 8)

    def run(query, key, value, head_mask):
        return attention(query * 2, key, value, head_mask, is_causal=True, softcap=4.0).square()

    expected = run(*inputs, HEAD_MASK)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs, HEAD_MASK)
    assert torch.equal(compiled, expected)
    gradients = [torch.autograd.grad(output.sum(), inputs) for output in (compiled, expected)]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))

"""Are the forward operators of the Triton attention registered as `torch.library` wants, and compiled?"""

from __future__ import annotations

import pytest
import torch
from triton_inputs import DEVICE, attend_triton, converted, draw, draw_inputs

from sparse_heads.ops.attention.triton import operators

OPTIONS = {
    "plain": [None] * 5,
    "everything": [
        torch.tensor([[True, False, True, True], [False, False, False, True]]),
        torch.tensor([0, 0, 0, 1]),
        torch.tensor([[0.5, 1.0, 0.0, 2.0]] * 2),
        torch.ones(2, 1, 1, 6),
        torch.tensor([0.0, 1.0, 2.0, -1.0]),
    ],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("operator", ["attention_triton", "attention_triton_forward"])
def test_operators(operator, case, dtype):
    options = [None if option is None else option.detach().to(DEVICE) for option in OPTIONS[case]]
    inputs = [*converted(draw_inputs(2, 4, 2, 5, 6, 8, 3), dtype).values(), *options]
    if operator == "attention_triton":
        for tensor in inputs:
            if tensor is not None and tensor.is_floating_point():
                tensor.requires_grad_()
    torch.library.opcheck(getattr(operators, operator), (*inputs, -1, 0, 0.5, 3.0, False))


def test_compiled_attention_is_the_operator():
    inputs = [tensor.requires_grad_() for tensor in converted(draw_inputs(2, 4, 2, 5, 6, 8), torch.float32).values()]
    head_mask = OPTIONS["everything"][0].to(DEVICE)

    def run(query, key, value, head_mask):
        output = attend_triton(query=query * 2, key=key, value=value, head_mask=head_mask, span=(-1, 0))
        return output.square()

    expected = run(*inputs, head_mask)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs, head_mask)
    assert torch.equal(compiled, expected)
    gradients = [torch.autograd.grad(output.sum(), inputs) for output in (compiled, expected)]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_the_differentiable_operator_is_called_only_where_a_gradient_is_wanted():
    inputs = converted(draw_inputs(1, 2, 1, 3, 5, 8), torch.float32)
    gate = draw(2).float().requires_grad_()
    assert attend_triton(**inputs, gate=gate).requires_grad
    assert not attend_triton(**inputs, gate=gate.detach()).requires_grad
    with torch.no_grad():
        assert torch.equal(attend_triton(**inputs, gate=gate), attend_triton(**inputs, gate=gate.detach()))

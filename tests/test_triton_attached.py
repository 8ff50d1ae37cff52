"""Do attached models give the same through the Triton kernels, and do the operators compile whole, once?"""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from models import build, gradients, inputs, loss, output
from triton_inputs import DEVICE

import sparse_heads as sh
from sparse_heads.ops.attention.triton import operators as attention_operators
from sparse_heads.ops.projection.triton import operators as projection_operators

SHARED = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]]).bool()
SPLIT = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 1]]).bool()  # groups of two
PER_REQUEST = torch.stack([SHARED, SPLIT, torch.zeros_like(SHARED)])


def results(name: str, subset: torch.Tensor, backend: str, layout: str, dtype: torch.dtype) -> list[torch.Tensor]:
    model = build(name, dtype=dtype).to(DEVICE)
    handle = sh.attach(model, backend=backend, layout=layout)
    handle.set_heads(subset)
    batch = {key: value.to(DEVICE) for key, value in inputs(model).items()}
    found = output(model, batch)
    loss(found).backward()
    return [found.detach(), *(gradient for gradient in gradients(model).values() if gradient is not None)]


@pytest.mark.parametrize(("name", "layout"), [("bert", "auto"), ("gqa", "wide"), ("gqa", "core")])
@pytest.mark.parametrize("subset", [SHARED, SPLIT, PER_REQUEST], ids=["shared", "split groups", "per request"])
def test_outputs_and_gradients_are_the_references(name, layout, subset):
    runs = (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64))
    found = [results(name, subset, backend, layout, dtype) for backend, dtype in runs]
    assert len(found[0]) == len(found[2]) > 3
    for actual, eager, exact in zip(*found, strict=True):
        # Through whole models the largest of a few hundred errors is chance; their mean square is not.
        error, eager_error = ((each.double() - exact).norm() for each in (actual, eager))
        if exact.norm() <= eager_error:  # of key biases, which softmax does not see: all of it is rounding
            continue
        assert error <= 2 * eager_error + torch.finfo(torch.float32).eps * exact.norm()


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The Triton operators that were called."""
    names = []
    for operators in (attention_operators, projection_operators):
        for name in ("attention_triton_forward", "in_projection_forward", "out_projection_forward"):
            if hasattr(operators, name):
                original = getattr(operators, name)
                monkeypatch.setattr(
                    operators, name, lambda *args, _run=original, _name=name: (names.append(_name), _run(*args))[1]
                )
    return names


@pytest.mark.parametrize("subset", [SHARED, PER_REQUEST], ids=["shared", "per request"])
def test_tokens_are_the_references_and_the_kernels_made_them(subset, ran):
    tokens = {}
    for backend in ("reference", "triton"):
        model = build("gqa").to(DEVICE)
        handle = sh.attach(model, backend=backend)
        batch = {key: value.to(DEVICE) for key, value in inputs(model, rows=3, length=4).items() if key != "labels"}
        with handle.use_heads(subset):
            tokens[backend] = model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert bool(ran) == (backend == "triton")
    assert torch.equal(tokens["triton"], tokens["reference"])
    assert {"in_projection_forward", "out_projection_forward"} <= set(ran)
    assert "attention_triton_forward" in ran or subset.dim() == 2


def test_one_compilation_serves_every_mask():
    torch._dynamo.reset()
    compiler = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    generator = torch.Generator().manual_seed(0)
    x, wq, wo = (torch.randn(*sizes, generator=generator).to(DEVICE) for sizes in ((2, 5, 24), (64, 24), (24, 64)))
    wk, wv = (torch.randn(32, 24, generator=generator).to(DEVICE) for _ in range(2))

    def layer(x, head_mask, gate):
        q, k, v = sh.in_projection(x, (wq, wk, wv), None, head_mask, head_dim=16, backend="triton")
        attended = sh.attention(q, k, v, head_mask, is_causal=True, backend="triton")
        return sh.out_projection(attended, wo, None, head_mask, gate=gate, backend="triton")

    compiled = torch.compile(layer, backend=compiler, fullgraph=True)
    for number in range(4):
        head_mask = (torch.rand(2, 4, generator=generator) < number / 3).to(DEVICE)
        gate = torch.rand(2, 4, generator=generator).to(DEVICE).requires_grad_()
        leaf = x.clone().requires_grad_()
        outputs = [run(leaf, head_mask, gate) for run in (compiled, layer)]
        assert torch.equal(*outputs)
        taken = [torch.autograd.grad(each.square().sum(), (leaf, gate)) for each in outputs]
        assert all(torch.equal(*pair) for pair in zip(*taken, strict=True))
    assert compiler.frame_count == 1


def test_checkpointed_layers_recompute_through_the_kernels():
    model = build("bert").to(DEVICE).train()
    handle = sh.attach(model, backend="triton")
    batch = {key: value.to(DEVICE) for key, value in inputs(model, rows=3).items()}
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with handle.use_heads(PER_REQUEST):
            result = loss(output(model, batch))
        result.backward()
        found.append({name: gradient.clone() for name, gradient in gradients(model).items() if gradient is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 3
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())

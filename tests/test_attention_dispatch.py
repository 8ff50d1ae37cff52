"""Does attention run where it says it runs, and say so where it cannot?"""

from __future__ import annotations

import warnings

import pytest
import torch

from sparse_heads import _native, errors
from sparse_heads.ops.attention import api, attention
from sparse_heads.testing import random_attention_inputs

PER_REQUEST = torch.tensor([[True, False]])
NEEDS_A_KERNEL = {
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.zeros(2)},
    "per request": {"head_mask": PER_REQUEST},
}
COVERED_BY_SDPA = {
    "plain": {},
    "causal window": {"is_causal": True, "window": 2},
    "shared mask": {"head_mask": PER_REQUEST[0], "gate": torch.ones(1, 2)},
}


def inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [tensor.detach() for tensor in random_attention_inputs(1, 2, 2, 3, 3, 4, dtype=dtype)]


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """The implementations that were called."""
    names = []
    for name in ("reference", "sdpa", "cpu"):
        monkeypatch.setattr(api, f"attention_{name}", lambda *args, _name=name, **options: names.append(_name))
    return names


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(_native, "_outcome", _native._Outcome(None, "no C++ compiler: tried nothing"))
    monkeypatch.setattr(errors, "_warned", set())


@pytest.mark.parametrize("capability", ["AVX512", "AVX512_VNNI", "AVX2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", [*NEEDS_A_KERNEL, *COVERED_BY_SDPA])
def test_auto_on_a_cpu(case, dtype, capability, taken, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    attention(*inputs(dtype), **{**NEEDS_A_KERNEL, **COVERED_BY_SDPA}[case])
    slower = dtype == torch.float64 or capability == "AVX2"
    assert taken == ["sdpa" if slower and case in COVERED_BY_SDPA else "cpu"]


@pytest.mark.parametrize("case", [*NEEDS_A_KERNEL, *COVERED_BY_SDPA])
def test_auto_elsewhere(case, taken):
    options = {**NEEDS_A_KERNEL, **COVERED_BY_SDPA}[case]
    options = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    attention(*(tensor.to("meta") for tensor in inputs()), **options)
    assert taken == ["sdpa" if case in COVERED_BY_SDPA else "reference"]


def test_auto_without_the_extension_runs_the_reference_with_one_warning(no_extension, taken):
    with pytest.warns(errors.SparseHeadsWarning, match="attention runs the reference: .*no C\\+\\+ compiler") as caught:
        for options in (NEEDS_A_KERNEL["softcap"], NEEDS_A_KERNEL["per request"], {}):
            attention(*inputs(), **options)
    assert taken == ["reference", "reference", "sdpa"] and len(caught) == 1
    assert caught[0].filename == __file__


def test_what_sdpa_covers_needs_no_warning(no_extension):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(*inputs(), is_causal=True)


def test_a_named_backend_says_why_it_is_not_there(no_extension):
    message = 'backend: "cpu" needs the C\\+\\+ extension, .*: no C\\+\\+ compiler: tried nothing'
    with pytest.raises(errors.BackendUnavailableError, match=message):
        attention(*inputs(), backend="cpu")


def test_the_kernel_wants_cpu_tensors():
    with pytest.raises(errors.BackendUnavailableError, match="backend: 'cpu' needs tensors on the CPU, got meta"):
        attention(*(tensor.to("meta") for tensor in inputs()), backend="cpu")


def test_transforms_take_the_reference():
    query, key, value = inputs(torch.float64)

    def run(query, backend="auto"):
        return attention(query, key, value, PER_REQUEST, softcap=1.0, backend=backend)

    tangent = torch.ones_like(query)
    for derivative in (lambda run: torch.func.jvp(run, (query,), (tangent,))[1], forward_mode_derivative(query)):
        expected = derivative(lambda query: run(query, "reference"))
        assert (derivative(run) == expected).all() and (expected != 0).any()
        with pytest.raises(errors.UnsupportedError, match="backend: 'cpu' runs neither inside torch.func transforms"):
            derivative(lambda query: run(query, "cpu"))


def forward_mode_derivative(query):
    def derivative(run):
        with torch.autograd.forward_ad.dual_level():
            output = run(torch.autograd.forward_ad.make_dual(query, torch.ones_like(query)))
            return torch.autograd.forward_ad.unpack_dual(output).tangent

    return derivative


def test_second_derivatives_are_refused_not_zero():
    query, key, value = (tensor.requires_grad_() for tensor in inputs(torch.float64))
    output = attention(query, key, value, backend="cpu")
    (gradient,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(errors.UnsupportedError, match="first derivatives only; use 'reference'"):
        gradient.sum().backward()

"""Do the Triton kernels run where they are asked for, and where `auto` promises them? Without a device: by fakes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from triton_inputs import DEVICE

import sparse_heads as sh
from sparse_heads import _triton, errors
from sparse_heads.ops.attention import api as attention_api
from sparse_heads.ops.projection import api as projection_api

PER_REQUEST = {"head_mask": [[True, False, True, True], [False, False, False, True]]}
SHARED = {"head_mask": [True, False, True, True]}
BEYOND_SDPA = {"softcap": {"softcap": 2.0}, "sinks": {"sinks": [0.0, 1.0, 2.0, 3.0]}, "per request": PER_REQUEST}
COVERED_BY_SDPA = {"plain": {}, "shared mask": SHARED, "causal": {"is_causal": True}}


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA device that computes nothing: shapes and dtypes only, and an error for every look at a value."""
    monkeypatch.setattr(_triton, "why_not_on", lambda device: None if device.type == "cuda" else "no device")
    with FakeTensorMode():
        yield monkeypatch


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """The implementations of attention that were called."""
    names: list[str] = []
    for name in ("reference", "sdpa", "cpu", "triton"):
        monkeypatch.setattr(attention_api, f"attention_{name}", lambda *_, _name=name, **__: names.append(_name))
    return names


def placed(options: dict, device: str) -> dict:
    return {
        name: torch.tensor(value, device=device) if isinstance(value, list) else value
        for name, value in options.items()
    }


def inputs(device: str, dtype: torch.dtype = torch.bfloat16, head_dim: int = 16) -> list[torch.Tensor]:
    return [torch.empty(2, heads, 5, head_dim, dtype=dtype, device=device) for heads in (4, 2, 2)]


@pytest.mark.parametrize("case", [*BEYOND_SDPA, *COVERED_BY_SDPA])
def test_auto_on_a_gpu(case, gpu, taken):
    sh.attention(*inputs("cuda"), **placed({**BEYOND_SDPA, **COVERED_BY_SDPA}[case], "cuda"))
    assert taken == ["triton" if case in BEYOND_SDPA else "sdpa"]


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float64, 16), (torch.bfloat16, 320)], ids=str)
def test_auto_leaves_what_the_kernels_do_not_take_to_the_reference(dtype, head_dim, gpu, taken):
    sh.attention(*inputs("cuda", dtype, head_dim), softcap=2.0)
    assert taken == ["reference"]


def test_auto_on_a_gpu_without_triton_warns_once(gpu, taken):
    gpu.setattr(_triton, "why_not_on", lambda device: "the package triton is not installed")
    gpu.setattr(errors, "_warned", set())
    with pytest.warns(
        errors.SparseHeadsWarning, match="attention runs the reference: Triton is not available: the pa"
    ) as caught:
        for _ in range(2):
            sh.attention(*inputs("cuda"), softcap=2.0)
    assert taken == ["reference"] * 2 and len(caught) == 1 and caught[0].filename == __file__


def test_a_call_on_a_gpu_looks_at_no_value(gpu):
    """A look at a fake tensor's values raises, as it would wait for the device."""
    mask = torch.ones(2, 4, dtype=torch.bool, device="cuda")
    gate = torch.ones(2, 4, device="cuda")
    x, *weights = (
        torch.empty(*sizes, 24, dtype=torch.bfloat16, device="cuda") for sizes in ((2, 5), (64,), (32,), (32,))
    )
    q, k, v = sh.in_projection(x, tuple(weights), None, mask, head_dim=16)
    attended = sh.attention(q, k, v, mask, gate=gate, is_causal=True)
    out = sh.out_projection(attended, torch.empty(24, 64, dtype=torch.bfloat16, device="cuda"), None, mask, gate=gate)
    assert attended.shape == q.shape == (2, 4, 5, 16) and out.shape == (2, 5, 24)


@pytest.mark.parametrize("look", [torch.Tensor.nonzero, torch.Tensor.tolist, lambda mask: bool(mask.any())])
def test_the_fake_device_raises_at_a_look(look, gpu):
    with pytest.raises((RuntimeError, DataDependentOutputException)):
        look(torch.ones(4, dtype=torch.bool, device="cuda"))


@pytest.mark.parametrize(
    ("per_request", "dtype"), [(True, torch.bfloat16), (False, torch.bfloat16), (True, torch.float64)]
)
def test_projections_on_a_gpu(per_request, dtype, gpu):
    chosen = projection_api.choose("auto", torch.empty(2, 5, 24, dtype=dtype, device="cuda"), per_request)
    triton = per_request and dtype == torch.bfloat16
    assert chosen is (projection_api.triton if triton else projection_api.reference)


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def test_cpu_tensors_need_the_interpreter(no_interpreter):
    message = "backend: 'triton' is not available: Triton kernels need tensors on a CUDA device, got cpu"
    with pytest.raises(errors.BackendUnavailableError, match=message):
        sh.attention(*inputs("cpu"), backend="triton")
    with pytest.raises(errors.BackendUnavailableError, match=message):
        sh.in_projection(torch.ones(1, 2, 3), torch.ones(4, 3), head_dim=2, backend="triton")


REFUSED = {
    "dtype": (
        (torch.float64, 16),
        "query: wanted float16, bfloat16 or float32 with backend 'triton', got torch.float64",
    ),
    "head dimension": ((torch.float32, 257), "query: wanted a head dimension of at most 256 .* got 257"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernels_do_not_take(case):
    (dtype, head_dim), message = REFUSED[case]
    with pytest.raises(errors.UnsupportedError, match=message):
        sh.attention(*inputs(DEVICE, dtype, head_dim), backend="triton")


def test_transforms_and_forward_mode_are_refused():
    query, key, value = inputs(DEVICE, torch.float32)
    with pytest.raises(
        errors.UnsupportedError, match="backend: 'triton' runs neither inside torch.func transforms nor"
    ):
        torch.func.vmap(lambda q: sh.attention(q, key, value, backend="triton"))(query[None])
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(errors.UnsupportedError, match="backend: 'triton' runs neither"),
    ):
        sh.in_projection(
            torch.ones(1, 2, 3, device=DEVICE), torch.ones(4, 3, device=DEVICE), head_dim=2, backend="triton"
        )

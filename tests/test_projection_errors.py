"""Does every wrong argument of the projections raise, naming the argument, what was wanted and what came?"""

from __future__ import annotations

import re
import warnings

import pytest
import torch

import sparse_heads as sh
from sparse_heads import _native, errors
from sparse_heads.errors import (
    BackendUnavailableError,
    InvalidArgumentError,
    InvalidTypeError,
    SparseHeadsWarning,
    UnsupportedError,
)

X, WEIGHT, BIAS = torch.ones(2, 3, 5), torch.ones(8, 5), torch.ones(8)
HEADS, OUT_WEIGHT, OUT_BIAS = torch.ones(2, 4, 3, 2), torch.ones(5, 8), torch.ones(5)
MASK, GATE = torch.tensor([True, False, True, True]), torch.ones(4)
IN = {"x": X, "weight": WEIGHT, "bias": BIAS, "head_mask": MASK, "head_dim": 2}
OUT = {"heads": HEADS, "weight": OUT_WEIGHT, "bias": OUT_BIAS, "head_mask": MASK, "gate": GATE}
META = torch.device("meta")

IN_MASK = "head_mask: wanted None or a bool tensor [4] or [2, 4] (heads, or requests and heads) on cpu"
IN_WEIGHT = "weight: wanted [heads*head_dim, 5] with head_dim 2, torch.float32, on cpu"
OUT_WEIGHT_WANTED = "weight: wanted [E, heads*head_dim] with head_dim 2, torch.float32, on cpu"
GATE_WANTED = "gate: wanted None or a floating-point tensor [4] or [2, 4] on cpu"
BIAS_WANTED = "bias: wanted None or [8], torch.float32, on cpu"

IN_CASES = [
    ({"x": [1.0]}, InvalidTypeError, "x: wanted a floating-point tensor [B, T, E], got list [1.0]"),
    ({"x": X.long()}, InvalidTypeError, "x: wanted a floating-point tensor [B, T, E], got a int64 tensor [2, 3, 5]"),
    ({"x": X[0]}, InvalidArgumentError, "x: wanted [B, T, E], got a float32 tensor [3, 5] on cpu"),
    ({"head_dim": 2.0}, InvalidTypeError, "head_dim: wanted a positive int, got float 2.0"),
    ({"head_dim": True}, InvalidTypeError, "head_dim: wanted a positive int, got bool True"),
    ({"head_dim": 0}, InvalidArgumentError, "head_dim: wanted a positive int, got int 0"),
    ({"weight": None}, InvalidTypeError, "weight: wanted a tensor [heads*head_dim, 5] with head_dim 2, "),
    ({"weight": WEIGHT.double()}, InvalidTypeError, f"{IN_WEIGHT}, got a float64 tensor [8, 5]"),
    ({"weight": WEIGHT[0]}, InvalidArgumentError, f"{IN_WEIGHT}, got a float32 tensor [5]"),
    ({"weight": WEIGHT[:7]}, InvalidArgumentError, f"{IN_WEIGHT}, got a float32 tensor [7, 5]"),
    ({"weight": WEIGHT[:0]}, InvalidArgumentError, f"{IN_WEIGHT}, got a float32 tensor [0, 5]"),
    ({"weight": WEIGHT[:, :4]}, InvalidArgumentError, f"{IN_WEIGHT}, got a float32 tensor [8, 4]"),
    ({"x": X[..., :0]}, InvalidArgumentError, "weight: wanted [heads*head_dim, 0] with head_dim 2, "),
    ({"weight": WEIGHT.to(META)}, InvalidArgumentError, f"{IN_WEIGHT}, got a float32 tensor [8, 5] on meta"),
    ({"weight": ()}, InvalidArgumentError, "weight: wanted at least one tensors, got 0"),
    (
        {"weight": (WEIGHT, WEIGHT[:6]), "bias": None},
        InvalidArgumentError,
        "weight: wanted head counts that divide the largest, 4, got [4, 3] heads",
    ),
    ({"bias": 1.0}, InvalidTypeError, f"{BIAS_WANTED}, got float 1.0"),
    ({"bias": BIAS.double()}, InvalidTypeError, f"{BIAS_WANTED}, got a float64 tensor [8]"),
    ({"bias": BIAS[:6]}, InvalidArgumentError, f"{BIAS_WANTED}, got a float32 tensor [6]"),
    ({"bias": BIAS.to(META)}, InvalidArgumentError, f"{BIAS_WANTED}, got a float32 tensor [8] on meta"),
    (
        {"weight": (WEIGHT, WEIGHT)},
        InvalidArgumentError,
        "bias: wanted None or 2 biases, one a weight, got a float32 tensor [8]",
    ),
    ({"weight": (WEIGHT, WEIGHT), "bias": (BIAS,)}, InvalidArgumentError, "bias: wanted 2 tensors, got 1"),
    ({"head_mask": [True] * 4}, InvalidTypeError, f"{IN_MASK}, got list [True, True, True, True]"),
    ({"head_mask": MASK.float()}, InvalidTypeError, f"{IN_MASK}, got a float32 tensor [4]"),
    ({"head_mask": MASK[:3]}, InvalidArgumentError, f"{IN_MASK}, got a bool tensor [3]"),
    ({"head_mask": MASK.expand(3, 4)}, InvalidArgumentError, f"{IN_MASK}, got a bool tensor [3, 4]"),
    ({"head_mask": MASK.expand(1, 4)}, InvalidArgumentError, f"{IN_MASK}, got a bool tensor [1, 4]"),
    ({"head_mask": MASK.to(META)}, InvalidArgumentError, f"{IN_MASK}, got a bool tensor [4] on meta"),
    (
        {"head_mask": MASK.expand(2, 3, 4)},
        InvalidArgumentError,
        f"{IN_MASK}; masks per token are not supported, got a bool tensor [2, 3, 4]",
    ),
    (
        {"backend": "fast"},
        InvalidArgumentError,
        "backend: wanted one of ('auto', 'reference', 'cpu', 'triton'), got fast",
    ),
]
OUT_CASES = [
    (
        {"heads": None},
        InvalidTypeError,
        "heads: wanted a floating-point tensor [B, kept or H, T, D], got NoneType",
    ),
    (
        {"heads": HEADS.int()},
        InvalidTypeError,
        "heads: wanted a floating-point tensor [B, kept or H, T, D], got a",
    ),
    ({"heads": HEADS[0]}, InvalidArgumentError, "heads: wanted [B, kept or H, T, D], got a float32 tensor [4, 3, 2]"),
    ({"heads": HEADS[..., :0]}, InvalidArgumentError, "heads: wanted [B, kept or H, T, D] with D of at least 1, got"),
    (
        {"heads": HEADS[:, :2]},
        InvalidArgumentError,
        "heads: wanted 4 heads, or the 3 kept ones, got a float32",
    ),
    (
        {"heads": HEADS[:, :3], "head_mask": MASK.expand(2, 4)},
        InvalidArgumentError,
        "heads: wanted 4 heads, got a float32 tensor [2, 3, 3, 2]",
    ),
    (
        {"weight": "w"},
        InvalidTypeError,
        "weight: wanted a tensor [E, heads*head_dim] with head_dim 2, torch.float32",
    ),
    ({"weight": OUT_WEIGHT.half()}, InvalidTypeError, f"{OUT_WEIGHT_WANTED}, got a float16 tensor [5, 8]"),
    ({"weight": OUT_WEIGHT[:, :7]}, InvalidArgumentError, f"{OUT_WEIGHT_WANTED}, got a float32 tensor [5, 7]"),
    ({"weight": OUT_WEIGHT[:, :0]}, InvalidArgumentError, f"{OUT_WEIGHT_WANTED}, got a float32 tensor [5, 0]"),
    ({"weight": OUT_WEIGHT[0]}, InvalidArgumentError, f"{OUT_WEIGHT_WANTED}, got a float32 tensor [8]"),
    ({"bias": OUT_BIAS[:4]}, InvalidArgumentError, "bias: wanted None or [5], torch.float32, on cpu, got a float32"),
    ({"bias": OUT_BIAS.half()}, InvalidTypeError, "bias: wanted None or [5], torch.float32, on cpu, got a float16"),
    ({"head_mask": MASK[:2]}, InvalidArgumentError, f"{IN_MASK}, got a bool tensor [2]"),
    ({"head_mask": MASK.byte()}, InvalidTypeError, f"{IN_MASK}, got a uint8 tensor [4]"),
    ({"gate": 1.0}, InvalidTypeError, f"{GATE_WANTED}, got float 1.0"),
    ({"gate": MASK}, InvalidTypeError, f"{GATE_WANTED}, got a bool tensor [4]"),
    ({"gate": GATE[:3]}, InvalidArgumentError, f"{GATE_WANTED}, got a float32 tensor [3]"),
    ({"gate": GATE.expand(3, 4)}, InvalidArgumentError, f"{GATE_WANTED}, got a float32 tensor [3, 4]"),
    ({"gate": GATE.to(META)}, InvalidArgumentError, f"{GATE_WANTED}, got a float32 tensor [4] on meta"),
    (
        {"gate": GATE * torch.nan},
        InvalidArgumentError,
        "gate: wanted finite values, got NaN or infinity in a float32 tensor [4] on cpu",
    ),
    (
        {"gate": GATE * torch.inf},
        InvalidArgumentError,
        "gate: wanted finite values, got NaN or infinity in a float32 tensor [4] on cpu",
    ),
    (
        {"gate": torch.tensor([1.0, torch.nan, 1.0, 1.0])},
        InvalidArgumentError,
        "gate: wanted finite values, got NaN or infinity in a float32 tensor [4]",
    ),
    (
        {"backend": None},
        InvalidArgumentError,
        "backend: wanted one of ('auto', 'reference', 'cpu', 'triton'), got NoneType None",
    ),
]


def ids(cases):
    return [f"{number}-{next(iter(changes))}" for number, (changes, _, _) in enumerate(cases)]


@pytest.mark.parametrize(("changes", "error", "message"), IN_CASES, ids=ids(IN_CASES))
def test_in_projection(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        sh.in_projection(**IN | changes)


@pytest.mark.parametrize(("changes", "error", "message"), OUT_CASES, ids=ids(OUT_CASES))
def test_out_projection(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        sh.out_projection(**OUT | changes)


def test_the_arguments_that_the_cases_change_are_right():
    assert sh.in_projection(**IN).shape == (2, 3, 3, 2)
    assert sh.out_projection(**OUT).shape == (2, 3, 5)


@pytest.fixture
def calls():
    return [lambda **options: sh.in_projection(**IN | options), lambda **options: sh.out_projection(**OUT | options)]


def test_backends_that_are_not_built(calls):
    for call in calls:
        with pytest.raises(BackendUnavailableError, match="backend: projections have no 'cuda' kernels yet; use"):
            call(backend="cuda")


def test_the_cpu_kernels_run_outside_autocast_and_transforms(calls):
    for call in calls:
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(UnsupportedError, match="backend: 'cpu' does not run under autocast; use 'auto'"),
        ):
            call(backend="cpu")
        with pytest.raises(
            UnsupportedError,
            match=r"backend: 'cpu' runs neither inside torch.func transforms nor in forward mode; use 'auto'",
        ):
            torch.func.vmap(lambda _, call=call: call(backend="cpu"))(torch.ones(2))


def test_the_cpu_kernels_take_tensors_on_the_cpu():
    on_meta = {name: value.to(META) if isinstance(value, torch.Tensor) else value for name, value in IN.items()}
    with pytest.raises(BackendUnavailableError, match="backend: 'cpu' needs tensors on the CPU, got meta"):
        sh.in_projection(**on_meta, backend="cpu")


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(_native, "_outcome", _native._Outcome(None, "no C++ compiler: tried nothing"))
    monkeypatch.setattr(errors, "_warned", set())


def test_without_the_extension_cpu_raises_with_the_reason(no_extension, calls):
    for call in calls:
        with pytest.raises(BackendUnavailableError, match=r"'cpu' is not available: no C\+\+ compiler: tried nothing"):
            call(backend="cpu")


def test_without_the_extension_auto_warns_once_and_runs_the_reference(no_extension, calls):
    with pytest.warns(SparseHeadsWarning, match=r"run the reference: .* no C\+\+ compiler: tried") as caught:
        first = calls[0]()
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(calls[0](), first)
        calls[1]()
        calls[1](backend="reference")
    assert torch.equal(first, calls[0](backend="reference"))


RAW = {
    "x": (X, [WEIGHT], [BIAS], [torch.tensor([0, 2])], 2),
    "heads": (HEADS.transpose(1, 2).flatten(2), OUT_WEIGHT, OUT_BIAS, torch.tensor([0, 2]), 2),
}


@pytest.mark.parametrize("kept", [[2, 0], [1, 1], [-1, 2], [0, 4]], ids=str)
def test_the_operators_refuse_wrong_indices(kept):
    x, weights, biases, _, head_dim = RAW["x"]
    message = r"kept(\[0\])?: wanted ascending head indices .*got -?\d"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sparse_heads.in_projection_forward(x, weights, biases, [torch.tensor(kept)], head_dim)
    heads, weight, bias, _, head_dim = RAW["heads"]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sparse_heads.out_projection_forward(heads, weight, bias, torch.tensor(kept), head_dim)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (1, OUT_WEIGHT[:, :7], "weight: wanted columns divisible by head_dim 2, got 7"),
        (1, OUT_WEIGHT.double(), "weight: wanted the dtype of the input, Float, got Double"),
        (1, OUT_WEIGHT[0], "weight: wanted dimensions 2, got 1"),
        (2, OUT_BIAS[:3], "bias: wanted size 5, got 3"),
        (2, OUT_BIAS.half(), "bias: wanted the dtype of the input, Float, got Half"),
        (0, HEADS.flatten(2)[:, :, :5], r"heads: wanted 4 columns \(kept heads\) or 8 \(all heads\), got 5"),
        (
            3,
            torch.tensor([0, 2], dtype=torch.int32),
            "kept: wanted a contiguous one-dimensional int64 tensor",
        ),
        (4, 0, "head_dim: wanted a positive number of columns per head, got 0"),
    ],
)
def test_the_out_projection_operator_refuses(position, value, message):
    arguments = list(RAW["heads"])
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sparse_heads.out_projection_forward(*arguments)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (1, [WEIGHT[:7]], r"weights\[0\]: wanted rows divisible by head_dim 2, got 7"),
        (1, [WEIGHT[:, :4]], r"weights\[0\]: wanted columns 5, got 4"),
        (1, [WEIGHT.double()], r"weights\[0\]: wanted the dtype of the input, Float, got Double"),
        (1, [WEIGHT, WEIGHT], "biases: wanted length 2, got 1"),
        (2, [BIAS[:3]], r"biases\[0\]: wanted size 8, got 3"),
        (3, [], "kept: wanted length 1, got 0"),
        (4, -2, "head_dim: wanted a positive number of columns per head, got -2"),
    ],
)
def test_the_in_projection_operator_refuses(position, value, message):
    arguments = list(RAW["x"])
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sparse_heads.in_projection_forward(*arguments)


REQUEST_MASK = MASK.expand(2, 4)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, X[0], "x: wanted dimensions 3, got 2"),
        (1, [WEIGHT.half()], r"weights\[0\]: wanted the dtype of the input, Float, got Half"),
        (3, [], "masks: wanted length 1, got 0"),
        (3, [MASK], r"masks\[0\]: wanted a bool tensor of two dimensions on the CPU, got 1 dimensions of Bool"),
        (3, [REQUEST_MASK.int()], r"masks\[0\]: wanted a bool tensor of two dimensions .* of Int"),
        (3, [REQUEST_MASK[:1]], r"masks\[0\]: wanted rows, one a request, 2, got 1"),
        (3, [REQUEST_MASK[:, :3]], r"masks\[0\]: wanted columns, one a head, 4, got 3"),
    ],
)
def test_the_in_projection_operator_per_request_refuses(position, value, message):
    arguments = [X, [WEIGHT], [BIAS], [REQUEST_MASK], 2]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sparse_heads.in_projection_per_request_forward(*arguments)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, X, "heads: wanted columns 8, got 5"),
        (0, X[0], "heads: wanted dimensions 3, got 2"),
        (2, OUT_BIAS[:3], "bias: wanted size 5, got 3"),
        (3, MASK, "mask: wanted a bool tensor of two dimensions on the CPU, got 1 dimensions of Bool"),
        (3, MASK.expand(3, 4), "mask: wanted rows, one a request, 2, got 3"),
    ],
)
def test_the_out_projection_operator_per_request_refuses(position, value, message):
    arguments = [RAW["heads"][0], OUT_WEIGHT, OUT_BIAS, REQUEST_MASK, 2]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sparse_heads.out_projection_per_request_forward(*arguments)


@pytest.fixture(autouse=True, scope="module")
def extension():
    _native.load()


@pytest.mark.parametrize("mask", [torch.tensor([True, False]), torch.tensor([[True, False], [False, True]])], ids=str)
def test_forward_mode_runs_the_reference_and_is_refused_by_name(mask):
    x, weight = torch.randn(2, 3, 8), torch.randn(8, 8)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        heads = sh.in_projection(dual, weight, None, mask, head_dim=4)
        tangent = torch.autograd.forward_ad.unpack_dual(heads).tangent
        assert tangent is not None and tangent.abs().sum() > 0
        with pytest.raises(UnsupportedError, match="backend: 'cpu' runs neither .* nor in forward mode"):
            sh.in_projection(dual, weight, None, mask, head_dim=4, backend="cpu")

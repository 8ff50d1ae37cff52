"""Is the attention kernel as exact as its precision allows, whatever the sizes, layouts and masks?"""

from __future__ import annotations

import itertools
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_heads.ops.attention.api import attend
from sparse_heads.testing import assert_close_to_reference, random_attention_inputs

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# float64 runs the kernel for any machine, the others the one for AVX-512 where there is AVX-512.
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CAUSAL = (-1, 0)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_inputs(*sizes: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """float64 query, key, value for B, H, H_kv, T, S, D and perhaps Dv."""
    drawn = random_attention_inputs(*sizes, dtype=torch.float64, seed=seed)
    return {name: tensor.detach() for name, tensor in zip(("query", "key", "value"), drawn, strict=True)}


def draw_mask(*shape: int, seed: int = 0) -> torch.Tensor:
    """bool, about two thirds True."""
    return draw(*shape, seed=100 + seed) > -0.4


def converted(arguments: dict, dtype: torch.dtype) -> dict:
    """query, key and value in `dtype`, other floating tensors in at least float32; strides stay."""
    result = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            low = name in ("query", "key", "value")
            result[name] = value.to(dtype if low else torch.promote_types(dtype, torch.float32))
    return result


def run(arguments: dict, dtype: torch.dtype, backend: str) -> dict[str, torch.Tensor]:
    """The output and every gradient, computed in `dtype`."""
    arguments = converted(arguments, dtype)
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    output = attend(**{**arguments, **leaves}, backend=backend)
    # Rounded alike for every dtype.
    output.backward(draw(*output.shape, seed=9).to(torch.bfloat16).to(dtype))
    return {"output": output.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def check(arguments: dict, dtype: torch.dtype) -> None:
    """The kernel against the reference: to rounding in float64, else no worse than the reference in `dtype`.

    Of gate and sinks only the float64 gradients are looked at: among a handful of numbers the eager error can be 0.
    Likewise of masks that are the same for all keys: their gradient is 0, and what comes of it is noise.
    """
    rounded = converted(converted(arguments, dtype), torch.float64)
    exact = run(rounded, torch.float64, "reference")
    actual = run(rounded, dtype, "cpu")
    if dtype == torch.float64:
        for name, expected in exact.items():
            # Sums of up to some thousand numbers near 1, at 2e-16 each.
            assert ((actual[name] - expected).abs() <= 1e-11 * (1 + expected.abs())).all(), name
        return
    eager = run(rounded, dtype, "reference")
    for name, expected in exact.items():
        noise = name == "attn_mask" and (expected.dim() == 0 or expected.shape[-1] == 1)
        if name not in ("gate", "sinks") and not noise:
            assert_close_to_reference(actual[name], eager[name], expected)


SIZES = [
    (1, 1, 1, 1),
    (1, 17, 16, 16),
    (1, 300, 65, 13),
    (2, 33, 8, 8),
    (3, 255, 12, 31),
    (5, 256, 13, 33),
    (8, 257, 16, 5),
    (15, 40, 64, 64),
    (16, 16, 32, 32),
    (17, 31, 48, 16),
    (31, 13, 20, 26),
    (32, 64, 64, 64),
    (33, 65, 1, 1),
    (64, 12, 17, 15),
    (100, 100, 40, 24),
    (130, 513, 24, 40),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span", [(-1, -1), CAUSAL], ids=["all", "causal"])
@pytest.mark.parametrize(("queries", "keys", "head_dim", "value_dim"), SIZES)
def test_every_size(queries, keys, head_dim, value_dim, span, dtype):
    arguments = draw_inputs(2, 6, 3, queries, keys, head_dim, value_dim)
    head_mask = torch.tensor([[True, False, True, True, False, False], [False, True, True, True, True, True]])
    check({**arguments, "head_mask": head_mask, "gate": draw(2, 6), "span": span}, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [1, 3, 20])
def test_many_keys(queries, dtype):
    check({**draw_inputs(1, 4, 2, queries, 2500, 32), "span": CAUSAL, "sinks": draw(4)}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 20])
def test_wide_heads(queries, dtype):
    check(draw_inputs(1, 2, 1, queries, 40, 300, 270), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("queries", [1, 6, 40])
@pytest.mark.parametrize("kv_heads", [[0, 0, 0, 1, 2, 2], [2, 0, 1, 0, 2, 2], [1, 1, 1, 1, 1, 1]], ids=str)
def test_any_query_head_reads_any_key_head(kv_heads, queries, dtype):
    arguments = draw_inputs(2, 6, 3, queries, 40, 16)
    head_mask = torch.tensor([[True, False, True, True, False, True], [False, True, True, False, True, True]])
    check({**arguments, "kv_heads": torch.tensor(kv_heads), "head_mask": head_mask}, dtype)


SPANS = [(-1, -1), (-1, 0), (0, 0), (3, 0), (2, 5), (-1, 7), (40, -1), (300, 0), (0, 1000)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 70), (7, 70), (50, 70), (70, 30), (40, 600)])
def test_every_span(span, queries, keys, dtype):
    check({**draw_inputs(1, 2, 2, queries, keys, 16), "span": span}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [2, 37])
@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("over", [*itertools.product([True, False], repeat=4)], ids=str)
def test_attention_masks_of_every_shape(over, kind, queries, dtype):
    whole = (2, 4, queries, 45)
    shape = [size if vary else 1 for size, vary in zip(whole, over, strict=True)]
    attn_mask = draw_mask(*shape) if kind == "bool" else draw(*shape).masked_fill(~draw_mask(*shape, seed=1), -math.inf)
    check({**draw_inputs(2, 4, 2, queries, 45, 16), "attn_mask": attn_mask, "span": (30, 0)}, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(), (45,), (20, 45), (4, 1, 45), (20, 1)], ids=str)
def test_attention_masks_of_fewer_dimensions(shape, dtype):
    check({**draw_inputs(2, 4, 2, 20, 45, 16), "attn_mask": draw(*shape)}, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 20, 45), (1, 1, 1, 45)], ids=str)
def test_attention_masks_in_the_dtype_of_the_query(shape, dtype):
    arguments = {**draw_inputs(2, 4, 2, 20, 45, 16), "attn_mask": draw(*shape)}
    in_dtype, in_float32 = (
        attend(**{**converted(arguments, dtype), "attn_mask": arguments["attn_mask"].to(dtype).to(own)}, backend="cpu")
        for own in (dtype, torch.float32)
    )
    assert torch.equal(in_dtype, in_float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 3, 35])
def test_everything_at_once(queries, dtype):
    arguments = draw_inputs(2, 24, 8, queries, 300, 16, 24)
    check(
        {
            **arguments,
            "head_mask": draw_mask(2, 24),
            "gate": draw(24),
            "attn_mask": draw(2, 1, queries, 300),
            "span": (280, 0),
            "scale": 0.3,
            "softcap": 5.0,
            "sinks": draw(24, seed=3),
        },
        dtype,
    )


@pytest.mark.parametrize("queries", [1, 37])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_float32_gradients_of_gates_and_sinks(queries, softcap):
    """Of 192 heads, so that the largest eager error means something."""
    arguments = {**draw_inputs(1, 192, 192, queries, 50, 8), "gate": draw(192), "sinks": draw(192, seed=3)}
    arguments = {**converted(converted(arguments, torch.float32), torch.float64), "softcap": softcap}
    exact = run(arguments, torch.float64, "reference")
    actual, eager = (run(arguments, torch.float32, backend) for backend in ("cpu", "reference"))
    for name in ("gate", "sinks"):
        assert_close_to_reference(actual[name], eager[name], exact[name])


LAYOUTS = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "transposed": lambda tensor: tensor.transpose(-1, -2).contiguous().transpose(-1, -2),
    "heads last": lambda tensor: tensor.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "requests inside": lambda tensor: tensor.transpose(0, 2).contiguous().transpose(0, 2),
    "rows apart": lambda tensor: torch.cat([tensor, torch.full_like(tensor, math.nan)], -1)[..., : tensor.shape[-1]],
    "every other column": lambda tensor: torch.stack([tensor, torch.full_like(tensor, math.nan)], -1)[..., 0],
    "every other row": lambda tensor: torch.stack([tensor, torch.full_like(tensor, math.nan)], -2)[..., 0, :],
    "not aligned": lambda tensor: torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape),
    "far apart": lambda tensor: torch.cat([tensor, tensor.new_full((*tensor.shape[:3], 1008), math.nan)], -1)[..., :16],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, queries, dtype):
    arguments = draw_inputs(2, 4, 2, queries, 40, 16)
    arguments = {name: LAYOUTS[layout](tensor) for name, tensor in arguments.items()}
    arguments["attn_mask"] = LAYOUTS["every other column"](draw(2, 4, queries, 40))
    check(arguments, dtype)


@pytest.mark.parametrize("queries", [1, 20])
def test_expanded_inputs(queries):
    arguments = draw_inputs(1, 1, 1, queries, 1, 16)
    sizes = {"query": (2, 4, queries, 16), "key": (2, 2, 40, 16), "value": (2, 2, 40, 16)}
    check({name: tensor.expand(sizes[name]) for name, tensor in arguments.items()}, torch.float32)
    check({**draw_inputs(2, 4, 2, queries, 40, 16), "gate": draw(1).expand(2, 4)}, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 20])
def test_queries_without_a_key(queries, dtype):
    arguments = converted({**draw_inputs(2, 4, 2, queries, 40, 16), "sinks": draw(4), "gate": draw(4)}, dtype)
    allowed = torch.ones(2, 1, queries, 40, dtype=torch.bool)
    allowed[1, :, 0] = False
    results = run({**arguments, "attn_mask": allowed}, dtype, "cpu")
    assert (results["output"][1, :, 0] == 0).all() and (results["output"][0] != 0).any()
    assert (results["query"][1, :, 0] == 0).all()
    assert all(tensor.isfinite().all() for tensor in results.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_queries_without_a_key_meet_anything(poison, kind, queries, dtype):
    """Values that are not finite, and for a bool mask keys, queries and output gradients too."""
    hidden = torch.zeros(2, 1, queries, 40, dtype=torch.bool)
    hidden[1] = True
    mask = ~hidden if kind == "bool" else torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)
    arguments = converted({**draw_inputs(2, 4, 2, queries, 40, 16), "sinks": draw(4), "gate": draw(2, 4)}, dtype)
    poisoned = ("query", "key", "value") if kind == "bool" else ("value",)
    for name in poisoned:
        arguments[name][1, :, ::3] = poison
    leaves = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
    output = attend(**leaves, attn_mask=mask.requires_grad_(kind == "added"), softcap=5.0, backend="cpu")
    gradient = draw(*output.shape, seed=9).to(dtype)
    if kind == "bool":
        gradient[1, :, 0] = poison
    output.backward(gradient)
    assert (output[1] == 0).all() and (output[0] != 0).any()
    for name, leaf in leaves.items():
        assert leaf.grad.isfinite().all(), name
        if name != "sinks":
            assert (leaf.grad[1] == 0).all() and (leaf.grad[0] != 0).any(), name
    if kind == "added":
        assert (mask.grad[1] == 0).all() and (mask.grad[0] != 0).any()


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_one_query_without_a_key_gets_zeros_beside_infinite_values(backend, queries):
    arguments = converted(draw_inputs(1, 4, 2, queries, 40, 16), torch.float32)
    arguments["value"][..., 7, :] = math.inf
    allowed = torch.ones(queries, 1, dtype=torch.bool)
    allowed[0] = False
    output = attend(**arguments, attn_mask=allowed, backend=backend)
    assert (output[:, :, 0] == 0).all() and (output[:, :, 1:] == math.inf).all()


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("largest", [sys.maxsize, sys.maxsize - 3])
@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True)], ids=str)
def test_the_largest_span_hides_nothing_on_its_sides(sides, largest, queries):
    arguments = converted(draw_inputs(1, 2, 2, queries, 40, 16), torch.float32)
    far, unlimited = (tuple(wide if side else 0 for side in sides) for wide in (largest, -1))
    expected = attend(**arguments, span=unlimited, backend="cpu")
    assert torch.equal(attend(**arguments, span=far, backend="cpu"), expected)


@pytest.mark.parametrize("queries", [1, 20])
def test_a_sink_of_minus_infinity_is_none(queries):
    arguments = draw_inputs(2, 4, 2, queries, 40, 16)
    with_sinks = {**arguments, "sinks": torch.full((4,), -math.inf)}
    for dtype in (torch.float64, torch.float32):
        check(with_sinks, dtype)
        without, results = (run(each, dtype, "cpu") for each in (arguments, with_sinks))
        assert (results.pop("sinks") == 0).all()
        assert all(torch.equal(results[name], tensor) for name, tensor in without.items())


REFUSED = {
    "attn_mask": (torch.zeros(3, 5, dtype=torch.float64), "attn_mask: wanted bool, .* float32 .*, got float64"),
    "scale": (1e300, "scale: wanted a number that is finite in float32, got 1e"),
    "softcap": (1e-50, "softcap: wanted 0, or a number that is finite and above 0 in float32, got 1e-50"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_operator_refuses_what_float32_cannot_hold(name):
    value, message = REFUSED[name]
    drawn = converted(draw_inputs(1, 2, 2, 3, 5, 16), torch.float32)
    with pytest.raises(RuntimeError, match=message):
        attend(**drawn, **{name: value}, backend="cpu")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's own files")
def test_a_long_backward_leaves_little_memory_behind():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    run(draw_inputs(1, 1, 1, 1, 40, 16), torch.float64, "cpu")
    before = resident()
    run(draw_inputs(1, 1, 1, 1, 16384, 512), torch.float64, "cpu")  # sums of two times 64 MiB
    assert resident() - before < 64 << 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 20])
def test_what_is_off_is_not_read(queries, dtype):
    head_mask = torch.tensor([[True, False, False, False, True, True], [False, False, True, False, False, False]])
    group_off = ~head_mask.unflatten(1, (3, 2)).any(-1)
    clean = {**draw_inputs(2, 6, 3, queries, 40, 16), "attn_mask": draw(2, 6, queries, 40), "gate": draw(2, 6)}
    off = {"query": ~head_mask, "attn_mask": ~head_mask, "key": group_off, "value": group_off}
    poisoned = dict(clean)
    for name, heads in off.items():
        poisoned[name] = clean[name].masked_fill(heads[..., None, None], math.nan)
    poisoned["gate"] = clean["gate"].masked_fill(~head_mask, math.nan)
    expected, actual = (run({**each, "head_mask": head_mask}, dtype, "cpu") for each in (clean, poisoned))
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert (actual["output"][~head_mask] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("hidden", ["by the mask", "by the window"])
def test_hidden_keys_may_hold_anything(hidden, queries, dtype):
    """As long as their values are numbers, where a mask hides them: a probability of 0 times NaN is NaN."""
    allowed = torch.arange(40) >= 20
    clean = converted(draw_inputs(2, 4, 2, queries, 40, 16), dtype)
    options = {"attn_mask": allowed} if hidden == "by the mask" else {"span": (20 - queries, 0)}
    poisoned = {**clean, "key": clean["key"].masked_fill(~allowed[:, None], math.nan)}
    if hidden == "by the window":
        poisoned["value"] = clean["value"].masked_fill(~allowed[:, None], math.nan)
    expected, actual = (attend(**each, **options, backend="cpu") for each in (clean, poisoned))
    assert torch.equal(actual, expected) and actual.isfinite().all()


@pytest.mark.parametrize("queries", [1, 2, 18])
def test_every_gradient_matches_finite_differences(queries):
    arguments = draw_inputs(2, 4, 2, queries, 4, 3, 2)
    leaves = [*arguments.values(), draw(2, 4), draw(1, 4, queries, 4), draw(4, seed=2)]
    leaves[3][0, 0] = 0
    head_mask = torch.tensor([[True, False, True, True], [False, False, True, True]])

    def run(query, key, value, gate, attn_mask, sinks):
        return attend(
            query, key, value, head_mask, gate=gate, attn_mask=attn_mask, sinks=sinks, span=(2, 0), softcap=1.5,
            scale=0.7, kv_heads=torch.tensor([1, 0, 0, 1]), backend="cpu",
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, tuple(leaf.requires_grad_() for leaf in leaves))


@pytest.mark.parametrize("wanted", ["query", "key", "value", "gate", "attn_mask", "sinks"])
def test_one_gradient_alone_is_the_same(wanted):
    arguments = {**draw_inputs(2, 4, 2, 20, 40, 16), "gate": draw(4), "attn_mask": draw(20, 40), "sinks": draw(4)}
    together = run(arguments, torch.float32, "cpu")
    arguments = converted(arguments, torch.float32)
    leaf = arguments[wanted].requires_grad_()
    output = attend(**arguments, backend="cpu")
    (alone,) = torch.autograd.grad(output, leaf, draw(*output.shape, seed=9).to(torch.bfloat16).float())
    assert torch.equal(alone, together[wanted])


@st.composite
def problems(draw_from):
    kv_heads, group = draw_from(st.integers(1, 3)), draw_from(st.integers(1, 4))
    batch, queries = draw_from(st.integers(0, 3)), draw_from(st.integers(0, 40))
    keys, head_dim, value_dim = (draw_from(st.integers(low, 70)) for low in (0, 1, 0))
    seed = draw_from(st.integers(0, 999))
    sizes = batch, kv_heads * group, kv_heads, queries, keys, head_dim, value_dim
    arguments = draw_inputs(*sizes, seed=seed)
    whole = (*sizes[:2], queries, keys)
    if draw_from(st.booleans()):
        arguments["head_mask"] = draw_mask(*whole[draw_from(st.integers(0, 1)) : 2], seed=seed)
    if draw_from(st.booleans()):
        arguments["gate"] = draw(*whole[draw_from(st.integers(0, 1)) : 2], seed=seed)
    if draw_from(st.booleans()):
        arguments["sinks"] = draw(whole[1], seed=seed)
    if draw_from(st.booleans()):
        shape = [size if draw_from(st.booleans()) else 1 for size in whole]
        arguments["attn_mask"] = draw_mask(*shape, seed=seed) if draw_from(st.booleans()) else draw(*shape, seed=seed)
    if draw_from(st.booleans()):
        arguments["softcap"] = draw_from(st.sampled_from([0.5, 20.0]))
    if draw_from(st.booleans()):
        arguments["span"] = draw_from(st.tuples(st.integers(-1, 40), st.integers(-1, 40)))
    return arguments


@settings(max_examples=60)
@given(problems())
def test_any_problem(problem):
    check(problem, torch.float64)


@pytest.mark.full
@settings(max_examples=3000)
@given(problems())
def test_many_problems(problem):
    check(problem, torch.float64)

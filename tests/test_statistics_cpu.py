"""Is the statistics kernel as exact as its precision allows, to the same bits whatever runs beside?"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statistics_inputs import HEAD_MASK, draw, draw_groups, draw_inputs, draw_mask, stack

from sparse_heads.ops.statistics import attention_statistics
from sparse_heads.testing import assert_close_to_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# float64 runs the kernel for any machine, the others the one for AVX-512 where there is AVX-512.
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def converted(arguments: dict, dtype: torch.dtype) -> dict:
    """query and key in `dtype`, an added mask in at least float32."""
    result = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            result[name] = value.to(dtype if name in ("query", "key") else torch.promote_types(dtype, torch.float32))
    return result


def check(arguments: dict, dtype: torch.dtype) -> None:
    """The kernel against the reference: to rounding in float64, else no worse than the reference in `dtype`."""
    rounded = converted(converted(arguments, dtype), torch.float64)
    exact = attention_statistics(**rounded, backend="reference")
    actual = attention_statistics(**converted(rounded, dtype), backend="cpu")
    assert torch.equal(actual.count, exact.count)
    found, expected = stack(actual), stack(exact)
    assert torch.equal(found.isnan(), expected.isnan())
    if dtype == torch.float64:
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13, equal_nan=True)
        return
    eager = stack(attention_statistics(**converted(rounded, dtype), backend="reference"))
    # The arithmetic's dtype has the one rounding that comes on top.
    found, eager = (tensor.nan_to_num().float() for tensor in (found, eager))
    assert_close_to_reference(found, eager, expected.nan_to_num())


SIZES = [
    (1, 17, 16),
    (1, 300, 65),
    (2, 33, 8),
    (3, 255, 12),
    (15, 40, 64),
    (16, 16, 32),
    (17, 31, 48),
    (33, 65, 1),
    (64, 12, 17),
    (130, 513, 24),
    (300, 300, 5),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, (-1, 0), (20, 3)], ids=["all", "causal", "window"])
@pytest.mark.parametrize(("queries", "keys", "head_dim"), SIZES)
def test_every_size(queries, keys, head_dim, window, dtype):
    arguments = draw_inputs(2, 6, 3, queries, keys, head_dim)
    check({**arguments, "head_mask": HEAD_MASK, "window": window, "key_groups": draw_groups(2, keys, 2)}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [3, 70])
def test_everything_at_once(queries, dtype):
    arguments = {
        **draw_inputs(2, 6, 3, queries, 300, 16),
        "head_mask": HEAD_MASK,
        "attn_mask": draw(2, 6, queries, 300).masked_fill(~draw_mask(2, 1, queries, 300), -math.inf),
        "window": 281,
        "scale": 0.3,
        "softcap": 5.0,
        "query_mask": draw_mask(2, queries, seed=3),
        "key_groups": draw_groups(2, 300, 40),
    }
    check(arguments, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 3.0, 40.0])
def test_flat_and_sharp_rows(scale, dtype):
    """The largest scores rise from piece to piece of the keys, or the other way round."""
    arguments = draw_inputs(1, 4, 2, 40, 1500, 16)
    for slope in (1e-2, -1e-2, 0.0):
        bias = slope * torch.arange(1500, dtype=torch.float64)
        check({**arguments, "scale": scale, "attn_mask": bias, "key_groups": draw_groups(1, 1500, 3)}, dtype)


LAYOUTS = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "transposed": lambda tensor: tensor.transpose(-1, -2).contiguous().transpose(-1, -2),
    "requests inside": lambda tensor: tensor.transpose(0, 2).contiguous().transpose(0, 2),
    "rows apart": lambda tensor: torch.cat([tensor, torch.full_like(tensor, math.nan)], -1)[..., : tensor.shape[-1]],
    "every other column": lambda tensor: torch.stack([tensor, torch.full_like(tensor, math.nan)], -1)[..., 0],
    "not aligned": lambda tensor: torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [3, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, queries, dtype):
    arguments = {name: LAYOUTS[layout](tensor) for name, tensor in draw_inputs(2, 4, 2, queries, 40, 16).items()}
    check({**arguments, "attn_mask": LAYOUTS["every other column"](draw(2, 4, queries, 40))}, dtype)


def test_masks_and_groups_of_any_layout():
    arguments = draw_inputs(2, 4, 2, 40, 50, 16)
    query_mask, groups = draw_mask(2, 40), draw_groups(2, 50, 3)
    expected = attention_statistics(**arguments, query_mask=query_mask, key_groups=groups, backend="cpu")
    query_mask = torch.stack([query_mask, ~query_mask], -1)[..., 0]
    actual = attention_statistics(
        **arguments, query_mask=query_mask, key_groups=groups.t().contiguous().t(), backend="cpu"
    )
    assert torch.equal(stack(actual), stack(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [3, 40])
def test_what_is_off_or_hidden_is_not_read(queries, dtype):
    group_off = ~HEAD_MASK.unflatten(1, (3, 2)).any(-1)
    options = {"head_mask": HEAD_MASK, "is_causal": True, "query_mask": draw_mask(2, queries)}
    clean = converted({**draw_inputs(2, 6, 3, queries, 50, 16), "attn_mask": draw(2, 6, queries, 50)}, dtype)
    poisoned = {
        "query": clean["query"]
        .masked_fill(~HEAD_MASK[..., None, None], math.nan)
        .masked_fill(~options["query_mask"][:, None, :, None], math.nan),
        "key": clean["key"].masked_fill(group_off[..., None, None], math.nan),
        "attn_mask": clean["attn_mask"].masked_fill(~HEAD_MASK[..., None, None], math.nan),
    }
    for backend in ("cpu", "reference"):
        expected, actual = (
            stack(attention_statistics(**each, **options, backend=backend)) for each in (clean, poisoned)
        )
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(actual[..., 0].isnan(), ~HEAD_MASK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("queries", [1, 5, 70])
def test_random_neighbours_change_no_bit(queries, dtype):
    generator = torch.Generator().manual_seed(5)
    inputs = converted(draw_inputs(3, 12, 4, queries, 300, 32), dtype)
    own = draw_mask(12)
    first = None
    for density in torch.linspace(0, 1, 20):
        head_mask = torch.rand(3, 12, generator=generator) < density
        head_mask[1] = own
        statistics = stack(attention_statistics(**inputs, head_mask=head_mask, is_causal=True, backend="cpu"))[1, own]
        first = statistics if first is None else first
        assert torch.equal(statistics, first)
    alone = {name: tensor[1:2] for name, tensor in inputs.items()}
    assert torch.equal(
        stack(attention_statistics(**alone, head_mask=own, is_causal=True, backend="cpu"))[0, own], first
    )


@pytest.mark.parametrize("queries", [5, 130, 700])
def test_runs_and_numbers_of_threads_change_no_bit(queries):
    inputs = converted(draw_inputs(2, 4, 2, queries, 300, 32), torch.float32)
    options = {"key_groups": draw_groups(2, 300, 2), "is_causal": True, "backend": "cpu"}
    first = stack(attention_statistics(**inputs, **options))
    for threads in (1, 2, 3, 2, 2):
        torch.set_num_threads(threads)
        assert torch.equal(stack(attention_statistics(**inputs, **options)), first)


@st.composite
def problems(draw_from):
    kv_heads, group = draw_from(st.integers(1, 3)), draw_from(st.integers(1, 3))
    batch, queries, keys = draw_from(st.integers(0, 3)), draw_from(st.integers(0, 70)), draw_from(st.integers(0, 70))
    seed = draw_from(st.integers(0, 999))
    heads = kv_heads * group
    arguments = draw_inputs(batch, heads, kv_heads, queries, keys, draw_from(st.integers(1, 40)), seed=seed)
    shape = [size if draw_from(st.booleans()) else 1 for size in (batch, heads, queries, keys)]
    bool_mask, added = draw_mask(*shape, seed=seed), draw(*shape, seed=seed)
    options = {
        "head_mask": draw_mask(*draw_from(st.sampled_from([(heads,), (batch, heads)])), seed=seed + 1),
        "attn_mask": draw_from(st.sampled_from([bool_mask, added, added.masked_fill(~bool_mask, -math.inf)])),
        "query_mask": draw_mask(batch, queries, seed=seed + 2),
        "key_groups": draw_groups(batch, keys, draw_from(st.integers(1, 5))),
        "softcap": draw_from(st.floats(0.5, 30)),
        "scale": draw_from(st.floats(-2, 2)),
    }
    chosen = draw_from(st.sets(st.sampled_from(sorted(options))))
    window = draw_from(st.tuples(st.integers(-1, 80), st.integers(-1, 80)))
    return {**arguments, "window": window, **{name: options[name] for name in sorted(chosen)}}


@given(problems())
@settings(max_examples=100)
def test_anything_in_float64(arguments):
    check(arguments, torch.float64)


@given(problems())
@settings(max_examples=100)
def test_anything_in_float32(arguments):
    """Against the reference in float64, with room for few queries, where the eager error can be next to nothing."""
    rounded = converted(converted(arguments, torch.float32), torch.float64)
    expected = stack(attention_statistics(**rounded, backend="reference"))
    actual = stack(attention_statistics(**converted(rounded, torch.float32), backend="cpu"))
    # Scores of up to some tens round at 4e-6.
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5, equal_nan=True)


RAW = {
    "query": torch.zeros(2, 6, 4, 8),
    "key": torch.zeros(2, 3, 5, 8),
    "head_mask": None,
    "attn_mask": None,
    "query_mask": None,
    "key_groups": None,
    "num_groups": 0,
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("key", torch.zeros(2, 3, 5, 9), "key: wanted columns 8, got 9"),
        ("key", torch.zeros(2, 4, 5, 8), "key: wanted a number of heads that divides 6, got 4"),
        ("head_mask", torch.zeros(5, dtype=torch.bool), "head_mask: wanted heads 6, got 5"),
        ("attn_mask", torch.zeros(4, 4), "attn_mask: wanted size 1 or 5 in dimension 3 of 4, got 4"),
        ("query_mask", torch.zeros(2, 4), "query_mask: wanted bool, got Float"),
        ("query_mask", torch.zeros(2, 5, dtype=torch.bool), "query_mask: wanted queries 4, got 5"),
        ("query_mask", torch.zeros(3, 4, dtype=torch.bool), "query_mask: wanted requests 2, got 3"),
        ("key_groups", torch.zeros(2, 5, dtype=torch.int32), "key_groups: wanted int64, got Int"),
        ("key_groups", torch.zeros(2, 4, dtype=torch.int64), "key_groups: wanted positions 5, got 4"),
        ("num_groups", 2, "num_groups: wanted number 0, got 2"),
    ],
)
def test_the_operator_refuses_what_it_cannot_walk(name, value, message):
    attention_statistics(RAW["query"], RAW["key"], backend="cpu")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.sparse_heads.attention_statistics(*{**RAW, name: value}.values(), -1, -1, -math.inf, 1.0, 0.0)

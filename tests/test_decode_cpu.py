"""Is the decode kernel as exact as its precision allows, whatever the sizes, layouts, lengths and masks?"""

from __future__ import annotations

import math

import pytest
import torch
from decode_inputs import converted, draw, draw_inputs, draw_mask, in_pages
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_heads import attention_decode
from sparse_heads.ops.decode.api import decode
from sparse_heads.testing import assert_close_to_reference, items_run

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# float64 runs the kernel for any machine, the others the one for AVX-512 where there is AVX-512.
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HEAD_MASK = torch.tensor([[True, False, True, True, False, False], [False] * 6, [False, True, True, True, True, True]])


def check(arguments: dict, dtype: torch.dtype, run=attention_decode) -> torch.Tensor:
    """The kernel against the reference: to rounding in float64, else no worse than the reference in `dtype`."""
    rounded = converted(converted(arguments, dtype), torch.float64)
    exact = run(**rounded, backend="reference")
    actual, eager = (run(**converted(rounded, dtype), backend=backend) for backend in ("cpu", "reference"))
    if dtype == torch.float64:
        # Sums of up to some thousand numbers near 1, at 2e-16 each.
        assert ((actual - exact).abs() <= 1e-11 * (1 + exact.abs())).all()
    else:
        assert_close_to_reference(actual, eager, exact)
    return actual


SIZES = [(1, 1), (13, 5), (16, 16), (65, 64), (128, 64), (300, 270), (64, 0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 2, 3, 8])
@pytest.mark.parametrize(("head_dim", "value_dim"), SIZES)
def test_every_size(head_dim, value_dim, queries, dtype):
    arguments = draw_inputs(6, 3, queries, [17, 8, 63], head_dim, value_dim, room=70)
    actual = check({**arguments, "head_mask": HEAD_MASK, "gate": draw(3, 6)}, dtype)
    assert (actual[~HEAD_MASK] == 0).all()


LENGTHS = [(1, 2, 15), (511, 512, 513), (1024, 700, 1536), (2048, 1, 2047)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_heads", [6, 1])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths_of_any_number_of_chunks(lengths, kv_heads, dtype):
    check({**draw_inputs(6, kv_heads, 1, list(lengths), 16), "head_mask": HEAD_MASK, "sinks": draw(6)}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [1, 2, 17, 510, 512, 700, (600, 5), -1], ids=str)
@pytest.mark.parametrize("queries", [1, 7])
def test_every_window(queries, window, dtype):
    check({**draw_inputs(2, 1, queries, [1030, 513, 9], 16), "window": window}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", range(1, 9))
def test_everything_at_once(queries, dtype):
    arguments = draw_inputs(24, 8, queries, [300, 1100], 16, 24)
    options = {"head_mask": draw_mask(2, 24), "gate": draw(24), "sinks": draw(24, seed=3)}
    check(in_pages({**arguments, **options, "scale": 0.3, "softcap": 5.0, "window": 900}, 32), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_queries_than_pass_together(dtype):
    check(draw_inputs(11, 1, 7, [530], 16), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kv_heads", [[0, 0, 0, 1, 2, 2], [2, 0, 1, 0, 2, 2], [1, 1, 1, 1, 1, 1]], ids=str)
def test_any_query_head_reads_any_key_head(kv_heads, dtype):
    arguments = draw_inputs(6, 3, 2, [40, 20, 5], 16)
    check({**arguments, "kv_heads": torch.tensor(kv_heads), "head_mask": HEAD_MASK}, dtype, decode)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [16, 48, 64, 512])
def test_pages_change_no_bit(page_size, dtype):
    arguments = draw_inputs(6, 3, 2, [1100, 16, 511], 16)
    arguments = converted({**arguments, "head_mask": HEAD_MASK, "window": 900}, dtype)
    expected = attention_decode(**arguments, backend="cpu")
    for seed in range(2):
        assert torch.equal(attention_decode(**in_pages(arguments, page_size, seed), backend="cpu"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bit_depends_on_runs_threads_or_other_requests(dtype):
    arguments = converted(draw_inputs(6, 2, 2, [1500, 3, 700, 512], 24), dtype)
    masks = draw_mask(4, 6)
    expected = attention_decode(**arguments, head_mask=masks, backend="cpu")
    assert torch.equal(attention_decode(**arguments, head_mask=masks, backend="cpu"), expected)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(attention_decode(**arguments, head_mask=masks, backend="cpu"), expected)
    for request in range(4):
        alone = {name: tensor[request : request + 1] for name, tensor in arguments.items()}
        own = attention_decode(**alone, head_mask=masks[request], backend="cpu")
        assert torch.equal(own[0], expected[request])
        others = {**arguments, "cache_lengths": torch.tensor([2, 2, 2, 2])}
        others["cache_lengths"][request] = arguments["cache_lengths"][request]
        for other in (masks & False, masks | True):
            other[request] = masks[request]
            assert torch.equal(attention_decode(**others, head_mask=other, backend="cpu")[request], expected[request])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_of_a_group_change_no_bit_of_each_other(dtype):
    arguments = converted(draw_inputs(7, 1, 3, [600], 24), dtype)
    together = attention_decode(**arguments, backend="cpu")
    for head in range(7):
        mask = torch.arange(7) == head
        assert torch.equal(attention_decode(**arguments, head_mask=mask, backend="cpu")[:, head], together[:, head])


def test_all_heads_off_give_zeros_and_run_nothing():
    arguments = converted(draw_inputs(6, 3, 2, [17, 8, 40], 16), torch.float32)
    with items_run() as items:
        output = attention_decode(**arguments, head_mask=torch.zeros(3, 6, dtype=torch.bool), backend="cpu")
    assert output.shape == (3, 6, 2, 16) and (output == 0).all() and items.attention == 0
    with items_run() as items:
        attention_decode(**arguments, head_mask=HEAD_MASK, backend="cpu")
    assert items.attention == 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_off_is_not_read(dtype):
    clean = {**draw_inputs(6, 3, 2, [40, 600, 20], 16), "gate": draw(3, 6)}
    group_off = ~HEAD_MASK.unflatten(1, (3, 2)).any(-1)
    off = {"query": ~HEAD_MASK, "key_cache": group_off, "value_cache": group_off}
    poisoned = {name: clean[name].masked_fill(heads[..., None, None], math.nan) for name, heads in off.items()}
    expected, actual = (
        attention_decode(**converted({**clean, **each}, dtype), head_mask=HEAD_MASK, backend="cpu")
        for each in ({}, poisoned)
    )
    assert torch.equal(actual, expected) and (actual[~HEAD_MASK] == 0).all()


LAYOUTS = {
    "transposed": lambda tensor: tensor.transpose(-1, -2).contiguous().transpose(-1, -2),
    "heads inside": lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2),
    "rows apart": lambda tensor: torch.cat([tensor, torch.full_like(tensor, math.nan)], -1)[..., : tensor.shape[-1]],
    "every other column": lambda tensor: torch.stack([tensor, torch.full_like(tensor, math.nan)], -1)[..., 0],
    "not aligned": lambda tensor: torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape),
    "one for all requests": lambda tensor: tensor[:1].expand(tensor.shape),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_no_bit(layout, paged, dtype):
    arguments = {**draw_inputs(6, 3, 2, [530, 530, 530], 24), "head_mask": HEAD_MASK, "gate": draw(3, 6)}
    arguments = converted(in_pages(arguments, 16) if paged else arguments, dtype)
    laid_out = {name: LAYOUTS[layout](arguments[name]) for name in ("query", "key_cache", "value_cache")}
    contiguous = {name: tensor.contiguous() for name, tensor in laid_out.items()}
    expected, actual = (attention_decode(**{**arguments, **each}, backend="cpu") for each in (contiguous, laid_out))
    assert torch.equal(actual.nan_to_num(7), expected.nan_to_num(7)) and (expected[HEAD_MASK] != 0).any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_lengths_of_both_types_and_any_stride(dtype):
    arguments = converted(draw_inputs(2, 2, 1, [9, 4, 30], 16), torch.float32)
    expected = attention_decode(**arguments, backend="cpu")
    lengths = torch.stack([arguments["cache_lengths"], torch.full((3,), -1)], -1).to(dtype)[:, 0]
    assert torch.equal(attention_decode(**{**arguments, "cache_lengths": lengths}, backend="cpu"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinite_scores_are_those_of_the_reference(dtype):
    arguments = draw_inputs(4, 4, 1, [600], 16)
    arguments["query"] = arguments["query"].abs()
    arguments["key_cache"][0, 0, 5] = math.nan
    arguments["key_cache"][0, 1, 550] = math.inf
    arguments["key_cache"][0, 2] = -math.inf
    arguments["key_cache"][0, 3, :520] = -math.inf
    expected, actual = (
        attention_decode(**converted(arguments, dtype), backend=backend) for backend in ("reference", "cpu")
    )
    assert expected[0, :2].isnan().all() and (expected[0, 2] == 0).all() and expected[0, 3].isfinite().all()
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=0.02, atol=1e-3)


@st.composite
def problems(draw_from):
    kv_heads, group = draw_from(st.integers(1, 3)), draw_from(st.integers(1, 5))
    queries = draw_from(st.integers(1, 8))
    lengths = draw_from(st.lists(st.one_of(st.integers(queries, 40), st.integers(500, 1100)), min_size=0, max_size=3))
    head_dim, value_dim = draw_from(st.integers(1, 70)), draw_from(st.integers(0, 70))
    seed, heads = draw_from(st.integers(0, 999)), kv_heads * group
    arguments = draw_inputs(
        heads, kv_heads, queries, lengths, head_dim, value_dim, room=max([queries, *lengths]), seed=seed
    )
    whole = (len(lengths), heads)
    if draw_from(st.booleans()):
        arguments["head_mask"] = draw_mask(*whole[draw_from(st.integers(0, 1)) :], seed=seed)
    if draw_from(st.booleans()):
        arguments["gate"] = draw(*whole[draw_from(st.integers(0, 1)) :], seed=seed)
    if draw_from(st.booleans()):
        arguments["sinks"] = draw(heads, seed=seed)
    if draw_from(st.booleans()):
        arguments["softcap"] = draw_from(st.sampled_from([0.5, 20.0]))
    if draw_from(st.booleans()):
        arguments["window"] = draw_from(st.integers(1, 700))
    if draw_from(st.booleans()):
        arguments = in_pages(arguments, 16 * draw_from(st.integers(1, 3)), seed)
    return arguments


@settings(max_examples=60)
@given(problems())
def test_any_problem(problem):
    check(problem, torch.float64)
    exact, actual = (attention_decode(**converted(problem, each)) for each in (torch.float64, torch.float32))
    # Rounding of inputs and of some thousand terms, of numbers near 1 that a gate of 3 multiplies at most.
    assert ((actual - exact).abs() <= 1e-4 * (1 + exact.abs())).all()

"""Is the Triton attention as exact as its precision allows, whatever the sizes, layouts and masks?"""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton_inputs import (
    CAUSAL,
    DEVICE,
    DTYPES,
    attend_triton,
    check,
    converted,
    draw,
    draw_inputs,
    draw_mask,
    use_small_tiles,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread", "small_tiles")

PER_REQUEST = torch.tensor([[True, False, True, True, False, False], [False, True, True, True, True, True]])


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_tiles(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("span", [(-1, -1), CAUSAL], ids=["all", "causal"])
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (1, 63), (3, 17), (17, 17), (19, 17), (63, 63), (16, 48), (32, 5)]
)
def test_sizes(queries, keys, span, dtype):
    head_mask = torch.tensor([[True, False, True, True], [False, True, False, False]], device=DEVICE)
    arguments = draw_inputs(2, 4, 2, queries, keys, 16)
    check({**arguments, "head_mask": head_mask, "gate": draw(2, 4), "span": span}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 16), (16, 1), (17, 64), (80, 24), (64, 80), (96, 128)])
def test_dimensions(head_dim, value_dim, dtype):
    check({**draw_inputs(1, 2, 1, 18, 20, head_dim, value_dim), "span": CAUSAL}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 3, 111])
def test_tiles_of_the_table(queries, dtype, monkeypatch):
    monkeypatch.undo()
    arguments = draw_inputs(2, 6, 3, queries, 111, 64)
    options = {"head_mask": PER_REQUEST.to(DEVICE), "sinks": draw(6), "softcap": 5.0, "attn_mask": draw(queries, 111)}
    check({**arguments, **options, "span": (40, 0)}, dtype)


HEAD_MASKS = {
    "all": torch.ones(6, dtype=torch.bool),
    "one": torch.arange(6) == 3,
    "none": torch.zeros(6, dtype=torch.bool),
    "half of each group": torch.arange(6) % 2 == 0,
    "per request": PER_REQUEST,
    "none of one request": PER_REQUEST & torch.tensor([[True], [False]]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 3, 6])
@pytest.mark.parametrize("name", HEAD_MASKS)
def test_head_masks(name, kv_heads, dtype):
    head_mask = HEAD_MASKS[name].to(DEVICE)
    output = check({**draw_inputs(2, 6, kv_heads, 17, 20, 16), "head_mask": head_mask, "span": CAUSAL}, dtype)
    assert (output[~head_mask.expand(2, 6)] == 0).all()


@pytest.mark.parametrize("masked", [True, False], ids=["some heads", "all heads"])
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("kv_heads", [[0, 0, 0, 1, 2, 2], [2, 0, 1, 0, 2, 2], [1, 1, 1, 1, 1, 1]], ids=str)
def test_any_query_head_reads_any_key_head(kv_heads, queries, masked):
    arguments = {**draw_inputs(2, 6, 3, queries, 24, 16), "kv_heads": torch.tensor(kv_heads, device=DEVICE)}
    if masked:
        arguments["head_mask"] = PER_REQUEST.to(DEVICE)
    check(arguments, torch.float32)


SPANS = [CAUSAL, (0, 0), (3, 0), (17, 0), (2, 5), (-1, 7), (20, -1), (300, 0), (0, 1000)]


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 70), (7, 70), (50, 70), (70, 30), (70, 70)])
def test_spans(span, queries, keys):
    check({**draw_inputs(1, 2, 1, queries, keys, 16), "span": span}, torch.float32)


@pytest.mark.parametrize("largest", [sys.maxsize, sys.maxsize - 3])
def test_the_largest_span_hides_nothing(largest):
    arguments = converted(draw_inputs(1, 2, 2, 20, 40, 16), torch.float32)
    expected = attend_triton(**arguments, span=(-1, 0))
    assert torch.equal(attend_triton(**arguments, span=(largest, 0)), expected)


@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("over", [*itertools.product([True, False], repeat=4)], ids=str)
def test_attention_masks_of_every_shape(over, kind):
    whole = (2, 4, 19, 35)
    shape = [size if vary else 1 for size, vary in zip(whole, over, strict=True)]
    attn_mask = draw_mask(*shape) if kind == "bool" else draw(*shape).masked_fill(~draw_mask(*shape, seed=1), -math.inf)
    check({**draw_inputs(2, 4, 2, 19, 35, 16), "attn_mask": attn_mask, "span": (30, 0)}, torch.float32)


@pytest.mark.parametrize("shape", [(), (35,), (19, 35), (4, 1, 35), (19, 1)], ids=str)
def test_attention_masks_of_fewer_dimensions(shape):
    check({**draw_inputs(2, 4, 2, 19, 35, 16), "attn_mask": draw(*shape)}, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_masks_in_the_dtype_of_the_query(dtype):
    arguments = converted(draw_inputs(2, 4, 2, 19, 35, 16), dtype)
    mask = draw(2, 1, 19, 35).to(dtype)
    in_dtype, in_float32 = (attend_triton(**arguments, attn_mask=each) for each in (mask, mask.float()))
    assert torch.equal(in_dtype, in_float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [None, 0.3, -0.5, 0.0, 40.0])
@pytest.mark.parametrize("softcap", [None, 0.5, 5.0])
def test_scale_and_softcap(softcap, scale, dtype):
    check({**draw_inputs(1, 2, 2, 18, 20, 16), "scale": scale, "softcap": softcap}, dtype)


@pytest.mark.parametrize("softcap", [1.2e-38, 1e4, 3e38], ids=str)
def test_extreme_softcaps(softcap):
    check({**draw_inputs(1, 2, 2, 18, 20, 16), "softcap": softcap}, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_sinks(size, dtype):
    check({**draw_inputs(2, 4, 2, 18, 20, 16), "sinks": draw(4) * size, "span": CAUSAL}, dtype)


def test_a_sink_of_minus_infinity_is_none():
    arguments = converted(draw_inputs(2, 4, 2, 18, 20, 16), torch.float32)
    with_sinks = attend_triton(**arguments, sinks=torch.full((4,), -math.inf, device=DEVICE))
    assert torch.equal(with_sinks, attend_triton(**arguments))


@pytest.mark.parametrize("shape", [(4,), (2, 4)], ids=str)
def test_gates(shape):
    gate = draw(*shape)
    gate[..., 1] = 0
    for dtype in DTYPES:
        output = check({**draw_inputs(2, 4, 2, 18, 20, 16), "gate": gate}, dtype)
        assert (output[:, 1] == 0).all()


LAYOUTS = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "transposed": lambda tensor: tensor.transpose(-1, -2).contiguous().transpose(-1, -2),
    "heads last": lambda tensor: tensor.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "requests inside": lambda tensor: tensor.transpose(0, 2).contiguous().transpose(0, 2),
    "rows apart": lambda tensor: torch.cat([tensor, torch.full_like(tensor, math.nan)], -1)[..., : tensor.shape[-1]],
    "every other column": lambda tensor: torch.stack([tensor, torch.full_like(tensor, math.nan)], -1)[..., 0],
    "every other row": lambda tensor: torch.stack([tensor, torch.full_like(tensor, math.nan)], -2)[..., 0, :],
    "not aligned": lambda tensor: torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    plain = draw_inputs(2, 4, 2, 18, 20, 12)
    plain |= {"attn_mask": draw(2, 4, 18, 20), "gate": draw(4, 2).T, "sinks": draw(8)[::2]}
    laid_out = converted(plain, dtype)
    for name in ("query", "key", "value", "attn_mask"):
        laid_out[name] = LAYOUTS[layout](laid_out[name])
    expected = check({**plain, "head_mask": HEAD_MASKS["per request"].to(DEVICE)[:, :4]}, dtype)
    assert torch.equal(attend_triton(**laid_out, head_mask=HEAD_MASKS["per request"].to(DEVICE)[:, :4]), expected)


def test_expanded_inputs():
    arguments = draw_inputs(1, 1, 1, 18, 1, 16)
    sizes = {"query": (2, 4, 18, 16), "key": (2, 2, 20, 16), "value": (2, 2, 20, 16)}
    expanded = {name: tensor.expand(sizes[name]) for name, tensor in arguments.items()}
    check({**expanded, "gate": draw(1).expand(2, 4), "sinks": draw(1).expand(4)}, torch.float32)


def test_the_output_is_laid_out_by_tokens():
    output = attend_triton(**converted(draw_inputs(2, 4, 2, 18, 20, 16, 24), torch.float32))
    assert output.shape == (2, 4, 18, 24) and output.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    "sizes", [(0, 2, 1, 3, 5, 16), (1, 0, 0, 3, 5, 16), (1, 2, 1, 0, 5, 16), (1, 2, 1, 3, 0, 16)], ids=str
)
@pytest.mark.parametrize("masked", [True, False])
def test_empty_inputs(sizes, masked):
    arguments = converted(draw_inputs(*sizes), torch.float32)
    head_mask = torch.ones(sizes[1], dtype=torch.bool, device=DEVICE) if masked else None
    sinks = torch.ones(sizes[1], device=DEVICE)
    output = attend_triton(**arguments, head_mask=head_mask, sinks=sinks, gate=sinks)
    assert output.shape == (*sizes[:2], sizes[3], 16) and (output == 0).all()


def test_values_of_no_columns():
    assert attend_triton(**converted(draw_inputs(1, 2, 1, 3, 5, 16, 0), torch.float32)).shape == (1, 2, 3, 0)


@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_queries_without_a_key(poison, kind):
    """Zeros, sinks or not, whatever the values hold, and for a bool mask keys and queries too."""
    hidden = torch.zeros(2, 1, 18, 20, dtype=torch.bool, device=DEVICE)
    hidden[1] = True
    mask = ~hidden if kind == "bool" else torch.zeros(hidden.shape, device=DEVICE).masked_fill(hidden, -math.inf)
    arguments = converted({**draw_inputs(2, 4, 2, 18, 20, 16), "sinks": draw(4), "gate": draw(2, 4)}, torch.float32)
    for name in ("query", "key", "value") if kind == "bool" else ("value",):
        arguments[name][1, :, ::3] = poison
    output = attend_triton(**arguments, attn_mask=mask, softcap=5.0)
    assert (output[1] == 0).all() and (output[0] != 0).all()


@pytest.mark.parametrize("hidden", ["by the mask", "by the window"])
def test_hidden_keys_may_hold_anything(hidden):
    allowed = torch.arange(40, device=DEVICE) >= 20
    clean = converted(draw_inputs(2, 4, 2, 18, 40, 16), torch.float32)
    options = {"attn_mask": allowed} if hidden == "by the mask" else {"span": (2, 0)}
    poisoned = {**clean, "key": clean["key"].masked_fill(~allowed[:, None], math.nan)}
    expected, actual = (attend_triton(**each, **options) for each in (clean, poisoned))
    assert torch.equal(actual, expected) and actual.isfinite().all()


@pytest.mark.parametrize("queries", [1, 18])
def test_what_is_off_is_not_read(queries):
    head_mask = torch.tensor([[True, False, False, False, True, True], [False, False, True, False, False, False]])
    head_mask = head_mask.to(DEVICE)
    group_off = ~head_mask.unflatten(1, (3, 2)).any(-1)
    clean = {**draw_inputs(2, 6, 3, queries, 20, 16), "attn_mask": draw(2, 6, queries, 20), "gate": draw(2, 6)}
    clean = converted(clean, torch.float32)
    off = {"query": ~head_mask, "attn_mask": ~head_mask, "key": group_off, "value": group_off}
    poisoned = {name: clean[name].masked_fill(heads[..., None, None], math.nan) for name, heads in off.items()}
    poisoned["gate"] = clean["gate"].masked_fill(~head_mask, math.nan)
    expected, actual = (attend_triton(**each, head_mask=head_mask) for each in (clean, poisoned))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("kv_heads", [2, 6])
def test_other_requests_masks_change_no_bit(kv_heads):
    arguments = converted(draw_inputs(3, 6, kv_heads, 9, 20, 16), torch.bfloat16)
    own = PER_REQUEST[0]
    outputs = []
    for seed in range(4):
        head_mask = draw_mask(3, 6, seed=seed)
        head_mask[1] = own
        outputs.append(attend_triton(**arguments, head_mask=head_mask.to(DEVICE), span=CAUSAL)[1])
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_request_alone_is_the_same():
    arguments = converted(draw_inputs(3, 6, 3, 9, 20, 16), torch.float32)
    head_mask = draw_mask(3, 6)
    together = attend_triton(**arguments, head_mask=head_mask)
    for request in range(3):
        alone = {name: tensor[request : request + 1] for name, tensor in arguments.items()}
        assert torch.equal(
            attend_triton(**alone, head_mask=head_mask[request : request + 1]), together[request : request + 1]
        )


def test_runs_are_equal_bit_for_bit(monkeypatch):
    if DEVICE.type == "cuda":
        # Where blocks run at one time: as the table has them, and enough to fill the device.
        monkeypatch.undo()
        sizes = (8, 6, 3, 700, 700, 64)
    else:
        sizes = (1, 6, 3, 5, 20, 16)
    arguments = converted(draw_inputs(*sizes), torch.bfloat16)
    first, *others = (attend_triton(**arguments, head_mask=PER_REQUEST[0].to(DEVICE)) for _ in range(20))
    assert all(torch.equal(other, first) for other in others)


def test_the_order_of_the_work_list_changes_no_bit():
    from sparse_heads._triton.work_list import attention_work_list
    from sparse_heads.ops.attention.triton.configs import Config
    from sparse_heads.ops.attention.triton.forward import forward_launch

    arguments = converted(draw_inputs(3, 6, 3, 9, 20, 16), torch.float32)
    head_mask = draw_mask(3, 6)
    expected = attend_triton(**arguments, head_mask=head_mask, span=CAUSAL)
    work = attention_work_list(head_mask, None, 3, 6, 3, DEVICE)
    count = int(work.count)
    assert 3 < count < 9
    for seed in range(3):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        permuted = work._replace(items=work.items[order.to(DEVICE)])
        output = torch.zeros_like(expected)
        forward_launch(
            *arguments.values(), None, None, None, output, None, None, permuted, span=CAUSAL, scale=0.25, softcap=0.0,
            group=2, tf32=False, config=Config(16, 16, 4, 2),
        ).run()  # fmt: skip
        assert torch.equal(output, expected)


def test_work_that_runs_in_turns_changes_no_bit(monkeypatch):
    from sparse_heads.ops.attention.triton import configs

    arguments = converted(draw_inputs(3, 6, 3, 9, 20, 16), torch.float32)
    masks = [None, draw_mask(3, 6)]
    expected = [attend_triton(**arguments, head_mask=mask, span=CAUSAL) for mask in masks]
    for size in (1, 4 * 20 * 32 * 2, 4 * 20 * 32 * 4):
        monkeypatch.setattr(configs, "CACHE_BYTES", size)
        for mask, whole in zip(masks, expected, strict=True):
            assert torch.equal(attend_triton(**arguments, head_mask=mask, span=CAUSAL), whole)


@st.composite
def problems(draw_from):
    kv_heads, group = draw_from(st.integers(1, 3)), draw_from(st.integers(1, 3))
    batch, queries, keys = draw_from(st.integers(0, 3)), draw_from(st.integers(0, 36)), draw_from(st.integers(0, 50))
    head_dim, value_dim = draw_from(st.sampled_from([(16, 16), (24, 40), (5, 32)]))
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
        arguments["kv_heads"] = torch.arange(whole[1], device=DEVICE) * seed % kv_heads
    if draw_from(st.booleans()):
        shape = [size if draw_from(st.booleans()) else 1 for size in whole]
        arguments["attn_mask"] = draw_mask(*shape, seed=seed) if draw_from(st.booleans()) else draw(*shape, seed=seed)
    if draw_from(st.booleans()):
        arguments["softcap"] = draw_from(st.sampled_from([0.5, 20.0]))
    if draw_from(st.booleans()):
        arguments["span"] = draw_from(st.tuples(st.integers(-1, 40), st.integers(-1, 40)))
    return arguments


# Several examples run under one fixture: tiles stay small, which is meant.
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problems())
def test_any_problem(problem):
    check(problem, torch.float32)


@pytest.mark.full
@settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problems(), st.sampled_from(DTYPES))
def test_many_problems(problem, dtype):
    check(problem, dtype)

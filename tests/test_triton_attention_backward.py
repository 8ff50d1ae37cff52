"""Are all gradients of the Triton attention as exact as the precision allows, and the same bits in any company?"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton_inputs import (
    CAUSAL,
    DEVICE,
    DTYPES,
    Arguments,
    assert_as_good,
    attend_eagerly,
    attend_reference,
    attend_triton,
    converted,
    draw,
    draw_inputs,
    draw_mask,
    softmax_times,
    use_small_tiles,
    with_gradients,
)

from sparse_heads._triton import interpreted
from sparse_heads._triton.work_list import WorkList
from sparse_heads.errors import UnsupportedError
from sparse_heads.ops.attention.triton import backward, operators

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread", "small_tiles")

FLOAT32_AND_BFLOAT16 = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
PER_REQUEST = torch.tensor([[True, False, True, True, False, False], [False, True, True, True, True, True]])


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_tiles(monkeypatch)


def gradient_of(output: torch.Tensor) -> torch.Tensor:
    """Rounded alike for every dtype."""
    return draw(*output.shape, seed=9).to(torch.bfloat16).to(output.dtype)


def gradients(attend: Any, arguments: Arguments) -> Arguments:
    shape = (*arguments["query"].shape[:3], arguments["value"].shape[3])
    return with_gradients(attend, arguments, gradient_of(arguments["query"].new_empty(shape)))


class SoftmaxFromStatistics(torch.autograd.Function):
    """`softmax_times`, whose backward starts from output and logsumexp and takes powers of 2, as the kernels do."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = softmax_times(scores, value)
        ctx.save_for_backward(scores, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores, value, output = ctx.saved_tensors
        log2_e = 1 / math.log(2)
        probabilities = (scores * log2_e - scores.logsumexp(-1, keepdim=True) * log2_e).exp2()
        delta = (grad.float() * output.float()).sum(-1, keepdim=True)
        # Sinks are columns without values.
        value_products = torch.nn.functional.pad(grad @ value.transpose(2, 3), (0, scores.shape[3] - value.shape[2]))
        value_gradient = probabilities[..., : value.shape[2]].to(value.dtype).transpose(2, 3) @ grad
        return probabilities * (value_products.float() - delta), value_gradient


def check(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The kernels' gradients on these arguments in `dtype`, if they are as good as the precision allows.

    Of a handful of gates or sinks the largest eager error may happen to be 0, so they are looked at where there are
    many. So are masks that are the same for all keys: their gradient is 0, and what comes of it is noise.
    """
    low = converted(arguments, dtype)
    exact = gradients(attend_reference, converted(low, torch.float64))
    eager = gradients(functools.partial(attend_eagerly, weigh=SoftmaxFromStatistics.apply), low)
    actual = gradients(attend_triton, low)
    for name, expected in exact.items():
        if name in ("gate", "sinks") and expected.numel() < 32:
            continue
        result = actual[name]
        if interpreted() and dtype == torch.bfloat16 and result.dtype != dtype:
            # What comes of numbers that the interpreter has cut off where a device rounds them.
            cut = torch.finfo(dtype).eps * expected.abs().max()
            result = (result + (expected - result).clamp(-cut, cut)).to(result.dtype)
        assert_as_good(result, eager[name], expected)
    return actual


SIZES = [
    *((torch.float32, *sizes) for sizes in [(1, 1), (1, 63), (3, 17), (17, 17), (19, 17), (16, 32), (32, 5)]),
    *((torch.bfloat16, *sizes) for sizes in [(1, 17), (17, 19)]),
]


@pytest.mark.parametrize("span", [(-1, -1), CAUSAL], ids=["all", "causal"])
@pytest.mark.parametrize(("dtype", "queries", "keys"), SIZES)
def test_sizes(dtype, queries, keys, span):
    head_mask = torch.tensor([[True, False, True, True], [False, True, False, False]], device=DEVICE)
    arguments = draw_inputs(2, 4, 2, queries, keys, 16)
    check({**arguments, "head_mask": head_mask, "gate": draw(2, 4), "span": span}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 16), (17, 1), (80, 24)])
def test_dimensions(head_dim, value_dim, dtype):
    check({**draw_inputs(1, 2, 1, 18, 20, head_dim, value_dim), "span": CAUSAL}, dtype)


@FLOAT32_AND_BFLOAT16
def test_tiles_of_the_table(dtype, monkeypatch):
    monkeypatch.undo()
    options = {"head_mask": PER_REQUEST.to(DEVICE), "sinks": draw(6), "softcap": 5.0, "attn_mask": draw(111, 63)}
    check({**draw_inputs(2, 6, 3, 111, 63, 16), **options, "span": (40, 0)}, dtype)


HEAD_MASKS = {
    "one": torch.arange(6) == 3,
    "none": torch.zeros(6, dtype=torch.bool),
    "half of each group": torch.arange(6) % 2 == 0,
    "per request": PER_REQUEST,
    "none of one request": PER_REQUEST & torch.tensor([[True], [False]]),
}


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("name", HEAD_MASKS)
def test_head_masks(name, kv_heads):
    head_mask = HEAD_MASKS[name].to(DEVICE)
    results = check({**draw_inputs(2, 6, kv_heads, 9, 18, 16), "head_mask": head_mask}, torch.float32)
    on = head_mask.expand(2, 6)
    groups_on = on.view(2, kv_heads, -1).any(-1)
    assert (results["query"][~on] == 0).all()
    assert (results["key"][~groups_on] == 0).all() and (results["value"][~groups_on] == 0).all()


@pytest.mark.parametrize("kv_heads", [[0, 0, 0, 1, 2, 2], [2, 0, 1, 0, 2, 2], [1, 1, 1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
def test_any_query_head_reads_any_key_head(masked, kv_heads):
    options = {"kv_heads": torch.tensor(kv_heads, device=DEVICE), "gate": draw(6)}
    options |= {"head_mask": PER_REQUEST.to(DEVICE)} if masked else {}
    check({**draw_inputs(2, 6, 3, 7, 20, 16), **options}, torch.float32)


SPANS = [(0, 0), (3, 0), (2, 5), (-1, 7), (18, -1), (300, 0)]


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(20, 35), (35, 20)])
def test_every_span(span, queries, keys):
    check({**draw_inputs(1, 2, 2, queries, keys, 16), "span": span}, torch.float32)


@FLOAT32_AND_BFLOAT16
@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("shape", [(2, 4, 18, 20), (2, 1, 18, 20), (20,)], ids=str)
def test_attention_masks(shape, kind, dtype):
    attn_mask = draw_mask(*shape) if kind == "bool" else draw(*shape).masked_fill(~draw_mask(*shape, seed=1), -math.inf)
    check({**draw_inputs(2, 4, 2, 18, 20, 16), "attn_mask": attn_mask, "span": (15, 0)}, dtype)


@pytest.mark.parametrize(("dtype", "queries"), [(torch.float32, 18), (torch.bfloat16, 18), (torch.float16, 3)], ids=str)
def test_everything_at_once(dtype, queries):
    options = {"head_mask": PER_REQUEST.to(DEVICE), "gate": draw(6), "sinks": draw(6, seed=3), "softcap": 5.0}
    options |= {"attn_mask": draw(2, 1, queries, 35), "span": (30, 0), "scale": 0.3}
    check({**draw_inputs(2, 6, 2, queries, 35, 16, 24), **options}, dtype)


@FLOAT32_AND_BFLOAT16
def test_gates_and_sinks_of_many_heads(dtype):
    check({**draw_inputs(1, 32, 8, 5, 16, 16), "gate": draw(32), "sinks": draw(32, seed=3), "softcap": 20.0}, dtype)


@pytest.mark.parametrize("group", [1, 3])
def test_a_gate_of_zero_has_its_exact_gradient_and_a_masked_head_none(group):
    gate = draw(6)
    gate[::2] = 0
    arguments = {**draw_inputs(2, 6, 6 // group, 18, 20, 16), "gate": gate}
    low = converted({**arguments, "head_mask": PER_REQUEST.to(DEVICE)}, torch.float32)
    exact, actual = gradients(attend_reference, converted(low, torch.float64)), gradients(attend_triton, low)
    # Sums of some hundred products near 1, at 6e-8 each.
    assert (actual["gate"] - exact["gate"]).abs().max() < 1e-4
    assert (exact["gate"][PER_REQUEST.any(0).to(DEVICE)].abs() > 1e-3).all()
    shared = converted({**arguments, "head_mask": PER_REQUEST[0].to(DEVICE)}, torch.float32)
    assert (gradients(attend_triton, shared)["gate"][~PER_REQUEST[0].to(DEVICE)] == 0).all()


@pytest.mark.parametrize("kind", ["bool", "added", "span"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_queries_without_a_key_meet_anything(poison, kind):
    """Values that are not finite, and for a bool mask keys, queries and output gradients too."""
    hidden = torch.zeros(2, 1, 18, 20, dtype=torch.bool, device=DEVICE)
    hidden[1] = True
    arguments = {**draw_inputs(2, 2, 1, 18, 20, 16), "sinks": draw(2), "gate": draw(2, 2), "softcap": 5.0}
    arguments = converted(arguments, torch.float32)
    gradient = draw(2, 2, 18, 16, seed=9)
    rows = slice(None)
    if kind == "span":
        # 34 queries, of which the first 17 come before the first of 17 keys.
        arguments |= converted(draw_inputs(2, 2, 1, 34, 17, 16), torch.float32) | {"span": CAUSAL}
        gradient = draw(2, 2, 34, 16, seed=9)
        rows = slice(0, 17)
        arguments["query"][1, :, rows] = poison
        gradient[1, :, rows] = poison
    elif kind == "bool":
        for name in ("query", "key", "value"):
            arguments[name][1, :, ::3] = poison
        gradient[1] = poison
        arguments["attn_mask"] = ~hidden
    else:
        arguments["value"][1, :, ::3] = poison
        arguments["attn_mask"] = torch.zeros(hidden.shape, device=DEVICE).masked_fill(hidden, -math.inf)
    results = with_gradients(attend_triton, arguments, gradient)
    for name, result in results.items():
        assert result.isfinite().all(), name
    assert (results["output"][1, :, rows] == 0).all() and (results["query"][1, :, rows] == 0).all()
    if kind != "span":
        for name in ("key", "value", "gate"):
            assert (results[name][1] == 0).all() and (results[name][0] != 0).any(), name


def test_masked_heads_are_not_read():
    head_mask = PER_REQUEST.to(DEVICE)
    arguments = converted({**draw_inputs(2, 6, 3, 18, 20, 16), "gate": draw(2, 6), "sinks": draw(6)}, torch.float32)
    arguments |= {"head_mask": head_mask, "attn_mask": draw(2, 6, 18, 20).float()}
    gradient = draw(2, 6, 18, 16, seed=9)
    clean = with_gradients(attend_triton, arguments, gradient)
    groups_off = ~head_mask.view(2, 3, 2).any(-1)
    assert groups_off.any()
    for name in ("query", "gate", "attn_mask"):
        arguments[name][~head_mask] = math.nan
    for name in ("key", "value"):
        arguments[name][groups_off] = math.nan
    gradient[~head_mask] = math.nan
    for name, result in with_gradients(attend_triton, arguments, gradient).items():
        assert torch.equal(result, clean[name]), name


LAYOUTS = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "transposed": lambda tensor: tensor.transpose(-1, -2).contiguous().transpose(-1, -2),
    "requests inside": lambda tensor: tensor.transpose(0, 2).contiguous().transpose(0, 2),
    "every other column": lambda tensor: torch.stack([tensor, torch.full_like(tensor, math.nan)], -1)[..., 0],
    "every other row": lambda tensor: torch.stack([tensor, torch.full_like(tensor, math.nan)], -2)[..., 0, :],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    lay_out = LAYOUTS[layout]
    arguments = converted({**draw_inputs(2, 2, 1, 17, 18, 16), "attn_mask": draw(2, 2, 17, 18)}, torch.float32)
    gradient = draw(2, 2, 17, 16, seed=9).float()
    expected = with_gradients(attend_triton, arguments, gradient)
    moved = {name: lay_out(tensor) for name, tensor in arguments.items()}
    for name, result in with_gradients(attend_triton, moved, lay_out(gradient)).items():
        assert torch.equal(result, expected[name]), name


def test_an_expanded_gradient():
    arguments = converted(draw_inputs(2, 2, 1, 9, 18, 16), torch.float32)
    ones = torch.ones((), device=DEVICE).expand(2, 2, 9, 16)
    expected = with_gradients(attend_triton, arguments, ones.contiguous())
    for name, result in with_gradients(attend_triton, arguments, ones).items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("sizes", [(0, 2, 1, 3, 5, 16), (2, 2, 1, 0, 5, 16), (2, 2, 1, 3, 0, 16), (2, 0, 0, 3, 5, 16)])
def test_empty_inputs(sizes):
    heads = sizes[1]
    arguments = {
        **draw_inputs(*sizes),
        "gate": draw(heads),
        "sinks": draw(heads),
        "attn_mask": draw(sizes[3], sizes[4]),
    }
    results = gradients(attend_triton, converted(arguments, torch.float32))
    for name, result in results.items():
        assert result.shape == (arguments[name].shape if name in arguments else (*sizes[:2], sizes[3], 16)), name
        assert (result == 0).all(), name


ALL = ("query", "key", "value", "gate", "attn_mask", "sinks")


def operator_inputs(queries: int = 9, **changes: Any) -> tuple[list[Any], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of the operators in float32, the output's gradient, and what the forward kept for the backward."""
    drawn = converted(draw_inputs(2, 6, 3, queries, 18, 16), torch.float32)
    given = {
        **drawn,
        "head_mask": PER_REQUEST.to(DEVICE),
        "kv_heads": None,
        "gate": draw(2, 6).float(),
        "attn_mask": draw(2, 6, queries, 18).float(),
        "sinks": draw(6).float(),
        **changes,
    }
    inputs = [*given.values(), 15, 0, 0.25, 0.0, False]
    output, ungated, logsumexp = operators.attention_triton(*inputs)
    return inputs, gradient_of(output), output if given["gate"] is None else ungated, logsumexp


def run_backward(inputs: list[Any], grad: torch.Tensor, kept: Any, wanted: set[str]) -> Arguments:
    names = [name for name in ALL if name in wanted]
    results = operators.attention_triton_backward(grad, *inputs, *kept, [name in wanted for name in ALL])
    return dict(zip(names, results, strict=True))


def test_every_gradient_alone_is_the_same():
    inputs, grad, *kept = operator_inputs()
    together = run_backward(inputs, grad, kept, set(ALL))
    assert list(together) == list(ALL)
    for name in ALL:
        alone = run_backward(inputs, grad, kept, {name})
        assert list(alone) == [name] and torch.equal(alone[name], together[name]), name


def test_only_the_kernels_that_are_needed_run(monkeypatch):
    inputs, grad, *kept = operator_inputs()
    ran: list[str] = []
    for name in ("prepare_launch", "keys_launch", "queries_launch"):
        launch = getattr(backward, name)
        monkeypatch.setattr(
            backward, name, lambda *args, _n=name, _l=launch, **more: ran.append(_n) or _l(*args, **more)
        )
    for wanted, expected in [
        ({"gate", "sinks"}, ["prepare_launch"]),
        ({"value"}, ["prepare_launch", "keys_launch"]),
        ({"attn_mask"}, ["prepare_launch", "queries_launch"]),
        (set(), []),
    ]:
        ran.clear()
        run_backward(inputs, grad, kept, wanted)
        assert ran == expected


def test_the_same_bits_in_every_run():
    inputs, grad, *kept = operator_inputs()
    first = run_backward(inputs, grad, kept, set(ALL))
    for _ in range(2):
        for name, result in run_backward(inputs, grad, kept, set(ALL)).items():
            assert torch.equal(result, first[name]), name


def test_the_same_bits_under_a_permuted_work_list(monkeypatch):
    inputs, grad, *kept = operator_inputs()
    expected = run_backward(inputs, grad, kept, set(ALL))
    in_order = backward.attention_work_list

    def permuted(*arguments: Any) -> WorkList:
        work = in_order(*arguments)
        number = int(work.count)
        assert number > 2
        work.items[:number] = work.items[:number].roll(1, 0).flip(0)
        return work

    monkeypatch.setattr(backward, "attention_work_list", permuted)
    for name, result in run_backward(inputs, grad, kept, set(ALL)).items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("other", ["all", "none", "another"])
def test_the_same_bits_under_other_requests_masks(other):
    others = {"all": [True] * 6, "none": [False] * 6, "another": [False, True, False, False, True, False]}
    changed = torch.stack([PER_REQUEST[0], torch.tensor(others[other])]).to(DEVICE)
    inputs, grad, *kept = operator_inputs()
    expected = run_backward(inputs, grad, kept, set(ALL))
    inputs, grad, *kept = operator_inputs(head_mask=changed)
    for name, result in run_backward(inputs, grad, kept, set(ALL)).items():
        assert torch.equal(result[0], expected[name][0]), name


@pytest.mark.parametrize("without", [(), ("head_mask", "gate", "attn_mask", "sinks")], ids=["all", "plain"])
def test_opcheck(without):
    inputs, grad, *kept = operator_inputs(queries=2, **{name: None for name in without})
    wanted = [tensor is not None for tensor in (*inputs[:3], *inputs[5:8])]
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.attention_triton_backward, (grad, *inputs, *kept, wanted), test_utils=utilities)
    for place in (0, 1, 2, 5, 6, 7):
        if inputs[place] is not None:
            inputs[place].requires_grad_()
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operators.attention_triton, tuple(inputs), test_utils=utilities)


def test_a_second_derivative_is_refused():
    arguments = converted(draw_inputs(1, 2, 1, 3, 5, 16), torch.float32)
    leaves = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
    (first,) = torch.autograd.grad(attend_triton(**leaves).sum(), leaves["query"], create_graph=True)
    with pytest.raises(UnsupportedError, match="backend: 'triton' has first derivatives only"):
        first.sum().backward()


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    sizes=st.tuples(st.integers(1, 34), st.integers(1, 34), st.sampled_from([8, 16, 20]), st.sampled_from([8, 16, 20])),
    span=st.tuples(st.integers(-1, 12), st.integers(-1, 12)),
    options=st.sets(st.sampled_from(["head_mask", "gate", "sinks", "softcap", "bool", "added"])),
    seed=st.integers(0, 100),
)
def test_drawn_arguments(group, kv_heads, sizes, span, options, seed):
    heads = group * kv_heads
    arguments = {**draw_inputs(2, heads, kv_heads, *sizes, seed=seed), "span": span}
    if "head_mask" in options:
        arguments["head_mask"] = draw_mask(2, heads, seed=seed)
    if "gate" in options:
        arguments["gate"] = draw(2, heads, seed=seed)
    if "sinks" in options:
        arguments["sinks"] = draw(heads, seed=seed)
    if "softcap" in options:
        arguments["softcap"] = 3.0
    if "bool" in options:
        arguments["attn_mask"] = draw_mask(1, heads, *sizes[:2], seed=seed)
    elif "added" in options:
        arguments["attn_mask"] = draw(2, 1, *sizes[:2], seed=seed)
    low = converted(arguments, torch.float32)
    exact, actual = gradients(attend_reference, converted(low, torch.float64)), gradients(attend_triton, low)
    for name, expected in exact.items():
        # Sums of some hundred products near 1, at 6e-8 each.
        assert (actual[name] - expected).abs().max() <= 1e-5 * (1 + expected.abs().max()), name

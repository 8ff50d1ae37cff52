"""Does the sdpa backend compute what the reference computes, on every shape, and only on the kept heads?"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_heads.ops.attention import attention, sdpa
from sparse_heads.testing import assert_close_to_reference, random_attention_inputs

pytestmark = pytest.mark.usefixtures("one_thread")


def random_head_mask(batch: int, heads: int, per_request: bool, seed: int = 0) -> torch.Tensor:
    """Half of the heads, and at least the first."""
    generator = torch.Generator().manual_seed(seed)
    head_mask = torch.rand((batch, heads) if per_request else (heads,), generator=generator) < 0.5
    head_mask[..., 0] = True
    return head_mask


def random_arguments(
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    *,
    per_request: bool,
    gated: bool,
    masked: str | None,
    mask_shape: tuple[bool, bool, bool] = (True, True, True),
    seed: int = 0,
) -> dict:
    """float64 arguments for `attention`; `mask_shape` says over which of B, H and T the attention mask varies."""
    drawn = random_attention_inputs(batch, heads, kv_heads, queries, keys, 8, 6, dtype=torch.float64, seed=seed)
    arguments = dict(zip(("query", "key", "value"), drawn, strict=True))
    arguments["head_mask"] = random_head_mask(batch, heads, per_request, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    if gated:
        shape = (batch, heads) if per_request else (heads,)
        arguments["gate"] = torch.randn(shape, dtype=torch.float64, generator=generator)
    if masked is not None:
        whole = (batch, heads, queries)
        shape = (*(size if vary else 1 for size, vary in zip(whole, mask_shape, strict=True)), keys)
        added = torch.randn(shape, dtype=torch.float64, generator=generator)
        arguments["attn_mask"] = added > -0.5 if masked == "bool" else added
    return arguments


def run(arguments: dict, dtype: torch.dtype, **options) -> dict[str, torch.Tensor]:
    """The output and every gradient, computed in `dtype` from the same float64 numbers rounded to it."""
    leaves = {
        name: tensor if tensor.dtype == torch.bool else tensor.detach().to(dtype).requires_grad_()
        for name, tensor in arguments.items()
    }
    output = attention(**leaves, **options)
    generator = torch.Generator().manual_seed(9)
    output.backward(torch.randn(output.shape, generator=generator, dtype=torch.float64).to(dtype))
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    return {"output": output.detach(), **gradients}


def assert_same(arguments: dict, dtype: torch.dtype, **options) -> None:
    """sdpa in `dtype` against the reference in float64, within one rounding for each term of a sum."""
    actual = run(arguments, dtype, backend="sdpa", **options)
    expected = run(arguments, torch.float64, backend="reference", **options)
    terms = arguments["query"].shape[-1] + max(arguments["query"].numel(), arguments["key"].numel())
    for name, exact in expected.items():
        largest = exact.abs().max().item() if exact.numel() else 0.0
        bound = terms * torch.finfo(dtype).eps * max(1.0, largest)
        assert ((actual[name].double() - exact).abs() <= bound).all(), name


@pytest.mark.parametrize("per_request", [False, True], ids=["shared", "per-request"])
@pytest.mark.parametrize("queries", [1, 3, 17, 19])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": 3}, {"window": (4, 2)}], ids=str)
def test_matches_the_reference(queries, kv_heads, options, per_request):
    arguments = random_arguments(3, 6, kv_heads, queries, 17, per_request=per_request, gated=True, masked=None)
    assert_same(arguments, torch.float64, **options)


@pytest.mark.parametrize("per_request", [False, True], ids=["shared", "per-request"])
@pytest.mark.parametrize("masked", ["bool", "added"])
@pytest.mark.parametrize("over_batch", [False, True])
@pytest.mark.parametrize("over_heads", [False, True])
@pytest.mark.parametrize("over_queries", [False, True])
def test_attention_masks_follow_their_heads(masked, over_batch, over_heads, over_queries, per_request):
    varies = (over_batch, over_heads, over_queries)
    arguments = random_arguments(3, 6, 2, 7, 9, per_request=per_request, gated=False, masked=masked, mask_shape=varies)
    assert_same(arguments, torch.float64, is_causal=True)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_matches_the_reference_on_any_arguments(data):
    kv_heads, group = data.draw(st.integers(1, 4), "H_kv"), data.draw(st.integers(1, 3), "group")
    batch, queries, keys = (data.draw(st.integers(0, most), name) for most, name in ((3, "B"), (9, "T"), (9, "S")))
    heads = kv_heads * group
    per_request = data.draw(st.booleans(), "per request")
    size = batch * heads if per_request else heads
    arguments = random_arguments(
        batch, heads, kv_heads, queries, keys,
        per_request=per_request,
        gated=data.draw(st.booleans(), "gated"),
        masked=data.draw(st.sampled_from([None, "bool", "added"]), "attn_mask"),
        mask_shape=data.draw(st.tuples(st.booleans(), st.booleans(), st.booleans()), "mask over B, H, T"),
        seed=data.draw(st.integers(0, 99), "seed"),
    )  # fmt: skip
    head_mask = data.draw(st.lists(st.booleans(), min_size=size, max_size=size), "head_mask")
    arguments["head_mask"] = torch.tensor(head_mask, dtype=torch.bool).view_as(arguments["head_mask"])
    sides = st.integers(-1, 9)
    assert_same(
        arguments,
        torch.float64,
        is_causal=data.draw(st.booleans(), "is_causal"),
        window=data.draw(st.one_of(st.none(), st.just(-1), st.integers(1, 9), st.tuples(sides, sides)), "window"),
        scale=data.draw(st.sampled_from([None, 0.5, -1]), "scale"),
    )


@pytest.mark.parametrize("per_request", [False, True], ids=["shared", "per-request"])
@pytest.mark.parametrize("queries", [1, 17, 63])
@pytest.mark.parametrize("masked", [None, "bool", "added"])
def test_float32_is_within_its_roundings(per_request, queries, masked):
    arguments = random_arguments(2, 6, 3, queries, 63, per_request=per_request, gated=True, masked=masked)
    assert_same(rounded_to(torch.float32, arguments), torch.float32, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("per_request", [False, True], ids=["shared", "per-request"])
@pytest.mark.parametrize("queries", [1, 17, 63])
@pytest.mark.parametrize("masked", [None, "bool", "added"])
def test_is_as_good_as_its_precision_allows(dtype, per_request, queries, masked):
    arguments = random_arguments(2, 6, 3, queries, 63, per_request=per_request, gated=True, masked=masked)
    arguments = rounded_to(dtype, arguments)
    actual = run(arguments, dtype, backend="sdpa", is_causal=True)
    exact = run(arguments, torch.float64, backend="reference", is_causal=True)
    eager = run_eagerly(arguments, dtype)
    for name in actual:
        assert_close_to_reference(actual[name], eager[name], exact[name])


def rounded_to(dtype: torch.dtype, arguments: dict) -> dict:
    """float64 arguments that `dtype` holds exactly."""
    return {name: t if t.dtype == torch.bool else t.detach().to(dtype).double() for name, t in arguments.items()}


def run_eagerly(arguments: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`run` with plain operators, every intermediate result in `dtype`, all heads computed and then zeroed."""
    leaves = {
        name: tensor if tensor.dtype == torch.bool else tensor.detach().to(dtype).requires_grad_()
        for name, tensor in arguments.items()
    }
    query, key, value = leaves["query"], leaves["key"], leaves["value"]
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    queries, keys = query.shape[2], key.shape[2]
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if "attn_mask" in leaves and leaves["attn_mask"].dtype == torch.bool:
        visible = visible & leaves["attn_mask"]
    elif "attn_mask" in leaves:
        scores = scores + leaves["attn_mask"]
    scores = scores.masked_fill(~visible, torch.finfo(dtype).min)
    output = torch.where(visible.any(-1, keepdim=True), scores.softmax(-1) @ value, 0.0)
    output = output * (leaves["gate"] * leaves["head_mask"])[..., None, None]
    generator = torch.Generator().manual_seed(9)
    output.backward(torch.randn(output.shape, generator=generator, dtype=torch.float64).to(dtype))
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    return {"output": output.detach(), **gradients}


@pytest.fixture
def seen_by_torch(monkeypatch) -> list[tuple[torch.Size, torch.Size, dict]]:
    """What PyTorch's SDPA is called with: shapes of query and key, and the options."""
    calls = []
    original = sdpa.scaled_dot_product_attention

    def spy(query, key, value, **options):
        calls.append((tuple(query.shape), tuple(key.shape), options))
        return original(query, key, value, **options)

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", spy)
    return calls


def test_only_kept_heads_reach_torch(seen_by_torch):
    inputs = random_attention_inputs(3, 6, 2, 4, 5, 8)
    attention(*inputs, torch.tensor([True, False, False, False, True, True]), backend="sdpa")
    attention(*inputs, torch.tensor([[True] * 6, [False] * 6, [False] * 5 + [True]]), backend="sdpa")
    assert [call[:2] for call in seen_by_torch] == [((3, 3, 4, 8), (3, 3, 5, 8)), ((7, 1, 4, 8), (7, 1, 5, 8))]


def test_nothing_is_gathered_when_all_heads_run(seen_by_torch):
    inputs = random_attention_inputs(3, 6, 2, 4, 5, 8)
    attention(*inputs, backend="sdpa")
    attention(*inputs, torch.ones(6, dtype=torch.bool), backend="sdpa")
    assert [call[:2] for call in seen_by_torch] == [((3, 6, 4, 8), (3, 2, 5, 8))] * 2


def test_masks_are_built_only_where_they_hide_something(seen_by_torch):
    square, last = random_attention_inputs(1, 2, 2, 4, 4, 8), random_attention_inputs(1, 2, 2, 1, 4, 8)
    attention(*square, is_causal=True, backend="sdpa")
    attention(*square, window=9, is_causal=True, backend="sdpa")
    attention(*last, is_causal=True, backend="sdpa")
    attention(*last, window=4, backend="sdpa")
    attention(*square, window=(3, 3), backend="sdpa")
    masks = [(options.get("is_causal", False), options.get("attn_mask") is not None) for *_, options in seen_by_torch]
    assert masks == [(True, False), (False, True), (False, False), (False, False), (False, False)]


@pytest.mark.parametrize("masked", ["bool", "added"])
def test_torch_gets_no_row_without_a_key(seen_by_torch, masked):
    """What comes of such a row differs between torch's kernels."""
    allowed = torch.tensor([True, False, True])[:, None].expand(3, 5)
    added = torch.zeros(3, 5).masked_fill(~allowed, -torch.inf)
    attn_mask = allowed if masked == "bool" else added
    attention(*random_attention_inputs(1, 2, 2, 3, 5, 4), attn_mask=attn_mask, window=2, backend="sdpa")
    ((_, _, options),) = seen_by_torch
    mask = options["attn_mask"]
    assert (mask if masked == "bool" else mask > -torch.inf).any(-1).all()

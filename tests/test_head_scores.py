"""Scores: what they hold and refuse, and which heads a budget gets."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from subset_inputs import LAYERS, layer, scores

from sparse_heads.errors import InvalidArgumentError, InvalidTypeError
from sparse_heads.heads import HeadScores, Layers

few_examples = settings(max_examples=40, deadline=None)
SCORES = torch.tensor([[4.0, 1.0, 1.0, 3.0], [1.0, 5.0, 2.0, 99.0], [0.0, 1.0, -1.0, 6.0]])


def test_scores_hold_a_copy_with_minus_infinity_in_the_padding():
    tensor = SCORES.clone()
    tensor[1, 3] = math.nan
    scores = HeadScores(tensor.requires_grad_(), LAYERS)
    expected = SCORES.clone()
    expected[1, 3] = -math.inf
    scores.tensor.zero_()
    assert torch.equal(scores.tensor, expected) and not scores.tensor.requires_grad


@pytest.mark.parametrize("dtype, stored", [("float16", "float32"), ("bfloat16", "float32"), ("float64", "float64")])
def test_scores_keep_float64_and_widen_halves(dtype, stored):
    assert HeadScores(SCORES.to(getattr(torch, dtype)), LAYERS).tensor.dtype == getattr(torch, stored)


@pytest.mark.parametrize(
    "tensor, error, message",
    [
        (SCORES.long(), InvalidTypeError, "tensor: wanted a float tensor, got a int64 tensor"),
        (SCORES.tolist(), InvalidTypeError, "tensor: wanted a float tensor, got list"),
        (SCORES[None], InvalidArgumentError, r"tensor: wanted shape \[3, 4\], got a float32 tensor \[1, 3, 4\]"),
        (SCORES / 0, InvalidArgumentError, r"tensor: wanted no NaN, got one for head 0 of layer 'block.1.self'"),
    ],
)
def test_scores_refuse(tensor, error, message):
    with pytest.raises(error, match=message):
        HeadScores(tensor, LAYERS)


def test_top_breaks_ties_by_layer_then_head():
    scores = HeadScores(SCORES, LAYERS)  # the six best are clear; four heads share 1.0
    assert list(scores.top(5).kept().values()) == [[0, 3], [1, 2], [3]]
    assert list(scores.top(6).kept().values()) == [[0, 1, 3], [1, 2], [3]]
    assert list(scores.top(8).kept().values()) == [[0, 1, 2, 3], [0, 1, 2], [3]]
    equal = HeadScores(torch.zeros(3, 4), LAYERS)
    assert list(equal.top(6).kept().values()) == [[0, 1, 2, 3], [0, 1], []]


def test_infinite_scores_are_ranked_and_padding_is_never_chosen():
    tensor = torch.full((3, 4), -math.inf)
    tensor[2, 2] = math.inf
    scores = HeadScores(tensor, LAYERS)
    assert list(scores.top(1).kept().values()) == [[], [], [2]]
    assert list(scores.top(8).kept().values()) == [[0, 1, 2, 3], [0, 1, 2], [2]]
    assert scores.top(11).count() == 11


def test_min_per_layer_comes_first():
    scores = HeadScores(SCORES, LAYERS)
    assert list(scores.top(3).kept().values()) == [[0], [1], [3]]
    assert list(scores.top(6, min_per_layer=2).kept().values()) == [[0, 3], [1, 2], [1, 3]]
    assert list(scores.top(7, min_per_layer=2).kept().values()) == [[0, 1, 3], [1, 2], [1, 3]]
    with pytest.raises(InvalidArgumentError, match="k: wanted 6 to 11 heads with these scores and options, got int 5"):
        scores.top(5, min_per_layer=2)
    with pytest.raises(
        InvalidArgumentError, match=r"min_per_layer: wanted at most 3, the heads of layer 'block.0.cross'"
    ):
        scores.top(11, min_per_layer=4)
    with pytest.raises(InvalidTypeError, match=r"min_per_layer: wanted an int, got float 0.5"):
        scores.top(5, min_per_layer=0.5)


def test_kinds_restrict_the_budget_and_leave_the_others_on():
    scores = HeadScores(SCORES, LAYERS)
    assert list(scores.top(0, kinds=["self"]).kept().values()) == [[], [0, 1, 2], []]
    assert list(scores.top(2, kinds=["cross"]).kept().values()) == [[0, 1, 2, 3], [1, 2], [0, 1, 2, 3]]
    assert list(scores.top(4, kinds={"self"}, min_per_layer=2).kept().values()) == [[0, 3], [0, 1, 2], [1, 3]]
    assert scores.top(4, kinds=("self", "cross")) == scores.top(4)
    pairs = [(info.stack, info.kind) for info in LAYERS]
    assert scores.top(2, kinds=[pairs[1], pairs[1]]) == scores.top(2, kinds=["cross"])
    with pytest.raises(InvalidArgumentError, match="k: wanted 0 to 8 heads"):
        scores.top(9, kinds=["self"])


@pytest.mark.parametrize(
    "kinds, error, message",
    [
        (
            "self",
            InvalidTypeError,
            r"kinds: wanted a list of 'self', 'cross' or \(stack, kind\) pairs, or None, got str 'self'",
        ),
        (
            ["both"],
            InvalidArgumentError,
            r"kinds: wanted a list of 'self', 'cross' or \(stack, kind\) pairs, got list \['both'\]",
        ),
        ([], InvalidArgumentError, r"kinds: wanted some of \['self'\], which the model has, got list \[\]"),
        (
            ["cross"],
            InvalidArgumentError,
            r"kinds: wanted some of \['self'\], which the model has, got list \['cross'\]",
        ),
    ],
)
def test_kinds_that_make_no_sense_are_refused(kinds, error, message):
    with pytest.raises(error, match=message):
        HeadScores(SCORES[:1], Layers([layer()], "toy")).top(1, kinds=kinds)


def test_groups_are_ranked_by_their_mean_and_kept_whole():
    scores = HeadScores(SCORES, LAYERS)  # means: 2.5 2.0 | 1 5 2 | 0.5 2.5
    assert list(scores.top(1, groups=True).kept().values()) == [[], [1], []]
    assert list(scores.top(5, groups=True).kept().values()) == [[0, 1], [1], [2, 3]]
    assert list(scores.top(7, groups=True).kept().values()) == [[0, 1, 2, 3], [1], [2, 3]]
    with pytest.raises(InvalidArgumentError, match=r"k: wanted a number of heads .* nearest being 5 and 7, got int 6"):
        scores.top(6, groups=True)
    # one head a layer asks for the group that holds it
    assert list(scores.top(5, groups=True, min_per_layer=1).kept().values()) == [[0, 1], [1], [2, 3]]
    with pytest.raises(InvalidArgumentError, match="k: wanted 5 to 11 heads"):
        scores.top(4, groups=True, min_per_layer=1)


def test_a_group_with_both_infinities_has_no_mean():
    tensor = SCORES.clone()
    tensor[0, 0], tensor[0, 1] = math.inf, -math.inf
    scores = HeadScores(tensor, LAYERS)
    assert scores.top(1).kept()["block.0.self"] == [0]
    with pytest.raises(InvalidArgumentError, match=r"groups: wanted no KV group .* got one in row 0"):
        scores.top(1, groups=True)


def test_group_means_do_not_overflow_float32():
    scores = HeadScores(torch.tensor([[3e38, 3e38, 3.1e38, 3.1e38]]), Layers([layer()], "toy"))
    assert scores.top(2, groups=True).kept() == {"block.0.self": [2, 3]}


@pytest.mark.parametrize(
    "k, error, message",
    [
        (-1, InvalidArgumentError, "k: wanted at least 0, got int -1"),
        (12, InvalidArgumentError, "k: wanted 0 to 11 heads with these scores and options, got int 12"),
        (3.0, InvalidTypeError, "k: wanted an int, got float 3.0"),
        (True, InvalidTypeError, "k: wanted an int, got bool True"),
    ],
)
def test_top_refuses(k, error, message):
    with pytest.raises(error, match=message):
        HeadScores(SCORES, LAYERS).top(k)


@pytest.mark.parametrize("budgets, error", [([], InvalidArgumentError), (3, InvalidTypeError), ("3", InvalidTypeError)])
def test_budgets_refuse(budgets, error):
    with pytest.raises(error, match="budgets: wanted"):
        HeadScores(SCORES, LAYERS).budgets(budgets)


@few_examples
@given(scores())
def test_top_takes_the_first_k_of_a_plain_sort(scores):
    heads = [(row, head) for row, info in enumerate(scores.layers) for head in range(info.num_heads)]
    heads.sort(key=lambda place: (-scores.tensor[place].item(), place))
    for k in range(len(heads) + 1):
        subset = scores.top(k)
        assert subset.count() == k
        assert subset.mask.nonzero().tolist() == sorted([row, head] for row, head in heads[:k])


@few_examples
@given(scores(), st.integers(0, 1), st.sampled_from([None, "self", "cross"]))
def test_budgets_are_exact_nested_and_equal_to_top(scores, min_per_layer, kind):
    layers = scores.layers
    chosen = [info for info in layers if kind in (None, info.kind)]
    options = {"min_per_layer": min_per_layer, "kinds": None if kind is None else [kind]}
    assume(chosen)
    chosen_heads = sum(info.num_heads for info in chosen)
    budgets = list(range(min_per_layer * len(chosen), chosen_heads + 1))
    subset = scores.budgets(budgets[::-1], **options)
    assert subset.count().tolist() == [layers.num_heads - chosen_heads + k for k in budgets[::-1]]
    assert (subset.mask[1:] <= subset.mask[:-1]).all()
    assert [subset.row(row) for row in range(len(budgets))] == [scores.top(k, **options) for k in budgets[::-1]]
    assert (subset.mask.sum(-1) >= min_per_layer).all()


@few_examples
@given(scores())
def test_groups_are_nested_and_whole_at_every_reachable_budget(scores):
    reached = []
    for k in range(scores.layers.num_heads + 1):
        try:
            reached.append(scores.top(k, groups=True))
        except InvalidArgumentError as error:
            assert "nearest" in str(error)
    assert len(reached) == 1 + sum(info.num_kv_heads for info in scores.layers)
    for smaller, larger in itertools.pairwise(reached):
        assert (smaller.mask <= larger.mask).all() and larger.round_to_groups("down") == larger

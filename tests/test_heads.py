"""Subsets and layers as values: what they hold, refuse, count and where they belong."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from subset_inputs import LAYERS, layer, subsets

from sparse_heads.errors import InvalidArgumentError, InvalidTypeError, SubsetMismatchError
from sparse_heads.heads import HeadScores, HeadSubset, Layers

few_examples = settings(max_examples=40, deadline=None)
MASK = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 0, 1]]).bool()
SCORES = torch.tensor([[4.0, 1.0, 1.0, 3.0], [1.0, 5.0, 2.0, 99.0], [0.0, 1.0, -1.0, 6.0]])


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"name": 3}, InvalidTypeError, r"LayerInfo.name: wanted a str, got int 3"),
        ({"kind": "both"}, InvalidArgumentError, r"LayerInfo.kind: wanted 'self' or 'cross', got 'both'"),
        ({"num_heads": 4.0}, InvalidTypeError, r"LayerInfo.num_heads: wanted an int, got float 4.0"),
        ({"num_heads": True}, InvalidTypeError, r"LayerInfo.num_heads: wanted an int, got bool True"),
        ({"head_dim": 0}, InvalidArgumentError, r"LayerInfo.head_dim: wanted at least 1, got int 0"),
        ({"index": -1}, InvalidArgumentError, r"LayerInfo.index: wanted at least 0, got int -1"),
        (
            {"num_kv_heads": 3},
            InvalidArgumentError,
            r"LayerInfo.num_kv_heads: wanted a divisor of num_heads 4, got int 3",
        ),
    ],
)
def test_layer_info_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        layer(**changes)


@pytest.mark.parametrize(
    "infos, model_type, error, message",
    [
        ([], "toy", InvalidArgumentError, "layers: wanted at least one layer, got none"),
        (["block"], "toy", InvalidTypeError, "layers: wanted LayerInfo entries, got str 'block'"),
        ([layer(0, name="a"), layer(1, name="a")], "toy", InvalidArgumentError, "every name once, got 'a' twice"),
        ([layer(0, name="a"), layer(0, name="b")], "toy", InvalidArgumentError, "every key once, got .* twice"),
        ([layer()], None, InvalidTypeError, "model_type: wanted a str, got NoneType None"),
    ],
)
def test_layers_refuse(infos, model_type, error, message):
    with pytest.raises(error, match=message):
        Layers(infos, model_type)


def test_layers_are_a_tuple_that_knows_its_model():
    assert (len(LAYERS), LAYERS.max_heads, LAYERS.max_kv_heads, LAYERS.num_heads) == (3, 4, 3, 11)
    assert LAYERS[1].key == ("decoder", 0, "cross")
    assert Layers(LAYERS, "toy") == LAYERS and hash(Layers(LAYERS, "toy")) == hash(LAYERS)
    assert Layers(LAYERS, "other") != LAYERS and Layers(LAYERS, "toy", "org/base") != LAYERS


@pytest.mark.parametrize("make_copy", [copy.deepcopy, copy.copy, lambda value: pickle.loads(pickle.dumps(value))])
@pytest.mark.parametrize(
    "value", [LAYERS, HeadSubset(MASK, LAYERS), HeadSubset(MASK[None], LAYERS), HeadScores(SCORES, LAYERS)]
)
def test_copies_and_pickles_are_equal(value, make_copy):
    copied = make_copy(value)
    assert type(copied) is type(value) and copied == value


def test_subset_holds_a_copy_without_padding():
    given_mask = MASK.clone()
    given_mask[1, 3] = True
    subset = HeadSubset(given_mask, LAYERS)
    given_mask.fill_(False)
    subset.mask.fill_(False)
    assert torch.equal(subset.mask, MASK)
    assert subset.count() == 6 and type(subset.count()) is int
    assert subset.layers is LAYERS and not subset.per_request


def test_subset_takes_non_contiguous_masks_and_ignores_the_default_device():
    columns = torch.stack([MASK.T, ~MASK.T], -1)[..., 0].T
    with torch.device("meta"):
        subset = HeadSubset(columns, LAYERS)
        best = HeadScores(SCORES, LAYERS).top(2)
    assert torch.equal(subset.mask, MASK) and subset.mask.is_contiguous()
    assert best.kept() == {"block.0.self": [], "block.0.cross": [1], "block.1.self": [3]}


def test_per_request_subset_counts_and_rows():
    subset = HeadSubset(torch.stack([MASK, torch.zeros_like(MASK), torch.ones_like(MASK)]), LAYERS)
    assert subset.per_request
    assert subset.count().dtype == torch.int64 and subset.count().tolist() == [6, 0, 11]
    assert subset.row(0) == HeadSubset(MASK, LAYERS)
    with pytest.raises(InvalidArgumentError, match="request: wanted below 3, the number of requests, got int 3"):
        subset.row(3)
    with pytest.raises(InvalidArgumentError, match="request: wanted at least 0"):
        subset.row(-1)
    with pytest.raises(InvalidArgumentError, match="subset: wanted one shared by the batch"):
        subset.kept()
    with pytest.raises(InvalidArgumentError, match="subset: wanted one with a row a request"):
        subset.row(0).row(0)


@pytest.mark.parametrize(
    "mask, error, message",
    [
        (MASK.tolist(), InvalidTypeError, "mask: wanted a bool tensor, got list"),
        (MASK.int(), InvalidTypeError, "mask: wanted a bool tensor, got a int32 tensor"),
        (MASK.float(), InvalidTypeError, "mask: wanted a bool tensor, got a float32 tensor"),
        (
            MASK[:2],
            InvalidArgumentError,
            r"mask: wanted shape \[3, 4\] or \[requests, 3, 4\], got a bool tensor \[2, 4\]",
        ),
        (MASK[:, :3], InvalidArgumentError, r"mask: wanted shape .* got a bool tensor \[3, 3\]"),
        (MASK[0], InvalidArgumentError, r"mask: wanted shape .* got a bool tensor \[4\]"),
        (MASK[None, None], InvalidArgumentError, r"mask: wanted shape .* got a bool tensor \[1, 1, 3, 4\]"),
        (MASK[None][:0], InvalidArgumentError, r"mask: wanted shape .* got a bool tensor \[0, 3, 4\]"),
    ],
)
def test_subset_refuses(mask, error, message):
    with pytest.raises(error, match=message):
        HeadSubset(mask, LAYERS)


def test_layers_are_checked_wherever_they_are_taken():
    for make in (
        lambda: HeadSubset(MASK, list(LAYERS)),
        lambda: HeadSubset.from_kept({}, None),
        lambda: HeadScores(SCORES, tuple(LAYERS)),
        lambda: HeadSubset(MASK, LAYERS).check_belongs("bert"),
    ):
        with pytest.raises(InvalidTypeError, match="layers: wanted a Layers"):
            make()


def test_equality_is_by_value_and_there_is_no_hash():
    subset = HeadSubset(MASK, LAYERS)
    assert subset == HeadSubset(MASK.clone(), LAYERS)
    assert subset != HeadSubset(~MASK, LAYERS) and subset != HeadSubset(MASK[None], LAYERS)
    assert subset != HeadSubset(MASK, Layers(LAYERS, "other")) and subset != MASK.tolist()
    assert HeadScores(SCORES, LAYERS) != HeadScores(SCORES.double(), LAYERS)
    for value in (subset, HeadScores(SCORES, LAYERS)):
        with pytest.raises(TypeError, match="unhashable"):
            hash(value)


def test_reprs_are_short():
    assert repr(HeadSubset(MASK, LAYERS)) == "HeadSubset(6 of 11 heads, 3 layers)"
    assert (
        repr(HeadSubset(torch.stack([MASK, ~MASK]), LAYERS)) == "HeadSubset(2 requests, 5 to 6 of 11 heads, 3 layers)"
    )
    assert repr(HeadScores(SCORES.half(), LAYERS)) == "HeadScores(11 heads, 3 layers, float32)"


def test_from_kept_by_name_and_row():
    subset = HeadSubset.from_kept({0: (3, 0), "block.0.cross": []}, LAYERS)
    assert subset.kept() == {"block.0.self": [0, 3], "block.0.cross": [], "block.1.self": [0, 1, 2, 3]}
    assert HeadSubset.from_kept({}, LAYERS).count() == 11
    assert HeadSubset.from_kept({2: torch.tensor([1])}, LAYERS).kept()["block.1.self"] == [1]


@pytest.mark.parametrize(
    "kept, error, message",
    [
        ([[0]], InvalidTypeError, "kept: wanted a dict"),
        (
            {"block.9.self": [0]},
            InvalidArgumentError,
            "names of attention layers such as 'block.0.self', got 'block.9.self'",
        ),
        ({3: [0]}, InvalidArgumentError, "kept: wanted rows of layers below 3, got int 3"),
        ({-1: [0]}, InvalidArgumentError, "kept: wanted at least 0, got int -1"),
        ({True: [0]}, InvalidTypeError, "kept: wanted an int, got bool True"),
        (
            {0: [0], "block.0.self": [1]},
            InvalidArgumentError,
            "kept: wanted each layer once, got 'block.0.self' by name",
        ),
        ({0: [4]}, InvalidArgumentError, r"kept\['block.0.self'\]: wanted heads below 4, got int 4"),
        ({1: [3]}, InvalidArgumentError, r"kept\['block.0.cross'\]: wanted heads below 3, got int 3"),
        ({0: [-1]}, InvalidArgumentError, r"kept\['block.0.self'\]: wanted at least 0, got int -1"),
        ({0: [1, 1]}, InvalidArgumentError, r"kept\['block.0.self'\]: wanted each head once, got list \[1, 1\]"),
        ({0: [1.0]}, InvalidTypeError, r"kept\['block.0.self'\]: wanted an int, got float 1.0"),
        ({0: [True, False]}, InvalidTypeError, r"kept\['block.0.self'\]: wanted an int, got bool True"),
        ({0: 2}, InvalidTypeError, r"kept\['block.0.self'\]: wanted a list of head indices, got int 2"),
        ({0: torch.tensor(2)}, InvalidTypeError, r"kept\['block.0.self'\]: wanted a list of head indices, got int 2"),
        ({0: "01"}, InvalidTypeError, r"kept\['block.0.self'\]: wanted a list of head indices, got str '01'"),
    ],
)
def test_from_kept_refuses(kept, error, message):
    with pytest.raises(error, match=message):
        HeadSubset.from_kept(kept, LAYERS)


@few_examples
@given(subsets(shared_only=True))
def test_from_kept_and_kept_are_inverse(subset):
    kept = subset.kept()
    assert HeadSubset.from_kept(kept, subset.layers) == subset
    assert HeadSubset.from_kept(dict(enumerate(kept.values())), subset.layers) == subset
    assert sum(len(heads) for heads in kept.values()) == subset.count()


def test_groups_and_rounding():
    subset = HeadSubset(MASK, LAYERS)
    assert subset.groups().int().tolist() == [[1, 0, 0], [0, 1, 1], [1, 1, 0]]
    assert list(subset.round_to_groups("up").kept().values()) == [[0, 1], [1, 2], [0, 1, 2, 3]]
    assert list(subset.round_to_groups("down").kept().values()) == [[], [1, 2], [0, 1]]
    with pytest.raises(InvalidArgumentError, match="direction: wanted 'up' or 'down', got str 'nearest'"):
        subset.round_to_groups("nearest")


@few_examples
@given(subsets())
def test_rounding_brackets_the_subset(subset):
    up, down = subset.round_to_groups("up"), subset.round_to_groups("down")
    assert (down.mask <= subset.mask).all() and (subset.mask <= up.mask).all()
    assert torch.equal(up.groups(), subset.groups())
    assert up.round_to_groups("down") == up and down.round_to_groups("up") == down
    if subset.per_request:
        rows = [subset.row(request) for request in range(len(subset.mask))]
        assert torch.equal(subset.groups(), torch.stack([row.groups() for row in rows]))
        assert subset.cache_bytes(3) == [row.cache_bytes(3) for row in rows]


def test_cache_bytes():
    subset = HeadSubset(MASK, LAYERS)
    one_group = 7 * (8 + 16) * 4
    assert subset.cache_bytes(7) == 5 * one_group
    assert subset.cache_bytes(7, torch.bfloat16) == 5 * one_group // 2
    assert HeadSubset(torch.stack([MASK, ~MASK | True]), LAYERS).cache_bytes(7) == [5 * one_group, 7 * one_group]
    shared = Layers([layer(uses=12)], "toy")
    assert HeadSubset(MASK[:1], shared).cache_bytes(7) == 12 * one_group
    with pytest.raises(InvalidArgumentError, match="length: wanted at least 0, got int -1"):
        subset.cache_bytes(-1)
    with pytest.raises(InvalidTypeError, match=r"dtype: wanted a torch.dtype, got str 'float32'"):
        subset.cache_bytes(1, "float32")


def test_a_subset_belongs_by_keys_and_counts_whatever_the_names_and_the_order():
    renamed = Layers([layer(1, name="x"), layer(0, name="y"), layer(0, "cross", 3, 3, name="z")], "toy", "org/other")
    moved = HeadSubset(MASK, LAYERS).remap(renamed)
    assert moved.kept() == {"x": [0, 1, 3], "y": [0], "z": [1, 2]} and moved.layers is renamed
    both = HeadSubset(torch.stack([MASK, ~MASK]), LAYERS).remap(renamed)
    assert both.row(0) == moved and both.remap(LAYERS) == HeadSubset(torch.stack([MASK, ~MASK]), LAYERS)


@pytest.mark.parametrize(
    "others, model_type, message",
    [
        (LAYERS, "electra", "model type 'toy' against 'electra'"),
        (LAYERS[:2], "toy", "3 attention layers against 2"),
        (
            [*LAYERS[:2], layer(5)],
            "toy",
            r"layer \(stack, index, kind\) = \('decoder', 1, 'self'\), which the other lacks",
        ),
        ([*LAYERS[:2], layer(1, stack="encoder")], "toy", r"\('decoder', 1, 'self'\), which the other lacks"),
        ([*LAYERS[:2], layer(1, num_heads=8)], "toy", r"num_heads 4 against 8 in layer .*\('decoder', 1, 'self'\)"),
        ([*LAYERS[:2], layer(1, num_kv_heads=4)], "toy", r"num_kv_heads 2 against 4 in layer"),
    ],
)
def test_a_subset_of_another_model_is_refused(others, model_type, message):
    subset, others = HeadSubset(MASK, LAYERS), Layers(others, model_type)
    for use in (subset.check_belongs, subset.remap):
        with pytest.raises(SubsetMismatchError, match=message):
            use(others)

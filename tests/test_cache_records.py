"""Does what a cache knows about its heads travel with it: copies, crops, rows in another order?"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cache_inputs import IDS, INNER, OTHER, SUBSETS, WIDE, Pair, attached, pair
from generation_inputs import TIGHT, per_request, request_masks

import sparse_heads as sh
from sparse_heads.errors import SparseHeadsError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("first", ["scattered", "scattered, per request"])
def test_a_copied_cache(first):
    sequence = pair()
    sequence.step(SUBSETS[first], 5)
    for duplicate in (copy.deepcopy, copy.copy, lambda cache: pickle.loads(pickle.dumps(cache))):
        other = Pair(sequence.model, sequence.handle, sequence.oracle)
        other.cache, other.dense_cache = duplicate(sequence.cache), copy.deepcopy(sequence.dense_cache)
        other.length = 5
        other.refuse(None)
        if duplicate is not copy.copy:
            other.step(SUBSETS[first], 2)
            assert sequence.cache.get_seq_length() == 5
    sequence.step(SUBSETS[first], 1)


@pytest.mark.parametrize("first", ["scattered", "scattered, per request"])
def test_a_cropped_cache(first):
    sequence = pair()
    sequence.step(SUBSETS[first], 7)
    sequence.both(lambda cache: cache.crop(-3))
    sequence.length = 4
    sequence.refuse(None)
    sequence.step(SUBSETS[first], 2)


REORDERINGS = {
    "reorder": ([2, 0, 1], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1]))),
    "reorder with repeats": ([1, 1, 0], lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0]))),
    "select": ([2, 0], lambda cache: cache.batch_select_indices(torch.tensor([2, 0]))),
    "repeat": ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
}


@pytest.mark.parametrize("way", REORDERINGS)
def test_the_record_follows_the_rows(way):
    rows, change = REORDERINGS[way]
    first = request_masks()["scattered"]
    sequence = pair()
    sequence.step(first, 5)
    sequence.both(change)
    sequence.rows = torch.tensor(rows)
    sequence.step(first[rows], 1)
    sequence.step(first[rows] & first.all(0), 1)
    if way == "repeat":
        sequence.step(first, 1)
    for row in range(len(rows)):
        grown = first[rows].clone()
        missing = (~grown[row]).nonzero()[0].tolist()
        grown[row, missing[0], missing[1]] = True
        sequence.refuse(grown, f"model.layers.{missing[0]}.self_attn")
    sequence.step(first[rows], 1)


@pytest.mark.parametrize("way", REORDERINGS)
def test_rows_of_a_shared_subset_may_be_in_any_order(way):
    rows, change = REORDERINGS[way]
    sequence = pair()
    sequence.step(WIDE, 5)
    sequence.both(change)
    sequence.rows = torch.tensor(rows)
    sequence.step(WIDE, 1)
    sequence.step(per_request(INNER, len(rows)), 1)
    sequence.refuse(OTHER, "model.layers.1.self_attn")


def test_static_caches_reorder():
    first = request_masks()["scattered"]
    sequence = pair(kind="static")
    sequence.step(first, 5)
    sequence.both(REORDERINGS["reorder"][1])
    sequence.rows = torch.tensor([2, 0, 1])
    sequence.refuse(first)
    sequence.step(first[[2, 0, 1]], 1)


@pytest.mark.parametrize("subset", ["scattered", "first layer empty", "scattered, per request"])
@pytest.mark.parametrize("part", ["the whole", "the inner"])
def test_a_cache_that_the_model_makes(subset, part):
    model, handle, oracle = attached()
    oracle.head_mask = SUBSETS[subset]
    call, dense = (model, oracle) if part == "the whole" else (model.model, oracle.model)
    handle.set_heads(SUBSETS[subset])
    for given in ({}, {"use_cache": True}):
        first, wanted = call(IDS[:, :7], **given), dense(IDS[:, :7])
        result = call(IDS[:, 7:], past_key_values=first.past_key_values)
        torch.testing.assert_close(result[0], dense(IDS[:, 7:], past_key_values=wanted.past_key_values)[0], **TIGHT)
        with handle.use_heads(None), pytest.raises(SparseHeadsError, match="past_key_values"):
            call(IDS[:, :1], past_key_values=first.past_key_values)
    assert call(IDS, use_cache=False).past_key_values is None


def test_a_cache_handed_in_by_position():
    sequence = pair()
    sequence.step(WIDE, 5)
    with sequence.handle.use_heads(INNER):
        by_name = sequence.model(IDS[:, 5:6], past_key_values=copy.deepcopy(sequence.cache)).logits
        by_place = sequence.model(IDS[:, 5:6], None, None, sequence.cache).logits
    assert torch.equal(by_place, by_name)


def test_a_cache_outlives_the_handle():
    """Everything was stored: the plain model, or another handle, continues."""
    sequence = pair(kv="all")
    sequence.step(WIDE, 5)
    sequence.handle.detach()
    sequence.oracle.head_mask = torch.ones(3, 4)
    ids = IDS[:, 5:7]
    results = [
        each(ids, past_key_values=cache).logits
        for each, cache in ((sequence.model, sequence.cache), (sequence.oracle, sequence.dense_cache))
    ]
    torch.testing.assert_close(*results, **TIGHT)
    sequence.handle, sequence.length = sh.attach(sequence.model), 7
    sequence.step(OTHER, 1)


def test_a_record_is_read_by_a_later_handle():
    sequence = pair()
    sequence.step(WIDE, 5)
    sequence.handle.detach()
    sequence.handle = sh.attach(sequence.model)
    sequence.refuse(OTHER, "model.layers.1.self_attn")
    sequence.step(INNER, 1)

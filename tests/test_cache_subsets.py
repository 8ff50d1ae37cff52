"""Which subsets may continue a cache, and are all others refused?"""

from __future__ import annotations

import copy

import pytest
import torch
from cache_inputs import IDS, INNER, OTHER, SUBSETS, WIDE, Pair, kept, new_cache, pair
from generation_inputs import gated_copy, per_request, request_masks
from models import build

import sparse_heads as sh
from sparse_heads.errors import InvalidArgumentError, SparseHeadsError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("layout", ["auto", "wide", "core"])
def test_shrinking_and_growing_back(kind, layout):
    sequence = pair(kind=kind, layout=layout)
    for subset, tokens in [(WIDE, 5), (INNER, 1), (WIDE, 2), (kept([], [], []), 1), (INNER, 1), (WIDE, 1)]:
        sequence.step(subset, tokens)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_uneven_groups_shrink_and_grow_back_to_any_head_of_what_is_stored(kind):
    """Keys and values are stored by group: another head of the same group may follow."""
    sequence = pair("gqa", kind)
    first = torch.zeros(3, 8, dtype=torch.bool)
    first[:, [0, 5, 6]] = True
    other_head = torch.zeros(3, 8, dtype=torch.bool)
    other_head[:, [1, 4, 7]] = True
    for subset, tokens in [(first, 5), (other_head, 1), (first & False, 1), (first | other_head, 2), (first, 1)]:
        sequence.step(subset, tokens)
    grown = first.clone()
    grown[1, 2] = True
    sequence.refuse(grown, "model.layers.1.self_attn")
    sequence.step(first, 1)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("layout", ["auto", "wide"])
@pytest.mark.parametrize("asked, layer, head", [(OTHER, 1, 3), (kept([0, 1, 2], [1, 2], [0, 3]), 0, 2), (None, 0, 2)])
def test_heads_that_were_not_stored_are_refused(kind, layout, asked, layer, head):
    """Also when their number is equal, and when they are all heads."""
    sequence = pair(kind=kind, layout=layout)
    sequence.step(WIDE, 5)
    sequence.refuse(asked, f"model.layers.{layer}.self_attn", str(head))
    sequence.step(WIDE, 1)
    sequence.step(INNER, 1)
    sequence.refuse(asked, f"model.layers.{layer}.self_attn", str(head))


def test_heads_that_were_not_stored_are_refused_wherever_the_subset_comes_from():
    sequence = pair()
    sequence.step(WIDE, 5)
    model, handle = sequence.model, sequence.handle
    for choose in (lambda: model, lambda: handle.bind(OTHER), lambda: handle.bind(None)):
        handle.set_heads(OTHER)
        with pytest.raises(SparseHeadsError, match="past_key_values"):
            choose()(IDS[:, :1], past_key_values=sequence.cache)
    handle.set_heads(None)
    with pytest.raises(SparseHeadsError, match="past_key_values"):
        model(IDS[:, :1], None, None, sequence.cache)
    with pytest.raises(SparseHeadsError, match="past_key_values"):
        model.model(IDS[:, :1], past_key_values=sequence.cache)


def test_an_empty_layer_stores_no_head():
    sequence = pair()
    sequence.step(kept([], [1], []), 5)
    sequence.refuse(kept([0], [1], []), "model.layers.0.self_attn", "0")
    sequence.refuse(kept([], [1], [2]), "model.layers.2.self_attn", "2")
    sequence.step(kept([], [1], []), 1)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_per_request_subsets_shrink_and_grow_back(kind):
    first = request_masks()["scattered"]
    fewer = first & request_masks()["last layer empty"].flip(2)
    sequence = pair(kind=kind)
    for subset, tokens in [(first, 5), (fewer, 1), (first, 2), (first & False, 1), (first, 1)]:
        sequence.step(subset, tokens)
    swapped = first.flip(0)
    assert (swapped & ~first).any()
    sequence.refuse(swapped)
    sequence.refuse(None)
    row, layer, head = (~first).nonzero()[-1].tolist()
    grown = first.clone()
    grown[row, layer, head] = True
    sequence.refuse(grown, f"model.layers.{layer}.self_attn", str(head))
    sequence.step(first, 1)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_shared_and_per_request_subsets_follow_one_another(kind):
    first = request_masks()["scattered"]
    common = first.all(0)
    sequence = pair(kind=kind)
    for subset, tokens in [(first, 5), (common, 1), (first, 1)]:
        sequence.step(subset, tokens)
    union = first.any(0)
    sequence.refuse(union)
    sequence = pair(kind=kind)
    for subset, tokens in [(union, 5), (first, 2), (common, 1), (union, 1), (per_request(union, 3), 1)]:
        sequence.step(subset, tokens)
    sequence.refuse(per_request(~union, 3))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("layout", ["auto", "wide", "core"])
def test_any_subset_may_follow_when_everything_is_stored(kind, layout):
    sequence = pair(kind=kind, kv="all", layout=layout)
    for subset in (INNER, OTHER, None, SUBSETS["scattered, per request"], WIDE, SUBSETS["all empty"], None):
        sequence.step(subset, 1)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("before", ["attaching", "switching off"])
def test_a_cache_of_the_dense_model_holds_everything(kind, before):
    model = build("llama_lm", dtype=torch.float64)
    plain = copy.deepcopy(model)
    cache, ids = new_cache(model, kind), IDS[:, :5]
    if before == "attaching":
        model(ids, past_key_values=cache)
    handle = sh.attach(model)
    if before == "switching off":
        model(ids, past_key_values=cache)
    sequence = Pair(model, handle, gated_copy(plain, handle.layers, None), kind)
    plain(ids, past_key_values=sequence.dense_cache)
    sequence.cache, sequence.length = cache, 5
    for subset in (INNER, OTHER, SUBSETS["scattered, per request"]):
        sequence.step(subset, 1)


def test_a_dense_beginning_stores_everything_from_then_on():
    """Keys and values go on being stored for what the sequence's first subset ran: all heads may come back."""
    sequence = pair()
    for subset, tokens in [(None, 4), (WIDE, 1), (None, 1), (OTHER, 1), (SUBSETS["scattered, per request"], 1)]:
        sequence.step(subset, tokens)


@pytest.mark.parametrize("subset", ["scattered", "scattered, per request"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_an_emptied_cache_is_a_new_sequence(kind, subset):
    sequence = pair(kind=kind)
    sequence.step(WIDE, 5)
    if kind == "dynamic":
        sequence.both(lambda cache: cache.crop(-5))
    else:
        sequence.both(lambda cache: cache.reset())
    sequence.length = 0
    sequence.step(SUBSETS[subset], 4)
    sequence.step(SUBSETS[subset], 1)
    sequence.refuse(None)


def test_a_reset_dynamic_cache_is_a_new_sequence():
    sequence = pair()
    sequence.step(WIDE, 5)
    sequence.both(lambda cache: cache.reset())
    if sequence.cache.get_seq_length():
        pytest.skip("this transformers keeps the length of a dynamic cache over a reset")
    sequence.length = 0
    sequence.step(OTHER, 4)
    sequence.refuse(WIDE)


def test_one_static_cache_for_many_sequences():
    """The groups stored may become more, fewer and others."""
    sequence = pair("gqa", "static")
    generator = torch.Generator().manual_seed(10)
    for density in (0.2, 0.7, 0.0, 1.0, 0.4):
        for subset in (torch.rand(3, 8, generator=generator), torch.rand(3, 3, 8, generator=generator)):
            sequence.step(subset < density, 5)
            sequence.step(subset < density, 1)
            sequence.both(lambda cache: cache.reset())
            sequence.length = 0


def test_a_batch_of_another_size():
    first = request_masks()["scattered"]
    sequence = pair()
    sequence.step(first, 5)
    with pytest.raises(InvalidArgumentError, match="subset"), sequence.handle.use_heads(first):
        sequence.model(IDS[:2, 5:6], past_key_values=sequence.cache)
    with pytest.raises(InvalidArgumentError, match="subset"), sequence.handle.use_heads(first[:2]):
        sequence.model(IDS[:, 5:6], past_key_values=sequence.cache)
    sequence.step(first, 1)

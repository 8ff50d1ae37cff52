"""Caches under switched-off heads: does every step give what the dense oracle gives, and what is stored?"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cache_inputs import IDS, INNER, OPTIONS, SUBSETS, WIDE, Pair, attached, new_cache, pair
from generation_inputs import TIGHT, gated_copy, model_of_type, per_request, request_masks
from models import build, inputs, masks
from transformers import DynamicCache, EncoderDecoderCache

import sparse_heads as sh
from sparse_heads.errors import InvalidArgumentError, SparseHeadsError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    "options, subset",
    [({}, name) for name in SUBSETS]
    + [(options, name) for options in OPTIONS for name in ("first layer empty", "scattered, per request")],
)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_steps_are_those_of_the_oracle(options, subset, kind):
    sequence = pair(kind=kind, **options)
    for tokens in (6, 1, 1, 3, 1):
        sequence.step(SUBSETS[subset], tokens)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=str)
@pytest.mark.parametrize("requests", [0, 3])
def test_grouped_queries(kind, options, requests):
    generator = torch.Generator().manual_seed(9)
    for _ in range(2):
        subset = torch.rand(requests or 1, 3, 8, generator=generator) < 0.4
        subset[0, 0] = False
        subset = subset if requests else subset[0]
        sequence = pair("gqa", kind, **options)
        for tokens in (6, 1, 2, 1):
            sequence.step(subset, tokens)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("subset", ["scattered", "first layer empty", "scattered, per request"])
def test_a_cached_step_is_the_last_position_of_a_whole_pass(kind, subset):
    model, handle, _ = attached()
    handle.set_heads(SUBSETS[subset])
    cache = new_cache(model, kind)
    steps = [model(ids, past_key_values=cache).logits for ids in IDS.split([5, 3, 1, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), model(IDS, use_cache=False).logits, **TIGHT)


@pytest.mark.parametrize("name, total", [("llama_lm", 4), ("gqa", 4)])
def test_active_stores_the_active_groups_alone(name, total):
    model, handle, _ = attached(name)
    heads = handle.layers.max_heads
    subset = torch.zeros(3, heads, dtype=torch.bool)
    subset[1, -1], subset[2, : heads // 2 + 1] = True, True
    handle.set_heads(subset)
    cache = model(IDS, use_cache=True).past_key_values
    groups = sh.HeadSubset(subset, handle.layers).groups().sum(-1).tolist()
    assert [layer.keys.shape[1] for layer in cache.layers] == [max(1, count) for count in groups] == [1, 1, 3]
    assert [layer.values.shape[1] for layer in cache.layers] == [1, 1, 3]
    assert [cache.get_seq_length(layer) for layer in range(3)] == [12, 12, 12]


@pytest.mark.parametrize("layout", ["auto", "wide", "core"])
@pytest.mark.parametrize("subset", ["scattered", "all empty", "scattered, per request"])
def test_all_stores_everything(layout, subset):
    model, handle, oracle = attached(kv="all", layout=layout)
    handle.set_heads(SUBSETS[subset])
    cache = model(IDS).past_key_values
    assert [layer.keys.shape for layer in cache.layers] == [(3, 4, 12, 10)] * 3
    oracle.head_mask = SUBSETS[subset]
    for layer, dense in zip(cache.layers, oracle(IDS).past_key_values.layers, strict=True):
        torch.testing.assert_close(layer.keys, dense.keys, **TIGHT)
        torch.testing.assert_close(layer.values, dense.values, **TIGHT)


@pytest.mark.parametrize("subset", ["scattered", "scattered, per request"])
@pytest.mark.parametrize("length, tokens", [(8, [6, 3]), (8, [9]), (8, [8, 1])])
def test_a_static_cache_that_is_too_small(subset, length, tokens):
    model, handle, _ = attached()
    handle.set_heads(SUBSETS[subset])
    cache = new_cache(model, "static", length)
    *fitting, last = IDS[:, : sum(tokens)].split(tokens, 1)
    for ids in fitting:
        model(ids, past_key_values=cache)
    with pytest.raises(InvalidArgumentError, match=f"past_key_values.*{length}"):
        model(last, past_key_values=cache)
    assert int(cache.get_seq_length()) == sum(tokens[:-1])


@pytest.mark.parametrize("subset", ["scattered", "first layer empty", "scattered, per request"])
@pytest.mark.parametrize("name", ["llama_lm", "gqa"])
def test_a_static_cache_that_is_made_ahead_of_time(name, subset):
    """With room for every head, as transformers makes it for chunked prefill."""
    sequence = pair(name, "static")
    mask = SUBSETS[subset] if name == "llama_lm" else SUBSETS[subset].repeat_interleave(2, -1)
    sequence.cache.early_initialization(3, 4, 10, torch.float64, torch.device("cpu"))
    sequence.step(mask, 5)
    sequence.step(mask, 1)


def test_what_is_stored_and_off_is_not_read():
    """NaN in the cached keys and values of heads that are off now."""
    for kind in ("dynamic", "static"):
        for layout in ("auto", "wide", "core"):
            for subset in (INNER, per_request(INNER, 3)):
                model, handle, _ = attached(dtype=torch.float32, kv="all", layout=layout)
                handle.set_heads(WIDE)
                cache = new_cache(model, kind)
                model(IDS[:, :5], past_key_values=cache)
                poisoned = copy.deepcopy(cache)
                for row, layer in zip(INNER, poisoned.layers, strict=True):
                    layer.keys[:, ~row] = float("nan")
                    layer.values[:, ~row] = float("nan")
                with handle.use_heads(subset):
                    results = [model(IDS[:, 5:6], past_key_values=each).logits for each in (cache, poisoned)]
                assert torch.equal(*results), (kind, layout)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama_lm", "gqa"])
def test_other_requests_masks_change_no_bit_of_a_step(name, kind):
    torch.set_num_threads(2)
    model, handle, _ = attached(name, torch.float32)
    heads = handle.layers.max_heads
    generator = torch.Generator().manual_seed(3)
    own = torch.rand(3, heads, generator=generator) < 0.5
    first = None
    for neighbour in range(20):
        mask = torch.rand(3, 3, heads, generator=generator) < neighbour / 19
        mask[1] = own
        handle.set_heads(mask)
        cache = new_cache(model, kind)
        rows = [model(ids, past_key_values=cache).logits[1] for ids in IDS.split([6, 1, 1, 4], 1)]
        first = rows if first is None else first
        assert all(torch.equal(row, wanted) for row, wanted in zip(rows, first, strict=True)), neighbour


def encoder_pair(**options):
    plain, model = build("bert_cross", dtype=torch.float64), build("bert_cross", dtype=torch.float64)
    handle = sh.attach(model, **options)
    return model, handle, gated_copy(plain, handle.layers, None), inputs(model)


@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=str)
@pytest.mark.parametrize("subset", ["scattered", "first layer empty", "all empty"])
@pytest.mark.parametrize("requests", [0, 3])
def test_cross_attention(options, subset, requests):
    """Keys and values of the encoder's states are computed once, in the first step."""
    model, handle, oracle, batch = encoder_pair(**options)
    mask = request_masks(6)[subset] if requests else masks(6)[subset]
    oracle.head_mask = mask
    handle.set_heads(mask)
    encoder = {name: batch[name] for name in ("encoder_hidden_states", "encoder_attention_mask")}
    caches = [EncoderDecoderCache(DynamicCache(), DynamicCache()) for _ in range(2)]
    for ids in IDS[:, :8].split([5, 1, 2], 1):
        results = [
            each(input_ids=ids, past_key_values=cache, **encoder).logits
            for each, cache in zip((model, oracle), caches, strict=True)
        ]
        torch.testing.assert_close(*results, **TIGHT)
    if not options.get("kv") and options.get("layout") != "core":
        with handle.use_heads(None), pytest.raises(SparseHeadsError, match="past_key_values"):
            model(input_ids=IDS[:, 8:9], past_key_values=caches[0], **encoder)


@pytest.mark.parametrize(
    "model_type, changes",
    [("mistral", {"sliding_window": 4}), ("gemma2", {"sliding_window": 4, "attn_implementation": "eager"})],
)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("requests", [0, 3])
def test_sliding_windows(model_type, changes, kind, requests):
    plain, model = (model_of_type(model_type, **changes) for _ in range(2))
    handle = sh.attach(model)
    sequence = Pair(model, handle, gated_copy(plain, handle.layers, None), kind)
    mask = torch.rand(requests or 1, 3, 4, generator=torch.Generator().manual_seed(8)) < 0.5
    mask[0, 1] = False
    mask = mask if requests else mask[0]
    for tokens in (3, 1, 1, 1, 2, 1):
        sequence.step(mask, tokens)
    fewer = mask.clone()
    fewer[..., 2, :2] = False
    sequence.step(fewer, 1)


def test_two_threads_with_caches_and_subsets_of_their_own():
    model, handle, _ = attached()
    names = ["scattered", "first layer empty", "scattered, per request", "one request empty, per request"]

    def work(name):
        torch.set_num_threads(1)
        with torch.no_grad(), handle.use_heads(SUBSETS[name]):
            cache = DynamicCache()
            return [model(ids, past_key_values=cache).logits for ids in IDS.split([6, 1, 1, 1, 3], 1)]

    expected = {name: work(name) for name in names}
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for name, steps in zip(names, pool.map(work, names), strict=True):
                for step, wanted in zip(steps, expected[name], strict=True):
                    torch.testing.assert_close(step, wanted, **TIGHT)


def test_left_padding():
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, :2], mask[2, :5] = 0, 0
    for name in ("scattered", "first layer empty", "scattered, per request"):
        model, handle, oracle = attached()
        oracle.head_mask = SUBSETS[name]
        handle.set_heads(SUBSETS[name])
        caches = [DynamicCache(), DynamicCache()]
        start = 0
        for ids in IDS.split([7, 1, 1, 3], 1):
            start += ids.shape[1]
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start - ids.shape[1] : start]
            results = [
                each(ids, attention_mask=mask[:, :start], position_ids=positions, past_key_values=cache).logits
                for each, cache in zip((model, oracle), caches, strict=True)
            ]
            seen = mask[:, start - ids.shape[1] : start].bool()
            torch.testing.assert_close(results[0][seen], results[1][seen], **TIGHT)

"""Does `generate()` with heads off give the tokens of the masked copy, every request those of itself alone?"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from generation_inputs import (
    GREEDY,
    gated_copy,
    generator_model,
    greedy_alone,
    model_of_type,
    per_request,
    prompts,
    request_masks,
)
from models import masks
from transformers import DynamicCache, StaticCache

import sparse_heads as sh
from sparse_heads.errors import InvalidArgumentError, SparseHeadsError

pytestmark = pytest.mark.usefixtures("one_thread")
REQUESTS = request_masks()
SUBSETS = {name: mask for name, mask in masks(3).items() if name != "one head a layer"}
SUBSETS["last layer empty"] = SUBSETS["scattered"] & (torch.arange(3) < 2)[:, None]
SUBSETS |= {f"{name}, per request": mask for name, mask in REQUESTS.items()}
FEW = ["scattered", "first layer empty", "scattered, per request"]
WAYS = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 4},
    "static chunked": {"cache_implementation": "static", "prefill_chunk_size": 4},
    "no cache": {"use_cache": False},
}


def attached(name="llama_lm", dtype=torch.float32, **options):
    changes = {"num_attention_heads": 8, "num_key_value_heads": 4} if name == "gqa" else {}
    plain, model = generator_model(name, dtype=dtype, **changes), generator_model(name, dtype=dtype, **changes)
    return model, sh.attach(model, **options), plain


@functools.cache
def expected_tokens(subset):
    """Of three prompts with padding on the left."""
    _model, handle, plain = attached()
    return greedy_alone(plain, handle.layers, per_request(SUBSETS[subset], 3), prompts())


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens(subset, way):
    model, handle, plain = attached()
    batch = prompts()
    handle.set_heads(SUBSETS[subset])
    tokens = model.generate(**batch, **GREEDY, **WAYS[way])
    assert torch.equal(tokens, expected_tokens(subset))
    if not SUBSETS[subset].all():
        assert not torch.equal(tokens, plain.generate(**batch, **GREEDY))


@pytest.mark.parametrize("subset", FEW)
@pytest.mark.parametrize("way", ["dynamic", "static", "chunked"])
@pytest.mark.parametrize("options", [{"kv": "all"}, {"layout": "wide"}, {"layout": "core"}], ids=str)
def test_options_of_attach(subset, way, options):
    model, handle, _plain = attached(**options)
    handle.set_heads(SUBSETS[subset])
    tokens = model.generate(**prompts(), **GREEDY, **WAYS[way])
    assert torch.equal(tokens, expected_tokens(subset))


@pytest.mark.parametrize("subset", FEW)
@pytest.mark.parametrize("way", ["dynamic", "static", "chunked"])
def test_one_prompt(subset, way):
    model, handle, plain = attached()
    batch, mask = prompts(1), per_request(SUBSETS[subset], 3)[:1]
    with handle.use_heads(mask if SUBSETS[subset].dim() == 3 else mask[0]):
        tokens = model.generate(**batch, **GREEDY, **WAYS[way])
    assert torch.equal(tokens, greedy_alone(plain, handle.layers, mask, batch))


@pytest.mark.parametrize("way", ["dynamic", "static", "chunked", "static chunked"])
@pytest.mark.parametrize("kv", ["active", "all"])
@pytest.mark.parametrize("requests", [0, 3])
def test_grouped_queries(way, kv, requests):
    model, handle, plain = attached("gqa", kv=kv)
    mask = torch.rand(requests or 1, 3, 8, generator=torch.Generator().manual_seed(12)) < 0.4
    mask[0, 0], mask[0, 1, :3] = False, True
    batch = prompts()
    handle.set_heads(mask if requests else mask[0])
    tokens = model.generate(**batch, **GREEDY, **WAYS[way])
    assert torch.equal(tokens, greedy_alone(plain, handle.layers, mask.expand(3, -1, -1), batch))


@pytest.mark.parametrize("subset", FEW)
@pytest.mark.parametrize("way", ["dynamic", "static"])
def test_sampling(subset, way):
    model, handle, plain = attached(dtype=torch.float64)
    batch, options = prompts(), GREEDY | WAYS[way] | {"do_sample": True, "temperature": 3.0}
    handle.set_heads(SUBSETS[subset])
    results = []
    for each in (model, gated_copy(plain, handle.layers, SUBSETS[subset]), plain):
        torch.manual_seed(3)
        results.append(each.generate(**batch, **options))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("subset", [*FEW, "one request empty, per request"])
@pytest.mark.parametrize("way", ["dynamic", "static"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_return_sequences": 3, "do_sample": True, "temperature": 3.0},
    ],
    ids=["beams", "beams returned", "samples"],
)
def test_expanded_rows(subset, way, options):
    """Beams and samples of a prompt are rows of its request."""
    model, handle, plain = attached(dtype=torch.float64)
    batch, options = prompts(2), GREEDY | WAYS[way] | options
    mask = SUBSETS[subset][1:] if SUBSETS[subset].dim() == 3 else SUBSETS[subset]
    results = []
    for each in (model, gated_copy(plain, handle.layers, mask)):
        torch.manual_seed(3)
        with handle.use_heads(mask):
            results.append(each.generate(**batch, **options))
    assert torch.equal(*results)


@pytest.mark.parametrize("subset", ["scattered, per request", "one request empty, per request"])
def test_beams_of_a_request_are_those_of_itself_alone(subset):
    model, handle, plain = attached(dtype=torch.float64)
    batch, options = prompts(), GREEDY | {"num_beams": 3}
    handle.set_heads(SUBSETS[subset])
    tokens = model.generate(**batch, **options)
    for row, mask in enumerate(SUBSETS[subset]):
        own = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        assert torch.equal(tokens[row : row + 1], gated_copy(plain, handle.layers, mask).generate(**own, **options))


def test_other_requests_change_no_token():
    torch.set_num_threads(2)
    model, handle, _plain = attached()
    batch = prompts()
    generator = torch.Generator().manual_seed(14)
    first = None
    for neighbour in range(8):
        mask = torch.rand(3, 3, 4, generator=generator) < neighbour / 7
        mask[1] = REQUESTS["scattered"][1]
        with handle.use_heads(mask):
            result = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_logits=True)
        row = torch.stack(result.logits)[:, 1]
        first = row if first is None else first
        assert torch.equal(row, first), neighbour


@pytest.mark.parametrize("subset", FEW)
def test_ways_to_choose_the_subset(subset):
    model, handle, plain = attached()
    batch = prompts()
    expected = expected_tokens(subset)
    handle.set_heads(SUBSETS["all empty"])
    assert torch.equal(handle.bind(SUBSETS[subset]).generate(**batch, **GREEDY), expected)
    with handle.use_heads(SUBSETS[subset]):
        assert torch.equal(model.generate(**batch, **GREEDY), expected)
    with handle.use_heads(None):
        assert torch.equal(model.generate(**batch, **GREEDY), plain.generate(**batch, **GREEDY))
    handle.set_heads(SUBSETS[subset])
    assert torch.equal(model.generate(**batch, **GREEDY), expected)


@pytest.mark.parametrize("name", ["llama_lm", "gqa"])
@pytest.mark.parametrize("way", ["dynamic", "static chunked"])
def test_one_subset_after_another(name, way):
    """Also more heads than before, other heads, and all."""
    model, handle, plain = attached(name)
    generator = torch.Generator().manual_seed(16)
    batch = prompts()
    for density in (0.3, 0.8, 0.0):
        for requests in (1, 3):
            mask = torch.rand(requests, 3, handle.layers.max_heads, generator=generator) < density
            handle.set_heads(mask if requests == 3 else mask[0])
            tokens = model.generate(**batch, **GREEDY, **WAYS[way])
            assert torch.equal(tokens, greedy_alone(plain, handle.layers, mask.expand(3, -1, -1), batch))
    handle.set_heads(None)
    assert torch.equal(model.generate(**batch, **GREEDY, **WAYS[way]), plain.generate(**batch, **GREEDY))


@pytest.mark.parametrize("subset", ["scattered", "scattered, per request"])
def test_one_static_cache_for_two_generations(subset):
    model, handle, plain = attached()
    batch = prompts()
    cache = StaticCache(model.config, max_cache_len=16)
    for mask in (SUBSETS[subset], ~SUBSETS[subset], SUBSETS["all empty"], torch.ones(3, 4, dtype=torch.bool)):
        cache.reset()
        with handle.use_heads(mask):
            tokens = model.generate(**batch, **GREEDY, past_key_values=cache)
        assert torch.equal(tokens, greedy_alone(plain, handle.layers, per_request(mask, 3), batch))


@pytest.mark.parametrize("subset", FEW)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_generation_goes_on_with_its_cache(subset, kind):
    model, handle, plain = attached()
    batch = prompts()
    cache = DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=20)
    handle.set_heads(SUBSETS[subset])
    tokens = model.generate(**batch, **GREEDY, past_key_values=cache)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 5, dtype=torch.long)], 1)
    again = model.generate(tokens, attention_mask=mask, **GREEDY, past_key_values=cache)
    longer = GREEDY | {"max_new_tokens": 10, "min_new_tokens": 10}
    expected = greedy_alone(plain, handle.layers, per_request(SUBSETS[subset], 3), batch, **longer)
    assert torch.equal(again, expected)
    handle.set_heads(None)
    mask = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], 1)
    with pytest.raises(SparseHeadsError, match="past_key_values"):
        model.generate(again, attention_mask=mask, **GREEDY, past_key_values=cache)


@pytest.mark.parametrize("subset", ["scattered", "first layer empty", "all empty"])
def test_prompt_lookup_crops_its_cache(subset):
    model, handle, plain = attached()
    batch = prompts(1, 10)
    batch["input_ids"][:, 4:8] = batch["input_ids"][:, :4]
    handle.set_heads(SUBSETS[subset])
    tokens = model.generate(**batch, **GREEDY, prompt_lookup_num_tokens=2)
    assert torch.equal(tokens, greedy_alone(plain, handle.layers, SUBSETS[subset][None], batch))


@pytest.mark.parametrize("subset", ["scattered", "all empty"])
def test_an_assistant_with_a_subset_of_its_own(subset):
    model, handle, plain = attached()
    assistant = generator_model(num_hidden_layers=2)
    sh.attach(assistant).set_heads({0: [1, 2], 1: []})
    handle.set_heads(SUBSETS[subset])
    options = {name: value for name, value in GREEDY.items() if name != "min_new_tokens"}
    tokens = model.generate(**prompts(1), **options, eos_token_id=[], assistant_model=assistant)
    assert torch.equal(tokens, greedy_alone(plain, handle.layers, SUBSETS[subset][None], prompts(1)))


@pytest.mark.parametrize(
    "model_type, changes",
    [
        ("qwen3", {}),
        ("mistral", {"sliding_window": 4}),
        ("gemma2", {"sliding_window": 4, "attn_implementation": "eager"}),
    ],
)
@pytest.mark.parametrize("way", ["dynamic", "static"])
@pytest.mark.parametrize("requests", [0, 3])
def test_other_models(model_type, changes, way, requests):
    plain, model = (model_of_type(model_type, torch.float32, **changes) for _ in range(2))
    handle, batch = sh.attach(model), prompts()
    mask = torch.rand(requests or 1, 3, 4, generator=torch.Generator().manual_seed(8)) < 0.5
    mask[0, 1] = False
    handle.set_heads(mask if requests else mask[0])
    tokens = model.generate(**batch, **GREEDY, **WAYS[way])
    assert torch.equal(tokens, greedy_alone(plain, handle.layers, mask.expand(3, -1, -1), batch))


def test_generation_in_threads():
    _model, handle, _plain = attached()
    names = [*FEW, "one request empty, per request"]

    def work(name):
        torch.set_num_threads(1)
        return handle.bind(SUBSETS[name]).generate(**prompts(), **GREEDY)

    with ThreadPoolExecutor(4) as pool:
        for name, tokens in zip(names, pool.map(work, names), strict=True):
            assert torch.equal(tokens, expected_tokens(name)), name


@pytest.mark.parametrize("rows", [2, 4])
def test_a_batch_of_another_size(rows):
    model, handle, _plain = attached()
    handle.set_heads(REQUESTS["scattered"])
    with pytest.raises(InvalidArgumentError, match=rf"subset.*3.*{rows}"):
        model.generate(**prompts(rows), **GREEDY)


def test_a_static_cache_that_is_too_small():
    model, handle, _plain = attached()
    handle.set_heads(SUBSETS["scattered"])
    cache = StaticCache(model.config, max_cache_len=8)
    with pytest.raises(InvalidArgumentError, match="past_key_values.*8"):
        model.generate(**prompts(), **GREEDY, past_key_values=cache)


def test_detach_after_generating():
    model, handle, plain = attached()
    batch = prompts()
    for name in FEW:
        handle.set_heads(SUBSETS[name])
        for way in WAYS.values():
            model.generate(**batch, **GREEDY, **way)
    handle.detach()
    assert model.config.to_dict() == plain.config.to_dict()
    assert model.config._attn_implementation == plain.config._attn_implementation
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    assert torch.equal(model.generate(**batch, **GREEDY), plain.generate(**batch, **GREEDY))
    assert list(model.state_dict()) == list(plain.state_dict())

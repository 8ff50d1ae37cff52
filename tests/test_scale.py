"""Does scaling heads a row at a time give what each row gives by itself with its output projections scaled?"""

from __future__ import annotations

import copy

import pytest
import torch
from generation_inputs import GREEDY, SMALLEST_GAP, TIGHT, alone_outputs, generator_model, prompts, request_masks
from models import build, inputs, output, output_projection

import sparse_heads as sh

pytestmark = pytest.mark.usefixtures("one_thread")
REQUESTS = request_masks()


def scale_of(layers):
    """float `[3, layers, 4]`: some heads amplified, damped, flipped, silenced and left alone, by request."""
    places = torch.arange(3 * layers * 4)
    return torch.tensor([2.0, 0.5, -1.0, 1.0, 0.0, -0.7])[(7 * places + places // 12) % 6].reshape(3, layers, 4)


SCALE = scale_of(3)
# Heads of a group of two on and off: what the model's own attention cannot run.
SPLIT = torch.tensor([[True, False, True, True]] * 3)
SUBSETS = {"all on": None, "split groups": SPLIT, "per request": REQUESTS["scattered"]}


def scaled_copy(plain, layers, scale):
    """A copy whose output projections' columns are multiplied by `scale [L, H]`."""
    oracle = copy.deepcopy(plain)
    for row, layer in enumerate(layers):
        weight = output_projection(oracle, layer.name).weight
        with torch.no_grad():
            weight.unflatten(1, (layer.num_heads, -1)).mul_(scale[row, : layer.num_heads, None].to(weight))
    return oracle


def each_alone(plain, layers, subset, scale):
    """A scaled copy for every request."""
    subset = torch.ones_like(scale) if subset is None else subset.expand(3, -1, -1)
    return [scaled_copy(plain, layers, own * on) for own, on in zip(scale, subset, strict=True)]


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama_lm", "gqa"])
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("options", [{}, {"layout": "wide"}, {"layout": "core"}], ids=str)
def test_forward(name, subset, options):
    plain, model = build(name, dtype=torch.float64), build(name, dtype=torch.float64)
    handle, batch = sh.attach(model, **options), inputs(model)
    alone = each_alone(plain, handle.layers, SUBSETS[subset], SCALE)
    with torch.no_grad():
        with handle.use_heads(SUBSETS[subset], scale=SCALE):
            result = output(model, batch)
        expected = torch.cat([output(oracle, batch)[row : row + 1] for row, oracle in enumerate(alone)])
        unscaled = output(model, batch)
    torch.testing.assert_close(result, expected, **(TIGHT if name != "distilbert" else {"rtol": 1e-4, "atol": 1e-4}))
    assert not torch.allclose(result[0], unscaled[0], atol=1e-2)


@pytest.mark.parametrize("name, rows", [("bert_cross", 6), ("bart", 9)])
def test_heads_of_every_kind(name, rows):
    plain, model = build(name, dtype=torch.float64), build(name, dtype=torch.float64)
    handle, batch = sh.attach(model), inputs(model)
    subset, scale = request_masks(rows)["scattered"], scale_of(rows)
    with torch.no_grad(), handle.use_heads(subset, scale=scale):
        result = model(**batch)[0]
        expected = [oracle(**batch)[0] for oracle in each_alone(plain, handle.layers, subset, scale)]
    for row in range(3):
        torch.testing.assert_close(result[row], expected[row][row], **TIGHT)


def test_a_scale_for_all_rows():
    plain, model = build("gqa", dtype=torch.float64), build("gqa", dtype=torch.float64)
    handle, batch = sh.attach(model), inputs(model)
    with torch.no_grad(), handle.use_heads(SPLIT, scale=SCALE[0]):
        result = output(model, batch)
        torch.testing.assert_close(result, output(scaled_copy(plain, handle.layers, SCALE[0] * SPLIT), batch), **TIGHT)


def test_other_rows_scales_change_no_bit():
    model = build("gqa")
    handle, batch = sh.attach(model), inputs(model)
    other = SCALE.clone()
    other[1:] *= -3
    results = []
    for scale in (SCALE, other):
        with torch.no_grad(), handle.use_heads(REQUESTS["scattered"], scale=scale):
            results.append(output(model, batch))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][1], results[1][1])


def test_one_head_flipped_in_one_row():
    model = build("gqa")
    handle, batch = sh.attach(model), inputs(model)
    scale = torch.ones(3, 3, 4)
    scale[1, 2, 3] = -1
    with torch.no_grad():
        before = output(model, batch)
        with handle.use_heads(None, scale=scale):
            after = output(model, batch)
    changed = (before - after).abs().amax((1, 2)) > 1e-3
    assert changed.tolist() == [False, True, False]


def generation_pair(name, **options):
    changes = {"num_attention_heads": 4, "num_key_value_heads": 2} if name == "gqa" else {}
    plain, model = generator_model(name, **changes), generator_model(name, **changes)
    return model, sh.attach(model, **options), plain


def alone_tokens(plain, layers, subset, scale, batch, **options):
    """Tokens of every request by itself, on its own scaled copy; fails where a greedy choice is close."""
    tokens = []
    for row, oracle in enumerate(each_alone(plain, layers, subset, scale)):
        own = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        result = oracle.generate(**own, **GREEDY | options, return_dict_in_generate=True, output_logits=True)
        if "num_beams" not in options:
            best = torch.stack(result.logits).topk(2).values
            assert (best[..., 0] - best[..., 1]).min() > SMALLEST_GAP, "the test's own choice of model: a near tie"
        tokens.append(result.sequences)
    return torch.cat(tokens)


WAYS = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunked": {"prefill_chunk_size": 4},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("name", ["llama_lm", "gqa"])
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("way", WAYS)
def test_generate(name, subset, way):
    model, handle, plain = generation_pair(name)
    batch = prompts()
    with handle.use_heads(SUBSETS[subset], scale=SCALE):
        tokens = model.generate(**batch, **GREEDY | WAYS[way])
    assert torch.equal(tokens, alone_tokens(plain, handle.layers, SUBSETS[subset], SCALE, batch, **WAYS[way]))
    assert not torch.equal(tokens, plain.generate(**batch, **GREEDY | WAYS[way]))


@pytest.mark.parametrize("options", [{"layout": "wide"}, {"layout": "core"}, {"kv": "all"}], ids=str)
@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_generate_with_other_options(options, way):
    model, handle, plain = generation_pair("gqa", **options)
    batch = prompts()
    for subset in (None, REQUESTS["scattered"]):
        with handle.use_heads(subset, scale=SCALE):
            tokens = model.generate(**batch, **GREEDY | WAYS[way])
        assert torch.equal(tokens, alone_tokens(plain, handle.layers, subset, SCALE, batch, **WAYS[way]))


def test_several_sequences_sampled_from_each_request():
    """Every row of a request has that request's scale: silenced heads' weights are never seen."""
    model, handle, plain = generation_pair("gqa")
    batch = prompts(padded=False)
    sampled = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 4, "min_new_tokens": 4}
    with handle.use_heads(REQUESTS["scattered"], scale=SCALE):
        torch.manual_seed(3)
        tokens = model.generate(**batch, **GREEDY | sampled)
        with torch.no_grad():
            result = model(tokens).logits
    expected = []
    for row, oracle in enumerate(each_alone(plain, handle.layers, REQUESTS["scattered"], SCALE)):
        with torch.no_grad():
            expected.append(oracle(tokens[2 * row : 2 * row + 2]).logits)
    torch.testing.assert_close(result, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_bound_models_scale_too():
    model, handle, plain = generation_pair("gqa")
    batch = prompts()
    bound = handle.bind(REQUESTS["scattered"], scale=SCALE)
    expected = alone_tokens(plain, handle.layers, REQUESTS["scattered"], SCALE, batch)
    assert torch.equal(bound.generate(**batch, **GREEDY), expected)
    plain_tokens = plain.generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY), plain_tokens)


def test_a_scale_of_ones_and_zeros_is_a_subset():
    model, plain = build("gqa", dtype=torch.float64), build("gqa", dtype=torch.float64)
    handle, batch = sh.attach(model), inputs(model)
    with torch.no_grad(), handle.use_heads(None, scale=REQUESTS["scattered"].double()):
        result = output(model, batch)
    torch.testing.assert_close(result, alone_outputs(plain, handle.layers, REQUESTS["scattered"], batch), **TIGHT)


def test_a_cache_continues_under_another_scale():
    """Scales act on what heads give, not on what caches hold: turning one up in the middle is a plain forward."""
    model, plain = build("gqa", dtype=torch.float64), build("gqa", dtype=torch.float64)
    handle, batch = sh.attach(model), prompts(padded=False)
    ids = batch["input_ids"]
    results = []
    with torch.no_grad():
        for each in (model, plain):
            cache = None
            for part, scale in ((ids[:, :4], SCALE), (ids[:, 4:], -SCALE)):
                if each is model:
                    with handle.use_heads(None, scale=scale):
                        step = model(part, past_key_values=cache)
                    cache = step.past_key_values
                    rows = step.logits
                else:
                    oracles = each_alone(plain, handle.layers, None, scale)
                    cache = cache or [None] * 3
                    steps = [
                        oracle(part[row : row + 1], past_key_values=cache[row]) for row, oracle in enumerate(oracles)
                    ]
                    cache = [own.past_key_values for own in steps]
                    rows = torch.cat([own.logits for own in steps])
                results.append(rows)
    torch.testing.assert_close(results[0], results[2], **TIGHT)
    torch.testing.assert_close(results[1], results[3], **TIGHT)

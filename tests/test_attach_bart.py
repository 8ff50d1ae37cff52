"""Do encoder-decoder models run, generate and get scored as their masked copies, whichever kind of head is off?"""

from __future__ import annotations

import copy

import pytest
import torch
from generation_inputs import GREEDY, gated_copy, greedy_alone, per_request, request_masks
from models import build, inputs, loss, masked_copy, masks, output, randomised
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForSeq2SeqLM, DynamicCache, EncoderDecoderCache

import sparse_heads as sh
from sparse_heads.errors import SparseHeadsError
from sparse_heads.testing import items_run

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = 9  # three of the encoder; of the decoder three with two kinds of attention
ENCODER, CROSS = torch.arange(LAYERS) < 3, torch.tensor([False] * 3 + [False, True] * 3)
SUBSETS = {name: mask for name, mask in masks(LAYERS).items() if name != "one head a layer"}
for kind, rows in {"encoder": ENCODER, "cross": CROSS, "decoder": ~ENCODER & ~CROSS}.items():
    SUBSETS[f"{kind} scattered"] = SUBSETS["scattered"] | ~rows[:, None]
    SUBSETS[f"{kind} empty"] = ~rows[:, None].expand(-1, 4)
SUBSETS |= {f"{name}, per request": mask for name, mask in request_masks(LAYERS).items()}
FEW = ["scattered", "cross empty", "scattered, per request", "one request empty, per request"]
WAYS = {"dynamic": {}, "static": {"cache_implementation": "static"}, "no cache": {"use_cache": False}}


def pair(name="bart", dtype=torch.float32, **options):
    """An attached model, its handle, and the same model plain, with large logits."""
    plain = build(name, dtype=dtype)
    if name == "bart":
        with torch.no_grad():
            plain.model.shared.weight *= 3
    model = copy.deepcopy(plain)
    return model, sh.attach(model, **options), plain


def source(rows=3, length=6):
    """What an encoder reads, padded in the last row."""
    batch = inputs(build("bart"), rows, length)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def test_layers_are_those_of_each_stack_and_kind():
    for name in ("bart", "marian"):
        layers = sh.attach(build(name)).layers
        decoder = [("decoder", index, kind) for index in range(3) for kind in ("self", "cross")]
        assert [layer.key for layer in layers] == [("encoder", index, "self") for index in range(3)] + decoder
        assert layers.model_type == name


def test_stacks_with_other_numbers_of_heads():
    changes = {"encoder_attention_heads": 4, "decoder_attention_heads": 3}
    plain, model = build("bart", dtype=torch.float64, **changes), build("bart", dtype=torch.float64, **changes)
    handle = sh.attach(model)
    assert [layer.num_heads for layer in handle.layers] == [4] * 3 + [3] * 6
    mask = SUBSETS["scattered"] & handle.layers.real_heads()
    handle.set_heads(mask)
    batch = inputs(model)
    expected = output(masked_copy(plain, handle.layers, mask), batch)
    torch.testing.assert_close(output(model, batch), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model_type", ["blenderbot", "blenderbot-small", "m2m_100", "mbart", "pegasus", "plbart"])
def test_other_encoder_decoders_run_by_structure(model_type):
    settings = copy.deepcopy(build("bart").config).to_dict()
    settings = {name: value for name, value in settings.items() if name not in ("model_type", "architectures")}
    config = CONFIG_MAPPING[model_type](**settings)
    plain = randomised(AutoModelForSeq2SeqLM.from_config(config), torch.float64)
    model = copy.deepcopy(plain)
    handle = sh.attach(model)
    batch = inputs(model)
    for mask in (SUBSETS["scattered"], SUBSETS["scattered, per request"]):
        with handle.use_heads(mask):
            actual = output(model, batch)
        torch.testing.assert_close(
            actual, output(gated_copy(plain, handle.layers, mask), batch), rtol=1e-10, atol=1e-10
        )


def test_clip_has_two_encoders():
    tower = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
    text = tower | {"vocab_size": 61, "max_position_embeddings": 40}
    config = CONFIG_MAPPING["clip"](text_config=text, vision_config=tower | {"image_size": 32, "patch_size": 16})
    plain = randomised(AutoModel.from_config(config), torch.float64)
    model = copy.deepcopy(plain)
    handle = sh.attach(model)
    assert [layer.key for layer in handle.layers] == [("encoder", index, "self") for index in range(4)]
    mask = masks(4)["scattered"]
    handle.set_heads(mask)
    batch = {"input_ids": torch.randint(5, 61, (2, 7)), "pixel_values": torch.randn(2, 3, 32, 32).double()}
    expected = masked_copy(plain, handle.layers, mask)(**batch).logits_per_image
    torch.testing.assert_close(model(**batch).logits_per_image, expected, rtol=1e-9, atol=1e-9)


def test_labels_alone_give_the_decoder_its_inputs():
    model, handle, plain = pair(dtype=torch.float64)
    batch = source() | {"labels": torch.randint(5, 61, (3, 4), generator=torch.Generator().manual_seed(1))}
    for name in FEW:
        with handle.use_heads(SUBSETS[name]):
            value = model(**batch).loss
        torch.testing.assert_close(value, gated_copy(plain, handle.layers, SUBSETS[name])(**batch).loss)


@pytest.mark.parametrize(
    "way, subset",
    [("dynamic", name) for name in SUBSETS] + [(way, name) for way in WAYS for name in FEW if way != "dynamic"],
)
def test_greedy_tokens(way, subset):
    model, handle, plain = pair()
    handle.set_heads(SUBSETS[subset])
    batch = source()
    tokens = model.generate(**batch, **GREEDY, **WAYS[way])
    assert torch.equal(tokens, greedy_alone(plain, handle.layers, per_request(SUBSETS[subset], 3), batch))


@pytest.mark.parametrize("subset", FEW)
@pytest.mark.parametrize("way", ["dynamic", "static"])
@pytest.mark.parametrize("options", [{"kv": "all"}, {"layout": "wide"}, {"layout": "core"}], ids=str)
def test_options_of_attach(subset, way, options):
    model, handle, plain = pair(**options)
    batch = source()
    with handle.use_heads(SUBSETS[subset]):
        tokens = model.generate(**batch, **GREEDY, **WAYS[way])
    assert torch.equal(tokens, greedy_alone(plain, handle.layers, per_request(SUBSETS[subset], 3), batch))


@pytest.mark.parametrize("subset", FEW)
@pytest.mark.parametrize("way", ["dynamic", "static"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_beams_of_a_request_are_those_of_itself_alone(subset, way, options):
    """The encoder runs a row a request, the decoder a row a beam."""
    model, handle, plain = pair(dtype=torch.float64)
    batch, options = source(), GREEDY | WAYS[way] | options
    returned = options.get("num_return_sequences", 1)
    with handle.use_heads(SUBSETS[subset]):
        tokens = model.generate(**batch, **options)
    for row, mask in enumerate(per_request(SUBSETS[subset], 3)):
        own = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        expected = masked_copy(plain, handle.layers, mask).generate(**own, **options)
        assert torch.equal(tokens[row * returned : (row + 1) * returned], expected)


@pytest.mark.parametrize("subset", ["scattered", "scattered, per request"])
def test_scale_while_generating(subset):
    model, handle, plain = pair(dtype=torch.float64)
    scale = torch.randn(3, LAYERS, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    batch, options = source(), GREEDY | {"num_beams": 2}
    with handle.use_heads(SUBSETS[subset], scale=scale):
        tokens = model.generate(**batch, **options)
    assert torch.equal(tokens, gated_copy(plain, handle.layers, scale * SUBSETS[subset]).generate(**batch, **options))


def decode(model, states, tokens, cache):
    return model(encoder_outputs=(states,), decoder_input_ids=tokens, past_key_values=cache).logits


@pytest.mark.parametrize("kv", ["active", "all"])
@pytest.mark.parametrize("subset", ["scattered", "scattered, per request", "cross empty"])
def test_a_cache_is_continued_by_the_heads_that_it_holds(kv, subset):
    model, handle, plain = pair(dtype=torch.float64, kv=kv)
    oracle = gated_copy(plain, handle.layers, SUBSETS[subset])
    tokens = inputs(model)["decoder_input_ids"]
    states = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    caches = [EncoderDecoderCache(DynamicCache(), DynamicCache()) for _ in range(2)]
    with torch.no_grad(), handle.use_heads(SUBSETS[subset]):
        for start, stop in ((0, 3), (3, 4), (4, 6)):
            each = [decode(one, states, tokens[:, start:stop], cache) for one, cache in zip((model, oracle), caches)]  # noqa: B905
            torch.testing.assert_close(*each, rtol=1e-10, atol=1e-10)
    if kv == "active":
        with handle.use_heads(None), pytest.raises(SparseHeadsError, match=r"past_key_values.*lacks key/value heads"):
            decode(model, states, tokens[:, 6:], caches[0])
    else:
        oracle.head_mask = torch.ones(LAYERS, 4)
        with torch.no_grad(), handle.use_heads(None):
            each = [decode(one, states, tokens[:, 6:], cache) for one, cache in zip((model, oracle), caches)]  # noqa: B905
        torch.testing.assert_close(*each, rtol=1e-10, atol=1e-10)


def test_only_kept_heads_run_and_are_stored():
    model, handle, _plain = pair()
    mask = SUBSETS["scattered"] & (torch.arange(4) < 3)  # a layer of all heads runs torch's own, which nothing counts
    handle.set_heads(mask)
    batch, steps = source(2), 4
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with items_run() as items, torch.no_grad():
        model.generate(**batch, **GREEDY | {"max_new_tokens": steps, "min_new_tokens": steps}, past_key_values=cache)
    encoder, cross, own = (int(mask[rows].sum()) for rows in (ENCODER, CROSS, ~ENCODER & ~CROSS))
    assert items.out_projection == 2 * (encoder + steps * (cross + own))
    assert items.in_projection == 2 * (3 * encoder + 2 * cross + steps * (cross + 3 * own))
    for name, part in (("cross", cache.cross_attention_cache), ("self", cache.self_attention_cache)):
        rows = mask[[layer.stack == "decoder" and layer.kind == name for layer in handle.layers]]
        assert [layer.keys.shape[1] for layer in part.layers] == rows.sum(1).clamp(min=1).tolist()


def test_what_masked_heads_hold_changes_no_bit():
    results = []
    for poisoned in (False, True):
        model, handle, _plain = pair()
        mask = SUBSETS["scattered"]
        handle.set_heads(mask)
        if poisoned:
            for row, site in zip(mask, handle.sites, strict=True):
                for role, projection in site.projections.items():
                    weight = projection.weight.data.t() if role == "output" else projection.weight.data
                    weight.unflatten(0, (4, -1))[~row] = float("nan")
        result = output(model, inputs(model))
        loss(result).backward()
        results.append((result.detach(), [parameter.grad for parameter in model.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(*each) for each in zip(results[0][1], results[1][1], strict=True) if each[0] is not None)


def test_other_requests_change_no_bit():
    torch.set_num_threads(2)
    model, handle, _plain = pair()
    batch, generator, first = inputs(model), torch.Generator().manual_seed(14), None
    for neighbour in range(8):
        mask = torch.rand(3, LAYERS, 4, generator=generator) < neighbour / 7
        mask[1] = SUBSETS["scattered, per request"][1]
        with torch.no_grad(), handle.use_heads(mask):
            row = output(model, batch)[1]
        first = row if first is None else first
        assert torch.equal(row, first), neighbour


def test_michel_scores_need_nothing_but_labels():
    model, handle, plain = pair(dtype=torch.float64)
    batch = source() | {"labels": torch.randint(5, 61, (3, 4), generator=torch.Generator().manual_seed(1))}
    scores = sh.score_heads(model, [batch], "michel")
    expected = torch.zeros(LAYERS, 4, dtype=torch.float64)
    for row in range(3):
        gate = torch.ones(LAYERS, 4, dtype=torch.float64, requires_grad=True)
        own = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        value = gated_copy(plain, handle.layers, gate)(**own).loss
        expected += torch.autograd.grad(value, gate)[0].abs()
    torch.testing.assert_close(scores.tensor, expected / expected.norm(dim=1, keepdim=True))
    for kinds in (("self",), ("cross",)):
        assert scores.top(5, kinds=kinds).count() == 5 + int((CROSS if kinds == ("self",) else ~CROSS).sum()) * 4


@pytest.mark.parametrize("kinds, kept", [(None, 9), ((("decoder", "cross"),), 24 + 9), (("self",), 12 + 9)], ids=str)
def test_gates_learn_one_budget_over_the_chosen_kinds(kinds, kept):
    model, handle, plain = pair()
    batch = source() | {"labels": torch.randint(5, 61, (3, 4), generator=torch.Generator().manual_seed(1))}
    gates = sh.attach_gates(model, sh.DSPConfig(k=9, mode="pipelined", anneal_steps=4, kinds=kinds))
    sh.train_gates(gates, [batch], steps=5)
    subset = gates.subset()
    assert subset.count() == kept
    tokens = model.eval().generate(**source(), **GREEDY)
    gates.detach()
    with handle.use_heads(subset):
        assert torch.equal(tokens, model.generate(**source(), **GREEDY))
    expected = masked_copy(plain, handle.layers, subset.mask).generate(**source(), **GREEDY)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("name", ["bart", "marian"])
def test_detach_gives_the_model_back_bit_by_bit(name):
    model, handle, plain = pair(name)
    batch, before = inputs(model), copy.deepcopy(model.state_dict())
    for mask in (SUBSETS["scattered"], SUBSETS["scattered, per request"]):
        handle.set_heads(mask)
        model(**batch)
    handle.detach()
    assert torch.equal(output(model, batch), output(plain, batch))
    assert {path: type(module) for path, module in model.named_modules()} == {
        path: type(module) for path, module in plain.named_modules()
    }
    assert model.config.to_dict() == plain.config.to_dict()
    for path, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[path]), path

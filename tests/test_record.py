"""Do records hold what eager attention's probabilities give by hand, whatever runs?"""

from __future__ import annotations

import pytest
import torch
from attention_oracle import ByHand, probabilities
from models import (
    VOCABULARY,
    build,
    inputs,
    masked_copy,
    masks,
    output_projection,
    randomised,
)
from record_inputs import CLOSE, PLAIN, ROUNDED, SPECIAL, assert_equals, by_hand, two_batches
from transformers import BertConfig, DynamicCache, EncoderDecoderConfig, EncoderDecoderModel, StaticCache

import sparse_heads as sh
from sparse_heads.errors import UnsupportedError


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "distilbert", "llama", "gqa", "bert_cross"])
def test_statistics_by_hand(name, attention):
    model = build(name, attention, torch.float64)
    handle = sh.attach(model)
    batches = two_batches(model)
    with torch.no_grad(), handle.record(PLAIN) as record:
        for batch in batches:
            model(**batch)
    found = by_hand(name, handle.layers, batches)
    assert_equals(record, found)
    for row, each in enumerate(found):
        close = ROUNDED if name in ("llama", "gqa") else CLOSE
        torch.testing.assert_close(record.similarity[row], each.similarity(), **close)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("name", ["bert_classifier", "llama_lm"])
def test_left_padding_and_models_around_the_model(name):
    dtype = torch.float32 if name == "llama_lm" else torch.float64
    model = build(name, dtype=dtype)
    handle = sh.attach(model)
    batches = two_batches(model, "left")
    with handle.record() as record:
        for batch in batches:
            model(**batch).logits.sum().backward()
    assert set(record.statistics) == {"entropy", "sparsity", "confidence", "position_mass"}
    found = by_hand(name, handle.layers, batches, model=build(name, "eager", dtype))
    assert_equals(record, found, record.statistics)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_low_precision(attention, dtype):
    model = build("gqa", attention, dtype)
    handle = sh.attach(model)
    batch = inputs(model)
    with torch.no_grad(), handle.record(PLAIN) as record:
        model(**batch)
    exact = build("gqa", "eager", dtype).double()
    found = by_hand("gqa", handle.layers, [batch], model=exact)
    for name in PLAIN:
        for row, each in enumerate(found):
            atol = 1e-5 if dtype == torch.float32 else 0.1
            torch.testing.assert_close(record.statistics[name][row], each.mean(name), rtol=0, atol=atol)
    assert record.count.tolist() == [each.count for each in found]


@pytest.mark.parametrize("layout", ["auto", "wide", "core"])
@pytest.mark.parametrize("name", ["bert", "gqa", "bert_cross"])
@pytest.mark.parametrize("which", ["scattered", "first layer empty"])
def test_shared_subsets(name, layout, which):
    model = build(name, dtype=torch.float64)
    handle = sh.attach(model, layout=layout)
    mask = masks(len(handle.layers))[which]
    batch = inputs(model)
    expected, reads = read_by_projections(build(name, dtype=torch.float64), handle.layers, mask, batch)
    with torch.no_grad(), handle.use_heads(mask), handle.record(PLAIN, outputs=True) as record:
        result = model(**batch)[0]
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    assert_equals(record, by_hand(name, handle.layers, [batch], mask))
    for row, layer in enumerate(handle.layers):
        assert record.statistics["entropy"][row].isnan().equal(~mask[row])
        (own,) = record.outputs[layer.name]
        torch.testing.assert_close(own, reads[row] * mask[row][:, None], rtol=1e-9, atol=1e-9)
        assert not own.requires_grad
        assert torch.count_nonzero(own[:, :, ~mask[row]]) == 0


def read_by_projections(model, layers, mask, batch):
    """The result of the oracle with heads off, and what its output projections read, `[B, T, H, D]` a layer."""
    oracle = model if mask is None else masked_copy(model, layers, mask)
    reads = []
    for layer in layers:
        output_projection(oracle, layer.name).register_forward_pre_hook(
            lambda _, args, layer=layer: reads.append(args[0].detach().unflatten(-1, (layer.num_heads, -1)))
        )
    with torch.no_grad():
        return oracle(**batch)[0], reads


@pytest.mark.parametrize("layout", ["auto", "core"])
@pytest.mark.parametrize("name", ["bert", "gqa"])
def test_subsets_for_every_request(name, layout):
    model = build(name, dtype=torch.float64)
    handle = sh.attach(model, layout=layout)
    batch = inputs(model)
    mask = torch.stack([masks(3)[which] for which in ("scattered", "one head a layer", "last layer full")])
    with torch.no_grad(), handle.use_heads(mask), handle.record(PLAIN, outputs=True) as record:
        model(**batch)
    assert_equals(record, by_hand(name, handle.layers, [batch], mask))
    for row in range(3):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        _, reads = read_by_projections(build(name, dtype=torch.float64), handle.layers, mask[row], alone)
        for index, layer in enumerate(handle.layers):
            expected = reads[index][0] * mask[row, index][:, None]
            torch.testing.assert_close(record.outputs[layer.name][0][row], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", ["auto", "core"])
@pytest.mark.parametrize("per_request", [False, True])
def test_outputs_are_scaled(layout, per_request):
    model = build("bert", dtype=torch.float64)
    handle = sh.attach(model, layout=layout)
    batch = inputs(model)
    scale = torch.rand(3, 3, 4, dtype=torch.float64) + 0.5
    scale = scale if per_request else scale[0]
    reads = []
    for layer in handle.layers:
        projection = output_projection(model, layer.name)
        projection.register_forward_pre_hook(lambda _, args: reads.append(args[0].unflatten(-1, (4, -1))))
    with torch.no_grad(), handle.use_heads(None, scale=scale), handle.record((), outputs=True) as record:
        model(**batch)
    for row, layer in enumerate(handle.layers):
        own = scale[..., row, :]
        factor = 1.0 if layout == "core" else (own[:, None, :, None] if per_request else own[:, None])
        torch.testing.assert_close(record.outputs[layer.name][0], reads[row] * factor, **CLOSE)
    assert record.count.tolist() == [0, 0, 0]
    assert record.statistics == {}


@pytest.mark.parametrize("cache", [None, DynamicCache, StaticCache])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_forwards_that_continue_a_cache(attention, cache):
    model = build("gqa", attention)
    handle = sh.attach(model)
    whole = inputs(model)
    whole["attention_mask"] = whole["attention_mask"].flip(1)
    if cache is None:
        parts = [slice(0, 7)]
        stored = None
    else:
        parts = [slice(0, 4), slice(4, 6), slice(6, 7)]
        stored = cache(config=model.config, **({"max_cache_len": 12} if cache is StaticCache else {}))
    with torch.no_grad(), handle.record(PLAIN) as record:
        for part in parts:
            model(
                input_ids=whole["input_ids"][:, part],
                attention_mask=whole["attention_mask"][:, : part.stop],
                past_key_values=stored,
            )
    assert_equals(record, by_hand("gqa", handle.layers, [whole], model=build("gqa", "eager")))


def test_generation():
    model = build("gqa", dtype=torch.float64)
    handle = sh.attach(model)
    batch = inputs(model)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    with handle.record(("entropy", "position_mass")) as record:
        ids = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    seen = {"input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])}
    assert_equals(record, by_hand("gqa", handle.layers, [seen]), ("entropy", "position_mass"))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "gqa"])
def test_special_tokens(name, attention):
    model = build(name, attention, torch.float64)
    handle = sh.attach(model)
    batches = two_batches(model)
    names = (*PLAIN, "special_mass")
    with torch.no_grad(), handle.record(names, special_tokens=SPECIAL) as record:
        for batch in batches:
            model(**batch)
    with torch.no_grad(), handle.record(("special_mass",), special_tokens=iter(SPECIAL)) as alone:
        for batch in batches:
            model(**batch)
    found = by_hand(name, handle.layers, batches, special=SPECIAL)
    assert 0 < found[0].count < by_hand(name, handle.layers, batches)[0].count
    assert_equals(record, found, names)
    assert torch.equal(alone.statistics["special_mass"], record.statistics["special_mass"])


def test_special_mass_counts_queries_that_see_special_tokens_alone():
    model = build("bert", dtype=torch.float64)
    handle = sh.attach(model)
    ids = torch.tensor([[5, 30, 6, 7], [5, 30, 31, 32]])
    with torch.no_grad(), handle.record(("entropy", "special_mass"), special_tokens=SPECIAL) as record:
        model(input_ids=ids)
    eager = build("bert", "eager", torch.float64)
    attentions = probabilities(eager, {"input_ids": ids})
    for row in range(3):
        p = attentions["self", row]
        mass = torch.stack([p[0, :, 1, [0, 2, 3]].sum(-1), *(p[1, :, query, 0] for query in (1, 2, 3))]).mean(0)
        torch.testing.assert_close(record.statistics["special_mass"][row], mass, **CLOSE)
    assert record.count.tolist() == [3, 3, 3]


def encoder_decoder(name, attention):
    if name != "two berts":
        return build(name, attention, torch.float64)
    plain = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    plain |= {"intermediate_size": 37, "max_position_embeddings": 40}
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**plain), BertConfig(**plain))
    config.decoder_start_token_id = config.pad_token_id = 0
    config.decoder.is_decoder = config.decoder.add_cross_attention = True
    model = randomised(EncoderDecoderModel(config), torch.float64)
    for part in (model.encoder, model.decoder):
        part.set_attn_implementation(attention)
    return model


def sequence_pair():
    generator = torch.Generator().manual_seed(5)
    ids, decoder_ids = (torch.randint(5, VOCABULARY, (3, length), generator=generator) for length in (7, 5))
    mask, decoder_mask = torch.ones_like(ids), torch.ones_like(decoder_ids)
    mask[0, 4:], decoder_mask[1, 3:] = 0, 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": decoder_mask,
    }


@pytest.mark.parametrize("special", [(), SPECIAL])
@pytest.mark.parametrize("name", ["two berts", "bart", "marian"])
def test_encoder_decoders(name, special):
    model = encoder_decoder(name, "sdpa")
    handle = sh.attach(model)
    assert {(layer.stack, layer.kind) for layer in handle.layers} == {
        ("encoder", "self"),
        ("decoder", "self"),
        ("decoder", "cross"),
    }
    batch = sequence_pair()
    with torch.no_grad(), handle.record(PLAIN, special_tokens=special) as record:
        model(**batch)
        result = encoder_decoder(name, "eager")(**batch, output_attentions=True)
    stacks = {
        ("encoder", "self"): (result.encoder_attentions, "", ""),
        ("decoder", "self"): (result.decoder_attentions, "decoder_", "decoder_"),
        ("decoder", "cross"): (result.cross_attentions, "decoder_", ""),
    }
    found = []
    for layer in handle.layers:
        attentions, asking, read = stacks[layer.stack, layer.kind]
        special_of = {side: torch.isin(batch[side + "input_ids"], torch.tensor(special)) for side in ("", "decoder_")}
        counted = batch[asking + "attention_mask"].bool()
        visible = batch[read + "attention_mask"].bool()[:, None].expand(-1, counted.shape[1], -1)
        visible = visible.tril() if (layer.stack, layer.kind) == ("decoder", "self") else visible
        found.append(ByHand(4))
        found[-1].add(attentions[layer.index].double(), visible, counted & ~special_of[asking], special_of[read])
    assert_equals(record, found)


def test_ids_that_are_not_known():
    model = build("bert")
    handle = sh.attach(model)
    states = torch.randn(2, 5, 48)
    with handle.record(special_tokens=SPECIAL), pytest.raises(UnsupportedError, match=r"wanted input_ids .* got none"):
        model(inputs_embeds=states)
    cross = build("bert_cross")
    with (
        sh.attach(cross).record(special_tokens=SPECIAL),
        pytest.raises(UnsupportedError, match=r"\[3, 5\] for the encoder's keys of layer .*crossattention"),
    ):
        cross(**inputs(cross))
    llama = build("llama")
    with torch.no_grad(), sh.attach(llama).record(special_tokens=SPECIAL) as record:
        cache = llama(inputs(llama)["input_ids"], use_cache=True).past_key_values
        assert record.count[0] > 0
        with pytest.raises(UnsupportedError, match=r"\[3, 8\] for the keys \(those in a cache have no ids\)"):
            llama(torch.full((3, 1), 20), past_key_values=cache)


def test_masks_that_say_nothing_of_padding():
    """A mask of four dimensions hides keys; every query counts."""
    model = build("bert", dtype=torch.float64)
    handle = sh.attach(model)
    batch = inputs(model)
    mask = batch["attention_mask"].bool()[:, None, None, :].expand(-1, 1, 7, -1)
    with torch.no_grad(), handle.record() as record:
        model(input_ids=batch["input_ids"], attention_mask=mask)
    assert record.count.tolist() == [21, 21, 21]

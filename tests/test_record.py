"""Do records hold what eager attention's probabilities give by hand, whatever runs, and leave the forward as it was?"""

from __future__ import annotations

import contextvars
import copy
import threading

import pytest
import torch
from attention_oracle import ByHand, probabilities, visible_keys
from models import (
    VOCABULARY,
    build,
    enable_checkpointing,
    inputs,
    masked_copy,
    masks,
    output,
    output_projection,
    randomised,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, DynamicCache, EncoderDecoderConfig, EncoderDecoderModel, StaticCache

import sparse_heads as sh
from sparse_heads.errors import DetachedError, InvalidArgumentError, InvalidTypeError, UnsupportedError

PLAIN = ("entropy", "sparsity", "confidence", "redundancy", "position_mass")
CAUSAL = ("llama", "llama_lm", "gqa", "bert_cross")
CLOSE = {"rtol": 1e-9, "atol": 1e-9, "equal_nan": True}
# Llama's eager attention has single precision, whatever the model's, and NaN at left padding in a double one.
ROUNDED = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
SPECIAL = (5, 6, 7, 8, 9, 10, 11, 12, 13, 14)


def by_hand(name, layers, batches, mask=None, special=(), model=None):
    """A `ByHand` a layer: of the eager model, or its copy with heads off; for a mask `[B, L, H]` a row at a time."""
    model = build(name, "eager", torch.float64) if model is None else model
    found = [ByHand(layer.num_heads) for layer in layers]
    for batch in batches:
        rows = len(batch["input_ids"])
        alone = mask is not None and mask.dim() == 3
        for part in [slice(row, row + 1) for row in range(rows)] if alone else [slice(None)]:
            own = mask[part][0] if alone else mask
            oracle = model if own is None else masked_copy(model, layers, own)
            piece = {key: value[part] for key, value in batch.items()}
            attentions = probabilities(oracle, piece)
            is_special = torch.isin(piece["input_ids"], torch.tensor(special, dtype=torch.long))
            counted = piece["attention_mask"].bool() & ~is_special
            for row, layer in enumerate(layers):
                on = None if own is None else own[row, : layer.num_heads].expand(len(counted), -1)
                visible = visible_keys(piece, layer.kind, name in CAUSAL)
                found[row].add(
                    attentions[layer.kind, layer.index], visible, counted, is_special if special else None, on
                )
    return found


def assert_equals(record, found, names=PLAIN):
    for row, (layer, each) in enumerate(zip(record.layers, found, strict=True)):
        for name in names:
            if name == "position_mass" and layer.kind == "cross":
                assert record.statistics[name][row].isnan().all()
                continue
            close = ROUNDED if record.layers.model_type == "llama" else CLOSE
            torch.testing.assert_close(record.statistics[name][row], each.mean(name), **close)
            assert record.statistics[name].dtype == torch.float64
        if each.weights.any():
            assert record.count[row] == each.count


def two_batches(model, side="right"):
    batches = [inputs(model), inputs(model, rows=2, length=4)]
    if side == "left":
        batches = [batch | {"attention_mask": batch["attention_mask"].flip(1)} for batch in batches]
    return batches


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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("which", [None, "scattered"])
@pytest.mark.parametrize("name", ["bert", "gqa"])
def test_the_forward_gives_the_same_bits(name, which, attention):
    model = build(name, attention, attention_dropout=0.1, attention_probs_dropout_prob=0.1).train()
    handle = sh.attach(model)
    mask = None if which is None else masks(3, group=2)[which]
    batch = inputs(model)
    results = []
    for recording in (False, True):
        torch.manual_seed(3)
        model.zero_grad()
        with handle.use_heads(mask):
            if recording:
                with handle.record(PLAIN, outputs=True):
                    result = output(model, batch)
            else:
                result = output(model, batch)
        result.square().sum().backward()
        results.append([result.detach(), *(parameter.grad for parameter in model.parameters())])
    for plain, recorded in zip(*results, strict=True):
        assert plain is recorded or torch.equal(plain, recorded)


def test_the_probabilities_are_still_returned():
    model = build("bert", "eager")
    handle = sh.attach(model)
    batch = inputs(model)
    with torch.no_grad():
        expected = model(**batch, output_attentions=True).attentions
        with handle.record() as record:
            attentions = model(**batch, output_attentions=True).attentions
    assert all(map(torch.equal, attentions, expected))
    assert record.count[0] > 0


def test_one_output_a_forward_and_inference_mode():
    model = build("bert")
    handle = sh.attach(model)
    batches = two_batches(model)
    with torch.no_grad(), handle.record(outputs=True) as record:
        for batch in batches:
            model(**batch)
    with handle.record() as inferred:
        for batch, mode in zip(batches, (torch.inference_mode, torch.no_grad), strict=True):
            with mode():
                model(**batch)
    outputs = record.outputs[handle.layers[0].name]
    assert [tensor.shape for tensor in outputs] == [(3, 7, 4, 12), (2, 4, 4, 12)]
    assert torch.equal(inferred.statistics["entropy"], record.statistics["entropy"])
    assert inferred.outputs == {}


def test_blocks_nest_and_end():
    model = build("bert", dtype=torch.float64)
    handle = sh.attach(model)
    batches = two_batches(model)
    with torch.no_grad():
        with handle.record(("entropy",)) as outer:
            model(**batches[0])
            with handle.record(("confidence",), special_tokens=SPECIAL) as inner:
                model(**batches[1])
        model(**batches[0])
    assert_equals(outer, by_hand("bert", handle.layers, batches), ("entropy",))
    assert_equals(inner, by_hand("bert", handle.layers, batches[1:], special=SPECIAL), ("confidence",))
    assert model.config._attn_implementation == "sdpa"


def test_a_block_that_ends_out_of_order():
    model = build("bert")
    handle = sh.attach(model)
    first, second = handle.record(), handle.record()
    one, two = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    with torch.no_grad():
        model(**inputs(model))
    second.__exit__(None, None, None)
    assert one.count.sum() == 0
    assert one.statistics["entropy"].isnan().all()
    assert two.count.sum() > 0


def test_other_threads_and_other_models_are_not_collected():
    model, other = build("bert"), build("bert")
    handle, second = sh.attach(model), sh.attach(other)
    batch = inputs(model)

    def run(target):
        with torch.no_grad():
            target(**batch)

    with handle.record() as record, second.record() as own:
        for target in (run, lambda each: None):
            thread = threading.Thread(target=target, args=(model,))
            thread.start()
            thread.join()
        assert record.count.sum() == 0
        run(other)
    assert record.count.sum() == 0
    assert own.count.sum() > 0


def test_a_task_that_outlives_the_block_is_not_collected():
    model = build("bert")
    handle = sh.attach(model)
    with handle.record() as record:
        context = contextvars.copy_context()
    with torch.no_grad():
        context.run(model, **inputs(model))
    assert record.count.sum() == 0


def test_a_block_that_ends_leaves_our_function_to_subsets():
    model = build("bert", dtype=torch.float64)
    handle = sh.attach(model)
    mask = torch.stack([masks(3)[which] for which in ("scattered", "one head a layer", "last layer full")])
    batch = inputs(model)
    with torch.no_grad():
        with handle.record():
            handle.set_heads(mask)
            expected = output(model, batch)
        assert model.config._attn_implementation == "sparse_heads_sdpa"
        layer = model.encoder.layer[1].attention.self  # a layer by itself asks nobody to put the function back
        assert torch.equal(output(model, batch), expected)
        assert layer(torch.zeros(3, 4, 48, dtype=torch.float64))[0].shape == (3, 4, 48)
        with handle.record():
            assert torch.equal(output(model, batch), expected)
        assert model.config._attn_implementation == "sparse_heads_sdpa"


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.numel())
        return result


def test_nothing_is_as_large_as_the_probabilities():
    """1 head, 4096 queries and keys; the kernel's own memory is the operator's to test."""
    model = build("llama", num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    handle = sh.attach(model)
    ids = torch.randint(5, VOCABULARY, (1, 4096))
    with torch.no_grad(), LargestTensor() as largest, handle.record(PLAIN, outputs=True) as record:
        model(ids, use_cache=False)
    assert record.count.tolist() == [4095]
    assert largest.numel <= 4096 * 4096 // 8


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_are_not_collected_again(reentrant):
    model = build("bert", dtype=torch.float64).train()
    enable_checkpointing(model, reentrant)
    handle = sh.attach(model)
    batch = inputs(model)
    with handle.record(outputs=True) as record:
        model(**batch)[0].sum().backward()
    assert_equals(record, by_hand("bert", handle.layers, [batch]), record.statistics)
    assert [len(each) for each in record.outputs.values()] == [1, 1, 1]


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


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"statistics": ("entropy", "speed")}, InvalidArgumentError, r"statistics: wanted some of .*got speed"),
        ({"statistics": "entropy"}, InvalidTypeError, "statistics: wanted several of"),
        ({"statistics": ()}, InvalidArgumentError, "statistics: wanted some of .*, or outputs=True, got none"),
        ({"outputs": 1}, InvalidTypeError, "outputs: wanted True or False"),
        ({"statistics": ("special_mass",)}, InvalidArgumentError, "special_tokens: wanted the ids that 'special_mass'"),
        ({"special_tokens": 3}, InvalidTypeError, "special_tokens: wanted token ids"),
        ({"special_tokens": [-1]}, InvalidArgumentError, "special_tokens: wanted at least 0"),
        ({"special_tokens": ["[SEP]"]}, InvalidTypeError, "special_tokens: wanted an int"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    handle = sh.attach(build("bert"))
    with pytest.raises(error, match=message), handle.record(**arguments):
        pass
    assert handle.records_open == 0


def test_similarity_that_was_not_asked_for():
    handle = sh.attach(build("bert"))
    with handle.record() as record:
        pass
    with pytest.raises(InvalidArgumentError, match="statistics: wanted 'redundancy' among them"):
        _ = record.similarity


def test_attention_that_cannot_be_recorded():
    model = build("bert")
    handle = sh.attach(model)
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(UnsupportedError, match=r"and records\), wanted .* got BertSelfAttention with 'flex_attention'"):
        with handle.record():
            pass
    assert handle.records_open == 0


def test_attention_chosen_inside_the_block():
    model = build("bert", dtype=torch.float64)
    handle = sh.attach(model)
    batch = inputs(model)
    with torch.no_grad(), handle.record() as record:
        model.set_attn_implementation("eager")
        model(**batch)
    assert_equals(record, by_hand("bert", handle.layers, [batch]), record.statistics)
    assert model.config._attn_implementation == "eager"


def test_detaching():
    model = build("bert", dtype=torch.float64)
    handle = sh.attach(model)
    batch = inputs(model)
    with torch.no_grad(), handle.record() as record:
        model(**batch)
        handle.detach()
        model(**batch)
    assert_equals(record, by_hand("bert", handle.layers, [batch]), record.statistics)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(DetachedError, match="handle: detached"):
        handle.record()


def test_a_forward_that_fails():
    model = build("bert", dtype=torch.float64)
    handle = sh.attach(model)
    batch = inputs(model)
    with torch.no_grad(), handle.record() as record:
        with pytest.raises(IndexError):
            model(input_ids=torch.full((1, 3), 10**6))
        model(**batch)
    assert_equals(record, by_hand("bert", handle.layers, [batch]), record.statistics)


def test_a_copy_of_the_model_made_inside_the_block():
    model = build("bert")
    handle = sh.attach(model)
    with torch.no_grad(), handle.record() as record:
        copied = copy.deepcopy(model)
        copied(**inputs(model))
    assert record.count.sum() == 0
    with torch.no_grad(), sh.get_handle(copied).record() as own:
        copied(**inputs(model))
    assert own.count.sum() > 0

"""What do records leave as it was, when do they collect, and what do they refuse?"""

from __future__ import annotations

import contextvars
import copy
import threading

import pytest
import torch
from models import (
    VOCABULARY,
    build,
    enable_checkpointing,
    inputs,
    masks,
    output,
)
from record_inputs import PLAIN, SPECIAL, assert_equals, by_hand, two_batches
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_heads as sh
from sparse_heads.errors import DetachedError, InvalidArgumentError, InvalidTypeError, UnsupportedError


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

"""Layouts: which shapes do the layers of a model see, what is skipped, and are the outputs the same in each?"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from generation_inputs import LOOSE, TIGHT, gated_copy, request_masks
from models import MODELS, build, enable_checkpointing, gradients, inputs, loss, masks, output
from torch import nn

import sparse_heads as sh
from sparse_heads.errors import InvalidArgumentError, UnsupportedError
from sparse_heads.testing import items_run

pytestmark = pytest.mark.usefixtures("one_thread")
SHARED = masks(3)
LAYOUTS = ["auto", "wide", "core"]


def attached(name="bert", layout="auto", dtype=torch.float64, attention="sdpa", **changes):
    plain, model = build(name, attention, dtype, **changes), build(name, attention, dtype, **changes)
    return model, sh.attach(model, layout=layout), plain, inputs(model)


def all_masks(handle):
    """Shared subsets, and one of every request its own."""
    layers, heads = len(handle.layers), handle.layers.max_heads
    shared = masks(layers, heads)
    return [*shared.values(), request_masks(layers, heads)["scattered"], request_masks(layers, heads)["all empty"]]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["wide", "core"])
def test_outputs_and_gradients_are_the_oracles(name, layout):
    model, handle, plain, batch = attached(name, layout)
    for mask in all_masks(handle):
        oracle = gated_copy(plain, handle.layers, mask)
        handle.set_heads(mask)
        results = []
        for each in (model, oracle):
            each.zero_grad()
            results.append(output(each, batch))
            loss(results[-1]).backward()
        torch.testing.assert_close(*results, **TIGHT)
        actual, expected = gradients(model), gradients(oracle)
        for path, grad in expected.items():
            if grad is not None:
                torch.testing.assert_close(actual[path], grad, **TIGHT, msg=lambda text, p=path: f"{p}: {text}")


def seen_shapes(model, batch):
    """What the first layer's projections give and its output projection gets."""
    attention = model.model.layers[0].self_attn
    shapes = []
    hooks = [
        part.register_forward_hook(lambda _m, _args, result: shapes.append(tuple(result.shape)))
        for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    hooks.append(attention.o_proj.register_forward_pre_hook(lambda _m, args: shapes.append(tuple(args[0].shape))))
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return shapes


@pytest.mark.parametrize("name, kv_width", [("llama_lm", 40), ("gqa", 20)])
@pytest.mark.parametrize("layout", ["wide", "core"])
def test_shapes_never_change(name, kv_width, layout):
    model, handle, _plain, batch = attached(name, layout)
    wanted = [(3, 7, 40), (3, 7, kv_width), (3, 7, kv_width), (3, 7, 40)]
    for mask in (None, *all_masks(handle)):
        handle.set_heads(mask)
        assert seen_shapes(model, batch) == wanted


def test_auto_is_compact_for_a_shared_subset_and_wide_for_one_a_request():
    model, handle, _plain, batch = attached("llama_lm")
    handle.set_heads({0: [1, 2]})
    assert seen_shapes(model, batch) == [(3, 7, 20)] * 4
    handle.set_heads(torch.ones(3, 3, 4, dtype=torch.bool).index_fill(2, torch.tensor([3]), False))
    assert seen_shapes(model, batch) == [(3, 7, 40)] * 4


@pytest.mark.parametrize("name", ["llama_lm", "gqa", "bert"])
def test_wide_computes_what_is_on_and_nothing_else(name):
    model, handle, _plain, batch = attached(name, "wide", torch.float32)
    for mask in all_masks(handle):
        handle.set_heads(mask)
        with torch.no_grad(), items_run() as items:
            model(**batch)
        rows = 3 if mask.dim() == 2 else 1
        groups = sh.HeadSubset(mask, handle.layers).groups()
        # A layer with every head on for everyone runs as it is.
        counted = [row for row in range(len(handle.layers)) if not (mask.dim() == 2 and mask[row].all())]
        kept, groups = (int(each[..., counted, :].sum()) for each in (mask, groups))
        assert (items.in_projection, items.out_projection) == (rows * (kept + 2 * groups), rows * kept)


@pytest.mark.parametrize("name", ["llama_lm", "gqa", "bert"])
def test_core_leaves_the_projections_alone_and_skips_attention(name):
    model, handle, plain, batch = attached(name, "core", torch.float32)
    assert [type(part) for part in model.modules()] == [type(part) for part in plain.modules()]
    for mask in all_masks(handle):
        handle.set_heads(mask)
        with torch.no_grad(), items_run() as items:
            model(**batch)
        rows = 3 if mask.dim() == 2 else 1
        assert (items.in_projection, items.out_projection) == (0, 0)
        expected = [int(row.sum()) * rows for row in mask.transpose(0, -2) if not row.all()]
        assert items.attention >= sum(expected)
        assert items.attention <= rows * int(mask.sum())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_attention_of_masked_heads_would_read_changes_nothing(layout):
    """NaN in the query, key and value weights of heads that are off."""
    results = []
    for poisoned in (False, True):
        model, handle, _plain, batch = attached("llama_lm", layout, torch.float32)
        handle.set_heads({0: [1, 2], 1: [], 2: [0]})
        if poisoned:
            with torch.no_grad():
                for row, layer in zip(handle.subset.mask, model.model.layers, strict=True):
                    for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                        part.weight.unflatten(0, (4, -1))[~row] = float("nan")
        with torch.no_grad():
            results.append(output(model, batch))
    assert torch.equal(*results)


class Quantised(nn.Linear):
    """A projection whose weight nobody else may read."""

    def forward(self, input):
        return nn.functional.linear(input, self.weight * 1.0, self.bias)


@pytest.mark.parametrize("name", ["bert", "gqa"])
def test_core_takes_projections_that_cannot_be_read(name):
    plain, model = build(name, dtype=torch.float64), build(name, dtype=torch.float64)
    for part in model.modules():
        if type(part) is nn.Linear:
            part.__class__ = Quantised
    with pytest.raises(UnsupportedError, match="Quantised"):
        sh.attach(model)
    handle, batch = sh.attach(model, layout="core"), inputs(model)
    for mask in all_masks(handle):
        handle.set_heads(mask)
        with torch.no_grad():
            torch.testing.assert_close(
                output(model, batch), output(gated_copy(plain, handle.layers, mask), batch), **TIGHT
            )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["bert_classifier", "llama_lm"])
def test_all_heads_on_is_bit_equal_to_the_plain_model(name, layout):
    model, handle, plain, batch = attached(name, layout, torch.float32)
    expected = output(plain, batch)
    assert torch.equal(output(model, batch), expected)
    handle.set_heads(torch.ones(3, 4, dtype=torch.bool))
    assert torch.equal(output(model, batch), expected)
    for mask in all_masks(handle):
        handle.set_heads(mask)
        output(model, batch)
    handle.set_heads(None)
    assert torch.equal(output(model, batch), expected)
    handle.detach()
    assert torch.equal(output(model, batch), expected)
    assert model.config.to_dict() == plain.config.to_dict()
    assert model.config._attn_implementation == "sdpa"
    described = [[(type(part), sorted(part.__dict__)) for part in each.modules()] for each in (model, plain)]
    assert described[0] == described[1]


@pytest.mark.parametrize("layout", ["wide", "core"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_functions_of_the_model(layout, attention):
    model, handle, plain, batch = attached("llama_lm", layout, attention=attention)
    handle.set_heads(SHARED["scattered"])
    expected = output(gated_copy(plain, handle.layers, SHARED["scattered"]), batch)
    torch.testing.assert_close(output(model, batch), expected, **(TIGHT if attention == "sdpa" else LOOSE))
    handle.detach()
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("layout", ["wide", "core"])
def test_checkpointed_backward_after_the_block(layout):
    model, handle, plain, batch = attached("llama_lm", layout)
    enable_checkpointing(model.train())
    oracle = gated_copy(plain, handle.layers, SHARED["first layer empty"])
    with handle.use_heads(SHARED["first layer empty"]):
        value = loss(output(model, batch))
    value.backward()
    loss(output(oracle, batch)).backward()
    expected = gradients(oracle)
    for path, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[path], **TIGHT, msg=lambda text, p=path: f"{p}: {text}")


@pytest.mark.parametrize("layout", ["wide", "core"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(layout, duplicate):
    model, handle, plain, batch = attached("llama_lm", layout)
    handle.set_heads(SHARED["scattered"])
    with torch.no_grad():
        expected = output(model, batch)
        other = duplicate(model)
        handle.detach()
        assert torch.equal(output(other, batch), expected)
        sh.get_handle(other).detach()
        assert torch.equal(output(other, batch), output(plain, batch))


@pytest.mark.parametrize("layout", ["wide", "core"])
def test_attention_dropout(layout):
    model, handle, _plain, batch = attached("llama_lm", layout, attention_dropout=0.1)
    handle.set_heads(SHARED["scattered"])
    model(**batch)
    model.train()
    with pytest.raises(UnsupportedError, match="dropout"):
        model(**batch)
    handle.set_heads(None)
    model(**batch)


def test_scale():
    scale = torch.rand(3, 4, dtype=torch.float64)
    for layout in LAYOUTS:
        model, handle, plain, batch = attached("llama_lm", layout)
        expected = output(gated_copy(plain, handle.layers, scale * SHARED["scattered"]), batch)
        with handle.use_heads(SHARED["scattered"], scale=scale):
            torch.testing.assert_close(output(model, batch), expected, **TIGHT)
        expected = output(gated_copy(plain, handle.layers, scale), batch)
        with handle.use_heads(None, scale=scale):
            torch.testing.assert_close(output(model, batch), expected, **TIGHT)


def test_attaching_again():
    model, handle, _plain, _ = attached("bert", "wide")
    assert sh.attach(model, layout="wide") is handle
    for options in ({}, {"layout": "core"}, {"layout": "wide", "kv": "all"}):
        with pytest.raises(InvalidArgumentError, match="model"):
            sh.attach(model, **options)


@pytest.mark.parametrize("options, message", [({"layout": "tall"}, "layout.*'core'"), ({"kv": "some"}, "kv.*'all'")])
def test_wrong_options(options, message):
    model = build("bert")
    with pytest.raises(InvalidArgumentError, match=message):
        sh.attach(model, **options)
    assert sh.get_handle(model) is None

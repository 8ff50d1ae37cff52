"""Grouped queries: does any subset run, whole groups or not, and is a key/value head skipped when its group is off?"""

from __future__ import annotations

import pytest
import torch
from generation_inputs import LOOSE, TIGHT, gated_copy, model_of_type
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, gradients, inputs, loss, masked_copy, output

import sparse_heads as sh
from sparse_heads.errors import UnsupportedError
from sparse_heads.testing import items_run

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS = 8


def attached(kv_heads=2, attention="sdpa", dtype=torch.float64, layout="auto", **changes):
    changes |= {"num_attention_heads": HEADS, "num_key_value_heads": kv_heads}
    plain, model = (build("gqa", attention, dtype, **changes) for _ in range(2))
    return model, sh.attach(model, layout=layout), plain, inputs(model)


def subsets(kv_heads):
    """Bool `[3, 8]` or `[B, 3, 8]` by what is special about each."""
    group = HEADS // kv_heads
    generator = torch.Generator().manual_seed(6)
    whole = torch.rand(3, 3, kv_heads, generator=generator) < 0.5
    whole[0, :, 0], whole[0, :, -1], whole[1:, 1, 0] = True, False, False
    whole = whole.repeat_interleave(group, -1)
    uneven = torch.rand(3, 3, HEADS, generator=generator) < 0.5
    uneven[0, 0] = torch.arange(HEADS) == 1
    uneven[0, 1, :group], uneven[0, 1, group:] = False, torch.arange(HEADS - group) > 0
    one_each = torch.zeros(3, 3, HEADS, dtype=torch.bool)
    one_each[..., group - 1 :: group] = True
    one_each[1:, :, :group] = False
    empty = uneven.clone()
    empty[:, 0], empty[2] = False, False
    named = {"whole": whole, "uneven": uneven, "one a group": one_each, "first layer and last request empty": empty}
    return named | {f"{name}, shared": mask[0] for name, mask in named.items()}


NAMES = list(subsets(2))


def check(model, handle, plain, batch, mask, close=TIGHT):
    """Outputs and gradients against the gated copy."""
    oracle = gated_copy(plain, handle.layers, mask)
    handle.set_heads(mask)
    results = [output(each, batch) for each in (model, oracle)]
    for result in results:
        loss(result).backward()
    torch.testing.assert_close(*results, **close)
    actual, expected = gradients(model), gradients(oracle)
    for path, grad in expected.items():
        torch.testing.assert_close(actual[path], grad, **close, msg=lambda text, p=path: f"{p}: {text}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_outputs_and_gradients_are_the_oracles(name, kv_heads, attention):
    model, handle, plain, batch = attached(kv_heads, attention)
    check(model, handle, plain, batch, subsets(kv_heads)[name], TIGHT if attention == "sdpa" else LOOSE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["wide", "core"])
def test_layouts(name, layout):
    model, handle, plain, batch = attached(2, layout=layout)
    check(model, handle, plain, batch, subsets(2)[name])


@pytest.mark.parametrize("name", ["uneven, shared", "whole, shared"])
def test_the_two_oracles_agree(name):
    _model, handle, plain, batch = attached()
    mask = subsets(2)[name]
    oracles = [make(plain, handle.layers, mask) for make in (gated_copy, masked_copy)]
    torch.testing.assert_close(*(output(oracle, batch) for oracle in oracles), **TIGHT)


@settings(max_examples=25)
@given(data=st.data())
def test_any_subset(data):
    kv_heads, rows = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 3))
    changes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": kv_heads}
    plain, model = (build("gqa", dtype=torch.float64, **changes) for _ in range(2))
    handle = sh.attach(model, layout=data.draw(st.sampled_from(["auto", "wide", "core"])))
    requests = data.draw(st.sampled_from([0, 1, rows]))
    size = max(requests, 1) * 8
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))).view(-1, 2, 4)
    mask = mask if requests else mask[0]
    batch = inputs(model, rows, data.draw(st.integers(1, 9)))
    handle.set_heads(mask)
    with torch.no_grad():
        results = output(model, batch), output(gated_copy(plain, handle.layers, mask), batch)
    torch.testing.assert_close(*results, **TIGHT)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_what_is_off_may_hold_anything_and_is_not_computed(name, kv_heads):
    """Query and output rows of masked heads, keys and values of groups that are off: NaN, and no bit changes."""
    mask = subsets(kv_heads)[name]
    results = []
    for poisoned in (False, True):
        model, handle, _plain, batch = attached(kv_heads, dtype=torch.float32)
        handle.set_heads(mask)
        if poisoned:
            for row, site in enumerate(handle.sites):
                on = mask[..., row, :].reshape(-1, HEADS).any(0)
                groups = on.view(kv_heads, -1).any(1)
                with torch.no_grad():
                    for role, projection in site.projections.items():
                        heads = groups if role in ("key", "value") else on
                        weight = projection.weight.t() if role == "output" else projection.weight
                        weight.unflatten(0, (len(heads), -1))[~heads] = float("nan")
                        if role != "output":
                            projection.bias.unflatten(0, (len(heads), -1))[~heads] = float("nan")
        with torch.no_grad(), items_run() as items:
            results.append(output(model, batch))
    assert torch.equal(*results)
    rows = 3 if mask.dim() == 2 else 1
    kept, groups = int(mask.sum()), int(mask.unflatten(-1, (kv_heads, -1)).any(-1).sum())
    assert items.in_projection == rows * (kept + 2 * groups)
    assert items.out_projection == rows * kept


def test_masked_heads_get_exact_zero_gradients():
    model, handle, _plain, batch = attached(2)
    mask = subsets(2)["uneven"]
    mask[:, 1, :4] = False
    handle.set_heads(mask)
    loss(output(model, batch)).backward()
    for row, site in enumerate(handle.sites):
        on = mask[:, row].any(0)
        for role, projection in site.projections.items():
            kept = on.view(2, -1).any(1) if role in ("key", "value") else on
            grad = projection.weight.grad.t() if role == "output" else projection.weight.grad
            assert torch.equal(grad.unflatten(0, (len(kept), -1)).flatten(1).norm(dim=1) > 0, kept), (row, role)


def test_100_masks_of_other_requests_change_no_bit():
    torch.set_num_threads(2)
    model, handle, _plain, batch = attached(4, dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    own = subsets(4)["uneven"][0]
    first = None
    with torch.no_grad():
        for neighbour in range(100):
            mask = torch.rand(3, 3, HEADS, generator=generator) < neighbour / 99
            mask[0] = own
            handle.set_heads(mask)
            row = output(model, batch)[0]
            first = row if first is None else first
            assert torch.equal(row, first), neighbour


@pytest.mark.parametrize(
    "model_type, changes",
    [
        ("qwen3", {}),
        ("gemma", {}),
        ("gemma2", {"sliding_window": 3, "query_pre_attn_scalar": 12, "attn_implementation": "eager"}),
        ("mistral", {"sliding_window": 3}),
        ("qwen2", {}),
        ("starcoder2", {}),
        ("granite", {"attention_multiplier": 0.3}),
        ("smollm3", {}),
    ],
)
@pytest.mark.parametrize("layout", ["auto", "wide", "core"])
def test_other_models(model_type, changes, layout):
    """Norms of queries and keys, windows, soft caps and scales of their own."""
    plain, model = (model_of_type(model_type, **changes) for _ in range(2))
    handle, batch = sh.attach(model, layout=layout), inputs(plain)
    mask = torch.rand(3, 3, 4, generator=torch.Generator().manual_seed(8)) < 0.5
    mask[0, 1], mask[1, :, :2], mask[2, 0] = False, False, True
    close = TIGHT if plain.config._attn_implementation == "sdpa" else LOOSE
    with torch.no_grad():
        for each in (mask, mask[0], mask[1]):
            handle.set_heads(each)
            expected = output(gated_copy(plain, handle.layers, each), batch)
            torch.testing.assert_close(output(model, batch), expected, **close)


@pytest.mark.parametrize("name", ["uneven, shared", "uneven", "whole"])
def test_attention_dropout(name):
    model, handle, _plain, batch = attached(attention_dropout=0.1)
    handle.set_heads(subsets(2)[name])
    model(**batch)
    model.train()
    with pytest.raises(UnsupportedError, match="dropout"):
        model(**batch)
    handle.set_heads(subsets(2)["whole, shared"])
    model(**batch)


def test_originals_that_cannot_be_replaced():
    model, handle, _plain, batch = attached(attention="flex_attention", dtype=torch.float32)
    with pytest.raises(UnsupportedError, match="flex_attention"):
        handle.set_heads(subsets(2)["uneven, shared"])
        model(**batch)


def test_detach_gives_back_the_model():
    model, handle, plain, batch = attached(dtype=torch.float32)
    for name in NAMES:
        handle.set_heads(subsets(2)[name])
        output(model, batch)
    handle.detach()
    assert model.config.to_dict() == plain.config.to_dict()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(output(model, batch), output(plain, batch))

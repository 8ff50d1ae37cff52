"""Subsets a request beside other models, threads and copies; what is saved, and what detaching gives back."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from generation_inputs import TIGHT, alone_outputs, attached, request_masks
from models import build, inputs, loss, masks, output
from transformers import BertModel

import sparse_heads as sh

pytestmark = pytest.mark.usefixtures("one_thread")
MASKS = request_masks()
SCATTERED = MASKS["scattered"]


def mask_for(handle, name="scattered", requests=3):
    return request_masks(len(handle.layers), handle.layers.max_heads, requests)[name]


def test_two_threads_with_their_own_subsets_at_once():
    model, handle, plain, batch = attached()
    named = {name: MASKS[name] for name in ("scattered", "one request empty")}
    named |= {"shared": masks(3)["scattered"], "all": None}
    expected = {}
    with torch.no_grad():
        for name, mask in named.items():
            handle.set_heads(mask)
            expected[name] = output(model, batch)
    handle.set_heads(None)
    start = threading.Barrier(len(named))
    wrong = []

    def work(name):
        torch.set_num_threads(1)
        start.wait()
        for _ in range(20):
            with torch.no_grad(), handle.use_heads(named[name]):
                if not torch.allclose(output(model, batch), expected[name], rtol=1e-5, atol=1e-5):
                    wrong.append(name)

    with ThreadPoolExecutor(len(named)) as pool:
        list(pool.map(work, named))
    assert not wrong
    with torch.no_grad():
        assert torch.equal(output(model, batch), output(plain, batch))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["bert", "llama_lm"])
def test_copies_have_handles_and_subsets_of_their_own(name, duplicate):
    model, handle, plain, batch = attached(name, SCATTERED)
    with torch.no_grad():
        expected = output(model, batch)
        other = duplicate(model)
        own = sh.get_handle(other)
        assert own is not handle
        assert torch.equal(own.subset.mask, SCATTERED)
        assert torch.equal(output(other, batch), expected)
        handle.set_heads(None)
        assert torch.equal(output(other, batch), expected)
        handle.detach()
        assert torch.equal(output(other, batch), expected)
        own.detach()
        for each in (model, other):
            assert torch.equal(output(each, batch), output(plain, batch))


@pytest.mark.parametrize("name", ["bert_classifier", "distilbert", "llama_lm", "gqa", "bert_cross"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_detach_gives_back_the_model(name, attention):
    model, handle, plain, batch = attached(name, attention=attention)
    keys = list(model.state_dict())
    for mask in (mask_for(handle), None, mask_for(handle, "all empty")):
        handle.set_heads(mask)
        loss(output(model, batch)).backward()
        assert list(model.state_dict()) == keys
    handle.detach()
    before = {path: (type(part), sorted(part.__dict__)) for path, part in plain.named_modules()}
    after = {path: (type(part), sorted(part.__dict__)) for path, part in model.named_modules()}
    assert after == before
    assert model.config.to_dict() == plain.config.to_dict()
    assert model.config._attn_implementation == attention
    for part in model.modules():
        assert not part._forward_pre_hooks and not part._forward_hooks
    assert torch.equal(output(model, batch), output(plain, batch))


def test_another_model_of_the_same_configuration_stays_as_it_is():
    """A configuration is one object for all models that are made of it."""
    model = build("bert")
    other = BertModel(model.config).eval()
    batch = inputs(model)
    expected = output(other, batch)
    handle = sh.attach(model)
    handle.set_heads(SCATTERED)
    with torch.no_grad():
        output(model, batch)
        assert torch.equal(output(other, batch), expected)
        expected_on = output(model, batch)
        second = sh.attach(other)
        second.set_heads(MASKS["one request empty"])
        seen = output(other, batch)
        handle.detach()
        assert torch.equal(output(other, batch), seen)
        second.detach()
        assert torch.equal(output(other, batch), expected)
        again = sh.attach(model)
        again.set_heads(SCATTERED)
        assert torch.equal(output(model, batch), expected_on)


@pytest.mark.parametrize("method", ["michel", "entropy"])
def test_scoring_sees_all_heads_and_leaves_the_subset(method):
    model, handle, plain, _ = attached("llama_lm", SCATTERED, "eager")
    batch = inputs(model, 2)
    batch["labels"] = batch["input_ids"]
    scores = [sh.score_heads(each, [batch], method=method).tensor for each in (model, plain)]
    assert torch.equal(*scores)
    assert torch.equal(handle.subset.mask, SCATTERED)


def test_a_saved_subset(tmp_path):
    model, handle, _plain, batch = attached(mask=SCATTERED)
    handle.save_pretrained(tmp_path)
    other = build("bert")
    sh.attach(other).set_heads(sh.HeadSubset.from_pretrained(tmp_path))
    assert torch.equal(output(other, batch), output(model, batch))


def test_a_saved_model_is_a_plain_one(tmp_path):
    model, _handle, plain, batch = attached("bert", SCATTERED)
    output(model, batch)
    model.save_pretrained(tmp_path)
    loaded = BertModel.from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(output(loaded, batch), output(plain, batch))


def test_another_attention_function_is_chosen_meanwhile():
    model, handle, plain, batch = attached(mask=SCATTERED, dtype=torch.float64)
    output(model, batch)
    model.set_attn_implementation("eager")
    expected = alone_outputs(plain, handle.layers, SCATTERED, batch)
    torch.testing.assert_close(output(model, batch).detach(), expected, **TIGHT)
    handle.detach()
    assert model.config._attn_implementation == "eager"

"""Does every request of a batch run under its own subset, as if it were alone on its own masked copy?"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from generation_inputs import LOOSE, TIGHT, alone_outputs, attached, gated_copy, request_masks
from models import MODELS, build, enable_checkpointing, gradients, inputs, loss, masks, output

import sparse_heads as sh
from sparse_heads.integrations.transformers import calls
from sparse_heads.testing import assert_close_to_reference, items_run

pytestmark = pytest.mark.usefixtures("one_thread")
MASKS = request_masks()
SCATTERED = MASKS["scattered"]
SPLIT = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]]).bool()  # groups of two


@pytest.fixture(autouse=True)
def no_record_is_left():
    yield
    assert calls._calls.get() is None
    assert calls._overrides.get() is None


def mask_for(handle, name="scattered", requests=3):
    return request_masks(len(handle.layers), handle.layers.max_heads, requests)[name]


def gated_gradients(plain, layers, mask, batch):
    oracle = gated_copy(plain, layers, mask)
    loss(output(oracle, batch)).backward()
    return gradients(oracle)


def assert_gradients(actual, expected, close=TIGHT):
    for path, grad in expected.items():
        if grad is None:
            assert actual[path] is None, path
        else:
            torch.testing.assert_close(actual[path], grad, **close, msg=lambda text, p=path: f"{p}: {text}")


@pytest.mark.parametrize(
    "name, mask_name, attention",
    [(name, mask_name, "sdpa") for name in ("bert", "llama_lm", "gqa") for mask_name in MASKS]
    + [(name, "first layer empty", attention) for name in MODELS for attention in ("sdpa", "eager")],
)
def test_outputs_and_gradients_are_those_of_each_requests_masked_copy(name, mask_name, attention):
    model, handle, plain, batch = attached(name, attention=attention, dtype=torch.float64)
    mask = mask_for(handle, mask_name)
    handle.set_heads(mask)
    result = output(model, batch)
    loss(result).backward()
    close = TIGHT if attention == "sdpa" else LOOSE
    torch.testing.assert_close(result.detach(), alone_outputs(plain, handle.layers, mask, batch), **close)
    assert_gradients(gradients(model), gated_gradients(plain, handle.layers, mask, batch), close)


@pytest.mark.parametrize("length", [1, 2, 33])
@pytest.mark.parametrize("name", ["bert", "llama_lm"])
def test_lengths(name, length):
    model, handle, plain, _ = attached(name, SCATTERED, dtype=torch.float64)
    batch = inputs(model, 3, length)
    with torch.no_grad():
        result = output(model, batch)
    torch.testing.assert_close(result, alone_outputs(plain, handle.layers, SCATTERED, batch), **TIGHT)


@pytest.mark.parametrize("name", ["bert", "llama_lm"])
def test_one_request(name):
    mask = SCATTERED[1:2]
    model, handle, plain, _ = attached(name, mask, dtype=torch.float64)
    batch = inputs(model, 1)
    torch.testing.assert_close(output(model, batch).detach(), alone_outputs(plain, handle.layers, mask, batch), **TIGHT)


@pytest.mark.parametrize("name", ["bert", "llama_lm", "gqa"])
def test_rows_belong_to_the_requests_in_order(name):
    """Six rows and three requests: as generation repeats rows."""
    model, handle, plain, _ = attached(name, SCATTERED, dtype=torch.float64)
    batch = inputs(model, 6)
    result = output(model, batch)
    loss(result).backward()
    torch.testing.assert_close(result.detach(), alone_outputs(plain, handle.layers, SCATTERED, batch), **TIGHT)
    assert_gradients(gradients(model), gated_gradients(plain, handle.layers, SCATTERED, batch))


@pytest.mark.parametrize("name", ["bert", "llama_lm", "gqa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_good_as_eager(name, dtype):
    model, handle, plain, batch = attached(name, dtype=dtype)
    mask = mask_for(handle)
    handle.set_heads(mask)
    with torch.no_grad():
        low = output(gated_copy(plain, handle.layers, mask), batch)
        exact = output(gated_copy(build(name, dtype=torch.float64), handle.layers, mask), batch)
        assert_close_to_reference(output(model, batch), low, exact)


def test_every_way_to_choose_a_subset():
    model, handle, plain, batch = attached(dtype=torch.float64)
    expected = alone_outputs(plain, handle.layers, SCATTERED, batch)
    subset = sh.HeadSubset(SCATTERED, handle.layers)
    with torch.no_grad():
        for given in (SCATTERED, subset, SCATTERED.transpose(0, 1).contiguous().transpose(0, 1)):
            handle.set_heads(given)
            assert torch.equal(handle.subset.mask, SCATTERED)
            torch.testing.assert_close(output(model, batch), expected, **TIGHT)
            handle.set_heads(None)
            with handle.use_heads(given):
                torch.testing.assert_close(output(model, batch), expected, **TIGHT)
            view = handle.bind(given)
            torch.testing.assert_close(output(view, batch), expected, **TIGHT)
            assert handle.subset is None


def test_a_mask_that_is_changed_later_changes_nothing():
    mask = SCATTERED.clone()
    model, _handle, _plain, batch = attached(mask=mask)
    with torch.no_grad():
        expected = output(model, batch)
        mask.logical_not_()
        assert torch.equal(output(model, batch), expected)


def test_budgets_of_scores():
    model, handle, plain, batch = attached("bert_classifier", dtype=torch.float64)
    scores = sh.HeadScores(torch.rand(3, 4), handle.layers)
    budgets = scores.budgets([0, 5, 12])
    handle.set_heads(budgets)
    with torch.no_grad():
        result = output(model, batch)
    torch.testing.assert_close(result, alone_outputs(plain, handle.layers, budgets.mask, batch), **TIGHT)
    torch.testing.assert_close(result[2], output(plain, batch)[2].detach(), **TIGHT)


def test_subsets_follow_one_another_and_none_is_left_behind():
    model, handle, plain, batch = attached(dtype=torch.float64)
    shared = masks(3)["scattered"]
    with torch.no_grad():
        dense = output(plain, batch)
        for mask in (SCATTERED, shared, MASKS["all empty"], None, MASKS["one request empty"], shared, None):
            handle.set_heads(mask)
            expected = dense if mask is None else output(gated_copy(plain, handle.layers, mask), batch)
            torch.testing.assert_close(output(model, batch), expected, **TIGHT)
        assert torch.equal(output(model, batch), dense)


def test_blocks_nest():
    model, handle, plain, batch = attached(mask=SCATTERED, dtype=torch.float64)
    shared = masks(3)["scattered"]
    wanted = {
        name: output(gated_copy(plain, handle.layers, mask), batch).detach()
        for name, mask in {"outside": SCATTERED, "shared": shared, "inside": MASKS["one request full"]}.items()
    }
    with torch.no_grad():
        with handle.use_heads(shared):
            with handle.use_heads(MASKS["one request full"]):
                with handle.use_heads(None):
                    assert torch.equal(output(model, batch), output(plain, batch))
                torch.testing.assert_close(output(model, batch), wanted["inside"], **TIGHT)
            torch.testing.assert_close(output(model, batch), wanted["shared"], **TIGHT)
        torch.testing.assert_close(output(model, batch), wanted["outside"], **TIGHT)


def poison_heads_that_nobody_runs(handle, mask):
    """NaN in all that belongs to heads that are off in every request."""
    for row, site in enumerate(handle.sites):
        runs = mask[:, row].any(0)
        for role, projection in site.projections.items():
            on = runs.unflatten(0, (site.layer.num_kv_heads, -1)).any(1) if role in ("key", "value") else runs
            tensors = [projection.weight.data.t() if role == "output" else projection.weight.data]
            if role != "output" and projection.bias is not None:
                tensors.append(projection.bias.data)
            for tensor in tensors:
                tensor.unflatten(0, (len(on), -1))[~on] = float("nan")


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama_lm", "gqa"])
def test_heads_that_no_request_runs_may_hold_anything_and_only_pairs_that_are_on_run(name):
    results = []
    for poisoned in (False, True):
        model, handle, _plain, batch = attached(name)
        mask = mask_for(handle)
        mask[:, 0, 2:] = False
        mask[:, 1] = False
        handle.set_heads(mask)
        if poisoned:
            poison_heads_that_nobody_runs(handle, mask)
        with items_run() as items:
            result = output(model, batch)
        loss(result).backward()
        results.append((result.detach(), gradients(model)))
    (clean, clean_grads), (result, grads) = results
    assert torch.equal(result, clean)
    for path, grad in clean_grads.items():
        assert grads[path] is grad is None or torch.equal(grads[path], grad), path
    kept, groups = int(mask.sum()), int(sh.HeadSubset(mask, handle.layers).groups().sum())
    assert (items.in_projection, items.attention, items.out_projection) == (kept + 2 * groups, kept, kept)


@pytest.mark.parametrize("name", ["bert", "llama_lm"])
def test_100_masks_of_other_requests_change_no_bit(name):
    torch.set_num_threads(2)
    model, handle, _plain, batch = attached(name)
    generator = torch.Generator().manual_seed(1)
    seen = []
    with torch.no_grad():
        for neighbour in range(100):
            density = neighbour / 99
            mask = torch.rand(3, 3, 4, generator=generator) < density
            mask[1] = SCATTERED[1]
            handle.set_heads(mask)
            seen.append(output(model, batch)[1])
    for neighbour, row in enumerate(seen):
        assert torch.equal(row, seen[0]), neighbour


def test_what_other_requests_read_changes_no_bit():
    model, _handle, _plain, batch = attached("bert", SCATTERED)
    states = torch.randn(3, 7, 48)
    with torch.no_grad():
        expected = model(inputs_embeds=states, attention_mask=batch["attention_mask"])[0]
        states[1] = float("nan")
        result = model(inputs_embeds=states, attention_mask=batch["attention_mask"])[0]
    assert torch.equal(result[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("name", ["bert_classifier", "llama_lm"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", ["here", "in a thread"])
def test_checkpointed_backward_after_the_block(name, reentrant, where):
    model, handle, plain, batch = attached(name, dtype=torch.float64)
    model.train()
    enable_checkpointing(model, reentrant)
    with handle.use_heads(SCATTERED):
        value = loss(output(model, batch))
    handle.set_heads(MASKS["one request empty"])
    if where == "here":
        value.backward()
    else:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(value.backward).result()
    assert_gradients(gradients(model), gated_gradients(plain, handle.layers, SCATTERED, batch))


def test_backward_after_the_block_and_twice():
    model, handle, plain, batch = attached(dtype=torch.float64)
    with handle.use_heads(SCATTERED):
        value = loss(output(model, batch))
    with handle.use_heads(masks(3)["one head a layer"]):
        value.backward(retain_graph=True)
    assert_gradients(gradients(model), gated_gradients(plain, handle.layers, SCATTERED, batch))
    once = {path: grad.clone() for path, grad in gradients(model).items() if grad is not None}
    value.backward()
    for path, grad in once.items():
        assert torch.equal(model.get_parameter(path).grad, 2 * grad), path


def test_a_part_of_the_model_called_by_itself():
    model, handle, plain, batch = attached("bert_classifier", SCATTERED, dtype=torch.float64)
    oracle = gated_copy(plain, handle.layers, SCATTERED)
    with torch.no_grad():
        torch.testing.assert_close(output(model.bert, batch), output(oracle.bert, batch), **TIGHT)
        states = torch.randn(3, 5, 48, dtype=torch.float64)
        for row in range(3):
            layers = (each.bert.encoder.layer[row] for each in (model, oracle))
            torch.testing.assert_close(*(layer(states) for layer in layers), **TIGHT)


@pytest.mark.parametrize("scale_shape", [(3, 4), (3, 3, 4)])
def test_scale_with_a_subset_a_request(scale_shape):
    model, handle, plain, batch = attached(dtype=torch.float64)
    scale = torch.rand(scale_shape, dtype=torch.float64).requires_grad_()
    with handle.use_heads(SCATTERED, scale=scale):
        result = output(model, batch)
    (gradient,) = torch.autograd.grad(loss(result), scale)
    wanted = scale.detach().clone().requires_grad_()
    expected = output(gated_copy(plain, handle.layers, wanted * SCATTERED), batch)
    (wanted_gradient,) = torch.autograd.grad(loss(expected), wanted)
    torch.testing.assert_close(result, expected, **TIGHT)
    torch.testing.assert_close(gradient, wanted_gradient, **TIGHT)
    if len(scale_shape) == 3:
        assert torch.equal(gradient != 0, SCATTERED)


def test_scale_of_a_request_for_repeated_rows():
    model, handle, plain, _ = attached(dtype=torch.float64)
    batch, scale = inputs(model, 6), torch.rand(3, 3, 4, dtype=torch.float64)
    with torch.no_grad(), handle.use_heads(SCATTERED, scale=scale):
        torch.testing.assert_close(
            output(model, batch), output(gated_copy(plain, handle.layers, scale * SCATTERED), batch), **TIGHT
        )


def test_other_dropout_is_the_models_own():
    model, handle, plain, batch = attached(dtype=torch.float64, hidden_dropout_prob=0.2)
    handle.set_heads(SCATTERED)
    results = []
    for each in (model.train(), gated_copy(plain.train(), handle.layers, SCATTERED)):
        torch.manual_seed(5)
        results.append(output(each, batch))
    torch.testing.assert_close(*results, **TIGHT)


@pytest.mark.parametrize("layout", ["auto", "wide"])
@pytest.mark.parametrize("mask", [SCATTERED, SPLIT], ids=["per request", "split groups"])
def test_an_attention_mask_of_every_head_its_own(layout, mask):
    """Additive, as transformers takes it: `[B, H, T, S]`."""
    plain, model = build("gqa", dtype=torch.float64), build("gqa", dtype=torch.float64)
    handle, ids = sh.attach(model, layout=layout), inputs(model)["input_ids"]
    future = torch.full((7, 7), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)
    attention_mask = torch.randn(3, 4, 7, 7, dtype=torch.float64).tril() + future
    handle.set_heads(mask)
    results = [
        each(ids, attention_mask=attention_mask).logits for each in (model, gated_copy(plain, handle.layers, mask))
    ]
    torch.testing.assert_close(*results, **TIGHT)


def test_gradients_after_repeated_rows_in_inference_mode():
    model = build("bert")
    sh.attach(model).set_heads(masks(3)["scattered"].repeat(3, 1, 1))
    batch = {name: value.repeat_interleave(2, 0) for name, value in inputs(model).items()}
    with torch.inference_mode():
        expected = output(model, batch)
    got = output(model, batch)
    got.sum().backward()
    assert torch.equal(got, expected)

"""Do the scores of heads equal what a plain model gives by hand, and does scoring leave the model as it was?"""

from __future__ import annotations

import copy

import pytest
import torch
from models import build, inputs, masks, output_projection

import sparse_heads as sh
from sparse_heads.errors import InvalidArgumentError, InvalidTypeError

METHODS = ["michel", "michel_projected", "entropy", "redundancy", "attention_guided", "magnitude", "random"]


def labelled(model, rows=3, length=7):
    return inputs(model, rows, length) | {"labels": torch.arange(rows) % 5}


def gated(model, layers):
    """A plain copy whose heads are multiplied by the returned gates `[L, H]` before each output projection."""
    model = copy.deepcopy(model)
    gates = torch.ones(len(layers), layers.max_heads, dtype=model.dtype, requires_grad=True)
    for row, layer in enumerate(layers):
        output_projection(model, layer.name).register_forward_pre_hook(
            lambda _, args, row=row: ((args[0].unflatten(-1, (gates.shape[1], -1)) * gates[row, :, None]).flatten(-2),)
        )
    return model, gates


def examples(batches):
    """Every example as a batch of its own, with the padding it had."""
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            yield {name: value[row : row + 1] for name, value in batch.items()}


def normalised(scores):
    return scores / scores.norm(dim=1, keepdim=True)


def test_michel_is_the_gates_gradient_an_example():
    model = build("bert_classifier", dtype=torch.float64)
    batches = [labelled(model), labelled(model, rows=2, length=5)]
    scores = sh.score_heads(model, batches, "michel")
    copied, gates = gated(model, scores.layers)
    grads = [torch.autograd.grad(copied(**example).loss, gates)[0].abs() for example in examples(batches)]
    torch.testing.assert_close(scores.tensor, normalised(torch.stack(grads).mean(0)), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scores.tensor.norm(dim=1), torch.ones(3, dtype=torch.float64))
    with torch.no_grad():
        example = next(examples(batches))
        ends = []
        for step in (1e-5, -1e-5):
            gates[1, 2] = 1 + step
            ends.append(copied(**example).loss)
    torch.testing.assert_close(((ends[0] - ends[1]) / 2e-5).abs(), grads[0][1, 2], rtol=1e-5, atol=1e-9)


def test_michel_does_not_depend_on_the_split_into_batches():
    model = build("bert_classifier", dtype=torch.float64)
    batches = [labelled(model)]
    together, alone = (sh.score_heads(model, each).tensor for each in (batches, list(examples(batches))))
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


def test_michel_takes_a_loss():
    model = build("bert", dtype=torch.float64)
    batches = [inputs(model)]

    def loss(model, batch):
        return model(**batch).last_hidden_state[:, 0].square().mean()

    scores = sh.score_heads(model, batches, loss=loss)
    copied, gates = gated(model, scores.layers)
    grads = [torch.autograd.grad(loss(copied, example), gates)[0].abs() for example in examples(batches)]
    torch.testing.assert_close(scores.tensor, normalised(torch.stack(grads).mean(0)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["bert", "llama_lm", "bert_classifier"])
def test_michel_projected_by_hand(name):
    model = build(name, dtype=torch.float64)
    batch = inputs(model)
    scores = sh.score_heads(model, [batch], "michel_projected", projections=16, seed=3)
    copied, gates = gated(model, scores.layers)
    outputs = copied(**batch)[0]
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(outputs.shape, generator=generator).double() for _ in range(16)]
    total = torch.zeros_like(gates)
    for row, example in enumerate(examples([batch])):
        result = copied(**example)[0][0]
        if result.dim() == 2:
            result = result * example["attention_mask"][0, :, None]
        for direction in directions:
            total += torch.autograd.grad((result * direction[row]).sum(), gates, retain_graph=True)[0].abs()
    torch.testing.assert_close(scores.tensor, normalised(total), rtol=1e-9, atol=1e-12)


def test_michel_projected_ignores_padding_and_follows_its_seed():
    model = build("bert", dtype=torch.float64)
    batch = inputs(model)
    first, again, other = (sh.score_heads(model, [batch], "michel_projected", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.tensor, again.tensor)
    assert not torch.equal(first.tensor, other.tensor)
    changed = batch | {"input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7)}
    padded = sh.score_heads(model, [changed], "michel_projected", seed=0)
    torch.testing.assert_close(padded.tensor, first.tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["bert", "gqa"])
def test_magnitude_by_hand(name):
    model = build(name)
    scores = sh.score_heads(model, None, "magnitude")
    for row, layer in enumerate(scores.layers):
        module = model.get_submodule(layer.name)
        names = ("q_proj", "k_proj", "v_proj") if name == "gqa" else ("query", "key", "value")
        query, key, value = (getattr(module, each).weight.double() for each in names)
        out = output_projection(model, layer.name).weight.double()
        for head in range(layer.num_heads):
            group, size = head // layer.group_size, layer.head_dim
            blocks = [each[group * size :][:size] for each in (key, value)]
            blocks += [query[head * size :][:size], out[:, head * size :][:, :size]]
            norm = torch.cat([block.flatten() for block in blocks]).norm()
            torch.testing.assert_close(scores.tensor[row, head], norm.detach())


def test_random_follows_its_seed():
    model = build("bert")
    first, again, other = (sh.score_heads(model, None, "random", seed=seed).tensor for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.unique().numel() == 12


@pytest.mark.parametrize("method", ["michel", "michel_projected"])
def test_the_heads_that_carry_the_signal_are_found(method):
    model = build("bert_classifier")
    kept = masks(3)["one head a layer"]
    with torch.no_grad():
        for row, layer in zip(kept, model.bert.encoder.layer, strict=True):
            layer.attention.output.dense.weight.unflatten(1, (4, 12))[:, ~row] *= 1e-3
    batch = labelled(model, rows=8)
    if method == "michel_projected":
        del batch["labels"]
    scores = sh.score_heads(model, [batch], method)
    assert torch.equal(scores.top(3).mask, kept)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("attached", [False, True])
def test_the_model_is_left_as_it_was(method, fails, attached):
    model = build("bert_classifier").train()
    model.bert.encoder.layer[1].eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    handle = sh.attach(model) if attached else None
    if attached:
        handle.set_heads(masks(3)["scattered"])
    before = [module.training for module in model.modules()]
    state, weights = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    batches = [labelled(model)]
    if fails:
        batches.append({"input_ids": torch.full((1, 3), 10**6)})

    if fails and method not in ("magnitude", "random"):
        with pytest.raises(IndexError):
            sh.score_heads(model, batches, method)
    else:
        scores = sh.score_heads(model, batches, method)
        assert scores.tensor.shape == (3, 4)
        assert scores.layers.model_type == "bert"

    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert sh.get_handle(model) is handle
    if attached:
        assert torch.equal(handle.subset.mask, masks(3)["scattered"])


def test_scores_are_of_all_heads_whatever_is_set():
    model = build("bert_classifier")
    batches = [labelled(model)]
    expected = sh.score_heads(model, batches).tensor
    handle = sh.attach(model)
    handle.set_heads(masks(3)["all empty"])
    with handle.use_heads(masks(3)["scattered"]):
        assert torch.equal(sh.score_heads(model, batches).tensor, expected)


def test_frozen_models_are_scored():
    model = build("bert_classifier")
    batches = [labelled(model)]
    expected = sh.score_heads(model, batches).tensor
    with torch.no_grad():
        result = sh.score_heads(model.requires_grad_(False), batches).tensor
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    "method, options, error, message",
    [
        ("best", {}, InvalidArgumentError, "method: wanted one of"),
        ("michel", {"seed": 1}, InvalidTypeError, "options: wanted those of 'michel': .*, got seed"),
        ("magnitude", {"sign": 1}, InvalidTypeError, "options: wanted those of 'magnitude': none, got sign"),
        ("random", {"projections": 16}, InvalidTypeError, "options: wanted those of 'random': seed, got projections"),
        ("random", {"seed": "x"}, InvalidTypeError, "seed: wanted an int, got str 'x'"),
        ("michel_projected", {"seed": -1}, InvalidArgumentError, "seed: wanted at least 0, got int -1"),
        ("entropy", {"loss": torch.sum}, InvalidArgumentError, "loss: wanted None for the method 'entropy'"),
        ("michel_projected", {"projections": 8}, InvalidArgumentError, "projections: wanted at least 16"),
        ("michel_projected", {"projections": 16.0}, InvalidTypeError, "projections: wanted an int"),
        ("michel", {"loss": lambda model, batch: 0.5}, InvalidTypeError, "loss: wanted a function that gives a scalar"),
        ("michel", {"loss": lambda model, batch: model(**batch)[0]}, InvalidTypeError, "loss: wanted .*scalar"),
        (
            "michel",
            {"loss": lambda model, batch: model(**batch)[0].sum() * float("nan")},
            InvalidArgumentError,
            "loss: wanted a finite value, got nan",
        ),
    ],
)
def test_wrong_options(method, options, error, message):
    model = build("bert")
    with pytest.raises(error, match=message):
        sh.score_heads(model, [inputs(model)], method, **options)
    assert sh.get_handle(model) is None


@pytest.mark.parametrize(
    "batches, error, message",
    [
        (None, InvalidTypeError, "batches: wanted an iterable of dicts"),
        ({"input_ids": torch.zeros(1, 3)}, InvalidTypeError, "batches: wanted an iterable of dicts"),
        (torch.zeros(1, 3), InvalidTypeError, "batches: wanted an iterable of dicts"),
        ([], InvalidArgumentError, "batches: wanted at least one batch"),
        ([torch.zeros(1, 3)], InvalidTypeError, "batches: wanted dicts of tensors"),
        ([{"input_ids": [[1, 2]]}], InvalidArgumentError, r"batches: wanted dicts with tensors \[B, T\]"),
    ],
)
def test_wrong_batches(batches, error, message):
    with pytest.raises(error, match=message):
        sh.score_heads(build("bert"), batches)


def test_michel_without_labels():
    model = build("bert_classifier")
    with pytest.raises(InvalidArgumentError, match=r"batches: wanted labels, .* or loss=.*got keys"):
        sh.score_heads(model, [inputs(model)])
    plain = build("bert")
    with pytest.raises(InvalidArgumentError, match="batches: wanted labels"):
        sh.score_heads(plain, [inputs(plain)])

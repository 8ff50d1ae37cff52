"""Does training make exactly the steps it was asked for, the same at every run, and stop before a step that is bad?"""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from gated_models import config, gated
from models import build, inputs, masks, output_projection
from torch import nn

import sparse_heads as sh
from sparse_heads.errors import (
    DetachedError,
    InvalidArgumentError,
    InvalidTypeError,
    NotFiniteError,
    SparseHeadsWarning,
)
from sparse_heads.pruning.training import train

pytestmark = pytest.mark.usefixtures("one_thread")
SUBSET = masks(3)["scattered"]


def labelled(model, rows=3, length=7):
    return inputs(model, rows, length) | {"labels": torch.arange(rows) % 5}


def several(model, count=3):
    return [labelled(model, rows=2 + index, length=4 + index) for index in range(count)]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


class Counted(nn.Module):
    """A model whose loss is its weight times the batch's number, and that remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.unused = nn.Parameter(torch.tensor(1.0))
        self.seen = []

    def forward(self, number):
        self.seen.append((int(number[0, 0]), self.training))
        return self.weight * number.mean() + 0 * self.unused


NUMBERS = [{"number": torch.full((1, 1), float(index))} for index in range(4)]


def run(batches, steps, model=None, **options):
    model = model or Counted().eval()
    optimizer = torch.optim.SGD([model.weight], lr=0.1)
    losses = train(model, optimizer, batches, steps=steps, loss=lambda model, batch: model(**batch), **options)
    return model, optimizer, losses


@pytest.mark.parametrize("steps", [0, 1, 3, 10])
def test_exactly_so_many_steps(steps):
    model, optimizer, losses = run(NUMBERS, steps)
    assert len(losses) == len(model.seen) == steps
    assert torch.isclose(model.weight, 1 - 0.1 * torch.tensor([float(number) for number, _ in model.seen]).sum())
    assert all(training for _, training in model.seen)
    assert not model.training
    assert model.weight.grad is None and model.unused.grad is None
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_list_is_shuffled_anew_each_time_by_the_seed():
    order = [[number for number, _ in run(NUMBERS, 12, seed=seed)[0].seen] for seed in (0, 0, 1)]
    assert order[0] == order[1] != order[2]
    epochs = [order[0][start : start + 4] for start in (0, 4, 8)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_another_iterable_keeps_its_order():
    loader = torch.utils.data.DataLoader(NUMBERS, batch_size=None)
    assert [number for number, _ in run(loader, 6)[0].seen] == [0, 1, 2, 3, 0, 1]

    def forever():
        while True:
            yield NUMBERS[2]

    assert [number for number, _ in run(forever(), 6)[0].seen] == [2] * 6


def test_decay():
    model, optimizer, _ = run([NUMBERS[1]], 4, decay=True)
    assert torch.isclose(model.weight, torch.tensor(1 - 0.1 * (1 + 0.75 + 0.5 + 0.25)))
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_dropout_has_a_random_state_of_its_own():
    def trained(seed, before):
        torch.manual_seed(before)
        model = build("bert_classifier", hidden_dropout_prob=0.3)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        found = torch.get_rng_state()
        losses = train(model, optimizer, [labelled(model)], steps=3, seed=seed)
        assert torch.equal(torch.get_rng_state(), found)
        return losses

    assert trained(0, before=1) == trained(0, before=2) != trained(1, before=1)


@pytest.mark.parametrize("bad", ["nan", "inf", "gradient"])
def test_a_bad_step_is_not_made(bad):
    model = build("bert_classifier")
    expected = build("bert_classifier")
    batch = labelled(model)
    calls = []

    def loss(model, batch):
        calls.append(None)
        value = model(**batch).loss
        if len(calls) < 3:
            return value
        # the square root has an infinite slope at 0
        return value + (model.classifier.bias * 0).sum().abs().sqrt() if bad == "gradient" else value * float(bad)

    def steps(model, count, loss):
        return train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), [batch], steps=count, loss=loss)

    wanted = "finite gradients, got others" if bad == "gradient" else f"a finite value, got {bad}"
    with pytest.raises(NotFiniteError, match=f"loss: wanted {wanted} at step 3 of 5 .*as after step 2"):
        steps(model, 5, loss)
    steps(expected, 2, None)
    assert same(state(model), state(expected))
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "batches, error, message",
    [
        ([], InvalidArgumentError, "batches: wanted at least one batch, got none"),
        (None, InvalidTypeError, "batches: wanted an iterable of dicts"),
        (NUMBERS[0], InvalidTypeError, "batches: wanted an iterable of dicts"),
        ([torch.ones(2, 2)], InvalidTypeError, "batches: wanted dicts of tensors"),
        (iter(()), InvalidArgumentError, "batches: wanted 5, or a list or DataLoader.*gave 0 and none after"),
        ((each for each in NUMBERS[:3]), InvalidArgumentError, "wanted 5, or a list .* that gave 3 and none after"),
    ],
)
def test_wrong_batches(batches, error, message):
    with pytest.raises(error, match=message):
        run(batches, 5)


def test_no_loss():
    model = build("bert_classifier")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidArgumentError, match="batches: wanted labels"):
        train(model, optimizer, [inputs(model)], steps=1)
    with pytest.raises(InvalidTypeError, match="loss: wanted a function that gives a scalar tensor"):
        train(model, optimizer, [inputs(model)], steps=1, loss=lambda model, batch: model(**batch).logits)
    with pytest.raises(InvalidArgumentError, match="steps: wanted at least 0"):
        train(model, optimizer, [inputs(model)], steps=-1)


def blocks(model, layers):
    """Of each layer, what belongs to each head: query rows and output columns `[H, ...]`."""
    for layer in layers:
        query = model.get_submodule(layer.name).query.weight
        output = output_projection(model, layer.name).weight
        yield query.unflatten(0, (4, 12)), output.unflatten(1, (4, 12)).transpose(0, 1)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_recovery_trains_the_heads_that_are_on_and_no_others(weight_decay):
    model, plain = build("bert_classifier"), build("bert_classifier")
    losses = sh.recover(model, SUBSET, several(model), steps=7, lr=1e-2, weight_decay=weight_decay, seed=3)
    handle = sh.get_handle(model)
    assert torch.equal(handle.subset.mask, SUBSET)
    assert len(losses) == 7
    for row, (new, old) in enumerate(zip(blocks(model, handle.layers), blocks(plain, handle.layers), strict=True)):
        for trained, before in zip(new, old, strict=True):
            off = ~SUBSET[row]
            assert torch.equal(trained[off], before[off])
            assert not any(torch.equal(*each) for each in zip(trained[~off], before[~off], strict=True))
    assert not torch.equal(model.classifier.weight, plain.classifier.weight)
    again = build("bert_classifier")
    assert sh.recover(again, SUBSET, several(model), steps=7, lr=1e-2, weight_decay=weight_decay, seed=3) == losses


def test_recovery_is_adam_with_linear_decay():
    model, plain = build("bert_classifier", dtype=torch.float64), build("bert_classifier", dtype=torch.float64)
    batch = labelled(model)
    losses = sh.recover(model, SUBSET, [batch], steps=4, lr=1e-3)
    sh.attach(plain).set_heads(SUBSET)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    expected = []
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 4)
        optimizer.zero_grad()
        loss = plain(**batch).loss
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-12)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(state(model), state(plain), rtol=1e-9, atol=1e-12)


def test_recovery_leaves_frozen_parameters():
    model, plain = build("bert_classifier"), build("bert_classifier")
    model.bert.requires_grad_(False)
    sh.recover(model, SUBSET, [labelled(model)], steps=2, lr=1e-2)
    assert same(state(model.bert), state(plain.bert))
    model.requires_grad_(False)
    with pytest.raises(InvalidArgumentError, match="model: wanted a parameter that requires a gradient"):
        sh.recover(model, SUBSET, [labelled(model)], steps=2)


@pytest.mark.parametrize("method", ["gumbel", "ste", "hard concrete", "layerwise"])
def test_gates_train(method):
    model, gates, _plain, batch = gated(method, "bert_classifier", dtype=torch.float32)
    model.eval()
    batch["labels"] = torch.arange(3)
    before = gates.method.importances.detach().clone()
    with pytest.warns(SparseHeadsWarning) if gates.method.schedule_steps > 4 else no_warning():
        losses = sh.train_gates(gates, [batch], steps=4, lr=1e-3, seed=1)
    assert len(losses) == gates.steps_done == 4
    assert (gates.method.importances != before).any()
    assert not model.training
    assert gates.method.importances.grad is None


def test_gates_train_as_by_hand():
    batches = None
    results = []
    for by_hand in (False, True):
        model, gates, _plain, batch = gated("hard concrete", "bert_classifier")
        batches = [batch | {"labels": torch.arange(3)}]
        if by_hand:
            optimizer = torch.optim.AdamW(gates.parameter_groups(lr=1e-3, gate_lr=0.3))
            for _ in range(5):
                optimizer.zero_grad()
                (model(**batches[0]).loss + gates.penalty()).backward()
                optimizer.step()
                gates.step()
        else:
            sh.train_gates(gates, batches, steps=5, lr=1e-3, gate_lr=0.3)
        results.append((gates.method.importances.detach(), state(model)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


def test_a_bad_step_leaves_the_gates():
    results = []
    for steps in (2, 5):
        model, gates, _plain, batch = gated("gumbel", "bert_classifier", anneal_steps=3)
        calls = []

        def loss(model, batch, calls=calls):
            calls.append(None)
            return model(**batch).logits.square().mean() * (1 if len(calls) < 3 else float("nan"))

        if steps == 5:
            with pytest.raises(NotFiniteError, match="got nan at step 3 of 5 .* as after step 2"):
                sh.train_gates(gates, [batch], steps=5, lr=1e-3, loss=loss)
        else:
            with pytest.warns(SparseHeadsWarning):
                sh.train_gates(gates, [batch], steps=2, lr=1e-3, loss=loss)
        assert gates.steps_done == 2
        results.append((gates.method.importances.detach(), state(model)))
    assert torch.equal(results[0][0], results[1][0])
    assert same(results[0][1], results[1][1])


def test_a_schedule_longer_than_the_training_warns():
    model = build("bert_classifier")
    gates = sh.attach_gates(model, config("gumbel", anneal_steps=30))
    batches = [labelled(model)]
    with pytest.warns(SparseHeadsWarning, match="takes 30 steps, but training ends after 4"):
        sh.train_gates(gates, batches, steps=4, lr=1e-3)
    with pytest.warns(SparseHeadsWarning, match="ends after 29"):
        sh.train_gates(gates, batches, steps=25, lr=1e-3)
    with no_warning():
        sh.train_gates(gates, batches, steps=1, lr=1e-3)


def test_scoring_after_training_sees_the_trained_model():
    model = build("bert_classifier")
    sh.recover(model, None, [labelled(model)], steps=2, lr=1e-2)
    copied = copy.deepcopy(model)
    assert sh.score_heads(model, [labelled(model)]) == sh.score_heads(copied, [labelled(model)])


def test_recovery_takes_a_handle_with_options_of_its_own():
    model = build("bert_classifier")
    handle = sh.attach(model, layout="wide")
    sh.recover(model, SUBSET, [labelled(model)], steps=1)
    assert sh.get_handle(model) is handle and torch.equal(handle.subset.mask, SUBSET)


def test_detached_gates_do_not_train():
    model = build("bert_classifier")
    gates = sh.attach_gates(model, sh.DSPConfig(k=3, anneal_steps=0))
    gates.detach()
    before = state(model)
    with pytest.raises(DetachedError, match="attach new ones"):
        sh.train_gates(gates, [labelled(model)], steps=1, lr=0.1)
    assert same(before, state(model))

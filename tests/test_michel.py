"""Is the iterative Michel method what removing heads one step at a time by hand gives?"""

from __future__ import annotations

import copy

import pytest
import torch
from generation_inputs import gated_copy
from models import build, inputs

import sparse_heads as sh
from sparse_heads.errors import InvalidArgumentError, InvalidTypeError
from sparse_heads.pruning.gradients import michel

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def batches_of(model, name):
    batches = [inputs(model), inputs(model, rows=2, length=5)]
    if name == "bert_classifier":
        return [batch | {"labels": torch.arange(len(batch["input_ids"])) % 5} for batch in batches]
    return [batch | {"labels": batch["input_ids"]} for batch in batches]


def scores_by_hand(plain, layers, batches, kept):
    """Mean absolute gradient an example with the gates of removed heads at 0: by each layer's norm, and as it is."""
    total, count = torch.zeros(kept.shape, dtype=torch.float64), 0
    for batch in batches:
        rows = len(batch["input_ids"])
        gates = kept.double().repeat(rows, 1, 1).requires_grad_()
        loss = gated_copy(plain, layers, gates)(**batch).loss
        total += (torch.autograd.grad(loss, gates)[0] * rows).abs().sum(0)
        count += rows
    total = total / count * kept
    return torch.where(kept.sum(1, keepdim=True) == 1, 1.0, total / total.norm(dim=1, keepdim=True)), total


def removal_by_hand(plain, layers, batches, step):
    """The heads `(row, head)` in the order in which they go."""
    kept, order = layers.real_heads(), []
    while kept.any():
        scores = torch.stack(scores_by_hand(plain, layers, batches, kept), -1).tolist()
        ranked = sorted(kept.nonzero().tolist(), key=lambda place: scores[place[0]][place[1]])
        for row, head in ranked[:step]:
            kept[row, head] = False
            order.append((row, head))
    return order


@pytest.mark.parametrize("name", ["bert_classifier", "gqa"])
@pytest.mark.parametrize("step", [1, 5])
def test_heads_go_in_the_order_of_exact_re_scoring(name, step):
    model = build(name, dtype=torch.float64)
    batches = batches_of(model, name)
    scores = sh.score_heads(model, batches, "michel", rescore_every=step)
    order = removal_by_hand(model, scores.layers, batches, step)
    wanted = torch.empty_like(scores.tensor)
    for position, place in enumerate(order):
        wanted[place] = position
    assert torch.equal(scores.tensor, wanted)
    one_shot = sh.score_heads(model, batches, "michel")
    assert any(not torch.equal(scores.top(k).mask, one_shot.top(k).mask) for k in range(12))


def test_the_top_of_a_boundary_is_what_the_method_leaves():
    model = build("bert_classifier", dtype=torch.float64)
    batches = batches_of(model, "bert_classifier")
    scores = sh.score_heads(model, batches, "michel", rescore_every=5)
    gone = removal_by_hand(model, scores.layers, batches, 5)
    previous = torch.zeros(3, 4, dtype=torch.bool)
    for k in range(13):
        mask = scores.top(k).mask
        assert (mask | previous).equal(mask)
        previous = mask
        if k in (2, 7):
            assert {tuple(place) for place in (~mask).nonzero().tolist()} == set(gone[: 12 - k])


@pytest.mark.parametrize("method", ["michel", "michel_projected"])
@pytest.mark.parametrize("step", [12, 100])
def test_one_step_ranks_as_the_method_at_once(method, step):
    model = build("bert_classifier", dtype=torch.float64)
    batches = batches_of(model, "bert_classifier")
    at_once = sh.score_heads(model, batches, method)
    in_steps = sh.score_heads(model, batches, method, rescore_every=step)
    assert all(at_once.top(k) == in_steps.top(k) for k in range(13))


def test_projected_scores_again_without_what_went():
    model = build("bert", dtype=torch.float64)
    batches = [inputs(model)]
    scores = sh.score_heads(model, batches, "michel_projected", rescore_every=4, seed=2)
    kept = torch.ones(3, 4, dtype=torch.bool)
    for left in (8, 4):
        silenced = copy.deepcopy(model)
        for row, layer in enumerate(silenced.encoder.layer):
            layer.attention.output.dense.weight.data.unflatten(1, (4, 12))[:, ~kept[row]] = 0
        again = sh.score_heads(silenced, batches, "michel_projected", seed=2).tensor.masked_fill(~kept, -1)
        kept = sh.HeadScores(again, scores.layers).top(left).mask
        assert torch.equal(scores.top(left).mask, kept)


def test_of_equal_heads_the_last_goes_first():
    model = build("bert_classifier", num_hidden_layers=1)
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.output.dense.weight.zero_()
    scores = sh.score_heads(model, batches_of(model, "bert_classifier"), "michel", rescore_every=2)
    assert scores.tensor.tolist() == [[3, 2, 1, 0]]


def test_a_loss_of_tokens_weighs_examples_by_their_labels():
    model = build("bert_masked_lm", dtype=torch.float64)
    batch = inputs(model)
    labels = batch["input_ids"].clone()
    labels[0, 1:] = -100
    scores = sh.score_heads(model, [batch | {"labels": labels}], "michel")
    sums, labelled = [], (labels != -100).sum()
    for row in range(3):
        gates = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
        example = {name: value[row : row + 1] for name, value in batch.items()}
        logits = gated_copy(model, scores.layers, gates)(**example).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, labels[row], reduction="sum") / labelled
        sums.append(torch.autograd.grad(loss, gates)[0].abs())
    expected = torch.stack(sums).sum(0)
    torch.testing.assert_close(scores.tensor, expected / expected.norm(dim=1, keepdim=True), **EXACT)


@pytest.mark.parametrize("method", ["michel", "michel_projected"])
@pytest.mark.parametrize(
    "value, error, message",
    [
        (0, InvalidArgumentError, "rescore_every: wanted at least 1, got int 0"),
        (1.5, InvalidTypeError, "rescore_every: wanted an int"),
    ],
)
def test_wrong_steps(method, value, error, message):
    model = build("bert_classifier")
    with pytest.raises(error, match=message):
        sh.score_heads(model, batches_of(model, "bert_classifier"), method, rescore_every=value)


def test_a_generator_serves_every_pass():
    model = build("bert_classifier")
    batches = batches_of(model, "bert_classifier")
    scores = sh.score_heads(model, (batch for batch in batches), "michel", rescore_every=6)
    assert scores == sh.score_heads(model, batches, "michel", rescore_every=6)
    handle = sh.attach(model)
    with pytest.raises(InvalidArgumentError, match=r"batches: wanted at least one, at every pass .*read only once"):
        michel(handle, (batch for batch in batches), rescore_every=6)


def test_outputs_that_are_not_finite():
    model = build("bert")
    with torch.no_grad():
        model.encoder.layer[2].output.dense.bias.fill_(float("inf"))
    with pytest.raises(InvalidArgumentError, match="every head a number, got NaN after 0 heads"):
        sh.score_heads(model, [inputs(model)], "michel_projected", rescore_every=6)

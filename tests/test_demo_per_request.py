"""The demo's batch with a budget a sentence: whose heads are off, and that a wrong embedding stops the demo."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from demo_encoder import save_encoder, sentences
from torch import Tensor, nn

import sparse_heads as sh
from sparse_heads.demo import per_request
from sparse_heads.demo.baselines import sharing_copy
from sparse_heads.demo.encoder import Batch, Encoder, load_encoder, mean_pooled
from sparse_heads.integrations.transformers.handle import Handle
from sparse_heads.layers import LayerInfo, Layers


class Attached(NamedTuple):
    """A tiny encoder whose model is attached, its plain model, scores of the 12 heads, and a batch of 8 sentences."""

    encoder: Encoder
    plain: nn.Module
    handle: Handle
    scores: sh.HeadScores
    batch: Batch

    def measure(self, batches: list[Batch]) -> dict:
        return per_request.measure_requests(self.encoder, self.plain, self.handle, self.scores, batches, 0, 0)

    def embed(self, subset: sh.HeadSubset) -> Tensor:
        return per_request.embed(self.encoder, self.handle, self.batch, subset)

    def check(self, subset: sh.HeadSubset, embeddings: Tensor) -> float:
        return per_request.check_alone(self.encoder, self.handle, self.batch, subset, embeddings)


@pytest.fixture
def attached(tmp_path: Path) -> Attached:
    encoder = load_encoder(str(save_encoder(tmp_path / "bert")), "cpu")
    scores = sh.score_heads(encoder.model, None, "random", seed=0)
    plain = sharing_copy(encoder.model)
    return Attached(encoder, plain, sh.attach(encoder.model), scores, encoder.batches(sentences(8))[0][0])


BUDGETS = [2, 4, 6, 8, 10, 12, 2, 4]


def test_budgets_take_turns_from_the_fewest_heads_to_all():
    layers = Layers([LayerInfo(f"{i}", "encoder", i, "self", 12, 12, 4, 4) for i in range(6)], "bert")
    assert per_request.own_budgets(layers, 8) == [12, 24, 36, 48, 60, 72, 12, 24]


def test_cosines_are_those_of_each_sentence_under_its_own_heads(attached: Attached):
    """Recomputed sentence by sentence, with the output projection's columns zeroed by hand."""
    measured = attached.measure([attached.batch])
    assert measured["budgets"] == BUDGETS
    for request, (budget, cosine) in enumerate(zip(BUDGETS, measured["cosines"], strict=True)):
        sentence = {name: tensor[[request]] for name, tensor in attached.batch.items()}
        pruned = copy.deepcopy(attached.plain)
        with torch.no_grad():
            for layer, row in zip(pruned.encoder.layer, attached.scores.top(budget).mask, strict=True):
                layer.attention.output.dense.weight.unflatten(1, (4, 12))[:, ~row] = 0
            dense, kept = (mean_pooled(model(**sentence)[0], sentence) for model in (attached.plain, pruned))
        assert cosine == pytest.approx((dense * kept).sum().item(), abs=1e-5)
    assert min(measured["cosines"]) < 0.999


def test_the_batch_of_medium_length_is_whole(attached: Attached):
    batches, _ = attached.encoder.batches(sentences(40))
    measured = attached.measure(batches)
    assert len(measured["budgets"]) == 32 and measured["tokens"] == batches[0]["input_ids"].shape[1]
    assert [(timing["label"], timing["kept"]) for timing in measured["timings"]] == [("dense", 12), ("own budgets", 7)]


@pytest.mark.parametrize("wrong", [1e-4, float("nan")])
def test_a_wrong_embedding_stops_the_demo(attached: Attached, wrong: float):
    subset = attached.scores.budgets(BUDGETS)
    embeddings = attached.embed(subset)
    assert attached.check(subset, embeddings) <= 1e-6
    embeddings[3, 5] += wrong
    with pytest.raises(sh.errors.SparseHeadsError, match="sentence 3 of the batch: .* its own budget of 8,"):
        attached.check(subset, embeddings)


def test_one_head_too_many_stops_the_demo(attached: Attached):
    embeddings = attached.embed(attached.scores.budgets(BUDGETS))
    fewer = [*BUDGETS[:6], BUDGETS[6] - 1, BUDGETS[7]]
    with pytest.raises(sh.errors.SparseHeadsError, match="sentence 6 of the batch: .* its own budget of 1,"):
        attached.check(attached.scores.budgets(fewer), embeddings)

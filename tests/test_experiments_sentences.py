"""Does the sentence study keep its splits apart, and measure what it says?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from demo_encoder import save_encoder
from demo_encoder import sentences as some_sentences

from benchmarks.experiments import sentences, text
from benchmarks.experiments.cells import Cell
from benchmarks.experiments.study import FROZEN
from benchmarks.experiments.text import Texts
from sparse_heads.demo.encoder import load_encoder

FINAL = Cell("sentences", FROZEN, "DSP", 6, 0)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A tiny random encoder, and texts of a few words."""
    encoder = load_encoder(str(save_encoder(tmp_path / "encoder")), "cpu")
    found = some_sentences(400)
    texts = Texts(found[:250], found[250:300], found[300:350], found[350:])
    sentences.training_targets.cache_clear()
    monkeypatch.setattr(sentences, "loaded", lambda: (encoder, texts))
    yield
    sentences.training_targets.cache_clear()


def test_packages_stay_together():
    packages = {
        f"package{number}": [f"sentence {number} {one}" for one in range(3 + number % 9)] for number in range(60)
    }
    splits = text.split_by_package(packages)
    place = {sentence: name for name, part in splits.items() for sentence in part}
    assert sorted(place) == sorted(sentence for part in packages.values() for sentence in part)
    for part in packages.values():
        assert len({place[sentence] for sentence in part}) == 1
    for name, share in text.SHARES.items():
        assert len(splits[name]) == pytest.approx(share * len(place), abs=12)
    assert text.split_by_package(packages) == splits


def test_the_language_reference_is_prose():
    found = text.reference_sentences()
    assert len(found) > 500 and len(set(found)) == len(found)


def test_a_seed_changes_the_training_order_and_nothing_held_out(tiny: None):
    first, second, again = (sentences.prepare(seed, smoke=False) for seed in (0, 1, 0))
    assert not all(
        torch.equal(one["input_ids"], other["input_ids"])
        for one, other in zip(first.train, second.train, strict=True)
        if one["input_ids"].shape == other["input_ids"].shape
    )
    for one, other in zip(first.train, again.train, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(first.development.dense, second.development.dense)
    for name, split in first.tests.open(FINAL).items():
        assert torch.equal(split.dense, second.tests.open(FINAL)[name].dense)


def test_training_targets_are_the_dense_embeddings_of_their_sentences(tiny: None):
    context = sentences.prepare(3, smoke=False)
    assert sum(len(batch["input_ids"]) for batch in context.train) == 250
    for batch in context.train:
        assert len(batch["input_ids"]) <= sentences.BATCH_SIZE
        assert context.loss(context.model, batch).item() == pytest.approx(0.0, abs=1e-5)


def test_the_dense_model_is_like_itself_and_no_other(tiny: None):
    context = sentences.prepare(0, smoke=False)
    same = context.evaluate(context.model, context.development)
    assert min(same["cosine"]) > 1 - 1e-5 and len(same["cosine"]) == 50
    assert same["recall@10"] == 1.0 and same["rank correlation"] == pytest.approx(1.0)
    with torch.no_grad():
        context.model.encoder.layer[0].attention.output.dense.weight.mul_(-1)
    other = context.evaluate(context.model, context.development)
    assert max(other["cosine"]) < 1 - 1e-4 and other["recall@10"] < 1 and other["rank correlation"] < 1


def test_rank_correlation_by_hand():
    left = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert sentences.rank_correlation(left, left.exp()) == pytest.approx(1.0)
    assert sentences.rank_correlation(left, -left) == pytest.approx(-1.0)
    # 1 - 6 * (1 + 1) / (4 * 15)
    assert sentences.rank_correlation(left, torch.tensor([1.0, 3.0, 2.0, 9.0])) == pytest.approx(0.8)

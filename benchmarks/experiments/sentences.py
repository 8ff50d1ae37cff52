"""Study (a): all-MiniLM-L6-v2 without labels. Embeddings of real sentences should stay those of the dense model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from sparse_heads.demo import DEFAULT_MODEL
from sparse_heads.demo.encoder import Encoder, load_encoder, mean_pooled
from sparse_heads.demo.quality import neighbour_recall

from .plans import frozen_table, label_free_scores, smoke_table, trained_table
from .study import FROZEN, Batch, Claim, Context, Metrics, Sealed, Study
from .text import Texts, load_texts

DENSE = "dense"  # key of a training batch's targets, which the model does not take
BATCH_SIZE = 16
GROUP = 8  # batches that share their sentences' lengths


@dataclass(frozen=True)
class Sizes:
    """Sentences of every part; train is all that the split has, unless it is a number."""

    train: int | None
    calibration: int
    development: int
    test: int


FULL = Sizes(train=None, calibration=128, development=256, test=256)
SMOKE = Sizes(train=64, calibration=8, development=32, test=32)


@dataclass(frozen=True)
class Split:
    """Batches of held-out sentences, the order that sorted them, and the dense model's embeddings [sentences, E]."""

    batches: list[Batch]
    order: Tensor
    dense: Tensor


def prepare(seed: int, smoke: bool) -> Context:
    """One seed: another order of the training sentences, other ones to calibrate on; the held-out ones stay."""
    sizes = SMOKE if smoke else FULL
    encoder, texts = loaded()
    sentences = texts.train[: sizes.train]
    order = list(range(len(sentences)))
    random.Random(seed).shuffle(order)
    calibration, _ = encoder.batches([sentences[index] for index in order[: sizes.calibration]])
    random.Random(seed).shuffle(calibration)
    tests = {"test": texts.test[: sizes.test], "reference": texts.reference[: sizes.test]}
    return Context(
        model=encoder.model,
        train=training_batches(encoder, sentences, order, training_targets(sizes.train)),
        calibration=calibration,
        loss=distance,
        score_loss=None,
        evaluate=lambda model, split: similarity(encoder, model, split),
        development=held_out(encoder, texts.development[: sizes.development]),
        tests=Sealed({name: held_out(encoder, part) for name, part in tests.items()}),
        special_tokens=encoder.tokenizer.all_special_ids,
        facts={"weights": encoder.source, "texts": texts.facts},
    )


@lru_cache(maxsize=1)
def loaded() -> tuple[Encoder, Texts]:
    """The encoder, without dropout as its targets are, and all sentences."""
    encoder = load_encoder(DEFAULT_MODEL, "cpu")
    for module in encoder.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return encoder, load_texts()


@lru_cache(maxsize=1)
def training_targets(count: int | None) -> Tensor:
    """The dense model's embeddings [sentences, E] of the first `count` training sentences."""
    encoder, texts = loaded()
    return encoder.embed(*encoder.batches(texts.train[:count]))


def held_out(encoder: Encoder, sentences: Sequence[str]) -> Split:
    """A split with the dense model's embeddings."""
    batches, order = encoder.batches(sentences)
    return Split(batches, order, encoder.embed(batches, order))


def training_batches(encoder: Encoder, sentences: Sequence[str], order: Sequence[int], targets: Tensor) -> list[Batch]:
    """Batches of 16 sentences in `order`, with their targets; groups of eight batches are sorted by length within."""
    token_ids = encoder.tokenizer(list(sentences), truncation=True, max_length=128)["input_ids"]
    batches = []
    for start in range(0, len(order), GROUP * BATCH_SIZE):
        group = sorted(order[start : start + GROUP * BATCH_SIZE], key=lambda index: len(token_ids[index]))
        rows = [group[first : first + BATCH_SIZE] for first in range(0, len(group), BATCH_SIZE)]
        random.Random(start).shuffle(rows)
        for chosen in rows:
            padded = encoder.tokenizer.pad({"input_ids": [token_ids[index] for index in chosen]}, return_tensors="pt")
            batches.append({**padded, DENSE: targets[chosen]})
    return batches


def distance(model: nn.Module, batch: Batch) -> Tensor:
    """1 minus the mean cosine to the dense embeddings."""
    inputs = {name: value for name, value in batch.items() if name != DENSE}
    embeddings = mean_pooled(model(**inputs).last_hidden_state, inputs)
    return 1 - (embeddings * batch[DENSE]).sum(-1).mean()


def similarity(encoder: Encoder, model: nn.Module, split: Split) -> Metrics:
    """Cosine of every sentence to the dense model's, neighbours kept, and rank correlation of all pairs' cosines."""
    embeddings = Encoder(model, encoder.tokenizer, encoder.source).embed(split.batches, split.order)
    cosines = (embeddings * split.dense).sum(-1)
    return {
        "cosine": cosines.tolist(),
        "recall@10": neighbour_recall(embeddings, split.dense),
        "rank correlation": rank_correlation(pair_cosines(embeddings), pair_cosines(split.dense)),
    }


def pair_cosines(embeddings: Tensor) -> Tensor:
    """Cosines of all pairs of different sentences, [pairs]."""
    rows, columns = torch.triu_indices(len(embeddings), len(embeddings), offset=1)
    return (embeddings @ embeddings.T)[rows, columns]


def rank_correlation(left: Tensor, right: Tensor) -> float:
    """Spearman's correlation of two samples [n] without ties to speak of."""
    ranks = torch.stack([left.argsort().argsort(), right.argsort().argsort()]).double()
    return torch.corrcoef(ranks)[0, 1].item()


# A quarter and a half of the 72 heads first; an eighth and three quarters with the hyperparameters of their neighbours.
SCORES = label_free_scores(step=9)
TABLES = (
    frozen_table(SCORES, counts={18: 18, 36: 36, 9: 18, 54: 36}, steps=300),
    trained_table(SCORES, counts={18: 18, 36: 18}, steps=300),
)
STUDY = Study(
    name="sentences",
    title="all-MiniLM-L6-v2 without labels: closeness to the embeddings with all 72 heads",
    prepare=prepare,
    primary="cosine",
    tests=("test", "reference"),
    tables=TABLES,
    claim=Claim(FROZEN, "DSP", 18, "test"),
    smoke=tuple(smoke_table(table, steps=2, counts=(18,)) for table in TABLES),
)

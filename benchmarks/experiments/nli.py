"""Study (b): does one sentence follow from another? Exact labels, a small BERT trained from scratch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from . import nli_sentences
from .base_models import Training, trained_model, weights_digest
from .nli_semantics import LABELS
from .plans import frozen_table, labelled_scores, smoke_table, trained_table
from .study import FROZEN, Batch, Claim, Context, Metrics, Sealed, Study
from .words import END, SPECIAL, START, Vocabulary, different, in_batches, padded

VOCABULARY = Vocabulary(nli_sentences.all_words())
BATCH_SIZE, BASE_BATCH_SIZE = 32, 64
BASE_SEED, DEVELOPMENT_SEED, TEST_SEED = 10_000, 10_001, 10_002  # no study runs that many seeds
HELD_OUT = 2048
BASE, SMOKE_BASE = Training(steps=4000), Training(steps=20)


def prepare(seed: int, smoke: bool) -> Context:
    """One seed: other pairs to train and calibrate on; the model and the held-out pairs stay."""
    batches, count = (8, 64) if smoke else (400, HELD_OUT)
    train = list(islice(batches_of("train", seed, BATCH_SIZE), batches))
    return Context(
        model=base_model(smoke),
        train=train,
        calibration=random.Random(seed).sample(train, min(8, len(train))),
        loss=loss,
        score_loss=loss,
        evaluate=accuracy,
        development=held_out("development", DEVELOPMENT_SEED, count),
        tests=Sealed({"test": held_out("test", TEST_SEED, count)}),
        special_tokens=range(len(SPECIAL)),
        facts={
            "weights": f"trained from scratch, {weights_digest(base_model(smoke))}",
            "training steps": (SMOKE_BASE if smoke else BASE).steps,
        },
    )


@lru_cache(maxsize=2)
def base_model(smoke: bool = False) -> BertForSequenceClassification:
    """The dense classifier: 4 layers of 8 heads."""
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=192,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
        id2label=dict(enumerate(LABELS)),
    )
    return trained_model(
        "nli",
        lambda: BertForSequenceClassification(config),
        lambda: batches_of("train", BASE_SEED, BASE_BATCH_SIZE),
        SMOKE_BASE if smoke else BASE,
    )


def batches_of(split: str, seed: int, size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of a split without end."""
    return map(as_batch, in_batches(nli_sentences.pairs(split, seed), size))


def held_out(split: str, seed: int, count: int) -> list[dict[str, Tensor]]:
    """Batches of the first `count` different pairs of a split."""
    return list(map(as_batch, in_batches(different(nli_sentences.pairs(split, seed), count), 256)))


def as_batch(pairs: Sequence[nli_sentences.Pair]) -> dict[str, Tensor]:
    """<start> premise <end> hypothesis <end>, as the model's forward takes it."""
    first = [[START, *VOCABULARY.ids(pair.premise), END] for pair in pairs]
    second = [[*VOCABULARY.ids(pair.hypothesis), END] for pair in pairs]
    rows = [one + other for one, other in zip(first, second, strict=True)]
    return {
        "input_ids": padded(rows),
        "attention_mask": padded([[1] * len(row) for row in rows]),
        "token_type_ids": padded([[0] * len(one) + [1] * len(other) for one, other in zip(first, second, strict=True)]),
        "labels": torch.tensor([pair.label for pair in pairs]),
    }


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy."""
    return model(**batch).loss


@torch.no_grad()
def accuracy(model: nn.Module, batches: Sequence[Batch]) -> Metrics:
    """Of every pair, whether its label is the likeliest, and the log-probability of its label."""
    logits = torch.cat([model(**batch).logits for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    return {
        "accuracy": (logits.argmax(-1) == labels).float().tolist(),
        "log-probability": (-F.cross_entropy(logits, labels, reduction="none")).tolist(),
    }


# A quarter and a half of the 32 heads first; an eighth and three quarters with the hyperparameters of their neighbours.
SCORES = labelled_scores(step=4)
TABLES = (
    frozen_table(SCORES, counts={8: 8, 16: 16, 4: 8, 24: 16}, steps=400),
    trained_table(SCORES, counts={8: 8, 16: 8}, steps=400),
)
STUDY = Study(
    name="nli",
    title="Entailment of quantified sentences: accuracy of a small BERT with 32 heads",
    prepare=prepare,
    primary="accuracy",
    tests=("test",),
    tables=TABLES,
    claim=Claim(FROZEN, "DSP", 8, "test"),
    smoke=tuple(smoke_table(table, steps=2, counts=(8,)) for table in TABLES),
)

"""Study (b): does one sentence follow from another? Exact labels, a small BERT trained from scratch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from . import nli_sentences
from .base_models import Training
from .generated import Generated
from .nli_semantics import LABELS
from .plans import frozen_table, labelled_scores, smoke_table, trained_table
from .study import FROZEN, Batch, Claim, Metrics, Study
from .words import END, START, Vocabulary, padded

VOCABULARY = Vocabulary(nli_sentences.all_words())


def fresh() -> BertForSequenceClassification:
    """An untrained classifier: 4 layers of 8 heads."""
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
    return BertForSequenceClassification(config)


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


TASK = Generated(
    name="nli",
    pairs=nli_sentences.pairs,
    as_batch=as_batch,
    fresh=fresh,
    base=Training(steps=4000),
    loss=loss,
    evaluate=accuracy,
    held_out=2048,
    smoke_held_out=64,
)

# A quarter and a half of the 32 heads first; an eighth and three quarters with the hyperparameters of their neighbours.
SCORES = labelled_scores(step=4)
TABLES = (
    frozen_table(SCORES, counts={8: 8, 16: 16, 4: 8, 24: 16}, steps=400),
    trained_table(SCORES, counts={8: 8, 16: 8}, steps=400),
)
STUDY = Study(
    name="nli",
    title="Entailment of quantified sentences: accuracy of a small BERT with 32 heads",
    prepare=TASK.prepare,
    primary="accuracy",
    tests=("test",),
    tables=TABLES,
    claim=Claim(FROZEN, "DSP", 8, "test"),
    smoke=tuple(smoke_table(table, steps=2, counts=(8,)) for table in TABLES),
)

"""Study (c): numbers and dates between written English and German, a small encoder-decoder trained from scratch.

One budget counts all three kinds of heads: of the encoder, of the decoder, and between them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

from . import written_numbers
from .base_models import Training
from .generated import Generated
from .plans import frozen_table, labelled_scores, smoke_table, trained_table
from .study import FROZEN, Batch, Claim, Metrics, Study
from .words import END, PAD, START, Vocabulary, padded

VOCABULARY = Vocabulary(written_numbers.all_pieces())
LONGEST = 16  # pieces of a target, and a few more
IGNORED = -100  # label of padding


def fresh() -> BartForConditionalGeneration:
    """An untrained translator: 3 layers of the encoder and 3 of the decoder, 4 heads for each of the 9 attentions."""
    config = BartConfig(
        vocab_size=len(VOCABULARY),
        d_model=64,
        encoder_layers=3,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_position_embeddings=32,
        dropout=0.0,
        pad_token_id=PAD,
        bos_token_id=START,
        eos_token_id=END,
        decoder_start_token_id=START,
        forced_eos_token_id=None,
    )
    return BartForConditionalGeneration(config)


def as_batch(pairs: Sequence[written_numbers.Pair]) -> dict[str, Tensor]:
    """Sources and targets, each with <end>, as the model's forward takes them."""
    sources = [[*VOCABULARY.ids(pair.source), END] for pair in pairs]
    targets = [[*VOCABULARY.ids(pair.target), END] for pair in pairs]
    return {
        "input_ids": padded(sources),
        "attention_mask": padded([[1] * len(row) for row in sources]),
        "labels": padded(targets, IGNORED),
        "decoder_attention_mask": padded([[1] * len(row) for row in targets]),
    }


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over examples of a target's mean cross-entropy a piece."""
    logits, labels = model(**batch).logits, batch["labels"]
    pieces = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    return (pieces.sum(1) / (labels != IGNORED).sum(1)).mean()


@torch.no_grad()
def exact_match(model: nn.Module, batches: Sequence[Batch]) -> Metrics:
    """Of every pair, whether greedy decoding gives its target, and the target's log-probability a piece."""
    right, log_probability = [], []
    for batch in batches:
        source = {name: batch[name] for name in ("input_ids", "attention_mask")}
        tokens = model.generate(**source, max_new_tokens=LONGEST, do_sample=False, num_beams=1)
        for given, wanted in zip(tokens.tolist(), batch["labels"].tolist(), strict=True):
            right.append(float(VOCABULARY.read(given) == VOCABULARY.read(wanted)))
        logits = model(**batch).logits
        pieces = F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none", ignore_index=IGNORED)
        log_probability += (-pieces.sum(1) / batch["decoder_attention_mask"].sum(1)).tolist()
    return {"exact match": right, "log-probability": log_probability}


TASK = Generated(
    name="dates",
    pairs=written_numbers.pairs,
    as_batch=as_batch,
    fresh=fresh,
    base=Training(steps=1200, learning_rate=2e-3),
    loss=loss,
    evaluate=exact_match,
    held_out=1024,
    smoke_held_out=32,
)

# A quarter and a half of the 36 heads first; an eighth and three quarters with the hyperparameters of their neighbours.
SCORES = labelled_scores(step=3)
TABLES = (
    frozen_table(SCORES, counts={9: 9, 18: 18, 5: 9, 27: 18}, steps=400),
    trained_table(SCORES, counts={9: 9, 18: 9}, steps=400),
)
STUDY = Study(
    name="dates",
    title="Numbers and dates between English and German: exact matches of an encoder-decoder with 36 heads of 3 kinds",
    prepare=TASK.prepare,
    primary="exact match",
    tests=("test",),
    tables=TABLES,
    claim=Claim(FROZEN, "DSP", 9, "test"),
    smoke=tuple(smoke_table(table, steps=2, counts=(9,)) for table in TABLES),
)

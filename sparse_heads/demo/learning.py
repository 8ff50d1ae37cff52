"""The demo's learned choice: differentiable subset pruning without labels, on frozen weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..gates.dsp import DSPConfig
from ..heads import HeadScores
from ..integrations.transformers.gates import attach_gates
from ..integrations.transformers.training import train_gates
from .encoder import Batch, Encoder, mean_pooled

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCH_SIZE = 16
TARGET = "target"


def learned_scores(encoder: Encoder, sentences: Sequence[str], kept: int, steps: int, seed: int) -> HeadScores:
    """Train gates for `kept` heads so that embeddings keep their direction; the ranking that they end with.

    Li et al.'s pipelined mode (arXiv 2108.04657): the weights stay, one importance a head learns, and the temperature
    falls as in the published runs on BERT.
    """
    config = DSPConfig(k=kept, mode="pipelined", anneal_steps=steps, seed=seed)
    batches = with_targets(encoder, sentences)
    gates = attach_gates(encoder.model, config)
    try:
        train_gates(gates, batches, steps=steps, loss=distance, seed=seed)
        return gates.scores()
    finally:
        gates.detach()


def with_targets(encoder: Encoder, sentences: Sequence[str]) -> list[Batch]:
    """Batches of 16 sentences of like length, each with the dense embeddings that it should keep."""
    batches, order = encoder.batches(sentences, BATCH_SIZE)
    dense = encoder.embed(batches, order)[order]
    return [batch | {TARGET: target} for batch, target in zip(batches, dense.split(BATCH_SIZE), strict=True)]


def distance(model: nn.Module, batch: Batch) -> Tensor:
    """1 minus the mean cosine between the embeddings of a batch and its targets."""
    inputs = {name: tensor for name, tensor in batch.items() if name != TARGET}
    embeddings = mean_pooled(model(**inputs).last_hidden_state, inputs)
    return 1 - torch.einsum("be,be->b", embeddings, batch[TARGET]).mean()

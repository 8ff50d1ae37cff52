"""The demo's last part: one batch in which every sentence has its own budget of heads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import SparseHeadsError
from ..heads import HeadScores, HeadSubset, Layers
from .baselines import projection_paths
from .encoder import Batch, Encoder
from .report import DENSE, OWN_BUDGETS
from .speed import Contender, Timing, race
from .study import kept_counts, stopwatch

if TYPE_CHECKING:
    from ..integrations.transformers.handle import Handle

# float32 rounding leaves under 1e-6 in embeddings of unit length; one head too many or too few changes 1e-3 and more
TOLERANCE = 1e-5


def own_budgets(layers: Layers, sentences: int) -> list[int]:
    """A budget for every sentence: the demo's numbers of heads in turn, from the fewest to all."""
    return list(itertools.islice(itertools.cycle(reversed(kept_counts(layers))), sentences))


def measure_requests(
    encoder: Encoder,
    plain: nn.Module,
    handle: Handle,
    scores: HeadScores,
    batches: Sequence[Batch],
    seconds: float,
    seed: int,
) -> dict[str, Any]:
    """Run the batch of medium length with a budget a sentence: cosines to dense, times, difference to running alone.

    Raises SparseHeadsError where a sentence gets another embedding than alone under its own budget.
    """
    batch = batches[(len(batches) - 1) // 2]
    budgets = own_budgets(handle.layers, len(batch["input_ids"]))
    subset = scores.budgets(budgets, groups=True)
    dense = embed(encoder, handle, batch, None)
    embeddings = embed(encoder, handle, batch, subset)
    difference = check_alone(encoder, handle, batch, subset, embeddings)
    return {
        "budgets": budgets,
        "tokens": batch["input_ids"].shape[1],
        "cosines": (embeddings * dense).sum(-1).tolist(),
        "largest_difference": difference,
        "timings": [asdict(timing) for timing in race_dense(plain, handle, subset, batch, seconds, seed)],
    }


def embed(encoder: Encoder, handle: Handle, batch: Batch, subset: HeadSubset | None) -> Tensor:
    """Embeddings, float32 [B, E], of one batch under a subset; None means all heads."""
    with handle.use_heads(subset):
        return encoder.embed([batch], torch.arange(len(batch["input_ids"])))


def check_alone(encoder: Encoder, handle: Handle, batch: Batch, subset: HeadSubset, embeddings: Tensor) -> float:
    """Largest difference of `embeddings` [B, E] to every sentence run alone, as padded, under its own row of `subset`.

    Raises SparseHeadsError where that is more than rounding.
    """
    requests = range(len(embeddings))
    sentences = [{name: tensor[request : request + 1] for name, tensor in batch.items()} for request in requests]
    alone = [embed(encoder, handle, sentences[request], subset.row(request)) for request in requests]
    differences = (embeddings - torch.cat(alone)).abs().amax(-1)
    # written so that NaN fails
    if not bool((differences <= TOLERANCE).all()):
        worst = int(differences.argmax())
        raise SparseHeadsError(
            f"sentence {worst} of the batch: wanted the embedding that it has alone under its own budget "
            f"of {int(subset.count()[worst])}, to {TOLERANCE:.0e}, got one that differs by {differences[worst]:.1e}"
        )
    return differences.max().item()


def race_dense(
    plain: nn.Module, handle: Handle, subset: HeadSubset, batch: Batch, seconds: float, seed: int
) -> list[Timing]:
    """Timings of one batch through the plain model and under a subset with a row a request."""
    watch = partial(stopwatch, layers=handle.layers, paths=projection_paths(plain))
    mean = round(subset.count().float().mean().item())
    contenders = [
        Contender(DENSE, handle.layers.num_heads, watch(plain)),
        Contender(OWN_BUDGETS, mean, watch(handle.model), partial(handle.use_heads, subset)),
    ]
    return race(contenders, [batch], seconds, seed)

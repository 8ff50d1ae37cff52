"""How close embeddings stay to the dense model's: cosine, and neighbours kept."""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 10


def mean_cosine(embeddings: Tensor, dense: Tensor) -> float:
    """Mean over the sentences of the cosine between two sets of unit embeddings, float32 [sentences, E]."""
    return (embeddings * dense).sum(-1).mean().item()


def nearest(embeddings: Tensor, count: int = NEIGHBOURS) -> Tensor:
    """The `count` other sentences of largest cosine to each, int64 [sentences, count]."""
    cosines = embeddings @ embeddings.T
    cosines.fill_diagonal_(-torch.inf)
    return cosines.topk(count, dim=-1).indices


def neighbour_recall(embeddings: Tensor, dense: Tensor, count: int = NEIGHBOURS) -> float:
    """Mean share of each sentence's `count` nearest neighbours under `dense` that it still has under `embeddings`."""
    found = nearest(embeddings, count).unsqueeze(-1) == nearest(dense, count).unsqueeze(-2)
    return found.any(-1).float().mean().item()

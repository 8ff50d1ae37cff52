"""How alike the heads of a layer attend: the redundancy that Clark et al. (2019) see when they cluster heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._attention_arguments import visible_span, without_autocast
from .probabilities import probability_rows
from .validation import check_arguments


def head_similarity(
    query: Tensor,
    key: Tensor,
    head_mask: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | tuple[int, int] | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    """Mean over queries of 1 - JS / log 2, with JS the Jensen-Shannon divergence of two heads' probabilities.

    Args: as of `attention_statistics`. A query counts for a pair of heads when it counts for both.

    Returns:
        float64 [B, H, H], symmetric, from 0 (no key in common) to 1 (equal, as on the diagonal); NaN in the rows and
        columns of masked heads, and for requests without a counted query. No gradient. Memory is linear in T; time is
        that of H (H + 1) / 2 rows of logarithms a query.

    Raises:
        InvalidTypeError, InvalidArgumentError: as `attention_statistics`.
    """
    check_arguments(query, key, head_mask, attn_mask, is_causal, scale, softcap, window, query_mask)
    batch, heads = query.shape[:2]
    sums = torch.zeros(batch, heads, heads, dtype=torch.float64, device=query.device)
    counts = torch.zeros_like(sums)
    span = visible_span(is_causal, window)
    with torch.no_grad(), without_autocast(query.device.type):
        for _, probabilities, _, counted in probability_rows(
            query, key, head_mask, attn_mask=attn_mask, span=span, scale=scale, softcap=softcap, query_mask=query_mask
        ):
            entropies = _entropy(probabilities)
            for head in range(heads):
                one, others = slice(head, head + 1), slice(head, None)
                mixture = (probabilities[:, one] + probabilities[:, others]) / 2
                divergence = _entropy(mixture) - (entropies[:, one] + entropies[:, others]) / 2
                similarity = (1 - divergence / math.log(2)).clamp(0, 1).double()
                both = counted[:, one] & counted[:, others]
                sums[:, head, others] += torch.where(both, similarity, 0).sum(-1)
                counts[:, head, others] += both.sum(-1)
    upper = sums / counts
    return torch.triu(upper) + torch.triu(upper, 1).mT


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(-1)

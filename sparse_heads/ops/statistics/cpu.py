"""Statistics by the C++ extension (`csrc/cpu`): the (request, head) pairs that are on, and no other."""

from __future__ import annotations

import math

from torch import Tensor

from . import operators
from .probabilities import hidden_scores


def statistics_cpu(
    query: Tensor,
    key: Tensor,
    head_mask: Tensor | None,
    *,
    attn_mask: Tensor | None,
    span: tuple[int, int],
    scale: float | None,
    softcap: float | None,
    query_mask: Tensor | None,
    key_groups: Tensor | None,
    num_groups: int,
) -> Tensor:
    """Sums over the counted queries, float64 [B, H, 7 + G]; float16 and bfloat16 inputs are computed in float32."""
    return operators.attention_statistics(
        query,
        key,
        head_mask,
        attn_mask,
        query_mask,
        None if key_groups is None else key_groups.long(),
        num_groups,
        *span,
        hidden_scores(attn_mask),
        1 / math.sqrt(query.shape[-1]) if scale is None else scale,
        softcap or 0.0,
    )

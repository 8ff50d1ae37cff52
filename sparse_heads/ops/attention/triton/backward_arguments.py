"""The arguments that the kernels of keys and of queries share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...._triton.work_list import WorkList
from .arguments import shared_arguments
from .configs import Config


def backward_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    grad: Tensor,
    statistics: Tensor,
    gate: Tensor | None,
    work: WorkList | None,
    config: Config,
    *,
    span: tuple[int, int],
    **options: Any,
) -> dict[str, Any]:
    """By the names that the kernels give them. options: the further ones of `shared_arguments`."""
    batch, heads, tokens, _ = query.shape
    gate = None if gate is None else gate.expand(batch, heads)
    right = span[1]
    return {
        **shared_arguments(query, key, value, attn_mask, work, config, span=span, **options),
        "grad": grad,
        "grad_strides": grad.stride(),
        "statistics": statistics,
        "delta_offset": statistics.stride(0),
        "padded_tokens": statistics.shape[3],
        "gate": gate,
        "gate_strides": None if gate is None else gate.stride(),
        # Whether some query may see no key; it costs time, so spans are looked at.
        "EMPTY_ROWS": attn_mask is not None or (0 <= right < tokens - key.shape[2]),
    }

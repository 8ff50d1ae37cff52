"""What query positions may see: the part of the semantics that every implementation shares unchanged."""

from __future__ import annotations

import sys

import torch


def visible_span(is_causal: bool, window: int | tuple[int, int] | None) -> tuple[int, int]:
    """How many keys before and after its own position a query sees, -1 = unlimited, from the two public arguments.

    Numbers that fit no tensor's size become the largest that does.
    """
    if window is None or window == -1:
        left, right = -1, -1
    elif isinstance(window, int):
        left, right = window - 1, 0
    else:
        left, right = window
    left, right = min(left, sys.maxsize), min(right, sys.maxsize)
    return (left, 0) if is_causal else (left, right)


def span_mask(queries: int, keys: int, span: tuple[int, int], device: torch.device) -> torch.Tensor | None:
    """bool [T, S], True = visible, for queries that are the last T of the S positions; None where nothing is hidden."""
    left, right = span
    if (left < 0 or left >= keys - 1) and (right < 0 or right >= queries - 1):
        return None
    own = torch.arange(queries, device=device)[:, None] + (keys - queries)
    offset = torch.arange(keys, device=device) - own
    visible = torch.ones_like(offset, dtype=torch.bool)
    if left >= 0:
        visible &= offset >= -left
    if right >= 0:
        visible &= offset <= right
    return visible

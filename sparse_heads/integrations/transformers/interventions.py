"""`head_means`: what every head of a model gives on average."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ...means import HeadMeans
from ...pruning.means import mean_outputs
from .scoring import checked_batches, left_as_found


def head_means(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> HeadMeans:
    """The mean output of every head over all tokens that are no padding, for `handle.set_heads(subset, fill=means)`.

    The model runs in eval mode with all heads on, and is left as found, attached or not. Memory does not grow with the
    batches.

    Args:
        model: a model that `attach` takes.
        batches: dicts of keyword arguments for the model's forward. `attention_mask [B, T]` says what is padding, and
            `decoder_attention_mask` in the decoder of a model with two stacks; without one every token counts.

    Raises:
        ValueError, TypeError: no batches, batches that are no dicts of tensors, a mask of another shape.
    """
    batches = checked_batches(batches, "head means")
    with left_as_found(model) as handle:
        return HeadMeans(mean_outputs(handle, batches), handle.layers)

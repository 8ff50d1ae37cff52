"""Attention entropy (Clark et al. 2019 look at it head by head): focused heads score high."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError, invalid


def entropy(handle: Any, batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """1 minus the mean over real queries of (entropy of their attention / log of the keys they see): `[L, H]`.

    Queries that see one key are left out. Runs the model's eager attention, which stores the probabilities:
    memory grows with the square of the length.
    """
    model, layers = handle.model, handle.layers
    if any(layer.kind != "self" for layer in layers) or len({layer.stack for layer in layers}) > 1:
        raise UnsupportedError("method: 'entropy' scores one stack of self-attention; this model has more")
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        total = torch.zeros(len(layers), layers.max_heads, dtype=torch.float64)
        count = 0.0
        for batch in batches:
            with torch.no_grad(), handle.use_heads(None):
                attentions = model(**batch, output_attentions=True).attentions
            attentions = [attentions[layer.index] for layer in layers]
            visible = _visible_keys(handle, batch, attentions[0])
            counted = visible > 1
            for row, probabilities in enumerate(attentions):
                heads = _normalised_entropy(probabilities, visible)
                # A query at padding may have attended to nothing, which gives NaN.
                total[row, : heads.shape[1]] += heads.masked_fill(~counted[:, None], 0.0).sum((0, 2)).cpu()
            count += float(counted.sum())
    finally:
        model.set_attn_implementation(before)
    if count == 0:
        raise UnsupportedError("batches: 'entropy' needs a query that sees more than one key")
    return 1.0 - total / count


def _visible_keys(handle: Any, batch: Mapping[str, Any], probabilities: Tensor) -> Tensor:
    """How many keys each query sees `[B, T]`: 0 for padding."""
    rows, _, queries, keys = probabilities.shape
    mask = batch.get("attention_mask")
    mask = torch.ones(rows, keys) if mask is None else mask
    if mask.shape != (rows, keys):
        raise invalid("batches", f"attention_mask [{rows}, {keys}] for 'entropy'", mask)
    mask = mask.to(probabilities.device, torch.float64)
    causal = getattr(handle.model.get_submodule(handle.layers[0].name), "is_causal", False)
    visible = mask.cumsum(-1) if causal else mask.sum(-1, keepdim=True).expand(rows, queries)
    return visible * mask


def _normalised_entropy(probabilities: Tensor, visible: Tensor) -> Tensor:
    """Entropy over the log of the visible keys, `[B, H, T]`, in [0, 1]."""
    raw = torch.special.entr(probabilities.double()).sum(-1)
    return raw / visible.clamp_min(2).log()[:, None]

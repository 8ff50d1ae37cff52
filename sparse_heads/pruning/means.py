"""What every head gives on average."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError, invalid
from .batches import Batch, token_mask


def mean_outputs(handle: Any, batches: Iterable[Batch]) -> Tensor:
    """The mean over non-padding tokens of each head's output, with all heads on: float64 `[L, H, Dv]`.

    It is that of the input of the output projection. Sums are in float64, and nothing but them is kept.
    """
    layers = handle.layers
    widest = max(layer.v_head_dim for layer in layers)
    totals = torch.zeros(len(layers), layers.max_heads, widest, dtype=torch.float64)
    counts = torch.zeros(len(layers), dtype=torch.float64)
    batch: Batch = {}

    def add(row: int, module: nn.Module, args: tuple) -> None:
        layer, outputs = layers[row], args[0].detach()
        counted = token_mask(handle.model, batch, layer.stack)
        if outputs.dim() != 3:
            raise UnsupportedError(
                f"model: layer {layer.name} gives its output projection {list(outputs.shape)}, wanted [B, T, H * D]"
            )
        if counted is None:
            counted = torch.ones(outputs.shape[:2], device=outputs.device)
        if counted.shape != outputs.shape[:2]:
            raise invalid("batches", f"attention_mask {list(outputs.shape[:2])} for the means", counted)
        kept = outputs[counted.to(outputs.device) != 0]
        mean = kept.sum(0, dtype=torch.float64).unflatten(0, (layer.num_heads, -1)).cpu()
        totals[row, : layer.num_heads, : layer.v_head_dim] += mean
        counts[row] += kept.shape[0]

    hooks = [
        site.projections["output"].register_forward_pre_hook(partial(add, row)) for row, site in enumerate(handle.sites)
    ]
    try:
        with torch.no_grad(), handle.use_heads(None):
            for batch in batches:  # `add` reads the name
                handle.model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    unseen = (counts == 0).nonzero().flatten().tolist()
    if unseen:
        raise invalid("batches", f"tokens for every layer, {layers[unseen[0]].name} too", "none that is no padding")
    return totals / counts[:, None, None]

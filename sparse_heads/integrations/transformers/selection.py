"""A subset made ready for running: kept-head indices a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ...heads import HeadSubset
from ...layers import LayerInfo


@dataclass(frozen=True, eq=False)
class LayerSelection:
    """Kept heads of one layer that has heads off: int64 `[kept]` query heads and `[kept]` key/value heads."""

    heads: Tensor
    kv_heads: Tensor

    @property
    def is_empty(self) -> bool:
        return self.heads.shape[0] == 0


@dataclass(frozen=True, eq=False)
class Selection:
    """A shared subset with at least one head off; `rows[i]` is None where layer i runs all its heads."""

    subset: HeadSubset
    rows: tuple[LayerSelection | None, ...]


def select(subset: HeadSubset | None, devices: list[torch.device]) -> Selection | None:
    """Indices on each layer's device; None when every head is on, which runs the model as it is."""
    if subset is None:
        return None
    if subset.per_request:
        raise UnsupportedError("subset: a subset for every request ([B, L, H]) is not built yet; give a shared [L, H]")
    rows = tuple(
        _select_layer(row[: layer.num_heads], layer, device)
        for row, layer, device in zip(subset.mask.tolist(), subset.layers, devices, strict=True)
    )
    return None if all(row is None for row in rows) else Selection(subset, rows)


def _select_layer(mask: list[bool], layer: LayerInfo, device: torch.device) -> LayerSelection | None:
    if all(mask):
        return None
    heads = [head for head, runs in enumerate(mask) if runs]
    kv_heads = sorted({head // layer.group_size for head in heads})
    if len(heads) != len(kv_heads) * layer.group_size:
        raise UnsupportedError(
            f"subset: layer {layer.name} has grouped queries, and a subset that splits a group is not built yet; "
            "keep or drop whole groups (`subset.round_to_groups`)"
        )
    device = torch.device("cpu") if device.type == "meta" else device
    return LayerSelection(*(torch.tensor(each, dtype=torch.int64, device=device) for each in (heads, kv_heads)))

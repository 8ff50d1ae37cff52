"""Mean ablation: what is added in the place of heads that are off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UnsupportedError
from ...heads import HeadSubset
from ...means import HeadMeans
from .calls import Fill

if TYPE_CHECKING:
    from .projections import Site


def fill_of(subset: HeadSubset, means: HeadMeans, sites: Sequence[Site], *, core: bool) -> Fill:
    """Of each layer what its heads that are off add, None where all are on; `[B, ...]` for a row a request.

    Means through the output projection's weight, `[E]` or `[B, E]`, which its output gets; for the core layout, where
    the projection runs all heads, the means themselves, `[H, Dv]` or `[B, H, Dv]`, 0 for heads that run.
    """
    mask = subset.mask
    return tuple(_of_layer(~mask[..., site.row, : site.layer.num_heads], means, site, core) for site in sites)


def _of_layer(off: Tensor, means: HeadMeans, site: Site, core: bool) -> Tensor | None:
    if not off.any():
        return None
    layer = site.layer
    added = means.tensor[site.row, : layer.num_heads, : layer.v_head_dim] * off.unsqueeze(-1)
    if core:
        return added
    weight = site.projections["output"].weight.detach()
    if weight.is_meta:
        raise UnsupportedError(f"fill: wanted a loaded output projection, got offloaded weights in layer {layer.name}")
    wider = torch.promote_types(weight.dtype, torch.float32)
    return F.linear(added.flatten(-2).to(weight.device, wider), weight.to(wider)).to(weight.dtype)

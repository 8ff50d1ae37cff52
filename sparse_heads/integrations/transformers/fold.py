"""Scale that is constant by now, folded into the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...errors import UnsupportedError

if TYPE_CHECKING:
    from .projections import Site


def fold_into_outputs(sites: Sequence[Site], scale: Tensor) -> None:
    """Multiply each head's columns of the output projections' weights by `scale [L, H]`, but for factors of 0.

    Raises UnsupportedError, before anything is changed, for a weight that is shared or is not a loaded
    `torch.nn.Linear`'s.
    """
    weights = []
    for site in sites:
        projection = site.projections["output"]
        if not isinstance(projection, nn.Linear) or projection.weight.is_meta:
            raise UnsupportedError(
                f"gates: wanted a loaded torch.nn.Linear to fold into, got {type(projection).__name__} as the output "
                f"projection of {site.layer.name}"
            )
        if any(projection.weight is weight for weight in weights):
            raise UnsupportedError(f"gates: wanted an output weight of its own to fold into in {site.layer.name}")
        weights.append(projection.weight)
    with torch.no_grad():
        for site, weight in zip(sites, weights, strict=True):
            factors = scale[site.row, : site.layer.num_heads]
            factors = torch.where(factors == 0, 1.0, factors).repeat_interleave(site.layer.v_head_dim)
            wider = torch.promote_types(weight.dtype, torch.float32)
            weight.copy_(weight.to(wider) * factors.to(weight.device, wider))

"""The library's ways through a case."""

from __future__ import annotations

from torch import Tensor

import sparse_heads as sh


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, gate: Tensor | None = None, backend: str = "triton"
) -> Tensor:
    """Causal attention of the heads that are on; zeros for the others."""
    return sh.attention(query, key, value, mask, gate=gate, is_causal=True, backend=backend)


def block(leaves: dict[str, Tensor], mask: Tensor | None, head_dim: int, projections: str, attention: str) -> Tensor:
    """Projections and attention of the heads that are on, compact under a mask [H]; leaves as `Inputs.leaves`."""
    gate = leaves.get("gate")
    weights = tuple(leaves[name] for name in ("query_weight", "key_weight", "value_weight"))
    heads = sh.in_projection(leaves["x"], weights, None, mask, head_dim=head_dim, backend=projections)
    wide = mask if mask is not None and mask.dim() == 2 else None
    heads = attend(*heads, wide, backend=attention)
    return sh.out_projection(heads, leaves["out_weight"], None, mask, gate=gate, backend=projections)

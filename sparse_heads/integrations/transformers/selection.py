"""A subset made ready for running: what each layer's projections compute, and what its attention is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import invalid
from ...heads import HeadSubset
from ...layers import LayerInfo

Weights = Sequence[Tensor]
Biases = Sequence[Tensor | None]


def rows_of_requests(argument: str, tensor: Tensor, rows: int) -> Tensor:
    """`tensor [B, ...]` repeated for `rows` rows of a batch: row r belongs to request r // (rows / B)."""
    requests = tensor.shape[0]
    if rows == requests:
        return tensor
    if rows % requests:
        wanted = f"a batch of {requests} requests, as many as it has rows (or a multiple, as beam search makes)"
        raise invalid(argument, wanted, f"a batch of {rows}")
    return tensor.repeat_interleave(rows // requests, 0)


@dataclass(frozen=True, eq=False)
class CompactHeads:
    """Heads that a tensor holds side by side, without the others: `kept` int64, ascending; `mask` bool `[H]`."""

    kept: Tensor
    mask: Tensor

    @property
    def is_empty(self) -> bool:
        return self.kept.shape[0] == 0


@dataclass(frozen=True, eq=False)
class WideHeads:
    """Heads of a full-width tensor: bool `[B, H]`, a row a request, or `[1, H]` for all requests."""

    mask: Tensor
    is_empty = False
    _repeated: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def for_rows(self, rows: int) -> Tensor:
        """bool `[rows, H]`."""
        mask = self._repeated.get(rows)
        if mask is None:
            mask = rows_of_requests("subset", self.mask, rows).contiguous()
            self._repeated.clear()
            self._repeated[rows] = mask
        return mask


Heads = CompactHeads | WideHeads


@dataclass(frozen=True, eq=False)
class LayerSelection:
    """What one layer runs.

    kv_of_head: int64, which of the computed key/value heads each computed query head reads; None where query heads
        divide evenly among them in order, as the model's own attention takes for granted.
    """

    layer: LayerInfo
    query: Heads
    kv: Heads
    kv_of_head: Tensor | None

    @property
    def per_request(self) -> bool:
        return any(isinstance(heads, WideHeads) and len(heads.mask) > 1 for heads in (self.query, self.kv))

    @property
    def needs_attention(self) -> bool:
        """Whether the model's own attention function would not do."""
        return self.kv_of_head is not None or isinstance(self.query, WideHeads)

    def project_in(
        self, implementation: ModuleType, x: Tensor, roles: Sequence[str], weights: Weights, biases: Biases
    ) -> list[Tensor]:
        """The projections of `x` that `roles` name; where no head is left, one group of zeros stands in.

        The model's own reshape cannot infer a head count of 0, and its cache would count no positions.
        """
        heads = [self.query if role == "query" else self.kv for role in roles]
        outputs = _project_in(implementation, x, weights, biases, heads, self.layer.head_dim)
        for i, (role, each) in enumerate(zip(roles, heads, strict=True)):
            if each.is_empty:
                outputs[i] = F.pad(
                    outputs[i], (0, self.layer.head_dim * (self.layer.group_size if role == "query" else 1))
                )
        return outputs


def _project_in(
    implementation: ModuleType, x: Tensor, weights: Weights, biases: Biases, heads: Sequence[Heads], head_dim: int
) -> list[Tensor]:
    """One operator call where all `heads` are of a kind; the queries by themselves where they are not."""
    if all(isinstance(each, CompactHeads) for each in heads):
        return implementation.in_projection(x, weights, biases, [each.kept for each in heads], head_dim)
    if all(isinstance(each, WideHeads) for each in heads):
        masks = [each.for_rows(x.shape[0]) for each in heads]
        return implementation.in_projection_per_request(x, weights, biases, masks, head_dim)
    queries = _project_in(implementation, x, weights[:1], biases[:1], heads[:1], head_dim)
    return queries + _project_in(implementation, x, weights[1:], biases[1:], heads[1:], head_dim)


@dataclass(frozen=True, eq=False)
class Selection:
    """A subset that does not just run the model as it is; `rows[i]` is None where layer i does."""

    subset: HeadSubset
    rows: tuple[LayerSelection | None, ...]

    @property
    def needs_attention(self) -> bool:
        return any(row is not None and row.needs_attention for row in self.rows)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """Of each layer, the key/value heads that are computed: bool `[H_kv]` compact, `[B or 1, H_kv]` full width."""
        layers = self.subset.layers
        every = [torch.ones(layer.num_kv_heads, dtype=torch.bool) for layer in layers]
        return tuple(all_on if row is None else row.kv.mask for row, all_on in zip(self.rows, every, strict=True))


def select(
    subset: HeadSubset,
    devices: Sequence[torch.device],
    *,
    wide: bool,
    every_kv: bool,
    stored: Sequence[Tensor] | None = None,
) -> Selection | None:
    """What each layer runs, on its device; None when every head of a shared subset is on.

    wide: full-width tensors also for a shared subset; every_kv: keys and values of all heads; stored: of each layer,
    the key/value heads that a cache holds, as `Selection.stored` gives them: these are computed, no others.
    """
    masks, layers = subset.mask, subset.layers
    rows = tuple(
        _select_layer(
            masks[..., row, : layer.num_heads],
            layer,
            torch.device("cpu") if devices[row].type == "meta" else devices[row],
            wide=wide,
            every_kv=every_kv,
            stored=None if stored is None else stored[row],
        )
        for row, layer in enumerate(layers)
    )
    return None if all(row is None for row in rows) else Selection(subset, rows)


def needed_groups(mask: Tensor, layer: LayerInfo) -> Tensor:
    """bool `[..., H_kv]` of a mask `[..., H]`: the key/value heads that a query head reads."""
    return mask.unflatten(-1, (layer.num_kv_heads, layer.group_size)).any(-1)


def _select_layer(
    mask: Tensor, layer: LayerInfo, device: torch.device, *, wide: bool, every_kv: bool, stored: Tensor | None
) -> LayerSelection | None:
    kv_mask = needed_groups(mask, layer) if stored is None else stored.cpu()
    if every_kv and stored is None:
        kv_mask = torch.ones(layer.num_kv_heads, dtype=torch.bool)
    if mask.dim() == 1 and mask.all() and kv_mask.dim() == 1 and kv_mask.all():
        return None
    query = _heads(mask, wide or mask.dim() == 2, device)
    kv = _heads(kv_mask, (wide and stored is None) or kv_mask.dim() == 2, device)
    read = torch.arange(layer.num_heads) // layer.group_size
    if isinstance(query, CompactHeads):
        read = read[mask]
    if isinstance(kv, CompactHeads):
        read = (kv_mask.cumsum(0) - 1).clamp(min=0)[read]
    groups = int(kv.mask.sum()) if isinstance(kv, CompactHeads) else layer.num_kv_heads
    even = torch.arange(groups).repeat_interleave(layer.group_size)
    return LayerSelection(layer, query, kv, None if torch.equal(read, even) else read.to(device))


def _heads(mask: Tensor, wide: bool, device: torch.device) -> Heads:
    if wide:
        return WideHeads((mask if mask.dim() == 2 else mask[None]).to(device))
    return CompactHeads(mask.nonzero()[:, 0].to(device), mask)

"""A subset made ready for running: what each layer's projections compute, and what its attention is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import invalid
from ...heads import HeadSubset
from ...layers import LayerInfo
from ...ops.projection.api import choose

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

    @cached_property
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
            with torch.inference_mode(False):  # what is kept may be needed by a forward with gradients
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
    _passes: dict[tuple[str, ...], InPass] = field(default_factory=dict, repr=False)

    @cached_property
    def is_wide(self) -> bool:
        """Whether any projection keeps its full width."""
        return isinstance(self.query, WideHeads) or isinstance(self.kv, WideHeads)

    @cached_property
    def per_request(self) -> bool:
        """Whether rows of a batch run different heads."""
        return any(isinstance(heads, WideHeads) and len(heads.mask) > 1 for heads in (self.query, self.kv))

    @cached_property
    def needs_attention(self) -> bool:
        """Whether the model's own attention function would not do."""
        return self.kv_of_head is not None or isinstance(self.query, WideHeads)

    def in_pass(self, roles: tuple[str, ...]) -> InPass:
        """The projections that `roles` name, which read one input."""
        found = self._passes.get(roles)
        if found is None:
            found = self._passes[roles] = InPass(self, roles)
        return found


class InPass:
    """Projections of one input: what to call and what to hand it, prepared once."""

    def __init__(self, row: LayerSelection, roles: tuple[str, ...]) -> None:
        self.head_dim = row.layer.head_dim
        heads = [row.query if role == "query" else row.kv for role in roles]
        self.wide = heads if all(isinstance(each, WideHeads) for each in heads) else None
        self.kept = [each.kept for each in heads] if all(isinstance(each, CompactHeads) for each in heads) else None
        self.parts = None
        if self.wide is None and self.kept is None:
            self.parts = [InPass(row, roles[:1]), InPass(row, roles[1:])]
        # The model's own reshape cannot infer a head count of 0, and its cache would count no positions: one group of
        # zeros stands in, which is ignored later.
        self.stand_ins = [
            (i, self.head_dim * (row.layer.group_size if role == "query" else 1))
            for i, (role, each) in enumerate(zip(roles, heads, strict=True))
            if each.is_empty and self.parts is None
        ]

    def run(self, backend: str, x: Tensor, weights: Weights, biases: Biases) -> list[Tensor]:
        """`x [B, T, E]` to `[B, T, kept*D]`, or `[B, T, H*D]` with zeros where heads are wide, a weight."""
        if self.kept is not None:
            outputs = choose(backend, x, False).in_projection(x, weights, biases, self.kept, self.head_dim)
        elif self.wide is not None:
            masks = [heads.for_rows(x.shape[0]) for heads in self.wide]
            outputs = choose(backend, x, True).in_projection_per_request(x, weights, biases, masks, self.head_dim)
        else:
            query, kv = self.parts
            outputs = query.run(backend, x, weights[:1], biases[:1])
            outputs += kv.run(backend, x, weights[1:], biases[1:])
        for i, width in self.stand_ins:
            outputs[i] = F.pad(outputs[i], (0, width))
        return outputs


@dataclass(frozen=True, eq=False)
class Selection:
    """A subset that does not just run the model as it is; `rows[i]` is None where layer i does."""

    subset: HeadSubset
    rows: tuple[LayerSelection | None, ...]

    @cached_property
    def needs_attention(self) -> bool:
        """Whether some layer's own attention function would not do."""
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

"""What one forward gives the records that are open: which queries count, and what each layer's attention saw."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache

from ...errors import UnsupportedError
from ...ops.statistics import attention_statistics, head_similarity
from .selection import CompactHeads, Heads

if TYPE_CHECKING:
    from .projections import Site
    from .record import Record


@dataclass(frozen=True, eq=False)
class Attention:
    """A call of a layer's attention: `query [B, h, T, D]`, `key [B, h_kv, S, D]`, what hides keys, and the result.

    heads: which of the layer's H heads `query` holds; None = all. kv_of_head: int64 `[h]`, which of the key's heads
        each reads; None = h_kv groups in order.
    output: `[B, T, h, Dv]`; scale: what multiplies it on its way to the output projection, `[H]` or `[B, H]`.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    is_causal: bool
    scaling: float | None
    softcap: float | None
    kv_of_head: Tensor | None
    heads: Heads | None
    output: Tensor
    scale: Tensor | None


@dataclass(frozen=True, eq=False)
class _Part:
    """A transformers model inside the attached one: `mask [B, positions]`, `ids [B, T]`, and how many positions its
    self-attention sees behind a cache, each where it was given."""

    mask: Tensor | None
    ids: Tensor | None
    positions: int | None


class Recording:
    """The records that collect one forward, and the parts of the model that are running, the innermost last."""

    def __init__(self, records: tuple[Record, ...]) -> None:
        self.records = records
        self.wants_statistics = any(record.names for record in records)
        self.parts: list[_Part] = []
        self.finished: _Part | None = None

    def enter(self, given: Mapping[str, Any], main: Tensor | None) -> None:
        """A part begins, with the arguments `given`, of which `main` has the rows and the new positions."""
        mask, ids, cache = (given.get(name) for name in ("attention_mask", "input_ids", "past_key_values"))
        positions = None
        if isinstance(cache, Cache) and main is not None:
            positions = int(cache.get_seq_length()) + main.shape[1]
        self.parts.append(_Part(mask if isinstance(mask, Tensor) and mask.dim() == 2 else None, ids, positions))

    def leave(self) -> None:
        """The innermost part ends."""
        if self.parts:
            self.finished = self.parts.pop()

    def add(self, site: Site, attention: Attention) -> None:
        """Hand what a layer of the innermost part did to every record."""
        part = self.parts[-1]
        with torch.no_grad():
            attention = _trimmed(attention, part.positions if site.layer.kind == "self" else None)
            for record in self.records:
                if record.keeps_outputs:
                    record.outputs[site.layer.name].append(_every_heads_output(site, attention))
                if record.names and not _is_empty(attention.heads):
                    self._add_statistics(record, site, attention, part)

    def _add_statistics(self, record: Record, site: Site, attention: Attention, part: _Part) -> None:
        counted = _real_queries(site, attention.query, part)
        plain, special_keys = attention, None
        if record.special_tokens:
            special_keys, special_queries = self._special(record, site, attention, part)
            counted = ~special_queries if counted is None else counted & ~special_queries
            plain = replace(attention, mask=_hiding(attention.mask, special_keys))
        on = _heads_on(site, attention)
        count = None
        if set(record.names) - {"special_mass"}:
            found = attention_statistics(**_arguments(plain), query_mask=counted)
            count = found.count
            for name in ("entropy", "sparsity", "confidence"):
                if name in record.names:
                    record.add(name, site.row, _spread(getattr(found, name), site, attention), count[:, None] * on)
            if "position_mass" in record.names and site.layer.kind == "self":
                mass = _spread(found.position_mass, site, attention)
                record.add("position_mass", site.row, mass, (count[:, None] * on)[..., None])
        if "redundancy" in record.names:
            similarity = head_similarity(**_arguments(plain), query_mask=counted)
            for dim in (1, 2):
                similarity = _spread(similarity, site, attention, dim)
            record.add("redundancy", site.row, similarity, count[:, None, None] * (on[:, :, None] & on[:, None, :]))
        if "special_mass" in record.names:
            groups = special_keys.to(torch.int64)
            found = attention_statistics(**_arguments(attention), query_mask=counted, key_groups=groups, num_groups=2)
            count = found.count if count is None else count
            mass = _spread(found.group_mass[..., 1], site, attention)
            record.add("special_mass", site.row, mass, found.count[:, None] * on)
        record.add_count(site.row, count)

    def _special(self, record: Record, site: Site, attention: Attention, part: _Part) -> tuple[Tensor, Tensor]:
        """bool `[B, S]` and `[B, T]`: which keys and which queries are special tokens."""
        rows, queries, keys = attention.query.shape[0], attention.query.shape[2], attention.key.shape[2]
        asked = _ids(site, part.ids, rows, queries, "queries")
        if site.layer.kind == "cross":
            read = _ids(site, None if self.finished is None else self.finished.ids, rows, keys, "encoder's keys")
        else:
            read = _ids(site, part.ids, rows, keys, "keys (those in a cache have no ids)")
        special = torch.tensor(record.special_tokens, device=asked.device)
        return torch.isin(read, special), torch.isin(asked, special)


def _ids(site: Site, ids: Any, rows: int, length: int, whose: str) -> Tensor:
    if not isinstance(ids, Tensor) or ids.shape != (rows, length):
        raise UnsupportedError(
            f"special_tokens: wanted input_ids [{rows}, {length}] for the {whose} of layer {site.layer.name}, in the "
            f"same forward, got {'none' if not isinstance(ids, Tensor) else list(ids.shape)}"
        )
    return ids


def _trimmed(attention: Attention, positions: int | None) -> Attention:
    """Without the room that a static cache has behind the positions so far: the queries are the last ones then."""
    if positions is None or attention.key.shape[2] <= positions:
        return attention
    mask = attention.mask
    if mask is not None and mask.shape[-1] > 1:
        mask = mask[..., :positions]
    return replace(attention, key=attention.key[:, :, :positions], mask=mask)


def _real_queries(site: Site, query: Tensor, part: _Part) -> Tensor | None:
    """bool `[B, T]`, False at padding; None where none is known of."""
    if part.mask is None:
        return None
    rows, queries = query.shape[0], query.shape[2]
    mask = part.mask[:, : part.positions][:, -queries:]
    if mask.shape != (rows, queries):
        raise UnsupportedError(
            f"attention_mask: wanted one of at least [{rows}, {queries}], the queries of layer {site.layer.name}, got "
            f"{list(part.mask.shape)}"
        )
    return mask.to(query.device) != 0


def _hiding(mask: Tensor | None, hidden: Tensor) -> Tensor:
    """`mask` with the keys `hidden [B, S]` hidden too."""
    hidden = hidden[:, None, None]
    if mask is None:
        return ~hidden
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, -math.inf)


def _arguments(attention: Attention) -> dict[str, Any]:
    """What the operators take."""
    key, heads = attention.key, attention.heads
    wide = heads is not None and not isinstance(heads, CompactHeads)
    return {
        "query": attention.query,
        "key": key if attention.kv_of_head is None else key.index_select(1, attention.kv_of_head),
        "head_mask": heads.for_rows(attention.query.shape[0]) if wide else None,
        "attn_mask": attention.mask,
        "is_causal": attention.is_causal,
        "scale": attention.scaling,
        "softcap": attention.softcap,
    }


def _is_empty(heads: Heads | None) -> bool:
    return heads is not None and heads.is_empty


def _heads_on(site: Site, attention: Attention) -> Tensor:
    """bool `[B, H]`."""
    rows, heads = attention.query.shape[0], attention.heads
    if heads is None:
        return attention.query.new_ones(rows, site.layer.num_heads, dtype=torch.bool)
    if isinstance(heads, CompactHeads):
        return heads.mask.to(attention.query.device).expand(rows, -1)
    return heads.for_rows(rows)


def _spread(values: Tensor, site: Site, attention: Attention, dim: int = 1) -> Tensor:
    """`values [B, h, ...]` of the heads that ran side by side to all H, zeros elsewhere."""
    if not isinstance(attention.heads, CompactHeads):
        return values
    shape = list(values.shape)
    shape[dim] = site.layer.num_heads
    return values.new_zeros(shape).index_copy_(dim, attention.heads.kept, values)


def _every_heads_output(site: Site, attention: Attention) -> Tensor:
    """`[B, T, H, Dv]`, memory of its own."""
    output, heads = attention.output.detach(), attention.heads
    if _is_empty(heads):
        return output.new_zeros(*output.shape[:2], site.layer.num_heads, output.shape[-1])
    output = _spread(output, site, attention, 2)
    if attention.scale is None:
        return output.clone() if output.data_ptr() == attention.output.data_ptr() else output
    scale = attention.scale.to(torch.promote_types(output.dtype, torch.float32))
    scale = scale[:, None, :, None] if scale.dim() == 2 else scale[:, None]
    return (output * scale).to(output.dtype)

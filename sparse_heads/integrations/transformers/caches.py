"""Key/value caches that know which heads they hold: the record travels with the cache, and continuing is checked.

A cache without a record holds every head, or nothing: it was filled by a model that ran them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import StaticLayer

from ...errors import SubsetMismatchError, UnsupportedError, invalid
from ...heads import HeadSubset
from ...layers import Layers
from .selection import Selection, needed_groups, rows_of_requests

_ATTRIBUTE = "_sparse_heads_stored"


@dataclass(eq=False)
class Stored:
    """Of each layer, the key/value heads in a cache: bool `[H_kv]` (others take no room) or `[rows, H_kv]`."""

    layers: Layers
    masks: tuple[Tensor, ...]
    # What the cache was last continued under (handle, subset, rows of the batch), and what that runs.
    last: tuple[Any, HeadSubset, int | None] | None = None
    selection: Selection | None = None

    def __getstate__(self) -> dict:
        return {"layers": self.layers, "masks": self.masks}  # a copied cache does not copy the model

    def was_last(self, handle: Any, subset: HeadSubset, rows: int | None) -> bool:
        """Whether the cache was last continued under just this."""
        last = self.last
        return last is not None and last[0] is handle and last[1] is subset and last[2] == rows

    def take_rows(self, indices: Tensor) -> None:
        """Follow the cache to other rows of the batch."""
        indices = torch.as_tensor(indices).cpu()
        self.masks = tuple(mask[indices] if mask.dim() == 2 and len(mask) > 1 else mask for mask in self.masks)
        self.last = None

    def repeat_rows(self, repeats: int) -> None:
        """Follow the cache where every row becomes `repeats` rows."""
        self.masks = tuple(
            mask.repeat_interleave(repeats, 0) if mask.dim() == 2 and len(mask) > 1 else mask for mask in self.masks
        )
        self.last = None


class _Travelling:
    """A cache whose record, with a row a request, follows the rows."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        stored_in(self).take_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        stored_in(self).take_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        stored_in(self).repeat_rows(repeats)


class TravellingDynamicCache(_Travelling, DynamicCache):
    """A `DynamicCache` filled under a subset for every request."""


class TravellingStaticCache(_Travelling, StaticCache):
    """A `StaticCache` filled under a subset for every request."""


class TravellingEncoderDecoderCache(_Travelling, EncoderDecoderCache):
    """An `EncoderDecoderCache` filled under a subset for every request."""


_TRAVELLING = {
    DynamicCache: TravellingDynamicCache,
    StaticCache: TravellingStaticCache,
    EncoderDecoderCache: TravellingEncoderDecoderCache,
}


def stored_in(cache: Cache) -> Stored | None:
    """The record of a cache; None where it holds every head, or nothing yet."""
    found = cache.__dict__.get(_ATTRIBUTE)
    if found is None and isinstance(cache, EncoderDecoderCache):
        found = stored_in(cache.cross_attention_cache) or stored_in(cache.self_attention_cache)
    return found


def is_empty(cache: Cache) -> bool:
    """Whether nothing is stored. For a static cache on a GPU the answer waits for the device."""
    if isinstance(cache, EncoderDecoderCache) and any(cache.is_updated.values()):
        return False
    return int(cache.get_seq_length()) == 0


def record(cache: Cache, subset: HeadSubset, selection: Selection | None, rows: int | None) -> Stored:
    """Write down what the first forward stores: `selection` is what it runs, None where that is every head."""
    held = every_head(subset.layers) if selection is None else selection.stored
    masks = tuple(
        rows_of_requests("subset", mask, rows).cpu() if mask.dim() == 2 and len(mask) > 1 and rows else mask.cpu()
        for mask in held
    )
    if any(mask.dim() == 2 and len(mask) > 1 for mask in masks) and not isinstance(cache, _Travelling):
        if type(cache) not in _TRAVELLING:
            known = ", ".join(each.__name__ for each in _TRAVELLING)
            got = type(cache).__name__
            raise UnsupportedError(
                f"past_key_values: wanted one of {known} under a subset for every request, got {got}"
            )
        cache.__class__ = _TRAVELLING[type(cache)]
    return _write(cache, Stored(subset.layers, masks, None, selection))


def record_all(cache: Cache, layers: Layers) -> Stored:
    """Write down that a cache holds every head, as one does that was filled without a record."""
    return _write(cache, Stored(layers, every_head(layers)))


def _write(cache: Cache, stored: Stored) -> Stored:
    """On the parts of an encoder-decoder's cache too, which may go on without it."""
    parts = (cache.self_attention_cache, cache.cross_attention_cache) if isinstance(cache, EncoderDecoderCache) else ()
    for each in (cache, *parts):
        each.__dict__[_ATTRIBUTE] = stored
    return stored


def every_head(layers: Layers) -> tuple[Tensor, ...]:
    """The masks of a cache that holds every key/value head."""
    return tuple(torch.ones(layer.num_kv_heads, dtype=torch.bool) for layer in layers)


def check_continues(stored: Stored, subset: HeadSubset, rows: int | None) -> None:
    """Raise unless the cache holds every key/value head that `subset` reads."""
    if stored.layers.difference(subset.layers) is not None:
        raise SubsetMismatchError(
            f"past_key_values: filled by another model: {stored.layers.difference(subset.layers)}"
        )
    masks = subset.mask
    for row, layer in enumerate(subset.layers):
        needed, held = needed_groups(masks[..., row, : layer.num_heads], layer), stored.masks[row]
        if needed.dim() == 2 and rows is not None:
            needed = rows_of_requests("subset", needed, rows)
        if held.dim() == 2 and len(held) > 1 and len(held) != rows and rows is not None:
            raise invalid("past_key_values", f"a cache of {rows} rows, as the input has", f"one of {len(held)}")
        missing = needed & ~held
        if missing.any():
            heads = missing.reshape(-1, layer.num_kv_heads).any(0).nonzero()[:, 0].tolist()
            raise SubsetMismatchError(
                f"past_key_values: this cache lacks key/value heads {heads} of layer {layer.name}, which the subset "
                "reads: it was filled under other heads, and only those can be continued (attach with kv='all' to "
                "store all)"
            )


def drop_emptied(cache: Cache, stored: Stored) -> None:
    """Drop what the layers of an empty cache keep for other numbers of heads than it is going to hold."""
    has_decoder = any(layer.stack == "decoder" for layer in stored.layers)
    for layer, mask in zip(stored.layers, stored.masks, strict=True):
        own = cache
        if isinstance(cache, EncoderDecoderCache):
            own = cache.cross_attention_cache if layer.kind == "cross" else cache.self_attention_cache
        if layer.index >= len(own.layers) or (has_decoder and layer.stack != "decoder"):
            continue
        part, heads = own.layers[layer.index], mask.shape[-1] if mask.dim() == 2 else max(1, int(mask.sum()))
        held = getattr(part, "keys", None)
        if held is not None and held.dim() == 4 and held.shape[1] != heads:
            part.is_initialized = False


def check_room(cache: Cache, positions: int) -> None:
    """Raise where a static cache is too short for `positions` more. Lengths on a GPU are not looked at."""
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    for part in own.layers:
        if not isinstance(part, StaticLayer):
            return
        if part.is_sliding or (part.is_initialized and part.keys.device.type != "cpu"):
            continue
        length = int(part.get_seq_length()) + positions
        if length > part.max_cache_len:
            raise invalid(
                "past_key_values", f"a static cache of at least {length} positions", f"one of {part.max_cache_len}"
            )
        return


def cache_in(output: Any) -> Cache | None:
    """The cache that a forward returned, if any."""
    if isinstance(output, Mapping):
        found = output.get("past_key_values")
        return found if isinstance(found, Cache) else None
    if isinstance(output, tuple):
        return next((each for each in output if isinstance(each, Cache)), None)
    return None

"""`handle.record`: statistics of attention, and heads' outputs, of the forwards inside a block."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import invalid, invalid_type
from ...layers import Layers, whole_number
from . import attention

if TYPE_CHECKING:
    from .handle import Handle

STATISTICS = ("entropy", "sparsity", "confidence", "redundancy", "position_mass", "special_mass")


class Mean:
    """A weighted mean over rows and forwards, in float64 on the device of what is added."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.weight: Tensor | None = None

    def add(self, values: Tensor, weights: Tensor) -> None:
        """`values [B, ...]`, ignored where `weights`, broadcastable to them, are 0."""
        weights = weights.to(torch.float64).expand(values.shape)
        total = torch.where(weights > 0, values.to(torch.float64) * weights, 0.0).sum(0)
        weight = weights.sum(0)
        # not in place: what a forward in inference mode leaves could not be changed outside of it
        self.total = total if self.total is None else self.total + total
        self.weight = weight if self.weight is None else self.weight + weight

    def value(self) -> Tensor:
        """The mean on the CPU; NaN where nothing counts."""
        return (self.total / self.weight).cpu()


class Record:
    """What a `handle.record` block has collected so far.

    outputs: {name of a layer: one detached tensor `[B, T, H, Dv]` a forward, zeros for heads that are off}, as the
        output projection reads them (times `scale`, if any); empty unless asked for.
    """

    def __init__(self, layers: Layers, statistics: tuple[str, ...], outputs: bool, special: tuple[int, ...]) -> None:
        self.layers = layers
        self.names = statistics
        self.special_tokens = special
        self.keeps_outputs = outputs
        self.outputs: dict[str, list[Tensor]] = {layer.name: [] for layer in layers} if outputs else {}
        self.is_open = True
        self._means: dict[tuple[str, int], Mean] = {}
        self._counts: list[Tensor | int] = [0] * len(layers)
        self._lock = threading.Lock()

    @property
    def count(self) -> Tensor:
        """int64 `[L]`: the queries that each layer's statistics are means over, those of every row and forward."""
        return torch.tensor([int(count) for count in self._counts])

    @property
    def statistics(self) -> dict[str, Tensor]:
        """{name: float64 `[L, H]`}, and `[L, H, 3]` for "position_mass": previous, own and next position.

        Means over the counted queries of all forwards in which the head was on; NaN for heads that never were, for
        padding heads, and for "position_mass" in cross-attention, whose keys are another sequence's positions.
        """
        return {name: self._most_similar() if name == "redundancy" else self._mean(name) for name in self.names}

    @property
    def similarity(self) -> Tensor:
        """float64 `[L, H, H]`, of every two heads of a layer, where "redundancy" was asked for.

        Mean over queries of 1 - (Jensen-Shannon divergence of the two heads' attention) / log 2, in [0, 1].
        """
        if "redundancy" not in self.names:
            raise invalid("statistics", "'redundancy' among them, for similarity", f"{self.names}")
        return self._mean("redundancy")

    def add_count(self, row: int, count: Tensor) -> None:
        """`count [B]` queries of layer `row`."""
        with self._lock:
            self._counts[row] = self._counts[row] + count.sum()

    def add(self, name: str, row: int, values: Tensor, weights: Tensor) -> None:
        """`values [B, H, ...]` of layer `row`, means over `weights` queries."""
        with self._lock:
            self._means.setdefault((name, row), Mean()).add(values, weights)

    def _mean(self, name: str) -> Tensor:
        heads = self.layers.max_heads
        shape = {"redundancy": (heads, heads), "position_mass": (heads, 3)}.get(name, (heads,))
        values = torch.full((len(self.layers), *shape), math.nan, dtype=torch.float64, device="cpu")
        for row, layer in enumerate(self.layers):
            mean = self._means.get((name, row))
            if mean is not None:
                own = values[row, : layer.num_heads]
                own = own[:, : layer.num_heads] if name == "redundancy" else own
                own.copy_(mean.value())
        return values

    def _most_similar(self) -> Tensor:
        """Of each head the similarity to the most similar other; 0 for one that is alone."""
        similarity = self._mean("redundancy")
        itself = similarity.diagonal(dim1=1, dim2=2)
        others = similarity.nan_to_num(0.0)
        others.diagonal(dim1=1, dim2=2).zero_()
        return others.amax(-1).masked_fill(itself.isnan(), math.nan)


_records: ContextVar[tuple[tuple[Handle, Record], ...]] = ContextVar("sparse_heads_records", default=())


def open_records(handle: Handle) -> tuple[Record, ...]:
    """The records of this handle that are open in this thread or task."""
    return tuple(record for owner, record in _records.get() if owner is handle and record.is_open)


@contextmanager
def record(
    handle: Handle, statistics: Iterable[str], outputs: bool, special_tokens: Iterable[int] | None
) -> Iterator[Record]:
    """`handle.record` on an attached handle."""
    made = Record(handle.layers, *_checked(statistics, outputs, special_tokens))
    attention.borrow(handle)
    _records.set((*_records.get(), (handle, made)))
    try:
        yield made
    finally:
        made.is_open = False
        _records.set(tuple(each for each in _records.get() if each[1] is not made))
        attention.give_back(handle)


def _checked(
    statistics: Iterable[str], outputs: bool, special_tokens: Iterable[int] | None
) -> tuple[tuple[str, ...], bool, tuple[int, ...]]:
    if isinstance(statistics, str) or not isinstance(statistics, Iterable):
        raise invalid_type("statistics", f"several of {STATISTICS}", statistics)
    names = tuple(statistics)
    for name in names:
        if name not in STATISTICS:
            raise invalid("statistics", f"some of {STATISTICS}", name)
    if not isinstance(outputs, bool):
        raise invalid_type("outputs", "True or False", outputs)
    if not (names or outputs):
        raise invalid("statistics", f"some of {STATISTICS}, or outputs=True", "none")
    special_tokens = () if special_tokens is None else special_tokens
    if isinstance(special_tokens, str) or not isinstance(special_tokens, Iterable):
        raise invalid_type("special_tokens", "token ids, such as tokenizer.all_special_ids", special_tokens)
    special = tuple(whole_number("special_tokens", each, 0) for each in special_tokens)
    if "special_mass" in names and not special:
        raise invalid("special_tokens", "the ids that 'special_mass' is the mass on", "none")
    return names, outputs, special

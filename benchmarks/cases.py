"""The kinds of cases: which input, and which heads run."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import torch

from sparse_heads.ops.decode import decode_bytes

Heads = tuple[int, ...]
NUM_HEADS = 12
# Scattered on purpose: neighbours, gaps and both ends, so that no way of reading the kept rows is favoured.
KEPT_HEADS = {
    12: tuple(range(12)),
    9: (0, 1, 3, 4, 6, 7, 8, 10, 11),
    6: (0, 2, 3, 6, 9, 10),
    3: (1, 6, 10),
    1: (7,),
}


class BaseCase:
    """What all cases share. kept: for each layer, or each request, the heads out of `num_heads` that run."""

    level: str
    label: str
    kept: tuple[Heads, ...]
    num_heads: int
    reported: ClassVar[tuple[str, ...]] = ("label", "hidden", "batch", "tokens")

    @property
    def kept_count(self) -> int:
        """Heads that run, over all layers or requests."""
        return sum(len(heads) for heads in self.kept)

    @property
    def all_count(self) -> int:
        """Heads that there are, over all layers or requests."""
        return self.num_heads * len(self.kept)

    def facts(self) -> dict[str, object]:
        """What a result file says of the case, beside its name and level."""
        shape = {name: getattr(self, name) for name in self.reported}
        return shape | {"kept": self.kept, "kept_count": self.kept_count, "heads": self.all_count}


@dataclass(frozen=True)
class Case(BaseCase):
    """One input and one subset: `lengths` tokens per request, padded to the longest; `kept` heads per layer."""

    num_heads: ClassVar[int] = NUM_HEADS
    level: str  # "block": one attention module; "model": every layer, with embeddings and feed-forward
    hidden: int
    lengths: tuple[int, ...]
    kept: tuple[Heads, ...]
    label: str = ""

    @property
    def batch(self) -> int:
        """Number of requests."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens per request after padding."""
        return max(self.lengths)

    @property
    def name(self) -> str:
        """Unique within a suite, for example `block-E384-1x16-6of12`."""
        label = f"-{self.label}" if self.label else ""
        shape = f"E{self.hidden}-{self.batch}x{self.tokens}"
        return f"{self.level}-{shape}{label}-{self.kept_count}of{self.all_count}"


@dataclass(frozen=True)
class RequestsCase(BaseCase):
    """One attention module with heads of its own for every request: `kept[i]` run for request i."""

    level: ClassVar[str] = "requests"
    num_heads: ClassVar[int] = NUM_HEADS
    hidden: int
    tokens: int
    kept: tuple[Heads, ...]
    label: str  # how the heads were chosen

    @property
    def batch(self) -> int:
        """Number of requests."""
        return len(self.kept)

    @property
    def name(self) -> str:
        """Unique within the suite, for example `requests-E768-8x128-independent-48of96`."""
        shape = f"E{self.hidden}-{self.batch}x{self.tokens}"
        return f"{self.level}-{shape}-{self.label}-{self.kept_count}of{self.all_count}"


@dataclass(frozen=True)
class GqaCase(BaseCase):
    """Causal attention by itself with grouped queries; the query heads `kept[i]` run for request i."""

    level: ClassVar[str] = "gqa"
    reported: ClassVar[tuple[str, ...]] = ("label", "batch", "tokens", "num_heads", "kv_heads", "head_dim")
    num_heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    kept: tuple[Heads, ...]
    label: str  # how the heads were chosen

    @property
    def batch(self) -> int:
        """Number of requests."""
        return len(self.kept)

    @property
    def name(self) -> str:
        """Unique within the suite, for example `gqa-H12-4-D64-4x1024-groups-24of48`."""
        shape = f"H{self.num_heads}-{self.kv_heads}-D{self.head_dim}-{self.batch}x{self.tokens}"
        return f"{self.level}-{shape}-{self.label}-{self.kept_count}of{self.all_count}"


@dataclass(frozen=True)
class DecodeCase(BaseCase):
    """One new position of every request against its cache; the query heads `kept[i]` run for request i."""

    level: ClassVar[str] = "decode"
    reported: ClassVar[tuple[str, ...]] = (
        *("label", "batch", "tokens", "num_heads", "kv_heads", "head_dim", "dtype", "lengths", "page_size"),
        *("kept_bytes", "all_bytes"),
    )
    num_heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    lengths: tuple[int, ...]  # a request
    kept: tuple[Heads, ...]
    label: str  # how the heads were chosen
    page_size: int = 0  # 0: a cache without pages

    @property
    def batch(self) -> int:
        """Number of requests."""
        return len(self.kept)

    @property
    def tokens(self) -> int:
        """Positions that every request's cache has room for."""
        return max(self.lengths)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the cache that the kept heads need."""
        return self._cache_bytes(self.kept)

    @property
    def all_bytes(self) -> int:
        """Bytes of the cache that all heads need."""
        return self._cache_bytes((tuple(range(self.num_heads)),) * self.batch)

    def _cache_bytes(self, kept: tuple[Heads, ...]) -> int:
        query = torch.empty(self.batch, self.num_heads, 1, self.head_dim, dtype=getattr(torch, self.dtype))
        cache = torch.empty(self.batch, self.kv_heads, self.tokens, self.head_dim, device="meta")
        mask = torch.tensor([[head in heads for head in range(self.num_heads)] for heads in kept])
        return int(decode_bytes(query, cache, cache, torch.tensor(self.lengths), mask).cache.sum())

    @property
    def name(self) -> str:
        """Unique within the suite, for example `decode-H12-12-D64-float32-8x4096-independent-48of96`."""
        shape = f"H{self.num_heads}-{self.kv_heads}-D{self.head_dim}-{self.dtype}-{self.batch}x{self.tokens}"
        lengths = "-uneven" if len(set(self.lengths)) > 1 else ""
        pages = f"-pages{self.page_size}" if self.page_size else ""
        return f"{self.level}-{shape}{lengths}{pages}-{self.label}-{self.kept_count}of{self.all_count}"


@dataclass(frozen=True)
class GenerateCase(BaseCase):
    """Greedy `generate()` of a Llama-like model from a prompt without padding; `kept` heads per layer for everybody,
    or `kept_by_request`."""

    level: ClassVar[str] = "generate"
    num_heads: ClassVar[int] = NUM_HEADS
    reported: ClassVar[tuple[str, ...]] = ("label", "hidden", "layers", "batch", "tokens", "new_tokens")
    hidden: int
    layers: int
    batch: int
    tokens: int  # of the prompt
    new_tokens: int
    label: str = ""

    @property
    def kept(self) -> tuple[Heads, ...]:
        """Half of the heads of each layer."""
        return tuple(rotated(NUM_HEADS // 2, layer) for layer in range(self.layers))

    @property
    def kept_by_request(self) -> tuple[tuple[Heads, ...], ...]:
        """Half of each layer's (request, head) pairs, chosen independently: [layers][batch]."""
        return tuple(independent(self.batch, 0.5, seed=layer) for layer in range(self.layers))

    @property
    def name(self) -> str:
        """Unique within the suite, for example `generate-E768-L12-8x256+64-72of144`."""
        shape = f"E{self.hidden}-L{self.layers}-{self.batch}x{self.tokens}+{self.new_tokens}"
        return f"{self.level}-{shape}-{self.kept_count}of{self.all_count}"


@dataclass(frozen=True)
class GatesCase(BaseCase):
    """A training step under gates, or the sweep that leaves out every head in turn.

    label: "joint" or "pipelined", differentiable subset pruning to half of the heads; "zeros", hard-concrete gates of
    which three quarters are 0; "sweep", ablation scores.
    """

    level: ClassVar[str] = "gates"
    num_heads: ClassVar[int] = NUM_HEADS
    reported: ClassVar[tuple[str, ...]] = ("label", "hidden", "layers", "feed_forward", "batch", "tokens")
    hidden: int
    layers: int
    feed_forward: int
    batch: int
    tokens: int
    label: str

    @property
    def kept(self) -> tuple[Heads, ...]:
        """A quarter of the heads of each layer for "zeros", all otherwise."""
        count = NUM_HEADS // 4 if self.label == "zeros" else NUM_HEADS
        return tuple(rotated(count, layer) for layer in range(self.layers))

    @property
    def name(self) -> str:
        """Unique within the suite, for example `gates-E384-L2-F96-4x512-zeros-6of24`."""
        shape = f"E{self.hidden}-L{self.layers}-F{self.feed_forward}-{self.batch}x{self.tokens}"
        return f"{self.level}-{shape}-{self.label}-{self.kept_count}of{self.all_count}"


AnyCase = Case | RequestsCase | GqaCase | DecodeCase | GenerateCase | GatesCase


def rotated(count: int, layer: int) -> Heads:
    """The list of `count` kept heads, shifted by `layer` so that layers keep different heads."""
    return tuple(sorted((head + layer) % NUM_HEADS for head in KEPT_HEADS[count]))


def independent(batch: int, density: float, seed: int) -> tuple[Heads, ...]:
    """Heads per request, each on with probability `density`; drawn again until exactly that share of them is on and
    every request has one, without which no block can be repacked."""
    generator = random.Random(seed)
    while True:
        kept = tuple(tuple(head for head in range(NUM_HEADS) if generator.random() < density) for _ in range(batch))
        if all(kept) and sum(map(len, kept)) == round(density * NUM_HEADS * batch):
            return kept

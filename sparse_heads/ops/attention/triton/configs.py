"""Tile shapes, warps and pipeline stages: by pass, padded head dimensions, size of the dtype, rows and device."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """block_m rows of queries against block_n keys, for a program of num_warps warps."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# What a run of programs may read of keys and values in turns: about half of the second-level cache of an A100 or H100.
CACHE_BYTES = 24 << 20
# Tiles of that few rows are for few queries, where larger ones would be mostly empty.
FEW_ROWS = 16

# {pass: {(lowest capability, bytes an element): {largest padded dimension: configuration}}}
TABLE: dict[str, dict[tuple[tuple[int, int], int], dict[int, Config]]] = {
    "forward": {
        ((8, 0), 2): {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 3), 256: Config(64, 32, 8, 2)},
        ((9, 0), 2): {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 32, 8, 3)},
        ((10, 0), 2): {64: Config(128, 64, 8, 2), 128: Config(128, 64, 8, 3), 256: Config(64, 32, 8, 3)},
        ((8, 0), 4): {64: Config(64, 32, 8, 1), 128: Config(32, 32, 8, 1), 256: Config(32, 32, 8, 1)},
    },
    "forward, few rows": {
        ((8, 0), 2): {64: Config(16, 64, 4, 3), 128: Config(16, 64, 4, 2), 256: Config(16, 32, 4, 2)},
        ((8, 0), 4): {64: Config(16, 32, 4, 2), 128: Config(16, 16, 4, 2), 256: Config(16, 32, 4, 2)},
    },
    "backward prepare": {
        ((8, 0), 2): {64: Config(128, 0, 4, 1), 128: Config(64, 0, 4, 1), 256: Config(32, 0, 4, 1)},
        ((8, 0), 4): {64: Config(64, 0, 4, 1), 128: Config(32, 0, 4, 1), 256: Config(16, 0, 4, 1)},
    },
    "backward keys": {
        ((8, 0), 2): {64: Config(64, 64, 4, 2), 128: Config(32, 64, 8, 2), 256: Config(32, 32, 8, 2)},
        ((9, 0), 2): {64: Config(64, 128, 8, 3), 128: Config(64, 128, 8, 2), 256: Config(16, 64, 8, 2)},
        ((8, 0), 4): {64: Config(16, 32, 8, 1), 128: Config(16, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    },
    "backward keys, more registers": {
        ((8, 0), 2): {64: Config(32, 32, 4, 2), 128: Config(32, 64, 8, 2), 256: Config(32, 32, 8, 2)},
        ((9, 0), 2): {64: Config(64, 128, 8, 2), 128: Config(32, 128, 8, 2), 256: Config(32, 32, 8, 2)},
        ((8, 0), 4): {64: Config(32, 32, 8, 1), 128: Config(16, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    },
    "backward keys, most registers": {
        ((8, 0), 2): {64: Config(32, 32, 4, 2), 128: Config(32, 64, 8, 2), 256: Config(32, 32, 8, 2)},
        ((9, 0), 2): {64: Config(64, 128, 8, 2), 128: Config(16, 128, 8, 2), 256: Config(32, 32, 8, 2)},
        ((8, 0), 4): {64: Config(32, 32, 8, 1), 128: Config(16, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    },
    "backward queries": {
        ((8, 0), 2): {64: Config(64, 64, 4, 3), 128: Config(64, 64, 4, 2), 256: Config(32, 32, 4, 2)},
        ((9, 0), 2): {64: Config(128, 128, 8, 2), 128: Config(128, 64, 8, 3), 256: Config(128, 32, 8, 2)},
        ((8, 0), 4): {64: Config(16, 32, 4, 1), 128: Config(32, 16, 8, 1), 256: Config(16, 16, 8, 1)},
    },
    "backward queries, more registers": {
        ((8, 0), 2): {64: Config(64, 32, 8, 2), 128: Config(32, 32, 4, 2), 256: Config(32, 32, 8, 2)},
        ((9, 0), 2): {64: Config(128, 64, 8, 2), 128: Config(128, 32, 8, 2), 256: Config(32, 32, 8, 2)},
        ((8, 0), 4): {64: Config(32, 32, 8, 1), 128: Config(16, 32, 4, 1), 256: Config(16, 16, 8, 1)},
        ((9, 0), 4): {64: Config(32, 32, 8, 1), 128: Config(16, 16, 8, 1), 256: Config(16, 16, 8, 1)},
    },
}


def padded(dimension: int) -> int:
    """The tile that holds `dimension` columns: a power of two, and no less than tensor cores take."""
    return max(16, 1 << (dimension - 1).bit_length()) if dimension else 16


def choose(
    kernel: str, head_dim: int, value_dim: int, element_size: int, rows: int, capability: tuple[int, int]
) -> Config:
    """The configuration of a pass ("forward") for heads of these dimensions.

    rows: those of the largest work item, tokens times query heads. Nothing here depends on what masks hold.
    """
    if rows <= FEW_ROWS and f"{kernel}, few rows" in TABLE:
        kernel = f"{kernel}, few rows"
    widest = max(padded(head_dim), padded(value_dim))
    sizes = max(key for key in TABLE[kernel] if key[0] <= capability and key[1] == element_size)
    by_dimension = TABLE[kernel][sizes]
    return by_dimension[min(limit for limit in by_dimension if widest <= limit)]


def turns(keys: int, head_dim: int, value_dim: int, element_size: int) -> int:
    """How many work items run in turns: as many as have their keys and values in the cache together."""
    return max(1, CACHE_BYTES // max(1, keys * (head_dim + value_dim) * element_size))

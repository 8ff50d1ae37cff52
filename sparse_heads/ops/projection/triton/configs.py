"""Tile shapes, warps and pipeline stages of the projections: by kernel, sizes, dtype and device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...._triton import Capability


class Config(NamedTuple):
    """Tiles of block_m rows by block_n columns, summed over block_k at a time, for a program of num_warps warps.

    Neighbouring programs take group_m tiles of rows by all columns, so that the cache serves both operands.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "GROUP_M": self.group_m}

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# float32 without TF32 has no tensor cores: every product is formed in registers, which bounds the tiles.
KINDS = {(torch.float32, False): "float32", (torch.float32, True): "tf32"}
HALF = "half"
MULTIPROCESSORS = 128  # about those of the devices that the large tiles are for
SMALL_SIZE = 64  # tiles for fewer rows than that are for these alone
WIDE_LOAD = 16  # Triton reads several numbers at once where strides are multiples of this

# {kernel: {(lowest capability, kind): {largest size: configuration}}}. "tokens": both projections and the gradients of
# their inputs ("gated": of heads and gate), by a request's tokens; "weight": sums over tokens, by their columns, which
# are one head's or all kept heads'.
TABLE: dict[str, dict[tuple[tuple[int, int], str], dict[float, Config]]] = {
    "tokens": {
        ((8, 0), HALF): {
            16: Config(16, 64, 128, 4, 4),
            64: Config(64, 64, 64, 4, 4),
            256: Config(64, 128, 64, 4, 3),
            float("inf"): Config(128, 128, 32, 4, 4),
        },
        ((9, 0), HALF): {
            16: Config(16, 64, 128, 4, 4),
            64: Config(64, 64, 64, 4, 4),
            256: Config(64, 128, 64, 4, 4),
            float("inf"): Config(128, 256, 64, 8, 3),
        },
        # Sums come out of tensor memory a row a thread, and biases or gates beside them: wider tiles spill.
        ((10, 0), HALF): {
            16: Config(16, 64, 128, 4, 4),
            64: Config(64, 64, 64, 4, 4),
            256: Config(64, 128, 64, 8, 4),
            float("inf"): Config(128, 128, 64, 8, 4),
        },
        ((8, 0), "tf32"): {
            16: Config(16, 64, 64, 4, 3),
            64: Config(64, 64, 32, 4, 3),
            float("inf"): Config(128, 128, 32, 8, 3),
        },
        ((8, 0), "float32"): {16: Config(16, 64, 32, 4, 3), float("inf"): Config(64, 64, 16, 4, 3)},
    },
    # The gate's gradient holds a tile of the heads beside the sums.
    "tokens, gated": {
        ((8, 0), HALF): {
            16: Config(16, 64, 128, 4, 4),
            64: Config(64, 64, 64, 4, 4),
            float("inf"): Config(128, 128, 32, 8, 4),
        },
        ((9, 0), HALF): {
            16: Config(16, 64, 128, 4, 4),
            64: Config(64, 64, 64, 4, 4),
            float("inf"): Config(128, 128, 64, 8, 4),
        },
        ((8, 0), "tf32"): {
            16: Config(16, 64, 64, 4, 3),
            float("inf"): Config(64, 64, 32, 4, 3),
        },
        ((8, 0), "float32"): {16: Config(16, 64, 32, 4, 3), float("inf"): Config(64, 64, 16, 4, 3)},
    },
    "weight": {
        ((8, 0), HALF): {
            32: Config(128, 32, 64, 4, 3),
            64: Config(128, 64, 64, 4, 3),
            float("inf"): Config(128, 128, 32, 4, 4),
        },
        ((9, 0), HALF): {
            32: Config(128, 32, 64, 4, 4),
            64: Config(128, 64, 64, 4, 4),
            128: Config(128, 128, 64, 8, 4),
            float("inf"): Config(128, 256, 64, 8, 3),
        },
        ((10, 0), HALF): {
            32: Config(128, 32, 64, 4, 4),
            64: Config(128, 64, 64, 4, 4),
            float("inf"): Config(128, 128, 64, 8, 4),
        },
        ((8, 0), "tf32"): {64: Config(128, 64, 32, 4, 3), float("inf"): Config(128, 128, 32, 8, 3)},
        ((8, 0), "float32"): {float("inf"): Config(64, 64, 16, 4, 3)},
    },
}


def choose(
    kernel: str, size: int, outputs: int, operands: Sequence[Tensor], tf32: bool, capability: Capability
) -> Config:
    """The configuration of a kernel of TABLE for products of operands; nothing here depends on what masks hold.

    outputs: how many numbers the launch computes, all heads counted. Tiles stay small where large ones would leave
    multiprocessors idle, or where strides let operands be read number by number only: addresses fill registers then.
    """
    kind = KINDS.get((operands[0].dtype, tf32), HALF)
    if any(stride != 1 and stride % WIDE_LOAD for operand in operands for stride in operand.stride()):
        size = min(size, SMALL_SIZE)
    by_size = TABLE[kernel][max(key for key in TABLE[kernel] if key[0] <= capability and key[1] == kind)]
    largest = min(limit for limit in by_size if size <= limit)
    fitting = [config for limit, config in by_size.items() if SMALL_SIZE <= limit <= largest] or [by_size[largest]]
    filling = [config for config in fitting if outputs >= MULTIPROCESSORS * config.block_m * config.block_n]
    return filling[-1] if filling else fitting[0]


def head_block(config: Config, head_dim: int) -> tuple[int, bool]:
    """(block_k, whether it divides head_dim), for sums over heads: tiles that lie in one head have one address."""
    divisor = min(head_dim & -head_dim, config.block_k)
    aligned = divisor >= min(32, config.block_k)
    return (divisor if aligned else config.block_k), aligned


def precision(dtype: torch.dtype, tf32: bool) -> str:
    """What a kernel's dots take as PRECISION."""
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"

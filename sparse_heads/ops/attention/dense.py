"""Which of PyTorch's attention kernels is the fastest for a shape, by a table that was measured on the device."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

# Written by `python -m benchmarks.gpu dense-table`, which says what it holds; absent until a device is measured.
TABLE = Path(__file__).with_name("dense_backends.json")
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@cache
def measured(device_name: str) -> dict[str, Any] | None:
    """The table of a device, as CUDA names it; None where it was not measured."""
    return json.loads(TABLE.read_text(encoding="utf-8")).get(device_name) if TABLE.is_file() else None


def ranked_kernels(
    device_name: str, query: torch.Tensor, key: torch.Tensor, is_causal: bool, training: bool
) -> list[SDPBackend] | None:
    """PyTorch's kernels for query [B, H, T, D] and key [B, H_kv, S, D], the fastest first.

    By the measured shape that is next to these: same causality, then head dimension, group and keys by their ratios.
    None where the device or the dtype was not measured: then PyTorch chooses.
    """
    table = measured(device_name) or {"rows": []}
    # Both 16-bit types take the same instructions, and one is measured.
    dtype = "bfloat16" if query.dtype == torch.float16 else str(query.dtype).removeprefix("torch.")
    rows = [row for row in table["rows"] if (row["dtype"], row["causal"]) == (dtype, is_causal)]
    if not rows:
        return None
    shape = {"head_dim": query.shape[3], "group": query.shape[1] // key.shape[1], "tokens": key.shape[2]}

    def distance(row: dict[str, Any]) -> list[float]:
        return [abs(math.log(row[name] / size)) for name, size in shape.items()]

    names = min(rows, key=distance)["training" if training else "forward"]
    # What a kernel refuses goes to the next; the last takes everything.
    return [*(KERNELS[name] for name in names), SDPBackend.MATH] if names else None

"""Which of PyTorch's attention kernels is fastest, by shape: the table that the dispatch reads.

`dense_backends.json` holds, by device name as CUDA gives it, {"torch": version, "date": date, "rows": rows}, a row

    {"head_dim": 64, "dtype": "bfloat16", "causal": true, "group": 1, "tokens": 512,
     "forward": ["cudnn", "flash", "efficient"], "training": ["flash", "cudnn"]}

with the kernels that ran and gave right results, the fastest first, without gradients and for a forward with its
backward, which one kernel runs both. group: query heads a key/value head. Other devices in the file are kept. The times
are in `dense.json` beside the other results, by the same facts, in microseconds.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import torch
from torch.nn import functional as F

from . import dense
from .device import Device, session
from .measure import Contender, gate, interleave, spread
from .oracles import check_close
from .runner import write_json

KERNELS = ("cudnn", "flash", "efficient")
TOKENS, HEAD_DIMS, GROUPS = (512, 1024, 2048, 4096, 8192, 16384, 32768), (64, 128), (1, 4, 8)
DTYPES = ("bfloat16",)  # float16 takes the same instructions
HEADS, BATCH_TOKENS = 16, 16384
FACTS = ("head_dim", "dtype", "causal", "group", "tokens")
Row = dict[str, object]


def rows(smoke: bool) -> list[Row]:
    """The shapes."""
    if smoke:
        return [dict(zip(FACTS, (16, "float32", True, 2, 24), strict=True))]
    found = product(HEAD_DIMS, DTYPES, (True, False), GROUPS, TOKENS)
    return [dict(zip(FACTS, values, strict=True)) for values in found]


class Plain:
    """PyTorch's plain kernel in float32 on the first and the last key/value head of the first request."""

    def __init__(self, inputs: list[torch.Tensor], grad: torch.Tensor, row: Row) -> None:
        self.inputs, self.grad, self.row = inputs, grad, row

    def check(self, outputs: dict[str, torch.Tensor]) -> None:
        """Raise AssertionError unless output and gradients are right."""
        if self.row["tokens"] > 4096:
            return  # plain attention would hold too many scores; the shorter shapes of the same kernel are compared
        last = self.inputs[1].shape[1] - 1
        for kv_head in {0, last}:
            heads = slice(kv_head * self.row["group"], (kv_head + 1) * self.row["group"])
            places = {"output": heads, "query": heads, "key": slice(kv_head, kv_head + 1)}
            exact, eager = (self._compute(places, dtype) for dtype in (torch.float64, self.grad.dtype))
            for name, tensor in outputs.items():
                place = places.get(name, places["key"])
                check_close(name, tensor[:1, place], eager[name], exact[name])

    def _compute(self, places: dict[str, slice], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        slices = (places["query"], places["key"], places["key"])
        pairs = zip(self.inputs, slices, strict=True)
        leaves = [one.detach()[:1, place].to(dtype).requires_grad_() for one, place in pairs]
        with dense.pinned("math"):
            output = attend(*leaves, self.row["causal"])
        found = torch.autograd.grad(output, leaves, self.grad[:1, places["query"]].to(dtype))
        return {"output": output.detach(), **dict(zip(("query", "key", "value"), found, strict=True))}


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> torch.Tensor:
    """[B, H, T, D]."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)


def measure(row: Row, direction: str, device: Device) -> dict[str, object]:
    """Spread of every kernel, and why others have none."""
    heads, kv_heads = (4, 2) if device.smoke else (HEADS, HEADS // row["group"])
    batch = 1 if device.smoke else max(1, BATCH_TOKENS // row["tokens"])
    sizes = [(batch, count, row["tokens"], row["head_dim"]) for count in (heads, kv_heads, kv_heads, heads)]
    dtype = getattr(torch, row["dtype"])
    drawn = [
        torch.randn(batch, tokens, count, head_dim, device=device.torch_device, dtype=dtype).transpose(1, 2)
        for batch, count, tokens, head_dim in sizes
    ]
    leaves = dict(zip(("query", "key", "value"), [one.requires_grad_() for one in drawn[:3]], strict=True))
    contenders = [
        Contender(
            name,
            lambda: attend(*leaves.values(), row["causal"]),
            direction,
            (drawn[3],),
            leaves,
            settings=lambda name=name: dense.pinned(name),
        )
        for name in (("math",) if device.smoke else KERNELS)
    ]
    verdicts = gate(contenders, {"kept": Plain(drawn[:3], drawn[3], row)}, device)
    samples = interleave(verdicts.right, device, seed=row["tokens"])
    times = {name: spread(each) for name, each in samples.items()}
    return {"times": times, "wrong": verdicts.wrong, "failed": verdicts.failed}


def ranking(found: dict[str, object]) -> list[str]:
    """The kernels, the fastest first."""
    return sorted(found["times"], key=lambda name: found["times"][name]["median"])


def run(device: Device, raw: Path, table: Path) -> str:
    """Measure all rows, write times and table after each, and say how often each kernel won."""
    here, measured, chosen, wins = session(device), [], [], {}
    tables = json.loads(table.read_text()) if table.exists() else {}
    for row in rows(device.smoke):
        found = {name: measure(row, step, device) for name, step in (("forward", "forward"), ("training", "step"))}
        measured.append({**row, **found})
        chosen.append({**row, **{name: ranking(each) for name, each in found.items()}})
        for name in found:
            best = (name, chosen[-1][name][0] if chosen[-1][name] else "none")
            wins[best] = wins.get(best, 0) + 1
        write_json(raw, {"unit": "microseconds", "session": here, "rows": measured})
        tables[device.name] = {"torch": here["versions"]["torch"], "date": here["date"], "rows": chosen}
        write_json(table, tables)
    lines = [f"{name}: {kernel} fastest in {count} of {len(chosen)}" for (name, kernel), count in sorted(wins.items())]
    return "\n".join(lines)

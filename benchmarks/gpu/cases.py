"""The kinds of GPU cases: which input, and which heads run."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from torch import Tensor

LEVELS = ("attention", "block", "in", "out")
DIRECTIONS = ("forward", "backward", "step")


@dataclass(frozen=True)
class GpuCase:
    """One causal input without padding, and the heads that run.

    level: "attention", the operator alone; "block", projections and attention; "in" and "out", one projection.
    direction: "step" is forward and backward. masks: "shared" or "requests". choice: how the heads are chosen,
    "scattered", "runs" (two stretches of neighbours) or "groups" (whole key/value heads). gated: with gates, of which
    those of heads that are off are 0.
    """

    level: str
    direction: str
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    density: float = 1.0
    masks: str = "shared"
    choice: str = "scattered"
    gated: bool = False
    dtype: str = "bfloat16"
    width: int = 0  # of the model; 0 = heads * head_dim

    @property
    def hidden(self) -> int:
        """Width of the model."""
        return self.width or self.heads * self.head_dim

    @property
    def group(self) -> int:
        """Query heads a key/value head."""
        return self.heads // self.kv_heads

    @property
    def name(self) -> str:
        """Unique within a suite, for example `attention-forward-4x4096-H32-8-D128-requests-groups-0.5`."""
        shape = f"{self.batch}x{self.tokens}-H{self.heads}-{self.kv_heads}-D{self.head_dim}"
        gated = "-gated" if self.gated else ""
        return f"{self.level}-{self.direction}-{shape}-{self.masks}-{self.choice}-{self.density:g}{gated}"

    @cached_property
    def mask(self) -> Tensor:
        """bool [H] or [B, H], True = the head runs: the share `density`, exactly, of heads or of whole groups."""
        # The same heads whatever is done with them, and however long the input is.
        generator = random.Random(repr((self.batch, self.heads, self.kv_heads, self.density, self.masks, self.choice)))
        grouped = self.choice == "groups"
        units = self.kv_heads if grouped else self.heads
        rows = self.batch if self.masks == "requests" else 1
        kept = round(self.density * units * rows)
        if self.choice == "runs":
            first = kept // 2
            chosen = [*range(first), *range(units - (kept - first), units)]
        else:
            chosen = generator.sample(range(units * rows), kept)
        mask = torch.zeros(rows * units, dtype=torch.bool)
        mask[chosen] = True
        mask = mask.view(rows, units)
        mask = mask.repeat_interleave(self.group, dim=1) if grouped else mask
        return mask if self.masks == "requests" else mask[0]

    @property
    def pairs(self) -> Tensor:
        """The mask [B, H] of every request."""
        return self.mask.expand(self.batch, self.heads)

    @property
    def active(self) -> int:
        """(request, query head) pairs that run."""
        return int(self.pairs.sum())

    @property
    def active_groups(self) -> int:
        """(request, key/value head) pairs of which some query head runs."""
        return int(self.pairs.unflatten(1, (self.kv_heads, self.group)).any(-1).sum())

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of all inputs but gates."""
        return getattr(torch, self.dtype)

    def facts(self) -> dict[str, object]:
        """What a result file says of the case."""
        return {"name": self.name, **asdict(self), "active": self.active, "active_groups": self.active_groups}

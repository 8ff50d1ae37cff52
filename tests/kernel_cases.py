"""What is compiled ahead of time: operators called on meta tensors, so that the launches are those that users get."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from sparse_heads import _triton
from sparse_heads._triton.launch import Launch
from sparse_heads.ops.attention.triton.backward import attention_backward
from sparse_heads.ops.attention.triton.forward import attention_forward
from sparse_heads.ops.projection.triton.in_backward import in_projection_backward
from sparse_heads.ops.projection.triton.in_forward import in_projection
from sparse_heads.ops.projection.triton.out_backward import out_projection_backward
from sparse_heads.ops.projection.triton.out_forward import out_projection

HALF, SINGLE = torch.bfloat16, torch.float32
BATCH = 2


def meta(*sizes: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


class Attention(NamedTuple):
    """Attention; the tensors are strided as what projections return, [B, T, H, D]."""

    head_dim: int
    dtype: torch.dtype = HALF
    tf32: bool = False
    value_dim: int | None = None
    heads: int = 16
    kv_heads: int = 16
    tokens: int = 4096
    keys: int | None = None
    causal: bool = False
    window: int | None = None
    softcap: float = 0.0
    attn_mask: torch.dtype | None = None
    gate: bool = False
    sinks: bool = False
    per_request: bool = True
    training: bool = False
    headline: bool = False

    def run(self) -> None:
        keys, value_dim = self.keys or self.tokens, self.value_dim or self.head_dim

        def rows(length: int, heads: int, columns: int) -> Tensor:
            return meta(BATCH, length, heads, columns, dtype=self.dtype).transpose(1, 2)

        query, grad = rows(self.tokens, self.heads, self.head_dim), rows(self.tokens, self.heads, value_dim)
        key, value = rows(keys, self.kv_heads, self.head_dim), rows(keys, self.kv_heads, value_dim)
        inputs = (
            query,
            key,
            value,
            meta(BATCH, self.heads, dtype=torch.bool) if self.per_request else None,
            None,
            meta(BATCH, self.heads, dtype=SINGLE) if self.gate else None,
            meta(BATCH, 1, self.tokens, keys, dtype=self.attn_mask) if self.attn_mask else None,
            meta(self.heads, dtype=SINGLE) if self.sinks else None,
            -1 if self.window is None else self.window - 1,
            0 if self.causal else -1,
            self.head_dim**-0.5,
            self.softcap,
            self.tf32,
        )
        output, ungated, logsumexp = attention_forward(*inputs, training=self.training)
        if self.training:
            wanted = [True, True, True, self.gate, self.attn_mask == SINGLE, self.sinks]
            attention_backward(grad, *inputs, output if ungated is None else ungated, logsumexp, wanted)


class Projections(NamedTuple):
    """In-projection of queries, keys and values, and out-projection."""

    head_dim: int
    dtype: torch.dtype = HALF
    tf32: bool = False
    heads: int = 16
    kv_heads: int = 16
    tokens: int = 4096
    width: int = 2048
    bias: bool = False
    gate: bool = False
    per_request: bool = True
    training: bool = False
    headline: bool = False

    def run(self) -> None:
        counts = (self.heads, self.kv_heads, self.kv_heads)
        x = meta(BATCH, self.tokens, self.width, dtype=self.dtype)
        weights = [meta(count * self.head_dim, self.width, dtype=self.dtype) for count in counts]
        biases = [meta(count * self.head_dim, dtype=self.dtype) if self.bias else None for count in counts]
        if self.per_request:
            kept = [meta(BATCH, count, dtype=torch.bool) for count in counts]
        else:
            kept = [meta(count // 2, dtype=torch.int64) for count in counts]
        projected = in_projection(x, weights, biases, kept, self.head_dim, self.tf32)
        weight = meta(self.width, self.heads * self.head_dim, dtype=self.dtype)
        bias = meta(self.width, dtype=self.dtype) if self.bias else None
        gate = meta(BATCH if self.per_request else 1, self.heads, dtype=SINGLE) if self.gate else None
        out_projection(projected[0], weight, bias, gate, kept[0], self.tf32)
        if self.training:
            out_projection_backward(x, projected[0], weight, gate, kept[0], self.tf32, True, True, self.gate)
            wanted = [self.bias] * len(counts)
            in_projection_backward(
                projected, x, weights, kept, self.head_dim, self.tf32, True, [True] * len(counts), wanted
            )


Case = Attention | Projections


def name_of(case: Case) -> str:
    """What it is, and what is not as by default."""
    changed = [
        f"{field}={str(value).removeprefix('torch.')}"
        for field, value in case._asdict().items()
        if field != "headline" and value != case._field_defaults.get(field)
    ]
    return " ".join([type(case).__name__.lower(), *changed])


@contextlib.contextmanager
def recorded(capability: tuple[int, int]) -> Iterator[list[Launch]]:
    """The launches that would be made on such a device; none is."""
    launches: list[Launch] = []
    with (
        mock.patch.object(Launch, "run", lambda launch: launches.append(launch)),
        # What stands in for the capability of tensors that lie on no device.
        mock.patch.object(_triton, "OLDEST_DEVICE", capability),
    ):
        yield launches


def launches_of(case: Case, capability: tuple[int, int]) -> list[Launch]:
    with recorded(capability) as launches:
        case.run()
    return launches


EVERYTHING = {"causal": True, "window": 500, "softcap": 30.0, "gate": True, "sinks": True, "training": True}

CASES: list[Case] = [
    *(Attention(dim, causal=True, training=True, headline=True) for dim in (64, 128)),
    Projections(128, bias=True, gate=True, training=True, headline=True),
    # Every row of the tables, with nothing else and with everything else.
    *(
        Attention(dim, dtype, tokens=tokens, keys=4096, **options)
        for dtype in (HALF, SINGLE)
        for dim in (64, 128, 256)
        for tokens, options in (
            (1, {}),
            (1, {"softcap": 30.0, "attn_mask": SINGLE, "gate": True, "sinks": True}),
            (4096, {"training": True}),
            (4096, {"kv_heads": 4, **EVERYTHING}),
            (4096, {"kv_heads": 4, **EVERYTHING, "attn_mask": SINGLE}),
        )
    ),
    *(Attention(dim, SINGLE, tf32=True, kv_heads=4, **EVERYTHING) for dim in (64, 128, 256)),
    *(
        Projections(dim, dtype, tf32, tokens=tokens, per_request=per_request, bias=extras, gate=extras, training=True)
        for dtype, tf32 in ((HALF, False), (SINGLE, True), (SINGLE, False))
        for dim, tokens in ((64, 16), (64, 64), (64, 512), (32, 4096), (64, 4096), (128, 4096))
        for per_request, extras in ((True, True), (False, False))
    ),
    # One option at a time, where heads are as they mostly are.
    *(
        Attention(dim, training=True, **option)
        for dim in (64, 128)
        for option in (
            {"window": 500},
            {"softcap": 30.0},
            {"attn_mask": torch.bool},
            {"attn_mask": HALF},
            {"gate": True},
            {"sinks": True},
            {"kv_heads": 2},
            {"per_request": False},
            {"dtype": torch.float16},
        )
    ),
    Projections(64, kv_heads=4, training=True),
    # Enough of them that the largest tiles leave no multiprocessor idle.
    Projections(128, heads=32, kv_heads=32, per_request=False, training=True),
    Projections(64, torch.float16, training=True),
    # Sizes that fill no tile and align with nothing.
    Attention(80, value_dim=24, tokens=111, keys=113, causal=True, gate=True, training=True),
    Attention(16, tokens=111, training=True),
    Attention(200, kv_heads=8, tokens=111, causal=True, training=True),
    *(
        Projections(80, tokens=tokens, width=width, bias=True, gate=True, training=True)
        for tokens, width in ((111, 1000), (4096, 1280), (4096, 1000))
    ),
    Projections(24, tokens=3, width=360, per_request=False, training=True),
    *(Projections(dim, width=1280, bias=True, gate=True, training=True) for dim in (24, 40)),
]

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

HALF, SINGLE = torch.bfloat16, torch.float32


def meta(*sizes: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


class Attention(NamedTuple):
    """One attention call; the strides are those of projections' outputs, [B, T, H, D]."""

    head_dim: int
    dtype: torch.dtype = HALF
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
    listed: bool = True  # per-request head masks; else every head runs
    training: bool = False
    tf32: bool = False
    headline: bool = False

    @property
    def name(self) -> str:
        changed = [
            f"{field}={getattr(self, field)}"
            for field in self._fields[1:-1]
            if self[self._fields.index(field)] != self._field_defaults[field]
        ]
        return " ".join([f"attention D={self.head_dim}", *changed]).replace("torch.", "")

    def run(self) -> None:
        batch, keys, value_dim = 2, self.keys or self.tokens, self.value_dim or self.head_dim

        def rows(length: int, heads: int, columns: int) -> Tensor:
            """[B, H, L, C], strided as what projections return."""
            return meta(batch, length, heads, columns, dtype=self.dtype).transpose(1, 2)

        query, grad = rows(self.tokens, self.heads, self.head_dim), rows(self.tokens, self.heads, value_dim)
        key, value = rows(keys, self.kv_heads, self.head_dim), rows(keys, self.kv_heads, value_dim)
        inputs = (
            query,
            key,
            value,
            meta(batch, self.heads, dtype=torch.bool) if self.listed else None,
            None,
            meta(batch, self.heads, dtype=torch.float32) if self.gate else None,
            meta(batch, 1, self.tokens, keys, dtype=self.attn_mask) if self.attn_mask else None,
            meta(self.heads, dtype=torch.float32) if self.sinks else None,
            -1 if self.window is None else self.window - 1,
            0 if self.causal else -1,
            self.head_dim**-0.5,
            self.softcap,
            self.tf32,
        )
        output, ungated, logsumexp = attention_forward(*inputs, training=self.training)
        if self.training:
            wanted = [True, True, True, self.gate, self.attn_mask == torch.float32, self.sinks]
            attention_backward(grad, *inputs, output if ungated is None else ungated, logsumexp, wanted)


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


def launches_of(case: Attention, capability: tuple[int, int]) -> list[Launch]:
    with recorded(capability) as launches:
        case.run()
    return launches


CASES = [
    Attention(dim, headline=True, causal=causal, training=training)
    for dim in (64, 128)
    for causal, training in ((False, False), (True, True))
]

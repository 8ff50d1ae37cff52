"""Checks of the arguments of `attention`: each raises an error naming the argument, what was wanted and what came."""

from __future__ import annotations

import torch

from ..._attention_arguments import check_heads, check_query_and_key
from ...errors import BackendUnavailableError, UnsupportedError, describe, invalid

BACKENDS = ("auto", "reference", "sdpa", "cpu", "triton")
NOT_BUILT = ("cuda",)
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_HEAD_DIM = 256  # the largest


def check_backend(backend: object, softcap: float | None, sinks: torch.Tensor | None) -> None:
    """A known backend that covers the arguments."""
    wanted = f"one of {', '.join(map(repr, BACKENDS))}"
    if backend in NOT_BUILT:
        raise BackendUnavailableError(f"backend: wanted {wanted}, got {backend!r}, which has no attention kernel yet")
    if backend not in BACKENDS:
        raise invalid("backend", wanted, backend)
    for name, argument in (("softcap", softcap), ("sinks", sinks)):
        if backend == "sdpa" and argument is not None:
            got = describe(argument)
            raise UnsupportedError(
                f"{name}: wanted None with backend 'sdpa' ('reference', 'cpu' and 'triton' take it), got {got}"
            )


def beyond_triton(query: torch.Tensor, value: torch.Tensor) -> str | None:
    """What of the inputs the Triton kernels do not take, as a message; None where they take them."""
    if query.dtype not in TRITON_DTYPES:
        return f"query: wanted float16, bfloat16 or float32 with backend 'triton', got {query.dtype}"
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[3] > TRITON_HEAD_DIM:
            wanted = f"a head dimension of at most {TRITON_HEAD_DIM} with backend 'triton'"
            return f"{name}: wanted {wanted}, got {tensor.shape[3]}"
    return None


def check_inputs(query: object, key: object, value: object) -> None:
    """query [B, H, T, D], key [B, H_kv, S, D], value [B, H_kv, S, Dv] of one floating dtype on one device."""
    check_query_and_key(query, key)
    check_heads("value", "[B, H_kv, S, Dv]", value, query)
    if value.shape[:3] != key.shape[:3]:
        batch, kv_heads, positions = key.shape[:3]
        raise invalid("value", f"[{batch}, {kv_heads}, {positions}, Dv] to go with key {list(key.shape)}", value)

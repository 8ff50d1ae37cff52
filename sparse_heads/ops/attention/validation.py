"""Checks of the arguments of `attention`: each raises an error naming the argument, what was wanted and what came."""

from __future__ import annotations

import torch

from ..._attention_arguments import check_heads, check_query_and_key
from ...errors import BackendUnavailableError, UnsupportedError, describe, invalid

BACKENDS = ("auto", "reference", "sdpa", "cpu")
NOT_BUILT = ("triton", "cuda")


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
                f"{name}: wanted None with backend 'sdpa' ('reference' and 'cpu' take it), got {got}"
            )


def check_inputs(query: object, key: object, value: object) -> None:
    """query [B, H, T, D], key [B, H_kv, S, D], value [B, H_kv, S, Dv] of one floating dtype on one device."""
    check_query_and_key(query, key)
    check_heads("value", "[B, H_kv, S, Dv]", value, query)
    if value.shape[:3] != key.shape[:3]:
        batch, kv_heads, positions = key.shape[:3]
        raise invalid("value", f"[{batch}, {kv_heads}, {positions}, Dv] to go with key {list(key.shape)}", value)

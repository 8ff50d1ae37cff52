"""Checks of the arguments of `attention`: each raises an error naming the argument, what was wanted and what came."""

from __future__ import annotations

import math

import torch

from ..._attention_arguments import DTYPES, check_head_mask, check_heads, check_placed, check_query_and_key
from ...errors import BackendUnavailableError, UnsupportedError, describe, invalid, invalid_type

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


def check_head_arguments(query: torch.Tensor, head_mask: object, gate: object, sinks: object) -> None:
    """head_mask bool [H] or [B, H], gate float [H] or [B, H], sinks float [H]; each may be None.

    On a CPU gates must be finite, and sinks of heads that run finite or -inf.
    """
    batch, heads = query.shape[:2]
    shared, per_request = (heads,), (batch, heads)
    either = f"[H] = [{heads}] or [B, H] = [{batch}, {heads}]"
    check_head_mask(query, head_mask)
    if gate is not None:
        _check_floating("gate", gate)
        check_placed("gate", gate, query)
        if gate.shape not in (shared, per_request):
            raise invalid("gate", either, gate)
        # Elsewhere a look at the values would synchronise, or break the graph that is being compiled.
        if gate.device.type == "cpu" and not torch.compiler.is_compiling() and not gate.isfinite().all():
            raise invalid("gate", "finite values", f"{int((~gate.isfinite()).sum())} that are NaN or infinite")
    if sinks is not None:
        _check_floating("sinks", sinks)
        check_placed("sinks", sinks, query)
        if sinks.shape != shared:
            raise invalid("sinks", f"[H] = [{heads}]", sinks)
        if sinks.device.type == "cpu" and not torch.compiler.is_compiling():
            wrong = ~(sinks < math.inf)
            if head_mask is not None:
                wrong &= head_mask if head_mask.dim() == 1 else head_mask.any(dim=0)
            if wrong.any():
                raise invalid("sinks", "finite values or -inf (no sink)", f"{int(wrong.sum())} that are NaN or inf")


def _check_floating(name: str, tensor: object) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES:
        raise invalid_type(name, "a float16, bfloat16, float32 or float64 tensor", tensor)

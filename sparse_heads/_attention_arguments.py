"""Arguments that operators on attention share: the checks of those that make the scores, and what a query sees.

Each check raises an error naming the argument, what was wanted and what came.
"""

from __future__ import annotations

import contextlib
import math
import sys

import torch

from .errors import invalid, invalid_type

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_query_and_key(query: object, key: object) -> None:
    """query [B, H, T, D] and key [B, H_kv, S, D] of one floating dtype on one device."""
    check_heads("query", "[B, H, T, D]", query, query)
    check_heads("key", "[B, H_kv, S, D]", key, query)
    batch, heads, _, head_dim = query.shape
    kv_heads = key.shape[1]
    if head_dim == 0:
        raise invalid("query", "a head dimension of 1 or more", query)
    if (key.shape[0], key.shape[3]) != (batch, head_dim):
        raise invalid("key", f"[{batch}, H_kv, S, {head_dim}] to go with query {list(query.shape)}", key)
    if heads != kv_heads and (kv_heads == 0 or heads == 0 or heads % kv_heads):
        raise invalid("key", f"a number of heads that divides the {heads} of query", key)


def check_heads(name: str, wanted: str, tensor: object, query: torch.Tensor) -> None:
    """A floating tensor of four dimensions, of the dtype and on the device of query."""
    if not isinstance(tensor, torch.Tensor):
        raise invalid_type(name, f"a tensor {wanted}", tensor)
    if tensor.dtype not in DTYPES:
        raise invalid_type(name, "float16, bfloat16, float32 or float64", tensor)
    if tensor.dtype != query.dtype:
        raise invalid_type(name, f"the dtype of query, {query.dtype}", tensor)
    check_placed(name, tensor, query)
    if tensor.dim() != 4:
        raise invalid(name, f"a tensor {wanted}", tensor)


def check_head_mask(query: torch.Tensor, head_mask: object) -> None:
    """bool [H] or [B, H], or None."""
    if head_mask is None:
        return
    batch, heads = query.shape[:2]
    wanted = f"[H] = [{heads}] or [B, H] = [{batch}, {heads}]"
    if not isinstance(head_mask, torch.Tensor) or head_mask.dtype != torch.bool:
        raise invalid_type("head_mask", f"a bool tensor {wanted}", head_mask)
    check_placed("head_mask", head_mask, query)
    if head_mask.dim() > 2:
        raise invalid("head_mask", f"{wanted} (masks per token are not supported)", head_mask)
    if head_mask.shape not in ((heads,), (batch, heads)):
        raise invalid("head_mask", wanted, head_mask)


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


def check_score_arguments(
    query: torch.Tensor, keys: int, attn_mask: object, is_causal: object, scale: object, softcap: object, window: object
) -> None:
    """What changes the scores: attn_mask, is_causal, scale, softcap and window."""
    if attn_mask is not None:
        full = (*query.shape[:3], keys)
        if not isinstance(attn_mask, torch.Tensor):
            raise invalid_type("attn_mask", "a bool or floating tensor", attn_mask)
        if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
            raise invalid_type("attn_mask", f"bool, float32 or the dtype of query, {query.dtype}", attn_mask)
        check_placed("attn_mask", attn_mask, query)
        sizes = zip(reversed(attn_mask.shape), reversed(full), strict=False)
        if attn_mask.dim() > 4 or any(size not in (1, whole) for size, whole in sizes):
            raise invalid("attn_mask", f"a shape that broadcasts to [B, H, T, S] = {list(full)}", attn_mask)
    if not isinstance(is_causal, bool):
        raise invalid_type("is_causal", "True or False", is_causal)
    for name, number in (("scale", scale), ("softcap", softcap)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, (int, float))):
            raise invalid_type(name, "a number or None", number)
    arithmetic = torch.finfo(torch.promote_types(query.dtype, torch.float32))
    if scale is not None and not abs(scale) <= arithmetic.max:
        raise invalid("scale", f"a number that is finite in {arithmetic.dtype}", scale)
    if softcap is not None and not arithmetic.smallest_normal <= softcap <= arithmetic.max:
        raise invalid("softcap", f"a number that is finite and above 0 in {arithmetic.dtype}", softcap)
    _check_window(window)


def _check_window(window: object) -> None:
    wanted = "an int of 1 or more (or -1), (left, right) of ints of 0 or more (or -1), or None"
    if window is None:
        return
    sizes = window if isinstance(window, tuple) else (window,)
    if any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
        raise invalid_type("window", wanted, window)
    if min(sizes, default=-1) < -1 or window == 0 or (isinstance(window, tuple) and len(window) != 2):
        raise invalid("window", wanted, window)


def check_placed(name: str, tensor: torch.Tensor, query: torch.Tensor) -> None:
    """On the device of query."""
    if tensor.device != query.device:
        raise invalid(name, f"the device of query, {query.device}", tensor)


def visible_span(is_causal: bool, window: int | tuple[int, int] | None) -> tuple[int, int]:
    """How many keys before and after its own position a query sees, -1 = unlimited, from the two public arguments.

    Numbers that fit no tensor's size become the largest that does.
    """
    if window is None or window == -1:
        left, right = -1, -1
    elif isinstance(window, int):
        left, right = window - 1, 0
    else:
        left, right = window
    left, right = min(left, sys.maxsize), min(right, sys.maxsize)
    return (left, 0) if is_causal else (left, right)


def span_mask(
    queries: int, keys: int, span: tuple[int, int], device: torch.device, first: int = 0, last: int | None = None
) -> torch.Tensor | None:
    """bool [T, S], True = visible, for queries that are the last T of the S positions; None where nothing is hidden.

    Of its rows those from `first` to `last`.
    """
    left, right = span
    if (left < 0 or left >= keys - 1) and (right < 0 or right >= queries - 1):
        return None
    own = torch.arange(first, queries if last is None else last, device=device)[:, None] + (keys - queries)
    offset = torch.arange(keys, device=device) - own
    visible = torch.ones_like(offset, dtype=torch.bool)
    if left >= 0:
        visible &= offset >= -left
    if right >= 0:
        visible &= offset <= right
    return visible


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """The inputs' dtype is the caller's choice: autocast has already made it where the projections ran."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()

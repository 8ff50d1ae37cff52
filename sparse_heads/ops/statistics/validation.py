"""Checks of the arguments of `attention_statistics` that no other operator has."""

from __future__ import annotations

import torch

from ..._attention_arguments import check_head_mask, check_placed, check_query_and_key, check_score_arguments
from ...errors import BackendUnavailableError, invalid, invalid_type

BACKENDS = ("auto", "reference", "cpu")
NOT_BUILT = ("triton", "cuda")


def check_backend(backend: object) -> None:
    """A known backend."""
    wanted = f"one of {', '.join(map(repr, BACKENDS))}"
    if backend in NOT_BUILT:
        raise BackendUnavailableError(f"backend: wanted {wanted}, got {backend!r}, which has no statistics kernel yet")
    if backend not in BACKENDS:
        raise invalid("backend", wanted, backend)


def check_arguments(
    query: object,
    key: object,
    head_mask: object,
    attn_mask: object,
    is_causal: object,
    scale: object,
    softcap: object,
    window: object,
    query_mask: object,
) -> None:
    """What `attention_statistics` and `head_similarity` both take."""
    check_query_and_key(query, key)
    check_head_mask(query, head_mask)
    check_score_arguments(query, key.shape[2], attn_mask, is_causal, scale, softcap, window)
    _check_query_mask(query, query_mask)


def _check_query_mask(query: torch.Tensor, query_mask: object) -> None:
    """bool [B, T], or None."""
    if query_mask is None:
        return
    wanted = f"[B, T] = [{query.shape[0]}, {query.shape[2]}]"
    if not isinstance(query_mask, torch.Tensor) or query_mask.dtype != torch.bool:
        raise invalid_type("query_mask", f"a bool tensor {wanted}", query_mask)
    check_placed("query_mask", query_mask, query)
    if query_mask.shape != (query.shape[0], query.shape[2]):
        raise invalid("query_mask", wanted, query_mask)


def check_key_groups(query: torch.Tensor, keys: int, key_groups: object, num_groups: object) -> None:
    """key_groups int [B, S], num_groups an int of 0 or more; each may be None. On a CPU groups are below num_groups."""
    if num_groups is not None:
        if isinstance(num_groups, bool) or not isinstance(num_groups, int):
            raise invalid_type("num_groups", "an int of 0 or more, or None", num_groups)
        if num_groups < 0 or key_groups is None:
            wanted = "None without key_groups" if key_groups is None else "an int of 0 or more, or None"
            raise invalid("num_groups", wanted, num_groups)
    if key_groups is None:
        return
    wanted = f"[B, S] = [{query.shape[0]}, {keys}]"
    if not isinstance(key_groups, torch.Tensor) or key_groups.dtype not in (torch.int32, torch.int64):
        raise invalid_type("key_groups", f"an int32 or int64 tensor {wanted}", key_groups)
    check_placed("key_groups", key_groups, query)
    if key_groups.shape != (query.shape[0], keys):
        raise invalid("key_groups", wanted, key_groups)
    # Elsewhere a look at the values would synchronise, or break the graph that is being compiled.
    if num_groups is not None and key_groups.device.type == "cpu" and not torch.compiler.is_compiling():
        if (key_groups >= num_groups).any():
            raise invalid("key_groups", f"groups below num_groups, {num_groups}", f"group {int(key_groups.max())}")

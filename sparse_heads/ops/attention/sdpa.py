"""Attention on the kept heads only, by torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

import contextlib
import math

import torch
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..._attention_arguments import span_mask
from .dense import ranked_kernels


def attention_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_mask: torch.Tensor | None,
    *,
    gate: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    span: tuple[int, int],
    scale: float | None,
) -> torch.Tensor:
    """`attention` on checked arguments, without softcap and sinks; `span` is `visible_span(is_causal, window)`.

    A mask [H] leaves [B, kept, T, D]; under a mask [B, H] every kept (request, head) pair becomes a request of one
    head. The count of either shapes what SDPA gets, so a head mask on a GPU synchronises with the host once, and SDPA's
    CPU kernel rounds a pair differently beside other pairs.
    """
    batch, heads, queries, _ = query.shape
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    shared = head_mask is None or head_mask.dim() == 1
    kept = None if head_mask is None else head_mask.nonzero(as_tuple=True)
    if kept is None or (shared and len(kept[0]) == heads):
        return _apply_gate(_attend(query, key, value, attn_mask, span, scale), gate)

    request, head = (slice(None), *kept) if shared else kept
    group = heads // key.shape[1] if heads else 1
    query = _take_heads(query, request, head, 1)
    key, value = (_take_heads(tensor, request, head, group) for tensor in (key, value))
    if gate is not None:
        gate = gate.expand(batch, heads)[request, head]
    if shared:
        if attn_mask is not None and attn_mask.shape[1] != 1:
            attn_mask = attn_mask[:, head]
        output = _apply_gate(_attend(query, key, value, attn_mask, span, scale), gate)
    else:
        if attn_mask is not None and attn_mask.shape[:2] != (1, 1):
            attn_mask = attn_mask[request if attn_mask.shape[0] != 1 else 0, head if attn_mask.shape[1] != 1 else 0]
            attn_mask = attn_mask[:, None]
        output = _attend(query[:, None], key[:, None], value[:, None], attn_mask, span, scale)
        output = _apply_gate(output[:, 0], gate)
    full = output.new_zeros(batch, heads, queries, value.shape[-1])
    full[request, head] = output
    return full


def _take_heads(tensor: torch.Tensor, request: slice | torch.Tensor, head: torch.Tensor, group: int) -> torch.Tensor:
    """What the query heads `head` read of a tensor [B, H / group, L, D]: [B, kept, L, D], or [pairs, L, D].

    Grouped heads index a view [B, H_kv, group, L, D], which takes every position at most once: a repeated index would
    leave the order of the backward's sum to the threads.
    """
    if group == 1 and isinstance(request, slice):
        return tensor.index_select(1, head)
    by_query_head = tensor[:, :, None].expand(-1, -1, group, -1, -1)
    return by_query_head[request, head // group, head % group]


def _apply_gate(output: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """Multiply heads [..., T, Dv] by a gate that broadcasts to [...], and sum its gradient, in float32 or wider."""
    if gate is None:
        return output
    gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
    return (output * gate[..., None, None]).to(output.dtype)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    span: tuple[int, int],
    scale: float | None,
) -> torch.Tensor:
    """SDPA with every mask merged into one, and zeros for queries that see no key."""
    queries, keys = query.shape[2], key.shape[2]
    enable_gqa = query.shape[1] != key.shape[1]
    if attn_mask is None and span == (-1, 0) and queries == keys:
        with _fastest_kernel(query, key, True):
            return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is None and span == (-1, 0) and 1 < queries < keys and _on_gpu(query):
        return _attend_last_queries(query, key, value, scale)
    visible = span_mask(queries, keys, span, query.device)
    if attn_mask is None and visible is None:
        with _fastest_kernel(query, key, False):
            return scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=enable_gqa)

    # A query that sees no key gets an open row, then zeros: what SDPA itself does with it differs by kernel.
    if attn_mask is None or attn_mask.dtype == torch.bool:
        mask = visible if attn_mask is None else attn_mask if visible is None else attn_mask & visible
        sees_a_key = mask.any(dim=-1, keepdim=True)
        mask = mask | ~sees_a_key
    else:
        mask = attn_mask if visible is None else torch.where(visible, attn_mask, -math.inf)
        sees_a_key = (mask != -math.inf).any(dim=-1, keepdim=True)
        mask = torch.where(sees_a_key, mask, 0.0)
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
    if mask.requires_grad and (query.numel() == 0 or keys == 0):
        output = output + mask[..., :0].sum()  # SDPA leaves the mask of an empty problem out of the graph
    return torch.where(sees_a_key, output, 0.0)


def _on_gpu(query: torch.Tensor) -> bool:
    """Whether there is anything for the kernels of a GPU to do."""
    return query.device.type == "cuda" and 0 not in query.shape


def _fastest_kernel(query: torch.Tensor, key: torch.Tensor, is_causal: bool) -> contextlib.AbstractContextManager:
    """PyTorch's kernels in the order measured on this GPU, where there is one and it was measured."""
    if not _on_gpu(query) or torch.compiler.is_compiling() or 0 in key.shape:
        return contextlib.nullcontext()
    training = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    ranked = ranked_kernels(torch.cuda.get_device_name(query.device), query, key, is_causal, training)
    return contextlib.nullcontext() if ranked is None else sdpa_kernel(ranked, set_priority=True)


def _attend_last_queries(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Causal attention of the last T of S positions, 1 < T < S, without a mask in memory where a kernel can.

    PyTorch's bias for it takes as many heads of keys as of queries.
    """
    from torch.nn.attention.bias import causal_lower_right  # which loads torch's compiler

    group = query.shape[1] // key.shape[1]
    key, value = (tensor if group == 1 else tensor.repeat_interleave(group, 1) for tensor in (key, value))
    bias = causal_lower_right(query.shape[2], key.shape[2])
    return scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)

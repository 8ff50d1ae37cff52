"""The oracle: attention with masked heads in plain PyTorch, on any device, differentiable any number of times."""

from __future__ import annotations

import math

import torch

from ..._attention_arguments import span_mask


def attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_mask: torch.Tensor | None,
    *,
    gate: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    span: tuple[int, int],
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`attention` on checked arguments; `span` is `visible_span(is_causal, window)`.

    float16 and bfloat16 inputs are computed in float32; the result has the inputs' dtype.
    """
    input_dtype = query.dtype
    dtype = torch.promote_types(input_dtype, torch.float32)
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    group = heads // key.shape[1] if heads else 1

    query = query.to(dtype)
    key = key.to(dtype).repeat_interleave(group, dim=1)
    value = value.to(dtype).repeat_interleave(group, dim=1)
    gate = None if gate is None else gate.to(dtype).expand(batch, heads)[..., None, None]
    sinks = None if sinks is None else sinks.to(dtype).expand(batch, heads)[..., None, None]
    if head_mask is not None:
        # Filled rather than multiplied by zero: NaN in a masked head must reach neither outputs nor gradients.
        masked = ~head_mask.expand(batch, heads)[..., None, None]
        query, key, value = (tensor.masked_fill(masked, 0) for tensor in (query, key, value))
        gate = None if gate is None else gate.masked_fill(masked, 0)
        sinks = None if sinks is None else sinks.masked_fill(masked, 0)

    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(head_dim) if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.to(dtype)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    visible = span_mask(queries, keys, span, query.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    if head_mask is not None:
        scores = scores.masked_fill(masked, -math.inf)

    # A row without a visible key would be 0 / 0: its scores are replaced before the softmax, its output after it.
    sees_a_key = (scores != -math.inf).any(dim=-1, keepdim=True)
    scores = torch.where(sees_a_key, scores, 0.0)
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(batch, heads, queries, 1)], dim=-1)
    probabilities = scores.softmax(dim=-1)[..., :keys]
    output = torch.where(sees_a_key, probabilities @ value, 0.0)
    if gate is not None:
        output = output * gate
    return output.to(input_dtype)

"""(request, key/value head) pairs as sequences of a batch of variable lengths, of length zero when off."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Causal attention [B, H, T, D]; zeros where the mask [B, H] is off. Nothing waits for the device.

    The pairs that are on are copied to the front, at a capacity of all pairs, and the result is copied back.
    """
    from torch.nn.attention.varlen import varlen_attn

    batch, kv_heads, tokens, head_dim = key.shape
    group = query.shape[1] // kv_heads
    pairs = batch * kv_heads
    active = mask.view(batch, kv_heads, group).any(-1).flatten()
    order = active.to(torch.int8).argsort(descending=True, stable=True)
    # Rows past the last sequence are not written.
    off = ~active.index_select(0, order)[:, None, None, None]
    lengths = tokens * active.index_select(0, order)
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)

    def rows(tensor: Tensor, heads: int) -> Tensor:
        by_pair = tensor.transpose(1, 2).view(batch, tokens, kv_heads, heads, head_dim).transpose(1, 2)
        packed = by_pair.flatten(0, 1).index_select(0, order)
        if packed.requires_grad:
            packed = packed.masked_fill(off, 0)  # nor are their gradients
        return packed.flatten(0, 1)

    parameters = inspect.signature(varlen_attn).parameters
    options = {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}
    if "enable_gqa" in parameters and group > 1:
        options["enable_gqa"] = True
    packed = varlen_attn(rows(query, group), rows(key, 1), rows(value, 1), ends, ends, tokens, tokens, **options)
    packed = packed.view(pairs, tokens, group, head_dim).masked_fill(off, 0)
    output = torch.empty_like(packed).index_copy(0, order, packed)
    output = output.view(batch, kv_heads, tokens, group, head_dim).transpose(2, 3).flatten(1, 2)
    return output * mask[..., None, None]

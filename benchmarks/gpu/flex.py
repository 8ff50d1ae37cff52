"""FlexAttention, compiled: the causal blocks times the head mask, and a mask of its own for every call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

COUNTS = ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks")
INDICES = ("kv_indices", "full_kv_indices", "q_indices", "full_q_indices")


@cache
def compiled(name: str, on_host: bool) -> Callable[..., object]:
    """A function of `torch.nn.attention.flex_attention`, compiled for each shape by itself.

    As it is on a host, where compiling takes a minute: there it heeds the mask function only, not the block counts.
    """
    from torch.nn.attention import flex_attention

    function = getattr(flex_attention, name)
    if on_host:
        flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
        return function
    torch._dynamo.config.recompile_limit = 1000
    return torch.compile(function, dynamic=False)


def causal(request: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A query sees itself and what is before it."""
    return query >= key


@cache
def causal_blocks(tokens: int, device: torch.device) -> object:
    """The causal mask, for all requests and heads."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(causal, None, None, tokens, tokens, device)


def blocks_of_heads(mask: Tensor, tokens: int) -> object:
    """The causal blocks with none left in heads that are off in the mask [B, H]."""
    blocks = copy.copy(causal_blocks(tokens, mask.device))
    for name in COUNTS:
        counts = getattr(blocks, name)
        if counts is not None:
            setattr(blocks, name, counts * mask[:, :, None].to(counts.dtype))
    for name in INDICES:
        indices = getattr(blocks, name)
        if indices is not None:
            setattr(blocks, name, indices.expand(*mask.shape, *indices.shape[2:]))
    return blocks


def causal_in_heads(mask: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """As `causal`, and nothing in heads that are off in the mask [B, H]."""

    def visible(request: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & mask[request, head]

    return visible


def own_blocks(visible: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], mask: Tensor, tokens: int) -> object:
    """What `create_block_mask` makes of `causal_in_heads(mask)`."""
    return compiled("create_block_mask", mask.device.type == "cpu")(visible, *mask.shape, tokens, tokens, mask.device)


def attend(query: Tensor, key: Tensor, value: Tensor, blocks: object) -> Tensor:
    """Attention [B, H, T, D] over the blocks."""
    grouped = query.shape[1] != key.shape[1]
    flex_attention = compiled("flex_attention", query.device.type == "cpu")
    return flex_attention(query, key, value, block_mask=blocks, enable_gqa=grouped)

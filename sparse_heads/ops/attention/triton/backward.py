"""Backward: one pass over the rows of the output, one over keys, one over queries; those that are wanted."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...._triton import capability
from ...._triton.work_list import attention_work_list
from .arguments import group_size
from .backward_keys import keys_launch
from .backward_prepare import prepare_launch
from .backward_queries import queries_launch
from .configs import Config, choose


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_mask: Tensor | None,
    kv_heads: Tensor | None,
    gate: Tensor | None,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    tf32: bool,
    output_ungated: Tensor,
    logsumexp: Tensor,
    wanted: list[bool],
) -> list[Tensor]:
    """The gradients wanted, in the order query, key, value, gate, attn_mask, sinks.

    gate and sinks [B, H] and attn_mask [B, H, T, S] are float32.
    """
    if not any(wanted):
        return []
    want_query, want_key, want_value, want_gate, want_mask, want_sinks = wanted
    batch, heads, tokens, head_dim = query.shape
    keys, value_dim = value.shape[2:]
    group = group_size(query, key, kv_heads)

    def config(kernel: str, rows: int, registers: str = "") -> Config:
        kernel += registers and f", {registers} registers"
        return choose(kernel, head_dim, value_dim, query.element_size(), rows, capability(query.device))

    capped, masked = softcap != 0, attn_mask is not None
    # Rows of another alignment take an address for every element.
    more = "more" if capped or masked or head_dim % 16 or value_dim % 16 else ""
    gates_in_tiles = gate is not None and group > 1
    prepare = config("backward prepare", tokens)
    over_keys = config("backward keys", tokens, "most" if capped and masked else more or gates_in_tiles * "more")
    over_queries = config("backward queries", tokens * group, more)

    def gradient_like(tensor: Tensor, zeros: bool) -> Tensor:
        sizes = [tensor.shape[dimension] for dimension in (0, 2, 1, 3)]
        return (tensor.new_zeros if zeros else tensor.new_empty)(sizes).transpose(1, 2)

    def float32(*sizes: int) -> Tensor:
        return query.new_empty(sizes, dtype=torch.float32)

    some_off = head_mask is not None or kv_heads is not None
    query_gradient = gradient_like(query, zeros=head_mask is not None) if want_query else None
    key_gradient = gradient_like(key, zeros=some_off) if want_key else None
    value_gradient = gradient_like(value, zeros=some_off) if want_value else None
    mask_gradient = query.new_zeros((batch, heads, tokens, keys), dtype=torch.float32) if want_mask else None

    block = max(prepare.block_m, over_keys.block_m)
    statistics = float32(2, batch, heads, triton.cdiv(tokens, block) * block)
    tiles = statistics.shape[3] // prepare.block_m
    gate_sums, sink_sums = (float32(batch, heads, tiles) if want else None for want in (want_gate, want_sinks))
    prepare_launch(
        grad, output_ungated, logsumexp, head_mask, gate, sinks, statistics, gate_sums, sink_sums, prepare
    ).run()

    work = None
    # Where heads share keys a list takes fewer registers than counting on.
    if some_off or group > 1:
        work = attention_work_list(head_mask, kv_heads, batch, heads, key.shape[1], query.device)
    inputs = (query, key, value, attn_mask, grad, statistics, gate)
    options = {"span": (left, right), "scale": scale, "softcap": softcap, "group": group, "tf32": tf32}
    if want_key or want_value:
        keys_launch(*inputs, key_gradient, value_gradient, work, over_keys, **options).run()
    if want_query or want_mask:
        queries_launch(*inputs, query_gradient, mask_gradient, work, over_queries, **options).run()

    gate_gradient, sink_gradient = (None if partial is None else partial.sum(-1) for partial in (gate_sums, sink_sums))
    gradients = (query_gradient, key_gradient, value_gradient, gate_gradient, mask_gradient, sink_gradient)
    return [gradient for gradient in gradients if gradient is not None]

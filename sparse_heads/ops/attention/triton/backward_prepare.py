"""The pass before the others: what they need of every row, and from it the gradients of gates and sinks."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import Launch
from .configs import Config, padded
from .primitives import LOG2_E, load_rows


@triton.jit
def _attention_backward_prepare(
    grad, grad_strides, output, output_strides, logsumexp, head_mask, mask_strides, gate, gate_strides,
    sinks, sink_stride, statistics, gate_sums, sink_sums, num_heads, tokens, tiles,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """BLOCK_M tokens of one head: the rows' statistics, and what they add to the gradients of its gate and its sink."""
    program = tl.program_id(0).to(tl.int64)
    row_of_heads = program // tiles
    request = row_of_heads // num_heads
    head = row_of_heads % num_heads
    runs = head_mask is None or tl.load(head_mask + request * mask_strides[0] + head * mask_strides[1])
    if not runs:
        if gate_sums is not None:
            tl.store(gate_sums + program, 0.0)
        if sink_sums is not None:
            tl.store(sink_sums + program, 0.0)
        return
    token = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = token < tokens
    log_sum = tl.load(logsumexp + row_of_heads * tokens + token, mask=exists, other=float("inf"))
    grad += request * grad_strides[0] + head * grad_strides[1]
    output += request * output_strides[0] + head * output_strides[1]
    grad_rows = load_rows(grad + token * grad_strides[2], grad_strides[3], exists, VALUE_DIM, BLOCK_V)
    output_rows = load_rows(output + token * output_strides[2], output_strides[3], exists, VALUE_DIM, BLOCK_V)
    # The output of a query that sees no key is a constant, whatever its gradient holds.
    sums = tl.where(log_sum == float("inf"), 0.0, tl.sum(grad_rows.to(tl.float32) * output_rows.to(tl.float32), 1))
    statistics += program * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(statistics, log_sum * LOG2_E)
    tl.store(statistics + tl.num_programs(0).to(tl.int64) * BLOCK_M, sums)
    if gate_sums is not None:
        tl.store(gate_sums + program, tl.sum(sums, 0))
    if sink_sums is not None:
        sink_sum = -tl.sum(tl.exp(tl.load(sinks + head * sink_stride) - log_sum) * sums, 0)
        if gate is not None:
            sink_sum *= tl.load(gate + request * gate_strides[0] + head * gate_strides[1])
        tl.store(sink_sums + program, sink_sum)


def prepare_launch(
    grad: Tensor,
    output_ungated: Tensor,
    logsumexp: Tensor,
    head_mask: Tensor | None,
    gate: Tensor | None,
    sinks: Tensor | None,
    statistics: Tensor,
    gate_sums: Tensor | None,
    sink_sums: Tensor | None,
    config: Config,
) -> Launch:
    """Fills statistics [2, B, H, tokens of whole tiles] of the heads that run: log2(e) * logsumexp, and the softmax
    delta over the gate, rowsum(grad * output_ungated); past the last token infinity and 0. And of all heads, where
    wanted (not None), gate_sums and sink_sums [B, H, tiles]: what each tile of tokens adds to these gradients.
    """
    batch, heads, tokens, value_dim = grad.shape
    head_mask, gate = (None if tensor is None else tensor.expand(batch, heads) for tensor in (head_mask, gate))
    tiles = statistics.shape[3] // config.block_m
    arguments = {
        "grad": grad,
        "grad_strides": grad.stride(),
        "output": output_ungated,
        "output_strides": output_ungated.stride(),
        "logsumexp": logsumexp,
        "head_mask": head_mask,
        "mask_strides": None if head_mask is None else head_mask.stride(),
        "gate": gate,
        "gate_strides": None if gate is None else gate.stride(),
        "sinks": sinks,
        "sink_stride": None if sinks is None else sinks.stride(0),
        "statistics": statistics,
        "gate_sums": gate_sums,
        "sink_sums": sink_sums,
        "num_heads": heads,
        "tokens": tokens,
        "tiles": tiles,
        "VALUE_DIM": value_dim,
        "BLOCK_V": padded(value_dim),
        "BLOCK_M": config.block_m,
    }
    return Launch(_attention_backward_prepare, (batch * heads * tiles,), arguments, config.options)

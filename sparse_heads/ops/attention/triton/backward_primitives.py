"""Device functions of the backward kernels: the blocks that need masks and those that need none, a tile's gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import log2_scores, masked, softcap_slope


@triton.jit
def block_count(low, full_low, full_high, high, BLOCK: tl.constexpr, BOUNDARY: tl.constexpr):
    """How many blocks need masks (BOUNDARY: those before full_low and those from full_high on), or need none."""
    if BOUNDARY:
        return (full_low - low) // BLOCK + tl.cdiv(tl.maximum(high - full_high, 0), BLOCK)
    else:
        return (full_high - full_low) // BLOCK


@triton.jit
def block_start(index, low, full_low, full_high, BLOCK: tl.constexpr, BOUNDARY: tl.constexpr):
    """First element of the index-th of the blocks that `block_count` counts."""
    if BOUNDARY:
        first = low + index * BLOCK
        return tl.where(first < full_low, first, first + full_high - full_low)
    else:
        return full_low + index * BLOCK


@triton.jit
def gated_probabilities(
    products, log2_sum, gate, scale, softcap, attn_mask, key_stride, position, key, keys, left, right,
    BOUNDARY: tl.constexpr,
):  # fmt: skip
    """Of a tile of products of queries and keys, of either orientation; gate: None = 1.

    What belongs to queries (log2_sum, gate, attn_mask, position) and to keys (key) is shaped to broadcast.
    """
    scores = log2_scores(products, scale, softcap)
    scores = masked(scores, attn_mask, key_stride, position, key, keys, left, right, BOUNDARY)
    probabilities = tl.exp2(scores - log2_sum)
    if gate is not None:
        probabilities *= gate
    return probabilities


@triton.jit
def score_gradients(probabilities, value_products, log2_sum, delta, EMPTY_ROWS: tl.constexpr):
    """Of a tile; the scores are those after softcap, value_products those of the output's gradient and the values.

    EMPTY_ROWS: some query may see no key, and meet values that are not finite.
    """
    gradients = probabilities * (value_products - delta)
    if EMPTY_ROWS:
        gradients = tl.where(log2_sum == float("inf"), 0.0, gradients)
    return gradients


@triton.jit
def product_gradients(gradients, products, log2_sum, scale, softcap, EMPTY_ROWS: tl.constexpr):
    """Of a tile, divided by scale, from those of the scores."""
    if softcap is not None:
        gradients *= softcap_slope(products, scale, softcap)
        if EMPTY_ROWS:
            gradients = tl.where(log2_sum == float("inf"), 0.0, gradients)
    return gradients

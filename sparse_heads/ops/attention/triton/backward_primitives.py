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
def tile_gradients(
    products, value_products, log2_sum, delta, gate, scale, softcap,
    attn_mask, key_stride, position, key, keys, left, right,
    BOUNDARY: tl.constexpr, EMPTY_ROWS: tl.constexpr,
):  # fmt: skip
    """(probabilities, gradients of the scores, gradients of the products / scale) of a tile of either orientation.

    products: of queries and keys; value_products: of the output's gradient and values. The scores are those after
    softcap. gate multiplies the results, None = no gate. What belongs to queries (log2_sum, delta, attn_mask, position)
    and to keys is shaped to broadcast. EMPTY_ROWS: some query may see no key, and meet values that are not finite.
    """
    scores = log2_scores(products, scale, softcap)
    scores = masked(scores, attn_mask, key_stride, position, key, keys, left, right, BOUNDARY)
    probabilities = tl.exp2(scores - log2_sum)
    if gate is not None:
        probabilities *= gate
    score_gradients = probabilities * (value_products - delta)
    product_gradients = score_gradients
    if softcap is not None:
        product_gradients *= softcap_slope(products, scale, softcap)
    if EMPTY_ROWS:
        score_gradients = tl.where(log2_sum == float("inf"), 0.0, score_gradients)
        product_gradients = tl.where(log2_sum == float("inf"), 0.0, product_gradients)
    return probabilities, score_gradients, product_gradients

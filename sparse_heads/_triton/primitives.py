"""Device functions that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from . import interpreted

# Triton's interpreter multiplies the bit patterns of bfloat16, so there operands are widened first.
WIDEN = tl.constexpr(interpreted())


@triton.jit
def dot(left, right, accumulator, PRECISION: tl.constexpr):
    """accumulator + left @ right, accumulated in float32. PRECISION: "ieee" or "tf32", of float32 operands."""
    if WIDEN:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, accumulator, input_precision=PRECISION)

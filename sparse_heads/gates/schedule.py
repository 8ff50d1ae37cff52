"""What changes with the step: a temperature that cools, and a penalty that warms up."""

from __future__ import annotations


def geometric(step: int, steps: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at step `steps` by equal factors, and `end` from there on."""
    return end if step >= steps else start * (end / start) ** (step / steps)


def linear_warmup(step: int, start: int, steps: int) -> float:
    """0 before step `start`, then 1/steps, 2/steps, ... up to 1 (Shim et al. 2021)."""
    if step < start:
        return 0.0
    return 1.0 if step >= start + steps else (step - start + 1) / steps

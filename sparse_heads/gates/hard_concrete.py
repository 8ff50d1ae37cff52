"""The hard-concrete distribution (Louizos et al. 2018): a stretched and clamped binary concrete variable.

log_alpha, uniform: float [n]; temperature is the paper's beta; stretch is (gamma, zeta), around [0, 1] on both sides.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def stretched_concrete(log_alpha: Tensor, uniform: Tensor, temperature: float, stretch: tuple[float, float]) -> Tensor:
    """The variable before the clamp [n], in (gamma, zeta)."""
    return _stretch(torch.sigmoid((torch.logit(uniform) + log_alpha) / temperature), stretch)


def hard_concrete(log_alpha: Tensor, uniform: Tensor, temperature: float, stretch: tuple[float, float]) -> Tensor:
    """Sampled gates [n] in [0, 1]: exactly 0 or 1, with derivative 0, wherever the clamp holds."""
    return stretched_concrete(log_alpha, uniform, temperature, stretch).clamp(0.0, 1.0)


def open_probability(log_alpha: Tensor, temperature: float, stretch: tuple[float, float]) -> Tensor:
    """The probability [n] that a sampled gate is not 0."""
    low, high = stretch
    return torch.sigmoid(log_alpha - temperature * math.log(-low / high))


def settled_gate(log_alpha: Tensor, stretch: tuple[float, float]) -> Tensor:
    """The gates [n] of evaluation, without noise: clamp(stretched sigmoid(log_alpha))."""
    return _stretch(torch.sigmoid(log_alpha), stretch).clamp(0.0, 1.0)


def _stretch(concrete: Tensor, stretch: tuple[float, float]) -> Tensor:
    low, high = stretch
    return concrete * (high - low) + low

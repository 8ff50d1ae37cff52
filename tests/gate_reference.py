"""The papers' formulas in NumPy, float64: written from the text, sharing nothing with the package."""

from __future__ import annotations

import numpy as np

TINY = np.finfo(np.float64).tiny


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def soft_top_k(scores: np.ndarray, k: int, temperature: float) -> np.ndarray:
    """Li et al. 2021: k softmaxes, each lowering what it has picked."""
    remaining, total = scores.astype(np.float64), np.zeros(len(scores))
    for _ in range(k):
        powers = np.exp((remaining - remaining.max()) / temperature)
        probabilities = powers / powers.sum()
        total += probabilities
        remaining = remaining + np.log(np.maximum(1.0 - probabilities, TINY))
    return total


def gumbel(uniform: np.ndarray) -> np.ndarray:
    return -np.log(-np.log(uniform))


def stretched(log_alpha: np.ndarray, uniform: np.ndarray, beta: float, gamma: float, zeta: float) -> np.ndarray:
    """Louizos et al. 2018: the binary concrete variable, stretched to (gamma, zeta)."""
    return sigmoid((np.log(uniform) - np.log1p(-uniform) + log_alpha) / beta) * (zeta - gamma) + gamma


def hard_concrete(log_alpha: np.ndarray, uniform: np.ndarray, beta: float, gamma: float, zeta: float) -> np.ndarray:
    return np.minimum(1.0, np.maximum(0.0, stretched(log_alpha, uniform, beta, gamma, zeta)))


def open_probability(log_alpha: np.ndarray, beta: float, gamma: float, zeta: float) -> np.ndarray:
    return sigmoid(log_alpha - beta * np.log(-gamma / zeta))


def settled(log_alpha: np.ndarray, gamma: float, zeta: float) -> np.ndarray:
    return np.minimum(1.0, np.maximum(0.0, sigmoid(log_alpha) * (zeta - gamma) + gamma))


def output_scale(is_open: np.ndarray, layer_of: np.ndarray) -> np.ndarray:
    """Shim et al. 2021: heads / (open heads + 0.001) of each gate's layer, between 1 and the heads."""
    scale = np.empty(len(layer_of))
    for gate, layer in enumerate(layer_of):
        in_layer = layer_of == layer
        heads, closed = in_layer.sum(), (~is_open[in_layer]).sum()
        scale[gate] = min(max(heads / (heads - closed + 1e-3), 1.0), heads)
    return scale

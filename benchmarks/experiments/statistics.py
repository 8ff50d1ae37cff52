"""Paired differences between methods with bootstrap intervals over seeds and examples, and Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

RESAMPLES = 10_000
TAIL = 2.5  # percent left out on either side of the interval
Array = numpy.ndarray


@dataclass(frozen=True)
class Difference:
    """Mean paired difference, its 95 % interval, its two-sided bootstrap p, and the seeds in which it is above 0."""

    value: float
    low: float
    high: float
    p: float
    ahead: int
    seeds: int

    def __str__(self) -> str:
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def paired_difference(ours: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> Difference:
    """Ours minus the other's, both [seeds, examples] of the same seeds and examples (one example: a plain number).

    The bootstrap resamples seeds and examples at once, the same examples for every seed (Owen 2007 calls it the
    pigeonhole bootstrap; it errs towards wide intervals). It draws one seed fewer than there are, which makes the
    variance over few seeds unbiased (Rao and Wu 1988). The same pair gives the same interval at every call.
    """
    differences = numpy.asarray(ours, dtype=float) - numpy.asarray(other, dtype=float)
    replicates = resampled_means(differences, seed=0)
    low, high = numpy.percentile(replicates, (TAIL, 100 - TAIL))
    below, above = numpy.count_nonzero(replicates <= 0), numpy.count_nonzero(replicates >= 0)
    p = min(1.0, 2 * (min(below, above) + 1) / (RESAMPLES + 1))
    ahead = int((differences.mean(axis=1) > 0).sum())
    return Difference(float(differences.mean()), float(low), float(high), p, ahead, len(differences))


def resampled_means(values: Array, seed: int) -> Array:
    """Means of [seeds, examples] under resampling of both, float64 [RESAMPLES]."""
    generator = numpy.random.default_rng(seed)
    return ((seed_weights(len(values), generator) @ values) * example_weights(values.shape[1], generator)).sum(axis=1)


def seed_weights(count: int, generator: numpy.random.Generator) -> Array:
    """Shares of the seeds in every resample, float64 [RESAMPLES, seeds]: one seed fewer than there are is drawn."""
    drawn = max(1, count - 1)
    return generator.multinomial(drawn, [1 / count] * count, size=RESAMPLES) / drawn


def example_weights(count: int, generator: numpy.random.Generator) -> Array:
    """Shares of the examples in every resample, float64 [RESAMPLES, examples]."""
    return generator.multinomial(count, [1 / count] * count, size=RESAMPLES) / count


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values: the i-th smallest of m times (m - i), never below a smaller one's."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted

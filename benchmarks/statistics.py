"""Medians with bootstrap intervals, paired by round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

RESAMPLES = 2000
TAIL = 2.5  # percent left out on either side of the interval
Array = numpy.ndarray


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def median_replicates(samples: Sequence[Sequence[float]], seed: int) -> Array:
    """Medians of resampled rounds, float64 [rows, RESAMPLES + 1]; the last column is the median of the rounds as timed.

    samples: [rows, rounds]. All rows take the same resampled rounds, so that drift of the machine cancels in ratios.
    """
    values = numpy.asarray(samples, dtype=float)
    rounds = values.shape[1]
    picks = numpy.random.default_rng(seed).integers(rounds, size=(RESAMPLES, rounds))
    resampled = numpy.stack([numpy.median(row[picks], axis=1) for row in values])
    return numpy.concatenate([resampled, numpy.median(values, axis=1)[:, None]], axis=1)


def estimate(replicates: Array) -> Estimate:
    """The statistic as timed (the last replicate), and the central interval of the resampled ones."""
    low, high = numpy.percentile(replicates[:-1], (TAIL, 100 - TAIL))
    return Estimate(float(replicates[-1]), float(low), float(high))


def geometric_mean(replicates: Sequence[Array]) -> Array:
    """Geometric mean over cases, replicate by replicate."""
    return numpy.exp(numpy.mean(numpy.log(numpy.stack(replicates)), axis=0))


def spread(samples: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Median, 20th and 80th percentile, times `scale`."""
    p20, median, p80 = (round(float(value) * scale, 2) for value in numpy.percentile(samples, (20, 50, 80)))
    return {"median": median, "p20": p20, "p80": p80}

"""Interleaved timing: every round runs every candidate once, in a random order."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

WARM_BELOW = 0.02  # seconds; a shorter call would still pay for the caches that the candidate before it left
LONG = 0.5  # seconds; a longer call is run once to estimate it, others three times


class Stopwatch:
    """Seconds spent in the named parts of calls since `reset`; whoever runs a part adds to `seconds`."""

    def __init__(self, *parts: str) -> None:
        self.seconds = dict.fromkeys(parts, 0.0)

    def reset(self) -> None:
        """Start again from 0."""
        self.seconds = dict.fromkeys(self.seconds, 0.0)


@dataclass(frozen=True)
class Candidate:
    """One thing to time: `call`, with `before` run untimed ahead of every call.

    expects: the oracle that the output of `call` has to match, None where there is no output to compare.
    stopwatch: times parts of `call`; each is a series of its own, `<name>_<part>`.
    """

    name: str
    call: Callable[[], object]
    before: Callable[[], object] | None = None
    expects: str | None = None
    stopwatch: Stopwatch | None = None

    @property
    def series(self) -> list[str]:
        """The names under which `sample` gives seconds."""
        parts = () if self.stopwatch is None else self.stopwatch.seconds
        return [self.name, *(f"{self.name}_{part}" for part in parts)]


def sample(candidate: Candidate, repeats: int, warm_up: bool) -> dict[str, float]:
    """Mean seconds per call over `repeats` calls, under the name of the candidate; and of the parts of the call."""
    call, before, stopwatch = candidate.call, candidate.before, candidate.stopwatch
    if warm_up and before is None:
        call()
    if stopwatch is not None:
        stopwatch.reset()
    if before is None:
        start = perf_counter()
        for _ in range(repeats):
            call()
        total = perf_counter() - start
    else:
        total = 0.0
        for _ in range(repeats):
            before()
            start = perf_counter()
            call()
            total += perf_counter() - start
    parts = () if stopwatch is None else stopwatch.seconds.values()
    return {name: seconds / repeats for name, seconds in zip(candidate.series, (total, *parts), strict=True)}


def estimated_seconds(candidate: Candidate) -> float:
    """Seconds per call, roughly."""
    name = candidate.name
    first = sample(candidate, 1, warm_up=False)[name]
    return first if first > LONG else min(sample(candidate, 1, warm_up=True)[name] for _ in range(2))


def interleave(
    candidates: Sequence[Candidate], rounds: int, sample_seconds: float, seed: int
) -> dict[str, list[float]]:
    """Seconds per call of every candidate, and of the parts of the call, in every round; a sample lasts
    `sample_seconds` or one call."""
    estimates = {one.name: estimated_seconds(one) for one in candidates}
    repeats = {name: max(1, math.ceil(sample_seconds / seconds)) for name, seconds in estimates.items()}
    order, generator = list(candidates), random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for one in candidates for name in one.series}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            generator.shuffle(order)
            for one in order:
                for name, seconds in sample(one, repeats[one.name], estimates[one.name] < WARM_BELOW).items():
                    samples[name].append(seconds)
    finally:
        gc.enable()
    return samples

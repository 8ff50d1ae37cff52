"""Interleaved timing: every round runs every candidate once, in a random order."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

WARM_BELOW = 0.02  # seconds; a shorter call would still pay for the caches that the candidate before it left


@dataclass(frozen=True)
class Candidate:
    """One thing to time: `call`, with `before` run untimed ahead of every call.

    expects: the oracle that the output of `call` has to match, None where there is no output to compare.
    """

    name: str
    call: Callable[[], object]
    before: Callable[[], object] | None = None
    expects: str | None = None


def sample(candidate: Candidate, repeats: int, warm_up: bool) -> float:
    """Mean seconds per call over `repeats` calls."""
    call, before = candidate.call, candidate.before
    if before is not None:
        total = 0.0
        for _ in range(repeats):
            before()
            start = perf_counter()
            call()
            total += perf_counter() - start
        return total / repeats
    if warm_up:
        call()
    start = perf_counter()
    for _ in range(repeats):
        call()
    return (perf_counter() - start) / repeats


def interleave(
    candidates: Sequence[Candidate], rounds: int, sample_seconds: float, seed: int
) -> dict[str, list[float]]:
    """Seconds per call of every candidate in every round; a sample lasts `sample_seconds` or one call."""
    estimates = {one.name: min(sample(one, 1, warm_up=True) for _ in range(3)) for one in candidates}
    repeats = {name: max(1, math.ceil(sample_seconds / seconds)) for name, seconds in estimates.items()}
    order, generator = list(candidates), random.Random(seed)
    samples: dict[str, list[float]] = {one.name: [] for one in candidates}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            generator.shuffle(order)
            for one in order:
                samples[one.name].append(sample(one, repeats[one.name], estimates[one.name] < WARM_BELOW))
    finally:
        gc.enable()
    return samples

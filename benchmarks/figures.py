"""The figures to reach, computed from a result file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from zlib import crc32

from .cases import NUM_HEADS
from .statistics import Array, Estimate, estimate, geometric_mean, median_replicates

Case = dict[str, Any]
Result = dict[str, Any]
WARM, FIRST = "ours", "ours_first"
LARGE = 1024  # tokens in the batch
LOWEST_BLOCK_SPEED = 0.75  # relative to repacked, in any case


@dataclass(frozen=True)
class Figure:
    """A figure to reach; it fails only when its whole interval is past the limit."""

    title: str
    limit: float
    found: Estimate
    at_least: bool
    where: str = ""

    @property
    def met(self) -> bool:
        """Whether some of the interval is within the limit."""
        return self.found.high >= self.limit if self.at_least else self.found.low <= self.limit


def best_repacked(case: Case) -> str:
    """The faster of the two repacked candidates, by median."""
    return min(("repacked", "repacked_fused"), key=lambda name: case["candidates"][name]["median"])


def replicates(case: Case, *names: str) -> Array:
    """`median_replicates` of the named candidates; cases draw different rounds."""
    rows = [case["candidates"][name]["samples"] for name in names]
    return median_replicates(rows, seed=crc32(case["name"].encode()))


def speed(case: Case, name: str) -> Array:
    """Replicates of a candidate's speed relative to the repacked one; above 1 it is faster."""
    candidate, repacked = replicates(case, name, best_repacked(case))
    return repacked / candidate


def timed(result: Result, level: str) -> list[Case]:
    """The cases of a level in which nothing was wrong."""
    return [case for case in result["cases"] if case["level"] == level and not case["wrong"]]


def worst_case(title: str, limit: float, found: dict[str, Estimate], at_least: bool) -> Figure:
    """The figure of the case whose interval decides: no other lies farther past the limit, or closer to it."""
    name = min(found, key=lambda key: found[key].high if at_least else -found[key].low)
    return Figure(title, limit, found[name], at_least, name)


def block_figures(result: Result, name: str, words: str) -> list[Figure]:
    """The attention block against the repacked block, below all heads."""
    cases = [case for case in timed(result, "block") if case["kept_count"] < NUM_HEADS]
    large = [case for case in cases if case["batch"] * case["tokens"] >= LARGE]
    figures = []
    for group, which in ((cases, f"below {NUM_HEADS} heads"), (large, f"B*T of {LARGE} or more")):
        if group:
            mean = estimate(geometric_mean([speed(case, name) for case in group]))
            title = f"Block over repacked, {words}: geometric mean of {len(group)} cases, {which}"
            figures.append(Figure(title, 0.93, mean, at_least=True))
    if cases:
        found = {case["name"]: estimate(speed(case, name)) for case in cases}
        title = f"Block over repacked, {words}: slowest case"
        figures.append(worst_case(title, LOWEST_BLOCK_SPEED, found, at_least=True))
    return figures


def overhead_figures(result: Result) -> list[Figure]:
    """Microseconds by which the attached block with all heads on is past what it may add to the plain block."""
    found = {}
    for case in timed(result, "block"):
        if case["kept_count"] == NUM_HEADS:
            ours, dense = replicates(case, WARM, "dense")
            found[case["name"]] = estimate(ours - dense - (0.03 * dense).clip(min=5))
    title = "All heads on: microseconds past 3 % or 5 microseconds over the plain block, worst case"
    return [worst_case(title, 0.0, found, at_least=False)] if found else []


def model_figures(result: Result) -> list[Figure]:
    """Latency of the MiniLM-shaped model with half its heads over that of the repacked model, on the demo's batches."""
    half = [
        case
        for case in timed(result, "model")
        if case["hidden"] == 384 and case["label"].startswith("demo") and 2 * case["kept_count"] == 6 * NUM_HEADS
    ]
    if not half:
        return []
    latency = estimate(1 / geometric_mean([speed(case, WARM) for case in half]))
    title = f"Whole MiniLM, half its heads: latency over repacked, geometric mean of {len(half)} batches"
    return [Figure(title, 1.05, latency, at_least=False)]


def import_figures(result: Result) -> list[Figure]:
    """Seconds that importing the library adds to importing torch."""
    seconds = estimate(median_replicates([result["import"]["samples"]], seed=0)[0])
    return [Figure("`import sparse_heads` beyond torch, seconds", 0.2, seconds, at_least=False)]


def all_figures(result: Result) -> list[Figure]:
    """Every figure that the result's suite has cases for."""
    return [
        *block_figures(result, WARM, "warm"),
        *block_figures(result, FIRST, "first call after `set_heads`"),
        *overhead_figures(result),
        *model_figures(result),
        *import_figures(result),
    ]

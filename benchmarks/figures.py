"""The figures to reach, computed from a result file."""

from __future__ import annotations

from collections.abc import Sequence
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
MAIN_REQUESTS = {"hidden": 768, "batch": 8, "tokens": 128}  # the block that the figures for requests are about
# The shape that the figures for decoding are about.
MAIN_DECODE = {"num_heads": 12, "kv_heads": 12, "head_dim": 64, "dtype": "float32", "batch": 8, "tokens": 4096}
MAIN_DECODE |= {"page_size": 0}
REPACKED, ALONE, SDPA = ("repacked", "repacked_fused"), ("alone", "alone_fused"), ("sdpa_gqa", "sdpa_repeated")


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


def fastest(case: Case, names: Sequence[str]) -> str:
    """The fastest of the named candidates, by median."""
    return min(names, key=lambda name: case["candidates"][name]["median"])


def replicates(case: Case, *names: str) -> Array:
    """`median_replicates` of the named candidates; cases draw different rounds."""
    rows = [case["candidates"][name]["samples"] for name in names]
    return median_replicates(rows, seed=crc32(case["name"].encode()))


def speed(case: Case, name: str, relative_to: Sequence[str] = REPACKED) -> Array:
    """Replicates of a candidate's speed relative to the fastest of others; above 1 it is faster."""
    candidate, other = replicates(case, name, fastest(case, relative_to))
    return other / candidate


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


def requests_figures(result: Result) -> list[Figure]:
    """The block with a subset for every request, at its main shape."""
    cases = [case for case in timed(result, "requests") if MAIN_REQUESTS.items() <= case.items()]
    figures = []
    for case in cases:
        if case["label"] == "independent" and 2 * case["kept_count"] == case["heads"]:
            title = "A random half of the heads in each request: speed over "
            dense, alone = estimate(speed(case, WARM, ["dense"])), estimate(speed(case, WARM, ALONE))
            figures.append(Figure(title + "the dense block", 1.7, dense, True, case["name"]))
            figures.append(Figure(title + "each request by itself, repacked", 0.9, alone, True, case["name"]))
        if case["label"] == "equal":
            time = estimate(1 / speed(case, WARM, ["ours_shared"]))
            title = "The same heads in each request: time over the shared subset"
            figures.append(Figure(title, 1.1, time, False, case["name"]))
        if case["label"] == "all":
            time = estimate(1 / speed(case, WARM, ["dense"]))
            title = "All heads on, for each request: time over the dense block"
            figures.append(Figure(title, 1.08, time, False, case["name"]))
    return figures


def gqa_figures(result: Result) -> list[Figure]:
    """Grouped queries, half of the groups off per request, against the same operator with all heads on."""
    title = "Attention with grouped queries, half of the groups off: speed over all on"
    return [
        Figure(title, 1.8, estimate(speed(case, WARM, ["all_on"])), True, case["name"])
        for case in timed(result, "gqa")
        if case["label"] == "groups" and case["tokens"] == 1024
    ]


def decode_figures(result: Result) -> list[Figure]:
    """Decoding at its main shape: the bandwidth of all heads, and what half of the heads gain."""
    figures = []
    for case in timed(result, "decode"):
        if not MAIN_DECODE.items() <= case.items() or min(case["lengths"]) < case["tokens"]:
            continue
        if case["label"] == "all":
            read, sdpa = (estimate(speed(case, "all_on", [other])) for other in ("read", "sdpa"))
            title = "Decoding, all heads on"
            figures.append(Figure(f"{title}: part of the bandwidth of a plain read", 0.85, read, True, case["name"]))
            figures.append(Figure(f"{title}: speed over SDPA", 0.95, sdpa, True, case["name"]))
        if case["label"] == "independent" and 2 * case["kept_count"] == case["heads"]:
            title = "Decoding, a random half of the heads in each request: speed over all on"
            figures.append(Figure(title, 1.8, estimate(speed(case, WARM, ["all_on"])), True, case["name"]))
    return figures


def generate_figures(result: Result) -> list[Figure]:
    """The attention layers of `generate()` under a shared half subset, against those of the dense model."""
    title = "`generate()`, half of the heads, the same tokens as the oracle: attention layers' speed over dense"
    return [
        Figure(title, 1.6, estimate(speed(case, f"{WARM}_attention", ["dense_attention"])), True, case["name"])
        for case in timed(result, "generate")
    ]


def gates_figures(result: Result) -> list[Figure]:
    """Training steps under gates against dense ones; and ablation scores against as many forwards as heads."""
    figures = []
    for case in timed(result, "gates"):
        if case["label"] in ("joint", "pipelined"):
            title, time = f"Training step under gates, {case['label']}: time over", 1 / speed(case, WARM, ["dense"])
            figures.append(Figure(f"{title} the dense step", 1.05, estimate(time), False, case["name"]))
        if case["label"] == "zeros" and case["feed_forward"] < case["hidden"]:
            title = "Training step, three quarters of the gates zero, attention-dominated: speed over the dense step"
            figures.append(Figure(title, 1.5, estimate(speed(case, WARM, ["dense"])), True, case["name"]))
        if case["label"] == "sweep":
            for name, words in ((WARM, "without a loss"), (f"{WARM}_loss", "of a loss")):
                title, time = f"Every head left out in turn, {words}: time over", 1 / speed(case, name, ["dense"])
                figures.append(Figure(f"{title} as many forwards", 0.6, estimate(time), False, case["name"]))
    return figures


def import_figures(result: Result) -> list[Figure]:
    """Seconds that importing the library adds to importing torch, where the suite timed it."""
    if "import" not in result:
        return []
    seconds = estimate(median_replicates([result["import"]["samples"]], seed=0)[0])
    return [Figure("`import sparse_heads` beyond torch, seconds", 0.2, seconds, at_least=False)]


def all_figures(result: Result) -> list[Figure]:
    """Every figure that the result's suite has cases for."""
    return [
        *block_figures(result, WARM, "warm"),
        *block_figures(result, FIRST, "first call after `set_heads`"),
        *overhead_figures(result),
        *model_figures(result),
        *requests_figures(result),
        *gqa_figures(result),
        *decode_figures(result),
        *generate_figures(result),
        *gates_figures(result),
        *import_figures(result),
    ]

"""The figures to reach, computed from the raw results of one file, each with its interval."""

from __future__ import annotations

from zlib import crc32

from ..figures import Figure, worst_case
from ..statistics import Array, Estimate, estimate, median_replicates

Case = dict[str, object]
Result = dict[str, object]
REPACKED = ("repacked_cudnn", "repacked_flash", "repacked_fused_cudnn", "repacked_fused_flash")
DENSE = ("dense_cudnn", "dense_flash", "fused_cudnn", "fused_flash")
MASKED = ("cudnn_masked", "flash_masked")
FLEX = ("flex_counts", "flex_own_mask")
# What a user gets. Of the kernels' own figures it is our kernel by name.
OURS, KERNEL = "ours_auto", "ours_triton"
BEST_OF_DENSE = {("forward", 64): 0.75, ("forward", 128): 0.65, ("backward", 64): 0.45, ("backward", 128): 0.45}
LARGE, PREFILL = 16384, 4096  # tokens in the batch


def median(case: Case, name: str) -> float:
    """Microseconds."""
    return case["candidates"][name]["median"]


def fastest(case: Case, names: tuple[str, ...]) -> str | None:
    """The fastest of those that were timed."""
    return min(
        (name for name in names if name in case["candidates"]), key=lambda name: median(case, name), default=None
    )


def replicates(case: Case, *names: str) -> Array:
    """Medians of resampled rounds, which all names share; cases draw different rounds."""
    return median_replicates([case["candidates"][name]["samples"] for name in names], seed=crc32(case["name"].encode()))


def speed(case: Case, ours: str, others: tuple[str, ...]) -> Estimate | None:
    """Speed relative to the fastest of others; None where one side was not timed."""
    other = fastest(case, others)
    if other is None or ours not in case["candidates"]:
        return None
    own, limit = replicates(case, ours, other)
    return estimate(limit / own)


def slowest(title: str, limit: float, cases: list[Case], ours: str, others: tuple[str, ...]) -> list[Figure]:
    """The figure of the case in which ours does worst against the fastest of others."""
    found = {case["name"]: one for case in cases if (one := speed(case, ours, others)) is not None}
    return [worst_case(title, limit, found, at_least=True)] if found else []


def select(result: Result, **wanted: object) -> list[Case]:
    """The cases with these facts."""
    return [case for case in result["cases"] if wanted.items() <= case.items()]


def large(cases: list[Case], tokens: int) -> list[Case]:
    """Those with as many tokens in the batch, or more."""
    return [case for case in cases if case["batch"] * case["tokens"] >= tokens]


def block_figures(result: Result) -> list[Figure]:
    """The attention block under a shared subset, against the physically smaller one and the plain one."""
    cases = select(result, level="block", direction="forward", masks="shared")
    some = [case for case in cases if case["density"] < 1]
    scattered, runs = ([case for case in some if (case["choice"] == "runs") is wanted] for wanted in (False, True))
    small = [case for case in scattered if case not in large(scattered, LARGE)]
    title = "Block over repacked, "
    return [
        *slowest(f"{title}{LARGE} tokens or more: slowest case", 0.95, large(scattered, LARGE), OURS, REPACKED),
        *slowest(f"{title}heads in at most two runs: slowest case", 0.97, large(runs, LARGE), OURS, REPACKED),
        *slowest(f"{title}smaller sizes, scattered heads: slowest case", 0.85, small, OURS, REPACKED),
        *overhead("All heads on: time over the plain block", 1.02, [one for one in cases if one["density"] == 1]),
    ]


def overhead(title: str, limit: float, cases: list[Case]) -> list[Figure]:
    """The figure of the case in which ours takes longest relative to the dense layer."""
    found = {}
    for case in cases:
        other = fastest(case, DENSE)
        if other is not None and OURS in case["candidates"]:
            own, dense = replicates(case, OURS, other)
            found[case["name"]] = estimate(own / dense)
    return [worst_case(title, limit, found, at_least=False)] if found else []


def operations(case: Case) -> int:
    """What the heads that are on cost."""
    return sum(part["operations"] for part in case["work"].values())


def all_operations(case: Case) -> float:
    """What all heads cost. Work is proportional to active heads; keys and values to active groups."""
    heads, groups = case["batch"] * case["heads"], case["batch"] * case["kv_heads"]
    total = 0.0
    for name, part in case["work"].items():
        if name == "in":
            active, whole = case["active"] + 2 * case["active_groups"], heads + 2 * groups
        else:
            active, whole = case["active"], heads
        total += part["operations"] * whole / max(active, 1)
    return total


def skip_efficiency(case: Case) -> Estimate | None:
    """All-heads time times the active share of the work, over the measured time."""
    if not {KERNEL, "ours_all_on"} <= case["candidates"].keys():
        return None
    own, every = replicates(case, KERNEL, "ours_all_on")
    return estimate(every * (operations(case) / all_operations(case)) / own)


def floor_speed(case: Case, ceilings: dict[str, float]) -> Estimate | None:
    """The floor over the measured time: for each part the longer of operations at the rate of the best dense kernel at
    the compact shape and bytes at that of a copy, and a launch."""
    floor = 0.0
    for name, part in case["work"].items():
        parts = [f"part_{name}", *(f"part_{name}_{backend}" for backend in ("cudnn", "flash"))]
        if name == "attention" and case["density"] == 1:
            parts += MASKED
        kernel = fastest(case, tuple(parts))
        if kernel is None or KERNEL not in case["candidates"]:
            return None
        dense = part if kernel in MASKED else case["compact_work"][name]
        rate = dense["operations"] / median(case, kernel)
        floor += max(part["operations"] / rate, 1e6 * part["bytes"] / ceilings["bytes_per_second"])
        floor += 1e6 * ceilings["launch_seconds"]
    (own,) = replicates(case, KERNEL)
    return estimate(floor / own)


def request_figures(result: Result) -> list[Figure]:
    """Masks per request, forward."""
    cases = large(select(result, direction="forward", masks="requests"), PREFILL)
    figures = []
    for level in ("attention", "block", "in", "out"):
        chosen = [case for case in cases if case["level"] == level]
        found = {case["name"]: one for case in chosen if (one := skip_efficiency(case)) is not None}
        if found:
            figures.append(worst_case(f"Per request, {level}: skip efficiency, worst case", 0.9, found, True))
        ceilings = {case["name"]: result["sessions"][case["session"]]["ceilings"] for case in chosen}
        floors = {
            case["name"]: one for case in chosen if (one := floor_speed(case, ceilings[case["name"]])) is not None
        }
        if floors:
            figures.append(worst_case(f"Per request, {level}: speed over the floor, worst case", 0.65, floors, True))
    sparse = [case for case in cases if case["level"] == "attention" and case["density"] <= 0.75]
    every = [case for case in cases if case["level"] == "attention" and case["density"] == 1]
    figures += slowest("Per request, some heads: speed over FlexAttention, slowest case", 1.0, sparse, KERNEL, FLEX)
    return figures + slowest("Per request, all heads: speed over FlexAttention", 0.9, every, KERNEL, FLEX)


def kernel_figures(result: Result) -> list[Figure]:
    """Our own kernel with all heads on, against the best of PyTorch's."""
    figures = []
    for (direction, head_dim), limit in BEST_OF_DENSE.items():
        facts = {"level": "attention", "direction": direction, "head_dim": head_dim, "density": 1.0, "gated": False}
        cases = large(select(result, masks="shared", **facts), LARGE)
        title = f"Our kernel, all heads, {direction}, D = {head_dim}: speed over "
        figures += slowest(f"{title}the best dense kernel, slowest case", limit, cases, KERNEL, MASKED)
        if direction == "backward":
            figures += slowest(
                f"{title}deterministic flash, slowest case", 0.7, cases, KERNEL, ("flash_deterministic",)
            )
    return figures


def training_figures(result: Result) -> list[Figure]:
    """Steps of training under gates."""
    cases = select(result, level="block", direction="step", gated=True)
    figures = overhead("Gated step, all heads: time over dense", 1.03, [one for one in cases if one["density"] == 1])
    found = {}
    for case in cases:
        # Hard zeros: the same shape with all gates on is a case of its own, in the same run.
        shape = {key: case[key] for key in ("batch", "tokens", "heads", "kv_heads", "head_dim", "session")}
        dense = [one for one in cases if one["density"] == 1 and shape.items() <= one.items()]
        if case["density"] < 1 and dense and all(OURS in one["candidates"] for one in (case, dense[0])):
            (own,), (every,) = replicates(case, OURS), replicates(dense[0], OURS)
            found[case["name"]] = estimate(every * (operations(case) / all_operations(case)) / own)
    if found:
        # "In proportion to the active heads", with the same tolerance as skip efficiency.
        title = "Gated step, hard zeros: all-heads time x active share of the work / time, worst case"
        figures.append(worst_case(title, 0.9, found, at_least=True))
    return figures


def all_figures(result: Result) -> list[Figure]:
    """Every figure that the result has cases for."""
    return [
        *block_figures(result),
        *request_figures(result),
        *kernel_figures(result),
        *training_figures(result),
    ]

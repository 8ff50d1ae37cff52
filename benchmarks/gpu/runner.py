"""Runs cases one after another within a time, and keeps the result file whole after each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter, time_ns
from zlib import crc32

import torch

from sparse_heads._files import write_whole

from . import attention, layers, projections
from .cases import GpuCase
from .device import Device, session
from .inputs import Inputs
from .measure import Verdicts, gate, interleave, spread
from .oracles import SHORT_TOKENS
from .work import compact, work_of

SCHEMA_VERSION = 1
MODULES = {"attention": attention, "block": layers, "in": projections, "out": projections}
Result = dict[str, object]


def write_json(path: Path, content: object) -> None:
    """By rename, so that no reader sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole({path: (json.dumps(content, indent=1) + "\n").encode()})


def checked(case: GpuCase, device: Device, seed: int) -> Verdicts:
    """The contenders of a case on fresh inputs, through the gate."""
    inputs = Inputs(case, device.torch_device, seed)
    mask = case.mask.to(device.torch_device)
    module = MODULES[case.level]
    contenders = module.contenders_of(case, inputs, mask, device.smoke)
    return gate(contenders, module.oracles_of(case, inputs, mask), device)


def measure(case: GpuCase, device: Device) -> dict[str, object]:
    """The entry of one case. Blocks and projections pass the gate in a short case too, with all gradients."""
    started = perf_counter()
    seed = time_ns() % 2**31  # other numbers in every run; the entry names it
    short = replace(case, tokens=SHORT_TOKENS // 2 + 1, batch=min(2, case.batch))
    first = None
    if case.level != "attention" and case.tokens > SHORT_TOKENS:
        first = checked(short, device, seed)
    verdicts = checked(case, device, seed)
    wrong, failed, right = verdicts.wrong, verdicts.failed, verdicts.right
    if first is not None:
        wrong, failed = first.wrong | wrong, first.failed | failed
        right = [one for one in right if one.name not in wrong and one.name not in failed]
    work = {name: vars(part) for name, part in work_of(case).items()}
    compact_work = {name: vars(part) for name, part in work_of(compact(case)).items()}
    entry = {**case.facts(), "seed": seed, "work": work, "compact_work": compact_work}
    entry |= {"wrong": wrong, "failed": failed, "candidates": {}}
    try:
        samples = interleave(right, device, crc32(case.name.encode()))
        entry["candidates"] = {name: spread(each) for name, each in samples.items()}
    except Exception as error:
        entry["failed"]["timing"] = f"{type(error).__name__}: {str(error)[:500]}"
    device.release()
    return entry | {"seconds": round(perf_counter() - started, 1)}


def ceilings(device: Device) -> dict[str, object]:
    """Operations a second of a matrix product, bytes a second of a copy, seconds of a launch; all measured now."""
    size, copied = (64, 1 << 12) if device.smoke else (8192, 1 << 32)
    dtype = torch.float32 if device.smoke else torch.bfloat16
    left, right = (torch.randn(size, size, device=device.torch_device, dtype=dtype) for _ in range(2))
    source = torch.randint(0, 127, (copied,), device=device.torch_device, dtype=torch.int8)
    target, tiny = torch.empty_like(source), torch.ones(1, device=device.torch_device)

    def median(call: Callable[[], object]) -> tuple[float, list[float]]:
        pairs = []
        for _ in range(4 + (2 if device.smoke else 20)):
            start = device.stamp()
            call()
            pairs.append((start, device.stamp()))
        device.synchronize()
        found = spread([device.seconds(*pair) for pair in pairs[4:]])
        return found["median"] / 1e6, found["samples"]

    product, products = median(lambda: left @ right)
    copy, copies = median(lambda: target.copy_(source))
    launch, launches = median(lambda: tiny.add_(1))
    device.release()
    return {
        "operations_per_second": 2 * size**3 / product,
        "bytes_per_second": 2 * copied / copy,
        "launch_seconds": launch,
        "samples": {"product": products, "copy": copies, "launch": launches},
    }


def same_setup(one: dict, other: dict) -> bool:
    """Whether two sessions may share a file."""
    return all(one[key] == other[key] for key in ("smoke", "versions")) and (
        one["device"]["name"] == other["device"]["name"]
    )


def run_cases(
    suite: str, cases: Sequence[GpuCase], device: Device, path: Path, seconds: float, earlier: Path | None = None
) -> Result:
    """Measure cases until the time is over; those of `earlier`, the file of an interrupted run, are kept.

    Nothing is left out without a word: `left` names the cases that the time did not suffice for.
    """
    started = perf_counter()
    here = session(device)
    result: Result = {"schema_version": SCHEMA_VERSION, "suite": suite, "unit": "microseconds", "sessions": []}
    result |= {"left": [], "cases": []}
    if earlier is not None and earlier.exists():
        result = json.loads(earlier.read_text())
        if result["suite"] != suite or not all(same_setup(one, here) for one in result["sessions"]):
            raise ValueError(f"resume: {earlier} is of another suite, device or versions; give another folder")
    here["ceilings"] = ceilings(device)
    here["after_ceilings"] = device.clocks()
    result["sessions"].append(here)
    number, done = len(result["sessions"]) - 1, {case["name"] for case in result["cases"]}
    waiting = [case for case in cases if case.name not in done]
    result["left"] = [case.name for case in waiting]
    write_json(path, result)
    while waiting and perf_counter() - started < seconds:
        case = waiting.pop(0)
        entry = measure(case, device) | {"session": number}
        result["cases"].append(entry)
        result["left"] = [case.name for case in waiting]
        write_json(path, result)
        print(f"{entry['seconds']:6.1f} s  {case.name}", flush=True)
        device.synchronize()  # raises where a kernel has broken the context: nothing after that would count
    return result


def our_faults(result: Result) -> dict[str, str]:
    """What is wrong with, or failed in, contenders that are the library's."""
    return {
        f"{case['name']}: {name}": reason
        for case in result["cases"]
        for name, reason in {**case["wrong"], **case["failed"]}.items()
        if name.startswith("ours") or name == "timing"
    }

"""Races: every operator of ours on one input again and again, under other requests' masks and other orders of work.

Any bit that differs is a fault. Equal bits prove nothing about accesses that happen to come in time; where the
compute sanitizer is there, it looks at every access, at tiny shapes, with TOOL memcheck, racecheck and synccheck:

    compute-sanitizer --tool TOOL --error-exitcode 1 python -m benchmarks.gpu races --runs 1 --tiny --out /tmp/races
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from unittest.mock import patch

import torch
from torch import Tensor

from . import attention, layers, projections
from .cases import GpuCase
from .device import Device, session
from .inputs import Inputs
from .measure import Contender
from .runner import write_json
from .suites import GROUPED, PREFILL, TINY, TINY_GROUPED

# Every kernel: both directions, with and without groups, gates and masks per request, one long and one short shape.
SHAPES = (PREFILL, GROUPED, (1, 16384, 32, 4, 64), (32, 512, 12, 12, 64))
TINY_SHAPES = (TINY, TINY_GROUPED)


def cases(tiny: bool) -> list[GpuCase]:
    """Both halves of the heads and all of them."""
    found = []
    for shape in TINY_SHAPES if tiny else SHAPES:
        dtype = {"dtype": "float32"} if tiny else {}
        gated = {"density": 0.5, "masks": "requests", "gated": True, **dtype}
        found += [
            GpuCase("attention", "step", *shape, **gated),
            GpuCase("attention", "step", *shape, **dtype),
            GpuCase("in", "step", *shape, 0.5, masks="requests", **dtype),
            GpuCase("out", "step", *shape, 0.5, masks="requests", **dtype),
        ]
        if shape[2] == shape[3]:
            found.append(GpuCase("block", "step", *shape, 0.5, **dtype))
    return found


def ours(case: GpuCase, inputs: Inputs, mask: Tensor) -> Contender:
    """Our kernels on a case."""
    module = {"attention": attention, "block": layers, "in": projections, "out": projections}[case.level]
    found = {one.name: one for one in module.contenders_of(case, inputs, mask, True)}
    return found["ours_triton"]


def results(contender: Contender) -> list[Tensor]:
    """Outputs and gradients of one run."""
    output, gradients = contender.run(contender.prepare())
    outputs = output if isinstance(output, tuple) else (output,)
    return [one.detach() for one in (*outputs, *gradients)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Bit for bit; two NaN of the same bits are the same."""
    return all(torch.equal(bits(left), bits(right)) for left, right in zip(one, other, strict=True))


def bits(tensor: Tensor) -> Tensor:
    """As integers."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@contextlib.contextmanager
def permuted_work(seed: int) -> Iterator[None]:
    """Every work list of attention in another order."""
    from sparse_heads._triton import work_list

    original, generator = work_list.attention_work_list, torch.Generator().manual_seed(seed)

    def shuffled(*arguments: object, **options: object) -> work_list.WorkList:
        work = original(*arguments, **options)
        count = int(work.count)
        order = torch.randperm(count, generator=generator).to(work.items.device)
        items = work.items.clone()
        items[:count] = work.items[:count][order]
        return work._replace(items=items)

    users = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("sparse_heads.") and getattr(module, "attention_work_list", None) is original
    ]
    with contextlib.ExitStack() as stack:
        for module in users:
            stack.enter_context(patch.object(module, "attention_work_list", shuffled))
        yield


def other_masks(mask: Tensor, seed: int) -> Tensor:
    """The first request's row as it is, the others drawn again."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(mask.shape, generator=generator).to(mask.device) < 0.5
    drawn[0] = mask[0]
    return drawn


def first_request(case: GpuCase, found: list[Tensor]) -> list[Tensor]:
    """What belongs to the first request: outputs and gradients with a dimension of requests, not those of weights."""
    count = 1 if case.level == "attention" else {"in": 3, "out": 1, "block": 1}[case.level]
    outputs, gradients = found[:count], found[count:]
    by_request = gradients if case.level == "attention" else gradients[:1]
    return [one[:1] for one in (*outputs, *by_request)]


def faults_of(case: GpuCase, device: Device, runs: int) -> list[str]:
    """What made a bit differ."""
    inputs = Inputs(case, device.torch_device, seed=7)
    mask = case.mask.to(device.torch_device)
    contender = ours(case, inputs, mask)
    first, faults = results(contender), []
    for run in range(1, runs):
        if not same(first, results(contender)):
            faults.append(f"run {run} differs from the first")
            break
    with permuted_work(seed=runs):
        if not same(first, results(contender)):
            faults.append("differs under a permuted work list")
    if case.masks == "requests":
        # The gates stay as they are: a head that a mask keeps has its gate, and its gate's gradient.
        changed = ours(case, inputs, other_masks(mask, seed=runs))
        if not same(first_request(case, first), first_request(case, results(changed))):
            faults.append("the first request differs under other masks of the others")
    return faults


def run(device: Device, path: Path, runs: int, tiny: bool) -> dict[str, str]:
    """Repeat every case; write the file after each, and give the faults."""
    content = {"session": session(device), "runs": runs, "cases": []}
    faults = {}
    for case in cases(tiny):
        started = perf_counter()
        try:
            found = faults_of(case, device, runs)
            device.synchronize()
        except Exception as error:
            found = [f"{type(error).__name__}: {str(error)[:500]}"]
        content["cases"].append({"name": case.name, "faults": found, "seconds": round(perf_counter() - started, 1)})
        faults |= {case.name: "; ".join(found)} if found else {}
        write_json(path, content)
        print(f"{'DIFFERS' if found else 'equal  '} {case.name}", flush=True)
        device.release()
    return faults

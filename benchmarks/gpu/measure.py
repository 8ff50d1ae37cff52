"""One case: every contender checked, those that are right timed in turns."""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .device import Device

Outputs = dict[str, Tensor]
FEWEST_ROUNDS, MOST_ROUNDS = 5, 21
CASE_SECONDS = 2.0  # for the rounds of one case
WARM_UPS = 3


class Oracle(Protocol):
    """What outputs are compared with."""

    def check(self, outputs: Outputs) -> None:
        """Raise AssertionError unless they are right."""


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    forward: gives a tensor or a tuple of them. grads: the gradients of these. leaves: what gradients go to, by the
    oracle's names for them; names that it does not know are computed and not compared. expects: the name of the oracle,
    None where the numbers are a ceiling of another shape. settings: held while it runs, forward and backward.
    canonical: turns what `forward` gives into what the oracle compares.
    """

    name: str
    forward: Callable[[], Tensor | tuple[Tensor, ...]]
    direction: str
    grads: tuple[Tensor, ...] = ()
    leaves: Mapping[str, Tensor] = field(default_factory=dict)
    expects: str | None = "kept"
    settings: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    canonical: Callable[[object], Tensor] = lambda output: output

    def prepare(self) -> object:
        """What comes before the timed part: the forward, where the backward is timed alone."""
        if self.direction != "backward":
            return None
        with self.settings():
            return self.forward()

    def run(self, prepared: object) -> tuple[object, tuple[Tensor, ...]]:
        """The timed part: output and gradients."""
        with self.settings():
            if self.direction == "forward":
                with torch.no_grad():
                    return self.forward(), ()
            output = self.forward() if prepared is None else prepared
            outputs = output if isinstance(output, tuple) else (output,)
            return output, torch.autograd.grad(outputs, tuple(self.leaves.values()), self.grads)

    def outputs(self) -> Outputs:
        """Output and gradients as the oracle compares them, computed in memory that was poisoned."""
        poison(self.leaves.values())
        output, gradients = self.run(self.prepare())
        return {"output": self.canonical(output), **dict(zip(self.leaves, gradients, strict=False))}


def poison(like: Sequence[Tensor]) -> None:
    """Leave NaN in freed memory of these sizes, which the next tensors of the same sizes will get."""
    held = [torch.full_like(one, torch.nan) for one in like for _ in range(2)]
    del held


@dataclass(frozen=True)
class Verdicts:
    """Names with the reason why they are not timed, and the contenders that are."""

    wrong: dict[str, str]
    failed: dict[str, str]
    right: list[Contender]


def gate(contenders: Sequence[Contender], oracles: Mapping[str, Oracle], device: Device) -> Verdicts:
    """Run everything once and compare it; what raises has failed, what differs is wrong."""
    wrong, failed, right = {}, {}, []
    for one in contenders:
        try:
            outputs = one.outputs()
            if one.expects is not None:
                oracles[one.expects].check(outputs)
            device.synchronize()
        except AssertionError as error:
            wrong[one.name] = str(error)
        except Exception as error:
            failed[one.name] = f"{type(error).__name__}: {str(error)[:500]}"
        else:
            right.append(one)
        outputs = None
        device.release()
    return Verdicts(wrong, failed, right)


def timed_call(one: Contender, device: Device) -> tuple[object, object]:
    """The stamps around one call, with a cold cache."""
    prepared = one.prepare()
    device.flush()
    start = device.stamp()
    one.run(prepared)
    return start, device.stamp()


def rounds_for(contenders: Sequence[Contender], device: Device) -> int:
    """Warm everything up, and say how many rounds fit into the time of a case."""
    if device.smoke:
        return 2
    total = 0.0
    for one in contenders:
        for _ in range(WARM_UPS):
            one.run(one.prepare())
        outer = device.stamp()
        timed_call(one, device)
        end = device.stamp()
        device.synchronize()
        total += device.seconds(outer, end)
    return max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(CASE_SECONDS / max(total, 1e-6))))


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Without Python's garbage collector, whose pauses a short call would show."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def interleave(contenders: Sequence[Contender], device: Device, seed: int) -> dict[str, list[float]]:
    """Seconds of every contender in every round; a round runs each once, in a random order."""
    samples: dict[str, list[float]] = {one.name: [] for one in contenders}
    order, generator = list(contenders), random.Random(seed)
    with no_collection():
        for _ in range(rounds_for(contenders, device)):
            generator.shuffle(order)
            stamps = {one.name: timed_call(one, device) for one in order}
            device.synchronize()
            for name, (start, end) in stamps.items():
                samples[name].append(device.seconds(start, end))
    return samples


def spread(samples: Sequence[float]) -> dict[str, object]:
    """Microseconds: median, 20th and 80th percentile, and all samples."""
    micro = [round(1e6 * one, 3) for one in samples]
    p20, _, _, p80 = statistics.quantiles(micro, n=5, method="inclusive")
    return {"median": statistics.median(micro), "p20": p20, "p80": p80, "samples": micro}

"""Interleaved timing of whole models and of the attention blocks inside them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch
from torch import nn
from tqdm.auto import tqdm

from .encoder import Batch

MINIMUM_ROUNDS = 3
MAXIMUM_ROUNDS = 30


@dataclass
class Stopwatch:
    """Times a forward of `model`, and inside it the stretches from `starts[i]`'s input to `ends[i]`'s output.

    On a CUDA device the times are those of the device, by events; on a CPU of the clock.
    """

    model: nn.Module
    starts: Sequence[nn.Module]
    ends: Sequence[nn.Module]
    marks: list = field(default_factory=list)

    def __post_init__(self) -> None:
        self.on_cuda = next(self.model.parameters()).device.type == "cuda"

    def time(self, batch: Batch) -> tuple[float, float]:
        """Milliseconds of one forward, and of its attention blocks together."""
        hooks = [module.register_forward_pre_hook(self.mark) for module in self.starts]
        hooks += [module.register_forward_hook(self.mark) for module in self.ends]
        self.marks.clear()
        try:
            self.mark()
            self.model(**batch)
            self.mark()
        finally:
            for hook in hooks:
                hook.remove()
        first, *inner, last = self.marks
        attention = sum(self.elapsed(*pair) for pair in zip(inner[::2], inner[1::2], strict=True))
        return self.elapsed(first, last), attention

    def mark(self, *_: object) -> None:
        if self.on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def elapsed(self, begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        if isinstance(begin, float):
            return 1000 * (end - begin)
        end.synchronize()
        return begin.elapsed_time(end)


@dataclass(frozen=True)
class Contender:
    """One way to run a number of heads: a label, a stopwatch on its model, and the context to run it in."""

    label: str
    kept: int
    stopwatch: Stopwatch
    context: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class Timing:
    """Times of one contender over all batches: medians over the rounds, and the spread of the whole-model time."""

    label: str
    kept: int
    rounds: int
    sentences: int
    sentences_per_second: float
    model_milliseconds: float
    attention_milliseconds: float
    model_milliseconds_p20: float
    model_milliseconds_p80: float


@torch.no_grad()
def race(contenders: Sequence[Contender], batches: Sequence[Batch], seconds: float, seed: int) -> list[Timing]:
    """Time every contender on every batch, in a new random order each round, until `seconds` have passed.

    At least 3 and at most 30 rounds, after one that is not counted; a contender's time is the sum over the batches of
    the median over the rounds.
    """
    order = list(contenders)
    generator = random.Random(seed)
    samples: dict[int, list[list[tuple[float, float]]]] = {id(contender): [] for contender in contenders}
    begin = time.perf_counter()
    progress = tqdm(total=MAXIMUM_ROUNDS, desc="timing", leave=False, disable=None if seconds else True)
    for done in range(MAXIMUM_ROUNDS + 1):
        generator.shuffle(order)
        for contender in order:
            with contender.context():
                times = [contender.stopwatch.time(batch) for batch in batches]
            if done:
                samples[id(contender)].append(times)
        progress.update()
        if done >= MINIMUM_ROUNDS and time.perf_counter() - begin > seconds:
            break
    progress.close()
    sentences = sum(len(batch["input_ids"]) for batch in batches)
    return [summary(contender, samples[id(contender)], sentences) for contender in contenders]


def summary(contender: Contender, rounds: Sequence[Sequence[tuple[float, float]]], sentences: int) -> Timing:
    """Medians over the rounds of one contender's (model, attention) milliseconds, added up over the batches."""
    model, attention = (
        sum(median(times[batch][part] for times in rounds) for batch in range(len(rounds[0]))) for part in (0, 1)
    )
    fifths = quantiles([sum(total for total, _ in times) for times in rounds], n=5)
    return Timing(
        label=contender.label,
        kept=contender.kept,
        rounds=len(rounds),
        sentences=sentences,
        sentences_per_second=1000 * sentences / model,
        model_milliseconds=model,
        attention_milliseconds=attention,
        model_milliseconds_p20=fifths[0],
        model_milliseconds_p80=fifths[3],
    )

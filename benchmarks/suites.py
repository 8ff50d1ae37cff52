"""What the suites time, as data."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain

from .cases import (
    KEPT_HEADS,
    NUM_HEADS,
    AnyCase,
    Case,
    DecodeCase,
    GatesCase,
    GenerateCase,
    GqaCase,
    RequestsCase,
    independent,
    rotated,
)

HIDDEN_SIZES = (384, 768)
SHAPES = ((1, 1), (1, 16), (1, 128), (8, 128), (4, 512), (1, 2048))  # (batch, tokens)

# Half of all heads spread unevenly over six layers, as scores leave them.
UNEVEN_HALF = (9, 6, 3, 9, 6, 3)
# The batches that the demo times, in word pieces per sentence: its held-out docstring sentences of Python 3.11, sorted
# by length and cut into batches of 32, at 1/6, 1/2 and 5/6.
MEDIAN_SENTENCES = (18,) * 14 + (19,) * 12 + (20,) * 6
SENTENCE_BATCHES = (
    (12,) * 6 + (13,) * 26,
    MEDIAN_SENTENCES,
    (28,) + (29,) * 8 + (30,) * 8 + (31,) * 7 + (32,) * 2 + (33,) * 6,
)
# A ranking of the heads, and how many of the best each request gets.
RANKING = (7, 2, 10, 0, 5, 11, 3, 8, 1, 6, 9, 4)
BUDGETS = (1, 2, 3, 4, 6, 8, 10, 12)


@dataclass(frozen=True)
class Suite:
    """What one run times, into one result file. quick: what a smoke test runs; imports: the import is timed too."""

    cases: tuple[AnyCase, ...]
    quick: tuple[AnyCase, ...]
    rounds: int = 30
    imports: bool = False


def model_case(hidden: int, lengths: tuple[int, ...], counts: tuple[int, ...], label: str = "") -> Case:
    """A whole-model case that keeps `counts[i]` heads in layer `i`."""
    return Case("model", hidden, lengths, tuple(rotated(count, layer) for layer, count in enumerate(counts)), label)


def requests_cases(hidden: int, batch: int, tokens: int) -> tuple[RequestsCase, ...]:
    """Independent heads at three densities, nested budgets, the same half for every request, and all heads on."""
    chosen = [("independent", independent(batch, density, seed=batch)) for density in (0.25, 0.5, 0.75)]
    chosen += [
        ("nested", tuple(tuple(sorted(RANKING[: BUDGETS[i % len(BUDGETS)]])) for i in range(batch))),
        ("equal", (KEPT_HEADS[6],) * batch),
        ("all", (KEPT_HEADS[12],) * batch),
    ]
    return tuple(RequestsCase(hidden, tokens, kept, label) for label, kept in chosen)


def gqa_cases(num_heads: int, kv_heads: int, head_dim: int, batch: int, tokens: int) -> tuple[GqaCase, ...]:
    """Half of the groups off, other ones in each request; and half of the heads off, but no whole group."""
    group, generator = num_heads // kv_heads, random.Random(num_heads)
    groups = [sorted(generator.sample(range(kv_heads), kv_heads // 2)) for _ in range(batch)]
    chosen = {
        "groups": [chain.from_iterable(range(one * group, (one + 1) * group) for one in each) for each in groups],
        "scattered": [range(request % 2, num_heads, 2) for request in range(batch)],
    }
    return tuple(
        GqaCase(num_heads, kv_heads, head_dim, tokens, tuple(map(tuple, kept)), label) for label, kept in chosen.items()
    )


def short(cases: Iterable[AnyCase], tokens: int) -> tuple[AnyCase, ...]:
    """The cases of at most `tokens` tokens in all."""
    return tuple(case for case in cases if case.batch * case.tokens <= tokens)


BLOCK = tuple(
    Case("block", hidden, (tokens,) * batch, (KEPT_HEADS[count],))
    for hidden in HIDDEN_SIZES
    for batch, tokens in SHAPES
    for count in KEPT_HEADS
)
MODEL = (
    *(model_case(384, MEDIAN_SENTENCES, (count,) * 6, "demo") for count in (12, 3)),
    *(model_case(384, lengths, (6,) * 6, "demo") for lengths in SENTENCE_BATCHES),
    model_case(384, MEDIAN_SENTENCES, UNEVEN_HALF, "demo-uneven"),
    *(model_case(384, (tokens,) * batch, (6,) * 6) for batch, tokens in SHAPES[:4]),
    *(model_case(768, (tokens,) * batch, (6,) * 6) for batch, tokens in SHAPES[1:3]),
)
# Every shape and count for the whole model; the long ones take more than an hour.
GRID = tuple(
    model_case(hidden, (tokens,) * batch, (count,) * 6)
    for hidden in HIDDEN_SIZES
    for batch, tokens in SHAPES
    for count in KEPT_HEADS
)
SHORT_GRID = short(GRID, 128)
REQUESTS = tuple(
    chain.from_iterable(
        requests_cases(hidden, batch, tokens)
        for hidden, shapes in ((768, ((8, 1), (8, 18), (8, 128), (8, 512))), (384, ((8, 1), (32, 18), (8, 128))))
        for batch, tokens in shapes
    )
)
GQA = tuple(
    chain.from_iterable(
        gqa_cases(*heads, batch=4, tokens=tokens) for heads in ((12, 4, 64), (32, 8, 128)) for tokens in (16, 128, 1024)
    )
)
MAIN_DECODE = DecodeCase(12, 12, 64, "float32", (4096,) * 8, (KEPT_HEADS[12],) * 8, "all")
HALF_DECODE = replace(MAIN_DECODE, kept=independent(8, 0.5, seed=8), label="independent")
DECODE = (
    MAIN_DECODE,
    HALF_DECODE,
    replace(MAIN_DECODE, kept=independent(8, 0.25, seed=8), label="independent"),
    replace(HALF_DECODE, dtype="bfloat16"),
    replace(HALF_DECODE, lengths=tuple(range(512, 4097, 512))),
    replace(HALF_DECODE, page_size=64),
    replace(HALF_DECODE, lengths=(16384,), kept=independent(1, 0.5, seed=1)),
    # Half of the key/value heads, other ones in each request.
    *(
        replace(MAIN_DECODE, kv_heads=one.kv_heads, head_dim=one.head_dim, kept=one.kept, label=one.label)
        for one in gqa_cases(NUM_HEADS, 4, 128, batch=8, tokens=4096)
    ),
)
GENERATE = tuple(GenerateCase(768, 12, batch, 256, 64) for batch in (1, 8))
# The last "zeros" has a whole feed-forward, which gates do not touch; in the other two attention dominates.
GATES = (
    *(
        GatesCase(hidden, layers, 4 * hidden, batch, tokens, label)
        for hidden, layers, batch, tokens in ((384, 6, 16, 24), (384, 6, 8, 128), (768, 2, 16, 24))
        for label in ("joint", "pipelined")
    ),
    *(
        GatesCase(384, 2, feed_forward, batch, tokens, "zeros")
        for feed_forward, batch, tokens in ((96, 4, 512), (96, 1, 2048), (1536, 1, 2048))
    ),
    GatesCase(384, 6, 1536, 4, 32, "sweep"),
)
QUICK_GATES = (*GATES[:2], GATES[6], GATES[-1])  # one of each label
SUITES = {
    "block": Suite(BLOCK, short(BLOCK, 128), imports=True),
    "model": Suite(MODEL, short(MODEL, 128), imports=True),
    "model-grid-short": Suite(SHORT_GRID, SHORT_GRID, imports=True),
    # a call takes up to a second, and no figure depends on one
    "model-grid-long": Suite(tuple(one for one in GRID if one not in SHORT_GRID), SHORT_GRID, rounds=10, imports=True),
    "requests": Suite(REQUESTS, requests_cases(768, 8, 1) + requests_cases(768, 8, 128)),
    "gqa": Suite(GQA, short(GQA, 512)),
    "decode": Suite(DECODE, tuple(replace(one, lengths=tuple(each // 16 for each in one.lengths)) for one in DECODE)),
    # a call takes seconds, and the machine's short disturbances average out within it
    "generate": Suite(GENERATE, tuple(replace(one, layers=2, tokens=32, new_tokens=8) for one in GENERATE), rounds=15),
    "gates": Suite(GATES, tuple(replace(one, layers=2, batch=2, tokens=16) for one in QUICK_GATES), rounds=15),
}
# Together, one result file each.
GROUPS = {"cpu": ("block", "model", "requests", "gqa", "decode", "generate", "gates")}

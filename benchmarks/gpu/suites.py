"""What a GPU run times, as data, and how long it may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from .cases import GpuCase
from .measure import CASE_SECONDS, FEWEST_ROUNDS
from .work import total, work_of

LIMIT_SECONDS = 540  # for all
START_SECONDS = 15  # loading torch twice, and the ceilings
TESTS_SECONDS = 200  # the tests are stopped then
HEADLINE_SECONDS = 300  # no case begins later
MOST_HEADLINE_CASES = 40
# A careful guess at a case, for the budget: contenders, operations a second, what a call takes beside them, the gate.
CONTENDERS, OPERATIONS, CALL_SECONDS, GATE_SECONDS = 10, 150e12, 1e-3, 1.0
# Compiling FlexAttention for a shape and direction, and our kernels for a level, direction and head dimension.
FLEX_SECONDS, KERNEL_SECONDS = 12.0, 4.0

DENSITIES = (1.0, 0.75, 0.5, 0.25, 0.125)
PREFILL = (8, 2048, 32, 32, 128)  # batch, tokens, heads, key/value heads, head dimension
ALL_ON = ((4, 4096, 16, 16, 64), (4, 4096, 32, 32, 128), (1, 16384, 32, 32, 128), (32, 512, 12, 12, 64))
GROUPED, WIDEST = (4, 4096, 32, 8, 128), (1, 32768, 64, 8, 128)
SMALL = ((1, 512, 12, 12, 64), (4, 512, 16, 16, 64))


def attention(direction: str, shape: tuple[int, ...], density: float = 1.0, **options: object) -> GpuCase:
    """The operator alone."""
    return GpuCase("attention", direction, *shape, density, **options)


def block(direction: str, shape: tuple[int, ...], density: float = 1.0, **options: object) -> GpuCase:
    """Projections and attention."""
    return GpuCase("block", direction, *shape, density, **options)


# The most telling first: whatever the time does not suffice for is left out at the end.
HEADLINE = (
    *(attention("forward", PREFILL, density, masks="requests") for density in DENSITIES),
    *(block("forward", PREFILL, density) for density in DENSITIES),
    *(attention("forward", shape) for shape in ALL_ON),
    *(attention("backward", shape) for shape in ALL_ON[:3]),
    block("forward", PREFILL, 0.5, choice="runs"),
    *(block("forward", PREFILL, density, masks="requests") for density in (0.5, 0.25)),
    *(block("step", shape, gated=True) for shape in (PREFILL, ALL_ON[0])),
    *(block("step", PREFILL, density, gated=True) for density in (0.5, 0.25)),
    *(attention("backward", PREFILL, density, masks="requests") for density in (1.0, 0.5, 0.25)),
    *(attention(direction, GROUPED, 0.5, masks="requests", choice="groups") for direction in ("forward", "backward")),
    attention("backward", PREFILL, gated=True),
    attention("backward", PREFILL, 0.5, masks="requests", gated=True),
    *(block("forward", shape, density) for shape, density in zip(SMALL, (0.5, 0.25), strict=True)),
    block("forward", SMALL[0]),
    *(GpuCase(level, "forward", *PREFILL, 0.5, masks="requests") for level in ("in", "out")),
    GpuCase("in", "forward", *PREFILL, 0.5),
    GpuCase("in", "step", *PREFILL, 0.5, masks="requests"),
    attention("forward", (8, 1024, 12, 12, 64), 0.5, masks="requests"),
    attention("forward", WIDEST, 0.5, masks="requests"),
)


def grid() -> tuple[GpuCase, ...]:
    """Lengths, head dimensions, heads and groups, densities and kinds of mask, at 32k tokens a batch."""
    cases = []
    for tokens, head_dim, (heads, group) in product(
        (512, 2048, 8192, 32768), (64, 128), ((12, 1), (32, 1), (32, 4), (64, 8))
    ):
        shape = (32768 // tokens, tokens, heads, heads // group, head_dim)
        choice = "groups" if group > 1 else "scattered"
        for density in DENSITIES:
            for direction, masks in product(("forward", "backward"), ("shared", "requests")):
                cases.append(attention(direction, shape, density, masks=masks, choice=choice))
            cases.append(block("forward", shape, density, choice=choice))
        cases.append(attention("backward", shape, gated=True))
    return tuple(cases)


TINY, TINY_GROUPED = (2, 5, 2, 2, 16), (2, 5, 4, 2, 16)
# One of each kind, for the interpreter.
SMOKE = (
    attention("forward", TINY, 0.5, masks="requests", dtype="float32"),
    attention("backward", TINY_GROUPED, 0.5, masks="requests", choice="groups", gated=True, dtype="float32"),
    block("forward", TINY, 0.5, dtype="float32"),
    block("step", TINY, gated=True, dtype="float32"),
    GpuCase("in", "forward", *TINY, 0.5, masks="requests", dtype="float32"),
    GpuCase("out", "step", *TINY, 0.5, masks="requests", dtype="float32"),
)


def case_seconds(case: GpuCase) -> float:
    """A guess, without compiling: the gate, the warm-up and the rounds."""
    dense = total(work_of(replace(case, density=1.0)))
    turn = CONTENDERS * (dense.operations / OPERATIONS + CALL_SECONDS)
    return GATE_SECONDS + 5 * turn + max(FEWEST_ROUNDS * turn, CASE_SECONDS)


def estimated_seconds(cases: Sequence[GpuCase]) -> float:
    """A guess at all of them, compiling included."""
    flex = {
        (case.direction, case.batch, case.tokens, case.heads, case.kv_heads, case.head_dim)
        for case in cases
        if case.level == "attention" and case.masks == "requests"
    }
    kernels = {(case.level, case.direction, case.head_dim, case.group) for case in cases}
    return sum(map(case_seconds, cases)) + FLEX_SECONDS * len(flex) + KERNEL_SECONDS * len(kernels)


SUITES = {"headline": HEADLINE, "grid": grid(), "smoke": SMOKE}

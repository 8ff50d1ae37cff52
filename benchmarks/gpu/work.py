"""The operations a case must do, and the fewest bytes it must move: each input read once, each output written once.

A multiply and an add are two operations. Masked heads cost nothing but the zeros of a wide output. An attention
backward has five matrix products where the forward has two; a projection's backward has two for one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .cases import GpuCase

FORWARD, BACKWARD = {"forward": 1, "backward": 0, "step": 1}, {"forward": 0, "backward": 1, "step": 1}
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Work:
    """Operations and bytes."""

    operations: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.bytes + other.bytes)

    def times(self, factor: int) -> Work:
        """The same `factor` times over."""
        return Work(factor * self.operations, factor * self.bytes)


def attention_work(case: GpuCase) -> Work:
    """Causal attention of the active heads; the output is as wide as the query, also where it is zeros."""
    seen = case.tokens * (case.tokens + 1) // 2
    product = 2 * case.head_dim * seen * case.active
    row = BYTES[case.dtype] * case.head_dim * case.tokens
    wide, wide_groups = case.batch * case.heads * row, case.batch * case.kv_heads * row
    read, read_groups = case.active * row, case.active_groups * row
    statistics = 4 * case.active * case.tokens  # the log of the softmax sum, float32
    forward = Work(2 * product, read + 2 * read_groups + wide)
    # Reads query, output and its gradient, key and value; writes the gradients of query, key and value.
    backward = Work(5 * product, 3 * read + 2 * read_groups + statistics + wide + 2 * wide_groups)
    return forward.times(FORWARD[case.direction]) + backward.times(BACKWARD[case.direction])


def projection_work(case: GpuCase, level: str) -> Work:
    """The projection `level` of a case: to query, key and value ("in"), or back ("out")."""
    outputs = case.active + 2 * case.active_groups if level == "in" else case.active
    any_head = case.pairs.any(0)
    heads = int(any_head.sum())
    groups = int(any_head.unflatten(0, (case.kv_heads, case.group)).any(-1).sum())
    weight_rows = case.head_dim * (heads + 2 * groups if level == "in" else heads)
    size = BYTES[case.dtype]
    operations = 2 * case.tokens * case.hidden * case.head_dim * outputs
    model, kept = size * case.batch * case.tokens * case.hidden, size * case.tokens * case.head_dim * outputs
    weights = size * weight_rows * case.hidden
    whole = size * case.hidden * case.head_dim * (case.heads + 2 * case.kv_heads if level == "in" else case.heads)
    forward = Work(operations, model + kept + weights)
    # Reads the gradient, the input and the weights; writes the gradients of both, zeros for heads that are off.
    backward = Work(2 * operations, 2 * (model + kept) + weights + whole)
    return forward.times(FORWARD[case.direction]) + backward.times(BACKWARD[case.direction])


def work_of(case: GpuCase) -> dict[str, Work]:
    """The work of each part of a case."""
    if case.level == "attention":
        return {"attention": attention_work(case)}
    if case.level in ("in", "out"):
        return {case.level: projection_work(case, case.level)}
    return {
        "in": projection_work(case, "in"),
        "attention": attention_work(case),
        "out": projection_work(case, "out"),
    }


def total(parts: dict[str, Work]) -> Work:
    """The sum over parts."""
    return sum(parts.values(), Work(0, 0))


def compact(case: GpuCase) -> GpuCase:
    """A dense case with as many heads as a request of `case` has active on average, at least one group."""
    groups = max(1, round(case.active / case.group / case.batch))
    dense = replace(case, density=1.0, masks="shared", choice="scattered", gated=False)
    return replace(dense, heads=groups * case.group, kv_heads=groups, width=case.hidden)

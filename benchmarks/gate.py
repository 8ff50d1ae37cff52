"""The correctness gate: nothing is timed before its output has been compared with float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparse_heads.testing import assert_close_to_reference

from .timing import Candidate


@dataclass(frozen=True)
class Oracle:
    """The masked reference in float64, and the same computation done eagerly in the low precision."""

    reference: Tensor
    eager: Tensor


def wrong_candidates(candidates: Sequence[Candidate], oracles: dict[str, Oracle]) -> dict[str, str]:
    """Name and reason of every candidate whose output is not as good as its precision allows."""
    wrong = {}
    for one in candidates:
        if one.expects is None:
            continue
        if one.before is not None:
            one.before()
        oracle = oracles[one.expects]
        try:
            assert_close_to_reference(one.call(), oracle.eager, oracle.reference)
        except AssertionError as error:
            wrong[one.name] = str(error)
    return wrong

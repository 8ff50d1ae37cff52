"""The correctness gate: nothing is timed before its output has been compared with float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_heads.testing import assert_close_to_reference

from .timing import Candidate


@dataclass(frozen=True)
class Oracle:
    """The masked reference in float64, and the same computation done eagerly in the low precision."""

    reference: Tensor
    eager: Tensor

    def check(self, output: Tensor | list[Tensor]) -> None:
        """Fail unless `output`, or its parts put together, is as good as its precision allows."""
        together = torch.cat(output) if isinstance(output, list) else output
        assert_close_to_reference(together, self.eager, self.reference)


@dataclass(frozen=True)
class Tokens:
    """The tokens [B, T] that a greedy model has to give."""

    tokens: Tensor

    def check(self, output: Tensor) -> None:
        """Fail unless `output` holds these tokens."""
        if output.shape != self.tokens.shape:
            raise AssertionError(f"tokens {list(output.shape)}, wanted {list(self.tokens.shape)}")
        if not torch.equal(output, self.tokens):
            request, position = (output != self.tokens).nonzero()[0].tolist()
            raise AssertionError(f"another token than the oracle's, first at request {request}, position {position}")


def wrong_candidates(candidates: Sequence[Candidate], oracles: Mapping[str, Oracle | Tokens]) -> dict[str, str]:
    """Name and reason of every candidate whose output is not what its oracle wants."""
    wrong = {}
    for one in candidates:
        if one.expects is None:
            continue
        if one.before is not None:
            one.before()
        try:
            oracles[one.expects].check(one.call())
        except AssertionError as error:
            wrong[one.name] = str(error)
    return wrong

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
class Oracles:
    """An oracle for each of several outputs, by name."""

    parts: Mapping[str, Oracle]

    @classmethod
    def of(cls, references: Mapping[str, Tensor], eager: Mapping[str, Tensor]) -> Oracles:
        """From the references in float64 and the same computation done eagerly in the low precision."""
        return cls({name: Oracle(each.double(), eager[name]) for name, each in references.items()})

    def check(self, outputs: Mapping[str, Tensor]) -> None:
        """Fail unless these are the outputs, each as good as its precision allows."""
        if outputs.keys() != self.parts.keys():
            raise AssertionError(f"outputs {sorted(outputs)}, wanted {sorted(self.parts)}")
        for name, oracle in self.parts.items():
            try:
                oracle.check(outputs[name])
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None


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


def wrong_candidates(
    candidates: Sequence[Candidate], oracles: Mapping[str, Oracle | Oracles | Tokens]
) -> dict[str, str]:
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

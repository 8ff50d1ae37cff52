"""The exact relation between two quantified sentences, by enumeration of all models that could tell them apart.

A sentence says `quantifier (subject) (predicate)` of sets of individuals: a subject or a predicate is a set of words
that hold together, and a predicate may be negated. What words mean is how they exclude and imply each other. Whatever
a subject describes is taken to exist, as speakers do, so "all dogs run" entails "some dogs run".

All that two sentences can see of an individual is whether it is in their subjects and predicates: one of 16 cells. All
that they can see of a model is which cells are inhabited, so going through the sets of cells goes through all models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor

ENTAILMENT, NEUTRAL, CONTRADICTION = range(3)
LABELS = ("entailment", "neutral", "contradiction")
QUANTIFIERS = ("all", "some", "no", "not all")
Cell = tuple[bool, bool, bool, bool]  # in the premise's subject and predicate, in the hypothesis's
Overlap = frozenset[tuple[bool, bool]]


@dataclass(frozen=True)
class Sentence:
    """`quantifier` (one of QUANTIFIERS), and the words of subject and predicate; `negated` is the predicate's."""

    quantifier: str
    subject: tuple[str, ...]
    predicate: tuple[str, ...]
    negated: bool = False


@dataclass(frozen=True, eq=False)
class Meaning:
    """implied: of every word, those that hold wherever it does; excludes: whether two words never hold together.

    Words of subjects neither imply nor exclude words of predicates.
    """

    implied: Mapping[str, frozenset[str]]
    excludes: Callable[[str, str], bool]

    @cache  # noqa: B019
    def overlap(self, one: tuple[str, ...], other: tuple[str, ...]) -> Overlap:
        """Every possible answer to: is an individual in the set that `one` describes, and in that of `other`?"""
        words = sorted({*one, *other})
        answers = set()
        for choice in product((False, True), repeat=len(words)):
            held = {word for word, holds in zip(words, choice, strict=True) if holds}
            closed = all(word in held for each in held for word in self.implied[each] if word in words)
            if closed and not any(self.excludes(first, second) for first in held for second in held):
                answers.add((held.issuperset(one), held.issuperset(other)))
        return frozenset(answers)


def label(premise: Sentence, hypothesis: Sentence, meaning: Meaning) -> int:
    """ENTAILMENT: true in every model of the premise; CONTRADICTION: in none; NEUTRAL: in some."""
    subjects = meaning.overlap(premise.subject, hypothesis.subject)
    predicates = meaning.overlap(premise.predicate, hypothesis.predicate)
    return _label(subjects, predicates, premise.quantifier, premise.negated, hypothesis.quantifier, hypothesis.negated)


@cache
def _label(
    subjects: Overlap, predicates: Overlap, quantifier: str, negated: bool, other_quantifier: str, other_negated: bool
) -> int:
    cells = [(a, b, c, d) for a, c in sorted(subjects) for b, d in sorted(predicates)]
    models = torch.arange(2 ** len(cells))  # bit i: whether cell i is inhabited
    exist = _inhabited(models, cells, lambda cell: cell[0]) & _inhabited(models, cells, lambda cell: cell[2])
    of_premise = exist & _truth(models, cells, quantifier, negated, 0, 1)
    outcomes = _truth(models, cells, other_quantifier, other_negated, 2, 3)[of_premise]
    if outcomes.all():
        return ENTAILMENT
    return NEUTRAL if outcomes.any() else CONTRADICTION


def _inhabited(models: Tensor, cells: list[Cell], belongs: Callable[[Cell], bool]) -> Tensor:
    return models & sum(1 << index for index, cell in enumerate(cells) if belongs(cell)) != 0


def _truth(models: Tensor, cells: list[Cell], quantifier: str, negated: bool, subject: int, predicate: int) -> Tensor:
    both = _inhabited(models, cells, lambda cell: cell[subject] and cell[predicate] != negated)
    only_subject = _inhabited(models, cells, lambda cell: cell[subject] and cell[predicate] == negated)
    return {"all": ~only_subject, "some": both, "no": ~both, "not all": only_subject}[quantifier]

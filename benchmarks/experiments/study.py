"""What a study gives the runner: its plan as data, and for every seed a model with its data.

A study is a module of this folder with a `STUDY`, under its name in STUDIES.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sparse_heads import HeadScores
from sparse_heads.errors import SparseHeadsError, invalid

from .cells import Cell

Batch = Mapping[str, Any]
Metrics = dict[str, float | list[float]]  # a list has one number an example, always the same examples in one order

STUDIES = ("sentences", "nli", "dates")
FROZEN, TRAINED = "frozen", "trained"
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100  # of the trials alone, so that no final run was selected on


@dataclass(frozen=True)
class Method:
    """One row of a table.

    name: what the tables call it. runs: a name in `methods.CHOOSERS`. settings: what all its trials share.
    trials: settings that are tried on the development split; a single one where nothing is tuned.
    """

    name: str
    runs: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    trials: Sequence[Mapping[str, Any]] = ({},)

    @property
    def tuned(self) -> bool:
        return len(self.trials) > 1


@dataclass(frozen=True)
class Table:
    """One table of a study, and the cells that fill it.

    name: FROZEN (only gates train) or TRAINED (weights train: with the gates, or after the heads were chosen).
    counts: {heads kept: the count whose trials choose the hyperparameters for it}, in the order of running.
    steps: optimiser steps of every run that trains anything.
    """

    name: str
    methods: Sequence[Method]
    counts: Mapping[int, int]
    steps: int
    seeds: Sequence[int] = SEEDS

    def method(self, name: str) -> Method:
        return next(method for method in self.methods if method.name == name)


@dataclass(frozen=True)
class Study:
    """A study: its data for a seed, and its tables.

    prepare(seed, smoke): the Context of one seed; `smoke` asks for as little data (and as small a model) as runs.
    primary: the metric that trials and the primary claim are judged by; larger is better, one number an example.
    claim: the table, the count and the test split of the primary claim, fixed before any run.
    tests: names of the test splits, as in `Context.tests`.
    smoke: tables that run in a minute or so.
    """

    name: str
    title: str
    prepare: Callable[[int, bool], Context]
    primary: str
    tests: Sequence[str]
    tables: Sequence[Table]
    claim: Claim
    smoke: Sequence[Table]

    def table(self, name: str, smoke: bool = False) -> Table:
        return next(table for table in (self.smoke if smoke else self.tables) if table.name == name)


@dataclass(frozen=True)
class Claim:
    """What the primary claim compares with the best other method, all fixed before the runs."""

    table: str
    method: str
    kept: int
    test: str


@dataclass
class Context:
    """One seed of a study.

    model: dense, not attached, in eval mode; trained methods work on a copy, so it is the same for every cell.
    train: batches for gates and recovery in the order of the seed, repeated when the steps are more. They may carry
        keys that only `loss` understands.
    calibration: batches for scores in the order of the seed: what the model's forward takes (labels included).
    loss: loss(model, batch) of a batch of `train`: scalar, the mean over its examples.
    score_loss: the same for batches of `calibration`, for scores that need a loss; None where there are no labels.
    evaluate: evaluate(model, split) with the data of a split gives every metric; larger is better for all of them.
    development: data of the development split.
    tests: the test splits; only final cells open them.
    special_tokens: ids of [CLS], [SEP] and the like.
    facts: what else a cell should record of the data or the model (sizes, digests, the dense model's metrics).
    scores: scores that were computed for an earlier cell of the seed, and their seconds.
    """

    model: nn.Module
    train: Sequence[Batch]
    calibration: Sequence[Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    score_loss: Callable[[nn.Module, Batch], Tensor] | None
    evaluate: Callable[[nn.Module, Any], Metrics]
    development: Any
    tests: Sealed
    special_tokens: Sequence[int] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    scores: dict[str, tuple[HeadScores, float]] = field(default_factory=dict)


class Sealed:
    """Test splits by name, which nothing opens but a final cell."""

    def __init__(self, splits: Mapping[str, Any]) -> None:
        self._splits = dict(splits)

    def open(self, cell: Cell) -> dict[str, Any]:
        """Every test split; SparseHeadsError for a trial, which is judged on the development split alone."""
        if not cell.final:
            raise SparseHeadsError(f"test split: wanted a final cell, got the trial {cell.name}")
        return dict(self._splits)


def load_study(name: str) -> Study:
    """The study of that name; InvalidArgumentError for an unknown one."""
    if name not in STUDIES:
        raise invalid("study", f"one of {STUDIES}", repr(name))
    return importlib.import_module(f".{name}", __package__).STUDY

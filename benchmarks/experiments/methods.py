"""How every method chooses heads: from a study's context and a job to subsets, for frozen or trained weights."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import sparse_heads as sh
from sparse_heads.pruning.training import train

from .study import Context


@dataclass(frozen=True)
class Job:
    """What a cell asks of a method. trained: the weights may change, with the gates or after the choice."""

    method: str
    kept: int
    seed: int
    trained: bool
    steps: int
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """The heads that a method keeps, and the model they are for.

    label: the row of the tables; a method may have two, as gates that miss the count and the best of them at it.
    exact: whether the method promises the count.
    scale: [L, H] multiplies the outputs of kept heads, where gates end between 0 and 1; None: nothing does.
    steps: optimiser steps taken in all. seconds: what choosing took, recovery included.
    """

    label: str
    subset: sh.HeadSubset
    model: nn.Module
    scale: Tensor | None
    steps: int
    seconds: float
    exact: bool = True


def choose(context: Context, runs: str, job: Job) -> list[Choice]:
    """What the method leaves, by its entry in CHOOSERS."""
    return CHOOSERS[runs](context, job)


def by_scores(context: Context, job: Job) -> list[Choice]:
    """The best heads of one `score_heads`, and recovery where the weights train.

    settings: "score": {method and options}; "lr" of the recovery.
    """
    scores, seconds = scores_of(context, job.settings["score"], job.seed)
    return [finished(context, job, scores.top(job.kept), seconds)]


def by_chance(context: Context, job: Job) -> list[Choice]:
    """Random heads. settings: "draws": how many, each another row of the same label; "lr" of the recovery."""
    draws = job.settings["draws"]
    choices = []
    for draw in range(draws):
        scores, seconds = scores_of(context, {"method": "random", "seed": draw + draws * job.seed}, job.seed)
        choices.append(finished(context, job, scores.top(job.kept), seconds))
    return choices


def scores_of(context: Context, score: Mapping[str, Any], seed: int) -> tuple[sh.HeadScores, float]:
    """`score_heads` with these settings, once for all counts of a context; and the seconds it took.

    "needs" in the settings is no option of the method, but names those of "loss", "special_tokens" and "seed" that the
    context or the cell has.
    """
    key = json.dumps(dict(score), sort_keys=True)
    if key not in context.scores:
        options = dict(score)
        given = {"loss": context.score_loss, "special_tokens": tuple(context.special_tokens), "seed": seed}
        options |= {name: given[name] for name in options.pop("needs", ())}
        batches = None if options["method"] in ("random", "magnitude") else context.calibration
        began = perf_counter()
        scores = sh.score_heads(context.model, batches, **options)
        context.scores[key] = scores, perf_counter() - began
    return context.scores[key]


def finished(context: Context, job: Job, subset: sh.HeadSubset, seconds: float) -> Choice:
    """The subset on the dense weights, or on a copy that recovered for the job's steps."""
    if not job.trained:
        return Choice(job.method, subset, context.model, None, 0, seconds)
    model = copy.deepcopy(context.model)
    began = perf_counter()
    sh.recover(model, subset, context.train, steps=job.steps, lr=job.settings["lr"], loss=context.loss, seed=job.seed)
    model.eval()
    return Choice(job.method, subset, model, None, job.steps, seconds + perf_counter() - began)


def by_subset_gates(context: Context, job: Job) -> list[Choice]:
    """DSP, and its straight-through variant. settings: "estimator", "anneal" (share of the steps), "gate_lr", "lr"."""
    config = sh.DSPConfig(
        k=job.kept,
        mode="joint" if job.trained else "pipelined",
        estimator=job.settings["estimator"],
        anneal_steps=max(1, math.floor(job.settings.get("anneal", 1.0) * job.steps)),
        gate_lr=job.settings["gate_lr"],
        seed=job.seed,
    )
    gates, seconds = trained_gates(context, job, config)
    subset, model = gates.subset(), gates.handle.model
    gates.detach()
    return [Choice(job.method, subset, model.eval(), None, job.steps, seconds)]


def by_hard_concrete(context: Context, job: Job) -> list[Choice]:
    """L0 with a Lagrangian that steers to the count: as its gates end, and its best heads at exactly that count.

    settings: "initial", "gate_lr", "lr".
    """
    config = sh.HardConcreteConfig(
        target=job.kept,
        initial=job.settings["initial"],
        mode="joint" if job.trained else "pipelined",
        gate_lr=job.settings["gate_lr"],
        seed=job.seed,
    )
    gates, seconds = trained_gates(context, job, config)
    own, scale, best, model = gates.subset(), gates.scale(), gates.scores().top(job.kept), gates.handle.model
    gates.detach()
    model.eval()
    return [
        Choice(f"{job.method}, top k", best, model, None, job.steps, seconds),
        Choice(job.method, own, model, scale, job.steps, seconds, exact=False),
    ]


def trained_gates(context: Context, job: Job, config: Any) -> tuple[Any, float]:
    """Gates after the job's steps, still attached, and the seconds; on a copy of the model where the weights train.

    There every learning rate falls to 0 over the steps, as in recovery and in the published runs.
    """
    began = perf_counter()
    model = copy.deepcopy(context.model) if job.trained else context.model
    gates = sh.attach_gates(model, config)
    try:
        train(
            model,
            torch.optim.AdamW(gates.parameter_groups(lr=job.settings.get("lr"))),
            context.train,
            steps=job.steps,
            loss=context.loss,
            gates=gates,
            decay=job.trained,
            seed=job.seed,
            description="gates",
        )
    except BaseException:
        gates.detach()
        raise
    return gates, perf_counter() - began


CHOOSERS: dict[str, Callable[[Context, Job], list[Choice]]] = {
    "scores": by_scores,
    "chance": by_chance,
    "subset gates": by_subset_gates,
    "hard concrete": by_hard_concrete,
}

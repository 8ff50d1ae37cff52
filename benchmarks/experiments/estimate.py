"""How long the cells of a study will take, said before they run."""

from __future__ import annotations

import copy
from statistics import mean
from time import perf_counter

from .cells import Cell, Store
from .study import FROZEN, Context, Study, Table

WARM_STEPS, TIMED_STEPS = 1, 3


def estimated_minutes(study: Study, context: Context, store: Store, cells: list[Cell], smoke: bool) -> float:
    """Minutes for `cells`: what the same method took in cells that are there, else its steps at the measured pace.

    Scores of a kind that has not run yet count as a tenth of a training run.
    """
    known: dict[tuple[str, str], list[float]] = {}
    for content in store.all():
        known.setdefault((content["table"], content["method"]), []).append(content["seconds"])
    pace = step_seconds(context)
    tables = {table.name: table for table in (study.smoke if smoke else study.tables)}

    def seconds(cell: Cell) -> float:
        before = known.get((cell.table, cell.method))
        return mean(before) if before else guess(tables[cell.table], cell.method, pace)

    return sum(map(seconds, cells)) / 60


def guess(table: Table, method: str, pace: float) -> float:
    """Seconds of a cell whose like has not run yet; `pace`: of a step that trains nothing but gates."""
    run = table.steps * pace
    if table.name == FROZEN:
        return run if table.method(method).tuned else 0.1 * run
    return 1.5 * run


def step_seconds(context: Context) -> float:
    """Seconds of a forward and backward pass to the embeddings on a batch for training."""
    model = copy.deepcopy(context.model)
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    for index in range(WARM_STEPS + TIMED_STEPS):
        if index == WARM_STEPS:
            began = perf_counter()
        context.loss(model, context.train[index % len(context.train)]).backward()
    return (perf_counter() - began) / TIMED_STEPS

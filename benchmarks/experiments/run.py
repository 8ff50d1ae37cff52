"""Run the cells of a study that are not there yet: `python -m benchmarks.experiments.run --help`."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

import sparse_heads as sh
from sparse_heads.errors import NotFiniteError, SparseHeadsError

from ..environment import passport
from . import report
from .cells import RESULTS, Cell, Store, cells_of, judged, trials_behind
from .estimate import estimated_minutes
from .methods import Choice, Job, choose
from .study import STUDIES, TRAINED, TUNING_SEED, Context, Method, Metrics, Study, load_study


def all_cells(study: Study, smoke: bool) -> list[Cell]:
    """Every cell of the study in the order of running."""
    tables = study.smoke if smoke else study.tables
    return [cell for table in tables for cell in cells_of(study.name, table, TUNING_SEED)]


class Runner:
    """Runs cells of one study into a store; contexts stay, one a seed."""

    def __init__(self, study: Study, store: Store, smoke: bool) -> None:
        self.study, self.store, self.smoke = study, store, smoke
        self.contexts: dict[int, Context] = {}
        self.dense: dict[tuple[int, bool], dict[str, Any]] = {}
        self.passport = passport()

    def context(self, seed: int) -> Context:
        """The study's data for a seed, prepared once."""
        if seed not in self.contexts:
            self.contexts[seed] = self.study.prepare(seed, self.smoke)
        return self.contexts[seed]

    def dense_metrics(self, cell: Cell) -> dict[str, Any]:
        """Means of the model with all its heads, on the splits that the cell may see; measured once a seed."""
        key = cell.seed, cell.final
        if key not in self.dense:
            context = self.context(cell.seed)
            splits = {"development": context.development, **(context.tests.open(cell) if cell.final else {})}
            with torch.no_grad():
                self.dense[key] = {name: means(context.evaluate(context.model, one)) for name, one in splits.items()}
        return self.dense[key]

    def check_stored(self, cells: list[Cell]) -> None:
        """Raise SparseHeadsError for a cell that is there but was run on other data, weights, settings or smoke.

        Seeds would be paired, and trials compared, that do not belong together.
        """
        stored = [cell for cell in cells if self.store.has(cell)]
        for cell in stored:
            content = self.store.read(cell)
            method = self.study.table(cell.table, self.smoke).method(cell.method)
            wanted: dict[str, Any] = {"smoke": self.smoke, "facts": as_json(self.context(stored[0].seed).facts)}
            if not cell.final:
                wanted["settings"] = as_json({**method.settings, **method.trials[cell.trial]})
            for key, value in wanted.items():
                if content[key] != value:
                    raise SparseHeadsError(
                        f"{self.store.path(cell)}: wanted {key} {value}, as this run has, got {content[key]}; move the "
                        "cells of the other run away"
                    )

    def run(self, cell: Cell) -> dict[str, Any]:
        """Measure one cell and write its file; the content. SparseHeadsError for a cell that is there already.

        A method that ends in NaN leaves a cell without results that says so.
        """
        if self.store.has(cell):
            raise SparseHeadsError(f"{cell.name}: wanted a cell that was not run yet; its test is taken once")
        context = self.context(cell.seed)
        table = self.study.table(cell.table, self.smoke)
        method = table.method(cell.method)
        trial, behind = self.decide(cell, method)
        settings = {**method.settings, **method.trials[trial]}
        job = Job(cell.method, cell.kept, cell.seed, cell.table == TRAINED, table.steps, settings)
        content: dict[str, Any] = {
            "study": cell.study,
            "table": cell.table,
            "method": cell.method,
            "kept": cell.kept,
            "seed": cell.seed,
            "trial": cell.trial,
            "smoke": self.smoke,
            "settings": settings,
            "chosen_from": behind,
            "threads": torch.get_num_threads(),
            **self.passport,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "facts": dict(context.facts),
        }
        content["dense"] = self.dense_metrics(cell)
        began = perf_counter()
        try:
            choices = choose(context, method.runs, job)
            content["results"] = [self.measured(context, cell, choice) for choice in choices]
        except NotFiniteError as error:
            content |= {"failed": str(error), "results": []}
        content["seconds"] = round(perf_counter() - began, 2)
        self.store.write(cell, content)
        return content

    def decide(self, cell: Cell, method: Method) -> tuple[int, dict[str, float]]:
        """Which of the method's trials a cell runs, and what the development split said of all of them.

        Raises SparseHeadsError for a final cell with a trial that has not run.
        """
        if not cell.final:
            return cell.trial, {}
        table = self.study.table(cell.table, self.smoke)
        behind = trials_behind(cell, table, method, TUNING_SEED)
        missing = [one.name for one in behind if not self.store.has(one)]
        if missing:
            raise SparseHeadsError(f"{cell.name}: wanted the trials that choose its settings first, missing {missing}")
        found = [judged(self.store.read(one), self.study.primary) for one in behind]
        names = [one.name for one in behind]
        # NaN compares as nothing, so a trial that fell apart would win where it came first.
        comparable = [-math.inf if math.isnan(value) else value for value in found]
        return (comparable.index(max(comparable)) if found else 0), dict(zip(names, found, strict=True))

    def measured(self, context: Context, cell: Cell, choice: Choice) -> dict[str, Any]:
        """A choice's heads, and its metrics: of the development split, and for a final cell of the test splits.

        Raises SparseHeadsError for a method that promises the count and keeps another.
        """
        if choice.exact and choice.subset.count() != cell.kept:
            raise SparseHeadsError(f"{cell.name}: wanted exactly {cell.kept} heads, got {choice.subset.count()}")
        metrics = {"development": means(evaluate(context, choice, context.development))}
        if cell.final:
            for name, split in context.tests.open(cell).items():
                metrics[name] = kept_numbers(evaluate(context, choice, split), self.study.primary)
        return {
            "label": choice.label,
            "count": choice.subset.count(),
            "exact": choice.exact,
            "steps": choice.steps,
            "seconds": round(choice.seconds, 2),
            **metrics,
            "heads": choice.subset.kept(),
            "scale": None if choice.scale is None else [[round(x, 6) for x in row] for row in choice.scale.tolist()],
        }


def as_json(value: Any) -> Any:
    """`value` as it comes back from a file."""
    return json.loads(json.dumps(value))


def evaluate(context: Context, choice: Choice, split: Any) -> Metrics:
    """The study's metrics of a split under the chosen heads, by the library's own path."""
    handle = sh.attach(choice.model)
    try:
        with torch.no_grad(), handle.use_heads(choice.subset, scale=choice.scale):
            return context.evaluate(choice.model, split)
    finally:
        handle.detach()


def means(metrics: Metrics) -> dict[str, float]:
    """Every metric as one number."""
    return {name: sum(x) / len(x) if isinstance(x, list) else x for name, x in metrics.items()}


def kept_numbers(metrics: Metrics, primary: str) -> Metrics:
    """The primary metric with a number an example, to five digits; means of the others."""
    numbers = metrics[primary]
    return {**means(metrics), primary: [round(x, 5) for x in numbers] if isinstance(numbers, list) else numbers}


def pending(cells: list[Cell], store: Store, only: list[str]) -> list[Cell]:
    """The cells that have no file yet and whose names hold one of `only`, where it names any."""
    wanted = [cell for cell in cells if not only or any(part in cell.name for part in only)]
    return [cell for cell in wanted if not store.has(cell)]


def within_budget(cells: list[Cell], minutes: float | None) -> Iterator[Cell]:
    """The cells until the time is over; the one that is running then is finished."""
    began = perf_counter()
    progress = tqdm(cells, unit="cell")
    for cell in progress:
        if minutes is not None and perf_counter() - began > 60 * minutes:
            progress.write(f"{minutes:g} minutes are over; the next run goes on with {cell.name}")
            return
        progress.set_description(cell.name)
        yield cell


def run_study(name: str, smoke: bool, out: Path, only: list[str], minutes: float | None, threads: int) -> Store:
    """Run what is pending of a study; its store."""
    torch.set_num_threads(threads)
    study = load_study(name)
    store = Store(out / study.name)
    cells = all_cells(study, smoke)
    waiting = pending(cells, store, only)
    print(f"{study.name}: {len(cells)} cells, {len(waiting)} to run, into {store.folder}")
    runner = Runner(study, store, smoke)
    runner.check_stored(cells)
    if waiting:
        minutes_needed = estimated_minutes(study, runner.context(waiting[0].seed), store, waiting, smoke)
        print(f"estimate: {minutes_needed:.0f} minutes")
    for cell in within_budget(waiting, minutes):
        runner.run(cell)
    return store


def main(
    study: Annotated[str, typer.Argument(help=f"one of {', '.join(STUDIES)}")],
    smoke: Annotated[bool, typer.Option("--smoke", help="a few steps on little data: claims nothing")] = False,
    only: Annotated[list[str] | None, typer.Option(help="run cells whose name holds this: frozen-dsp")] = None,
    budget_minutes: Annotated[float | None, typer.Option(help="start no cell after so many minutes")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the results; a smoke test's is a temporary one")] = None,
    threads: Annotated[int, typer.Option(help="torch threads")] = 2,
) -> None:
    """Run the cells of a study that have no file yet, then write its tables and plots."""
    if out is None:
        out = Path(tempfile.mkdtemp(prefix="sparse-heads-smoke-")) if smoke else RESULTS
    if smoke and out.resolve() == RESULTS:
        raise typer.BadParameter("--out: wanted another folder for a smoke test than that of the results")
    store = run_study(study, smoke, out, only or [], budget_minutes, threads)
    print(report.write(load_study(study), store, smoke))


if __name__ == "__main__":
    typer.run(main)

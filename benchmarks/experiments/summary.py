"""What the cells of a study say: one line a method, count and test split, and differences between methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

from .statistics import Difference, holm, paired_difference
from .study import Claim

Content = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """A label's final runs at one count of one table, averaged over draws of one seed.

    exact: whether the method promises the count. count, seconds: means over all runs.
    metrics: {split: {metric: {seed: numbers, one an example or one}}}.
    """

    table: str
    kept: int
    label: str
    exact: bool
    count: float
    steps: int
    seconds: float
    trials: int
    metrics: dict[str, dict[str, dict[int, list[float]]]]

    def values(self, split: str, metric: str) -> dict[int, float]:
        """The metric of every seed."""
        return {seed: mean(numbers) for seed, numbers in self.metrics[split][metric].items()}


@dataclass(frozen=True)
class Comparison:
    """The claimed method minus another on one test split; `adjusted`: p after Holm's correction in its table."""

    table: str
    kept: int
    split: str
    label: str
    difference: Difference
    adjusted: float = 1.0

    @property
    def standing(self) -> str:
        """Where the interval lies: "ahead" above 0, "behind" below it, else "even"."""
        return "ahead" if self.difference.low > 0 else "behind" if self.difference.high < 0 else "even"


def lines_of(contents: Iterable[Content]) -> list[Line]:
    """The final cells as lines, by table, count and label in the order of coming."""
    grouped: dict[tuple[str, int, str], list[tuple[Content, Content]]] = {}
    for content in contents:
        if content["trial"] is None:
            for result in content["results"]:
                grouped.setdefault((content["table"], content["kept"], result["label"]), []).append((content, result))
    return [line_of(*key, runs) for key, runs in grouped.items()]


def line_of(table: str, kept: int, label: str, runs: Sequence[tuple[Content, Content]]) -> Line:
    """One line from pairs of a cell and one of its results."""
    splits = [name for name, value in runs[0][1].items() if isinstance(value, dict) and name != "heads"]
    metrics = {
        split: {
            metric: {seed: averaged(results, split, metric) for seed, results in by_seed(runs).items()}
            for metric in runs[0][1][split]
        }
        for split in splits
    }
    results = [result for _, result in runs]
    return Line(
        table,
        kept,
        label,
        exact=results[0]["exact"],
        count=mean(result["count"] for result in results),
        steps=results[0]["steps"],
        seconds=mean(result["seconds"] for result in results),
        trials=len(runs[0][0]["chosen_from"]),
        metrics=metrics,
    )


def by_seed(runs: Iterable[tuple[Content, Content]]) -> dict[int, list[Content]]:
    """The results of every seed, in the order of seeds."""
    found: dict[int, list[Content]] = {}
    for content, result in sorted(runs, key=lambda run: run[0]["seed"]):
        found.setdefault(content["seed"], []).append(result)
    return found


def averaged(results: Sequence[Content], split: str, metric: str) -> list[float]:
    """The mean over draws: a number an example, or one."""
    values = [result[split][metric] for result in results]
    lists = [value if isinstance(value, list) else [value] for value in values]
    return [mean(numbers) for numbers in zip(*lists, strict=True)]


def difference_of(ours: Line, other: Line, split: str, metric: str) -> Difference:
    """Ours minus the other's over the seeds that both have."""
    left, right = ours.metrics[split][metric], other.metrics[split][metric]
    seeds = sorted(left.keys() & right.keys())
    return paired_difference([left[seed] for seed in seeds], [right[seed] for seed in seeds])


def comparisons(lines: Sequence[Line], method: str, splits: Sequence[str], metric: str) -> list[Comparison]:
    """The method against every other with the exact count, at every count and split; Holm within each table."""
    found = []
    for ours in (line for line in lines if line.label == method):
        for other in same_cells(lines, ours):
            for split in splits:
                compared = difference_of(ours, other, split, metric)
                found.append(Comparison(ours.table, ours.kept, split, other.label, compared))
    corrected = []
    for table in dict.fromkeys(one.table for one in found):
        family = [one for one in found if one.table == table]
        adjusted = holm([one.difference.p for one in family])
        corrected += [replace(one, adjusted=p) for one, p in zip(family, adjusted, strict=True)]
    return corrected


def same_cells(lines: Sequence[Line], ours: Line) -> list[Line]:
    """The other labels of the same table and count that keep exactly that many and share a seed."""
    rivals = [line for line in lines if (line.table, line.kept) == (ours.table, ours.kept)]
    seeds = ours.metrics["development"]
    return [
        line
        for line in rivals
        if line.label != ours.label and line.exact and shared(seeds, line.metrics["development"])
    ]


def shared(left: dict[str, dict[int, Any]], right: dict[str, dict[int, Any]]) -> bool:
    """Whether two methods have a seed in common."""
    metric = next(iter(left))
    return bool(left[metric].keys() & right[metric].keys())


def best_other(lines: Sequence[Line], claim: Claim, metric: str) -> tuple[Line, Line] | None:
    """The claim's method, and the other one that the development split puts first; None while one is missing."""
    ours = [line for line in lines if (line.table, line.kept, line.label) == (claim.table, claim.kept, claim.method)]
    rivals = same_cells(lines, ours[0]) if ours else []
    if not rivals:
        return None
    return ours[0], max(rivals, key=lambda line: mean(line.values("development", metric).values()))


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation, for example `0.912 ± 0.003`."""
    numbers = list(values)
    return f"{mean(numbers):.3f}" + (f" ± {stdev(numbers):.3f}" if len(numbers) > 1 else "")

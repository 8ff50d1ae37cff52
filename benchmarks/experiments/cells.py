"""The cells of a study in the order of running, and their files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_heads._files import write_whole

if TYPE_CHECKING:
    from .study import Method, Table

RESULTS = Path(__file__).resolve().parent.parent / "results" / "experiments"


@dataclass(frozen=True)
class Cell:
    """One run: a method that keeps `kept` heads. trial: which of the method's trials, None for a final run."""

    study: str
    table: str
    method: str
    kept: int
    seed: int
    trial: int | None = None

    @property
    def final(self) -> bool:
        return self.trial is None

    @property
    def name(self) -> str:
        """The stem of the cell's file."""
        last = f"seed{self.seed}" if self.final else f"trial{self.trial}"
        return f"{self.table}-{re.sub('[^a-z0-9]+', '_', self.method.lower())}-{self.kept}-{last}"


def cells_of(study: str, table: Table, tuning_seed: int) -> Iterator[Cell]:
    """All cells of a table, so that stopping early leaves whole comparisons: a count's trials before its final runs,
    all methods for one seed before the next, the counts in the order of the table."""
    for kept in table.counts:
        if table.counts[kept] == kept:
            yield from trials_of(study, table, kept, tuning_seed)
        for seed in table.seeds:
            for method in table.methods:
                yield Cell(study, table.name, method.name, kept, seed)


def trials_of(study: str, table: Table, kept: int, tuning_seed: int) -> Iterator[Cell]:
    """The trials at one count: the first of every method that is tuned, then the second, and so on."""
    tuned = [method for method in table.methods if method.tuned]
    for trial in range(max((len(method.trials) for method in tuned), default=0)):
        for method in tuned:
            if trial < len(method.trials):
                yield Cell(study, table.name, method.name, kept, tuning_seed, trial)


def trials_behind(cell: Cell, table: Table, method: Method, tuning_seed: int) -> list[Cell]:
    """The trials that choose the settings of a final cell; none for a method that is not tuned."""
    if not method.tuned:
        return []
    decided_at = table.counts[cell.kept]
    trials = range(len(method.trials))
    return [Cell(cell.study, cell.table, cell.method, decided_at, tuning_seed, trial) for trial in trials]


class Store:
    """The cells of one study on disk: `folder/NAME.json`, each whole or absent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.json"

    def has(self, cell: Cell) -> bool:
        return self.path(cell).exists()

    def read(self, cell: Cell) -> dict[str, Any]:
        return json.loads(self.path(cell).read_text(encoding="utf-8"))

    def write(self, cell: Cell, content: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole({self.path(cell): to_json(content).encode()})

    def all(self) -> list[dict[str, Any]]:
        """Every cell's content, in the order of names."""
        return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.folder.glob("*.json"))]


def judged(content: dict[str, Any], metric: str) -> float:
    """What a trial is judged by, on the development split; NaN for one that failed."""
    return content["results"][0]["development"][metric] if content["results"] else math.nan


def to_json(content: dict[str, Any]) -> str:
    """JSON with one entry a line, and one result a line."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items() if key != "results"]
    results = ",\n".join(json.dumps(result) for result in content.get("results", []))
    return "{\n" + ",\n".join([*lines, f'"results": [\n{results}\n]']) + "\n}\n"

"""Does a report say what its cells say: the claim, the losses, the counts?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks.experiments import report
from benchmarks.experiments.cells import Cell, Store
from benchmarks.experiments.statistics import Difference
from benchmarks.experiments.study import FROZEN, TUNING_SEED, Claim, Method, Study, Table
from benchmarks.experiments.summary import Comparison

METHODS = (
    Method("DSP", "subset gates", {}, ({"gate_lr": 0.5}, {"gate_lr": 0.25})),
    Method("random", "chance"),
    Method("magnitude", "scores"),
    Method("L0", "hard concrete", {}, ({}, {})),
)
TABLE = Table(FROZEN, METHODS, {3: 3}, steps=7)
STUDY = Study(
    "tiny", "A title", lambda seed, smoke: None, "cosine", ("test",), (TABLE,), Claim(FROZEN, "DSP", 3, "test"), ()
)
EXAMPLES = (0.0, 0.01, 0.02, -0.01)


def result(label: str, kept: int, level: float, development: float | None = None) -> dict:
    metrics = {"cosine": [level + one for one in EXAMPLES], "recall": level / 2}
    return {
        "label": label,
        "count": kept,
        "exact": label != "L0",
        "steps": 7,
        "seconds": 2.0,
        "development": {"cosine": level if development is None else development, "recall": 0.0},
        "test": metrics,
        "heads": {"layer": [0]},
        "scale": None,
    }


def write(store: Store, cell: Cell, results: list[dict], behind: Mapping[str, float] | None = None) -> None:
    about = {
        "smoke": False,
        "settings": {},
        "dense": {"test": {"cosine": 1.0}},
        "chosen_from": behind or {},
        "threads": 2,
        "seconds": 36.0,
    }
    about |= {"date": "today", "machine": {"cpu": "a processor"}, "versions": {"torch": "2.13"}, "commit": "0" * 40}
    store.write(cell, {**vars(cell), **about, "dirty": False, "results": results})


def fill(
    store: Store, levels: Mapping[str, float], seeds: int = 5, development: Mapping[str, float] | None = None
) -> str:
    """Cells in which every method has its level, a little more with every seed; the report."""
    for seed in range(seeds):
        for label, level in levels.items():
            judged = (development or {}).get(label)
            write(store, Cell("tiny", FROZEN, label, 3, seed), [result(label, 3, level + seed / 1000, judged)])
    return report.write(STUDY, store)


def test_a_claim_that_holds(tmp_path: Path):
    text = fill(Store(tmp_path / "tiny"), {"DSP": 0.9, "random": 0.5, "magnitude": 0.7, "L0": 0.4})
    assert "The best other by the development split is magnitude: difference +0.2000 [+0.2000, +0.2000]" in text
    assert "ahead in 5 of 5 seeds. The claim holds." in text
    assert "Behind (0 of 2 comparisons): none. Even (0 of 2 comparisons): none." in text
    assert (tmp_path / "tiny.md").read_text() == text
    assert (tmp_path / "tiny-frozen.png").read_bytes().startswith(b"\x89PNG")


def test_a_claim_names_the_rivals_that_have_not_run(tmp_path: Path):
    text = fill(Store(tmp_path / "tiny"), {"DSP": 0.9, "random": 0.5})
    assert "**Not all rivals are there yet: magnitude, L0.**" in text
    assert "Not all rivals" not in fill(Store(tmp_path / "tiny"), {"magnitude": 0.7, "L0": 0.5})


def test_an_unfinished_run_decides_nothing(tmp_path: Path):
    text = fill(Store(tmp_path / "tiny"), {"DSP": 0.9, "random": 0.5, "magnitude": 0.7, "L0": 0.4}, seeds=1)
    assert "The claim is not decided before all cells have run." in text and "holds" not in text


def test_a_claim_that_fails_is_said_to_fail(tmp_path: Path):
    text = fill(Store(tmp_path / "tiny"), {"DSP": 0.6, "random": 0.5, "magnitude": 0.7, "L0": 0.4})
    assert "The claim fails: it is behind." in text
    assert "Behind (1 of 2 comparisons): magnitude at 3 (test)." in text


def test_the_rival_is_chosen_by_the_development_split(tmp_path: Path):
    levels = {"DSP": 0.6, "random": 0.5, "magnitude": 0.7}
    text = fill(Store(tmp_path / "tiny"), levels, development={"random": 0.99, "magnitude": 0.1})
    assert "The best other by the development split is random: difference +0.1000" in text


def test_few_seeds_are_unfinished(tmp_path: Path):
    text = fill(Store(tmp_path / "tiny"), {"DSP": 0.9, "random": 0.5}, seeds=2)
    assert "**Unfinished: 2 of 5 seeds.**" in text


def test_no_cells_decide_nothing(tmp_path: Path):
    (tmp_path / "tiny").mkdir()
    text = report.write(STUDY, Store(tmp_path / "tiny"))
    assert "Not decided: its cells have not run." in text and "No cells." in text


def test_a_row_has_its_numbers(tmp_path: Path):
    store = Store(tmp_path / "tiny")
    text = fill(store, {"DSP": 0.9, "magnitude": 0.7})
    (row,) = [line for line in text.splitlines() if line.startswith("| magnitude")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # 0.705 is the mean of the examples, 0.002 that of the seeds, 0.0016 the deviation of 0, 1, ..., 4 thousandths
    assert cells[:8] == ["magnitude", "3", "0", "7", "2", "5", "0.707 ± 0.002", "0.351 ± 0.001"]
    assert cells[8] == "+0.2000 [+0.2000, +0.2000]" and cells[10:] == ["5 of 5", "ahead"]


def test_draws_of_a_seed_are_averaged_and_other_counts_are_not_compared(tmp_path: Path):
    store = Store(tmp_path / "tiny")
    for seed in range(5):
        write(store, Cell("tiny", FROZEN, "DSP", 3, seed), [result("DSP", 3, 0.9)])
        draws = [result("random", 3, level) for level in (0.4, 0.6)]
        write(store, Cell("tiny", FROZEN, "random", 3, seed), draws)
        both = [result("L0, top k", 3, 0.8), result("L0", 3 if seed == 0 else 5, 0.95)]
        write(store, Cell("tiny", FROZEN, "L0", 3, seed), both)
    text = report.write(STUDY, store)
    assert "best other by the development split is L0, top k" in text
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "0.505" in rows["random"] and "+0.4000" in rows["random"]
    assert rows["L0"].split("|")[2].strip() == "4.6" and "ahead" not in rows["L0"]


def test_trials_are_listed(tmp_path: Path):
    store = Store(tmp_path / "tiny")
    for trial, level in enumerate((0.25, 0.75)):
        write(store, Cell("tiny", FROZEN, "DSP", 3, TUNING_SEED, trial), [result("DSP", 3, level)])
    write(store, Cell("tiny", FROZEN, "DSP", 3, 0), [result("DSP", 3, 0.9)], {"a": 0.25, "b": 0.75})
    text = report.write(STUDY, store)
    assert "| frozen | DSP | 3 | gate_lr 0.25 | 0.7500 |" in text
    assert re.search(r"\| DSP \| 3 \| 2 \| 7 \|", text)
    assert "3 cells, 0.03 hours; a processor, 2 threads; torch 2.13; commits 000000000000" in text


def test_dense_and_what_broke_are_reported(tmp_path: Path):
    store = Store(tmp_path / "tiny")
    write(store, Cell("tiny", FROZEN, "L0", 3, 0), [])
    content = {**store.read(Cell("tiny", FROZEN, "L0", 3, 0)), "failed": "loss: NaN"}
    store.write(Cell("tiny", FROZEN, "L0", 3, 0), content)
    text = fill(store, {"DSP": 0.9, "magnitude": 0.8})
    assert "With all heads, before any training: test: cosine 1.000." in text
    assert "Runs that broke (1 cells): frozen, L0, 3 heads, seed 0: loss: NaN." in text


def test_a_smoke_run_says_so(tmp_path: Path):
    store = Store(tmp_path / "tiny")
    fill(store, {"DSP": 0.9})
    assert "**A smoke run: it claims nothing.**" in report.write(STUDY, store, smoke=True)


@pytest.mark.parametrize("low, high, standing", [(0.1, 0.2, "ahead"), (-0.2, -0.1, "behind"), (-0.1, 0.1, "even")])
def test_standings(low: float, high: float, standing: str):
    difference = Difference((low + high) / 2, low, high, p=0.5, ahead=3, seeds=5)
    assert Comparison(FROZEN, 3, "test", "random", difference).standing == standing

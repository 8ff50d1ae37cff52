"""Do experiments run every cell once, tune on the development split alone, and leave only whole cells behind?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import build, inputs
from torch import Tensor, nn

from benchmarks.experiments import cells, methods, plans, run
from benchmarks.experiments.cells import Cell, Store, cells_of, trials_behind
from benchmarks.experiments.study import (
    FROZEN,
    STUDIES,
    TRAINED,
    TUNING_SEED,
    Claim,
    Context,
    Method,
    Metrics,
    Sealed,
    Study,
    Table,
    load_study,
)
from sparse_heads.errors import NotFiniteError, SparseHeadsError

SCORES = (plans.score("magnitude", method="magnitude"), plans.score("Michel", method="michel", needs=("loss",)))


def prepare(seed: int, smoke: bool) -> Context:
    """A tiny BERT that should keep its first token's state."""
    model = build("bert")
    batch = inputs(model)
    dense = model(**batch)[0][:, 0].detach()

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model(**batch)[0][:, 0] - dense).square().mean()

    def evaluate(model: nn.Module, split: float) -> Metrics:
        distance = (model(**batch)[0][:, 0] - dense).square().mean(-1)
        return {"closeness": (split - distance).tolist(), "worst": -distance.max().item()}

    tests = Sealed({"near": 0.0, "far": 5.0})
    return Context(model, [batch], [batch], loss, lambda model, batch: model(**batch)[0].mean(), evaluate, 1.0, tests)


def tiny_study() -> Study:
    """Two counts of 12 heads, the second with the settings of the first; two seeds and two trials."""
    trials = ({"gate_lr": 0.5}, {"gate_lr": 0.1})
    dsp = Method("DSP", "subset gates", {"estimator": "gumbel"}, trials)
    methods = (dsp, Method("random", "chance", {"draws": 2}), *SCORES)
    frozen = Table(FROZEN, methods, {3: 3, 6: 3}, steps=2, seeds=(0, 1))
    trained = Table(
        TRAINED,
        (
            Method("L0", "hard concrete", {"gate_lr": 0.1, "initial": 2.0}, ({"lr": 1e-3}, {"lr": 1e-2})),
            replace(SCORES[0], trials=({"lr": 1e-3}, {"lr": 1e-2})),
        ),
        {3: 3},
        steps=2,
        seeds=(0, 1),
    )
    claim = Claim(FROZEN, "DSP", 3, "near")
    return Study("tiny", "a title", prepare, "closeness", ("near", "far"), (frozen, trained), claim, ())


def run_cells(study: Study, folder: Path, only: list[str], monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(run, "load_study", lambda name: study)
    return run.run_study("tiny", False, folder, only, None, threads=2)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in (folder / "tiny").iterdir()}


@pytest.mark.parametrize("name", STUDIES)
def test_plans_are_complete_unique_and_fair(name: str):
    study = load_study(name)
    found = [cell for table in study.tables for cell in cells_of(name, table, TUNING_SEED)]
    assert len({cell.name for cell in found}) == len(found)
    for table in study.tables:
        finals = {(cell.method, cell.kept, cell.seed) for cell in found if cell.table == table.name and cell.final}
        wanted = {(method.name, kept, seed) for method in table.methods for kept in table.counts for seed in range(5)}
        assert finals == wanted
        assert len({len(method.trials) for method in table.methods if method.tuned}) == 1, "unequal trials"
    assert all(method.tuned for method in study.table(TRAINED).methods)
    assert {method.name for method in study.table(FROZEN).methods if method.tuned} == {"DSP", "straight-through", "L0"}
    assert study.claim.kept in study.table(study.claim.table).counts and study.claim.test in study.tests
    assert TUNING_SEED not in study.table(FROZEN).seeds


@pytest.mark.parametrize("name", STUDIES)
def test_trials_come_before_the_final_cells_that_they_decide(name: str):
    study = load_study(name)
    for table in study.tables:
        done: set[str] = set()
        for cell in cells_of(name, table, TUNING_SEED):
            if cell.final:
                behind = trials_behind(cell, table, table.method(cell.method), TUNING_SEED)
                assert {one.name for one in behind} <= done
            done.add(cell.name)


def test_stopping_early_leaves_whole_seeds():
    table = tiny_study().tables[0]
    finals = [cell for cell in cells_of("tiny", table, TUNING_SEED) if cell.final]
    assert [(cell.kept, cell.seed) for cell in finals[:: len(table.methods)]] == [(3, 0), (3, 1), (6, 0), (6, 1)]


def test_a_study_runs_and_only_what_is_missing_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    study = tiny_study()
    store = run_cells(study, tmp_path, [], monkeypatch)
    wanted = {f"{cell.name}.json" for table in study.tables for cell in cells_of("tiny", table, TUNING_SEED)}
    assert names_in(tmp_path) == wanted
    for content in store.all():
        final = content["trial"] is None
        for result in content["results"]:
            splits = {"development", "near", "far"} if final else {"development"}
            assert {name for name, value in result.items() if isinstance(value, dict)} - {"heads"} == splits
            assert result["exact"] == (result["label"] != "L0")
            assert not result["exact"] or result["count"] == content["kept"] == sum(map(len, result["heads"].values()))
            assert not final or len(result["near"]["closeness"]) == 3
            trains = content["table"] == TRAINED or content["method"] == "DSP"
            assert result["steps"] == (2 if trains else 0)
        assert {"machine", "versions", "commit", "seconds", "settings", "threads"} <= content.keys()
    labels = [result["label"] for result in store.read(Cell("tiny", TRAINED, "L0", 3, 0))["results"]]
    assert labels == ["L0, top k", "L0"]

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny").iterdir()}
    missing = store.path(Cell("tiny", FROZEN, "magnitude", 6, 1))
    missing.unlink()
    run_cells(study, tmp_path, [], monkeypatch)
    changed = {path for path in before if path.stat().st_mtime_ns != before[path]}
    assert changed == {missing}


def test_frozen_methods_leave_the_model_alone_and_trained_ones_work_on_a_copy(tmp_path: Path):
    study = tiny_study()
    runner = run.Runner(study, Store(tmp_path), smoke=False)
    context = runner.context(0)
    before = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    for cell in (Cell("tiny", FROZEN, "magnitude", 3, 0), Cell("tiny", TRAINED, "magnitude", 3, TUNING_SEED, 0)):
        runner.contexts[TUNING_SEED] = context
        runner.run(cell)
    for name, tensor in context.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.requires_grad for parameter in context.model.parameters())


def test_a_final_cell_takes_the_settings_that_did_best_on_the_development_split(tmp_path: Path):
    runner = run.Runner(tiny_study(), Store(tmp_path), smoke=False)
    method = runner.study.tables[0].method("DSP")
    final = Cell("tiny", FROZEN, "DSP", 6, 1)
    for trial, value in enumerate((0.25, 0.75)):
        result = {"development": {"closeness": value}}
        runner.store.write(Cell("tiny", FROZEN, "DSP", 3, TUNING_SEED, trial), {"results": [result]})
    assert runner.decide(final, method) == (1, {"frozen-dsp-3-trial0": 0.25, "frozen-dsp-3-trial1": 0.75})
    assert runner.decide(Cell("tiny", FROZEN, "DSP", 3, TUNING_SEED, 0), method) == (0, {})
    assert runner.decide(Cell("tiny", FROZEN, "random", 3, 0), runner.study.tables[0].method("random")) == (0, {})


def test_a_trial_that_gave_nan_never_wins(tmp_path: Path):
    runner = run.Runner(tiny_study(), Store(tmp_path / "tiny"), smoke=False)
    method = runner.study.tables[0].method("DSP")
    for trial, value in enumerate((float("nan"), 0.25)):
        cell = Cell("tiny", FROZEN, "DSP", 3, TUNING_SEED, trial)
        runner.store.write(cell, {"results": [{"development": {"closeness": value}}]})
    assert runner.decide(Cell("tiny", FROZEN, "DSP", 3, 0), method)[0] == 1


def test_a_final_cell_waits_for_its_trials(tmp_path: Path):
    runner = run.Runner(tiny_study(), Store(tmp_path), smoke=False)
    with pytest.raises(SparseHeadsError, match="frozen-dsp-3-seed0: wanted the trials that choose its settings fir"):
        runner.run(Cell("tiny", FROZEN, "DSP", 3, 0))


def test_a_trial_cannot_open_the_test_splits():
    sealed = Sealed({"test": 1})
    with pytest.raises(SparseHeadsError, match="wanted a final cell, got the trial frozen-dsp-3-trial1"):
        sealed.open(Cell("tiny", FROZEN, "DSP", 3, TUNING_SEED, 1))
    assert sealed.open(Cell("tiny", FROZEN, "DSP", 3, 0)) == {"test": 1}


def test_a_cell_that_is_there_is_not_run_again(tmp_path: Path):
    runner = run.Runner(tiny_study(), Store(tmp_path), smoke=False)
    cell = Cell("tiny", FROZEN, "magnitude", 3, 0)
    runner.run(cell)
    with pytest.raises(SparseHeadsError, match="magnitude-3-seed0: wanted a cell that was not run yet"):
        runner.run(cell)


def test_a_method_that_breaks_its_promise_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runner = run.Runner(tiny_study(), Store(tmp_path), smoke=False)

    def one_more(context: Context, runs: str, job: methods.Job) -> list[methods.Choice]:
        return methods.choose(context, runs, replace(job, kept=job.kept + 1))

    monkeypatch.setattr(run, "choose", one_more)
    with pytest.raises(SparseHeadsError, match="frozen-magnitude-3-seed0: wanted exactly 3 heads, got 4"):
        runner.run(Cell("tiny", FROZEN, "magnitude", 3, 0))
    assert not list(tmp_path.iterdir())


def test_a_method_that_breaks_leaves_a_cell_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runner = run.Runner(tiny_study(), Store(tmp_path), smoke=False)

    def broken(*arguments: object) -> None:
        raise NotFiniteError("loss: NaN")

    monkeypatch.setattr(run, "choose", broken)
    trials = [Cell("tiny", FROZEN, "DSP", 3, TUNING_SEED, trial) for trial in (0, 1)]
    assert runner.run(trials[0])["failed"] == "loss: NaN" and runner.store.read(trials[0])["results"] == []
    monkeypatch.undo()
    runner.run(trials[1])
    assert runner.decide(Cell("tiny", FROZEN, "DSP", 3, 0), tiny_study().table(FROZEN).method("DSP"))[0] == 1


def test_the_dense_model_is_measured_on_the_splits_that_a_cell_may_see(tmp_path: Path):
    runner = run.Runner(tiny_study(), Store(tmp_path), smoke=False)
    trial = runner.run(Cell("tiny", FROZEN, "DSP", 3, TUNING_SEED, 0))
    assert {name: value["worst"] for name, value in trial["dense"].items()} == {"development": pytest.approx(0)}
    final = runner.run(Cell("tiny", FROZEN, "magnitude", 3, 0))["dense"]
    assert [final[name]["closeness"] for name in ("development", "near", "far")] == [
        pytest.approx(x) for x in (1, 0, 5)
    ]


@pytest.mark.parametrize(
    "key, value", [("smoke", True), ("facts", {"texts": "others"}), ("settings", {"gate_lr": 9.0})]
)
def test_cells_of_another_run_are_refused(key: str, value: object, tmp_path: Path):
    runner = run.Runner(tiny_study(), Store(tmp_path), smoke=False)
    cell = Cell("tiny", FROZEN, "DSP", 3, TUNING_SEED, 0)
    runner.run(cell)
    runner.check_stored([cell])
    runner.store.write(cell, {**runner.store.read(cell), key: value})
    with pytest.raises(SparseHeadsError, match=f"wanted {key} .*, as this run has, got"):
        runner.check_stored([cell])


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_an_interrupted_write_leaves_no_cell(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"sparse_heads._files.os.{failing}", interrupted)
    store, cell = Store(tmp_path), Cell("tiny", FROZEN, "magnitude", 3, 0)
    with pytest.raises(KeyboardInterrupt):
        store.write(cell, {"results": []})
    assert not store.has(cell) and not list(tmp_path.iterdir())


def test_cells_survive_json(tmp_path: Path):
    content = {"study": "tiny", "seconds": 1.5, "results": [{"label": "a", "near": {"x": [0.5, 1.0]}}, {"label": "b"}]}
    assert json.loads(cells.to_json(content)) == content
    assert json.loads(cells.to_json({"study": "tiny", "results": []})) == {"study": "tiny", "results": []}


def test_a_budget_of_no_minutes_runs_one_cell_at_most(tmp_path: Path):
    waiting = [Cell("tiny", FROZEN, "random", 3, seed) for seed in range(3)]
    assert len(list(run.within_budget(waiting, 0.0))) <= 1
    assert list(run.within_budget(waiting, None)) == waiting


def test_only_chooses_by_name(tmp_path: Path):
    waiting = [Cell("tiny", FROZEN, method, 3, 0) for method in ("random", "DSP", "magnitude")]
    chosen = run.pending(waiting, Store(tmp_path), ["frozen-dsp", "magni"])
    assert [cell.method for cell in chosen] == ["DSP", "magnitude"]


def test_a_smoke_run_never_writes_among_the_results():
    with pytest.raises(Exception, match="wanted another folder for a smoke test"):
        run.main("sentences", smoke=True, out=cells.RESULTS)


def test_an_unknown_study_is_an_error():
    with pytest.raises(ValueError, match="study: wanted one of .*'sentences'.*, got 'poems'"):
        load_study("poems")

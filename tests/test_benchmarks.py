"""Do the benchmarks refuse wrong outputs, and do their intervals and reports say what the samples say?"""

from __future__ import annotations

import json
from dataclasses import replace
from time import sleep

import numpy
import pytest
import torch
import typer

from benchmarks import baselines, environment, figures, report, run
from benchmarks.candidates import candidates_of, own_attention, random_model
from benchmarks.cases import KEPT_HEADS, SUITES, Case, model_case
from benchmarks.gate import wrong_candidates
from benchmarks.statistics import Estimate, estimate, geometric_mean, median_replicates
from benchmarks.timing import Candidate, interleave

BLOCK = Case("block", 48, (5, 5), (KEPT_HEADS[3],))
MODEL = model_case(48, (3, 7), (6, 1), "demo")


def tiny_result(ours: float, repacked: float) -> dict:
    """A result file's content: one block case at 3 heads and one at 12, every sample the same."""
    times = {"repacked": repacked, "repacked_fused": 2 * repacked, "ours": ours, "ours_first": ours, "set_heads": 1.0}
    times |= dict.fromkeys(("dense", "dense_fused", "mask_only", "slice"), 30.0)
    candidates = {name: {"median": value, "samples": [value] * 6} for name, value in times.items()}
    shape = {"level": "block", "label": "", "hidden": 384, "batch": 1, "tokens": 16, "heads": 12, "wrong": {}}
    cases = [{**shape, "name": f"case{count}", "kept_count": count, "candidates": candidates} for count in (3, 12)]
    machine = {"cpu": "a processor", "cores": 2, "torch_capability": "AVX512", "flags": [], "system": "an OS"}
    about = {"suite": "block", "quick": False, "rounds": 6, "threads": 2, "seconds": 1, "date": "today", "dirty": False}
    about |= {
        "commit": "0" * 40,
        "versions": {"torch": "2.13"},
        "cpu_extension": "available",
        "load": 0.1,
        "machine": machine,
    }
    return {**about, "import": {"samples": [0.1] * 6, "loads": []}, "cases": cases}


def test_drift_that_all_candidates_share_leaves_no_interval():
    drift = numpy.random.default_rng(0).lognormal(0, 1, 30)
    ours, repacked = median_replicates([2 * drift, drift], seed=0)
    found = estimate(repacked / ours)
    assert found.value == found.low == found.high == 0.5


def test_interval_covers_the_true_ratio_nineteen_times_in_twenty():
    draws, covered = numpy.random.default_rng(1), 0
    for seed in range(150):
        ours, repacked = median_replicates([draws.lognormal(0, 0.2, 30), 2 * draws.lognormal(0, 0.2, 30)], seed)
        found = estimate(repacked / ours)
        covered += found.low <= 2 <= found.high
    assert 132 <= covered <= 150  # 142.5 expected; 4 binomial standard deviations (2.7) below


def test_geometric_mean_takes_replicates_case_by_case():
    assert geometric_mean([numpy.array([1.0, 4.0]), numpy.array([4.0, 9.0])]).tolist() == pytest.approx([2.0, 6.0])


@pytest.mark.parametrize(("low", "high", "met"), [(0.8, 0.92, False), (0.8, 0.93, True), (0.95, 1.0, True)])
def test_a_figure_fails_only_when_its_whole_interval_is_past_the_limit(low: float, high: float, met: bool):
    assert figures.Figure("speed", 0.93, Estimate(0.9, low, high), at_least=True).met is met
    assert figures.Figure("time", -0.93, Estimate(-0.9, -high, -low), at_least=False).met is met


def test_every_round_runs_every_candidate_once_and_leaves_out_what_is_before():
    calls = []
    slow = Candidate("slow", lambda: calls.append("slow"), before=lambda: sleep(0.002))
    samples = interleave([slow, Candidate("fast", lambda: sleep(0.0005))], rounds=4, sample_seconds=0.0, seed=0)
    assert {name: len(values) for name, values in samples.items()} == {"slow": 4, "fast": 4}
    assert len(calls) == 3 + 4  # three to estimate
    assert max(samples["slow"]) < 0.0005 <= min(samples["fast"])


def test_case_names_are_unique():
    names = [case.name for case in SUITES["cpu"]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", [BLOCK, MODEL], ids=["block", "model with padding"])
def test_every_candidate_matches_the_float64_reference(case: Case):
    with torch.no_grad():
        candidates, oracles = candidates_of(case)
        assert wrong_candidates(candidates, oracles) == {}
    assert {one.name for one in candidates} >= {"dense", "repacked", "ours", "ours_first", "set_heads"}


def test_dense_and_kept_oracles_differ():
    with torch.no_grad():
        _, oracles = candidates_of(BLOCK)
    assert not torch.allclose(oracles["all heads"].reference, oracles["kept heads"].reference, atol=1e-2)


def test_copies_share_only_what_is_not_attention():
    model = random_model(48, 1)
    copied = own_attention(model)
    layer, same = model.encoder.layer[0], copied.encoder.layer[0]
    assert layer.intermediate.dense.weight is same.intermediate.dense.weight
    assert layer.attention.self.query.weight is not same.attention.self.query.weight


def test_a_wrong_candidate_is_not_timed_and_the_run_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(baselines.MASKED, "slice", baselines.dense)
    monkeypatch.setitem(run.SUITES, "block", (BLOCK, replace(BLOCK, kept=(KEPT_HEADS[12],))))
    monkeypatch.setattr(run, "import_times", lambda rounds: {"samples": [0.1] * rounds, "loads": []})
    with pytest.raises(typer.Exit) as exit:
        run.main(suite="block", out=tmp_path, name="", rounds=30, threads=torch.get_num_threads(), quick=True)
    assert exit.value.exit_code == 1
    assert "slice" in capsys.readouterr().err
    result = json.loads((tmp_path / "block-quick.json").read_text())
    assert list(result["cases"][0]["wrong"]) == ["slice"]
    assert "slice" not in result["cases"][0]["candidates"]
    assert len(result["cases"][0]["candidates"]["ours"]["samples"]) == 5
    assert "Wrong outputs" in (tmp_path / "block-quick.md").read_text()


def test_an_interrupted_run_goes_on_where_it_stopped(monkeypatch, tmp_path):
    cases = (BLOCK, replace(BLOCK, kept=(KEPT_HEADS[12],)))
    monkeypatch.setattr(run, "import_times", lambda rounds: {"samples": [0.1] * rounds, "loads": []})
    ran = []

    def measure(case: Case, *_: object) -> dict:
        if len(ran) == 1:
            ran.append("stopped")
            raise KeyboardInterrupt
        ran.append(case.name)
        return {"name": case.name}

    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setitem(run.SUITES, "block", cases)
    path, arguments = tmp_path / "block.json", ("block", 5, torch.get_num_threads(), True)
    with pytest.raises(KeyboardInterrupt):
        run.run_suite(*arguments, path)
    assert [case["name"] for case in json.loads(path.read_text())["cases"]] == [cases[0].name]
    run.run_suite(*arguments, path, resume=True)
    assert ran == [cases[0].name, "stopped", cases[1].name]
    assert [case["name"] for case in json.loads(path.read_text())["cases"]] == [case.name for case in cases]
    with pytest.raises(typer.BadParameter, match="--resume: .* has rounds 5, this run has 6"):
        run.run_suite("block", 6, *arguments[2:], path, resume=True)


def test_unknown_suite_is_named():
    with pytest.raises(typer.BadParameter, match=r"--suite: wanted one of .*'block'.*got 'gpu'"):
        run.main(suite="gpu")


def test_report_of_a_result_file(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(tiny_result(ours=12.5, repacked=10.0)))
    verdicts = report.write(path)
    text = (tmp_path / "tiny.md").read_text()
    assert verdicts in text
    assert verdicts.count("0.800 [0.800, 0.800]") == 4  # warm and first call: geometric mean, slowest case
    assert verdicts.count("**missed**") == 2  # 0.8 is below 0.93 and above 0.75
    assert "| 384 | 1x16 | 3 | 10 | 12 | 0.800 [0.800, 0.800] | slower | 0.80 | 0.33 |" in text
    assert "2 of 2 cases" in text and "with changes" not in text
    assert (tmp_path / "tiny-block.png").read_bytes().startswith(b"\x89PNG")


def test_all_heads_on_may_cost_three_percent_or_five_microseconds():
    allowed = figures.overhead_figures(tiny_result(ours=34.9, repacked=10.0))  # dense takes 30
    assert allowed[0].met and not figures.overhead_figures(tiny_result(ours=35.1, repacked=10.0))[0].met


def test_import_time_is_that_of_a_fresh_process():
    found = environment.import_times(1)
    assert len(found["samples"]) == 1 and 0 < found["samples"][0] < 60
    assert found["loads"] == []

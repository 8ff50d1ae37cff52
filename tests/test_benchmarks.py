"""Do the benchmarks refuse wrong outputs, and do their intervals and reports say what the samples say?"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from time import perf_counter, sleep

import numpy
import pytest
import torch
import typer

from benchmarks import baselines, environment, figures, report, run
from benchmarks.cases import (
    KEPT_HEADS,
    AnyCase,
    Case,
    DecodeCase,
    GatesCase,
    GenerateCase,
    GqaCase,
    RequestsCase,
    independent,
)
from benchmarks.gate import Oracle, Oracles, Tokens, wrong_candidates
from benchmarks.models import own_attention, random_bert
from benchmarks.statistics import Estimate, estimate, geometric_mean, median_replicates
from benchmarks.suites import DECODE, GATES, GQA, GROUPS, SUITES, Suite, model_case
from benchmarks.timing import Candidate, Stopwatch, interleave
from sparse_heads.testing import items_run

BLOCK = Case("block", 48, (5, 5), (KEPT_HEADS[3],))
MODEL = model_case(48, (3, 7), (6, 1), "demo")
REQUESTS = RequestsCase(48, 5, (KEPT_HEADS[3], KEPT_HEADS[1], KEPT_HEADS[12]), "independent")
EQUAL = RequestsCase(48, 5, (KEPT_HEADS[6],) * 3, "equal")
GROUPED = GqaCase(6, 2, 5, 7, ((3, 4, 5), (0, 4), ()), "groups")
DECODING = DecodeCase(6, 2, 8, "float32", (40, 7, 16), ((3, 4, 5), (0, 4), ()), "groups")
GENERATE = GenerateCase(48, 2, 3, 9, 6)
ONE_SENTENCE = replace(GENERATE, batch=1)
GATED = {label: GatesCase(48, 2, 24, 2, 5, label) for label in ("joint", "pipelined", "zeros", "sweep")}
EVERY_KIND = {
    "block": BLOCK,
    "model with padding": MODEL,
    "requests": REQUESTS,
    "equal requests": EQUAL,
    "grouped queries": GROUPED,
    "decode": DECODING,
    "decode from pages": replace(DECODING, lengths=(32, 9, 16), page_size=16, dtype="bfloat16"),
    "generate": GENERATE,
    "generate, batch 1": ONE_SENTENCE,
    **GATED,
}
TIMED = {
    "block": {"dense", "repacked", "ours", "ours_first", "set_heads"},
    "model": {"dense", "repacked", "ours", "ours_first", "set_heads", "ceiling"},
    "requests": {"dense", "dense_fused", "mask_only", "reference", "alone", "alone_fused", "ours", "ours_first"},
    "gqa": {"ours", "all_on", "no_mask", "sdpa_gqa", "sdpa_repeated", "sliced", "alone"},
    "decode": {"ours", "all_on", "no_mask", "sdpa", "read"},
    "generate": {"dense", "mask_only", "repacked", "repacked_fused", "ours"},
    "gates": {"dense", "ours"},
}


def entry(case: AnyCase, times: dict[str, float]) -> dict:
    """A case in a result file, every sample of a candidate the same."""
    candidates = {name: {"median": value, "samples": [value] * 6} for name, value in times.items()}
    return {"name": case.name, "level": case.level, **case.facts(), "wrong": {}, "candidates": candidates}


def result_of(*cases: dict) -> dict:
    """A result file's content."""
    machine = {"cpu": "a processor", "cores": 2, "torch_capability": "AVX512", "flags": [], "system": "an OS"}
    about = {"suite": "tiny", "quick": False, "rounds": 6, "threads": 2, "seconds": 1, "date": "today", "dirty": False}
    about |= {"commit": "0" * 40, "versions": {"torch": "2.13"}, "cpu_extension": "available", "load": 0.1}
    return {**about, "machine": machine, "cases": list(cases)}


def block_result(ours: float, repacked: float) -> dict:
    """One block case at 3 heads and one at 12."""
    times = {"repacked": repacked, "repacked_fused": 2 * repacked, "ours": ours, "ours_first": ours, "set_heads": 1.0}
    times |= dict.fromkeys(("dense", "dense_fused", "mask_only", "slice"), 30.0)
    cases = [Case("block", 384, (16,), (KEPT_HEADS[count],)) for count in (3, 12)]
    return result_of(*(entry(case, times) for case in cases)) | {"import": {"samples": [0.1] * 6, "loads": []}}


def requests_result(ours: float, dense: float = 30.0, alone: float = 20.0, shared: float = 18.0) -> dict:
    """The main shape with a random half, with equal heads and with all heads on."""
    times = {"ours": ours, "ours_first": ours, "ours_shared": shared, "dense": dense, "alone": alone, "set_heads": 1.0}
    times |= {"alone_fused": 2 * alone, "dense_fused": dense, "mask_only": dense, "reference": dense}
    chosen = {"independent": independent(8, 0.5, 0), "equal": (KEPT_HEADS[6],) * 8, "all": (KEPT_HEADS[12],) * 8}
    return result_of(*(entry(RequestsCase(768, 128, kept, label), times) for label, kept in chosen.items()))


def gqa_result(ours: float) -> dict:
    """Attention with grouped queries of 1024 tokens, whole groups and scattered heads off."""
    times = {"ours": ours, "sliced": 25.0, "alone": 20.0, "sdpa_gqa": 80.0, "sdpa_repeated": 60.0}
    cases = [one for one in GQA if one.tokens == 1024 and one.num_heads == 12]
    return result_of(*(entry(case, times | {"all_on": 36.0, "no_mask": 36.0}) for case in cases))


def decode_result(ours: float = 20.0, all_on: float = 36.0, sdpa: float = 40.0) -> dict:
    """All decode cases, a plain read 34 microseconds."""
    times = {"ours": ours, "all_on": all_on, "no_mask": all_on, "sdpa": sdpa, "read": 34.0}
    return result_of(*(entry(case, times) for case in DECODE))


def generate_result(ours: float, dense: float = 32.0) -> dict:
    """One case in which attention takes `ours` and `dense` microseconds, the call ten times that."""
    times = {}
    for name, value in (("ours", ours), ("dense", dense), ("mask_only", dense), ("repacked", 1.0)):
        times |= {name: 10 * value, f"{name}_attention": value}
        times |= {f"{name}_attention_prefill": value / 4, f"{name}_attention_decode": value * 3 / 4}
    return result_of(entry(ONE_SENTENCE, times))


def gates_result(step: float = 10.5, zeros: float = 6.6, sweep: float = 6.0) -> dict:
    """A case of each kind, dense 10 milliseconds."""
    times = {"joint": step, "pipelined": step, "zeros": zeros, "sweep": sweep}
    return result_of(
        *(
            entry(case, {"dense": 1e4, "ours": 1e3 * times[label]} | ({"ours_loss": 5e3} if label == "sweep" else {}))
            for label, case in GATED.items()
        )
    )


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


def test_parts_of_a_call_are_series_of_their_own():
    stopwatch = Stopwatch("half")

    def call() -> None:
        start = perf_counter()
        sleep(0.001)
        stopwatch.seconds["half"] += perf_counter() - start
        sleep(0.001)

    samples = interleave([Candidate("call", call, stopwatch=stopwatch)], rounds=3, sample_seconds=0.005, seed=0)
    assert list(samples) == ["call", "call_half"] and len(samples["call_half"]) == 3
    assert all(0.001 <= half <= whole - 0.001 for whole, half in zip(*samples.values(), strict=True))


def test_case_names_are_unique():
    for suite in SUITES.values():
        names = [case.name for case in suite.cases]
        assert len(set(names)) == len(names)
        assert suite.quick and suite.rounds >= 10


def test_independent_heads_have_exactly_the_density_and_differ_by_request():
    kept = independent(8, 0.25, seed=3)
    assert sum(map(len, kept)) == 24 and all(kept) and len(set(kept)) > 4
    assert kept == independent(8, 0.25, seed=3) != independent(8, 0.25, seed=4)


def test_grouped_cases_switch_off_half_the_groups_or_no_whole_one():
    for case in GQA:
        group = case.num_heads // case.kv_heads
        groups_on = [len({head // group for head in heads}) for heads in case.kept]
        assert 2 * case.kept_count == case.all_count
        assert groups_on == [case.kv_heads // (2 if case.label == "groups" else 1)] * case.batch


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_candidate_gives_what_its_oracle_wants(kind: str):
    case = EVERY_KIND[kind]
    with torch.no_grad():
        candidates, oracles = run.CANDIDATES_OF[case.level](case)
        assert wrong_candidates(candidates, oracles) == {}
        unmasked = next(one for one in candidates if one.expects == "all heads")
        other = next(name for name in oracles if name != "all heads")
        assert list(wrong_candidates([replace(unmasked, expects=other)], oracles)) == [unmasked.name]
    names = {one.name for one in candidates}
    assert names >= TIMED[case.level]
    assert ("ours_loss" in names) == (kind == "sweep")
    assert ("ours_shared" in names) == (case is EQUAL) and ("ours_requests" in names) == (case is GENERATE)


def test_every_oracle_of_generate_wants_other_tokens():
    with torch.no_grad():
        _, oracles = run.CANDIDATES_OF["generate"](GENERATE)
    tokens = [oracle.tokens for oracle in oracles.values()]
    assert len(tokens) == 3 and tokens[0].shape == (3, 9 + 6)
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(tokens, 2))


@pytest.mark.parametrize("label", ["joint", "pipelined", "zeros"])
def test_steps_under_gates_are_checked_by_every_gradient_that_trains(label: str):
    with torch.no_grad():
        candidates, oracles = run.CANDIDATES_OF["gates"](GATED[label])
        ours = candidates[1].call()
    dense, gates = oracles["all heads"].parts, oracles["gates"].parts
    assert gates.keys() - dense.keys() == {"importances"}
    matrices = 0 if label == "pipelined" else 6 * 2  # of each layer: attention 4, feed-forward 2
    assert len(dense) == 1 + matrices
    assert (gates["output"].reference - dense["output"].reference).abs().max() > 0.1
    for name in gates:
        assert gates[name].reference.abs().max() > 0
        with pytest.raises(AssertionError, match=f"^{name}: error"):
            oracles["gates"].check(ours | {name: ours[name] + gates[name].reference.abs().max() / 100})


def test_three_quarters_of_the_gates_are_zero_at_every_step():
    with torch.no_grad():
        ours = run.CANDIDATES_OF["gates"](GATED["zeros"])[0][1].call
        for _ in range(20):
            with items_run() as items:
                found = ours()
            assert items.out_projection == 2 * 6  # requests, heads of two layers
    assert (found["importances"].abs() > 1e-30).sum() == 6  # the penalty reaches closed gates with 1e-40


def test_steps_leave_weights_and_importances_as_they_are():
    with torch.no_grad():
        ours = run.CANDIDATES_OF["gates"](GATED["joint"])[0][1].call
        method = ours.args[2].method
        before, outputs = method.importances.clone(), [ours()["output"] for _ in range(2)]
        steps = method.steps_done
        method.steps_done = 0
        again = ours()["output"]
    assert steps == 2 and torch.equal(method.importances, before)
    assert not torch.equal(*outputs)  # noise of their own
    assert torch.equal(again, outputs[0])


def test_attention_is_timed_inside_the_call():
    with torch.no_grad():
        candidates, _ = run.CANDIDATES_OF["generate"](ONE_SENTENCE)
        samples = interleave(candidates[:1], rounds=2, sample_seconds=0.0, seed=0)
    whole, attention, prefill, decode = (samples[name] for name in candidates[0].series)
    for i in range(2):
        assert whole[i] > attention[i] == pytest.approx(prefill[i] + decode[i]) and min(prefill[i], decode[i]) > 0


def test_oracles_check_lists_as_one_tensor_and_name_the_first_other_token():
    exact = torch.arange(6, dtype=torch.float64).reshape(3, 2)
    oracle, parts = Oracle(exact, exact.float()), list(exact.float().split(1))
    oracle.check(parts)
    with pytest.raises(AssertionError, match="error"):
        oracle.check([*parts[:2], parts[2] + 1])
    tokens = Tokens(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    tokens.check(tokens.tokens.clone())
    with pytest.raises(AssertionError, match="request 1, position 2"):
        tokens.check(torch.tensor([[1, 2, 3], [4, 5, 7]]))
    with pytest.raises(AssertionError, match=r"\[2, 2\], wanted \[2, 3\]"):
        tokens.check(tokens.tokens[:, :2])


def test_oracles_of_several_outputs_name_the_wrong_one():
    exact = {"one": torch.ones(2, dtype=torch.float64), "two": torch.ones(3, dtype=torch.float64)}
    eager = {name: each.float() for name, each in exact.items()}
    oracles = Oracles.of(exact, eager)
    oracles.check(eager)
    with pytest.raises(AssertionError, match="^two: error"):
        oracles.check(eager | {"two": eager["two"] + 1})
    with pytest.raises(AssertionError, match=r"outputs \['one'\], wanted \['one', 'two'\]"):
        oracles.check({"one": eager["one"]})


def test_copies_share_only_what_is_not_attention():
    model = random_bert(48, 1)
    copied = own_attention(model)
    layer, same = model.encoder.layer[0], copied.encoder.layer[0]
    assert layer.intermediate.dense.weight is same.intermediate.dense.weight
    assert layer.attention.self.query.weight is not same.attention.self.query.weight


def test_a_wrong_candidate_is_not_timed_and_the_run_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(baselines.MASKED, "slice", baselines.dense)
    cases = (BLOCK, replace(BLOCK, kept=(KEPT_HEADS[12],)))
    monkeypatch.setitem(run.SUITES, "block", Suite((), cases, imports=True))
    monkeypatch.setattr(run, "import_times", lambda rounds: {"samples": [0.1] * rounds, "loads": []})
    with pytest.raises(typer.Exit) as exit:
        run.main("block", tmp_path, name="", rounds=0, threads=torch.get_num_threads(), quick=True, resume=False)
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
    monkeypatch.setitem(run.SUITES, "block", Suite((), cases))
    path, arguments = tmp_path / "block.json", ("block", 5, torch.get_num_threads(), True)
    with pytest.raises(KeyboardInterrupt):
        run.run_suite(*arguments, path)
    assert [case["name"] for case in json.loads(path.read_text())["cases"]] == [cases[0].name]
    run.run_suite(*arguments, path, resume=True)
    assert ran == [cases[0].name, "stopped", cases[1].name]
    assert [case["name"] for case in json.loads(path.read_text())["cases"]] == [case.name for case in cases]
    with pytest.raises(typer.BadParameter, match="--resume: .* has quick True, this run has False"):
        run.run_suite("block", 5, torch.get_num_threads(), False, path, resume=True)
    run.run_suite("block", 6, *arguments[2:], path, resume=True)  # more rounds are no other set-up


def test_unknown_suite_is_named():
    with pytest.raises(typer.BadParameter, match=r"--suite: wanted one of .*'block'.*got 'gpu'"):
        run.main(suite="gpu")


def test_a_group_of_suites_writes_a_file_each_with_the_rounds_of_its_own(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(run.SUITES, "gqa", Suite((GROUPED,), (GROUPED,), rounds=7))
    monkeypatch.setitem(run.SUITES, "requests", Suite((REQUESTS,), (REQUESTS,), rounds=6))
    monkeypatch.setitem(run.GROUPS, "cpu", ("gqa", "requests"))
    options = {"threads": torch.get_num_threads(), "quick": False, "resume": False}
    run.main("cpu", tmp_path, name="", rounds=0, **options)
    results = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("gqa", "requests")}
    assert [results[name]["rounds"] for name in results] == [7, 6]
    assert len(results["gqa"]["cases"][0]["candidates"]["sliced"]["samples"]) == 7
    with pytest.raises(typer.BadParameter, match=r"--name: wanted none for cpu, which writes 2 files, got 'all'"):
        run.main("cpu", tmp_path, name="all", rounds=0, **options)


def test_the_groups_name_suites():
    assert all(name in SUITES for group in GROUPS.values() for name in group)


def test_report_of_a_result_file(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(block_result(ours=12.5, repacked=10.0)))
    verdicts = report.write(path)
    text = (tmp_path / "tiny.md").read_text()
    assert verdicts in text
    assert verdicts.count("0.800 [0.800, 0.800]") == 4  # warm and first call: geometric mean, slowest case
    assert verdicts.count("**missed**") == 2  # 0.8 is below 0.93 and above 0.75
    assert "| 384 | 1x16 | 3 | 10 | 12 | 0.800 [0.800, 0.800] | slower | 0.80 | 0.33 |" in text
    assert "2 of 2 cases" in text and "with changes" not in text
    assert (tmp_path / "tiny-block.png").read_bytes().startswith(b"\x89PNG")


def test_all_heads_on_may_cost_three_percent_or_five_microseconds():
    allowed = figures.overhead_figures(block_result(ours=34.9, repacked=10.0))  # dense takes 30
    assert allowed[0].met and not figures.overhead_figures(block_result(ours=35.1, repacked=10.0))[0].met


def verdicts(result: dict) -> list[bool]:
    return [figure.met for figure in figures.all_figures(result)]


def test_limits_of_the_figures_for_requests():
    # the random half over dense and over each alone, equal heads over shared, all heads on over dense
    assert verdicts(requests_result(ours=17.0, dense=29.0, alone=15.4, shared=15.5)) == [True] * 4
    assert verdicts(requests_result(ours=17.0, dense=28.8)) == [False, True, True, True]
    assert verdicts(requests_result(ours=17.0, alone=15.2)) == [True, False, True, True]
    assert verdicts(requests_result(ours=17.0, shared=15.4)) == [True, True, False, True]
    assert verdicts(requests_result(ours=17.0, dense=15.7)) == [False, True, True, False]
    assert verdicts(requests_result(ours=17.0, dense=15.8)) == [False, True, True, True]


def test_limits_of_the_figures_for_grouped_queries_and_generate():
    assert verdicts(gqa_result(ours=20.0)) == [True] and verdicts(gqa_result(ours=20.1)) == [False]
    assert verdicts(generate_result(ours=20.0)) == [True] and verdicts(generate_result(ours=20.1)) == [False]


def test_limits_of_the_figures_for_decoding():
    # all heads on over a plain read and over SDPA, half of the heads over all
    assert verdicts(decode_result()) == [True] * 3
    assert verdicts(decode_result(ours=22.0, all_on=40.0)) == [True] * 3
    assert verdicts(decode_result(ours=22.0, all_on=40.1)) == [False, True, True]
    assert verdicts(decode_result(sdpa=34.1)) == [True, False, True]
    assert verdicts(decode_result(ours=20.1)) == [True, True, False]


def test_limits_of_the_figures_for_gates():
    assert verdicts(gates_result()) == [True] * 5  # joint, pipelined, zeros, sweep without and with a loss
    assert verdicts(gates_result(step=10.6)) == [False, False, True, True, True]
    assert verdicts(gates_result(zeros=6.7)) == [True, True, False, True, True]
    assert verdicts(gates_result(sweep=6.1)) == [True, True, True, False, True]
    whole = [case for case in GATES if case.label == "zeros" and case.feed_forward > case.hidden]
    assert whole and verdicts(result_of(entry(whole[0], {"dense": 1.0, "ours": 1.0}))) == []


def test_other_shapes_than_the_main_one_have_no_verdict():
    result = requests_result(ours=17.0)
    for case in result["cases"]:
        case["tokens"] = 18
    assert figures.all_figures(result) == []


@pytest.mark.parametrize(
    ("result", "rows"),
    [
        (
            requests_result(ours=16.0, alone=8.0),
            [
                "| 768 | 8x128 equal | 48 of 96 | 30 | 16 | 8 | 1.875 [1.875, 1.875] | 0.500 [0.500, 0.500] | 1.88 |"
                " 1.12 | 1.00 | 1.00 | 1.00 | 1 |",
                "Slower than every request by itself, by the whole interval: 3 of 3 cases.",
                "Slower than the faster of the two dense blocks: none.",
            ],
        ),
        (
            gqa_result(ours=72.0),
            [
                "| 12/4 of 64 | 4x1024 groups | 72 | 36 | 36 | 80 | 60 | 25 | 20 | 0.500 [0.500, 0.500] |"
                " 0.833 [0.833, 0.833] | 0.347 [0.347, 0.347] |",
                "Slower than the faster SDPA with all heads on: `gqa-H12-4-D64-4x1024-groups-24of48`,",
            ],
        ),
        (
            decode_result(all_on=80.0),
            [
                "| 12/12 of 64 float32 | 8x4096 independent | 48 of 96 | 20 | 80 | 80 | 40 | 34 |"
                " 5033.2 | 2516.6 | 5033.2 | 5921.4 | 4.000 [4.000, 4.000] | 2.00 |"
                " 0.500 [0.500, 0.500] | 0.425 [0.425, 0.425] |",
                "With all heads on slower than SDPA: `decode-H12-12-D64-float32-8x4096-all-96of96`,",
            ],
        ),
        (
            generate_result(ours=16000.0, dense=32000.0),
            [
                "| 1x9+6 | ours | 160 | 26.67 | 16 | 4 | 12 | "
                "2.000 [2.000, 2.000] | 2.000 [2.000, 2.000] | 2.00 | 2.00 |",
                "| 1x9+6 | dense | 320 | 53.33 | 32 | 8 | 24 | "
                "1.000 [1.000, 1.000] | 1.000 [1.000, 1.000] | 1.00 | 1.00 |",
            ],
        ),
        (
            gates_result(zeros=5.0),
            [
                "| 48 | 2 | 24 | 2x5 zeros | ours | 10.0 | 5.0 | 0.500 [0.500, 0.500] | 2.00 |",
                "| 48 | 2 | 24 | 2x5 sweep | ours_loss | 10.0 | 5.0 | 0.500 [0.500, 0.500] | 2.00 |",
            ],
        ),
    ],
    ids=["requests", "gqa", "decode", "generate", "gates"],
)
def test_tables_say_what_the_samples_say(result: dict, rows: list[str], tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(result))
    report.write(path)
    text = (tmp_path / "tiny.md").read_text()
    for row in rows:
        assert row in text
    picture = tmp_path / f"tiny-{result['cases'][0]['level']}.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and f"![]({picture.name})" in text


@pytest.mark.parametrize("path", sorted(run.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_reports_say_what_the_committed_results_say(path: Path):
    result = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == report.markdown(result, figures.all_figures(result), path.stem)


def test_import_time_is_that_of_a_fresh_process():
    found = environment.import_times(1)
    assert len(found["samples"]) == 1 and 0 < found["samples"][0] < 60
    assert found["loads"] == []

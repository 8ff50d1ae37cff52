"""Are the GPU suite's cases, work, gate and figures what they say, as far as a machine without a GPU can tell?"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.gpu import attention, figures, layers, projections, races, report, runner, suites
from benchmarks.gpu import tests as kernel_tests
from benchmarks.gpu.__main__ import app
from benchmarks.gpu.cases import DIRECTIONS, LEVELS, GpuCase
from benchmarks.gpu.device import Gpu, Host, session
from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.measure import WARM_UPS, Contender, gate, interleave, spread
from benchmarks.gpu.oracles import AttentionOracle, attention_pair, check_close
from benchmarks.gpu.work import Work, attention_work, compact, projection_work, total, work_of
from sparse_heads.ops.attention.reference import attention_reference

SMALL = GpuCase("attention", "step", 2, 3, 4, 2, 8, dtype="float32")
HALF = replace(SMALL, density=0.5, masks="requests")
MODULES = {"attention": attention, "block": layers, "in": projections, "out": projections}


# cases ----------------------------------------------------------------------------------------------------------------


def test_headline_cases_are_few_and_fit_into_the_time():
    assert len(suites.HEADLINE) <= suites.MOST_HEADLINE_CASES == 40
    assert suites.estimated_seconds(suites.HEADLINE) <= suites.HEADLINE_SECONDS
    slowest = max(map(suites.case_seconds, suites.HEADLINE))
    all_seconds = suites.START_SECONDS + suites.TESTS_SECONDS + suites.HEADLINE_SECONDS + slowest
    assert all_seconds <= suites.LIMIT_SECONDS == 540


@pytest.mark.parametrize("suite", suites.SUITES)
def test_cases_have_names_of_their_own_and_keep_the_share_of_heads_that_they_say(suite: str):
    cases = suites.SUITES[suite]
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert case.level in LEVELS and case.direction in DIRECTIONS and case.heads % case.kv_heads == 0
        assert case.active >= 1
        units = case.kv_heads if case.choice == "groups" else case.heads
        step = (case.heads // units) * (case.batch if case.masks == "shared" else 1)
        assert abs(case.active - case.density * case.batch * case.heads) <= step / 2, case.name


def test_both_suites_cover_what_was_asked_for():
    for name, lengths in (("headline", {512, 32768}), ("grid", {512, 32768})):
        cases = suites.SUITES[name]
        assert {case.head_dim for case in cases} == {64, 128}
        assert {case.density for case in cases} == {1.0, 0.75, 0.5, 0.25, 0.125}
        assert {case.masks for case in cases} == {"shared", "requests"}
        assert lengths <= {case.tokens for case in cases}
        assert {1, 4, 8} <= {case.group for case in cases}
        assert {12, 32, 64} <= {case.heads for case in cases}
        assert {"forward", "backward"} <= {case.direction for case in cases}
        assert any(case.gated for case in cases)


def test_masks_are_the_same_in_every_run_and_differ_between_requests():
    case = GpuCase("attention", "forward", 4, 8, 16, 4, 16, 0.5, "requests", "groups")
    assert torch.equal(case.mask, replace(case).mask)
    assert len({tuple(row.tolist()) for row in case.mask}) > 1
    groups = case.mask.unflatten(1, (4, 4))
    assert torch.equal(groups.any(-1), groups.all(-1))
    assert case.active_groups == 8


def test_runs_are_at_most_two_stretches():
    mask = GpuCase("block", "forward", 1, 8, 32, 32, 16, 0.5, choice="runs").mask
    assert int(mask.sum()) == 16 and int((mask[1:] != mask[:-1]).sum()) + int(mask[0]) <= 3


# work -----------------------------------------------------------------------------------------------------------------


def test_attention_work_counted_by_hand():
    # 3 tokens see 1 + 2 + 3 = 6 keys; 2 requests x 4 heads; 2 products of 2 x 8 operations.
    forward = attention_work(replace(SMALL, direction="forward"))
    assert forward.operations == 2 * (2 * 8) * 6 * 8 == 1536
    # Rows of 8 floats, 3 tokens: 96 bytes; queries and outputs of 8 heads, keys and values of 4.
    assert forward.bytes == 96 * (8 + 8 + 4 + 4) == 2304
    backward = attention_work(replace(SMALL, direction="backward"))
    assert backward.operations == 5 * 16 * 6 * 8 == 3840
    # Query, output, its gradient; keys, values; float32 log sums of 8 heads x 3 tokens; three gradients.
    assert backward.bytes == 96 * (3 * 8 + 2 * 4) + 4 * 8 * 3 + 96 * (8 + 2 * 4) == 4704
    assert attention_work(SMALL) == forward + backward


def test_heads_that_are_off_cost_their_zeros_only():
    some = attention_work(replace(HALF, direction="forward"))
    assert some.operations == 1536 // 2
    assert some.bytes == 96 * (4 + 2 * HALF.active_groups + 8)


def test_projection_work_counted_by_hand():
    case = replace(SMALL, level="in", direction="forward")
    # x [2, 3, 32] to 4 + 2 + 2 heads of 8: 6 rows x 32 x 64, two operations each.
    assert projection_work(case, "in") == Work(2 * 6 * 32 * 64, 4 * (6 * 32 + 6 * 64 + 64 * 32))
    assert projection_work(case, "out") == Work(2 * 6 * 32 * 32, 4 * (6 * 32 + 6 * 32 + 32 * 32))
    step = projection_work(replace(case, direction="step"), "out")
    assert step.operations == 3 * 2 * 6 * 32 * 32
    shared = replace(case, density=0.5)
    assert projection_work(shared, "out") == Work(2 * 6 * 32 * 16, 4 * (6 * 32 + 6 * 16 + 16 * 32))


def test_a_block_is_the_sum_of_its_parts():
    parts = work_of(replace(SMALL, level="block"))
    assert parts.keys() == {"in", "attention", "out"}
    assert total(parts).operations == sum(part.operations for part in parts.values())


def test_the_compact_case_does_the_same_arithmetic_with_fewer_heads():
    case = GpuCase("block", "forward", 4, 16, 8, 8, 16, 0.5, "requests")
    small = compact(case)
    assert (small.heads, small.hidden) == (4, case.hidden)
    assert total(work_of(small)).operations == total(work_of(case)).operations


# correctness gate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
def test_the_slice_that_attention_is_compared_with_is_the_reference(gated: bool):
    case = replace(HALF, tokens=7, gated=gated)
    inputs = Inputs(case, torch.device("cpu"), seed=1)
    leaves = inputs.leaves(case)
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in leaves.items()}
    output = attention_reference(
        wide["query"], wide["key"], wide["value"], case.mask, gate=wide.get("gate"), attn_mask=None, span=(-1, 0),
        scale=None, softcap=None, sinks=None,
    )  # fmt: skip
    gradients = torch.autograd.grad(output, tuple(wide.values()), inputs.grad.double())
    exact = {"output": output, **dict(zip(wide, gradients, strict=True))}
    oracle = AttentionOracle(case, inputs, case.mask)
    for request, kv_head in oracle.pairs:
        heads = slice(2 * kv_head, 2 * kv_head + 2)
        found = attention_pair(
            leaves["query"][request, heads], leaves["key"][request, kv_head], leaves["value"][request, kv_head],
            inputs.grad[request, heads], leaves["gate"][request, heads] if gated else None,
            case.mask[request, heads], torch.float64,
        )  # fmt: skip
        for name, tensor in exact.items():
            place = kv_head if name in ("key", "value") else heads
            torch.testing.assert_close(found[name], tensor[request, place], rtol=1e-12, atol=1e-12)
    oracle.check({name: tensor.float() for name, tensor in exact.items()})


@pytest.mark.parametrize("name", ["output", "query", "key", "value", "gate"])
def test_attention_that_is_wrong_anywhere_in_the_slice_is_found(name: str):
    case = replace(HALF, tokens=7, gated=True)
    inputs = Inputs(case, torch.device("cpu"), seed=1)
    oracle = AttentionOracle(case, inputs, case.mask)
    contender = {one.name: one for one in attention.contenders_of(case, inputs, case.mask, True)}["math_masked"]
    outputs = {key: tensor.detach().clone() for key, tensor in contender.outputs().items()}
    oracle.check(outputs)
    request, kv_head = oracle.pairs[0]
    head = 2 * kv_head + int(case.mask[request, 2 * kv_head + 1])
    if name in ("key", "value"):
        outputs[name][request, kv_head, 3] *= 1.01
    else:
        outputs[name][request, head] *= 1.01
    with pytest.raises(AssertionError, match=name):
        oracle.check(outputs)


def test_heads_that_are_off_must_be_zeros():
    case = replace(HALF, direction="forward")
    inputs = Inputs(case, torch.device("cpu"), seed=1)
    oracle = AttentionOracle(case, inputs, case.mask)
    with pytest.raises(AssertionError, match="not zero"):
        oracle.check({"output": torch.ones_like(inputs.query)})


@pytest.mark.parametrize("level", ["block", "in", "out"])
@pytest.mark.parametrize("masks", ["shared", "requests"])
def test_baselines_of_layers_pass_the_gate_with_all_gradients(level: str, masks: str):
    case = GpuCase(level, "step", 2, 9, 4, 4, 8, 0.5, masks, dtype="float32", gated=level == "block")
    inputs = Inputs(case, torch.device("cpu"), seed=2)
    module = MODULES[level]
    found = [one for one in module.contenders_of(case, inputs, case.mask, True) if not one.name.startswith("ours")]
    verdicts = gate(found, module.oracles_of(case, inputs, case.mask), Host())
    assert (verdicts.wrong, verdicts.failed) == ({}, {})
    assert {one.name for one in verdicts.right} >= {"block": {"dense_math", "fused_math", "masked_math"}}.get(
        level, {"dense", "gather"}
    )


def test_a_long_layer_is_compared_in_some_rows():
    case = GpuCase("block", "forward", 2, 300, 4, 4, 8, 0.5, dtype="float32")
    inputs = Inputs(case, torch.device("cpu"), seed=3)
    oracle = layers.oracles_of(case, inputs, case.mask)["kept"]
    found = {one.name: one for one in layers.contenders_of(case, inputs, case.mask, True)}
    output = found["repacked_math"].outputs()["output"]
    oracle.check({"output": output})
    row = int(oracle.rows[-1])
    output[-1, row] += 0.01
    with pytest.raises(AssertionError, match="output"):
        oracle.check({"output": output})


def test_errors_of_the_size_of_the_eager_ones_pass_and_larger_ones_do_not():
    exact = torch.linspace(1, 2, 100, dtype=torch.float64)
    eager = exact.bfloat16()
    check_close("x", eager, eager, exact)
    with pytest.raises(AssertionError, match="mean square"):
        check_close("x", (exact * 1.02).bfloat16(), eager, exact)
    one_off = eager.clone()
    one_off[50] += 0.1
    with pytest.raises(AssertionError, match="largest"):
        check_close("x", one_off, eager, exact)
    with pytest.raises(AssertionError, match="finite"):
        check_close("x", eager * torch.nan, eager, exact)


def test_what_is_missing_or_wrong_is_named_and_not_timed():
    class Ones:
        def check(self, outputs: dict[str, torch.Tensor]) -> None:
            if not bool((outputs["output"] == 1).all()):
                raise AssertionError("not one")

    def missing() -> torch.Tensor:
        raise ImportError("no such kernel")

    calls = {"right": lambda: torch.ones(3), "wrong": lambda: torch.zeros(3), "missing": missing}
    verdicts = gate([Contender(name, call, "forward") for name, call in calls.items()], {"kept": Ones()}, Host())
    assert verdicts.wrong == {"wrong": "not one"}
    assert verdicts.failed == {"missing": "ImportError: no such kernel"}
    assert [one.name for one in verdicts.right] == ["right"]


def test_a_backward_is_timed_without_its_forward():
    x, log = torch.ones(2, requires_grad=True), []

    def forward() -> torch.Tensor:
        log.append("forward")
        return 3 * x

    one = Contender("one", forward, "backward", (torch.ones(2),), {"x": x})
    prepared = one.prepare()
    assert log == ["forward"]
    _, (gradient,) = one.run(prepared)
    assert log == ["forward"] and gradient.tolist() == [3, 3]


def test_every_round_runs_every_contender_once():
    contenders = [Contender(name, lambda: torch.ones(1), "forward") for name in ("one", "two")]
    samples = interleave(contenders, Host(), seed=0)
    assert {name: len(each) for name, each in samples.items()} == {"one": 2, "two": 2}


# result files ---------------------------------------------------------------------------------------------------------

SOME = tuple(replace(case, tokens=5) for case in (SMALL, HALF))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Measuring replaced; the names of the cases that were measured."""
    measured = []

    def entry(case: GpuCase, device: Host) -> dict[str, object]:
        measured.append(case.name)
        return {**case.facts(), "work": {}, "candidates": {}, "wrong": {}, "failed": {}, "seconds": 0.1}

    monkeypatch.setattr(runner, "measure", entry)
    return measured


def test_the_file_is_whole_after_every_case_and_written_by_rename(tmp_path, monkeypatch, quick):
    seen = []
    original = runner.write_whole

    def watched(contents: dict[Path, bytes]) -> None:
        original(contents)
        (path,) = contents
        seen.append((len(json.loads(path.read_text())["cases"]), [one.name for one in path.parent.iterdir()]))

    monkeypatch.setattr(runner, "write_whole", watched)
    runner.run_cases("some", SOME, Host(), tmp_path / "some.json", seconds=60)
    assert seen == [(0, ["some.json"]), (1, ["some.json"]), (2, ["some.json"])]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, quick):
    path = tmp_path / "some.json"
    first = runner.run_cases("some", SOME, Host(), path, seconds=0)
    assert first["cases"] == [] and first["left"] == [case.name for case in SOME]
    runner.run_cases("some", SOME[:1], Host(), path, seconds=60)
    other = tmp_path / "other" / "some.json"
    second = runner.run_cases("some", SOME, Host(), other, seconds=60, earlier=path)
    assert quick == [case.name for case in SOME]
    assert (second["left"], len(second["sessions"])) == ([], 2)
    assert [case["session"] for case in second["cases"]] == [0, 1]
    assert json.loads(other.read_text()) == second


def test_a_run_of_another_device_is_not_mixed_in(tmp_path, quick, monkeypatch):
    path = tmp_path / "some.json"
    runner.run_cases("some", SOME, Host(), path, seconds=60)
    monkeypatch.setattr(Host, "describe", lambda self: {"name": "another"})
    with pytest.raises(ValueError, match="another suite, device or versions"):
        runner.run_cases("some", SOME, Host(), path, seconds=60, earlier=path)


def test_faults_of_ours_count_and_those_of_others_do_not():
    case = {"name": "case", "wrong": {"flash_masked": "off", "ours_triton": "off"}, "failed": {"timing": "no memory"}}
    assert runner.our_faults({"cases": [case]}) == {"case: ours_triton": "off", "case: timing": "no memory"}


# figures --------------------------------------------------------------------------------------------------------------

CEILINGS = {"operations_per_second": 8e14, "bytes_per_second": 4e12, "launch_seconds": 0.0, "samples": {}}
SESSION = {
    "date": "today", "commit": "0" * 40, "dirty": False, "smoke": False, "versions": {"torch": "2.11"},
    "device": {"name": "a device"}, "as_found": {}, "after_ceilings": {"clocks.sm": "1980 MHz"}, "ceilings": CEILINGS,
}  # fmt: skip


def result_of(*cases: tuple[GpuCase, dict[str, float]]) -> dict:
    """A result file's content, every sample of a contender the same."""
    entries = []
    for case, times in cases:
        entry = {**case.facts(), "session": 0, "seed": 1, "wrong": {}, "failed": {}, "seconds": 1.0}
        entry["work"] = {name: vars(part) for name, part in work_of(case).items()}
        entry["compact_work"] = {name: vars(part) for name, part in work_of(compact(case)).items()}
        entry["candidates"] = {name: spread([1e-6 * value] * 6) for name, value in times.items()}
        entries.append(entry)
    return {"schema_version": 1, "suite": "made up", "sessions": [SESSION], "left": [], "cases": entries}


def found(result: dict, words: str) -> figures.Figure:
    """The only figure with these words in its title."""
    (one,) = (figure for figure in figures.all_figures(result) if words in figure.title)
    return one


REQUESTS = suites.attention("forward", suites.PREFILL, 0.5, masks="requests")


def test_a_block_is_compared_with_the_fastest_repacked_one():
    case = suites.block("forward", suites.PREFILL, 0.5)
    result = result_of((case, {"ours_auto": 100.0, "repacked_flash": 120.0, "repacked_fused_cudnn": 93.0}))
    figure = found(result, "Block over repacked")
    assert figure.found.value == pytest.approx(0.93) and figure.limit == 0.95 and not figure.met
    runs = result_of((replace(case, choice="runs"), {"ours_auto": 100.0, "repacked_flash": 97.0}))
    assert found(runs, "at most two runs").limit == 0.97 and found(runs, "at most two runs").met
    small = suites.block("forward", suites.SMALL[0], 0.5)
    assert found(result_of((small, {"ours_auto": 100.0, "repacked_flash": 85.0})), "smaller sizes").met


def test_all_heads_on_may_take_two_percent_more_than_the_fastest_dense_block():
    case = suites.block("forward", suites.PREFILL)
    times = {"dense_flash": 130.0, "fused_cudnn": 100.0}
    assert found(result_of((case, {"ours_auto": 102.0, **times})), "All heads on").met
    assert not found(result_of((case, {"ours_auto": 103.0, **times})), "All heads on").met


def test_skip_efficiency_is_all_heads_time_times_the_active_share_over_the_time():
    figure = found(result_of((REQUESTS, {"ours_triton": 55.0, "ours_all_on": 100.0})), "skip efficiency")
    assert figure.found.value == pytest.approx(0.5 * 100 / 55) and figure.met
    assert not found(result_of((REQUESTS, {"ours_triton": 56.0, "ours_all_on": 100.0})), "skip efficiency").met


def test_the_active_share_of_a_block_counts_groups_for_keys_and_values():
    case = suites.block("forward", suites.GROUPED, 0.5, masks="requests", choice="scattered")
    (entry,) = result_of((case, {}))["cases"]
    dense = total(work_of(replace(case, density=1.0, masks="shared"))).operations
    assert figures.all_operations(entry) == pytest.approx(dense, rel=1e-9) or case.active_groups != 2 * case.kv_heads
    assert figures.operations(entry) < dense


def test_the_floor_is_the_rate_of_the_best_dense_kernel_at_the_compact_shape():
    # As many heads in the compact case as are on: the floor is that kernel's time.
    times = {"ours_triton": 200.0, "part_attention_cudnn": 140.0, "part_attention_flash": 180.0}
    figure = found(result_of((REQUESTS, times)), "attention: speed over the floor")
    assert figure.found.value == pytest.approx(0.7) and figure.met
    # A kernel past what a copy could move: the bytes are the floor.
    fast = result_of((REQUESTS, times | {"part_attention_cudnn": 1.0}))
    bytes_floor = 1e6 * attention_work(REQUESTS).bytes / CEILINGS["bytes_per_second"]
    assert found(fast, "attention: speed over the floor").found.value == pytest.approx(bytes_floor / 200)


def test_flex_attention_is_the_faster_of_its_two_ways():
    times = {"ours_triton": 100.0, "flex_counts": 98.0, "flex_own_mask": 300.0}
    assert not found(result_of((REQUESTS, times)), "some heads: speed over FlexAttention").met
    every = replace(REQUESTS, density=1.0)
    assert found(result_of((every, times)), "all heads: speed over FlexAttention").met


@pytest.mark.parametrize(
    ("head_dim", "direction", "limit"), [(64, "forward", 0.75), (128, "forward", 0.65), (64, "backward", 0.45)]
)
def test_our_kernel_is_compared_with_the_best_of_the_dense_ones(head_dim: int, direction: str, limit: float):
    case = suites.attention(direction, (4, 4096, 16, 16, head_dim))
    times = {"ours_triton": 100.0, "cudnn_masked": 100 * limit, "flash_masked": 120.0, "flash_deterministic": 69.0}
    result = result_of((case, times))
    assert found(result, "the best dense kernel").limit == limit and found(result, "the best dense kernel").met
    if direction == "backward":
        assert not found(result, "deterministic flash").met


def test_gated_steps_are_compared_with_dense_ones_and_with_their_own_active_share():
    full = suites.block("step", suites.PREFILL, gated=True)
    half = replace(full, density=0.5)
    result = result_of((full, {"ours_auto": 104.0, "fused_cudnn": 100.0}), (half, {"ours_auto": 57.0}))
    assert not found(result, "Gated step, all heads").met
    zeros = found(result, "hard zeros")
    assert zeros.found.value == pytest.approx(0.5 * 104 / 57) and zeros.met


def test_nothing_timed_makes_no_figure():
    assert figures.all_figures(result_of((REQUESTS, {"flex_counts": 1.0}))) == []


def test_the_report_names_figures_faults_and_the_machine(tmp_path):
    result = result_of((REQUESTS, {"ours_triton": 50.0, "ours_all_on": 100.0}))
    result["cases"][0]["failed"] = {"pseudo_sequences": "ImportError: no varlen_attn"}
    result["left"] = ["a-case"]
    path = tmp_path / "made.json"
    path.write_text(json.dumps(result))
    short = report.write(path)
    text = path.with_suffix(".md").read_text()
    assert "skip efficiency" in short and "pseudo_sequences failed in 1" in short
    for words in ("a device", "1980 MHz", "no varlen_attn", "- a-case", "ours_all_on", "4.00 TB/s"):
        assert words in text


# the GPU, with a stand-in for its events ------------------------------------------------------------------------------


class Event:
    """A CUDA event whose times come from a list of milliseconds."""

    times: ClassVar[list[float]] = []

    def __init__(self, enable_timing: bool) -> None:
        self.time = None

    def record(self) -> None:
        self.time = self.times.pop(0)

    def elapsed_time(self, other: Event) -> float:
        return other.time - self.time


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = {"name": "a device", "L2_cache_size": 1 << 10, "major": 9, "minor": 0}
    found |= {"multi_processor_count": 132, "total_memory": 1}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**found))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(Gpu, "torch_device", torch.device("cpu"))
    device = Gpu()
    device.flushed = device.flushed[:16]
    return device


def test_a_gpu_is_timed_by_its_events_for_as_many_rounds_as_the_case_has_time_for(gpu: Gpu, monkeypatch):
    calls = []
    contenders = [Contender(name, lambda name=name: calls.append(name), "forward") for name in ("one", "two")]
    # Four stamps a contender say that one turn takes 300 ms; then every call takes 2.
    monkeypatch.setattr(Event, "times", [0, 1, 2, 150] * 2 + [0, 2] * 100)
    samples = interleave(contenders, gpu, seed=0)
    assert samples["one"] == samples["two"] == [0.002] * 6
    assert calls.count("one") == WARM_UPS + 1 + 6


def test_the_passport_of_a_gpu_reads_clocks_and_sets_none(gpu: Gpu, monkeypatch):
    asked = []

    def answer(command: tuple[str, ...], **_: object) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(stdout="NVIDIA H200, 580.1, 1980 MHz\n", returncode=0)

    monkeypatch.setattr("benchmarks.gpu.device.subprocess.run", answer)
    monkeypatch.setattr("benchmarks.environment.subprocess.run", answer)
    found = session(gpu)
    assert found["device"]["capability"] == "9.0" and found["as_found"]["clocks.sm"] == "1980 MHz"
    assert found["versions"]["torch"] == torch.__version__ and found["date"]
    (command,) = (one for one in asked if one[0] == "nvidia-smi")
    assert all(part.startswith(("--query-gpu=", "--format=")) for part in command[1:])


# races ----------------------------------------------------------------------------------------------------------------


def test_one_changed_bit_is_a_difference():
    one = [torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)]
    assert races.same(one, [each.clone() for each in one])
    assert not races.same(one, [one[0], -one[1]])
    nan = [torch.full((2,), torch.nan)]
    assert races.same(nan, [nan[0].clone()])


def test_work_lists_are_permuted_wherever_they_are_made():
    from sparse_heads._triton import work_list
    from sparse_heads.ops.attention.triton import forward  # noqa: F401  (makes work lists)

    mask = torch.ones(8, 8, dtype=torch.bool)
    arguments = (mask, None, 8, 8, 8, mask.device)
    plain = work_list.attention_work_list(*arguments)
    with races.permuted_work(seed=0):
        users = [module for name, module in sys.modules.items() if name.startswith("sparse_heads.ops.attention.triton")]
        users = [module for module in users if hasattr(module, "attention_work_list")]
        shuffled = [module.attention_work_list(*arguments) for module in users]
    assert shuffled
    for work in shuffled:
        assert not torch.equal(work.items, plain.items)
        assert sorted(work.items.tolist()) == sorted(plain.items.tolist())
    assert work_list.attention_work_list(*arguments).items.equal(plain.items)


def test_a_result_that_depends_on_the_run_is_a_fault(monkeypatch):
    runs = iter(range(100))
    case = GpuCase("attention", "forward", 2, 3, 4, 4, 8, 0.5, "requests", dtype="float32")

    def moving(case: GpuCase, inputs: Inputs, mask: torch.Tensor) -> Contender:
        return Contender("moving", lambda: inputs.query + next(runs), "forward")

    monkeypatch.setattr(races, "ours", moving)
    assert len(races.faults_of(case, Host(), runs=3)) == 3
    monkeypatch.setattr(races, "ours", lambda *_: Contender("still", lambda: torch.ones(2, 4, 3, 8), "forward"))
    assert races.faults_of(case, Host(), runs=3) == []


# the command ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_runs_and_nothing_is_written(tmp_path):
    done = CliRunner().invoke(app, ["headline", "--out", str(tmp_path)])
    assert done.exit_code == 2 and "There is no CUDA device" in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "seconds", "code"),
    [("pass", 120, 0), ("assert False", 120, 1), ("import time; time.sleep(60)", 2, "stopped")],
)
def test_kernel_tests_that_fail_or_take_too_long_are_faults(
    tmp_path, monkeypatch, body: str, seconds: int, code: int | str
):
    test = tmp_path / "test_something.py"
    test.write_text(f"def test():\n    {body}\n")
    monkeypatch.setattr(kernel_tests, "TESTS_SECONDS", seconds)
    monkeypatch.setattr(kernel_tests, "command", lambda: [sys.executable, "-m", "pytest", "-q", str(test)])
    monkeypatch.setattr(kernel_tests, "ROOT", tmp_path)
    faults = kernel_tests.run(tmp_path / "tests.json")
    assert faults == ({} if code == 0 else {"tests": f"pytest: {code}"})
    assert json.loads((tmp_path / "tests.json").read_text())["code"] == code


# smoke ----------------------------------------------------------------------------------------------------------------


def test_smoke_runs_every_kind_of_case_and_claims_nothing(tmp_path):
    done = CliRunner().invoke(app, ["headline", "--smoke", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "headline.json").read_text())
    assert result["suite"] == "smoke" and result["left"] == [] and result["sessions"][0]["smoke"]
    assert {case["level"] for case in result["cases"]} == set(LEVELS)
    assert all("ours_triton" in case["candidates"] for case in result["cases"])
    assert "only show that the suite runs" in (tmp_path / "headline.md").read_text()
    assert len(list(tmp_path.iterdir())) <= 8

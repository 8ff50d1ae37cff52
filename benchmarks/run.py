"""Correctness gate, then interleaved timing, then JSON, a table and a plot: `python -m benchmarks.run --help`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from sparse_heads._files import write_whole

from . import candidates as block_and_model
from . import decode, generation, grouped_queries, per_request, report, training
from .cases import AnyCase
from .environment import import_times, passport
from .gate import wrong_candidates
from .statistics import spread
from .suites import GROUPS, SUITES
from .timing import interleave

RESULTS = Path(__file__).parent / "results"
MICROSECONDS = 1e6
SCHEMA_VERSION = 1
CANDIDATES_OF = {
    "block": block_and_model.candidates_of,
    "model": block_and_model.candidates_of,
    "requests": per_request.candidates_of,
    "gqa": grouped_queries.candidates_of,
    "decode": decode.candidates_of,
    "generate": generation.candidates_of,
    "gates": training.candidates_of,
}
QUICK_ROUNDS = 5


def measure(case: AnyCase, rounds: int, sample_seconds: float, seed: int) -> dict[str, object]:
    """One entry of the result file: what was wrong, and microseconds per call of whatever was right."""
    candidates, oracles = CANDIDATES_OF[case.level](case)
    wrong = wrong_candidates(candidates, oracles)
    passed = [one for one in candidates if one.name not in wrong]
    samples = interleave(passed, rounds, sample_seconds, seed)
    return {
        "name": case.name,
        "level": case.level,
        **case.facts(),
        "wrong": wrong,
        "candidates": {
            name: {**spread(seconds, MICROSECONDS), "samples": [round(value * MICROSECONDS, 2) for value in seconds]}
            for name, seconds in samples.items()
        },
    }


def to_json(result: dict[str, object]) -> str:
    """JSON with one case a line, so that a diff between two runs can be read."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items() if key != "cases"]
    cases = ",\n".join(json.dumps(case) for case in result["cases"])
    return "{\n" + ",\n".join(lines) + ',\n"cases": [\n' + cases + "\n]\n}\n"


def run_suite(
    suite: str, rounds: int, threads: int, quick: bool, path: Path, resume: bool = False
) -> dict[str, object]:
    """Measure every case of a suite; `quick` takes its quick cases and gives numbers for nothing but a smoke test.

    The file at `path` is whole after every case; with `resume`, the cases that it holds already are not run again.
    """
    torch.set_num_threads(threads)
    cases = SUITES[suite].quick if quick else SUITES[suite].cases
    started = perf_counter()
    result = {
        "schema_version": SCHEMA_VERSION,
        "suite": suite,
        "quick": quick,
        "rounds": rounds,
        "threads": threads,
        "unit": "microseconds per call",
        **passport(),
    }
    measured, before = earlier_cases(path, result) if resume else ([], 0)
    done = {case["name"] for case in measured}
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), tqdm(cases, unit="case") as progress:
        for seed, case in enumerate(progress):
            progress.set_description(case.name)
            if case.name in done:
                continue
            commit = result["commit"] + ("-dirty" if result["dirty"] else "")
            measured.append({**measure(case, rounds, 0.001 if quick else 0.004, seed), "commit": commit})
            result |= {"seconds": before + round(perf_counter() - started), "cases": measured}
            write_whole({path: to_json(result).encode()})
    if SUITES[suite].imports:
        result |= {"import": import_times(3 if quick else 15), "cases": measured}
        write_whole({path: to_json(result).encode()})
    return result


def earlier_cases(path: Path, result: dict[str, object]) -> tuple[list[dict], int]:
    """The cases of an interrupted run and its seconds; refuses a file that another set-up wrote."""
    if not path.exists():
        return [], 0
    earlier = json.loads(path.read_text())
    for key in ("schema_version", "suite", "quick", "threads", "machine", "versions"):
        if earlier[key] != result[key]:
            raise typer.BadParameter(f"--resume: {path} has {key} {earlier[key]}, this run has {result[key]}")
    return earlier["cases"], earlier["seconds"]


def main(
    suite: Annotated[str, typer.Option(help=f"{', '.join(SUITES)}; cpu for {', '.join(GROUPS['cpu'])}")] = "cpu",
    out: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
    name: Annotated[str, typer.Option(help="file name of one suite without ending; by default the suite")] = "",
    rounds: Annotated[int, typer.Option(help="rounds; 0 for the suite's own, as figures want them")] = 0,
    threads: Annotated[int, typer.Option(help="torch threads")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="short cases and 5 rounds: does it run at all?")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="keep the cases of an interrupted run")] = False,
) -> None:
    """Time the library against its baselines, a result file per suite; exits with 1 when any output was wrong."""
    suites = GROUPS.get(suite, (suite,))
    if suites[0] not in SUITES:
        raise typer.BadParameter(f"--suite: wanted one of {sorted((*SUITES, *GROUPS))}, got {suite!r}")
    if name and len(suites) > 1:
        raise typer.BadParameter(f"--name: wanted none for {suite}, which writes {len(suites)} files, got {name!r}")
    wrong = {}
    for each in suites:
        path = out / f"{name or (f'{each}-quick' if quick else each)}.json"
        own_rounds = QUICK_ROUNDS if quick else rounds or SUITES[each].rounds
        result = run_suite(each, own_rounds, threads, quick, path, resume)
        print(report.write(path))
        wrong |= {case["name"]: case["wrong"] for case in result["cases"] if case["wrong"]}
    if wrong:
        print(f"Wrong outputs, not timed: {wrong}", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

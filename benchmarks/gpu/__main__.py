"""`python -m benchmarks.gpu COMMAND`: what a GPU shows.

headline: the tests, then the headline cases; under nine minutes. grid: the full grid in slices. dense-table: which of
PyTorch's kernels is fastest, for the dispatch. races: equal bits. report: the table of a result file again.
`--smoke` runs tiny cases on a CPU, in Triton's interpreter; it shows that the suite works, and claims nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu"
Smoke = Annotated[bool, typer.Option("--smoke", help="tiny cases on a CPU")]
Out = Annotated[Path, typer.Option(help="folder of the results")]
Resume = Annotated[Path | None, typer.Option(help="result file of an interrupted run, whose cases are kept")]
Seconds = Annotated[float, typer.Option(help="no case begins later")]
app = typer.Typer(add_completion=False, help=__doc__.split("\n")[0])


def open_device(smoke: bool):
    """The device to measure; for smoke the interpreter is chosen, before anything loads Triton."""
    if smoke:
        os.environ["TRITON_INTERPRET"] = "1"
    from . import device

    if not smoke and not device.torch.cuda.is_available():
        print("There is no CUDA device; --smoke runs tiny cases on a CPU.", file=sys.stderr)
        raise typer.Exit(2)
    return device.Host() if smoke else device.Gpu()


def run_suite(suite: str, device, path: Path, seconds: float, resume: Path | None) -> dict[str, str]:
    """Measure, report, and give the faults of our own contenders."""
    from . import report, runner, suites

    suite = "smoke" if device.smoke else suite
    result = runner.run_cases(suite, suites.SUITES[suite], device, path, seconds, resume)
    print(report.write(path))
    return runner.our_faults(result)


def finish(faults: dict[str, str]) -> None:
    """Exit with 1 where something of ours is wrong."""
    for name, reason in faults.items():
        print(f"WRONG  {name}: {reason}", file=sys.stderr)
    if faults:
        raise typer.Exit(1)


@app.command()
def headline(
    smoke: Smoke = False,
    out: Out = RESULTS,
    tests: Annotated[bool, typer.Option(help="run the tests of the Triton kernels first")] = True,
    resume: Resume = None,
    seconds: Seconds = 0,
) -> None:
    """The tests under their time limit, then the headline cases; exits with 1 when anything of ours is wrong."""
    device, faults = open_device(smoke), {}
    if tests and not smoke:
        from . import tests as kernel_tests

        faults |= kernel_tests.run(out / "tests.json")
    from .suites import HEADLINE_SECONDS

    faults |= run_suite("headline", device, out / "headline.json", seconds or HEADLINE_SECONDS, resume)
    finish(faults)


@app.command()
def grid(smoke: Smoke = False, out: Out = RESULTS, resume: Resume = None, seconds: Seconds = 480) -> None:
    """A slice of the full grid: as much as the time allows, after the cases of the file to resume."""
    finish(run_suite("grid", open_device(smoke), out / "grid.json", seconds, resume))


@app.command()
def dense_table(
    smoke: Smoke = False,
    out: Out = RESULTS,
    table: Annotated[Path | None, typer.Option(help="the table to write; by default in OUT")] = None,
) -> None:
    """Time PyTorch's kernels over shapes, and write the table that the dispatch reads."""
    device = open_device(smoke)
    from . import dense_table as measurement

    print(measurement.run(device, out / "dense.json", table or out / "dense_backends.json"))


@app.command()
def races(
    smoke: Smoke = False,
    out: Out = RESULTS,
    runs: Annotated[int, typer.Option(help="runs on each input")] = 20,
    tiny: Annotated[bool, typer.Option("--tiny", help="tiny shapes, for the compute sanitizer")] = False,
) -> None:
    """Every kernel of ours again and again on one input: any bit that differs is a race."""
    device = open_device(smoke)
    from . import races as repetition

    finish(repetition.run(device, out / "races.json", 2 if smoke else runs, tiny or smoke))


@app.command()
def report(path: Path) -> None:
    """The table of a result file."""
    from . import report as reports

    print(reports.write(path))


if __name__ == "__main__":
    app()

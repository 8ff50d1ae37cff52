"""Compiles the kernels ahead of time, for devices that need not be there, and says what each takes.

    python tests/compile_kernels.py --table
    python tests/compile_kernels.py --cases full --output records.json

It runs where TRITON_INTERPRET is unset, under any supported Triton; needs neither a GPU nor a CUDA toolkit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import textwrap
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from kernel_cases import CASES, Case, launches_of, name_of
from kernel_compiler import Compiled, compile_launch, identity

from sparse_heads._triton import interpreted
from sparse_heads._triton.launch import Launch

CAPABILITIES = ((8, 0), (9, 0), (10, 0))
COLUMNS = ("registers", "local", "shared")


class Job(NamedTuple):
    """One launch of a case on a device."""

    case: Case
    capability: tuple[int, int]
    launch: Launch


def gather(cases: str, capabilities: list[tuple[int, int]]) -> list[Job]:
    """Every launch once, under the first case that makes it."""
    found: dict[str, Job] = {}
    for capability in capabilities:
        for case in CASES:
            if cases == "full" or case.headline:
                for launch in launches_of(case, capability):
                    found.setdefault(identity(launch, capability), Job(case, capability, launch))
    return list(found.values())


def describe(job: Job) -> dict[str, Any]:
    """What is to be compiled."""
    constants = {
        name: value
        for name, value in job.launch.arguments.items()
        if name.isupper() and isinstance(value, (bool, int, str))
    }
    return {
        "case": name_of(job.case),
        "dtype": str(job.case.dtype).removeprefix("torch."),
        "kernel": job.launch.kernel.__name__,
        "capability": list(job.capability),
        "constants": constants,
        "options": job.launch.options,
    }


def record(job: Job) -> dict[str, Any]:
    """What is to be compiled, and what became of it."""
    compiled: Compiled | None = None
    error = None
    try:
        compiled = compile_launch(job.launch, job.capability)
    except Exception as failure:  # of any pass of the compiler; the tests report all of them at once
        causes = [failure]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        # ptxas hands the whole program back.
        error = "\n".join(textwrap.shorten(f"{type(cause).__name__}: {cause}", 1000) for cause in causes)
    return {**describe(job), "error": error, **(compiled._asdict() if compiled else {})}


def _record(index: int) -> dict[str, Any]:
    return record(_jobs[index])


_jobs: list[Job] = []  # kernels cannot be pickled: the processes that compile inherit them


def compile_all(jobs: list[Job], processes: int) -> list[dict[str, Any]]:
    _jobs[:] = jobs
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_record, range(len(jobs))))


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """The file appears under its name only when whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    content = {"triton": triton.__version__, "torch": torch.__version__, "kernels": records}
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def table(records: list[dict[str, Any]]) -> str:
    """Registers, bytes of local and bytes of shared memory of every kernel and case, by device."""
    rows: dict[tuple[str, str], dict[tuple, str]] = {}
    for entry in records:
        cell = "/".join(str(entry.get(column, "failed")) for column in COLUMNS)
        row = rows.setdefault((entry["kernel"], entry["case"]), {})
        row[tuple(entry["capability"])] = cell
    capabilities = sorted({capability for row in rows.values() for capability in row})
    header = [f"kernel ({', '.join(COLUMNS)})", "case", *(f"sm_{10 * major + minor}" for major, minor in capabilities)]
    lines = [header, ["---"] * len(header)]
    lines += [[*names, *(row.get(capability, "") for capability in capabilities)] for names, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", choices=("headline", "full"), default="headline")
    parser.add_argument("--capability", action="append", help="such as 9.0; may be repeated (default: 8.0, 9.0, 10.0)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", action="store_true", help="print what each kernel takes")
    parser.add_argument("--plan", action="store_true", help="compile nothing, say what would be compiled")
    arguments = parser.parse_args()
    if interpreted():
        parser.error("TRITON_INTERPRET is set: kernels of the interpreter cannot be compiled")
    given = [tuple(map(int, text.split("."))) for text in arguments.capability or []]
    jobs = gather(arguments.cases, given or list(CAPABILITIES))
    records = [describe(job) for job in jobs] if arguments.plan else compile_all(jobs, arguments.processes)
    if arguments.output:
        write(arguments.output, records)
    if arguments.table:
        print(table(records))


if __name__ == "__main__":
    main()

"""The tests of the Triton kernels, on the GPU itself, stopped after a while."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from .runner import write_json
from .suites import TESTS_SECONDS

ROOT = Path(__file__).resolve().parents[2]
# Compiles ahead of time: says the same on any machine, and takes minutes.
ELSEWHERE = ("tests/test_triton_compile.py",)


def command() -> list[str]:
    """pytest on every test of a kernel, on several cores where the plugin for that is there."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_triton_*.py"))
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    files = [file for file in files if file not in ELSEWHERE]
    return [sys.executable, "-m", "pytest", "-v", "--tb=short", "--durations=5", *parallel, *files]


def run(path: Path) -> dict[str, str]:
    """Run them, write what they said, and give the faults: failures, or tests that took too long."""
    started = perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with subprocess.Popen(
        command(),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=TESTS_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            code = "stopped"
        else:
            code = process.returncode
    tail = output[-8000:]
    write_json(path, {"code": code, "seconds": round(perf_counter() - started, 1), "command": command(), "tail": tail})
    print(tail[-2000:], flush=True)
    return {} if code == 0 else {"tests": f"pytest: {code}"}

"""Do the Triton kernels read masked heads, or past the ends? What they may not read is on unreadable pages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("triton_process.py")

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the memory of the CPU, which the interpreter reads"),
]


def run(case: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, [str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(SCRIPT), case], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )


@pytest.mark.parametrize("case", ["masked_heads", "ends"])
def test_what_may_not_be_read_is_not(case):
    process = run(case)
    assert process.returncode == 0 and process.stdout.split() == ["protected", "done"], process.stderr


def test_the_pages_are_unreadable():
    process = run("all_heads")
    assert process.returncode == -signal.SIGSEGV and process.stdout.split() == ["protected"], process.stderr

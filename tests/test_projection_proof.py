"""Does skipped mean skipped? Masked heads' weights lie on pages that nobody may read; a read kills the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_heads import _native

SCRIPT = Path(__file__).with_name("unreadable_pages.py")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect and its signal as on Linux")


def run(case: str) -> subprocess.CompletedProcess:
    _native.load()
    # Waiting threads sleep: other work may share the cores.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, SCRIPT, case], capture_output=True, text=True, env=environment, timeout=300, check=False
    )


@pytest.mark.parametrize(
    "case",
    [
        "in_projection",
        "in_projection_512",
        "in_projection_with_bias",
        "in_projection_per_request",
        "in_projection_with_bias_per_request",
        "out_projection",
        "out_projection_per_request",
        "bert",
    ],
)
def test_kernels_do_not_read_what_masked_heads_own(case):
    result = run(case)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "done"


def test_kernels_do_not_read_past_the_end():
    result = run("ends")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "done"


@pytest.mark.parametrize("case", ["dense_in_projection", "dense_out_projection", "dense_bert"])
def test_a_dense_product_dies_there(case):
    result = run(case)
    assert result.stdout.split() == ["protected"]
    assert result.returncode in (-signal.SIGSEGV, -signal.SIGBUS), result.stderr

"""Where may Triton kernels run, what is said where they may not, and is a launch made where its tensors are?"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from sparse_heads import _triton
from sparse_heads._triton.launch import Launch
from sparse_heads.errors import BackendUnavailableError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)
# Nothing can be imported as triton.
LIGHT = """
import sys
sys.modules["triton"] = None
import sparse_heads._triton.launch
print(sparse_heads._triton.interpreted())
"""


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a new Triton and a new device, without the interpreter; tests take one thing away."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.6.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return monkeypatch


def test_kernels_run_on_a_new_device(hopper):
    assert _triton.why_not_on(GPU) is None
    _triton.require(GPU)
    assert _triton.capability(GPU) == (9, 0)


def test_a_missing_triton_is_named(hopper):
    hopper.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match="'triton' is not available: the package triton is not installed"):
        _triton.require(GPU)


@pytest.mark.parametrize("found", ["3.5.1", "2.9", "3.5.0+git1234"])
def test_an_old_triton_is_named_with_what_is_wanted(found, hopper):
    hopper.setattr(importlib.metadata, "version", lambda name: found)
    assert _triton.why_unavailable() == f"triton {found} is older than 3.6"


@pytest.mark.parametrize("found", ["3.6.0", "3.10.0", "4.0", "3.9.0+git1234"])
def test_versions_are_compared_as_numbers(found, hopper):
    hopper.setattr(importlib.metadata, "version", lambda name: found)
    assert _triton.why_unavailable() is None


def test_cpu_tensors_need_the_interpreter(hopper):
    with pytest.raises(BackendUnavailableError, match="need tensors on a CUDA device, got cpu"):
        _triton.require(CPU)
    hopper.setenv("TRITON_INTERPRET", "1")
    _triton.require(CPU)


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("true", True), ("ON", True), ("0", False), ("", False)])
def test_the_variable_is_read_as_triton_reads_it(value, expected, hopper):
    hopper.setenv("TRITON_INTERPRET", value)
    assert _triton.interpreted() is expected


def test_a_missing_triton_is_named_with_the_interpreter_too(hopper):
    hopper.setenv("TRITON_INTERPRET", "1")
    hopper.setattr(importlib.util, "find_spec", lambda name: None)
    assert _triton.why_not_on(CPU) == "the package triton is not installed"


def test_rocm_is_refused(hopper):
    hopper.setattr(torch.version, "hip", "6.4")
    with pytest.raises(BackendUnavailableError, match="ROCm is not supported"):
        _triton.require(GPU)


def test_an_old_device_is_refused_by_its_capability(hopper):
    hopper.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    message = r"need compute capability \(8, 0\), got \(7, 5\) of cuda:1"
    with pytest.raises(BackendUnavailableError, match=message):
        _triton.require(GPU)


@pytest.mark.parametrize(
    ("found", "expected"), [((8, 9), (8, 9)), ((10, 3), (10, 3)), ((12, 0), (8, 0)), ((12, 1), (8, 0))]
)
def test_a_workstations_device_takes_the_tiles_of_the_oldest(found, expected, hopper):
    hopper.setattr(torch.cuda, "get_device_capability", lambda device: found)
    assert _triton.capability(GPU) == expected


def test_the_interpreter_counts_as_the_oldest_device():
    assert _triton.capability(CPU) == _triton.OLDEST_DEVICE == (8, 0)


def test_the_package_is_light():
    run = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


class Recorder:
    """Stands for a kernel."""

    def __init__(self) -> None:
        self.launched: list[tuple] = []

    def __getitem__(self, grid):
        return lambda **arguments: self.launched.append((grid, arguments))


@pytest.mark.parametrize("grid", [(0,), (4, 0), (0, 2, 1)], ids=str)
def test_an_empty_grid_launches_nothing(grid):
    kernel = Recorder()
    Launch(kernel, grid, {"out": torch.empty(0)}, {"num_warps": 4}).run()
    assert kernel.launched == []


def test_a_launch_hands_over_its_arguments_and_options():
    kernel, out = Recorder(), torch.empty(3)
    Launch(kernel, (4, 2), {"count": 3, "out": out, "ROWS": 16}, {"num_warps": 4, "num_stages": 2}).run()
    (grid, arguments), *more = kernel.launched
    assert not more and grid == (4, 2) and arguments.pop("out") is out
    assert arguments == {"count": 3, "ROWS": 16, "num_warps": 4, "num_stages": 2}


class Elsewhere(torch.Tensor):
    """Says that it lies on the second GPU."""

    device = GPU


def test_a_launch_is_made_on_the_device_of_its_tensors(monkeypatch):
    current: list[torch.device] = []

    @contextlib.contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    class Kernel(Recorder):
        def __getitem__(self, grid):
            return lambda **arguments: self.launched.append(list(current))

    monkeypatch.setattr(torch.cuda, "device", guard)
    kernel = Kernel()
    Launch(kernel, (1,), {"mask": None, "out": torch.empty(3).as_subclass(Elsewhere)}, {}).run()
    assert kernel.launched == [[GPU]] and current == []


# In a process of its own: once the newer settings were written the older cannot be read.
TF32 = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
import sparse_heads as sh
from sparse_heads._triton import allows_tf32

found = [allows_tf32()]
for allowed in (True, False):
    torch.backends.cuda.matmul.allow_tf32 = allowed
    found.append(allows_tf32())
for precision in ("tf32", "ieee", "none"):
    torch.backends.cuda.matmul.fp32_precision = precision
    found.append(allows_tf32())
torch.backends.fp32_precision = "tf32"
found.append(allows_tf32())
assert found == [False, True, False, True, False, False, True], found
x, mask = torch.randn(1, 2, 16), torch.ones(1, 2, dtype=torch.bool)
heads = sh.in_projection(x, torch.randn(32, 16), None, mask, head_dim=16, backend="triton")
heads = sh.attention(heads, heads, heads, backend="triton")
sh.out_projection(heads, torch.randn(16, 32), None, mask, backend="triton")
"""


def test_tf32_may_be_allowed_by_any_setting():
    run = subprocess.run([sys.executable, "-c", TF32], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

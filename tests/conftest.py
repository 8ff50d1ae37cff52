"""Settings for every test: fixed seeds, two threads; and memory that nobody may rely on, for the tests that ask."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator


def has_gpu() -> bool:
    """Asked of the driver: torch may load Triton while it is loaded itself."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


# Threads that spin while they wait take the cores from those that work; read once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Without a GPU the Triton kernels run in the interpreter, on the CPU; Triton reads this when it is imported.
if not has_gpu():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# A busy machine is no failure, and a failure must come back when the tests are run again.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def fixed_conditions() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)


@pytest.fixture
def one_thread(fixed_conditions: None) -> None:
    """For tiny tensors: two threads mostly wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill every new tensor with NaN or the largest integer, those of our kernels too, until something is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)

"""The device that is measured. All of `torch.cuda` that the suite needs is here, and a host in its place for smoke."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter

import torch

from ..environment import git

CLOCKS = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,compute_mode"
PACKAGES = ("triton", "transformers", "numpy")


class Gpu:
    """The current CUDA device, timed by its own events."""

    torch_device = torch.device("cuda")
    smoke = False

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(self.torch_device)
        self.name = properties.name
        # Written before every timed call: several times the cache, so that nothing of the call before is left there.
        self.flushed = torch.empty(
            4 * max(properties.L2_cache_size, 1 << 26), dtype=torch.int8, device=self.torch_device
        )

    def flush(self) -> None:
        """Fill the L2 cache with something else."""
        self.flushed.zero_()

    def stamp(self) -> torch.cuda.Event:
        """A moment in the stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Between two stamps; after `synchronize`."""
        return start.elapsed_time(end) / 1e3

    def synchronize(self) -> None:
        """Wait for everything, and raise what went wrong in it."""
        torch.cuda.synchronize()

    def release(self) -> None:
        """Give back memory that nothing uses."""
        torch.cuda.empty_cache()

    def clocks(self) -> dict[str, str]:
        """Driver, clocks, power and temperature as they are found; nothing is set."""
        try:
            done = subprocess.run(
                ("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"), capture_output=True, text=True
            )
        except OSError as error:
            return {"error": str(error)}
        return dict(zip(CLOCKS.split(","), done.stdout.strip().split(", "), strict=False))

    def describe(self) -> dict[str, object]:
        """The device and what runs it."""
        properties = torch.cuda.get_device_properties(self.torch_device)
        return {
            "name": self.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }


class Host:
    """A CPU timed by the clock on the wall: shows that the suite runs, and nothing else."""

    torch_device = torch.device("cpu")
    smoke = True
    name = "smoke"

    def flush(self) -> None:
        """Nothing: smoke claims no times."""

    def stamp(self) -> float:
        """Now."""
        return perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """Between two stamps."""
        return end - start

    def synchronize(self) -> None:
        """Nothing is asynchronous."""

    def release(self) -> None:
        """Nothing is cached."""

    def clocks(self) -> dict[str, str]:
        """None."""
        return {}

    def describe(self) -> dict[str, object]:
        """Only that this is no device."""
        return {"name": self.name}


Device = Gpu | Host


def session(device: Device) -> dict[str, object]:
    """The passport of one run: device, versions, commit, date."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(changed),
        "smoke": device.smoke,
        "device": device.describe(),
        "as_found": device.clocks(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **found},
    }

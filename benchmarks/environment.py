"""The passport of a result: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

from sparse_heads import _native
from sparse_heads._version import __version__

ROOT = Path(__file__).resolve().parent.parent
THREAD_VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_", "DNNL_", "ONEDNN_")
IMPORT_SCRIPT = """
import sys, time
import torch
start = time.perf_counter()
import sparse_heads
print(time.perf_counter() - start, *(name for name in ("triton", "transformers") if name in sys.modules))
"""


def cpu_description() -> tuple[str, list[str]]:
    """Model name and AVX-512 and AMX flags of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [flag for flag in fields.get("flags", "").split() if flag.startswith(("avx512", "amx"))]
    return fields.get("model name", platform.machine()), sorted(flags)


def machine() -> dict[str, object]:
    """Processor, cores that this process may use, vector flags, operating system and what the environment sets."""
    model, flags = cpu_description()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    system = f"{platform.system()} {platform.machine()}"
    variables = {name: value for name, value in os.environ.items() if name.startswith(THREAD_VARIABLES)}
    found = {"cpu": model, "cores": cores, "torch_capability": capability, "flags": flags}
    return found | {"system": system, "variables": variables}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the timings."""
    found = {"python": platform.python_version(), "sparse_heads": __version__}
    return found | {package: version(package) for package in ("torch", "transformers", "numpy")}


def git(*arguments: str) -> str:
    """Output of a git command in the source tree, empty where there is no repository."""
    try:
        done = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def passport() -> dict[str, object]:
    """Everything needed to place a number; `dirty` tells of changes to tracked files other than results."""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "commit": git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(changed),
        "cpu_extension": _native.why_unavailable() or "available",
    }


def import_times(rounds: int) -> dict[str, object]:
    """Seconds that `import sparse_heads` adds after torch, each in a fresh process; the heavy modules it loads."""
    samples, heavy = [], set()
    for _ in range(rounds):
        done = subprocess.run(
            (sys.executable, "-c", IMPORT_SCRIPT), cwd=ROOT, capture_output=True, text=True, check=True
        )
        seconds, *modules = done.stdout.split()
        samples.append(float(seconds))
        heavy.update(modules)
    return {"samples": samples, "loads": sorted(heavy)}

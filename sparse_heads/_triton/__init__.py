"""Triton: is it there, for which tensors, and how a kernel is launched. Importing this imports no Triton."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import torch

from ..errors import BackendUnavailableError

OLDEST = (3, 6)
OLDEST_DEVICE = (8, 0)  # compute capability
# Kernels for the interpreter are chosen as for the oldest device.
Capability = tuple[int, int]


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors. Triton reads the variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").strip().lower() in ("1", "true", "on", "yes", "y")


def why_unavailable() -> str | None:
    """Why Triton cannot be used at all, or None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    found = importlib.metadata.version("triton")
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        return f"triton {found} is older than {'.'.join(map(str, OLDEST))}"
    return None


def why_not_on(device: torch.device) -> str | None:
    """Why kernels cannot run on tensors of `device`, or None when they can."""
    reason = why_unavailable()
    if reason is not None:
        return reason
    if interpreted():
        return None
    if device.type != "cuda":
        return f"Triton kernels need tensors on a CUDA device, got {device}"
    if torch.version.hip is not None:
        return "ROCm is not supported"
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST_DEVICE:
        return f"Triton kernels need compute capability {OLDEST_DEVICE}, got {found} of {device}"
    return None


def require(device: torch.device) -> None:
    """Raise BackendUnavailableError unless kernels can run on tensors of `device`."""
    reason = why_not_on(device)
    if reason is not None:
        raise BackendUnavailableError(f"backend: 'triton' is not available: {reason}")


def allows_tf32() -> bool:
    """Whether float32 products may be TF32: the newer setting, which the older ones write too.

    `allow_tf32` raises once the newer one was written.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# Read while compiling; what is compiled is guarded by these settings anyway. torch.compiler.assume_constant_result sets
# the same, but imports the compiler for it, and with it Triton, before anybody can ask for the interpreter.
allows_tf32._dynamo_marked_constant = True


def capability(device: torch.device) -> Capability:
    """Compute capability by which kernels are chosen for tensors of `device`."""
    found = torch.cuda.get_device_capability(device) if device.type == "cuda" else OLDEST_DEVICE
    # 12.0 is a workstation's: the matrix instructions of the oldest, and 99 KiB of shared memory for the 227 of 10.0.
    return OLDEST_DEVICE if found >= (12, 0) else found

"""What runs here and why the rest does not: the text of `sparse-heads env`."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import _native, _triton
from ._build import BuildError, compiler_version, find_compiler
from ._version import __version__
from .ops.attention.dense import measured

PACKAGES = ("torch", "transformers", "triton", "safetensors", "huggingface_hub", "accelerate")


def environment() -> list[tuple[str, str]]:
    """Pairs of a name and a text: backends, versions, compiler, processor and cache. May build the extension."""
    reason = _native.why_unavailable()
    return [
        ("sparse_heads", __version__),
        ("backend reference", "available"),
        ("backend sdpa", "available"),
        ("backend cpu", f"not available: {reason}" if reason else f"available: {_native.library()}"),
        ("backend triton", _triton_backend()),
        ("backend cuda", "not available: no kernels yet"),
        ("backend auto, projections", "reference" if reason else "cpu"),
        ("backend auto, attention", _attention_backends(reason is None)),
        ("backend auto, decode", "reference" if reason else "cpu"),
        ("backend auto, statistics", "reference" if reason else "cpu"),
        *_on_a_gpu(),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        *((name, _version_of(name)) for name in PACKAGES),
        ("C++ compiler", _compiler()),
        ("processor", f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"),
        ("threads", str(torch.get_num_threads())),
        ("cache", _cache()),
    ]


def _attention_backends(has_extension: bool) -> str:
    beyond_sdpa = "softcap, sinks and masks per request"
    if not has_extension:
        return f"sdpa; reference for {beyond_sdpa}"
    if torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return f"cpu; float64 by sdpa, but for {beyond_sdpa}"
    return f"sdpa; cpu for {beyond_sdpa}"


def _triton_backend() -> str:
    reason = _triton.why_unavailable()
    if reason is None and _triton.interpreted():
        return "available on the CPU, in Triton's interpreter (TRITON_INTERPRET)"
    if reason is None:
        cuda = torch.cuda.is_available()
        reason = _triton.why_not_on(torch.device("cuda")) if cuda else "PyTorch finds no CUDA device"
    return f"not available: {reason}" if reason else f"available: {torch.cuda.get_device_name()}"


def _on_a_gpu() -> list[tuple[str, str]]:
    """What `auto` runs on a CUDA device, where there is one; which is faster there has not been measured."""
    if not torch.cuda.is_available():
        return []
    kernels = "reference" if _triton.why_not_on(torch.device("cuda")) else "triton"
    return [
        ("backend auto, CUDA projections", f"reference (kept rows gathered, PyTorch's product); {kernels} per request"),
        ("backend auto, CUDA attention", f"sdpa; {kernels} for softcap, sinks and masks per request"),
        ("backend auto, CUDA decode", "reference"),
        ("backend auto, CUDA statistics", "reference"),
        ("PyTorch's attention kernels", _dense_kernels(torch.cuda.get_device_name())),
    ]


def _dense_kernels(device_name: str) -> str:
    table = measured(device_name)
    if table is None:
        return f"as PyTorch chooses: not measured on {device_name}"
    return f"in the order measured on {device_name} with torch {table['torch']}, {table['date']}"


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compiler() -> str:
    try:
        compiler = find_compiler()
        return f"{' '.join(compiler)}: {compiler_version(compiler).splitlines()[0]}"
    except BuildError as error:
        return f"none: {error}"


def _cache() -> str:
    try:
        return str(_native.cache_directory())
    except RuntimeError as error:
        return f"none: {error}"

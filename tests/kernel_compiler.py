"""Compiles one `Launch` for a device that need not be there, and reads what became of it.

Runs where TRITON_INTERPRET is unset: Triton reads it when it is imported.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from sparse_heads._triton.launch import Launch

RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)")


class Compiled(NamedTuple):
    """What a kernel takes on a device, and which of its instructions it uses.

    local: bytes of local memory, spilled registers among them; shared: bytes of shared memory a block.
    """

    registers: int
    local: int
    shared: int
    local_instructions: int
    wgmma: bool
    tcgen05: bool
    asynchronous: bool
    cubin_bytes: int
    seconds: float


def source(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton would compile for these arguments, and its options.

    Triton has no public way to ask for it, so this takes the steps of JITFunction.run: integers that are 1 become
    constants, those divisible by 16 and pointers aligned to 16 bytes are marked, large integers become int64.
    """
    arguments = {**launch.arguments, **launch.options, "debug": False}
    backend = make_backend(target)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, _ = bind(**arguments)
    options, signature, constants, attributes = launch.kernel._pack_args(
        backend, arguments, bound, specialization, launch.options
    )
    return ASTSource(launch.kernel, signature, constants, attributes), vars(options)


def target_of(capability: tuple[int, int]) -> GPUTarget:
    return GPUTarget("cuda", 10 * capability[0] + capability[1], 32)


def identity(launch: Launch, capability: tuple[int, int]) -> str:
    """Equal for launches that run the same binary."""
    what, options = source(launch, target_of(capability))
    return f"{what.hash()} {options} {capability}"


def compile_launch(launch: Launch, capability: tuple[int, int]) -> Compiled:
    target = target_of(capability)
    what, options = source(launch, target)
    start = time.perf_counter()
    kernel = triton.compile(what, target=target, options=options)
    seconds = time.perf_counter() - start
    cubin = kernel.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = _dump(file.name, "--dump-resource-usage")
        instructions = _dump(file.name, "--dump-sass")
    registers, stack, local = map(int, RESOURCES.search(resources).groups())
    return Compiled(
        registers=registers,
        local=stack + local,
        shared=kernel.metadata.shared,
        local_instructions=len(re.findall(r"\b(?:LDL|STL)\b", instructions)),
        wgmma="HGMMA" in instructions,
        tcgen05=re.search(r"\bUTC\w*MMA", instructions) is not None,
        asynchronous=re.search(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b", instructions) is not None,
        cubin_bytes=len(cubin),
        seconds=round(seconds, 2),
    )


def _dump(path: str, what: str) -> str:
    # RuntimeError when Triton came without the tool.
    command = [triton.knobs.nvidia.cuobjdump.path, what, path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

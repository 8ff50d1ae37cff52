"""Turns the C++ sources into one shared library.

Standard library only, and nothing of sparse_heads: setup.py loads this file by its path, where torch may be absent.

Kernel sources are `csrc/cpu/*.cpp`, every one a translation unit of its own, with `csrc` on the include path. They
see PyTorch's stable ABI only (`torch/csrc/stable`), and come without `-march`: AVX-512 is chosen at run time.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# -std=c++17 would switch contraction to fused multiply-add off, which GCC's own dialect has on.
COMPILE_FLAGS = (
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fPIC",
    "-fvisibility=hidden",
)
OUTPUT_LINES = 30


class BuildError(Exception):
    """The library cannot be built here; the message says why."""


def source_digest(directory: Path) -> str:
    """Hash the names and contents of every file under `directory`; BuildError when it has no kernel sources."""
    if not list(directory.glob("cpu/*.cpp")):
        raise BuildError(f"no C++ sources in {directory / 'cpu'}")
    digest = hashlib.sha256()
    for path in sorted(path for pattern in ("*.h", "*.cpp") for path in directory.rglob(pattern)):
        digest.update(f"{path.relative_to(directory).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def find_compiler() -> tuple[str, ...]:
    """The C++ compiler's command: `CXX` when it is set (arguments allowed), else c++, else g++."""
    if sys.platform == "win32":
        raise BuildError("the extension is not built on Windows")
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["c++"], ["g++"]]:
        found = shutil.which(command[0])
        if found:
            return (found, *command[1:])
    if chosen:
        raise BuildError(f"no C++ compiler: tried CXX={shlex.join(chosen)}")
    raise BuildError("no C++ compiler: tried c++, g++; set CXX")


def compiler_version(compiler: Sequence[str]) -> str:
    """What the compiler says of itself; BuildError when it does not run."""
    return _run([*compiler, "--version"])


def build_key(directory: Path, compiler: Sequence[str], torch_version: str) -> str:
    """Name what a library depends on: sources, compiler and its version, flags, torch and machine."""
    parts = (
        source_digest(directory),
        os.path.realpath(compiler[0]),
        shlex.join(compiler),
        compiler_version(compiler),
        *COMPILE_FLAGS,
        torch_version,
        sys.platform,
        platform.machine(),
        *platform.libc_ver(),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def build_library(directory: Path, compiler: Sequence[str], torch_directory: Path, output: Path) -> None:
    """Compile `directory` against the torch in `torch_directory` and move the library to `output` when it is whole."""
    with tempfile.TemporaryDirectory(dir=output.parent, prefix="build-") as scratch:
        script = Path(scratch, "build.ninja")
        script.write_text(_ninja_script(directory, compiler, torch_directory), encoding="utf-8")
        _run([_find_ninja(), "-C", scratch])
        os.replace(Path(scratch, "library.so"), output)


def _ninja_script(directory: Path, compiler: Sequence[str], torch_directory: Path) -> str:
    headers = [directory, torch_directory / "include", torch_directory / "include/torch/csrc/api/include"]
    compile_command = shlex.join([*compiler, *COMPILE_FLAGS, *(f"-I{path}" for path in headers)])
    # Only the stable ABI's symbols are undefined, and the libtorch_cpu that this process has loaded provides them.
    link_command = shlex.join([*compiler, "-shared", f"-L{torch_directory / 'lib'}"])
    lines = [
        f"rule compile\n  command = {_escape(compile_command)} -c $in -o $out",
        f"rule link\n  command = {_escape(link_command)} $in -ltorch_cpu -lc10 -o $out",
    ]
    objects = []
    for source in sorted(directory.glob("cpu/*.cpp")):
        objects.append(f"{source.stem}.o")
        lines.append(f"build {_escape_path(objects[-1])}: compile {_escape_path(str(source.resolve()))}")
    lines.append(f"build library.so: link {' '.join(map(_escape_path, objects))}")
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("$", "$$")


def _escape_path(path: str) -> str:
    return _escape(path).replace(" ", "$ ").replace(":", "$:")


def _find_ninja() -> str:
    try:
        import ninja

        found = shutil.which("ninja", path=ninja.BIN_DIR)
    except ImportError:
        found = None
    found = found or shutil.which("ninja")
    if not found:
        raise BuildError("no ninja: pip install ninja")
    return found


def _run(command: Sequence[str]) -> str:
    """Run a command and return its output; BuildError with the tail of the output when it fails."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
    except OSError as error:
        raise BuildError(f"{command[0]} does not run") from error
    text = done.stdout.decode(errors="replace")
    if done.returncode != 0:
        tail = "\n".join(text.splitlines()[-OUTPUT_LINES:])
        raise BuildError(f"{shlex.join(command)} failed with exit status {done.returncode}:\n{tail}")
    return text

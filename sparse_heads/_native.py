"""Finds or builds the C++ extension, once per process, and says why when there is none.

Looked for in this order: the library that setup.py built beside this file, the user's cache, a build now. The cache is
`SPARSE_HEADS_CACHE`, else `sparse_heads` under `XDG_CACHE_HOME` or `~/.cache`; a library's name there holds the hash of
what it was made from and of its own bytes, so an outdated or a truncated one is never loaded.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ._build import BuildError, build_key, build_library, find_compiler, source_digest
from .errors import BackendUnavailableError

PACKAGE_DIRECTORY = Path(__file__).parent
# An installed package carries csrc inside, a checkout beside.
SOURCE_DIRECTORY = next(
    (path for path in (PACKAGE_DIRECTORY / "csrc", PACKAGE_DIRECTORY.parent / "csrc") if path.is_dir()),
    PACKAGE_DIRECTORY / "csrc",
)

logger = logging.getLogger("sparse_heads")


class _Outcome(NamedTuple):
    library: Path | None
    reason: str | None


_outcome: _Outcome | None = None
_once = threading.Lock()


def load() -> None:
    """Load the extension, which registers its kernels; BackendUnavailableError with the reason when there is none."""
    reason = why_unavailable()
    if reason is not None:
        raise BackendUnavailableError(f'backend: "cpu" needs the C++ extension, which is not available: {reason}')


def available() -> bool:
    """Whether the extension is loaded; the first call finds or builds it."""
    return why_unavailable() is None


def why_unavailable() -> str | None:
    """Why the extension is not available, or None when it is."""
    return _resolve().reason


def library() -> Path | None:
    """The file that the extension was loaded from."""
    return _resolve().library


def cache_directory() -> Path:
    """Where built libraries are kept for this user; RuntimeError when the user has no home directory."""
    chosen = os.environ.get("SPARSE_HEADS_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sparse_heads"


def _resolve() -> _Outcome:
    global _outcome
    if _outcome is None:
        with _once:
            if _outcome is None:
                try:
                    _outcome = _Outcome(find_or_build(SOURCE_DIRECTORY), None)
                except (BuildError, OSError) as error:
                    cause = f": {error.__cause__}" if error.__cause__ else ""
                    _outcome = _Outcome(None, f"{error}{cause}")
    return _outcome


def find_or_build(sources: Path) -> Path:
    """Load the library of the kernels in `sources` and return its file; BuildError or OSError when that fails."""
    prebuilt = PACKAGE_DIRECTORY / f"_C.{source_digest(sources)}.so"
    if prebuilt.is_file():
        try:
            torch.ops.load_library(str(prebuilt))
            return prebuilt
        except OSError as error:
            logger.warning("%s does not load, building the CPU extension again: %s", prebuilt, error)
    compiler = find_compiler()
    found = _find_or_build_in_cache(sources, compiler, build_key(sources, compiler, torch.__version__))
    torch.ops.load_library(str(found))
    return found


def _find_or_build_in_cache(sources: Path, compiler: tuple[str, ...], key: str) -> Path:
    try:
        cache = cache_directory()
        found = _find(cache, key)
        if found is not None:
            return found
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{key}.lock"):
            return _find(cache, key) or _build(sources, compiler, key, cache)
    except (OSError, RuntimeError) as error:
        logger.warning("the cache cannot be used, so the extension is built for this process alone: %s", error)
    private = tempfile.mkdtemp(prefix="sparse_heads-")
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    return _build(sources, compiler, key, Path(private))


def _find(cache: Path, key: str) -> Path | None:
    """The library made under `key`; the hash in its name must be that of its bytes."""
    return next((path for path in cache.glob(f"{key}-*.so") if path == _named_by_content(path, key)), None)


def _build(sources: Path, compiler: tuple[str, ...], key: str, cache: Path) -> Path:
    logger.warning("building the CPU extension, about 20 s, once")
    fresh = cache / f"{key}.so"
    build_library(sources, compiler, Path(torch.__file__).parent, fresh)
    built = _named_by_content(fresh, key)
    os.replace(fresh, built)
    return built


def _named_by_content(path: Path, key: str) -> Path:
    return path.with_name(f"{key}-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.so")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` against other processes; the system frees it when its holder dies."""
    import fcntl  # not on Windows, where there is no compiler to get here with

    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process is building the CPU extension, waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield

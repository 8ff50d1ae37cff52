"""Building, caching and loading the extension: what happens the first time, and what when something is in the way."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sparse_heads import _build, _native
from sparse_heads.errors import BackendUnavailableError

ROOT = Path(__file__).parents[1]
TINY_SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
# Stands for the compiler; keeps a record of what it compiled, slowly enough for other processes to arrive meanwhile.
RECORDING_COMPILER = """#!/bin/sh
case "$1" in
--version) ;;
*-shared*) ;;
*) echo "$$" >> "$COMPILER_RECORD"; sleep 1 ;;
esac
exec c++ "$@"
"""
USE = """
import logging, sys
from pathlib import Path
logging.basicConfig(format="%(message)s", stream=sys.stdout)
from sparse_heads import _native
_native.SOURCE_DIRECTORY = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
_native.load()
print("library", _native.library(), flush=True)
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    directory = tmp_path / "with space $ and : colon"
    (directory / "cpu").mkdir(parents=True)
    (directory / "cpu" / "tiny.cpp").write_text(TINY_SOURCE)
    return directory


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "cache"
    monkeypatch.setenv("SPARSE_HEADS_CACHE", str(directory))
    return directory


@pytest.fixture
def fresh(sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`_native` as a new process finds it, with tiny sources and an empty cache."""
    monkeypatch.setattr(_native, "SOURCE_DIRECTORY", sources)
    monkeypatch.setattr(_native, "_outcome", None)
    return sources


@pytest.fixture
def compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The record of what `CXX` compiled, a line for each source file."""
    compiler, record = tmp_path / "compiler", tmp_path / "record"
    compiler.write_text(RECORDING_COMPILER)
    compiler.chmod(0o755)
    record.touch()
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("COMPILER_RECORD", str(record))
    return record


def answer(library: Path) -> int:
    return ctypes.CDLL(str(library)).answer()


def test_the_package_finds_its_own_sources():
    assert list(_native.SOURCE_DIRECTORY.glob("cpu/*.cpp"))


def test_first_use_builds_and_the_second_finds(sources: Path, cache: Path, compilations: Path):
    built = _native.find_or_build(sources)
    assert built.parent == cache and answer(built) == 42
    assert _native.find_or_build(sources) == built
    assert len(compilations.read_text().splitlines()) == 1
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".so"]


def test_changed_sources_are_built_again(sources: Path, cache: Path):
    first = _native.find_or_build(sources)
    (sources / "params.h").write_text("#pragma once\n")
    second = _native.find_or_build(sources)
    (sources / "cpu" / "tiny.cpp").write_text(TINY_SOURCE.replace("42", "43"))
    third = _native.find_or_build(sources)
    assert len({first, second, third}) == 3
    assert answer(third) == 43


def test_the_key_names_compiler_flags_and_torch(sources: Path, monkeypatch: pytest.MonkeyPatch):
    compiler = _build.find_compiler()
    keys = [
        _build.build_key(sources, compiler, "2.13.0"),
        _build.build_key(sources, compiler, "2.12.0"),
        _build.build_key(sources, (*compiler, "-g"), "2.13.0"),
    ]
    monkeypatch.setattr(_build, "COMPILE_FLAGS", ("-O0",))
    keys.append(_build.build_key(sources, compiler, "2.13.0"))
    assert len(set(keys)) == 4


@pytest.mark.parametrize("length", [0, 100, 5000])
def test_a_truncated_library_is_built_again(sources: Path, cache: Path, compilations: Path, length: int):
    built = _native.find_or_build(sources)
    content = built.read_bytes()
    assert length < len(content)
    built.unlink()  # a new file: this process still has the old one mapped
    built.write_bytes(content[:length])
    again = _native.find_or_build(sources)
    assert again.read_bytes() == content
    assert len(compilations.read_text().splitlines()) == 2


def test_a_build_that_is_cut_off_leaves_nothing_to_load(sources: Path, cache: Path):
    cache.mkdir()
    compiler = _build.find_compiler()
    key = _build.build_key(sources, compiler, _native.torch.__version__)
    (cache / f"{key}.so").write_bytes(b"half a library")
    (cache / "build-left-over").mkdir()
    assert answer(_native.find_or_build(sources)) == 42


def test_processes_that_start_together_build_once(sources: Path, cache: Path, compilations: Path):
    command = [sys.executable, "-c", USE, str(sources)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(compilations.read_text().splitlines()) == 1
    assert len({output.splitlines()[-1] for output in outputs}) == 1
    assert sum(output.count("about 20 s, once") for output in outputs) == 1
    assert sum(output.count("waiting for it") for output in outputs) == 2


def test_threads_that_start_together_build_once(fresh: Path, compilations: Path):
    results = []
    threads = [threading.Thread(target=lambda: results.append(_native.available())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4
    assert len(compilations.read_text().splitlines()) == 1


def test_an_interrupted_build_leaves_no_trace(sources: Path, cache: Path, compilations: Path):
    # A shell's background jobs ignore the signal, and so would what they start.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", heed + USE, str(sources)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        process.stdin.write(b"\n")
        process.stdin.flush()
        while not compilations.read_text() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in process.communicate()[1]
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert answer(_native.find_or_build(sources)) == 42


def test_an_unusable_cache_gives_a_library_for_this_process(sources: Path, tmp_path: Path, monkeypatch, caplog):
    (tmp_path / "file").touch()  # a directory under a file cannot be made, not even by root
    monkeypatch.setenv("SPARSE_HEADS_CACHE", str(tmp_path / "file" / "cache"))
    built = _native.find_or_build(sources)
    assert answer(built) == 42
    assert not built.is_relative_to(tmp_path)
    assert "the cache cannot be used" in caplog.text


def test_a_read_only_cache_still_serves_what_it_holds(sources: Path, cache: Path, monkeypatch):
    built = _native.find_or_build(sources)

    def refuse(path: Path):
        raise PermissionError(f"read-only: {path}")

    monkeypatch.setattr(_native, "_locked", refuse)
    assert _native.find_or_build(sources) == built


def test_without_a_home_directory(sources: Path, monkeypatch, caplog):
    monkeypatch.delenv("SPARSE_HEADS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert answer(_native.find_or_build(sources)) == 42
    assert "home directory" in caplog.text


def test_cache_directory_follows_the_environment(monkeypatch):
    monkeypatch.delenv("SPARSE_HEADS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert _native.cache_directory() == Path.home() / ".cache" / "sparse_heads"
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert _native.cache_directory() == Path("/somewhere/sparse_heads")
    monkeypatch.setenv("SPARSE_HEADS_CACHE", "/elsewhere")
    assert _native.cache_directory() == Path("/elsewhere")


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CXX": "/nonexistent -O1"}, r"no C\+\+ compiler: tried CXX=/nonexistent -O1"),
        ({"CXX": "", "PATH": ""}, r"no C\+\+ compiler: tried c\+\+, g\+\+; set CXX"),
        ({"CXX": "/"}, r"no C\+\+ compiler: tried CXX=/"),
        ({"CXX": "false"}, "false --version failed with exit status 1"),
    ],
)
def test_a_missing_compiler_is_named(fresh: Path, monkeypatch, variables: dict[str, str], reason: str):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert not _native.available()
    assert _native.library() is None
    with pytest.raises(BackendUnavailableError, match=f'backend: "cpu" needs the C\\+\\+ extension.*{reason}'):
        _native.load()


def test_a_compile_error_is_quoted_and_not_tried_again(fresh: Path, cache: Path, compilations: Path):
    (fresh / "cpu" / "tiny.cpp").write_text("int broken( {\n")
    for _ in range(2):
        with pytest.raises(BackendUnavailableError, match=r"(?s)failed with exit status.*tiny\.cpp:1.*error"):
            _native.load()
    assert len(compilations.read_text().splitlines()) == 1
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_library_that_does_not_load_gives_the_reason(fresh: Path, cache: Path):
    (fresh / "cpu" / "tiny.cpp").write_text("int not_in_torch(); int answer = not_in_torch();\n")
    with pytest.raises(BackendUnavailableError, match=r"(?s)undefined symbol.*not_in_torch"):
        _native.load()


def test_absent_sources_are_named(fresh: Path, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(_native, "SOURCE_DIRECTORY", tmp_path / "nowhere")
    assert "no C++ sources in" in (_native.why_unavailable() or "")


def test_a_prebuilt_library_is_used_only_for_its_own_sources(sources: Path, cache: Path, tmp_path: Path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(_native, "PACKAGE_DIRECTORY", package)
    prebuilt = package / f"_C.{_build.source_digest(sources)}.so"
    _build.build_library(sources, _build.find_compiler(), Path(_native.torch.__file__).parent, prebuilt)
    monkeypatch.setenv("CXX", "/nonexistent")
    assert _native.find_or_build(sources) == prebuilt
    (sources / "cpu" / "tiny.cpp").write_text(TINY_SOURCE.replace("42", "43"))
    with pytest.raises(_build.BuildError, match="no C\\+\\+ compiler"):
        _native.find_or_build(sources)

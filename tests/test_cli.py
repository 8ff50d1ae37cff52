"""The command line: what it prints, passes on and refuses, and that it stays light."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparse_heads import cli

ROOT = Path(__file__).parents[1]


def run_module(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    command = [sys.executable, "-m", "sparse_heads", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_help_names_the_commands():
    done = run_module("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("demo", "env", "bench"))


def test_errors_are_one_line_and_no_traceback(tmp_path: Path):
    text = tmp_path / "short.txt"
    text.write_text("only one\n")
    done = run_module("demo", "--text", str(text), "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("sparse-heads: --text: wanted at least 64 different sentences")
    assert "Traceback" not in done.stderr


def test_a_text_file_that_is_not_there_is_refused():
    result = CliRunner().invoke(cli.app, ["demo", "--text", "no-such-file.txt"])
    assert result.exit_code == 2
    assert "no-such-file.txt" in result.output


def test_demo_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(cli.app, ["demo"])
    assert "transformers, matplotlib: pip install 'sparse_heads[transformers,viz]'" in str(result.exception)


def test_env_shows_every_row(monkeypatch: pytest.MonkeyPatch):
    rows = [("backend cpu", "not available: [no compiler]"), ("torch", "2.13.0")]
    monkeypatch.setattr("sparse_heads.environment.environment", lambda: rows)
    result = CliRunner().invoke(cli.app, ["env"])
    assert result.exit_code == 0
    assert [" ".join(line.split()) for line in result.output.splitlines()] == [" ".join(row) for row in rows]


def test_bench_passes_everything_on(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess:
        calls.append((command, options["cwd"]))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(cli.subprocess, "run", run)
    result = CliRunner().invoke(cli.app, ["bench", "--suite", "block", "--help"])
    assert result.exit_code == 3
    assert calls == [([sys.executable, "-m", "benchmarks.run", "--suite", "block", "--help"], ROOT)]


def test_bench_outside_a_checkout_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "sparse_heads" / "cli.py"))
    result = CliRunner().invoke(cli.app, ["bench"])
    assert "bench: wanted a source checkout with benchmarks/run.py, got an install in" in str(result.exception)


def test_the_command_line_is_light():
    code = "import sys, sparse_heads.cli; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert not {"transformers", "matplotlib", "triton"} & set(done.stdout.split())

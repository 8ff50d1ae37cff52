"""Imports run one way, without circles, and importing the package stays light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The level of a module is that of its longest prefix here. A module imports from lower levels, or its own folder; at
# the top, which is everybody's folder, from its own level.
LEVELS = {
    "sparse_heads": 7,
    "sparse_heads.__main__": 7,
    "sparse_heads._version": 0,
    "sparse_heads._build": 0,
    "sparse_heads.errors": 0,
    "sparse_heads._attention_arguments": 1,
    "sparse_heads._files": 1,
    "sparse_heads._native": 1,
    "sparse_heads._ranking": 1,
    "sparse_heads._triton": 1,
    "sparse_heads.heads": 1,
    "sparse_heads.layers": 1,
    "sparse_heads.means": 1,
    "sparse_heads.gates": 2,
    "sparse_heads.ops": 2,
    "sparse_heads.cost": 3,
    "sparse_heads.pruning": 3,
    "sparse_heads.models": 4,
    "sparse_heads.integrations": 5,
    "sparse_heads.environment": 5,
    "sparse_heads.demo": 6,
    "sparse_heads.cli": 7,
    "sparse_heads.testing": 6,
}


def find_modules() -> dict[str, Path]:
    modules = {}
    for path in sorted(ROOT.glob("sparse_heads/**/*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = find_modules()


def is_package(module: str) -> bool:
    return MODULES[module].name == "__init__.py"


def level(module: str) -> int:
    prefix = module
    while prefix not in LEVELS or (prefix == "sparse_heads" and module != prefix):
        if "." not in prefix:
            raise KeyError(f"{module} has no level: give its file one in tests/test_layering.py")
        prefix = prefix.rpartition(".")[0]
    return LEVELS[prefix]


def folder(module: str) -> str:
    return module if is_package(module) else module.rpartition(".")[0]


def imported(module: str, types: bool = True) -> set[str]:
    """The modules of the package that `module` imports, inside functions too; with or without those for types alone."""
    package = folder(module)
    names = set()
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types:
            skipped.update(node.body)
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])])
            submodules = {f"{base}.{alias.name}" for alias in node.names} & MODULES.keys()
            names |= submodules
            if len(submodules) < len(node.names):
                names.add(base)
    return names & MODULES.keys()


def test_every_folder_is_a_package():
    for path in MODULES.values():
        assert (path.parent / "__init__.py").is_file(), f"{path.parent} would be left out of the installed package"


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str):
    for name in imported(module):
        neighbours = folder(name) == folder(module) and (folder(name) != "sparse_heads" or level(name) == level(module))
        # A folder inside its own folder serves it.
        neighbours |= folder(name).startswith(f"{folder(module)}.") and folder(module) != "sparse_heads"
        assert neighbours or level(name) < level(module), f"{module} imports {name}"


def test_nothing_imports_what_serves_tests_or_the_command_line():
    for module in MODULES:
        assert "sparse_heads.testing" not in imported(module), module
    assert not {"sparse_heads.cli", "sparse_heads.demo"} & imported("sparse_heads")


def test_operators_never_import_each_other():
    def operator(module: str) -> list[str]:
        return module.split(".")[2:3] if module.startswith("sparse_heads.ops.") else []

    for module in MODULES:
        for name in imported(module):
            if operator(module) and operator(name):
                assert operator(name) == operator(module), f"{module} imports {name}"


def test_there_are_no_circles():
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " imports ".join([*path[path.index(module) :], module])
        if module not in finished:
            for name in imported(module, types=False):
                visit(name, (*path, module))
            finished.add(module)

    for module in MODULES:
        visit(module, ())


def test_import_is_light():
    code = "import sys, torch; before = set(sys.modules); import sparse_heads; print(*set(sys.modules) - before)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    loaded = set(done.stdout.split())
    assert "sparse_heads" in loaded
    assert not loaded & {"triton", "transformers", "matplotlib", "typer", "huggingface_hub", "accelerate"}

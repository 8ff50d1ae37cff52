"""Puts csrc inside the package, and builds the extension ahead of time where torch and a compiler are at hand.

Everything else stands in pyproject.toml. torch is found only under `pip install --no-build-isolation`; without it, or
when the build fails, the package installs all the same and builds the extension on first use.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
OLDEST_TORCH = (2, 11)


def load_build_module():
    """Import sparse_heads/_build.py by its path: importing the package would import torch."""
    spec = importlib.util.spec_from_file_location("sparse_heads_build", ROOT / "sparse_heads" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def find_torch() -> Path | None:
    """The directory of a torch that is new enough, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    version = tuple(int(part) for part in importlib.metadata.version("torch").split(".")[:2])
    return Path(spec.submodule_search_locations[0]) if version >= OLDEST_TORCH else None


build = load_build_module()
torch_directory = find_torch()


class BuildLibrary(build_ext):
    """Builds by the same recipe as the first use does, into a file named by the hash of the sources."""

    def get_ext_filename(self, fullname: str) -> str:
        *package, name = fullname.split(".")
        return os.path.join(*package, f"{name}.{build.source_digest(ROOT / 'csrc')}.so")

    def build_extension(self, extension: Extension) -> None:
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            build.build_library(ROOT / "csrc", build.find_compiler(), torch_directory, output)
        except build.BuildError as error:
            raise CompileError(str(error)) from error


setup(
    packages=[*find_packages(include=["sparse_heads", "sparse_heads.*"]), "sparse_heads.csrc", "sparse_heads.csrc.cpu"],
    package_dir={"sparse_heads.csrc": "csrc"},
    package_data={"": ["*.h", "*.cpp", "*.json", "py.typed"]},
    ext_modules=[] if torch_directory is None else [Extension("sparse_heads._C", [], optional=True)],
    cmdclass={"build_ext": BuildLibrary},
)

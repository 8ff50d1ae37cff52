"""Ahead of time, for GPUs that need not be there: does every kernel compile, in which memory, on tensor cores?

Under `full`, also with an older Triton where SPARSE_HEADS_OLD_TRITON names a folder that has one, as
`pip install --no-deps --target FOLDER triton==3.6.0` makes it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparse_heads.ops.attention.triton import configs as attention_configs
from sparse_heads.ops.projection.triton import configs as projection_configs

TESTS = Path(__file__).parent
OLD_TRITON = "SPARSE_HEADS_OLD_TRITON"
# Bytes of shared memory that a block may have.
LARGEST_SHARED = {(8, 0): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}
TENSOR_CORES = {(9, 0): "wgmma", (10, 0): "tcgen05"}
# The tile's size that is the rows of the products. wgmma and tcgen05 take 64 rows or more.
ROWS_OF_PRODUCTS = {
    "_attention_forward": "BLOCK_M",
    "_attention_backward_keys": "BLOCK_N",
    "_attention_backward_queries": "BLOCK_M",
    "in_projection_kernel": "BLOCK_M",
    "in_projection_backward_kernel": "BLOCK_M",
    "out_projection_kernel": "BLOCK_M",
    "out_projection_backward_kernel": "BLOCK_M",
    "weight_gradient_kernel": "BLOCK_M",
}
# The kernel of each pass of attention; its rows of the tables may have variants, after a comma.
ATTENTION_KERNELS = {
    "forward": "_attention_forward",
    "backward prepare": "_attention_backward_prepare",
    "backward keys": "_attention_backward_keys",
    "backward queries": "_attention_backward_queries",
}
# A kernel that runs with each part of the table.
PROJECTION_KERNELS = {
    "tokens": "in_projection_kernel",
    "tokens, gated": "out_projection_backward_kernel",
    "weight": "weight_gradient_kernel",
}

Record = dict[str, Any]


def run(script: str, *arguments: object, cache: Path, old: bool = False) -> str:
    """What a script beside this file prints, in a process that compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(TESTS.parent), environment.get("PYTHONPATH")]
    if old:
        if OLD_TRITON not in os.environ:
            pytest.skip(f"{OLD_TRITON} names no folder with an older Triton")
        paths.insert(0, os.environ[OLD_TRITON])
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TRITON_CACHE_DIR": str(cache),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(TESTS / script), *map(str, arguments)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def compile_kernels(folder: Path, *arguments: str, old: bool = False) -> list[Record]:
    output = folder / "records.json"
    run("compile_kernels.py", "--output", output, *arguments, cache=folder / "cache", old=old)
    return json.loads(output.read_text())["kernels"]


RUNS = {"headline": ("headline", False), "full": ("full", False), "full with an older Triton": ("full", True)}


@pytest.fixture(
    scope="module", params=[name if name == "headline" else pytest.param(name, marks=pytest.mark.full) for name in RUNS]
)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    cases, old = RUNS[request.param]
    return compile_kernels(tmp_path_factory.mktemp("kernels"), "--cases", cases, old=old)


def faults(records: list[Record], found: dict[str, Any]) -> str:
    """What is wrong with whom, a line each."""
    return "\n".join(
        f"sm_{record['capability'][0]}0 {record['kernel']} {record['constants']} {record['options']} of "
        f"{record['case']}: {found[index]}"
        for index, record in enumerate(records)
        if index in found
    )


def report(records: list[Record], fault) -> None:
    """Fail with all records of which `fault` returns something but None."""
    found = {index: fault(record) for index, record in enumerate(records)}
    found = {index: text for index, text in found.items() if text is not None}
    assert records and not found, faults(records, found)


def test_every_kernel_compiles(kernels):
    report(kernels, lambda record: record["error"])
    assert {tuple(record["capability"]) for record in kernels} == set(LARGEST_SHARED)
    assert {record["kernel"] for record in kernels} >= set(ROWS_OF_PRODUCTS)


def test_no_kernel_spills(kernels):
    """None at head dimensions up to 128, next to nothing above."""

    def fault(record: Record) -> str | None:
        widest = max(record["constants"].get(name) or 0 for name in ("HEAD_DIM", "VALUE_DIM"))
        allowed = 0 if widest <= 128 else 64
        return None if record["local"] <= allowed else f"{record['local']} bytes of local memory"

    report(kernels, fault)
    assert all(record["local_instructions"] == 0 for record in kernels if record["local"] == 0)


def test_shared_memory_is_there(kernels):
    def fault(record: Record) -> str | None:
        allowed = LARGEST_SHARED[tuple(record["capability"])]
        return (
            None if record["shared"] <= allowed else f"{record['shared']} bytes of shared memory, {allowed} are there"
        )

    report(kernels, fault)


def test_products_run_on_tensor_cores(kernels):
    """In half precision, on the widest that the device has, with operands that arrive asynchronously."""

    def fault(record: Record) -> str | None:
        rows = ROWS_OF_PRODUCTS.get(record["kernel"])
        if rows is None or record["dtype"] == "float32" or record["constants"][rows] < 64:
            return None
        unit = TENSOR_CORES.get(tuple(record["capability"]))
        return None if unit is None or record[unit] else f"no {unit}"

    report(kernels, fault)


def expected_configurations() -> Iterator[tuple[str, tuple[int, int], str, dict[str, int], dict[str, int]]]:
    """(kernel, capability, dtype, tile sizes, options) of every configuration that can be chosen on some device."""
    dtypes = {2: "bfloat16", 4: "float32"}
    for capability in LARGEST_SHARED:
        for part, table in attention_configs.TABLE.items():
            kernel = ATTENTION_KERNELS[part.split(",")[0]]
            for size, dtype in dtypes.items():
                key = max(key for key in table if key[0] <= capability and key[1] == size)
                for config in table[key].values():
                    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
                    yield kernel, capability, dtype, blocks, config.options
        for part, table in projection_configs.TABLE.items():
            kernel = PROJECTION_KERNELS[part]
            for kind in {kind for _, kind in table}:
                key = max(key for key in table if key[0] <= capability and key[1] == kind)
                for config in table[key].values():
                    precision = {"PRECISION": "tf32" if kind == "tf32" else "ieee"}
                    dtype = "bfloat16" if kind == projection_configs.HALF else "float32"
                    yield kernel, capability, dtype, config.blocks | precision, config.options


def test_every_configuration_that_can_be_chosen_is_compiled(tmp_path):
    planned = compile_kernels(tmp_path, "--cases", "full", "--plan")

    def is_planned(kernel, capability, dtype, constants, options) -> bool:
        return any(
            (record["kernel"], tuple(record["capability"]), record["dtype"]) == (kernel, capability, dtype)
            and record["options"] == options
            # A kernel without columns of its own has no such tile size.
            and all(record["constants"].get(name, value) == value for name, value in constants.items())
            for record in planned
        )

    missing = [configuration for configuration in expected_configurations() if not is_planned(*configuration)]
    assert not missing, "\n".join(map(str, missing))


def test_the_compiler_is_asked_for_what_triton_would_compile(tmp_path):
    assert run("kernel_compiler_process.py", cache=tmp_path).endswith("done\n")


@pytest.mark.full
def test_an_older_triton_is_asked_for_what_it_would_compile(tmp_path):
    assert run("kernel_compiler_process.py", cache=tmp_path, old=True).endswith("done\n")


def test_the_interpreters_kernels_are_refused(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, str(TESTS / "compile_kernels.py")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode != 0 and "TRITON_INTERPRET is set" in process.stderr

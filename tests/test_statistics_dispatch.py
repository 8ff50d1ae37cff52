"""Do attention statistics run where they say, registered as `torch.library` wants, in little memory?"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from statistics_inputs import HEAD_MASK, draw_groups, draw_inputs, draw_mask, stack

from sparse_heads import _native, errors
from sparse_heads.ops.statistics import api, attention_statistics, operators

SCRIPT = Path(__file__).with_name("statistics_process.py")


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) for name, tensor in draw_inputs(2, 6, 3, 5, 7, 8).items()}


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """The implementations that were called."""
    names = []
    for name in ("reference", "cpu"):
        function = getattr(api, f"statistics_{name}")

        def run(*arguments, _name=name, _function=function, **options):
            names.append(_name)
            return _function(*arguments, **options)

        monkeypatch.setattr(api, f"statistics_{name}", run)
    return names


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(_native, "_outcome", _native._Outcome(None, "no C++ compiler: tried nothing"))
    monkeypatch.setattr(errors, "_warned", set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_auto_runs_the_kernel_on_a_cpu(dtype, taken):
    attention_statistics(**inputs(dtype))
    assert taken == ["cpu"]


def test_auto_runs_the_reference_elsewhere(taken):
    elsewhere = {name: tensor.to("meta") for name, tensor in inputs().items()}
    found = attention_statistics(**elsewhere)
    assert taken == ["reference"] and found.entropy.shape == (2, 6) and found.count.shape == (2,)


def test_auto_without_the_extension_runs_the_reference_with_one_warning(no_extension, taken):
    message = "attention_statistics runs the reference: .*no C\\+\\+ compiler: tried nothing"
    with pytest.warns(errors.SparseHeadsWarning, match=message) as caught:
        attention_statistics(**inputs())
        attention_statistics(**inputs())
    assert taken == ["reference"] * 2 and len(caught) == 1 and caught[0].filename == __file__


def test_a_named_backend_says_why_it_is_not_there(no_extension):
    message = 'backend: "cpu" needs the C\\+\\+ extension, .*: no C\\+\\+ compiler: tried nothing'
    with pytest.raises(errors.BackendUnavailableError, match=message):
        attention_statistics(**inputs(), backend="cpu")


def test_the_kernel_wants_tensors_on_the_cpu():
    elsewhere = {name: tensor.to("meta") for name, tensor in inputs().items()}
    with pytest.raises(errors.BackendUnavailableError, match="'cpu' needs tensors on the CPU, got meta"):
        attention_statistics(**elsewhere, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["plain", "everything"])
def test_the_operator(case, dtype):
    _native.load()
    options = [None] * 4 + [0]
    if case == "everything":
        groups = draw_groups(2, 7, 2)
        options = [HEAD_MASK, draw_mask(5, 7), draw_mask(2, 5), groups, 2]
    torch.library.opcheck(
        operators.attention_statistics, (*inputs(dtype).values(), *options, -1, 0, -math.inf, 0.5, 3.0)
    )


def test_compiled_statistics_are_the_statistics():
    arguments = {**inputs(), "head_mask": HEAD_MASK, "is_causal": True, "num_groups": 2}
    arguments["key_groups"] = draw_groups(2, 7, 2)
    compiled = torch.compile(attention_statistics, backend="aot_eager", fullgraph=True)(**arguments)
    expected = attention_statistics(**arguments)
    assert torch.equal(compiled.count, expected.count)
    torch.testing.assert_close(stack(compiled), stack(expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory and forbids pages as Linux does")
def test_long_inputs_and_masked_heads_in_a_process_of_its_own():
    _native.load()
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        [sys.executable, SCRIPT], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "done"

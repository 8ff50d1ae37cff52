"""Does decoding run where it says, registered as `torch.library` wants, without a look at what is off?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decode_inputs import converted, draw, draw_inputs, in_pages

from sparse_heads import _native, attention_decode, errors
from sparse_heads.ops.decode import api, operators

SCRIPT = Path(__file__).with_name("decode_process.py")
HEAD_MASK = torch.tensor([[True, False, True, True, False, False], [False] * 6])


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return converted(draw_inputs(6, 3, 2, [20, 5], 8), dtype)


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """The implementations that were called."""
    names = []
    for name in ("reference", "cpu"):
        function = getattr(api, f"decode_{name}")

        def run(*arguments, _name=name, _function=function, **options):
            names.append(_name)
            return _function(*arguments, **options)

        monkeypatch.setattr(api, f"decode_{name}", run)
    return names


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(_native, "_outcome", _native._Outcome(None, "no C++ compiler: tried nothing"))
    monkeypatch.setattr(errors, "_warned", set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_auto_runs_the_kernel_on_a_cpu(dtype, taken):
    assert attention_decode(**inputs(dtype)).dtype == dtype
    assert taken == ["cpu"]


def test_auto_runs_the_reference_elsewhere(taken):
    elsewhere = {name: tensor.to("meta") for name, tensor in inputs(torch.bfloat16).items()}
    output = attention_decode(**elsewhere)
    assert taken == ["reference"] and output.shape == (2, 6, 2, 8) and output.dtype == torch.bfloat16


def test_auto_without_the_extension_runs_the_reference_with_one_warning(no_extension, taken):
    message = "attention_decode runs the reference: .*no C\\+\\+ compiler: tried nothing"
    with pytest.warns(errors.SparseHeadsWarning, match=message) as caught:
        attention_decode(**inputs())
        attention_decode(**inputs())
    assert taken == ["reference"] * 2 and len(caught) == 1 and caught[0].filename == __file__


def test_a_named_backend_says_why_it_is_not_there(no_extension):
    message = 'backend: "cpu" needs the C\\+\\+ extension, .*: no C\\+\\+ compiler: tried nothing'
    with pytest.raises(errors.BackendUnavailableError, match=message):
        attention_decode(**inputs(), backend="cpu")


def test_the_kernel_wants_tensors_on_the_cpu():
    elsewhere = {name: tensor.to("meta") for name, tensor in inputs().items()}
    with pytest.raises(errors.BackendUnavailableError, match="'cpu' needs tensors on the CPU, got meta"):
        attention_decode(**elsewhere, backend="cpu")


def test_autocast_changes_no_bit():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for backend in ("cpu", "reference"):
            output = attention_decode(**inputs(), backend=backend)
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(output, attention_decode(**inputs(), backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["plain", "everything"])
def test_the_operator(case, dtype):
    _native.load()
    arguments = inputs(dtype)
    options = dict.fromkeys(("head_mask", "kv_heads", "block_table", "gate", "sinks"))
    if case == "everything":
        arguments = in_pages(arguments, 16)
        for name in ("key_cache", "value_cache"):
            arguments[name] = arguments[name].transpose(1, 2)
        wide = torch.promote_types(dtype, torch.float32)
        options |= {"head_mask": HEAD_MASK, "kv_heads": torch.tensor([0, 2, 1, 1, 0, 2])}
        options |= {"gate": draw(2, 6).to(wide), "sinks": draw(6).to(wide)}
        options["block_table"] = arguments.pop("block_table")
    torch.library.opcheck(operators.attention_decode, (*arguments.values(), *options.values(), 3, 0.5, 3.0))


def test_compiled_decoding_is_decoding():
    arguments = in_pages({**inputs(), "head_mask": HEAD_MASK, "window": 7}, 16)
    compiled = torch.compile(attention_decode, backend="aot_eager", fullgraph=True)(**arguments)
    assert torch.equal(compiled, attention_decode(**arguments))


@pytest.mark.skipif(sys.platform != "linux", reason="forbids pages as Linux does")
def test_what_is_off_lies_on_pages_that_nobody_may_read():
    _native.load()
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        [sys.executable, SCRIPT], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "done"

"""What gates save and take over: files and states, and those of other gates."""

from __future__ import annotations

import json

import pytest
import torch
from models import output
from small_gates import CONFIGS, HARD, gated

import sparse_heads as sh
from sparse_heads.errors import FileFormatError, InvalidArgumentError, InvalidTypeError, SubsetMismatchError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("method", CONFIGS)
def test_files_carry_everything(method, tmp_path):
    config = CONFIGS[method]
    model, gates, batch = gated(config)
    with torch.no_grad():
        gates.method.importances.add_(torch.randn(12, dtype=torch.float64))
    gates.step()
    gates.step()
    gates.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gates.safetensors", "gates_config.json"]
    readable = json.loads((tmp_path / "gates_config.json").read_text())
    assert readable["state"]["steps_done"] == 2 and readable["kept"] == gates.subset().kept()
    twin, loaded, _ = gated(config)
    loaded.load_pretrained(tmp_path)
    assert loaded.steps_done == 2 and torch.equal(loaded.method.importances, gates.method.importances)
    assert torch.equal(output(twin.train(), batch), output(model.train(), batch))


def test_files_of_others_are_refused(tmp_path):
    _, gates, _ = gated()
    gates.save_pretrained(tmp_path)
    _, longer, _ = gated(sh.DSPConfig(k=5, anneal_steps=9, start_temperature=10.0, end_temperature=1e-4))
    with pytest.raises(InvalidArgumentError, match="same configuration.*anneal_steps"):
        longer.load_pretrained(tmp_path)
    _, hard, _ = gated(HARD)
    with pytest.raises(InvalidArgumentError, match="same configuration"):
        hard.load_pretrained(tmp_path)
    _, other, _ = gated(name="distilbert")
    with pytest.raises(SubsetMismatchError, match="gates: wanted those of this model"):
        other.load_pretrained(tmp_path)
    with pytest.raises(InvalidArgumentError, match="gates.safetensors"):
        gates.load_pretrained(tmp_path / "nothing")
    whole = (tmp_path / "gates.safetensors").read_bytes()
    (tmp_path / "gates.safetensors").write_bytes(whole[:-9])
    with pytest.raises(FileFormatError, match="not a whole safetensors file"):
        gates.load_pretrained(tmp_path)


def test_states_of_others_are_refused():
    _, gates, _ = gated()
    state = gates.state_dict()
    before = gates.method.importances.clone()
    for changed, message in [
        ({}, "state: wanted the entries"),
        ({**state, "importances": state["importances"][:3]}, r"a floating-point tensor \[12\]"),
        ({**state, "importances": state["importances"] * float("nan")}, "finite values in 'importances'"),
        ({**state, "_extra_state": {**state["_extra_state"], "steps_done": -1}}, "steps_done: wanted at least 0"),
    ]:
        with pytest.raises(InvalidArgumentError, match=message):
            gates.load_state_dict(changed)
    with pytest.raises(InvalidTypeError, match="state: wanted what state_dict"):
        gates.load_state_dict(None)
    assert torch.equal(gates.method.importances, before)

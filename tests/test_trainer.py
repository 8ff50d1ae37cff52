"""Gates in the Trainer of transformers: what it saves, resumes, accumulates, logs, and refuses."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from models import build
from safetensors import safe_open
from transformers import Trainer, TrainingArguments

import sparse_heads as sh
from sparse_heads.errors import InvalidArgumentError, InvalidTypeError, NotFiniteError, SparseHeadsWarning

pytestmark = pytest.mark.usefixtures("one_thread")
DSP = sh.DSPConfig(k=5, anneal_steps=6, start_temperature=10.0, end_temperature=1e-4)
HARD = sh.HardConcreteConfig(penalty=0.1, initial=0.0, initial_std=1.0)


def examples(count=24):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 61, (count, 7), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 5} for row in ids]


def trainer(folder, config=DSP, lr=1e-3, data=None, **arguments):
    """A Trainer of a tiny classifier with gates: 6 steps of 4 examples."""
    model = build("bert_classifier")
    gates = sh.attach_gates(model, config)
    optimizer = torch.optim.AdamW(gates.parameter_groups(lr=lr, gate_lr=0.1))
    settings = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "logging_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    made = Trainer(
        model,
        TrainingArguments(str(folder), **settings | arguments),
        train_dataset=examples() if data is None else data,
        eval_dataset=examples(8),
        optimizers=(optimizer, None),
        callbacks=[sh.GatesCallback(gates)],
    )
    return made, gates


def test_training_keeps_exactly_k_heads_and_logs(tmp_path):
    made, gates = trainer(tmp_path)
    before = gates.method.importances.detach().clone()
    weight = made.model.bert.encoder.layer[0].attention.self.query.weight.detach().clone()
    made.train()
    assert gates.steps_done == 6 and gates.temperature == 1e-4 and gates.subset().count() == 5
    assert not torch.equal(gates.method.importances, before)
    assert not torch.equal(made.model.bert.encoder.layer[0].attention.self.query.weight, weight)
    assert gates.method.importances.grad is None
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    assert [entry["heads_kept"] for entry in logged] == [5, 5, 5]
    assert [entry["gate_penalty"] for entry in logged] == [0.0, 0.0, 0.0]
    temperatures = [entry["gate_temperature"] for entry in logged]
    assert temperatures == sorted(temperatures, reverse=True) and temperatures[-1] == 1e-4


def test_the_penalty_closes_gates(tmp_path):
    def importances(penalty):
        config = sh.HardConcreteConfig(penalty=penalty, initial=0.0, initial_std=1.0)
        made, gates = trainer(tmp_path, config)
        made.train()
        return gates.method.importances.detach(), made.state.log_history

    free, _ = importances(0.0)
    closed, history = importances(10.0)
    assert (closed < free).all()
    assert all(entry["gate_penalty"] > 0 for entry in history if "loss" in entry)


def test_training_does_what_a_loop_by_hand_does(tmp_path):
    made, gates = trainer(
        tmp_path, HARD, max_grad_norm=0.0, lr_scheduler_type="constant", gradient_accumulation_steps=2
    )
    compute, batches = made.compute_loss, []

    def recorded(model, inputs, **kwargs):
        batches.append(dict(inputs))
        return compute(model, inputs, **kwargs)

    made.compute_loss = recorded
    made.model_accepts_loss_kwargs = False  # or the losses of accumulated batches are added up
    made.train()
    model = build("bert_classifier").train()
    own = sh.attach_gates(model, HARD)
    optimizer = torch.optim.AdamW(own.parameter_groups(lr=1e-3, gate_lr=0.1))
    for pair in zip(batches[::2], batches[1::2], strict=True):
        for batch in pair:
            ((model(**batch).loss + own.penalty()) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        own.step()
    assert gates.steps_done == own.steps_done == 3
    torch.testing.assert_close(gates.method.importances, own.method.importances, rtol=1e-4, atol=1e-5)


def test_accumulated_batches_share_the_draw(tmp_path):
    results = []
    for size, accumulated in [(8, 1), (4, 2)]:
        made, gates = trainer(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, max_steps=3
        )
        made.model_accepts_loss_kwargs = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SparseHeadsWarning)
            made.train()
        assert gates.steps_done == 3
        results.append((gates.method.importances.detach(), made.model.classifier.weight.detach()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [DSP, HARD], ids=["dsp", "hard"])
def test_resuming_goes_on_bit_for_bit(tmp_path, config):
    whole, expected = trainer(tmp_path / "whole", config, save_strategy="steps", save_steps=3)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "part" / "checkpoint-3")
    resumed, gates = trainer(tmp_path / "part", config, save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert gates.steps_done == 6
    assert torch.equal(gates.method.importances, expected.method.importances)
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, whole.model.get_parameter(name)), name


def test_checkpoints_hold_the_gates_beside_the_model(tmp_path):
    made, gates = trainer(tmp_path, save_strategy="steps", save_steps=3)
    made.train()
    folder = tmp_path / "checkpoint-6"
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == sorted(build("bert_classifier").state_dict())
    assert json.loads((folder / "gates_config.json").read_text())["kept"] == gates.subset().kept()
    assert json.loads((tmp_path / "checkpoint-3" / "gates_config.json").read_text())["state"]["steps_done"] == 3


def test_the_best_models_gates_come_back_with_it(tmp_path):
    made, gates = trainer(
        tmp_path,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        lr=0.3,
    )
    made.train()
    best = int(made.state.best_model_checkpoint.rpartition("-")[2])
    assert gates.steps_done == best


def test_a_checkpoint_without_gates_is_refused(tmp_path):
    made, _ = trainer(tmp_path, save_strategy="steps", save_steps=3)
    made.train()
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "checkpoint-3", elsewhere / "checkpoint-3")
    made, gates = trainer(tmp_path / "empty")
    with pytest.raises(InvalidArgumentError, match=r"resume_from_checkpoint: wanted .*checkpoint-3 with gates"):
        made.train(resume_from_checkpoint=str(elsewhere / "checkpoint-3"))
    gates.load_pretrained(elsewhere / "checkpoint-3")
    made.train(resume_from_checkpoint=str(elsewhere / "checkpoint-3"))
    assert gates.steps_done == 6


def test_another_runs_checkpoint_of_the_same_step_is_not_taken(tmp_path):
    for folder, lr in [("mine", 1e-3), ("other", 1e-2)]:
        trainer(tmp_path / folder, lr=lr, save_strategy="steps", save_steps=3)[0].train()
    made, _ = trainer(tmp_path / "other")
    with pytest.raises(InvalidArgumentError, match="resume_from_checkpoint"):
        made.train(resume_from_checkpoint=str(tmp_path / "mine" / "checkpoint-3"))


def test_evaluation_runs_the_subset(tmp_path):
    made, gates = trainer(tmp_path)
    got = made.evaluate()["eval_loss"]
    model = build("bert_classifier")
    sh.attach(model).set_heads(gates.subset())
    plain = Trainer(model, made.args, eval_dataset=examples(8))
    assert got == plain.evaluate()["eval_loss"]


def test_a_loss_that_is_nan_stops_training(tmp_path):
    made, gates = trainer(tmp_path)
    compute, seen = made.compute_loss, []

    def broken(*args, **kwargs):
        seen.append(gates.method.importances.detach().clone())
        value = compute(*args, **kwargs)
        return value * float("nan") if len(seen) == 4 else value

    made.compute_loss = broken
    with pytest.raises(NotFiniteError, match="finite gradients in step 3"):
        made.train()
    assert gates.steps_done == 3
    assert torch.equal(gates.method.importances, seen[-1])
    assert all(parameter.isfinite().all() for parameter in made.model.parameters())


def test_a_schedule_longer_than_training_is_told(tmp_path):
    made, _ = trainer(tmp_path, max_steps=4)
    with pytest.warns(SparseHeadsWarning, match="schedule of DSPConfig takes 6 steps, but training ends after 4"):
        made.train()


def test_gradient_checkpointing(tmp_path):
    results = []
    for checkpointing in (False, True):
        made, gates = trainer(tmp_path, gradient_checkpointing=checkpointing)
        made.train()
        results.append(gates.method.importances.detach())
    torch.testing.assert_close(*results)


def test_what_is_refused(tmp_path):
    with pytest.raises(InvalidTypeError, match="gates: wanted what attach_gates returns"):
        sh.GatesCallback(DSP)
    made, gates = trainer(tmp_path)
    made.optimizer = torch.optim.AdamW(made.model.parameters())
    with pytest.raises(InvalidArgumentError, match="optimizers: wanted .*parameter_groups"):
        made.train()
    other = Trainer(
        build("bert_classifier"),
        made.args,
        train_dataset=examples(),
        optimizers=(torch.optim.AdamW(gates.parameter_groups(lr=1e-3)), None),
        callbacks=[sh.GatesCallback(gates)],
    )
    with pytest.raises(InvalidArgumentError, match="gates: wanted gates of the trained BertForSequenceClassification"):
        other.train()

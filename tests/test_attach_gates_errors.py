"""Gates: is everything refused or warned of by name, and is nothing lost to it?"""

from __future__ import annotations

import warnings

import pytest
import torch
from gated_models import METHODS, NOISY, config, gated, set_importances, train
from models import build, enable_checkpointing, inputs, loss, output

import sparse_heads as sh
from sparse_heads.errors import DetachedError, SparseHeadsError, SparseHeadsWarning

pytestmark = pytest.mark.usefixtures("one_thread")
NAN = float("nan")


class TestConfigurations:
    @pytest.mark.parametrize(
        "make, message",
        [
            (lambda: config("gumbel", k=-1), "k: wanted .*-1"),
            (lambda: config("gumbel", k=2.5), "k: wanted .*2.5"),
            (lambda: config("gumbel", k=True), "k: wanted .*True"),
            (lambda: config("gumbel", k=None), "k: wanted .*None"),
            (lambda: config("gumbel", start_temperature=0.0), "start_temperature: wanted .*0"),
            (lambda: config("gumbel", end_temperature=0.0), "end_temperature: wanted .*0"),
            (lambda: config("gumbel", end_temperature=-1.0), "end_temperature: wanted .*-1"),
            (lambda: config("gumbel", start_temperature=NAN), "start_temperature: wanted .*nan"),
            (lambda: config("gumbel", end_temperature=float("inf")), "end_temperature: wanted .*inf"),
            (lambda: config("gumbel", anneal_steps=-1), "anneal_steps: wanted .*-1"),
            (lambda: config("gumbel", anneal_steps=1.5), "anneal_steps: wanted .*1.5"),
            (lambda: config("gumbel", estimator="sigmoid"), "estimator: wanted .*sigmoid"),
            (lambda: config("gumbel", mode="both"), "mode: wanted .*both"),
            (lambda: config("gumbel", gate_lr=-0.5), "gate_lr: wanted .*-0.5"),
            (lambda: config("gumbel", gate_lr=NAN), "gate_lr: wanted .*nan"),
            (lambda: config("gumbel", seed=-1), "seed: wanted .*-1"),
            (lambda: config("gumbel", seed=0.5), "seed: wanted .*0.5"),
            (lambda: config("gumbel", kinds="self"), "kinds: wanted .*self"),
            (lambda: config("gumbel", kinds=("selfish",)), "kinds: wanted .*selfish"),
            (lambda: config("gumbel", kinds=()), "kinds: wanted"),
            (lambda: sh.DSPConfig.from_preset("bert", k=4), "preset: wanted .*bert_joint"),
            (lambda: sh.HardConcreteConfig.from_preset("michel"), "preset: wanted .*voita"),
            (lambda: config("hard concrete", temperature=0.0), "temperature: wanted .*0"),
            (lambda: config("hard concrete", penalty=-1.0), "penalty: wanted .*-1"),
            (lambda: config("hard concrete", penalty=NAN), "penalty: wanted .*nan"),
            (lambda: config("hard concrete", stretch=(0.1, 1.1)), "stretch: wanted"),
            (lambda: config("hard concrete", stretch=(-0.1, 0.9)), "stretch: wanted"),
            (lambda: config("hard concrete", k=-1), "k: wanted .*-1"),
            (lambda: config("hard concrete", target=-1), "target: wanted .*-1"),
            (lambda: config("hard concrete", mode="off"), "mode: wanted .*off"),
            (lambda: config("layerwise", temperature=0.0), "temperature: wanted .*0"),
            (lambda: config("layerwise", penalty=NAN), "penalty: wanted .*nan"),
            (lambda: config("layerwise", warmup_steps=-1), "warmup_steps: wanted .*-1"),
            (lambda: config("layerwise", warmup_start=-1), "warmup_start: wanted .*-1"),
            (lambda: config("layerwise", mode="off"), "mode: wanted .*off"),
        ],
    )
    def test_wrong_values(self, make, message):
        with pytest.raises(SparseHeadsError, match=message) as caught:
            make()
        assert isinstance(caught.value, (ValueError, TypeError))

    def test_configurations_cannot_be_changed(self):
        with pytest.raises(AttributeError):
            config("gumbel").k = 7

    @pytest.mark.parametrize(
        "make, message",
        [
            (lambda: config("gumbel", k=13), "k: wanted .*12.*got 13|k: wanted .*13"),
            (lambda: config("ste", k=13), "k: wanted .*12.*got 13|k: wanted .*13"),
            (lambda: config("hard concrete", k=13), "k: wanted .*12"),
            (lambda: config("hard concrete", penalty=0.0, target=13), "target: wanted .*12"),
            (lambda: config("gumbel", k=2, kinds=("cross",)), "kinds: wanted .*cross"),
            (lambda: config("gumbel", k=2, kinds=(("decoder", "self"),)), "kinds: wanted .*decoder"),
            (lambda: {"k": 5}, "config: wanted .*DSPConfig"),
            (lambda: sh.DSPConfig, "config: wanted .*DSPConfig"),
        ],
    )
    def test_that_do_not_fit_the_model(self, make, message):
        model = build("bert")
        before = output(model, inputs(model))
        with pytest.raises((ValueError, TypeError), match=message) as caught:
            sh.attach_gates(model, make())
        assert isinstance(caught.value, SparseHeadsError)
        assert sh.get_handle(model) is None
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert torch.equal(output(model, inputs(model)), before)

    def test_too_many_of_the_chosen_kinds(self):
        model = build("bert_cross")
        with pytest.raises(ValueError, match=r"k: wanted .*12"):
            sh.attach_gates(model, config("gumbel", k=13, kinds=("cross",)))

    def test_no_model(self):
        with pytest.raises((ValueError, TypeError), match="model"):
            sh.attach_gates(torch.nn.Linear(3, 3), config("gumbel"))
        with pytest.raises((ValueError, TypeError), match="model"):
            sh.attach_gates("bert", config("gumbel"))


class TestUse:
    @pytest.mark.parametrize("second", ["gumbel", "hard concrete"])
    def test_two_gate_sets(self, second):
        model, gates, _, batch = gated("gumbel")
        expected = output(model, batch)
        with pytest.raises(ValueError, match="gates") as caught:
            sh.attach_gates(model, config(second))
        assert isinstance(caught.value, SparseHeadsError)
        assert torch.equal(output(model, batch), expected)
        gates.step()

    @pytest.mark.parametrize("subset", [None, {0: [1]}, torch.ones(3, 4, dtype=torch.bool)])
    def test_set_heads(self, subset):
        model, gates, _, batch = gated("gumbel")
        expected = output(model, batch)
        with pytest.raises(ValueError, match="gates") as caught:
            gates.handle.set_heads(subset)
        assert isinstance(caught.value, SparseHeadsError)
        assert torch.equal(output(model, batch), expected)

    def test_after_detach(self):
        model, gates, plain, batch = gated("gumbel")
        gates.detach()
        with pytest.raises(DetachedError, match="detach"):
            gates.step()
        gates.detach()
        assert torch.equal(output(model, batch), output(plain, batch))

    @pytest.mark.parametrize("method", METHODS)
    def test_another_models_state(self, method):
        state = gated(method)[1].state_dict()
        other = sh.attach_gates(build("bert", num_hidden_layers=2), config(method))
        before = other.method.importances.detach().clone()
        with pytest.raises((ValueError, RuntimeError)):
            other.load_state_dict(state)
        assert torch.equal(other.method.importances.detach(), before)

    def test_another_methods_files(self, tmp_path):
        gated("gumbel")[1].save_pretrained(tmp_path)
        gates = gated("hard concrete")[1]
        before = gates.method.importances.detach().clone()
        with pytest.raises((ValueError, TypeError)) as caught:
            gates.load_pretrained(tmp_path)
        assert isinstance(caught.value, SparseHeadsError)
        assert torch.equal(gates.method.importances.detach(), before)

    @pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
    def test_damaged_files(self, damage, tmp_path):
        _, gates, _, _ = gated("gumbel")
        gates.save_pretrained(tmp_path)
        file = tmp_path / "gates.safetensors"
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(b"" if damage == "empty" else file.read_bytes()[:-9])
        before = gates.method.importances.detach().clone()
        with pytest.raises((ValueError, TypeError)) as caught:
            gates.load_pretrained(tmp_path)
        assert isinstance(caught.value, SparseHeadsError)
        assert torch.equal(gates.method.importances.detach(), before)

    def test_detached_before_a_recomputation(self):
        """A recomputed layer must not run without the gates of its forward."""
        model, gates, _, batch = gated("gumbel", "bert_classifier")
        enable_checkpointing(model)
        value = loss(output(model, batch))
        gates.detach()
        with pytest.raises(DetachedError, match="detached before the backward pass"):
            value.backward()


class TestNotANumber:
    @pytest.mark.parametrize("method", METHODS)
    def test_a_loss_that_is_nan_stops_and_keeps_the_last_good_state(self, method):
        model, gates, _, batch = gated(method)
        optimizer = train(model, gates, [batch], 3)
        good = {name: value.clone() for name, value in model.state_dict().items()}
        importances, subset = gates.method.importances.detach().clone(), gates.subset()
        optimizer.zero_grad()
        with pytest.raises(ValueError, match="importances: wanted finite .*step 3") as caught:
            (loss(output(model, batch)) * NAN).backward()
            optimizer.step()
            gates.step()
        assert isinstance(caught.value, SparseHeadsError)
        assert torch.equal(gates.method.importances.detach(), importances)
        assert all(torch.equal(value, good[name]) for name, value in model.state_dict().items())
        assert gates.steps_done == 3 and gates.subset() == subset
        train(model, gates, [batch], 2, optimizer)  # and goes on
        assert gates.steps_done == 5

    @pytest.mark.parametrize("value", [NAN, float("inf")])
    def test_importances_that_are_no_numbers(self, value):
        _, gates, _, _ = gated("gumbel")
        with torch.no_grad():
            gates.method.importances[3] = value
        with pytest.raises(ValueError, match="importances"):
            gates.step()
        assert gates.method.importances.isfinite().all()


class TestWarnings:
    @pytest.mark.parametrize("method", NOISY)
    def test_importances_that_change_without_a_step(self, method):
        model, gates, _, batch = gated(method)
        optimizer = torch.optim.AdamW(gates.parameter_groups(lr=1e-3, gate_lr=0.3))
        with pytest.warns(SparseHeadsWarning, match=r"step\(\)"):
            for _ in range(3):
                optimizer.zero_grad()
                loss(output(model, batch)).backward()
                optimizer.step()

    @pytest.mark.parametrize("method", METHODS)
    def test_the_loop_of_the_contract_warns_of_nothing(self, method):
        model, gates, _, batch = gated(method, anneal_steps=3) if method == "gumbel" else gated(method)
        optimizer = torch.optim.AdamW(gates.parameter_groups(lr=1e-3, gate_lr=0.3))
        with warnings.catch_warnings():
            warnings.simplefilter("error", SparseHeadsWarning)
            for _ in range(4):
                for _ in range(2):  # accumulated micro-batches, and one without gradients
                    (output(model, batch).square().mean() + gates.penalty()).backward()
                with torch.no_grad():
                    output(model.eval(), batch)
                model.train()
                optimizer.step()
                optimizer.zero_grad()
                gates.step()
            gates.subset()
            gates.scores()
            gates.detach()

    def test_a_schedule_longer_than_training(self):
        model, gates, _, batch = gated("gumbel", anneal_steps=500)
        train(model, gates, [batch], 3)
        with pytest.warns(SparseHeadsWarning, match="500"):
            gates.subset()
            gates.detach()

    def test_a_finished_schedule(self):
        model, gates, _, batch = gated("gumbel", anneal_steps=3)
        train(model, gates, [batch], 3)
        with warnings.catch_warnings():
            warnings.simplefilter("error", SparseHeadsWarning)
            gates.subset()
            gates.detach()


class TestTrainGates:
    """`sh.train_gates`: the loop as a call."""

    @staticmethod
    def labelled(model):
        return inputs(model) | {"labels": torch.arange(3)}

    def test_trains_as_the_loop_by_hand(self):
        model, gates, _, _ = gated("gumbel", "bert_classifier", anneal_steps=3)
        start = gates.method.importances.detach().clone()
        sh.train_gates(gates, [self.labelled(model)], steps=4, lr=1e-3, gate_lr=0.3)
        assert gates.steps_done == 4
        assert (gates.method.importances != start).all()

    @pytest.mark.parametrize(
        "batches, message",
        [
            ([], "batches: wanted at least one"),
            (iter([]), "batches: wanted .*gave 0"),
            (None, "batches"),
            ("text", "batches"),
            ([3], "batches"),
        ],
    )
    def test_wrong_batches(self, batches, message):
        _, gates, _, _ = gated("gumbel", "bert_classifier", anneal_steps=0)
        before = gates.method.importances.detach().clone()
        with pytest.raises((ValueError, TypeError), match=message):
            sh.train_gates(gates, batches, steps=2, lr=1e-3)
        assert torch.equal(gates.method.importances.detach(), before) and gates.steps_done == 0

    def test_no_learning_rate_for_the_weights(self):
        model, gates, _, _ = gated("gumbel", "bert_classifier", anneal_steps=0)
        with pytest.raises(ValueError, match="lr: wanted a learning rate"):
            sh.train_gates(gates, [self.labelled(model)], steps=2)

    def test_a_generator_that_runs_out(self):
        model, gates, _, _ = gated("gumbel", "bert_classifier", anneal_steps=0)
        batch = self.labelled(model)
        with pytest.raises(ValueError, match=r"batches: wanted .*5") as caught:
            sh.train_gates(gates, (batch for _ in range(2)), steps=5, lr=1e-3)
        assert isinstance(caught.value, SparseHeadsError)

    def test_batches_without_labels(self):
        model, gates, _, _ = gated("gumbel", "bert_classifier", anneal_steps=0)
        with pytest.raises(ValueError, match="labels"):
            sh.train_gates(gates, [inputs(model)], steps=2, lr=1e-3)

    def test_a_loss_that_is_nan(self):
        model, gates, _, _ = gated("gumbel", "bert_classifier", anneal_steps=0)
        count = iter(range(10))

        def sometimes(model, batch):
            value = model(**batch).loss
            return value * NAN if next(count) == 2 else value

        with pytest.raises(ValueError, match="loss.*step 2|loss.*step 3|step [23].*loss"):
            sh.train_gates(gates, [self.labelled(model)], steps=6, lr=1e-3, gate_lr=0.3, loss=sometimes)
        assert gates.steps_done == 2
        assert gates.method.importances.isfinite().all()
        assert all(parameter.isfinite().all() for parameter in model.parameters())

    @pytest.mark.parametrize("steps", [-1, 2.5, None])
    def test_wrong_steps(self, steps):
        model, gates, _, _ = gated("gumbel", "bert_classifier", anneal_steps=0)
        with pytest.raises((ValueError, TypeError), match="steps"):
            sh.train_gates(gates, [self.labelled(model)], steps=steps, lr=1e-3)

    def test_a_schedule_longer_than_training(self):
        model, gates, _, _ = gated("gumbel", "bert_classifier", anneal_steps=500)
        with pytest.warns(SparseHeadsWarning, match="500"):
            sh.train_gates(gates, [self.labelled(model)], steps=2, lr=1e-3)


def test_steps_of_the_optimizer_alone_are_told_from_loading():
    """A state that is loaded, and importances that are set before `step`, are no forgotten step."""
    _, gates, _, _ = gated("gumbel")
    model, other, _, batch = gated("gumbel")
    set_importances(gates, torch.arange(12))
    output(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparseHeadsWarning)
        other.load_state_dict(gates.state_dict())
        output(model, batch)
        set_importances(other, torch.zeros(12))
        output(model, batch)

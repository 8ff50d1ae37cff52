"""Gates on a model: do they train, promise what they keep, save and resume, and leave the model as it was?"""

from __future__ import annotations

import copy
import json
import pickle
from itertools import chain

import pytest
import torch
from gated_models import METHODS, config, counted_heads, gated, set_importances, train
from models import build, inputs, loss, output
from safetensors import safe_open
from torch import nn

import sparse_heads as sh
from sparse_heads.errors import DetachedError, SparseHeadsWarning

pytestmark = pytest.mark.usefixtures("one_thread")
# Tests take gates off long before a schedule is over.
unfinished = pytest.mark.filterwarnings("ignore:gates. the schedule of")
MASK = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 1]]).bool()
UNEQUAL = torch.linspace(-2, 2, 12, dtype=torch.float64)[torch.randperm(12, generator=torch.Generator().manual_seed(2))]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


class TestExactlyK:
    @pytest.mark.parametrize("estimator", ["gumbel", "ste"])
    @pytest.mark.parametrize("k", range(13))
    def test_before_and_after_training(self, k, estimator):
        model, gates, _, batch = gated(estimator, dtype=torch.float32, k=k, anneal_steps=3)
        assert gates.subset().count() == k
        train(model, gates, [batch], 3)
        assert gates.subset().count() == k
        sample = gates.method.sample().detach()
        assert abs(float(sample.sum()) - k) < 1e-6

    @pytest.mark.parametrize("name, make", [("hard concrete", lambda k: config("hard concrete", k=k))])
    @pytest.mark.parametrize("k", range(13))
    def test_hard_concrete_told_k(self, k, name, make):
        model = build("bert")
        gates = sh.attach_gates(model, make(k))
        for values in (UNEQUAL, -UNEQUAL - 9, UNEQUAL + 9, torch.full((12,), 40.0)):
            set_importances(gates, values)
            assert gates.subset().count() == k

    @pytest.mark.parametrize("seed", range(5))
    def test_a_hundred_importances_a_seed(self, seed):
        """Random, tied, huge and tiny ones; every k in turn."""
        generator = torch.Generator().manual_seed(seed)
        for k in range(0, 13, 2):
            gates = sh.attach_gates(build("bert"), config("gumbel", k=k, seed=seed))
            for scale in (1e-12, 1e-3, 1.0, 1e6):
                for values in (
                    torch.randn(12, generator=generator, dtype=torch.float64) * scale,
                    torch.randint(-1, 2, (12,), generator=generator).double() * scale,
                    torch.zeros(12, dtype=torch.float64),
                ):
                    set_importances(gates, values)
                    assert gates.subset().count() == k

    @pytest.mark.parametrize("k", range(7))
    def test_of_chosen_kinds(self, k):
        model = build("bert_cross", num_hidden_layers=2)
        gates = sh.attach_gates(model, config("gumbel", k=k, kinds=("cross",)))
        counted = counted_heads(gates)
        set_importances(gates, torch.randn(8, dtype=torch.float64))
        mask = gates.subset().mask
        assert int(mask[counted].sum()) == k and mask[~counted].all()

    def test_ties_go_to_the_lowest_head(self):
        gates = sh.attach_gates(build("bert"), config("gumbel", k=3))
        set_importances(gates, torch.zeros(12))
        assert gates.subset().mask.flatten().nonzero().flatten().tolist() == [0, 1, 2]
        set_importances(gates, torch.tensor([0.0, 1, 0, 0, 1, 0, 0, 1, 1, 1, 1, 1]))
        assert gates.subset().mask.flatten().nonzero().flatten().tolist() == [1, 4, 7]

    def test_every_budget_runs(self):
        model, gates, plain, batch = gated("gumbel", k=0)
        with torch.no_grad():
            none = output(model.eval(), batch)
            gates.detach()
            handle = sh.attach(model)
            handle.set_heads(torch.zeros(3, 4, dtype=torch.bool))
            assert torch.equal(output(model, batch), none)
            handle.detach()
            sh.attach_gates(model, config("gumbel", k=12))
            torch.testing.assert_close(output(model, batch), output(plain, batch), rtol=1e-12, atol=1e-12)


class TestScores:
    @pytest.mark.parametrize("method", METHODS)
    def test_top_gives_the_subset(self, method):
        _, gates, _, _ = gated(method)
        for values in (UNEQUAL, torch.zeros(12), torch.full((12,), 30.0), torch.full((12,), -30.0)):
            set_importances(gates, values)
            subset, scores = gates.subset(), gates.scores()
            assert scores.top(subset.count()) == subset
            assert scores.tensor.dtype == torch.float64

    def test_top_of_a_kind(self):
        gates = sh.attach_gates(build("bert_cross"), config("gumbel", k=4, kinds=("self",)))
        set_importances(gates, UNEQUAL)
        assert gates.scores().top(4, kinds=("self",)) == gates.subset()

    @unfinished
    def test_budgets_are_nested_and_run_on_the_model(self):
        model, gates, _, batch = gated("gumbel")
        train(model, gates, [batch], 3)
        budgets = gates.scores().budgets([2, 5, 9])
        assert (budgets.mask[0] <= budgets.mask[1]).all() and (budgets.mask[1] <= budgets.mask[2]).all()
        assert budgets.row(1) == gates.subset()
        gates.detach()
        handle = sh.attach(model.eval())
        with torch.no_grad(), handle.use_heads(budgets):
            together = output(model, batch)
        for row in range(3):
            with torch.no_grad(), handle.use_heads(budgets.row(row)):
                torch.testing.assert_close(together[row], output(model, batch)[row], rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("method", METHODS)
    def test_files(self, method, tmp_path):
        _, gates, _, _ = gated(method, "bert_cross", kinds=("self",))
        set_importances(gates, UNEQUAL)
        gates.subset().save_pretrained(tmp_path)
        gates.scores().save_pretrained(tmp_path)
        assert sh.HeadSubset.from_pretrained(tmp_path) == gates.subset()
        assert sh.HeadScores.from_pretrained(tmp_path) == gates.scores()
        handle = sh.attach(build("bert_cross"))
        handle.set_heads(sh.HeadSubset.from_pretrained(tmp_path))
        assert torch.equal(handle.subset.mask, gates.subset().mask)

    def test_later_steps_change_no_subset_that_was_taken(self):
        _, gates, _, _ = gated("gumbel")
        set_importances(gates, UNEQUAL)
        subset, scores = gates.subset(), gates.scores()
        mask, tensor = subset.mask, scores.tensor
        set_importances(gates, -UNEQUAL)
        assert torch.equal(subset.mask, mask) and torch.equal(scores.tensor, tensor)
        assert gates.subset() != subset


class TestTraining:
    @pytest.mark.parametrize("method", METHODS)
    def test_joint_moves_importances_and_weights(self, method):
        model, gates, _, batch = gated(method)
        before, start = weights(model), gates.method.importances.detach().clone()
        with torch.no_grad():
            first = float(output(model.eval(), batch).square().mean())
        train(model.train(), gates, [batch, inputs(model, 2, 5)], 8)
        assert gates.steps_done == 8
        assert (gates.method.importances != start).all()
        assert all(not torch.equal(value, before[name]) for name, value in weights(model).items() if "query" in name)
        with torch.no_grad():
            assert float(output(model.eval(), batch).square().mean()) < first

    @unfinished
    @pytest.mark.parametrize("method", METHODS)
    def test_pipelined_leaves_weights_alone(self, method):
        model = build("bert_classifier")
        model.classifier.bias.requires_grad_(False)
        found = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        before = weights(model)
        gates = sh.attach_gates(model.train(), config(method, mode="pipelined"))
        assert not any(parameter.requires_grad for parameter in model.parameters())
        trained = [parameter for group in gates.parameter_groups(lr=1e-3) for parameter in group["params"]]
        assert any(parameter is gates.method.importances for parameter in trained)
        assert not {id(parameter) for parameter in trained} & {id(parameter) for parameter in model.parameters()}
        start = gates.method.importances.detach().clone()
        train(model, gates, [inputs(model)], 4, torch.optim.AdamW(gates.parameter_groups(gate_lr=0.3)))
        assert (gates.method.importances != start).all()
        assert_same(weights(model), before)
        assert all(parameter.grad is None for parameter in model.parameters())
        gates.detach()
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == found

    def test_joint_leaves_frozen_weights_frozen(self):
        model = build("bert")
        model.embeddings.requires_grad_(False)
        found = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        gates = sh.attach_gates(model.train(), config("gumbel"))
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == found
        trained = {id(parameter) for group in gates.parameter_groups(lr=1e-3) for parameter in group["params"]}
        assert not trained & {id(parameter) for parameter in model.embeddings.parameters()}
        gates.detach()
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == found

    @pytest.mark.parametrize("method", METHODS)
    def test_parameter_groups(self, method):
        model, gates, _, _ = gated(method)
        groups = gates.parameter_groups(lr=2e-5, gate_lr=0.25, weight_decay=0.1)
        listed = list(chain.from_iterable(group["params"] for group in groups))
        assert len({id(parameter) for parameter in listed}) == len(listed)
        own = {id(parameter) for parameter in model.parameters()}
        assert own <= {id(parameter) for parameter in listed}
        for group in groups:
            for parameter in group["params"]:
                of_gates = id(parameter) not in own
                assert group["lr"] == (0.25 if of_gates else 2e-5)
                assert not of_gates or group["weight_decay"] == 0.0
        assert any(group["weight_decay"] == 0.1 for group in groups)

    def test_the_configurations_own_learning_rate(self):
        _, gates, _, _ = gated("gumbel", gate_lr=0.125)
        (group,) = (
            group
            for group in gates.parameter_groups(lr=1e-3)
            if any(each is gates.method.importances for each in group["params"])
        )
        assert group["lr"] == 0.125

    @pytest.mark.parametrize("method", METHODS)
    def test_no_weight_decay_on_importances(self, method):
        model, gates, _, _ = gated(method)
        optimizer = torch.optim.AdamW(gates.parameter_groups(lr=0.1, gate_lr=0.1, weight_decay=0.5))
        start, before = gates.method.importances.detach().clone(), weights(model)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert torch.equal(gates.method.importances.detach(), start)
        assert not torch.equal(model.encoder.layer[0].attention.self.query.weight, before[QUERY])

    def test_a_target_count_is_steered_to(self):
        """By multipliers that the same optimizer drives up."""
        model, gates, _, batch = gated("hard concrete", penalty=None, target=4, mode="pipelined", initial=2.0)
        optimizer = torch.optim.Adam(gates.parameter_groups(gate_lr=0.1))
        train(model, gates, [batch], 120, optimizer)
        log_alpha = gates.method.importances.detach()
        expected = (log_alpha - 0.33 * torch.tensor(0.1 / 1.1).log()).sigmoid().sum()
        assert 3 < expected < 5

    def test_temperature_falls_geometrically_with_the_steps(self):
        _, gates, _, _ = gated("gumbel", anneal_steps=4, start_temperature=16.0, end_temperature=1.0)
        seen = []
        for _ in range(6):
            seen.append(float(gates.temperature))
            gates.step()
        assert seen == pytest.approx([16, 8, 4, 2, 1, 1])

    def test_penalties(self):
        """DSP has none; of L0 it is the expected number of open gates, and falls while training on it alone."""
        _, dsp, _, _ = gated("gumbel")
        assert float(dsp.penalty()) == 0.0
        for method, penalty in (("hard concrete", 0.01), ("layerwise", 0.02)):
            _, gates, _, _ = gated(method, penalty=penalty)
            for _ in range(4):
                gates.step()
            set_importances(gates, UNEQUAL)
            temperature = gates.config.temperature
            expected = (UNEQUAL - temperature * torch.tensor(0.1 / 1.1, dtype=torch.float64).log()).sigmoid().sum()
            torch.testing.assert_close(gates.penalty().detach(), penalty * expected, rtol=1e-9, atol=1e-12)
            gates.penalty().backward()
            assert (gates.method.importances.grad > 0).all()

    def test_layerwise_penalty_warms_up(self):
        _, gates, _, _ = gated("layerwise", warmup_start=2, warmup_steps=4)
        seen = []
        for _ in range(8):
            seen.append(float(gates.penalty().detach()))
            gates.step()
        assert seen[:2] == [0.0, 0.0]
        assert seen[6] == seen[7] > 0
        torch.testing.assert_close(torch.tensor(seen[2:6]) / seen[7], torch.tensor([0.25, 0.5, 0.75, 1.0]))

    def test_dropout(self):
        """Of the model's own attention and of its layers: gates act behind it."""
        results = []
        for method in ("gumbel", "hard concrete"):
            model = build("bert", attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.2, dtype=torch.float64)
            gates = sh.attach_gates(model, config(method))
            set_importances(gates, torch.tensor([-30.0, 0.3, 30.0]).repeat(4))
            value = loss(output(model.train(), inputs(model)))
            value.backward()
            results.append(value)
            assert gates.method.importances.grad.isfinite().all()
        assert all(result.isfinite() for result in results)


QUERY = "encoder.layer.0.attention.self.query.weight"


class TestFold:
    """The scale of what is kept goes into the output projections' weights, so that a plain subset runs the same."""

    @unfinished
    @pytest.mark.parametrize("method", ["hard concrete", "layerwise"])
    def test_outputs_stay(self, method):
        model, gates, _, batch = gated(method)
        set_importances(gates, UNEQUAL)
        model.eval()
        with torch.no_grad():
            expected = output(model, batch)
        subset, scale = gates.subset(), gates.scale()
        assert not torch.equal(scale[subset.mask], torch.ones(subset.count(), dtype=scale.dtype))
        biases = {name: value for name, value in weights(model).items() if name.endswith("bias")}
        gates.fold()
        with torch.no_grad():
            torch.testing.assert_close(output(model, batch), expected, rtol=1e-10, atol=1e-10)
        gates.detach()
        assert_same({name: weights(model)[name] for name in biases}, biases)
        with torch.no_grad(), sh.attach(model).use_heads(subset):
            torch.testing.assert_close(output(model, batch), expected, rtol=1e-10, atol=1e-10)

    def test_dsp_has_nothing_to_fold(self):
        model, gates, _, _ = gated("gumbel")
        before = weights(model)
        assert (gates.scale()[gates.subset().mask] == 1).all()
        gates.fold()
        assert_same(weights(model), before)

    def test_layerwise_scale_is_heads_over_open_heads(self):
        _, gates, _, _ = gated("layerwise")
        values = torch.full((12,), -5.0)
        values[[0, 4, 5, 8, 9, 10, 11]] = 5.0  # one, two and four open
        set_importances(gates, values)
        scale, mask = gates.scale(), gates.subset().mask
        expected = torch.tensor([4 / 1.001, 4 / 2.001, 1.0], dtype=torch.float64)
        for row in range(3):
            torch.testing.assert_close(scale[row][mask[row]], expected[row].expand(int(mask[row].sum())))


class TestResume:
    @pytest.mark.parametrize("how", ["state_dict", "files"])
    @pytest.mark.parametrize("method", METHODS)
    def test_continues_bit_for_bit(self, method, how, tmp_path):
        model, gates, _, batch = gated(method)
        batches = [batch, inputs(model, 2, 5)]
        optimizer = train(model, gates, batches, 3)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), gates.state_dict()))
        gates.save_pretrained(tmp_path)
        train(model, gates, batches, 3, optimizer)

        again, resumed, _, _ = gated(method, seed=0)
        again.load_state_dict(saved[0])
        if how == "state_dict":
            resumed.load_state_dict(saved[2])
        else:
            resumed.load_pretrained(tmp_path)
        assert resumed.steps_done == 3
        second = torch.optim.AdamW(resumed.parameter_groups(lr=1e-3, gate_lr=0.3))
        second.load_state_dict(saved[1])
        train(again, resumed, batches, 3, second)
        assert torch.equal(resumed.method.importances, gates.method.importances)
        assert resumed.steps_done == gates.steps_done == 6
        assert_same(again.state_dict(), model.state_dict())
        assert resumed.subset() == gates.subset()

    @pytest.mark.parametrize("method", METHODS)
    def test_files_are_safetensors_and_readable(self, method, tmp_path):
        _, gates, _, _ = gated(method)
        set_importances(gates, UNEQUAL)
        gates.save_pretrained(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["gates.safetensors", "gates_config.json"]
        with safe_open(tmp_path / "gates.safetensors", "pt") as file:
            values = [file.get_tensor(name) for name in file.keys()]
        assert any(value.shape == (12,) and torch.equal(value, UNEQUAL) for value in values)
        json.loads((tmp_path / "gates_config.json").read_text())

    def test_a_state_is_a_copy_or_is_read_at_once(self):
        _, gates, _, _ = gated("gumbel")
        other = gated("gumbel")[1]
        set_importances(gates, -UNEQUAL)
        state = gates.state_dict()
        other.load_state_dict(state)
        expected = other.method.importances.detach().clone()
        set_importances(gates, UNEQUAL)
        assert torch.equal(other.method.importances.detach(), expected)


class TestTheModelStays:
    @pytest.mark.parametrize("method", METHODS)
    def test_state_dict_and_modules(self, method):
        plain = build("bert")
        model, gates, _, _ = gated(method, dtype=torch.float32)
        assert model.state_dict().keys() == plain.state_dict().keys()
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
        assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
        assert_same(model.state_dict(), plain.state_dict())
        assert sh.get_handle(model) is gates.handle

    @pytest.mark.parametrize("method", METHODS)
    def test_save_pretrained_writes_the_plain_model(self, method, tmp_path):
        plain = build("bert")
        model, _gates, _, batch = gated(method, dtype=torch.float32)
        for name, each in (("plain", plain), ("gated", model)):
            each.save_pretrained(tmp_path / name)
        names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("plain", "gated")]
        assert names[0] == names[1]
        for name in names[0]:
            assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "gated" / name).read_bytes(), name
        loaded = type(plain).from_pretrained(tmp_path / "gated").eval()
        torch.testing.assert_close(output(loaded, batch), output(plain.eval(), batch))

    @unfinished
    @pytest.mark.parametrize("method", METHODS)
    def test_detach_gives_back_a_model_that_was_not_attached(self, method):
        model = build("bert")
        batch = inputs(model)
        expected, classes = output(model, batch), [type(part) for part in model.modules()]
        dictionaries = [set(part.__dict__) for part in model.modules()]
        gates = sh.attach_gates(model, config(method))
        output(model.train(), batch)
        gates.step()
        output(model.eval(), batch)
        gates.detach()
        assert torch.equal(output(model, batch), expected)
        assert sh.get_handle(model) is None
        assert [type(part) for part in model.modules()] == classes
        assert [set(part.__dict__) for part in model.modules()] == dictionaries
        assert not model._forward_hooks and not model._forward_pre_hooks
        assert "sparse" not in model.config._attn_implementation

    @pytest.mark.parametrize("method", METHODS)
    def test_detach_leaves_the_handle_as_it_was(self, method):
        model = build("bert")
        handle, batch = sh.attach(model, kv="all"), inputs(model)
        handle.set_heads(MASK)
        expected = output(model, batch)
        gates = sh.attach_gates(model, config(method))
        assert gates.handle is handle
        assert not torch.equal(output(model.train(), batch), expected)
        gates.detach()
        assert sh.get_handle(model) is handle and handle.attached
        assert torch.equal(handle.subset.mask, MASK)
        assert torch.equal(output(model.eval(), batch), expected)
        handle.set_heads(None)
        assert handle.subset is None

    @pytest.mark.parametrize("mode", ["joint", "pipelined"])
    def test_detaching_the_handle_takes_the_gates_off(self, mode):
        """Or training would go on without them, and nobody would know."""
        model, gates, plain, batch = gated("gumbel", mode=mode)
        gates.handle.detach()
        assert torch.equal(output(model, batch), output(plain, batch))
        assert all(parameter.requires_grad for parameter in model.parameters())
        with pytest.raises(DetachedError, match="gates: detached"):
            gates.step()

    def test_gates_after_gates(self):
        model, gates, plain, batch = gated("gumbel")
        gates.detach()
        again = sh.attach_gates(model, config("ste", k=12))
        torch.testing.assert_close(output(model, batch), output(plain, batch), rtol=1e-12, atol=1e-12)
        again.detach()
        assert torch.equal(output(model, batch), output(plain, batch))

    @unfinished
    @pytest.mark.parametrize("method", METHODS)
    def test_copies_stand_alone(self, method):
        model, gates, _, batch = gated(method)
        set_importances(gates, UNEQUAL)
        settled = output(model.eval(), batch).detach()
        copied = copy.deepcopy(model)
        assert torch.equal(output(copied, batch), settled)
        noisy = output(model.train(), batch).detach()
        assert torch.equal(output(copied.train(), batch), noisy)
        loss(output(copied, batch)).backward()
        assert gates.method.importances.grad is None
        assert all(parameter.grad is None for parameter in model.parameters())
        set_importances(gates, -UNEQUAL)
        assert torch.equal(output(copied.eval(), batch), settled)
        gates.detach()
        assert torch.equal(output(copied, batch), settled)

    def test_pickled_models_keep_gates_of_their_own(self):
        model, gates, _, batch = gated("gumbel", mode="pipelined")
        loaded = pickle.loads(pickle.dumps(model))
        own = sh.get_handle(loaded).gates
        assert own is not gates and torch.equal(output(loaded, batch), output(model, batch))
        set_importances(own, UNEQUAL)
        assert gates.steps_done == 0 and not torch.equal(gates.method.importances, own.method.importances)
        with pytest.warns(SparseHeadsWarning, match="schedule"):
            own.detach()
        assert all(parameter.requires_grad for parameter in loaded.parameters())
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_score_heads_while_gates_are_on(self):
        """It scores with all heads on, so gates have no part in it."""
        model, gates, plain, batch = gated("gumbel")
        scores = sh.score_heads(model, [batch], "michel_projected")
        expected = sh.score_heads(plain, [batch], "michel_projected")
        torch.testing.assert_close(scores.tensor, expected.tensor, rtol=1e-9, atol=1e-9)
        assert gates.method.importances.grad is None
        assert model.training

    def test_a_wrapped_root(self):
        """Not a transformers model: any module with attention layers inside."""

        class Pair(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = build("bert"), build("bert")

            def forward(self, **batch):
                return (output(self.first, batch) + output(self.second, batch),)

        model = Pair()
        gates = sh.attach_gates(model, config("gumbel", k=7))
        assert len(gates.handle.layers) == 6 and gates.subset().count() == 7
        batch = inputs(model.first)
        loss(output(model.train(), batch)).backward()
        assert gates.method.importances.grad.abs().min() > 0


class TestPresets:
    def test_published_settings(self):
        joint = sh.DSPConfig.from_preset("bert_joint", k=12)
        assert (joint.k, joint.mode, joint.anneal_steps, joint.gate_lr) == (12, "joint", 25000, 0.5)
        assert (joint.start_temperature, joint.end_temperature) == (1000.0, 1e-8)
        pipelined = sh.DSPConfig.from_preset("bert_pipelined", k=12)
        assert (pipelined.mode, pipelined.anneal_steps) == ("pipelined", 8333)
        translation = sh.DSPConfig.from_preset("iwslt_joint", k=4)
        assert (translation.start_temperature, translation.anneal_steps, translation.gate_lr) == (0.1, 15000, 0.2)
        short = sh.DSPConfig.from_preset("iwslt_pipelined", k=4)
        assert (short.mode, short.anneal_steps) == ("pipelined", 250)
        assert sh.DSPConfig.from_preset("bert_joint", k=3, anneal_steps=7).anneal_steps == 7

    def test_hard_concrete(self):
        voita = sh.HardConcreteConfig.from_preset("voita")
        louizos = sh.HardConcreteConfig.from_preset("louizos")
        assert voita.temperature == pytest.approx(0.33) and louizos.temperature == pytest.approx(2 / 3)
        assert tuple(voita.stretch) == tuple(louizos.stretch) == (-0.1, 1.1)

    def test_layerwise_begins_at_two(self):
        gates = sh.attach_gates(build("bert"), config("layerwise"))
        assert (gates.method.importances == 2.0).all()

    def test_importances_begin_within_xaviers_bounds(self):
        gates = sh.attach_gates(build("bert"), config("gumbel"))
        bound = (6 / (3 + 4)) ** 0.5
        assert 0 < gates.method.importances.abs().max() <= bound
        assert gates.method.importances.unique().numel() == 12

"""Gates on a model: what a forward runs under, what a step does, what is saved, and what detaching gives back."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from models import build, enable_checkpointing, gradients, inputs, loss, masked_copy, output, output_projection
from small_gates import CONFIGS, DSP, HARD, gated
from torch import nn

import sparse_heads as sh
from sparse_heads.errors import (
    DetachedError,
    InvalidArgumentError,
    InvalidTypeError,
    NotFiniteError,
    SparseHeadsWarning,
    UnsupportedError,
)
from sparse_heads.testing import items_run

pytestmark = pytest.mark.usefixtures("one_thread")


def scaled(model, layers, scale):
    """The oracle: a dense copy whose output projections' columns are multiplied, which keeps the scale's graph."""
    oracle = copy.deepcopy(model)
    for info, row in zip(layers, scale, strict=True):
        projection = output_projection(oracle, info.name)
        factors = row[: info.num_heads].repeat_interleave(info.v_head_dim)
        projection.register_forward_pre_hook(lambda _, args, factors=factors: (args[0] * factors,))
    return oracle


def items_of(mask, rows=3):
    """The items of the kernels: layers with all heads on run as they are."""
    return rows * int(mask[~mask.all(1)].sum())


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# what a forward runs under


@pytest.mark.parametrize("layout", ["compact", "core"])
@pytest.mark.parametrize("method", CONFIGS)
def test_training_runs_the_sample_with_exact_gradients(method, layout):
    plain, model = build("bert", dtype=torch.float64), build("bert", dtype=torch.float64)
    handle = sh.attach(model, layout=layout)
    gates, batch = sh.attach_gates(model, CONFIGS[method]), inputs(model)
    loss(output(model.train(), batch)).backward()

    importances = gates.method.importances
    got, importances.grad = importances.grad, None
    oracle = scaled(plain, handle.layers, gates.method.sample().view(3, 4))
    loss(output(oracle, batch)).backward()
    torch.testing.assert_close(got, importances.grad, rtol=1e-7, atol=1e-9)
    expected = gradients(oracle)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-7, atol=1e-8, msg=name)


@pytest.mark.parametrize("method", CONFIGS)
def test_evaluation_runs_the_subset(method):
    model, gates, batch = gated(CONFIGS[method])
    plain = build("bert", dtype=torch.float64)
    expected = output(scaled(plain, gates.handle.layers, gates.scale()), batch)
    assert_same(output(model, batch), expected)
    with items_run() as items, torch.no_grad():
        output(model, batch)
    assert items.out_projection == items_of(gates.subset().mask)
    with gates.handle.use_heads(gates.subset(), scale=gates.scale()):
        assert_same(output(model, batch), expected)


def test_heads_that_are_sampled_as_zero_are_skipped():
    model, gates, batch = gated(HARD)
    sample = gates.method.sample().detach()
    closed = int((sample == 0).sum())
    assert 0 < closed < 12
    with items_run() as items:
        value = loss(output(model.train(), batch))
    assert items.out_projection == items_of((sample != 0).view(3, 4))
    value.backward()
    assert gates.method.importances.grad[sample == 0].count_nonzero() == 0
    query = model.encoder.layer[0].attention.self.query.weight
    with torch.no_grad():
        query.unflatten(0, (4, -1))[sample[:4] == 0] = float("nan")
    assert not output(model, batch).isnan().any()


def test_one_draw_a_step_and_a_graph_for_every_forward():
    model, gates, batch = gated(HARD)
    model.train()
    first, second = output(model, batch), output(model, batch)
    assert torch.equal(first, second)
    loss(first).backward()
    once = gates.method.importances.grad.clone()
    loss(second).backward()
    torch.testing.assert_close(gates.method.importances.grad, 2 * once)
    gates.step()
    assert not torch.equal(output(model, batch), first)
    again = copy.deepcopy(gates.state_dict())
    third = output(model, batch)
    gates.step()
    gates.load_state_dict(again)
    assert torch.equal(output(model, batch), third)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["dsp", "hard"])
def test_checkpointing_recomputes_under_the_same_sample(method, reentrant):
    model, gates, batch = gated(CONFIGS[method])
    plain_model, plain_gates, _ = gated(CONFIGS[method])
    enable_checkpointing(model, reentrant)
    value = loss(output(model.train(), batch))
    gates.step()
    model.eval()
    value.backward()
    loss(output(plain_model.train(), batch)).backward()
    torch.testing.assert_close(gates.method.importances.grad, plain_gates.method.importances.grad)
    expected = gradients(plain_model)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], msg=name)


def test_backward_after_detach():
    plain = build("bert", dtype=torch.float64)
    model, batch = build("bert", dtype=torch.float64), inputs(plain)
    sh.attach(model)
    gates = sh.attach_gates(model, DSP)
    value = loss(output(model.train(), batch))
    gates.detach()
    value.backward()
    got, gates.method.importances.grad = gates.method.importances.grad, None
    loss(output(scaled(plain, gates.handle.layers, gates.method.sample().view(3, 4)), batch)).backward()
    torch.testing.assert_close(got, gates.method.importances.grad)


def test_use_heads_wins_and_set_heads_is_refused():
    model, gates, batch = gated()
    everything = output(build("bert", dtype=torch.float64), batch)
    for mode in (model.train(), model.eval()):
        with gates.handle.use_heads(None):
            assert torch.equal(output(mode, batch), everything)
        assert torch.equal(output(gates.handle.bind(None), batch), everything)
        assert not torch.allclose(output(mode, batch), everything)
    with pytest.raises(UnsupportedError, match=r"subset: Gates\(DSPConfig, 5 of 12 heads, step 0\) choose"):
        gates.handle.set_heads(None)


def test_a_layer_by_itself_runs_under_the_gates():
    model, gates, _ = gated()
    states = torch.randn(2, 5, 48, dtype=torch.float64)
    plain = build("bert", dtype=torch.float64)
    layers = gates.handle.layers
    for mode, scale in [(True, gates.method.sample().view(3, 4)), (False, gates.scale())]:
        model.train(mode)
        assert_same(model.encoder.layer[1](states), scaled(plain, layers, scale).encoder.layer[1](states))


def test_the_roots_mode_decides():
    model, _gates, batch = gated()
    expected = output(model.train(), batch)
    for part in model.children():
        part.eval()
    assert torch.equal(output(model, batch), expected)


def test_the_subset_of_evaluation_follows_the_importances():
    model, gates, batch = gated()
    model.eval()
    before = output(model, batch)
    selection = gates.running().selection
    assert gates.running().selection is selection
    optimizer = torch.optim.SGD(gates.parameter_groups(lr=0.1))
    for parameter in gates.method.parameters():
        parameter.grad = torch.linspace(-9, 9, 12, dtype=torch.float64)
    optimizer.step()
    assert gates.subset().mask.flatten().tolist() == [True] * 5 + [False] * 7
    assert not torch.allclose(output(model, batch), before)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_after_a_forward_in_inference_mode(training):
    model, gates, batch = gated(HARD)
    model.train(training)
    with torch.inference_mode():
        expected = output(model, batch)
    actual = output(model, batch)
    assert torch.equal(actual, expected)
    loss(actual).backward()
    assert (gates.method.importances.grad is not None) == training


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("fused", [False, True])
def test_every_optimizer_is_noticed(optimizer, fused):
    model, gates, batch = gated()
    made = optimizer(gates.parameter_groups(lr=0.1, gate_lr=3.0), fused=fused)
    before = gates.running()
    loss(output(model.train(), batch)).backward()
    made.step()
    assert model.eval() and gates.running() is not before


def test_grouped_queries():
    config = sh.DSPConfig(k=3, anneal_steps=4)
    model, gates, batch = gated(config, "gqa")
    plain = build("gqa", dtype=torch.float64)
    assert_same(output(model, batch), output(masked_copy(plain, gates.handle.layers, gates.subset().mask), batch))
    assert_same(
        output(model.train(), batch),
        output(scaled(plain, gates.handle.layers, gates.method.sample().view(3, 4)), batch),
    )


def test_half_precision_keeps_the_importances():
    model, gates, batch = gated(dtype=torch.bfloat16)
    model.to(torch.float16).to(torch.bfloat16)
    assert gates.method.importances.dtype == torch.float64
    loss(output(model.train(), batch)).backward()
    assert gates.method.importances.grad.dtype == torch.float64
    assert gates.method.importances.grad.count_nonzero()


# which heads


@pytest.mark.parametrize("kinds", [("cross",), (("encoder", "cross"),), ("self",), ("self", "cross"), None])
def test_kinds(kinds):
    config = sh.DSPConfig(k=4, anneal_steps=4, kinds=kinds)
    model, gates, batch = gated(config, "bert_cross")
    layers = gates.handle.layers
    chosen = [kinds is None or info.kind in kinds or (info.stack, info.kind) in kinds for info in layers]
    chosen = torch.tensor(chosen)[:, None].expand(6, 4)
    mask = gates.subset().mask
    assert mask[~chosen].all() and mask[chosen].sum() == 4
    assert len(gates.method.importances) == chosen.sum()
    assert gates.scale()[~chosen].eq(1).all()
    others = int((~chosen).sum())
    assert gates.scores().top(4 + others) == gates.subset()
    if kinds is None or all(isinstance(kind, str) for kind in kinds):
        assert gates.scores().top(4, kinds=kinds) == gates.subset()
    sample = torch.ones(6, 4, dtype=torch.float64)
    sample[chosen] = gates.method.sample().detach()
    plain = build("bert_cross", dtype=torch.float64)
    assert_same(output(model.train(), batch), output(scaled(plain, layers, sample), batch))


def test_kinds_that_the_model_lacks():
    for kinds in [("cross",), (("decoder", "self"),), ("self", "cross")]:
        with pytest.raises(InvalidArgumentError, match=r"kinds: wanted kinds of layers that the model has: \['self'"):
            gated(sh.DSPConfig(k=1, kinds=kinds))


@pytest.mark.parametrize("k", [0, 1, 7, 12])
@pytest.mark.parametrize("estimator", ["gumbel", "ste"])
def test_exactly_k_heads(k, estimator):
    model, gates, batch = gated(sh.DSPConfig(k=k, anneal_steps=3, estimator=estimator))
    optimizer = torch.optim.AdamW(gates.parameter_groups(lr=1e-3))
    for _ in range(4):
        loss(output(model.train(), batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        gates.step()
        assert gates.subset().count() == k
        assert gates.scores().top(k) == gates.subset()
    output(model.eval(), batch)


def test_budgets_of_what_was_learned_are_nested():
    _, gates, _ = gated(sh.DSPConfig(k=5, anneal_steps=4))
    nested = gates.scores().budgets([2, 5, 9])
    assert nested.row(1) == gates.subset()
    assert (nested.mask[0] <= nested.mask[1]).all() and (nested.mask[1] <= nested.mask[2]).all()


# training


def test_parameter_groups_of_joint_training():
    model, gates, _ = gated(name="bert_masked_lm")
    model.bert.embeddings.position_embeddings.weight.requires_grad_(False)
    groups = gates.parameter_groups(lr=1e-3, gate_lr=0.25, weight_decay=0.1)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.1), (1e-3, 0.0), (0.25, 0.0)]
    matrices, vectors, own = (group["params"] for group in groups)
    assert all(parameter.dim() == 2 for parameter in matrices) and all(parameter.dim() == 1 for parameter in vectors)
    assert own == [gates.method.importances]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    given = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(given) == sorted([*map(id, trained), id(own[0])])
    assert gates.parameter_groups(lr=1.0)[-1]["lr"] == DSP.gate_lr
    assert all(group["weight_decay"] == 0.0 for group in gates.parameter_groups(lr=1.0))
    with pytest.raises(InvalidArgumentError, match="lr: wanted a learning rate for the model's parameters"):
        gates.parameter_groups(gate_lr=0.5)


def test_pipelined_training_freezes_the_model():
    model = build("bert")
    model.embeddings.word_embeddings.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    gates = sh.attach_gates(model, sh.DSPConfig(k=5, mode="pipelined", anneal_steps=4))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [group["params"] for group in gates.parameter_groups()] == [[gates.method.importances]]
    loss(output(model.train(), inputs(model))).backward()
    assert gates.method.importances.grad.count_nonzero()
    gates.detach()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_gates_are_no_part_of_the_model():
    model, gates, _ = gated()
    plain = build("bert")
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert len(list(model.modules())) == len(list(plain.modules()))
    assert isinstance(gates.method.importances, nn.Parameter)


def test_the_schedule_follows_the_steps():
    _, gates, _ = gated()
    temperatures = []
    for _ in range(6):
        temperatures.append(gates.temperature)
        gates.step()
    assert temperatures[0] == 10.0 and temperatures[4:] == [1e-4, 1e-4] and gates.steps_done == 6
    assert temperatures == sorted(temperatures, reverse=True)


def test_a_missing_step_is_noticed_once():
    model, gates, batch = gated()
    optimizer = torch.optim.SGD(gates.parameter_groups(lr=1e-3))

    def train(step):
        loss(output(model.train(), batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step:
            gates.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(True)
        train(True)
        train(False)
    with pytest.warns(SparseHeadsWarning, match=r"importances changed without gates.step\(\)"):
        train(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(False)
        train(True)
        gates.load_state_dict(gates.state_dict())
        train(True)


def test_bad_gradients_stop_before_anything_changes():
    model, gates, batch = gated()
    gates.step()
    before = copy.deepcopy(gates.state_dict())
    value = loss(output(model.train(), batch)) * float("nan")
    with pytest.raises(NotFiniteError, match="finite gradients in step 1"):
        value.backward()
    assert torch.equal(gates.method.importances, before["importances"])


def test_bad_importances_are_put_back():
    _model, gates, _ = gated(HARD)
    optimizer = torch.optim.SGD(gates.parameter_groups(lr=1e-3))
    for value in (1.0, float("inf")):
        gates.method.importances.grad = torch.full((12,), value, dtype=torch.float64)
        optimizer.step()
        if value == 1.0:
            gates.step()
            good = copy.deepcopy(gates.state_dict())
    with pytest.raises(NotFiniteError, match="importances: wanted finite ones after step 1"):
        gates.step()
    assert torch.equal(gates.method.importances, good["importances"]) and gates.steps_done == 1


# deployment


@pytest.mark.parametrize("method", ["hard", "layerwise", "dsp"])
def test_fold(method):
    model, gates, batch = gated(CONFIGS[method])
    kept = gates.subset().mask
    expected, scale = output(model, batch), gates.scale()
    assert (method == "dsp") == bool(scale[kept].eq(1).all())
    unread = [output_projection(model, info.name).weight.unflatten(1, (4, -1))[:, ~row].clone()
              for info, row in zip(gates.handle.layers, kept, strict=True)]  # fmt: skip
    state = gates.state_dict()
    gates.fold()
    assert_same(output(model, batch), expected)
    assert torch.equal(gates.scale(), kept.double())
    for info, row, before in zip(gates.handle.layers, kept, unread, strict=True):
        assert torch.equal(output_projection(model, info.name).weight.unflatten(1, (4, -1))[:, ~row], before)
    with pytest.raises(UnsupportedError, match="folded already"):
        gates.fold()
    with pytest.raises(UnsupportedError, match="folded into the weights, which ends training"):
        output(model.train(), batch)
    with pytest.raises(UnsupportedError, match="folded into the weights and cannot change"):
        gates.load_state_dict(state)
    gates.detach()
    handle = sh.attach(model.eval())
    handle.set_heads(gates.subset())
    assert_same(output(model, batch), expected)


def test_shared_weights_are_not_folded_twice():
    model = build("bert")
    first, second = (model.encoder.layer[index].attention.output.dense for index in (0, 1))
    second.weight = first.weight
    gates = sh.attach_gates(model, HARD)
    before = first.weight.clone()
    with pytest.raises(UnsupportedError, match="an output weight of its own to fold into in encoder.layer.1"):
        gates.fold()
    assert torch.equal(first.weight, before)


# attaching, copying, detaching


def test_detach_leaves_the_handle_as_found():
    model, batch = build("bert"), inputs(build("bert"))
    handle = sh.attach(model)
    handle.set_heads({0: [1]})
    before, found = output(model, batch), handle.subset
    gates = sh.attach_gates(model, DSP)
    assert gates.handle is handle and handle.gates is gates and handle.subset == gates.subset()
    assert not torch.equal(output(model, batch), before)
    kept = gates.subset()
    for _ in range(2):
        gates.detach()
    assert sh.get_handle(model) is handle and handle.gates is None and handle.subset == found
    assert torch.equal(output(model.train(), batch), before)
    assert gates.subset() == kept and gates.scores().top(5) == kept and gates.scale().shape == (3, 4)
    with pytest.raises(DetachedError, match="gates: detached"):
        gates.step()
    handle.set_heads(kept)


def test_detach_takes_off_a_handle_of_its_own():
    model, gates, batch = gated()
    gates.detach()
    assert sh.get_handle(model) is None
    assert torch.equal(output(model, batch), output(build("bert", dtype=torch.float64), batch))
    gates = sh.attach_gates(model, sh.DSPConfig(k=3, mode="pipelined"))
    gates.handle.detach()
    assert not gates.attached and sh.get_handle(model) is None
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_unfinished_schedule_is_told():
    for steps, warns in [(0, False), (3, True), (4, False)]:
        _, gates, _ = gated()
        for _ in range(steps):
            gates.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gates.detach()
        assert [str(each.message).split(":")[0] for each in caught] == ["gates"] * warns


def test_what_cannot_be_attached():
    model, gates, _ = gated()
    with pytest.raises(InvalidArgumentError, match=r"model: wanted a model without gates .*Gates\(DSPConfig"):
        sh.attach_gates(model, HARD)
    assert gates.handle.gates is gates
    model = build("bert")
    with pytest.raises(InvalidTypeError, match="config: wanted a DSPConfig"):
        sh.attach_gates(model, {"k": 5})
    with pytest.raises(InvalidArgumentError, match="k: wanted at most 12"):
        sh.attach_gates(model, sh.DSPConfig(k=13, mode="pipelined"))
    assert sh.get_handle(model) is None and all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(InvalidTypeError, match="model: wanted a torch.nn.Module"):
        sh.attach_gates("bert", DSP)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("mode", ["joint", "pipelined"])
def test_copies_have_gates_of_their_own(copied, mode):
    model, gates, batch = gated(sh.DSPConfig(k=5, mode=mode, anneal_steps=4))
    gates.step()
    output(model.train(), batch)
    twin = copied(model)
    own = sh.get_handle(twin).gates
    assert own is not gates and own.handle.model is twin
    expected = output(model, batch)
    assert torch.equal(output(twin, batch), expected)
    with torch.no_grad():
        own.method.importances.mul_(-1)
    own.step()
    assert torch.equal(output(model, batch), expected)
    loss(output(twin, batch)).backward()
    assert own.method.importances.grad.any() and gates.method.importances.grad is None
    with pytest.raises(NotFiniteError):
        (loss(output(twin, batch)) * float("nan")).backward()
    with pytest.warns(SparseHeadsWarning, match="schedule"):
        own.detach()
    assert all(parameter.requires_grad for parameter in twin.parameters())
    assert all(parameter.requires_grad == (mode == "joint") for parameter in model.parameters())


def average_gradients(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, gates, batch = gated()
    model.train()
    for row in (rank, 2):  # two micro-batches, of which the second is the same on both ranks
        loss(output(model, {name: value[row : row + 1] for name, value in batch.items()})).backward()
    torch.save(gates.method.importances.grad, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_average_the_gradients_of_importances(tmp_path):
    torch.multiprocessing.spawn(average_gradients, (str(tmp_path),), nprocs=2)
    model, gates, batch = gated()
    model.train()
    for row, weight in [(0, 0.5), (1, 0.5), (2, 1.0)]:
        (weight * loss(output(model, {name: value[row : row + 1] for name, value in batch.items()}))).backward()
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), gates.method.importances.grad)

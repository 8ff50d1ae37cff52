"""What attaching leaves alone, what a copy keeps, and that detaching gives back the model as it was found."""

from __future__ import annotations

import copy
import pickle

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from models import build, enable_checkpointing, inputs, loss, masked_copy, masks, output
from torch import nn

import sparse_heads as sh

MASKS = masks(3)


def attached(name="bert", mask=None, **options):
    model = build(name)
    handle = sh.attach(model, **options)
    handle.set_heads(mask)
    return model, handle, inputs(model)


def oracle_output(name, mask, batch, **changes):
    plain = build(name, **changes)
    return output(masked_copy(plain, sh.attach(copy.deepcopy(plain)).layers, mask), batch)


def found(model):
    """All that a module carries, by path."""
    return {
        path: (
            type(module),
            sorted(module.__dict__),
            {name: value for name, value in module.__dict__.items() if isinstance(value, (bool, int, str, float))},
            [list(module.__dict__[hooks]) for hooks in sorted(module.__dict__) if hooks.endswith("hooks")],
            [id(parameter) for parameter in module.parameters(recurse=False)],
            id(module),
        )
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize("name", ["bert_classifier", "distilbert", "gqa"])
def test_detach_gives_back_the_model(name):
    model = build(name)
    model.register_forward_hook(lambda *_: None)
    before, keys, batch = found(model), list(model.state_dict()), inputs(model)
    expected = output(model, batch)

    handle = sh.attach(model)
    handle.set_heads(masks(3, 4, handle.layers[0].group_size)["scattered"])
    assert list(model.state_dict()) == keys
    loss(output(model, batch)).backward()
    handle.detach()

    assert found(model) == before
    assert sh.get_handle(model) is None
    assert torch.equal(output(model, batch), expected)
    handle.detach()
    assert found(model) == before


@pytest.mark.parametrize("reentrant", [True, False])
def test_backward_that_recomputes_after_detach_is_refused(reentrant):
    model, handle, batch = attached(mask=MASKS["scattered"])
    enable_checkpointing(model, reentrant)
    value = loss(output(model.train(), batch))
    handle.detach()
    with pytest.raises(sh.errors.DetachedError, match="recomputes a checkpointed layer"):
        value.backward()


def test_detach_undoes_the_wrapping_of_checkpoint_functions():
    model = build("bert")
    enable_checkpointing(model)
    before = [module.__dict__.get("_gradient_checkpointing_func") for module in model.modules()]
    handle = sh.attach(model)
    output(model.train(), inputs(model))
    handle.detach()
    assert [module.__dict__.get("_gradient_checkpointing_func") for module in model.modules()] == before


def test_projections_stay_linear_modules():
    model, _handle, _ = attached()
    query = model.encoder.layer[0].attention.self.query
    assert isinstance(query, nn.Linear)
    assert [path for path, _ in model.named_modules()] == [path for path, _ in build("bert").named_modules()]


def test_attaching_again():
    model, handle, _ = attached(include=["*.0.*", "*.1.*"])
    assert sh.attach(model, include=["*.0.*", "*.1.*"]) is handle
    assert sh.get_handle(model) is handle
    for options in ({}, {"include": ["*.0.*"]}, {"include": ["*.0.*", "*.1.*"], "backend": "reference"}):
        with pytest.raises(sh.errors.InvalidArgumentError, match="model: wanted .*not attached with other options"):
            sh.attach(model, **options)
    handle.detach()
    assert sh.attach(model) is not handle


def test_parts_and_wholes_of_an_attached_model_are_refused():
    model, handle, _ = attached("bert_classifier")
    with pytest.raises(sh.errors.InvalidArgumentError, match="not attached, whole or in part.*attention.self"):
        sh.attach(model.bert)
    handle.detach()
    part = sh.attach(model.bert)
    with pytest.raises(sh.errors.InvalidArgumentError, match=r"not attached, whole or in part.*bert\.encoder"):
        sh.attach(model)
    assert sh.get_handle(model) is None
    part.detach()
    sh.attach(model)


@pytest.mark.parametrize("first_to_go", [0, 1])
def test_two_handles_on_one_model(first_to_go):
    plain, model = build("bert_classifier"), build("bert_classifier")
    before, batch = found(model), inputs(model)
    handles = [sh.attach(model, include="*.layer.0.*"), sh.attach(model.bert, include="*.layer.1.*")]
    kept = [{0: [1]}, {0: [2, 3]}]
    for handle, heads in zip(handles, kept, strict=True):
        handle.set_heads(heads)
    oracle = sh.attach(plain)
    oracle.set_heads({0: [1], 1: [2, 3]})
    assert torch.equal(output(model, batch), output(plain, batch))
    handles[first_to_go].detach()
    oracle.set_heads({1 - first_to_go: kept[1 - first_to_go][0]})
    assert torch.equal(output(model, batch), output(plain, batch))
    handles[1 - first_to_go].detach()
    assert found(model) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_the_subset_and_are_independent(copied):
    model, handle, batch = attached("bert_classifier", MASKS["scattered"])
    expected = output(model, batch)
    twin = copied(model)
    own = sh.get_handle(twin)
    assert own is not handle
    assert own.model is twin
    assert own.layers == handle.layers
    assert torch.equal(output(twin, batch), expected)

    own.set_heads(None)
    assert torch.equal(output(twin, batch), output(build("bert_classifier"), batch))
    assert torch.equal(output(model, batch), expected)
    own.detach()
    assert torch.equal(output(model, batch), expected)
    with torch.no_grad():
        twin.classifier.bias.add_(1)
    assert torch.equal(output(model, batch), expected)


def test_a_copied_layer_runs_as_its_original():
    model, _handle, _ = attached(mask=MASKS["scattered"])
    states = torch.randn(1, 5, 48)
    layer = model.encoder.layer[1]
    assert torch.equal(copy.deepcopy(layer)(states), layer(states))


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_used(assign):
    model, handle, batch = attached(mask=MASKS["scattered"])
    other = {name: value * 0.5 for name, value in build("bert").state_dict().items()}
    plain = build("bert")
    for each in (model, plain):
        each.load_state_dict(other, assign=assign)
    oracle = masked_copy(plain, handle.layers, MASKS["scattered"])
    torch.testing.assert_close(output(model, batch), output(oracle, batch))


def test_changed_dtype():
    model, _handle, batch = attached(mask=MASKS["scattered"])
    model.double()
    expected = oracle_output("bert", MASKS["scattered"], batch, dtype=torch.float64)
    assert output(model, batch).dtype == torch.float64
    torch.testing.assert_close(output(model, batch), expected, rtol=1e-4, atol=1e-4)


def test_models_are_saved_as_if_they_were_not_attached(tmp_path):
    model, handle, batch = attached("bert_classifier", MASKS["scattered"])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert sh.get_handle(loaded) is None
    handle.set_heads(None)
    assert torch.equal(output(loaded, batch), output(model, batch))
    assert list(loaded.state_dict()) == list(model.state_dict())


class CountingHook(AlignDevicesHook):
    """accelerate's own hook, which counts its calls."""

    def __init__(self):
        super().__init__(execution_device="cpu")
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return super().pre_forward(module, *args, **kwargs)


@pytest.mark.parametrize("order", ["before", "after", "before and removed", "after and removed"])
def test_accelerate_hooks(order):
    model = build("bert")
    batch = inputs(model)
    projections = [model.encoder.layer[1].attention.self.key, model.encoder.layer[1].attention.output.dense]
    hooks = [CountingHook() for _ in projections]

    def add():
        for module, hook in zip(projections, hooks, strict=True):
            add_hook_to_module(module, hook)

    def remove():
        for module in projections:
            remove_hook_from_module(module)

    if order.startswith("before"):
        add()
    if order == "before and removed":
        remove()
    handle = sh.attach(model)
    if order.startswith("after"):
        add()
    if order == "after and removed":
        remove()
    handle.set_heads(MASKS["scattered"])
    torch.testing.assert_close(output(model, batch), oracle_output("bert", MASKS["scattered"], batch))
    assert [hook.calls for hook in hooks] == [0 if "removed" in order else 1] * 2

    handle.detach()
    assert torch.equal(output(model, batch), output(build("bert"), batch))
    if "removed" not in order:
        remove()
    assert type(projections[0]) is nn.Linear
    assert torch.equal(output(model, batch), output(build("bert"), batch))


def test_hooks_removed_while_attached():
    model = build("bert")
    batch = inputs(model)
    value = model.encoder.layer[0].attention.self.value
    add_hook_to_module(value, CountingHook())
    handle = sh.attach(model)
    remove_hook_from_module(value)
    handle.set_heads(MASKS["scattered"])
    torch.testing.assert_close(output(model, batch), oracle_output("bert", MASKS["scattered"], batch))
    handle.detach()
    assert "forward" not in value.__dict__
    assert torch.equal(output(model, batch), output(build("bert"), batch))


@pytest.mark.parametrize("order", ["before", "after"])
def test_offloaded_weights(order):
    model = build("bert")
    batch = inputs(model)
    handle = sh.attach(model) if order == "after" else None
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    handle = handle or sh.attach(model)
    assert model.encoder.layer[0].attention.self.query.weight.is_meta
    handle.set_heads(MASKS["first layer empty"])
    with torch.no_grad():
        result = output(model, batch)
    torch.testing.assert_close(result, oracle_output("bert", MASKS["first layer empty"], batch).detach())


def test_hooks_of_the_user_on_projections_run_once_a_call():
    model, _handle, batch = attached(mask=MASKS["one head a layer"])
    seen = []
    attention = model.encoder.layer[1].attention
    for name, module in (("query", attention.self.query), ("key", attention.self.key), ("out", attention.output.dense)):
        module.register_forward_hook(lambda _, args, result, name=name: seen.append((name, tuple(result.shape[1:]))))
    output(model, batch)
    assert seen == [("query", (7, 12)), ("key", (7, 12)), ("out", (7, 48))]


@pytest.mark.parametrize("mask_name", ["scattered", "all empty"])
def test_frozen_parameters_get_no_gradient(mask_name):
    model, _handle, batch = attached(mask=MASKS[mask_name])
    model.requires_grad_(False)
    model.embeddings.word_embeddings.weight.requires_grad_(True)
    loss(output(model, batch)).backward()
    given = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert given == ["embeddings.word_embeddings.weight"]


def test_layers_without_heads_get_zero_gradients():
    model, handle, batch = attached(mask=MASKS["first layer empty"])
    loss(output(model, batch)).backward()
    projections = handle.sites[0].projections
    assert all(projections[role].weight.grad.count_nonzero() == 0 for role in projections)
    assert all(projections[role].bias.grad.count_nonzero() == 0 for role in ("query", "key", "value"))
    assert projections["output"].bias.grad.any()


def test_a_training_step_leaves_masked_heads_alone():
    model, handle, batch = attached(mask=MASKS["scattered"])
    before = copy.deepcopy(handle.sites[0].projections["query"].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss(output(model, batch)).backward()
    optimizer.step()
    same = (handle.sites[0].projections["query"].weight == before).unflatten(0, (4, 12)).flatten(1).all(1)
    assert torch.equal(same, ~MASKS["scattered"][0])

"""Which subset does a forward run under, in every thread and block, and does its backward pass see the same?"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import build, enable_checkpointing, gradients, inputs, loss, masked_copy, masks, oracle_gradients, output
from torch import nn
from torch.nn.utils import prune

import sparse_heads as sh
from sparse_heads.integrations.transformers import calls

MASKS = masks(3)


@pytest.fixture(autouse=True)
def no_record_is_left():
    yield
    assert calls._calls.get() is None
    assert calls._overrides.get() is None


def attached(name="bert", **changes):
    model = build(name, **changes)
    return model, sh.attach(model), inputs(model)


def alone(name="bert", mask=None, batch=None):
    """The output of a model of its own under `mask`."""
    model, handle, own = attached(name)
    handle.set_heads(mask)
    with torch.no_grad():
        return output(model, own if batch is None else batch)


def gradients_alone(name, mask, **changes):
    plain = build(name, **changes)
    layers = sh.attach(build(name)).layers
    oracle = masked_copy(plain, layers, mask)
    loss(output(oracle, inputs(plain))).backward()
    return oracle_gradients(oracle, layers, mask)


def assert_gradients(model, expected):
    for path, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[path], msg=lambda text, path=path: f"{path}: {text}")


def run_in_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_two_threads_with_two_subsets_at_once():
    model, handle, batch = attached()
    named = {name: MASKS[name] for name in ("scattered", "first layer empty", "one head a layer")} | {"all": None}
    expected = {name: alone(mask=mask) for name, mask in named.items()}
    start = threading.Barrier(len(named))
    wrong = []

    def work(name):
        torch.set_num_threads(1)
        start.wait()
        for _ in range(40):
            with torch.no_grad(), handle.use_heads(named[name]):
                if not torch.equal(output(model, batch), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in named]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert handle.subset is None


def test_two_threads_train_at_once():
    named = {name: MASKS[name] for name in ("scattered", "one head a layer")}
    model, handle, batch = attached(dtype=torch.float64)
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = threading.Barrier(2)

    def work(name):
        start.wait()
        results = []
        for _ in range(10):
            with handle.use_heads(named[name]):
                value = loss(output(model, batch))
            results.append(torch.autograd.grad(value, leaves, allow_unused=True))
        return results

    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(named, pool.map(work, named), strict=True))
    for name, runs in results.items():
        expected = list(gradients_alone("bert", named[name], dtype=torch.float64).values())
        for grads in runs:
            for grad, wanted in zip(grads, expected, strict=True):
                torch.testing.assert_close(grad, wanted)


def test_tasks_of_one_thread():
    model, handle, batch = attached()
    named = {name: MASKS[name] for name in ("scattered", "one head a layer")}
    expected = {name: alone(mask=mask) for name, mask in named.items()}

    async def work(name):
        for _ in range(5):
            with handle.use_heads(named[name]):
                await asyncio.sleep(0)
                with torch.no_grad():
                    assert torch.equal(output(model, batch), expected[name])
                await asyncio.sleep(0)

    async def everyone():
        await asyncio.gather(*(work(name) for name in named))

    asyncio.run(everyone())


def test_blocks_nest_and_none_means_all_heads():
    model, handle, batch = attached()
    handle.set_heads(MASKS["all empty"])
    seen = []
    with torch.no_grad():
        with handle.use_heads(MASKS["scattered"]):
            with handle.use_heads(None):
                seen.append(output(model, batch))
            seen.append(output(model, batch))
            handle.set_heads(MASKS["one head a layer"])
            seen.append(output(model, batch))
        seen.append(output(model, batch))
    wanted = [None, MASKS["scattered"], MASKS["scattered"], MASKS["one head a layer"]]
    for result, mask in zip(seen, wanted, strict=True):
        assert torch.equal(result, alone(mask=mask))


def test_new_threads_start_from_set_heads():
    model, handle, batch = attached()
    handle.set_heads(MASKS["one head a layer"])
    with torch.no_grad(), handle.use_heads(MASKS["scattered"]):
        result = run_in_thread(lambda: output(model, batch))
    torch.testing.assert_close(result.detach(), alone(mask=MASKS["one head a layer"]))
    assert not torch.equal(result.detach(), alone(mask=MASKS["scattered"]))


def test_bind_carries_over_to_threads():
    model, handle, batch = attached()
    view = handle.bind(MASKS["scattered"])
    handle.set_heads(MASKS["one head a layer"])
    result = run_in_thread(lambda: output(view, batch).detach())
    torch.testing.assert_close(result, alone(mask=MASKS["scattered"]))
    assert view.config is model.config
    torch.testing.assert_close(view.forward(**batch)[0], view(**batch)[0])
    torch.testing.assert_close(output(model, batch).detach(), alone(mask=MASKS["one head a layer"]))


def test_two_attached_models_keep_their_own_subsets():
    first, first_handle, batch = attached()
    second, second_handle, _ = attached()
    with torch.no_grad(), first_handle.use_heads(MASKS["scattered"]):
        with second_handle.use_heads(MASKS["one head a layer"]):
            assert torch.equal(output(first, batch), alone(mask=MASKS["scattered"]))
            assert torch.equal(output(second, batch), alone(mask=MASKS["one head a layer"]))


def test_a_forward_may_run_another_attached_model():
    outer, outer_handle, batch = attached()
    inner, inner_handle, _ = attached()
    outer_handle.set_heads(MASKS["one head a layer"])
    inner_handle.set_heads(MASKS["all empty"])
    inside = []
    outer.encoder.layer[1].register_forward_pre_hook(lambda *_: inside.append(output(inner, batch)))
    with torch.no_grad():
        assert torch.equal(output(outer, batch), alone(mask=MASKS["one head a layer"]))
    assert torch.equal(inside[0], alone(mask=MASKS["all empty"]))


@pytest.mark.parametrize("changed", ["set_heads", "use_heads"])
def test_backward_after_the_block(changed):
    model, handle, batch = attached(dtype=torch.float64)
    with handle.use_heads(MASKS["scattered"]):
        value = loss(output(model, batch))
    if changed == "set_heads":
        handle.set_heads(MASKS["one head a layer"])
        value.backward()
    else:
        with handle.use_heads(MASKS["one head a layer"]):
            value.backward()
    assert_gradients(model, gradients_alone("bert", MASKS["scattered"], dtype=torch.float64))


@pytest.mark.parametrize("name", ["bert_classifier", "llama_lm"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("enabled", ["before attaching", "after attaching", "inside the block"])
@pytest.mark.parametrize("where", ["here", "in a thread"])
def test_checkpointed_backward_after_the_block(name, reentrant, enabled, where):
    model = build(name, dtype=torch.float64).train()

    def enable():
        enable_checkpointing(model, reentrant)

    if enabled == "before attaching":
        enable()
    handle = sh.attach(model)
    if enabled == "after attaching":
        enable()
    with handle.use_heads(MASKS["scattered"]):
        if enabled == "inside the block":
            enable()
        value = loss(output(model, inputs(model)))
    handle.set_heads(MASKS["one head a layer"])
    if where == "here":
        value.backward()
    else:
        run_in_thread(value.backward)
    assert_gradients(model, gradients_alone(name, MASKS["scattered"], dtype=torch.float64))


def test_checkpointing_of_a_part_that_trains_alone():
    model, handle, batch = attached("bert_classifier", dtype=torch.float64)
    enable_checkpointing(model)
    model.bert.train()
    with handle.use_heads(MASKS["scattered"]):
        value = loss(output(model, batch))
    value.backward()
    assert_gradients(model, gradients_alone("bert_classifier", MASKS["scattered"], dtype=torch.float64))


def test_recomputation_of_one_model_inside_another_keeps_both_subsets():
    class Pair(nn.Module):
        def __init__(self, first, second):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, **batch):
            return (output(self.first, batch) + output(self.second, batch),)

    pair = Pair(build("bert", dtype=torch.float64), build("bert", dtype=torch.float64)).train()
    for part in (pair.first, pair.second):
        enable_checkpointing(part)
    first = sh.attach(pair, include="first.*")
    second = sh.attach(pair.second)
    batch = inputs(pair.first)
    with first.use_heads(MASKS["scattered"]), second.use_heads(MASKS["one head a layer"]):
        value = loss(pair(**batch)[0])
    value.backward()
    assert_gradients(pair.first, gradients_alone("bert", MASKS["scattered"], dtype=torch.float64))
    assert_gradients(pair.second, gradients_alone("bert", MASKS["one head a layer"], dtype=torch.float64))


def test_a_layer_and_a_forward_called_directly_use_the_current_subset():
    model, handle, batch = attached()
    states = torch.randn(2, 5, 48)
    plain = build("bert")
    mask = MASKS["scattered"]
    oracle = masked_copy(plain, handle.layers, mask)
    with torch.no_grad(), handle.use_heads(mask):
        for row in range(3):
            result = model.encoder.layer[row](states)
            torch.testing.assert_close(result, oracle.encoder.layer[row](states))
        torch.testing.assert_close(model.forward(**batch)[0], oracle(**batch)[0])
        torch.testing.assert_close(model.encoder(states)[0], oracle.encoder(states)[0])


def test_an_error_inside_a_forward_leaves_nothing_behind():
    model, handle, batch = attached()

    def fail(*_):
        raise RuntimeError("in the middle")

    hook = model.encoder.layer[1].attention.output.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"), handle.use_heads(MASKS["scattered"]):
        output(model, batch)
    assert calls._calls.get() is None
    hook.remove()
    with torch.no_grad():
        assert torch.equal(output(model, batch), alone())
        handle.set_heads(MASKS["one head a layer"])
        assert torch.equal(output(model, batch), alone(mask=MASKS["one head a layer"]))


def test_a_refused_argument_leaves_nothing_behind():
    model, handle, batch = attached()
    handle.set_heads(MASKS["scattered"])
    with pytest.raises(sh.errors.UnsupportedError):
        model(**batch, output_attentions=True)
    assert calls._calls.get() is None


def test_a_failing_hook_of_the_user_leaves_nothing_behind():
    model, handle, batch = attached()

    def fail(*_):
        raise RuntimeError("after the forward")

    handle.set_heads(MASKS["scattered"])
    for register in (model.register_forward_hook, model.register_forward_pre_hook):
        hook = register(fail)
        with pytest.raises(RuntimeError, match="after the forward"):
            model(**batch)
        assert calls._calls.get() is None
        hook.remove()


def test_backward_twice():
    model, handle, batch = attached(dtype=torch.float64)
    with handle.use_heads(MASKS["scattered"]):
        value = loss(output(model, batch))
    value.backward(retain_graph=True)
    once = {path: grad.clone() for path, grad in gradients(model).items() if grad is not None}
    value.backward()
    for path, grad in once.items():
        assert torch.equal(model.get_parameter(path).grad, 2 * grad), path


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    model, handle, batch = attached()
    handle.set_heads(MASKS["scattered"])
    expected = output(model, batch)
    assert expected.requires_grad
    with mode():
        result = output(model, batch)
    assert not result.requires_grad
    torch.testing.assert_close(result.clone(), expected.detach())


@pytest.mark.parametrize("mask_name", ["scattered", "first layer empty"])
def test_autocast(mask_name):
    model, handle, batch = attached()
    plain = build("bert")
    mask = MASKS[mask_name]
    oracle = masked_copy(plain, handle.layers, mask)
    exact = output(masked_copy(build("bert", dtype=torch.float64), handle.layers, mask), batch)
    handle.set_heads(mask)
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = output(model, batch), output(oracle, batch)
        loss(result).backward()
    assert result.dtype == expected.dtype
    projections = [module for site in handle.sites for module in site.projections.values()]
    assert all(module.weight.grad.dtype == torch.float32 for module in projections)
    error, allowed = ((each.double() - exact).norm() for each in (result, expected))
    assert error <= 2 * allowed + torch.finfo(torch.bfloat16).eps * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models(dtype):
    model, handle, batch = attached("llama_lm", dtype=dtype)
    mask = MASKS["scattered"]
    handle.set_heads(mask)
    oracle = masked_copy(build("llama_lm", dtype=dtype), handle.layers, mask)
    exact = output(masked_copy(build("llama_lm", dtype=torch.float64), handle.layers, mask), batch)
    result, expected = output(model, batch), output(oracle, batch)
    assert result.dtype == dtype
    error, allowed = ((each.double() - exact).norm() for each in (result, expected))
    assert error <= 2 * allowed + torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize(
    "transform",
    [
        lambda layer, x: torch.func.grad(lambda y: layer(y).square().sum())(x),
        lambda layer, x: torch.func.jvp(layer, (x,), (x.cos(),))[1],
        lambda layer, x: torch.func.vmap(layer)(x[:, None]),
    ],
    ids=["grad", "jvp", "vmap"],
)
def test_function_transforms(transform):
    model, handle, _ = attached(attention="eager", dtype=torch.float64)
    handle.set_heads(MASKS["scattered"])
    oracle = masked_copy(build("bert", "eager", torch.float64), handle.layers, MASKS["scattered"])
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    results = [transform(each.requires_grad_(False).encoder.layer[0], x) for each in (model, oracle)]
    torch.testing.assert_close(*results)


def test_scale_multiplies_heads_and_has_exact_gradients():
    model, handle, batch = attached(dtype=torch.float64)
    scale = torch.rand(3, 3, 4, dtype=torch.float64)
    scale[0, 1, 2] = 0
    scale.requires_grad_()

    def value(scale):
        with handle.use_heads(MASKS["scattered"], scale=scale):
            return loss(output(model, batch))

    (gradient,) = torch.autograd.grad(value(scale), scale)
    assert torch.equal(gradient != 0, MASKS["scattered"].expand_as(gradient))
    step = 1e-6
    for place in [(0, 1, 2), (2, 0, 0), (1, 2, 1)]:
        moved = torch.zeros_like(scale)
        moved[place] = step
        slope = (value(scale + moved) - value(scale - moved)) / (2 * step)
        torch.testing.assert_close(gradient[place], slope, rtol=1e-6, atol=1e-6)


def test_weights_set_by_hooks_are_read_when_their_module_is_called():
    """`torch.nn.utils.prune` computes a projection's weight in a hook before every call."""
    model, handle, batch = attached(dtype=torch.float64)
    key = model.encoder.layer[0].attention.self.key
    prune.l1_unstructured(key, "weight", 0.5)
    handle.set_heads(MASKS["scattered"])
    loss(output(model, batch)).backward()
    with torch.no_grad():
        key.weight_orig.mul_(-1.0)
    result = output(model, batch)
    prune.remove(key, "weight")
    torch.testing.assert_close(result, output(model, batch))


def test_hooks_that_change_a_projections_input():
    plain, mask = build("bert", dtype=torch.float64), MASKS["scattered"]
    model, handle, batch = attached(dtype=torch.float64)
    handle.set_heads(mask)
    oracle = masked_copy(plain, handle.layers, mask)
    for each in (model, oracle):
        each.encoder.layer[1].attention.self.value.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    torch.testing.assert_close(output(model, batch), output(oracle, batch))

"""Do gates on a model give the outputs and gradients of a dense model with multiplied heads, in every way to run it?"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from gated_models import METHODS, NOISY, config, counted_heads, dense_oracle, gated, set_importances, spread, train
from generation_inputs import TIGHT, gated_copy
from models import build, enable_checkpointing, gradients, inputs, loss, output
from torch import nn

import sparse_heads as sh
from sparse_heads.testing import assert_close_to_reference, items_run

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = ["bert", "distilbert", "llama_lm", "gqa", "bert_cross", "bart"]
# Log-alphas whose gates are exactly 0, anything and exactly 1, whatever the noise.
CLOSED, EITHER, OPEN = -30.0, 0.3, 30.0
# With few gates between 0 and 1 an error of their gradient would be that of one number.
HALF_OPEN = {method: {} for method in METHODS} | {"layerwise": {"initial": 0.0, "temperature": 1.0}}
PATTERNS = ["mixed", "a layer closed", "first layer closed", "all closed", "all open"]


def assert_gradients(gates, model, expected, close=TIGHT):
    actual = {"importances": gates.method.importances.grad} | gradients(model)
    for path, grad in actual.items():
        if grad is None or expected[path] is None:
            assert all(each is None or not each.any() for each in (grad, expected[path])), path
        else:
            torch.testing.assert_close(grad, expected[path], **close, msg=lambda text, p=path: f"{p}: {text}")


class TestOracle:
    """Against autograd in float64 through a copy whose output projections read multiplied heads."""

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("method", METHODS)
    def test_outputs_and_every_gradient(self, method, name):
        model, gates, plain, batch = gated(method, name)
        expected, wanted = dense_oracle(plain, gates, batch)
        result = output(model, batch)
        loss(result).backward()
        torch.testing.assert_close(result.detach(), expected, **TIGHT)
        assert gates.method.importances.grad.dtype == torch.float64
        assert gates.method.importances.grad.any()
        assert_gradients(gates, model, wanted)

    def test_straight_through_gives_closed_heads_the_gradient_of_their_gate(self):
        model, gates, plain, batch = gated("ste")
        _, wanted = dense_oracle(plain, gates, batch)
        loss(output(model, batch)).backward()
        kept = torch.zeros(12, dtype=torch.bool)
        kept[gates.method.importances.topk(5).indices] = True
        assert torch.equal(gates.method.sample().detach().bool(), kept)
        assert wanted["gates"].flatten()[~kept].abs().min() > 0
        torch.testing.assert_close(gates.method.importances.grad, wanted["gates"].flatten(), **TIGHT)

    @pytest.mark.filterwarnings("ignore:gates. the importances changed without gates.step")
    @pytest.mark.parametrize("method", ["gumbel", "hard concrete"])
    def test_importances_have_the_slope_of_the_loss(self, method):
        """By differences of losses of the gated model itself: the noise stays the same until the next step."""
        model, gates, _, batch = gated(method)
        loss(output(model, batch)).backward()
        step, importances = 1e-6, gates.method.importances
        places = importances.grad.abs().topk(3).indices.tolist()
        for place in places:
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    kept = importances[place].clone()
                    importances[place] += sign * step
                    ends.append(loss(output(model, batch)))
                    importances[place] = kept
            slope = (ends[0] - ends[1]) / (2 * step)
            torch.testing.assert_close(importances.grad[place], slope, rtol=1e-5, atol=1e-7)

    def test_soft_top_k_of_gumbel_noise_by_hand(self):
        """Sums to k, is not binary while warm, differs between steps; nearly binary when cold."""
        _, gates, _, _ = gated("gumbel", anneal_steps=2, end_temperature=1e-6)
        warm = gates.method.sample().detach()
        assert abs(float(warm.sum()) - 5) < 1e-9 and bool(((warm > 0.01) & (warm < 0.9)).any())
        for _ in range(2):
            gates.step()
        cold = gates.method.sample().detach()
        assert abs(float(cold.sum()) - 5) < 1e-9
        torch.testing.assert_close(cold, cold.round(), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize(
        "name, kinds, count",
        [
            ("bert_cross", ("self",), 12),
            ("bert_cross", ("cross",), 12),
            ("bart", (("decoder", "cross"),), 12),
            ("bart", ("self",), 24),
            ("bart", ("cross", ("encoder", "self")), 24),
        ],
    )
    def test_chosen_kinds_only(self, method, name, kinds, count):
        changes = {"k": 3} if method in ("gumbel", "ste") else {}
        model, gates, plain, batch = gated(method, name, kinds=kinds, **changes)
        counted = counted_heads(gates)
        assert int(counted.sum()) == gates.method.importances.numel() == count
        assert not counted.all()
        expected, wanted = dense_oracle(plain, gates, batch)
        result = output(model, batch)
        loss(result).backward()
        torch.testing.assert_close(result.detach(), expected, **TIGHT)
        assert_gradients(gates, model, wanted)
        assert gates.subset().mask[~counted].all()

    @pytest.mark.parametrize("method", METHODS)
    def test_layers_of_different_head_counts(self, method):
        model, gates, plain, batch = gated(method, "bart", sizes={"decoder_attention_heads": 2})
        counts = [layer.num_heads for layer in gates.handle.layers]
        assert set(counts) == {2, 4}
        assert gates.method.importances.numel() == sum(counts) == 24
        expected, wanted = dense_oracle(plain, gates, batch)
        result = output(model, batch)
        loss(result).backward()
        torch.testing.assert_close(result.detach(), expected, **TIGHT)
        assert_gradients(gates, model, wanted)
        set_importances(gates, torch.randn(24, dtype=torch.float64))
        subset, padding = gates.subset(), ~gates.handle.layers.real_heads()
        assert int(padding.sum()) == 12 and not subset.mask[padding].any()
        assert gates.scores().tensor[padding].eq(-torch.inf).all()
        model.eval()
        kept = gated_copy(plain.eval(), gates.handle.layers, subset.mask * gates.scale())
        torch.testing.assert_close(output(model, batch), output(kept, batch), **TIGHT)

    @pytest.mark.parametrize("method", METHODS)
    def test_low_precision_models_keep_float64_importances(self, method):
        model, gates, plain, batch = gated(method, dtype=torch.bfloat16, **HALF_OPEN[method])
        exact, wanted = dense_oracle(build("bert", dtype=torch.float64), gates, inputs(build("bert")))
        low, low_grads = dense_oracle(plain, gates, batch)
        result = output(model, batch)
        loss(result).backward()
        assert result.dtype == torch.bfloat16
        assert gates.method.importances.dtype == gates.method.importances.grad.dtype == torch.float64
        assert_close_to_reference(result.detach(), low, exact)
        # What reaches the importances was rounded to bfloat16 head by head, on both ways.
        error, allowed = (
            (each - wanted["importances"]).norm() for each in (gates.method.importances.grad, low_grads["importances"])
        )
        assert error <= 2 * allowed + torch.finfo(torch.bfloat16).eps * wanted["importances"].norm()

    @pytest.mark.parametrize("method", METHODS)
    def test_importances_are_never_half_precision(self, method):
        model, gates, _, batch = gated(method, dtype=torch.float32)
        before = gates.method.importances.detach().clone()
        model.to(torch.bfloat16)
        gates.method.half()
        gates.method.to(torch.bfloat16)
        assert gates.method.importances.dtype == torch.float64
        assert torch.equal(gates.method.importances.detach(), before)
        loss(output(model, batch)).backward()
        assert gates.method.importances.grad.isfinite().all()

    @pytest.mark.parametrize("method", METHODS)
    def test_autocast(self, method):
        model, gates, plain, batch = gated(method, dtype=torch.float32, **HALF_OPEN[method])
        with torch.autocast("cpu", torch.bfloat16):
            result = output(model, batch)
            low, low_grads = dense_oracle(plain, gates, batch)
            loss(result).backward()
        exact, wanted = dense_oracle(build("bert", dtype=torch.float64), gates, batch)
        assert_close_to_reference(result.detach(), low, exact)
        error, allowed = (
            (each - wanted["importances"]).norm() for each in (gates.method.importances.grad, low_grads["importances"])
        )
        assert error <= 2 * allowed + torch.finfo(torch.bfloat16).eps * wanted["importances"].norm()


class TestNoise:
    @pytest.mark.parametrize("method", NOISY)
    def test_one_draw_a_step(self, method):
        # at one temperature, so that nothing but the noise can differ
        model, gates, _, batch = gated(method, **{"anneal_steps": 0} if method == "gumbel" else {})
        with torch.no_grad():
            first, again = output(model, batch), output(model, batch)
            torch.rand(7)  # the global generator has no part in it
            third = output(model, batch)
            gates.step()
            other = output(model, batch)
        assert torch.equal(first, again) and torch.equal(first, third)
        assert not torch.equal(first, other)

    @pytest.mark.parametrize("method", METHODS)
    def test_the_global_generator_is_not_touched(self, method):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        model = build("bert")
        torch.set_rng_state(before)
        gates = sh.attach_gates(model, config(method))
        output(model.train(), inputs(model))
        gates.step()
        gates.penalty()
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("method", NOISY)
    def test_seeds(self, method):
        results = []
        for seed in (0, 0, 1):
            _, gates, _, _ = gated(method, seed=seed)
            draws = []
            for _ in range(3):
                draws.append(gates.method.sample().detach())
                gates.step()
            results.append(torch.stack(draws))
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])

    @pytest.mark.parametrize("method", METHODS)
    def test_accumulated_micro_batches_have_the_gradient_of_the_whole(self, method):
        """Both forwards first, then both backward passes: each has a graph of its own."""
        model, gates, plain, batch = gated(method)
        _, wanted = dense_oracle(plain, gates, batch)
        whole = loss(output(model, batch))
        parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
        weights = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        values = [
            (output(model, part) * weights[rows]).sum()
            for part, rows in zip(parts, (slice(0, 1), slice(1, 3)), strict=True)
        ]
        torch.testing.assert_close(sum(values), whole)
        for value in values:
            value.backward()
        assert_gradients(gates, model, wanted)

    @pytest.mark.parametrize("method", METHODS)
    def test_without_gradients(self, method):
        model, gates, _, batch = gated(method)
        expected = output(model, batch)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                result = output(model, batch)
            assert not result.requires_grad
            torch.testing.assert_close(result.clone(), expected.detach(), **TIGHT)
        loss(output(model, batch)).backward()
        assert gates.method.importances.grad.any()


class TestEval:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("method", METHODS)
    def test_is_the_subset_on_the_skipping_path_bit_for_bit(self, method, name):
        model, gates, _, batch = gated(method, name, torch.float32)
        train(model, gates, [batch], 4)
        if method in ("hard concrete", "layerwise"):
            set_importances(gates, torch.randn(gates.method.importances.shape))
        model.eval()
        plain = build(name)
        plain.load_state_dict(model.state_dict())
        handle, subset = sh.attach(plain), gates.subset()
        scale = gates.scale()
        assert subset.count() < subset.layers.num_heads and (method != "gumbel" or subset.count() == 5)
        with torch.no_grad(), items_run() as items:
            result = output(model, batch)
        handle.set_heads(subset.mask)
        with torch.no_grad(), items_run() as expected_items:
            expected = output(plain, batch)
        if (scale[subset.mask] == 1).all():
            assert torch.equal(result, expected)
        with torch.no_grad(), handle.use_heads(subset.mask, scale=scale):
            assert torch.equal(result, output(plain, batch))
        assert items == expected_items
        assert items.out_projection > 0

    @pytest.mark.parametrize("method", NOISY)
    def test_has_no_noise(self, method):
        model, gates, _, batch = gated(method)
        model.eval()
        with torch.no_grad():
            first = output(model, batch)
            gates.step()
            assert torch.equal(output(model, batch), first)
        model.train()
        with torch.no_grad():
            assert not torch.equal(output(model, batch), first)

    def test_follows_the_importances(self):
        model, gates, _, batch = gated("gumbel")
        model.eval()
        for kept in ([0, 1, 2, 3, 4], [7, 8, 9, 10, 11]):
            values = torch.zeros(12, dtype=torch.float64)
            values[kept] = 1.0
            set_importances(gates, values)
            assert gates.subset().mask.flatten().nonzero().flatten().tolist() == kept
            oracle = gated_copy(build("bert", dtype=torch.float64), gates.handle.layers, gates.subset().mask)
            torch.testing.assert_close(output(model, batch), output(oracle, batch), **TIGHT)

    def test_the_root_decides_and_parts_do_not(self):
        model, _gates, _plain, batch = gated("gumbel", "bert_classifier")
        model.bert.eval()
        with torch.no_grad():
            noisy = output(model, batch)
            model.train()
            assert torch.equal(output(model, batch), noisy)
            model.eval()
            settled = output(model, batch)
            model.bert.train()
            assert torch.equal(output(model, batch), settled)
        assert not torch.equal(noisy, settled)

    def test_hard_concrete_gates_between_zero_and_one_scale_what_is_kept(self):
        model, gates, _, batch = gated("hard concrete")
        values = torch.linspace(-3, 3, 12, dtype=torch.float64)
        set_importances(gates, values)
        settled = (1.2 * values.sigmoid() - 0.1).clamp(0, 1)
        assert torch.equal(gates.subset().mask.flatten(), settled > 0.5)
        kept = torch.where(settled > 0.5, settled, 0.0).view(3, 4)
        torch.testing.assert_close(gates.scale() * gates.subset().mask, kept, rtol=1e-12, atol=1e-12)
        oracle = gated_copy(build("bert", dtype=torch.float64), gates.handle.layers, kept)
        torch.testing.assert_close(output(model.eval(), batch), output(oracle, batch), **TIGHT)

    def test_generation_runs_the_subset(self):
        model, gates, _, batch = gated("gumbel", "llama_lm", torch.float32)
        model.eval()
        plain = build("llama_lm")
        sh.attach(plain).set_heads(gates.subset())
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        prompt = {name: value[:2] for name, value in batch.items()}
        assert torch.equal(model.generate(**prompt, **options), plain.generate(**prompt, **options))


class TestSkippedZeros:
    """Hard-concrete training: gates that are exactly 0 are off, and nothing is lost."""

    @staticmethod
    def pattern(name):
        values = torch.tensor([CLOSED, EITHER, OPEN, CLOSED]).repeat(3).double()
        if name == "a layer closed":
            values[4:8] = CLOSED
        elif name == "first layer closed":
            values[:4] = CLOSED
        elif name == "all closed":
            values[:] = CLOSED
        elif name == "all open":
            values[:] = OPEN
        return values

    @pytest.mark.parametrize("name", ["bert", "gqa"])
    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_equals_dense_multiplication(self, pattern, name):
        model, gates, plain, batch = gated("hard concrete", name)
        set_importances(gates, self.pattern(pattern))
        expected, wanted = dense_oracle(plain, gates, batch)
        result = output(model, batch)
        loss(result).backward()
        torch.testing.assert_close(result.detach(), expected, **TIGHT)
        assert_gradients(gates, model, wanted)
        closed = gates.method.sample() == 0
        grad = gates.method.importances.grad
        assert grad is None if closed.all() else not grad[closed].any()

    @pytest.mark.parametrize("name", ["bert", "gqa"])
    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_in_float32_is_as_good_as_dense_multiplication(self, pattern, name):
        model, gates, plain, batch = gated("hard concrete", name, torch.float32)
        set_importances(gates, self.pattern(pattern))
        low, low_grads = dense_oracle(plain, gates, batch)
        double = build(name, dtype=torch.float64)
        exact, exact_grads = dense_oracle(double, gates, inputs(double))
        result = output(model, batch)
        loss(result).backward()
        assert_close_to_reference(result.detach(), low, exact)
        for path, grad in gradients(model).items():
            if exact_grads[path] is None:
                assert grad is None or not grad.any(), path
                continue
            # a few values of a small tensor may be lucky in one way and not in the other: compare whole tensors
            error, allowed = ((each.double() - exact_grads[path]).norm() for each in (grad, low_grads[path]))
            rounding = torch.finfo(torch.float32).eps * max(exact_grads[path].norm(), 1.0)
            assert error <= 2 * allowed + 4 * rounding, path

    @pytest.mark.parametrize("name", ["bert", "gqa"])
    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_closed_heads_do_not_run(self, pattern, name):
        model, gates, _, batch = gated("hard concrete", name, torch.float32)
        set_importances(gates, self.pattern(pattern))
        open_heads = spread(gates, gates.method.sample()).detach() != 0
        with items_run() as items:
            output(model, batch)
        counted = [row for row in open_heads if not row.all()]  # a layer with every head open runs as it is
        kept = sum(int(row.sum()) for row in counted)
        group = gates.handle.layers[0].group_size
        groups = sum(int(row.unflatten(0, (-1, group)).any(1).sum()) for row in counted)
        assert (items.in_projection, items.out_projection) == (3 * (kept + 2 * groups), 3 * kept)

    def test_closed_heads_are_not_read(self):
        results = []
        for poisoned in (False, True):
            model, gates, _, batch = gated("hard concrete", dtype=torch.float32)
            set_importances(gates, self.pattern("mixed"))
            closed = (gates.method.sample() == 0).view(3, 4)
            if poisoned:
                for row, site in zip(closed, gates.handle.sites, strict=True):
                    with torch.no_grad():
                        for role, part in site.projections.items():
                            weight = part.weight.t() if role == "output" else part.weight
                            weight.unflatten(0, (4, -1))[row] = float("nan")
            result = output(model, batch)
            loss(result).backward()
            results.append((result.detach(), gates.method.importances.grad))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])

    @pytest.mark.parametrize("method", ["gumbel", "ste", "layerwise"])
    def test_other_methods_run_every_head(self, method):
        """Their closed heads have gradients: a head that is skipped would never come back."""
        model, gates, _, batch = gated(method)
        set_importances(gates, torch.linspace(-20, 20, 12, dtype=torch.float64))
        with items_run() as items:
            loss(output(model, batch)).backward()
        assert (items.in_projection, items.attention, items.out_projection) == (0, 0, 0)


class TestOneForward:
    """The sample belongs to the forward: what follows sees the same."""

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("where", ["here", "in a thread"])
    def test_checkpointed_backward_after_a_step(self, method, reentrant, where):
        """Recomputed layers run under the draw of their forward."""
        model, gates, plain, batch = gated(method, "bert_classifier")
        set_importances(gates, torch.linspace(-4, 4, 12, dtype=torch.float64))
        enable_checkpointing(model, reentrant)
        _, wanted = dense_oracle(plain, gates, batch)
        value = loss(output(model, batch))
        gates.step()
        if where == "here":
            value.backward()
        else:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(value.backward).result()
        assert_gradients(gates, model, wanted)

    @pytest.mark.parametrize("method", METHODS)
    def test_backward_in_a_block_and_under_eval(self, method):
        model, gates, plain, batch = gated(method)
        _, wanted = dense_oracle(plain, gates, batch)
        value = loss(output(model, batch))
        model.eval()
        with gates.handle.use_heads({0: [1]}):
            value.backward()
        assert_gradients(gates, model, wanted)

    @pytest.mark.parametrize("method", METHODS)
    def test_backward_twice(self, method):
        model, gates, _, batch = gated(method)
        value = loss(output(model, batch))
        value.backward(retain_graph=True)
        once = gates.method.importances.grad.clone()
        value.backward()
        assert torch.equal(gates.method.importances.grad, 2 * once)

    def test_use_heads_wins(self):
        model, gates, plain, batch = gated("gumbel")
        mask = torch.zeros(3, 4, dtype=torch.bool)
        mask[:, 1] = True
        with torch.no_grad():
            gated_before = output(model, batch)
            for subset, oracle_mask in ((None, torch.ones(3, 4)), (mask, mask)):
                oracle = gated_copy(plain, gates.handle.layers, oracle_mask)
                with gates.handle.use_heads(subset):
                    torch.testing.assert_close(output(model, batch), output(oracle, batch), **TIGHT)
                view = gates.handle.bind(subset)
                torch.testing.assert_close(output(view, batch), output(oracle, batch), **TIGHT)
            requests = mask.expand(3, -1, -1).clone()
            requests[0] = True
            with gates.handle.use_heads(requests):
                rows = output(model, batch)
            torch.testing.assert_close(rows[0], output(plain, batch)[0], **TIGHT)
            torch.testing.assert_close(rows[1:], output(oracle, batch)[1:], **TIGHT)
            assert torch.equal(output(model, batch), gated_before)

    def test_scale_of_a_block_is_alone(self):
        model, gates, plain, batch = gated("gumbel")
        scale = torch.rand(3, 4, dtype=torch.float64)
        oracle = gated_copy(plain, gates.handle.layers, scale)
        with torch.no_grad(), gates.handle.use_heads(None, scale=scale):
            torch.testing.assert_close(output(model, batch), output(oracle, batch), **TIGHT)

    def test_all_heads_in_one_thread_while_another_trains(self):
        model, gates, plain, batch = gated("hard concrete")
        set_importances(gates, TestSkippedZeros.pattern("mixed"))
        dense = output(plain, batch).detach()
        _, wanted = dense_oracle(plain, gates, batch)
        start = threading.Barrier(2)
        leaves = [gates.method.importances, *model.parameters()]
        names = ["importances", *dict(model.named_parameters())]

        def watch():
            torch.set_num_threads(1)
            start.wait()
            results = []
            for _ in range(20):
                with torch.no_grad(), gates.handle.use_heads(None):
                    results.append(output(model, batch))
            return results

        def learn():
            torch.set_num_threads(1)
            start.wait()
            return [
                torch.autograd.grad(loss(output(model, batch)), leaves, allow_unused=True, materialize_grads=True)
                for _ in range(10)
            ]

        with ThreadPoolExecutor(2) as pool:
            seen, learned = pool.submit(watch), pool.submit(learn)
        for result in seen.result():
            torch.testing.assert_close(result, dense, **TIGHT)
        for grads in learned.result():
            for path, grad in zip(names, grads, strict=True):
                expected = torch.zeros_like(grad) if wanted[path] is None else wanted[path]
                torch.testing.assert_close(grad, expected, **TIGHT, msg=lambda text, p=path: f"{p}: {text}")

    def test_new_threads_see_the_gates(self):
        model, gates, _, batch = gated("gumbel")
        expected = output(model, batch).detach()
        with ThreadPoolExecutor(1) as pool, gates.handle.use_heads(None):
            result = pool.submit(lambda: output(model, batch).detach()).result()
        torch.testing.assert_close(result, expected, **TIGHT)

    def test_two_gated_models_keep_their_own(self):
        first, first_gates, _, batch = gated("gumbel", seed=1)
        second, second_gates, plain, _ = gated("gumbel", seed=2)
        _, wanted = dense_oracle(plain, second_gates, batch)
        loss(output(second, batch)).backward()
        assert first_gates.method.importances.grad is None
        assert_gradients(second_gates, second, wanted)
        assert not torch.equal(output(first, batch), output(second, batch))

    def test_a_layer_called_directly_is_gated(self):
        model, gates, plain, _ = gated("gumbel")
        states = torch.randn(2, 5, 48, dtype=torch.float64)
        oracle = gated_copy(plain, gates.handle.layers, spread(gates, gates.method.sample()))
        for row in range(3):
            expected = oracle.encoder.layer[row](states)
            torch.testing.assert_close(model.encoder.layer[row](states), expected, **TIGHT)

    def test_a_model_around_the_gated_one(self):
        class Around(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, **batch):
                return (self.inner(**batch)[0] * 2,)

        inner = build("bert", dtype=torch.float64)
        gates = sh.attach_gates(inner, config("gumbel"))
        model, batch = Around(inner).train(), inputs(inner)
        expected, _ = dense_oracle(build("bert", dtype=torch.float64).train(), gates, batch)
        torch.testing.assert_close(output(model, batch).detach(), 2 * expected, **TIGHT)

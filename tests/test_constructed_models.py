"""Do the methods find the heads that were built to matter: ten seeds, exactly, of eight heads in two layers?"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from constructed_models import (
    COUNT,
    harmful_model,
    kept_heads,
    loss_of,
    redundant_model,
    signal_model,
    train_gates,
)

import sparse_heads as sh

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = range(10)


def dsp(constructed, k, seed, steps=30):
    config = sh.DSPConfig(k, mode="pipelined", anneal_steps=steps, gate_lr=0.5, seed=seed)
    return kept_heads(train_gates(constructed, config, steps).subset())


def l0(constructed, seed, steps=40):
    """The penalty of a head lies between what the heads of a signal are worth and what all others are."""
    config = sh.HardConcreteConfig(
        penalty=0.03, temperature=2 / 3, initial=2.0, initial_std=1.0, mode="pipelined", gate_lr=0.4, seed=seed
    )
    return kept_heads(train_gates(constructed, config, steps).subset())


def best(constructed, method, k, **options):
    return kept_heads(sh.score_heads(constructed.model, constructed.batches, method, **options).top(k))


def ablation_scores(constructed):
    return sh.score_heads(constructed.model, constructed.batches, "ablation").tensor.flatten()


class TestConstruction:
    """Is the intended subset the best of its size, by trying all?"""

    @pytest.mark.parametrize("build", [signal_model, harmful_model, redundant_model])
    def test_every_subset(self, build):
        constructed = build(0)
        intended = constructed.signal + constructed.special[:1] * (build is redundant_model)
        losses = {
            kept: loss_of(constructed, list(kept)) for kept in itertools.combinations(range(COUNT), len(intended))
        }
        first, *rest = sorted(losses, key=losses.get)
        if build is redundant_model:
            twin = sorted([*constructed.signal, constructed.special[1]])
            assert {first, rest.pop(0)} == {tuple(sorted(intended)), tuple(twin)}
        else:
            assert list(first) == sorted(intended)
        assert losses[rest[0]] > 2 * losses[first]


@pytest.mark.parametrize("seed", SEEDS)
class TestSignal:
    def test_dsp(self, seed):
        constructed = signal_model(seed)
        assert dsp(constructed, 3, seed) == constructed.signal

    def test_l0(self, seed):
        constructed = signal_model(seed)
        assert l0(constructed, seed) == constructed.signal

    @pytest.mark.parametrize("method", ["michel", "ablation"])
    def test_scores(self, seed, method):
        constructed = signal_model(seed)
        assert best(constructed, method, 3) == constructed.signal


@pytest.mark.parametrize("seed", SEEDS)
class TestRedundantPair:
    """Either alone does the work of both: each by itself looks useless, and together they are not."""

    def test_leaving_one_out_says_that_neither_matters(self, seed):
        constructed = redundant_model(seed)
        scores = ablation_scores(constructed)
        needed = scores[constructed.signal].min()
        assert scores[constructed.special].abs().max() < 0.01 * needed
        without = [head for head in range(COUNT) if head not in constructed.special]
        assert loss_of(constructed, without) - loss_of(constructed, list(range(COUNT))) > needed

    @pytest.mark.parametrize(
        "method", [functools.partial(dsp, k=3, steps=100), functools.partial(l0, steps=120)], ids=["dsp", "l0"]
    )
    def test_exactly_one_is_kept(self, seed, method):
        """Longer than elsewhere: what is good for one of the pair is, to begin with, good for the other."""
        constructed = redundant_model(seed)
        kept = method(constructed, seed=seed)
        assert sorted(set(kept) - set(constructed.special)) == constructed.signal
        assert len(set(kept) & set(constructed.special)) == 1


@pytest.mark.parametrize("seed", SEEDS)
class TestHarmfulHead:
    def test_its_ablation_score_is_negative(self, seed):
        constructed = harmful_model(seed)
        scores = ablation_scores(constructed)
        (harmful,) = constructed.special
        assert scores[harmful] < 0
        assert scores.argmin() == harmful
        assert best(constructed, "ablation", 3) == constructed.signal

    def test_the_absolute_gradient_takes_it_for_important(self, seed):
        """What Michel's score is known for: it cannot tell harm from use."""
        constructed = harmful_model(seed)
        scores = sh.score_heads(constructed.model, constructed.batches, "michel").tensor.flatten()
        assert scores[constructed.special[0]] > scores[constructed.others].max()

    @pytest.mark.parametrize("k", [3, COUNT - 1])
    def test_dsp_drops_it(self, seed, k):
        constructed = harmful_model(seed)
        kept = dsp(constructed, k, seed)
        assert len(kept) == k
        assert set(kept) >= set(constructed.signal)
        assert constructed.special[0] not in kept

    def test_l0_drops_it(self, seed):
        constructed = harmful_model(seed)
        assert l0(constructed, seed) == constructed.signal


def test_the_intended_heads_differ_between_seeds():
    """Or one lucky subset would pass for ten."""
    assert len({tuple(signal_model(seed).signal) for seed in SEEDS}) >= 8
    assert not torch.equal(signal_model(0).batches[0]["labels"], signal_model(1).batches[0]["labels"])

"""Are intervals, p-values and corrections those that can be worked out by hand?"""

from __future__ import annotations

import numpy
import pytest

from benchmarks.experiments.statistics import RESAMPLES, holm, paired_difference, resampled_means


def test_holm_by_hand():
    # sorted 0.01 * 3, 0.03 * 2, max(0.04 * 1, 0.06)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_a_constant_difference_has_no_width():
    noise = numpy.random.default_rng(1).normal(size=(5, 40))
    found = paired_difference(noise + 0.25, noise)
    assert (found.value, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    assert found.p == pytest.approx(2 / (RESAMPLES + 1))
    assert (found.ahead, found.seeds) == (5, 5)


def test_no_difference_at_all():
    found = paired_difference([[0.5]] * 5, [[0.5]] * 5)
    assert (found.value, found.low, found.high, found.p, found.ahead) == (0.0, 0.0, 0.0, 1.0, 0)


def test_two_seeds_are_resampled_one_at_a_time():
    found = paired_difference([[0.0], [1.0]], [[0.0], [0.0]])
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)
    assert found.p == 1.0 and found.ahead == 1


def test_the_variance_over_seeds_is_unbiased():
    values = numpy.array([[0.1], [0.5], [-0.2], [0.9], [0.3]])
    replicates = resampled_means(values, seed=3)
    # s^2 / n with the n - 1 of a sample; resampling all five would give 4/5 of it
    assert replicates.var() == pytest.approx(values.var(ddof=1) / 5, rel=0.05)
    assert replicates.mean() == pytest.approx(values.mean(), abs=0.01)


def test_the_variance_over_examples_of_one_seed():
    values = numpy.random.default_rng(2).normal(size=(1, 60))
    assert resampled_means(values, seed=3).var() == pytest.approx(values.var() / 60, rel=0.05)


def test_the_same_pair_gives_the_same_interval():
    left, right = numpy.random.default_rng(5).normal(size=(2, 5, 30))
    assert paired_difference(left, right) == paired_difference(left, right)
    turned = paired_difference(right, left)
    assert turned.value == pytest.approx(-paired_difference(left, right).value)

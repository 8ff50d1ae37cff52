"""Top-k: which ones, the relaxation against the paper's formula, and its gradient."""

from __future__ import annotations

import gate_reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_heads.errors import InvalidArgumentError, InvalidTypeError
from sparse_heads.gates.noise import gumbel, uniform_noise
from sparse_heads.gates.top_k import soft_top_k, straight_through_top_k, top_k

pytestmark = pytest.mark.usefixtures("one_thread")
few_examples = settings(max_examples=25, deadline=None)


def noisy_scores(count: int, seed: int = 0) -> Tensor:
    """Importances as they begin, with their noise."""
    return uniform_noise(count, seed, 0) - 0.5 + gumbel(uniform_noise(count, seed, 1))


def recorded_soft_top_k(scores: Tensor, k: int, temperature: float) -> Tensor:
    """The formula with every operation recorded by autograd."""
    remaining, total = scores, torch.zeros_like(scores)
    for _ in range(k):
        probabilities = torch.softmax(remaining / temperature, 0)
        total = total + probabilities
        remaining = remaining + torch.log((1.0 - probabilities).clamp_min(torch.finfo(torch.float64).tiny))
    return total


@given(st.integers(1, 40), st.integers(0, 2**32), st.data())
@few_examples
def test_top_k_takes_exactly_the_k_largest(count: int, seed: int, data: st.DataObject):
    k = data.draw(st.integers(0, count))
    scores = uniform_noise(count, seed, 0)
    chosen = top_k(scores, k)
    assert chosen.dtype == torch.bool and int(chosen.sum()) == k
    if 0 < k < count:
        assert scores[chosen].min() >= scores[~chosen].max()


def test_of_equal_scores_the_lowest_index_comes_first():
    assert top_k(torch.zeros(300), 7).nonzero().flatten().tolist() == list(range(7))
    assert top_k(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("k", [0, 1, 3, 5])
def test_straight_through_is_top_k_forward_and_the_identity_backward(k: int):
    scores = torch.tensor([0.1, 0.7, 0.7, -3.0, 0.7], dtype=torch.float64, requires_grad=True)
    gates = straight_through_top_k(scores, k)
    assert torch.equal(gates, top_k(scores, k).double())
    weights = torch.arange(5, dtype=torch.float64)
    (gates * weights).sum().backward()
    assert torch.equal(scores.grad, weights)


@pytest.mark.parametrize("temperature", [1000.0, 10.0, 1.0, 0.1, 1e-8])
@pytest.mark.parametrize("count, k", [(2, 1), (7, 6), (72, 4), (144, 12), (144, 72), (144, 143)])
def test_the_relaxation_agrees_with_the_formula(count: int, k: int, temperature: float):
    scores = noisy_scores(count, seed=k)
    expected = torch.from_numpy(gate_reference.soft_top_k(scores.numpy(), k, temperature))
    torch.testing.assert_close(soft_top_k(scores, k, temperature), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("exponent", range(-8, 4))
def test_the_relaxation_is_the_formula_operation_for_operation(exponent: int):
    """At near ties the formula multiplies rounding errors by 1 / temperature: only the same operations agree there."""
    scores = 5 * noisy_scores(144)
    expected = recorded_soft_top_k(scores, 143, 10.0**exponent)
    torch.testing.assert_close(soft_top_k(scores, 143, 10.0**exponent), expected, rtol=1e-14, atol=0)


@given(st.integers(1, 30), st.integers(0, 2**32), st.floats(-8, 3), st.data())
@few_examples
def test_the_relaxation_sums_to_k(count: int, seed: int, exponent: float, data: st.DataObject):
    k = data.draw(st.integers(0, count))
    gates = soft_top_k(noisy_scores(count, seed), k, 10.0**exponent)
    assert gates.min() >= 0 and abs(gates.sum().item() - k) < 1e-9


def test_a_cold_relaxation_is_top_k():
    scores = noisy_scores(144)
    assert torch.equal(soft_top_k(scores, 36, 1e-8), top_k(scores, 36).double())


@pytest.mark.parametrize("k", [0, 6])
def test_none_and_all_are_exact_and_have_no_gradient(k: int):
    scores = noisy_scores(6).requires_grad_()
    gates = soft_top_k(scores, k, 0.5)
    assert torch.equal(gates, torch.full((6,), float(k == 6), dtype=torch.float64))
    (gates * noisy_scores(6, seed=1)).sum().backward()
    assert torch.equal(scores.grad, torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 10.0])
@pytest.mark.parametrize("count, k", [(2, 1), (6, 1), (6, 3), (6, 5)])
def test_gradcheck(count: int, k: int, temperature: float):
    scores = noisy_scores(count).requires_grad_()
    assert torch.autograd.gradcheck(lambda scores: soft_top_k(scores, k, temperature), [scores])


@pytest.mark.parametrize("temperature", [1000.0, 10.0, 1.0, 0.5])
@pytest.mark.parametrize("count, k", [(30, 1), (30, 29), (144, 72)])
def test_the_gradient_is_that_of_the_recorded_formula(count: int, k: int, temperature: float):
    ours, theirs = (noisy_scores(count).requires_grad_() for _ in range(2))
    weights = noisy_scores(count, seed=5)
    (soft_top_k(ours, k, temperature) * weights).sum().backward()
    (recorded_soft_top_k(theirs, k, temperature) * weights).sum().backward()
    largest = float(theirs.grad.abs().max())
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9 * largest)


@pytest.mark.parametrize("temperature", [1e-8, 1e-4, 1e-2, 1.0, 1000.0])
@pytest.mark.parametrize("spread", [0.0, 1e-9, 1.0, 50.0, 1e6])
def test_no_temperature_and_no_spread_gives_nan(spread: float, temperature: float):
    scores = (noisy_scores(144) * spread).requires_grad_()
    gates = soft_top_k(scores, 72, temperature)
    (gates * noisy_scores(144, seed=2)).sum().backward()
    assert abs(gates.sum().item() - 72) < 1e-9
    assert gates.isfinite().all() and scores.grad.isfinite().all()


def test_raising_a_score_that_is_certain_changes_nothing():
    """1 - p has one digit left here: p / (1 - p), in which the exact terms cancel, would be off by its whole size."""
    scores = torch.tensor([36.0, 0.0, -36.0], dtype=torch.float64, requires_grad=True)
    soft_top_k(scores, 2, 1.0)[0].backward()
    assert abs(float(scores.grad[0])) < 1e-12


def test_the_guard_of_the_logarithm_has_no_slope():
    """The first choice is certain to the last bit, is lowered by the guard's 708 only, and competes again."""
    ours, theirs = (torch.tensor([750.0, 40.0, 0.0], dtype=torch.float64, requires_grad=True) for _ in range(2))
    soft_top_k(ours, 2, 10.0)[0].backward()
    recorded_soft_top_k(theirs, 2, 10.0)[0].backward()
    assert theirs.grad[0] > 0.02
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_nan_stays_visible():
    scores = noisy_scores(6)
    scores[2] = torch.nan
    assert soft_top_k(scores, 3, 1.0).isnan().any()
    wanted = noisy_scores(6).requires_grad_()
    soft_top_k(wanted, 3, 1.0).backward(torch.full((6,), torch.nan, dtype=torch.float64))
    assert wanted.grad.isnan().all()


def test_float32_scores_are_relaxed_in_float64():
    scores = noisy_scores(20).float().requires_grad_()
    gates = soft_top_k(scores, 5, 1e-3)
    assert gates.dtype == torch.float64
    gates[0].backward()
    assert scores.grad.dtype == torch.float32


def test_unwritten_memory_is_not_used(poisoned_memory: None):
    scores = noisy_scores(30).requires_grad_()
    soft_top_k(scores, 10, 0.7).square().sum().backward()
    assert scores.grad.isfinite().all()


def test_there_is_no_second_derivative():
    scores = noisy_scores(6).requires_grad_()
    (grad,) = torch.autograd.grad(soft_top_k(scores, 2, 1.0).square().sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "scores, k, temperature, error, message",
    [
        ([0.0, 1.0], 1, 1.0, InvalidTypeError, r"scores: wanted a floating-point tensor \[n\], got list"),
        (torch.arange(3), 1, 1.0, InvalidTypeError, "scores: wanted a floating-point tensor .* got a int64 tensor"),
        (torch.zeros(2, 3), 1, 1.0, InvalidArgumentError, r"scores: wanted one dimension \[n\], got a float32 tensor"),
        (torch.zeros(3), -1, 1.0, InvalidArgumentError, "k: wanted at least 0, got int -1"),
        (torch.zeros(3), 4, 1.0, InvalidArgumentError, "k: wanted at most 3, the number of scores, got int 4"),
        (torch.zeros(3), True, 1.0, InvalidTypeError, "k: wanted an int, got bool True"),
        (torch.zeros(3), 1.0, 1.0, InvalidTypeError, "k: wanted an int, got float 1.0"),
        (torch.zeros(3), 1, 0.0, InvalidArgumentError, "temperature: wanted above 0, got float 0.0"),
        (torch.zeros(3), 1, float("nan"), InvalidArgumentError, "temperature: wanted a finite number, got float nan"),
        (torch.zeros(3), 1, "1", InvalidTypeError, "temperature: wanted a number, got str '1'"),
    ],
)
def test_soft_top_k_refuses(scores, k, temperature, error, message):
    with pytest.raises(error, match=message):
        soft_top_k(scores, k, temperature)


def test_top_k_refuses_the_same():
    with pytest.raises(InvalidArgumentError, match="k: wanted at most 3"):
        straight_through_top_k(torch.zeros(3), 4)
    with pytest.raises(InvalidTypeError, match="k: wanted an int"):
        top_k(torch.zeros(3), 2.0)

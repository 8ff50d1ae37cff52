"""Noise and schedules."""

from __future__ import annotations

import pytest
import torch

from sparse_heads.gates.noise import gumbel, uniform_noise
from sparse_heads.gates.schedule import geometric, linear_warmup


def test_noise_never_repeats_over_steps_and_seeds():
    draws = {tuple(uniform_noise(3, seed, step).tolist()) for seed in range(5) for step in range(-1, 20)}
    assert len(draws) == 5 * 21
    many = uniform_noise(100_000, 3, 4)
    assert many.dtype == torch.float64 and 0 < many.min() and many.max() < 1
    assert abs(float(many.mean()) - 0.5) < 0.005
    assert gumbel(torch.tensor([torch.finfo(torch.float64).tiny, 1 - 2**-53], dtype=torch.float64)).isfinite().all()


def test_schedules():
    assert [geometric(step, 3, 1000.0, 1.0) for step in (0, 1, 3, 4)] == pytest.approx([1000, 100, 1, 1])
    assert geometric(0, 3, 1000.0, 1e-8) == 1000.0 and geometric(3, 3, 1000.0, 1e-8) == 1e-8
    assert geometric(0, 0, 1000.0, 1e-8) == 1e-8
    assert [linear_warmup(step, 2, 4) for step in range(8)] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [linear_warmup(step, 1, 0) for step in range(3)] == [0, 1, 1]

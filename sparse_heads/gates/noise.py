"""The noise of gates: a function of (seed, step), drawn on the CPU, so the same on every device and every rank."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def noise_generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator of its own for this seed and step."""
    # Hashed, because with a sum, seed 0 at step 1 would draw what seed 1 draws at step 0.
    digest = hashlib.blake2b(f"{seed},{step}".encode(), digest_size=8).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little"))


def uniform_noise(count: int, seed: int, step: int) -> Tensor:
    """float64 [count] on the CPU, uniform in (0, 1): neither 0 nor 1."""
    uniform = torch.rand(count, dtype=torch.float64, device="cpu", generator=noise_generator(seed, step))
    return uniform.clamp_(min=torch.finfo(torch.float64).tiny)


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform noise: -log(-log(uniform))."""
    return -torch.log(-torch.log(uniform))

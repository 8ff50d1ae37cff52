"""Fresh random inputs of a case, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from .cases import GpuCase


class Inputs:
    """Tensors of a case, drawn from `seed`; heads are strided as projections leave them, [B, T, H, D] in memory."""

    def __init__(self, case: GpuCase, device: torch.device, seed: int) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device, self.dtype = device, case.torch_dtype
        batch, tokens, hidden = case.batch, case.tokens, case.hidden
        learns = case.direction != "forward"
        gate = case.mask.to(device).float()
        if case.gated and (case.level == "attention" or case.masks == "requests"):
            gate = gate.expand(batch, case.heads)
        drawn = 0.5 + torch.rand(gate.shape, generator=self.generator, device=device)
        self.gate = (gate * drawn).requires_grad_(learns) if case.gated else None
        if case.level in ("attention", "out"):
            self.query = self.heads(batch, case.heads, tokens, case.head_dim).requires_grad_(learns)
        if case.level == "attention":
            self.grad = self.heads(batch, case.heads, tokens, case.head_dim)
            self.key, self.value = (
                self.heads(batch, case.kv_heads, tokens, case.head_dim).requires_grad_(learns) for _ in range(2)
            )
        else:
            width, kv_width = case.heads * case.head_dim, case.kv_heads * case.head_dim
            self.x = self.draw(batch, tokens, hidden).requires_grad_(learns)
            self.query_weight = self.weight(width, hidden).requires_grad_(learns)
            self.key_weight, self.value_weight = (
                self.weight(kv_width, hidden).requires_grad_(learns) for _ in range(2)
            )
            self.out_weight = self.weight(hidden, width).requires_grad_(learns)
            self.grad = self.draw(batch, tokens, hidden)
            self.head_grads = tuple(
                self.heads(batch, heads, tokens, case.head_dim) for heads in (case.heads, case.kv_heads, case.kv_heads)
            )

    def draw(self, *sizes: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(sizes, generator=self.generator, device=self.device, dtype=self.dtype)

    def heads(self, batch: int, heads: int, tokens: int, head_dim: int) -> Tensor:
        """[B, H, T, D]."""
        return self.draw(batch, tokens, heads, head_dim).transpose(1, 2)

    def weight(self, rows: int, columns: int) -> Tensor:
        """A weight that keeps the size of its inputs."""
        return self.draw(rows, columns) * columns**-0.5

    def leaves(self, case: GpuCase) -> dict[str, Tensor]:
        """What gradients go to, by name."""
        gate = {"gate": self.gate} if case.gated else {}
        if case.level == "attention":
            return {"query": self.query, "key": self.key, "value": self.value, **gate}
        if case.level == "out":
            return {"heads": self.query, "out_weight": self.out_weight, **gate}
        weights = {"query_weight": self.query_weight, "key_weight": self.key_weight, "value_weight": self.value_weight}
        if case.level == "in":
            return {"x": self.x, **weights}
        return {"x": self.x, **weights, "out_weight": self.out_weight, **gate}

    def grad_of(self, case: GpuCase) -> Tensor:
        """The gradient of the output as the oracle has it."""
        return torch.cat(self.head_grads, 1) if case.level == "in" else self.grad

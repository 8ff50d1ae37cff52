"""What the tests of gates on models share: one configuration a method, models under them, and the dense oracle."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from generation_inputs import gated_copy
from models import build, inputs, loss, output
from torch import Tensor, nn

import sparse_heads as sh

METHODS = ["gumbel", "ste", "hard concrete", "layerwise"]
NOISY = ["gumbel", "hard concrete", "layerwise"]


def config(method: str, **changes: object) -> Any:
    """A configuration whose training gates are neither all alike nor all closed."""
    if method in ("gumbel", "ste"):
        settings = {"k": 5, "estimator": method, "anneal_steps": 30, "start_temperature": 2.0, "end_temperature": 0.2}
        return sh.DSPConfig(**settings | changes)
    if method == "hard concrete":
        return sh.HardConcreteConfig(**{"penalty": 0.01} | changes)
    return sh.LayerwiseConfig(**{"penalty": 0.02, "warmup_steps": 3} | changes)


def gated(
    method: str,
    name: str = "bert",
    dtype: torch.dtype = torch.float64,
    sizes: Mapping[str, int] = MappingProxyType({}),
    **changes: object,
) -> tuple:
    """A model in training mode with gates on, these gates, the same model plain, and a batch of three.

    sizes: changes of the model's configuration; changes: of the gates'.
    """
    plain, model = build(name, dtype=dtype, **sizes).train(), build(name, dtype=dtype, **sizes)
    gates = sh.attach_gates(model, config(method, **changes))
    return model.train(), gates, plain, inputs(model)


def counted_heads(gates: Any) -> Tensor:
    """bool `[L, H]`: the heads that have a gate."""
    layers, kinds = gates.handle.layers, gates.config.kinds
    counted = layers.real_heads()
    for row, layer in enumerate(layers):
        counted[row] &= kinds is None or layer.kind in kinds or (layer.stack, layer.kind) in kinds
    return counted


def spread(gates: Any, values: Tensor) -> Tensor:
    """One value a gate `[n]` as `[L, H]`, 1 where a head has none; differentiable."""
    counted = counted_heads(gates)
    return torch.ones(counted.shape, dtype=values.dtype).masked_scatter(counted, values)


def set_importances(gates: Any, values: Tensor) -> None:
    """Take `values` for what an optimizer step has made of the importances."""
    with torch.no_grad():
        gates.method.importances.copy_(values)
    gates.step()


def dense_oracle(plain: nn.Module, gates: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Output, and the gradient of `loss` by name, of a dense copy whose heads are multiplied by the sampled gates.

    "importances" and "gates" (`[L, H]`) are among the names. Nothing is left in any `.grad`.
    """
    scale = spread(gates, gates.method.sample())
    oracle = gated_copy(plain, gates.handle.layers, scale)
    result = output(oracle, batch)
    leaves = {"importances": gates.method.importances, "gates": scale} | dict(oracle.named_parameters())
    grads = torch.autograd.grad(loss(result), list(leaves.values()), allow_unused=True)
    return result.detach(), dict(zip(leaves, grads, strict=True))


def train(model: nn.Module, gates: Any, batches: list, steps: int, optimizer: Any = None) -> Any:
    """Plain PyTorch as in the contract: the sum of the squared outputs, small enough, plus the penalty."""
    optimizer = optimizer or torch.optim.AdamW(gates.parameter_groups(lr=1e-3, gate_lr=0.3))
    for step in range(steps):
        optimizer.zero_grad()
        value = output(model, batches[step % len(batches)]).square().mean() + gates.penalty()
        value.backward()
        optimizer.step()
        gates.step()
    return optimizer

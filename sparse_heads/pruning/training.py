"""One training loop: a fixed number of optimizer steps, on weights, on gates, or on both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from tqdm.auto import tqdm

from ..errors import NotFiniteError, invalid, invalid_type
from ..layers import whole_number
from .batches import Batch, Loss, loss_of


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    *,
    steps: int,
    loss: Loss | None = None,
    gates: Any = None,
    decay: bool = False,
    seed: int = 0,
    description: str = "training",
) -> list[float]:
    """Exactly `steps` optimizer steps, a batch each; the loss of every step, with the gates' penalty.

    The model is in training mode meanwhile. Dropout draws from a random state that starts from `seed`, and the order
    of batches from another; the global random state, training flags and learning rates are left as found, gradients
    as None.

    Args:
        batches: dicts of the model's arguments. A list (any sequence) is gone through again and again, shuffled anew
            each time; another iterable, such as a `DataLoader`, is read in its own order and again once it has ended.
        loss: `loss(model, batch)` gives a scalar; None takes the model's own.
        gates: their `penalty()` is added to the loss, and `step()` called after each step of the optimizer.
        decay: whether learning rates fall linearly to 0 over the steps.

    Raises:
        ValueError, TypeError: no batches, an iterable that ended and cannot be read again, no scalar loss.
        NotFiniteError: a loss or gradient is NaN or infinite. That step is not made, and the model and gates are as
            after the one before, which the message names.
    """
    steps, seed = whole_number("steps", steps, 0), whole_number("seed", seed, 0)
    stream = _endless(_readable(batches), torch.Generator().manual_seed(seed), steps)
    rates = [group["lr"] for group in optimizer.param_groups]
    training = {module: module.training for module in model.modules()}
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    losses: list[float] = []
    model.train()
    try:
        with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
            torch.manual_seed(seed)
            for step in tqdm(range(steps), desc=description, leave=False, disable=None):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * (1 - step / steps) if decay else rate
                _forget_gradients(model, optimizer)
                value = loss_of(model, next(stream), loss)
                if gates is not None:
                    value = value + gates.penalty()
                where = f"at step {step + 1} of {steps} (weights and gates are as after step {step})"
                if not bool(value.isfinite()):
                    raise NotFiniteError(f"loss: wanted a finite value, got {value.item()} {where}")
                value.backward()
                if not _gradients_are_finite(optimizer):
                    raise NotFiniteError(f"loss: wanted finite gradients, got others {where}")
                optimizer.step()
                if gates is not None:
                    gates.step()
                losses.append(float(value.detach()))
    finally:
        _forget_gradients(model, optimizer)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for module, was_training in training.items():
            module.training = was_training
    return losses


def _readable(batches: Any) -> Iterable[Batch]:
    if not isinstance(batches, Iterable) or isinstance(batches, (Mapping, Tensor, str)):
        raise invalid_type("batches", "an iterable of dicts of tensors", batches)
    if isinstance(batches, Sequence) and not batches:
        raise invalid("batches", "at least one batch", "none")
    return batches


def _endless(batches: Iterable[Batch], generator: torch.Generator, steps: int) -> Iterator[Batch]:
    """Batches without an end."""
    given = 0
    while True:
        before = given
        if isinstance(batches, Sequence):
            epoch: Iterable = (batches[index] for index in torch.randperm(len(batches), generator=generator).tolist())
        else:
            epoch = batches
        for batch in epoch:
            if not isinstance(batch, Mapping):
                raise invalid_type("batches", "dicts of tensors, as the model's forward takes them", batch)
            given += 1
            yield batch
        if given == before:
            wanted = f"{steps}, or a list or DataLoader, which can be read again"
            raise invalid("batches", wanted, f"an iterable that gave {given} and none after that")


def _forget_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model.zero_grad()  # also of parameters that nobody updates


def _gradients_are_finite(optimizer: torch.optim.Optimizer) -> bool:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # a norm of less than the largest entry's dtype could overflow; one of infinite order cannot
    return bool(get_total_norm(gradients, norm_type=math.inf).isfinite()) if gradients else True

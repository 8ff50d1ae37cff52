"""`recover` and `train_gates`: a fixed number of training steps, of the weights under a subset, or of gates."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...errors import SparseHeadsWarning, invalid
from ...layers import whole_number
from ...pruning.training import train
from .attach import attach, get_handle
from .handle import Handle, Subset

if TYPE_CHECKING:
    from .gates import Gates

Loss = Callable[[nn.Module, Mapping[str, Any]], Tensor]


def recover(
    model: nn.Module,
    subset: Subset,
    batches: Iterable[Mapping[str, Any]],
    *,
    steps: int,
    lr: float = 2e-5,
    loss: Loss | None = None,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> list[float]:
    """Train the weights of a model under a subset, which stays set: AdamW, linear decay of `lr` to 0.

    Every parameter that requires a gradient is trained, in training mode. Heads that are off keep their weights bit
    for bit: their gradients are zeros, and weights decay only in matrices that are no projection with a head off.

    Args:
        model: attached already, or one that `attach` takes; it stays attached.
        subset: as `handle.set_heads` takes it.
        batches: dicts of the model's arguments. A list is gone through again and again, shuffled anew each time by
            `seed`; another iterable, such as a `DataLoader`, is read in its own order and again once it has ended.
        steps: of the optimizer, exactly; a batch each.
        loss: `loss(model, batch)` gives a scalar; None takes the model's own (`labels`).
        seed: of the order of batches and of dropout; the global random state is left as found.

    Returns:
        The loss of every step.

    Raises:
        ValueError, TypeError: no batches, an iterable that ended and cannot be read again, no loss, nothing to train.
        NotFiniteError: a loss or gradient is NaN or infinite; the model is as the step before left it.
    """
    handle = get_handle(model) or attach(model)
    handle.set_heads(subset)
    optimizer = torch.optim.AdamW(_groups(handle, lr, weight_decay))
    return train(model, optimizer, batches, steps=steps, loss=loss, decay=True, seed=seed, description="recovery")


def train_gates(
    gates: Gates,
    batches: Iterable[Mapping[str, Any]],
    *,
    steps: int,
    lr: float | None = None,
    gate_lr: float | None = None,
    loss: Loss | None = None,
    seed: int = 0,
) -> list[float]:
    """Train attached gates, and with them the weights where their mode is joint: AdamW at constant learning rates.

    A second call goes on where the first ended, with a new optimizer. `seed` is that of the order of batches and of
    dropout; the gates' noise has that of their configuration. Batches, `loss`, result and errors as for `recover`.

    Args:
        gates: what `attach_gates` gave.
        lr, gate_lr: learning rates of the weights and of the gates, as `gates.parameter_groups` takes them.

    Warns:
        SparseHeadsWarning: the schedule of the gates is longer than the training.
    """
    steps = whole_number("steps", steps, 0)
    if gates.steps_done + steps < gates.method.schedule_steps:
        warnings.warn(gates.unfinished(gates.steps_done + steps), SparseHeadsWarning, stacklevel=2)
    optimizer = torch.optim.AdamW(gates.parameter_groups(lr=lr, gate_lr=gate_lr))
    model = gates.handle.model
    return train(model, optimizer, batches, steps=steps, loss=loss, gates=gates, seed=seed, description="gates")


def _groups(handle: Handle, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    subset = handle.every_head if handle.subset is None else handle.subset
    on = subset.mask if subset.per_request else subset.mask[None]
    spared = {
        parameter
        for row, site in enumerate(handle.sites)
        if not on[:, row, : site.layer.num_heads].all()
        for projection in site.projections.values()
        for parameter in projection.parameters()
    }
    trained = [parameter for parameter in handle.model.parameters() if parameter.requires_grad]
    if not trained:
        raise invalid("model", "a parameter that requires a gradient", "none")
    decayed = [parameter for parameter in trained if parameter.dim() > 1 and parameter not in spared]
    others = [parameter for parameter in trained if parameter.dim() <= 1 or parameter in spared]
    groups = [(decayed, weight_decay), (others, 0.0)]
    return [{"params": each, "lr": lr, "weight_decay": decay} for each, decay in groups if each]

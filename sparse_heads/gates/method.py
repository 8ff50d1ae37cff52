"""What every gate method offers, whatever the model: gates to train with, gates to evaluate with, the final heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import invalid, invalid_type
from .config import GateConfig, fields_that_differ
from .noise import noise_generator, uniform_noise

_STATE = "_extra_state"  # where torch keeps what get_extra_state returns


class GateMethod(nn.Module):
    """n gates, one for each head that may be removed. `config.build(layer_of)` makes them.

    importances: float64 [n], the trained parameter; larger = kept longer. Built on the CPU; they follow `.to(device)`,
    but no cast changes their dtype: half precision would stall them.
    steps_done: training steps that are over; the noise is a function of (seed, steps_done).
    skips_zeros: gates that are exactly 0 have derivative 0, so their heads need not be computed in training.
    schedule_steps: how many steps the method's schedule takes; 0 = it has none.
    """

    skips_zeros = False
    schedule_steps = 0

    def __init__(self, config: GateConfig, importances: Tensor) -> None:
        super().__init__()
        self.config = config
        self.steps_done = 0
        self.importances = nn.Parameter(importances)

    @property
    def temperature(self) -> float | None:
        """Of the next sample; None where the method has none."""
        raise NotImplementedError

    def sample(self) -> Tensor:
        """Training gates, float64 [n], differentiable: the draw of this step, with a graph of its own at every call."""
        raise NotImplementedError

    def keep(self) -> Tensor:
        """The final heads, bool [n], without noise."""
        raise NotImplementedError

    def settled(self) -> Tensor:
        """Evaluation gates, float64 [n], without noise and detached; 0 exactly where `keep` is False."""
        return self.keep().double()

    def penalty(self) -> Tensor:
        """What to add to the loss: a scalar."""
        return self.importances.new_zeros(())

    def rank(self) -> Tensor:
        """What heads are ranked by, float64 [n]: larger = kept longer."""
        return self.importances.detach().clone()

    def advance(self) -> None:
        """One more step is done: the next sample draws anew, and the schedule moves on."""
        self.steps_done += 1

    def is_finite(self) -> bool:
        """Whether every trained value is finite; waits for the device."""
        return all(bool(parameter.isfinite().all()) for parameter in self.parameters())

    def parameter_groups(self, gate_lr: float | None = None) -> list[dict[str, Any]]:
        """For an optimizer: the importances with a learning rate of their own and no weight decay."""
        lr = self.config.gate_lr if gate_lr is None else gate_lr
        return [{"params": [self.importances], "lr": lr, "weight_decay": 0.0}]

    def get_extra_state(self) -> dict[str, Any]:
        return {"config": self.config.to_dict(), "steps_done": self.steps_done}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.steps_done = state["steps_done"]

    def _uniform(self) -> Tensor:
        """This step's uniform noise [n], on the importances' device."""
        drawn = uniform_noise(len(self.importances), self.config.seed, self.steps_done)
        return drawn.to(self.importances.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GateMethod:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Refuse the state of other gates before anything is overwritten."""
        saved = state_dict.get(prefix + "importances")
        if saved is not None and saved.shape != self.importances.shape:
            raise invalid("state_dict", f"the state of {len(self.importances)} gates", saved)
        extra = state_dict.get(prefix + _STATE)
        if not isinstance(extra, dict) or not {"config", "steps_done"} <= extra.keys():
            raise invalid("state_dict", "the state of gates, with config and steps_done", extra)
        if extra["config"] != self.config.to_dict():
            differing = fields_that_differ(self.config.to_dict(), extra["config"])
            raise invalid("state_dict", "gates of the same configuration", differing)
        super()._load_from_state_dict(state_dict, prefix, *others)


def checked_layer_of(layer_of: object) -> Tensor:
    """`layer_of` on the CPU, if it is int64 [n] with n > 0 and no negative row."""
    if not isinstance(layer_of, Tensor) or layer_of.dtype != torch.int64:
        raise invalid_type("layer_of", "an int64 tensor [n]", layer_of)
    if layer_of.dim() != 1 or not len(layer_of) or layer_of.min() < 0:
        raise invalid("layer_of", "one row (0 or above) for each of at least one gate", layer_of)
    return layer_of.cpu()


def xavier_uniform(layer_of: Tensor, seed: int) -> Tensor:
    """float64 [n], uniform in ±sqrt(6 / (L + H)): Xavier's bound for a matrix of L rows with up to H gates each."""
    heads = torch.unique(layer_of, return_counts=True)[1]
    bound = math.sqrt(6.0 / (len(heads) + int(heads.max())))
    drawn = torch.empty(len(layer_of), dtype=torch.float64, device="cpu")
    return drawn.uniform_(-bound, bound, generator=initial_generator(seed))


def initial_generator(seed: int) -> torch.Generator:
    """For the importances' first draw: no training step has the number -1."""
    return noise_generator(seed, -1)

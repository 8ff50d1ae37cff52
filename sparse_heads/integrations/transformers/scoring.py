"""`score_heads`: one call for every scoring method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...errors import invalid, invalid_type
from ...heads import HeadScores
from ...pruning.ablation import ablation
from ...pruning.attention_guided import (
    attention_guided,
    confidence,
    entropy,
    position_mass,
    redundancy,
    sparsity,
    special_mass,
)
from ...pruning.baselines import magnitude, random
from ...pruning.gradients import michel, michel_projected
from .attach import attach, get_handle
from .handle import Handle

METHODS: dict[str, Callable[..., Tensor]] = {
    "michel": michel,
    "michel_projected": michel_projected,
    "ablation": ablation,
    "attention_guided": attention_guided,
    "entropy": entropy,
    "sparsity": sparsity,
    "confidence": confidence,
    "redundancy": redundancy,
    "position_mass": position_mass,
    "special_mass": special_mass,
    "magnitude": magnitude,
    "random": random,
}
_DATA_FREE = ("magnitude", "random")
_TAKES_A_LOSS = ("michel", "ablation")


def score_heads(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]] | None,
    method: str = "michel",
    loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
    **options: Any,
) -> HeadScores:
    """Score every head of a model; larger = keep, for every method.

    The model runs in eval mode with all heads on; its subset, training flags, random state and gradients are left as
    found. A model that is not attached is attached for the time of the call.

    Args:
        model: a model that `attach` takes.
        batches: dicts of keyword arguments for the model's forward; "magnitude" and "random" take None.
        method: "michel" (absolute gradient of the loss with respect to each head's gate, per example; needs labels or
            `loss`), "michel_projected" (the same of random projections of the outputs, label-free), "ablation" (what
            the loss rises by, or without one the outputs change by, with the head off), "magnitude", "random".
            From what heads attend to, label-free: "entropy" (1 minus it), "sparsity", "confidence" (the largest
            probability), "redundancy" (minus the similarity to another head of the layer), "position_mass" (on a
            query's own position and its neighbours), "special_mass" (minus that on special tokens), "attention_guided"
            (the first two and another one, normalised and added up). Their direction is a choice: `sign=-1` turns it.
        loss: for "michel" and "ablation": `loss(model, batch)` gives the mean over the batch's examples, a scalar.
        options: of the method: `projections` and `seed` for "michel_projected", `seed` for "random"; `rescore_every`
            for both Michel methods, the number of heads that leave before the rest are scored again; `rows` for
            "ablation", the examples that run at a time; `special_tokens` and `sign` for all that look at attention,
            also `similarity` for "redundancy", and `weights`, `distribution`, `similarity` and `normalisation` for
            "attention_guided" (`sparse_heads.pruning.attention_guided` describes them).

    Returns:
        HeadScores `[L, H]`, float64. The Michel methods are L2-normalised per layer, or with `rescore_every` the order
        in which heads leave.

    Raises:
        ValueError, TypeError: unknown method or option, no batches, batches that are no dicts of tensors.
    """
    if method not in METHODS:
        raise invalid("method", f"one of {tuple(METHODS)}", method)
    function = METHODS[method]
    known = [name for name in inspect.signature(function).parameters if name not in ("handle", "batches", "loss")]
    for name in options:
        if name not in known:
            raise invalid_type("options", f"those of {method!r}: {', '.join(known) or 'none'}", name)
    if loss is not None:
        if method not in _TAKES_A_LOSS:
            raise invalid("loss", f"None for the method {method!r}, which has no loss", loss)
        options["loss"] = loss
    if method not in _DATA_FREE:
        batches = checked_batches(batches, method)
    with left_as_found(model) as handle:
        return HeadScores(function(handle, batches, **options), handle.layers)


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[Handle]:
    """The handle of a model that is in eval mode inside the `with` block.

    Afterwards training flags and the random state are as found, and a model that was not attached is not.
    """
    handle = get_handle(model)
    temporary = handle is None
    handle = attach(model) if temporary else handle
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)):
            yield handle
    finally:
        for module in training:
            module.training = True
        if temporary:
            handle.detach()


class Progress:
    """Batches that can be read again and again, each time with a bar."""

    def __init__(self, batches: list[Mapping[str, Any]], description: str) -> None:
        self.batches = batches
        self.description = description

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(tqdm(self.batches, desc=self.description, leave=False, disable=None))


def checked_batches(batches: Any, description: str) -> Progress:
    """A list of what `batches` gives, if that is dicts of tensors, at least one."""
    if not isinstance(batches, Iterable) or isinstance(batches, (Mapping, Tensor, str)):
        raise invalid_type("batches", "an iterable of dicts of tensors", batches)
    batches = list(batches)
    if not batches:
        raise invalid("batches", "at least one batch (a generator can be read only once)", "none")
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise invalid_type("batches", "dicts of tensors, as the model's forward takes them", batch)
        if not any(isinstance(value, Tensor) and value.dim() > 1 for value in batch.values()):
            raise invalid("batches", "dicts with tensors [B, T] or larger", f"{sorted(batch)}")
    return Progress(batches, description)

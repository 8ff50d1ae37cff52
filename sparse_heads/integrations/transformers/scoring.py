"""`score_heads`: one call for every scoring method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...errors import invalid, invalid_type
from ...heads import HeadScores
from ...pruning.baselines import magnitude, random
from ...pruning.entropy import entropy
from ...pruning.gradients import michel, michel_projected
from .attach import attach, get_handle

METHODS: dict[str, Callable[..., Tensor]] = {
    "michel": michel,
    "michel_projected": michel_projected,
    "entropy": entropy,
    "magnitude": magnitude,
    "random": random,
}
_DATA_FREE = ("magnitude", "random")


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
            `loss`), "michel_projected" (the same of random projections of the outputs, label-free), "entropy" (1 minus
            the normalised attention entropy), "magnitude", "random".
        loss: for "michel": `loss(model, batch)` gives the mean over the batch's examples, a scalar.
        options: of the method: `projections` and `seed` for "michel_projected", `seed` for "random".

    Returns:
        HeadScores `[L, H]`, float64. The Michel methods are L2-normalised per layer.

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
        if method != "michel":
            raise invalid("loss", f"None for the method {method!r}, which has no loss", loss)
        options["loss"] = loss
    if method not in _DATA_FREE:
        batches = _checked(batches, method)
    handle = get_handle(model)
    temporary = handle is None
    handle = attach(model) if temporary else handle
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)):
            tensor = function(handle, batches, **options)
    finally:
        for module in training:
            module.training = True
        if temporary:
            handle.detach()
    return HeadScores(tensor, handle.layers)


def _checked(batches: Any, method: str) -> Iterator[Mapping[str, Any]]:
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
    return tqdm(batches, desc=method, leave=False, disable=None)

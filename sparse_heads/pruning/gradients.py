"""Michel et al.'s gradient scores (arXiv 1905.10650), with a loss and label-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import invalid, invalid_type
from ..layers import whole_number

FEWEST_PROJECTIONS = 16  # with fewer the ranking is noise


def michel(handle: Any, batches: Iterable[Mapping[str, Any]], loss: Callable | None = None) -> Tensor:
    """Mean over examples of |d loss / d gate| at gates of 1, L2-normalised per layer: float64 `[L, H]`.

    `loss(model, batch)` gives a scalar, the mean over the batch's examples; None takes the model's own (`labels`).
    """

    def gradients(batch: Mapping[str, Any], gates: Tensor) -> Tensor:
        value = getattr(handle.model(**batch), "loss", None) if loss is None else loss(handle.model, batch)
        if value is None:
            raise invalid("batches", "labels, so that the model gives a loss, or loss=", f"keys {sorted(batch)}")
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise invalid_type("loss", "a function that gives a scalar tensor", value)
        if not bool(value.isfinite()):
            raise invalid("loss", "a finite value", f"{value.item()}")
        return torch.autograd.grad(value, gates)[0].abs() * gates.shape[0]

    return _mean_over_examples(handle, batches, gradients)


def michel_projected(
    handle: Any, batches: Iterable[Mapping[str, Any]], *, projections: int = 16, seed: int = 0
) -> Tensor:
    """As `michel`, without labels: |d <R_m, Y> / d gate|, mean over m = 1..projections, per example.

    Y is the last hidden state (or the logits), R_m iid normal on its non-padding tokens, from a generator of its own.
    """
    projections = whole_number("projections", projections, FEWEST_PROJECTIONS)
    generator = torch.Generator().manual_seed(whole_number("seed", seed, 0))

    def gradients(batch: Mapping[str, Any], gates: Tensor) -> Tensor:
        outputs = _outputs(handle.model(**batch))
        mask = batch.get("attention_mask")
        visible = None
        if mask is not None and outputs.dim() == 3 and outputs.shape[:2] == mask.shape:
            visible = mask.to(outputs.device, outputs.dtype).unsqueeze(-1)
        total = torch.zeros_like(gates)
        for index in range(projections):
            direction = torch.randn(outputs.shape, generator=generator, dtype=torch.float32).to(outputs)
            direction = direction if visible is None else direction * visible
            (gradient,) = torch.autograd.grad(outputs, gates, direction, retain_graph=index + 1 < projections)
            total += gradient.abs()
        return total / projections

    return _mean_over_examples(handle, batches, gradients)


def _outputs(output: Any) -> Tensor:
    for name in ("last_hidden_state", "logits"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    raise invalid_type("model", "an output with last_hidden_state or logits", output)


def _mean_over_examples(
    handle: Any, batches: Iterable[Mapping[str, Any]], gradients: Callable[[Mapping[str, Any], Tensor], Tensor]
) -> Tensor:
    """`gradients(batch, gates [B, L, H])` gives `[B, L, H]`; its mean over all examples, L2-normalised per layer."""
    layers = handle.layers
    parameter = next(handle.model.parameters())
    dtype = torch.promote_types(torch.float32, parameter.dtype)
    total = torch.zeros(len(layers), layers.max_heads, dtype=torch.float64)
    examples = 0
    for batch in batches:
        rows = max(value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim() > 1)
        gates = torch.ones(rows, *total.shape, device=parameter.device, dtype=dtype, requires_grad=True)
        with torch.enable_grad(), handle.use_heads(None, scale=gates):
            gradient = gradients(batch, gates)
        total += gradient.detach().double().sum(0).cpu()
        examples += rows
    scores = total / examples
    return scores / scores.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)

"""Michel et al.'s gradient scores (arXiv 1905.10650), with a loss and label-free, at once and head by head."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import invalid
from ..layers import whole_number
from .batches import Batch, Loss, counted_tokens, examples_in, loss_of, outputs_of

FEWEST_PROJECTIONS = 16  # with fewer the ranking is noise


def michel(
    handle: Any, batches: Iterable[Batch], loss: Loss | None = None, *, rescore_every: int | None = None
) -> Tensor:
    """Mean over examples of |d loss / d gate| at gates of 1, L2-normalised per layer: float64 `[L, H]`.

    `loss(model, batch)` gives a scalar, the mean over the batch's examples; None takes the model's own (`labels`). The
    absolute value is each example's, whatever the batches; of a mean over tokens, an example has the share of its
    labelled tokens in those of the batch (times the examples of the batch).

    rescore_every: the iterative method. The lowest heads go, this many at a time, and the rest are scored again
    without them, until none is left; the scores then are the order in which heads go, 0 first, those of one step by
    their scores in it. The top k of a boundary between steps are exactly what the method leaves. (A head alone in its
    layer has 1 once normalised, whatever it does: such heads go by what they had before.)
    """

    def gradients(batch: Batch, gates: Tensor) -> Tensor:
        value = loss_of(handle.model, batch, loss)
        if not bool(value.isfinite()):
            raise invalid("loss", "a finite value", f"{value.item()}")
        return torch.autograd.grad(value, gates)[0].abs() * gates.shape[0]

    return _scores(rescore_every, handle, lambda kept: _mean_over_examples(handle, batches, gradients, kept))


def michel_projected(
    handle: Any,
    batches: Iterable[Batch],
    *,
    projections: int = 16,
    seed: int = 0,
    rescore_every: int | None = None,
) -> Tensor:
    """As `michel`, without labels: |d <R_m, Y> / d gate|, mean over m = 1..projections, per example.

    Y is the last hidden state (or the logits), R_m iid normal on its non-padding tokens, from a generator of its own;
    every scoring of `rescore_every` draws the same.
    """
    projections = whole_number("projections", projections, FEWEST_PROJECTIONS)
    seed = whole_number("seed", seed, 0)

    def score(kept: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)

        def gradients(batch: Batch, gates: Tensor) -> Tensor:
            outputs = outputs_of(handle.model(**batch))
            counted = counted_tokens(handle.model, batch, outputs)
            total = torch.zeros_like(gates)
            for index in range(projections):
                direction = torch.randn(outputs.shape, generator=generator, dtype=torch.float32).to(outputs)
                direction = direction if counted is None else direction * counted.unsqueeze(-1)
                (gradient,) = torch.autograd.grad(outputs, gates, direction, retain_graph=index + 1 < projections)
                total += gradient.abs()
            return total / projections

        return _mean_over_examples(handle, batches, gradients, kept)

    return _scores(rescore_every, handle, score)


def _scores(rescore_every: int | None, handle: Any, score: Callable[[Tensor], Tensor]) -> Tensor:
    """`score` of all heads, normalised, or the order in which heads go; `score(kept)`: bool to float64 `[L, H]`."""
    kept = handle.every_head.mask
    if rescore_every is None:
        return _normalised(score(kept))
    step = whole_number("rescore_every", rescore_every, 1)
    order = torch.zeros(kept.shape, dtype=torch.float64)
    gone = 0
    while left := int(kept.sum()):
        scores = score(kept)
        if scores.isnan().any():
            raise invalid("batches", "outputs that give every head a number", f"NaN after {gone} heads had gone")
        alone = kept.sum(1, keepdim=True) == 1
        normalised = _normalised(scores).masked_fill(alone, 1.0).masked_fill(~kept, -torch.inf)
        # Of equal heads the first is the best, as in `HeadScores.top`.
        best_first = scores.flatten().argsort(descending=True, stable=True)
        best_first = best_first[normalised.flatten()[best_first].argsort(descending=True, stable=True)]
        leaving = best_first[:left].flip(0)[:step]
        order.view(-1)[leaving] = torch.arange(gone, gone + len(leaving), dtype=torch.float64)
        kept.view(-1)[leaving] = False
        gone += len(leaving)
    return order


def _mean_over_examples(
    handle: Any, batches: Iterable[Batch], gradients: Callable[[Batch, Tensor], Tensor], kept: Tensor
) -> Tensor:
    """`gradients(batch, gates [B, L, H])` gives `[B, L, H]`; its mean over all examples.

    kept: bool `[L, H]`, the heads that are on; the others' gradients are 0.
    """
    parameter = next(handle.model.parameters())
    dtype = torch.promote_types(torch.float32, parameter.dtype)
    total = torch.zeros(kept.shape, dtype=torch.float64)
    examples = 0
    for batch in batches:
        rows = examples_in(batch)
        gates = torch.ones(rows, *total.shape, device=parameter.device, dtype=dtype, requires_grad=True)
        with torch.enable_grad(), handle.use_heads(kept, scale=gates):
            gradient = gradients(batch, gates)
        total += gradient.detach().double().sum(0).cpu()
        examples += rows
    if examples == 0:
        raise invalid("batches", "at least one, at every pass (a generator can be read only once)", "none")
    return total / examples


def _normalised(scores: Tensor) -> Tensor:
    """Of each layer with an L2 norm of 1."""
    return scores / scores.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)

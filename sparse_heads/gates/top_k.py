"""Choosing k of n by score: hard, straight-through, and as a differentiable relaxation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import invalid, invalid_type
from ..layers import whole_number
from .config import temperature_above_zero

_TINY = torch.finfo(torch.float64).tiny
# Exact ties at low temperatures have derivatives beyond float64; their squares must not overflow in an optimizer.
_LARGEST_GRADIENT = 1e150


def top_k(scores: Tensor, k: int) -> Tensor:
    """bool [n], True at the `k` largest of scores [n]; of equal ones the lowest index comes first."""
    _check(scores, k)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[torch.sort(scores.detach(), descending=True, stable=True).indices[:k]] = True
    return chosen


def straight_through_top_k(scores: Tensor, k: int) -> Tensor:
    """`top_k` as zeros and ones of the scores' dtype; the gradient passes to the scores unchanged."""
    return top_k(scores, k) + (scores - scores.detach())


def soft_top_k(scores: Tensor, k: int, temperature: float) -> Tensor:
    """Relaxed top-k (Xie & Ermon 2019; Li et al. 2021): float64 [n] that sums to `k`, differentiable once.

    scores: float [n], with their Gumbel noise already added; computed in float64. The sum of `k` softmaxes, each of
    which lowers the scores that it has picked by log(1 - p). At finite temperatures single entries may exceed 1.
    k = 0 gives exact zeros and k = n exact ones, both with gradient zero.
    Raises InvalidArgumentError or InvalidTypeError for scores, k or a temperature that cannot be.
    """
    _check(scores, k)
    return _SoftTopK.apply(scores.double(), k, temperature_above_zero("temperature", temperature))


class _SoftTopK(torch.autograd.Function):
    """Its own backward, because recorded by autograd, operation by operation, a step takes about twice as long."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: int, temperature: float) -> Tensor:
        count = len(scores)
        chosen = scores.new_empty(k if k < count else 0, count)  # [k, n]: one softmax a row
        remaining, scratch, one = scores.clone(), torch.empty_like(scores), scores.new_ones(())
        for probabilities in chosen.unbind():
            torch.div(remaining, temperature, out=scratch)
            torch.softmax(scratch, 0, out=probabilities)
            remaining.add_(torch.sub(one, probabilities, out=scratch).clamp_(min=_TINY).log_())
        ctx.save_for_backward(chosen)
        ctx.temperature = temperature
        return chosen.sum(0) if len(chosen) else torch.full_like(scores, float(k == count))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        """The rounds in reverse: grad becomes keep * grad + spread^T (gather grad) + direct in each.

        With p a round's probabilities and m the largest of them, 1 - p_m may have lost all its digits. So p_m's own
        entry is written without the quotient p_m / (1 - p_m), in which the exact terms cancel.
        """
        (chosen,) = ctx.saved_tensors
        if not len(chosen):
            return torch.zeros_like(grad_output), None, None
        temperature = ctx.temperature
        best = chosen.argmax(1, keepdim=True)
        largest = chosen.gather(1, best)
        is_best = torch.zeros_like(chosen).scatter_(1, best, 1.0)
        others = 1.0 - is_best
        # Where p_m rounds to 1, the guard of the logarithm cuts its derivative off.
        has_slope = largest < 1.0
        odds = others * chosen / (1.0 - others * chosen)
        largest_odds = torch.where(has_slope, largest / (1.0 - largest), 0.0)
        centred = grad_output - grad_output[best]
        direct = chosen * (centred - (chosen * centred).sum(1, keepdim=True)) / temperature
        keep = 1.0 - (odds + is_best * largest * has_slope) / temperature
        gather = torch.stack([odds, is_best], 1)
        spread = torch.stack([chosen, others * chosen * largest_odds], 2) / temperature
        grad = torch.zeros_like(grad_output)
        rounds = zip(direct.unbind(), keep.unbind(), gather.unbind(), spread.unbind(), strict=True)
        for direct_row, keep_row, gather_rows, spread_columns in reversed(list(rounds)):
            gathered = torch.mv(gather_rows, grad)
            grad = torch.addcmul(direct_row, keep_row, grad).addmv_(spread_columns, gathered)
            grad.clamp_(-_LARGEST_GRADIENT, _LARGEST_GRADIENT)
        return grad, None, None


def _check(scores: Tensor, k: int) -> None:
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise invalid_type("scores", "a floating-point tensor [n]", scores)
    if scores.dim() != 1:
        raise invalid("scores", "one dimension [n]", scores)
    if whole_number("k", k, 0) > len(scores):
        raise invalid("k", f"at most {len(scores)}, the number of scores", k)

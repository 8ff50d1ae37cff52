"""Scores from what heads attend to, label-free: entropy, sparsity, distribution, and the three together.

The paper (Attention-Guided Pruning, IJISAE 10(3s), 2022) names these without formulas; the definitions are this
project's. That a focused head matters is a reading, not a fact: heads that do nothing are parked on special tokens, and
are focused too. So every method here has the options

- special_tokens: ids that neither ask nor are seen, what is left adding up to 1 (`handle.record` has the details);
- sign: 1, or -1 to keep the heads that score low.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError, invalid, invalid_type
from .batches import Batch

Batches = Iterable[Batch]
DISTRIBUTIONS = ("confidence", "redundancy", "special_mass")
SIMILARITIES = ("max", "mean")
NORMALISATIONS = ("minmax", "rank")


def entropy(handle: Any, batches: Batches, *, special_tokens: Iterable[int] = (), sign: int = 1) -> Tensor:
    """1 minus the entropy of attention over the log of the keys that it sees: float64 `[L, H]`, in [0, 1].

    Source: Clark et al. 2019, who look at it head by head.
    """
    return _score("entropy", handle, batches, special_tokens, sign)


def sparsity(handle: Any, batches: Batches, *, special_tokens: Iterable[int] = (), sign: int = 1) -> Tensor:
    """Hoyer's sparsity of attention (Hurley and Rickard 2009): float64 `[L, H]`, in [0, 1]."""
    return _score("sparsity", handle, batches, special_tokens, sign)


def confidence(handle: Any, batches: Batches, *, special_tokens: Iterable[int] = (), sign: int = 1) -> Tensor:
    """The largest attention probability (Voita et al. 2019): float64 `[L, H]`, in [0, 1]."""
    return _score("confidence", handle, batches, special_tokens, sign)


def redundancy(
    handle: Any, batches: Batches, *, similarity: str = "max", special_tokens: Iterable[int] = (), sign: int = 1
) -> Tensor:
    """Minus the similarity of attention to other heads of the layer: float64 `[L, H]`, in [-1, 0].

    similarity: to the most similar other head ("max"), or the "mean" over all others. It is 1 - (Jensen-Shannon
        divergence) / log 2, by which Clark et al. 2019 cluster heads. Two equal heads both score low: drop one of them,
        score again, and the other is not redundant any more.
    """
    return _score("redundancy", handle, batches, special_tokens, sign, similarity)


def position_mass(handle: Any, batches: Batches, *, special_tokens: Iterable[int] = (), sign: int = 1) -> Tensor:
    """Attention to the previous, the own and the next position together: float64 `[L, H]`, in [0, 1].

    Source: Clark et al. 2019; Kovaleva et al. 2019 (diagonal heads). Self-attention only.
    """
    return _score("position_mass", handle, batches, special_tokens, sign)


def special_mass(handle: Any, batches: Batches, *, special_tokens: Iterable[int] = (), sign: int = 1) -> Tensor:
    """Minus the attention of other tokens to special ones: float64 `[L, H]`, in [-1, 0]; parked heads score low.

    Source: Clark et al. 2019; Kovaleva et al. 2019 (vertical heads).
    """
    return _score("special_mass", handle, batches, special_tokens, sign)


def attention_guided(
    handle: Any,
    batches: Batches,
    *,
    weights: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3),
    distribution: str = "confidence",
    similarity: str = "max",
    normalisation: str = "minmax",
    special_tokens: Iterable[int] = (),
    sign: int = 1,
) -> Tensor:
    """a * (1 - entropy) + b * sparsity + c * distribution, each normalised over all heads: float64 `[L, H]`.

    weights: a, b and c; of either sign.
    distribution: "confidence", "redundancy" (its negative, by `similarity`) or "special_mass" (its negative).
    normalisation: "minmax", to [0, 1] (all 0 where every head is alike), or "rank", of n heads to 0, 1/(n-1), ..., 1
        with the mean rank for equal ones.
    """
    _check_choice("distribution", distribution, DISTRIBUTIONS)
    _check_choice("normalisation", normalisation, NORMALISATIONS)
    numbers = _checked_weights(weights)
    names = ("entropy", "sparsity", distribution)
    terms = _measure("attention_guided", names, handle, batches, special_tokens, similarity)
    real = handle.layers.real_heads()
    for name, term in zip(names, terms, strict=True):
        if not term[real].isfinite().all():
            row, head = (~term.isfinite() & real).nonzero()[0].tolist()
            raise UnsupportedError(
                f"model: wanted a number as the {name} of every head, got {term[row, head].item()} for head {head} of "
                f"layer {handle.layers[row].name}"
            )
    normalise = _min_max if normalisation == "minmax" else _ranks
    scores = torch.zeros(real.shape, dtype=torch.float64)
    for number, term in zip(numbers, terms, strict=True):
        scores[real] += number * normalise(term[real])
    return _checked_sign(sign) * scores


def _score(
    name: str, handle: Any, batches: Batches, special_tokens: Iterable[int], sign: int, similarity: str = "max"
) -> Tensor:
    sign = _checked_sign(sign)
    return sign * _measure(name, (name,), handle, batches, special_tokens, similarity)[0]


def _measure(
    method: str,
    names: tuple[str, ...],
    handle: Any,
    batches: Batches,
    special_tokens: Iterable[int],
    similarity: str,
) -> list[Tensor]:
    """The statistics of all heads, turned so that more is more focused or more a head's own: float64 `[L, H]` each."""
    _check_choice("similarity", similarity, SIMILARITIES)
    for layer in handle.layers:
        if "position_mass" in names and layer.kind == "cross":
            raise UnsupportedError(
                f"method: 'position_mass' scores self-attention, and layer {layer.name} attends to other positions "
                "than its own (attach with exclude= leaves layers out)"
            )
    with (
        torch.no_grad(),
        handle.use_heads(None),
        handle.record(names, special_tokens=special_tokens) as record,
    ):
        for batch in batches:
            handle.model(**batch)
    for layer, count in zip(handle.layers, record.count.tolist(), strict=True):
        if count == 0:
            raise UnsupportedError(
                f"batches: {method!r} needs a query that sees more than one key (padding and special tokens not "
                f"counted) in layer {layer.name}"
            )
    return [_turned(record, name, similarity) for name in names]


def _turned(record: Any, name: str, similarity: str) -> Tensor:
    if name == "redundancy" and similarity == "mean":
        return -_mean_of_others(record.similarity)
    found = record.statistics[name]
    if name == "entropy":
        return 1 - found
    if name == "position_mass":
        return found.sum(-1)
    return -found if name in ("redundancy", "special_mass") else found


def _mean_of_others(similarity: Tensor) -> Tensor:
    """`[L, H, H]`, NaN for padding heads, to `[L, H]`; 0 for a head that is alone."""
    others = similarity.nansum(-1) - 1
    return others / ((~similarity.isnan()).sum(-1) - 1).clamp_min(1)


def _min_max(values: Tensor) -> Tensor:
    low, high = values.aminmax()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def _ranks(values: Tensor) -> Tensor:
    below = (values[:, None] > values).sum(1).double()
    alike = (values[:, None] == values).sum(1).double() - 1
    return (below + alike / 2) / max(1, len(values) - 1)


def _checked_sign(sign: object) -> int:
    if isinstance(sign, bool) or sign not in (1, -1):
        raise invalid("sign", "1 or -1", sign)
    return int(sign)


def _check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise invalid(argument, f"one of {choices}", value)


def _checked_weights(weights: object) -> tuple[float, ...]:
    wanted = "three finite numbers, not all 0"
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise invalid_type("weights", wanted, weights)
    numbers = tuple(weights)
    if any(isinstance(each, bool) or not isinstance(each, (int, float)) for each in numbers):
        raise invalid_type("weights", wanted, weights)
    if len(numbers) != 3 or not all(map(math.isfinite, numbers)) or not any(numbers):
        raise invalid("weights", wanted, f"{numbers}")
    return numbers

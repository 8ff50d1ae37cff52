"""From scores to budgets: in which order heads, or whole KV groups, are taken."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from .errors import describe, invalid, invalid_type
from .layers import KINDS, LayerInfo, Layers, whole_number


class _Unit(NamedTuple):
    """Neighbouring heads that are taken together: one head, or the heads of a KV group."""

    score: float
    row: int
    first: int
    size: int


def smallest_budgets(
    scores: torch.Tensor,
    layers: Layers,
    *,
    min_per_layer: int,
    kinds: Iterable[str | tuple[str, str]] | None,
    groups: bool,
) -> tuple[torch.Tensor, list[int]]:
    """The smallest budget under which each head is kept, and the budgets that can be met exactly.

    scores: float [L, H] on the CPU without NaN. Returns int64 [L, H], valid under the mask of real heads (0 in layers
    of kinds that were not chosen, which no budget touches), and the reachable budgets in ascending order. Units are
    taken by descending score, equal ones in order of layer, then head; each layer's best `min_per_layer` heads first.
    """
    kinds = _chosen_kinds(kinds, layers)
    chosen = [(row, info) for row, info in enumerate(layers) if not kinds.isdisjoint(_kinds_of(info))]
    units = [unit for row, info in chosen for unit in _units(scores[row], row, info, groups)]
    ranked = sorted(units, key=lambda unit: -unit.score)  # a stable sort: this breaks ties
    missing = _guaranteed(chosen, whole_number("min_per_layer", min_per_layer, 0))
    first, rest = [], []
    for unit in ranked:
        (first if missing[unit.row] > 0 else rest).append(unit)
        missing[unit.row] -= unit.size
    budgets = torch.zeros(scores.shape, dtype=torch.int64, device="cpu")
    totals = [0]
    for unit in first + rest:
        totals.append(totals[-1] + unit.size)
        budgets[unit.row, unit.first : unit.first + unit.size] = totals[-1]
    return budgets, totals[len(first) :]


def check_budget(budget: object, reachable: list[int]) -> int:
    """`budget` as an int; InvalidArgumentError naming the nearest reachable ones where it cannot be met exactly."""
    budget = whole_number("k", budget, 0)
    if budget in reachable:
        return budget
    if not reachable[0] < budget < reachable[-1]:
        wanted = f"{reachable[0]} to {reachable[-1]} heads with these scores and options"
    else:
        below = max(total for total in reachable if total < budget)
        above = min(total for total in reachable if total > budget)
        wanted = f"a number of heads that whole KV groups add up to, the nearest being {below} and {above}"
    raise invalid("k", wanted, budget)


def _chosen_kinds(kinds: Iterable[str | tuple[str, str]] | None, layers: Layers) -> set[str | tuple[str, str]]:
    if kinds is None:
        return set(KINDS)
    wanted = "a list of 'self', 'cross' or (stack, kind) pairs"
    if isinstance(kinds, str) or not isinstance(kinds, Iterable):
        raise invalid_type("kinds", f"{wanted}, or None", describe(kinds))
    kinds = list(kinds)
    for kind in kinds:
        pair = isinstance(kind, tuple) and len(kind) == 2 and isinstance(kind[0], str)
        if (kind[1] if pair else kind) not in KINDS:
            raise invalid("kinds", wanted, kinds)
    if not any(kind in _kinds_of(info) for info in layers for kind in kinds):
        raise invalid("kinds", f"some of {sorted({info.kind for info in layers})}, which the model has", kinds)
    return set(kinds)


def _kinds_of(info: LayerInfo) -> tuple[str, tuple[str, str]]:
    return info.kind, (info.stack, info.kind)


def _units(scores: torch.Tensor, row: int, info: LayerInfo, groups: bool) -> list[_Unit]:
    size = info.group_size if groups else 1
    means = scores[: info.num_heads].double().unflatten(0, (-1, size)).mean(-1).tolist()
    if any(math.isnan(mean) for mean in means):
        raise invalid("groups", "no KV group with scores of both inf and -inf, which have no mean", f"one in row {row}")
    return [_Unit(mean, row, group * size, size) for group, mean in enumerate(means)]


def _guaranteed(chosen: list[tuple[int, LayerInfo]], min_per_layer: int) -> dict[int, int]:
    for _, info in chosen:
        if min_per_layer > info.num_heads:
            raise invalid("min_per_layer", f"at most {info.num_heads}, the heads of layer {info.name!r}", min_per_layer)
    return {row: min_per_layer for row, _ in chosen}

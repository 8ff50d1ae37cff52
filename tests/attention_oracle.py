"""The oracle for statistics of attention: float64 by hand from the probabilities that eager attention returns."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def probabilities(model: nn.Module, batch: dict[str, Tensor]) -> dict[tuple[str, int], Tensor]:
    """{(kind, index): float64 `[B, H, T, S]`} of an eager model."""
    with torch.no_grad():
        output = model(**batch, output_attentions=True)
    cross = getattr(output, "cross_attentions", None) or ()
    named = {("self", index): each for index, each in enumerate(output.attentions)}
    named |= {("cross", index): each for index, each in enumerate(cross)}
    return {key: each.double() for key, each in named.items()}


def visible_keys(batch: dict[str, Tensor], kind: str, causal: bool) -> Tensor:
    """bool `[B, T, S]`."""
    real = batch["attention_mask"].bool()
    keys = batch["encoder_attention_mask"].bool() if kind == "cross" else real
    visible = keys[:, None, :].expand(-1, real.shape[1], -1)
    return visible.tril() if causal and kind == "self" else visible


class ByHand:
    """Means over the counted queries of everything added, of one layer: a head of a row, a query at a time."""

    def __init__(self, heads: int) -> None:
        shapes = {"entropy": (), "sparsity": (), "confidence": (), "position_mass": (3,), "special_mass": ()}
        self.sums = {name: torch.zeros(heads, *shape, dtype=torch.float64) for name, shape in shapes.items()}
        self.similar = torch.zeros(heads, heads, dtype=torch.float64)
        self.weights = torch.zeros(heads, dtype=torch.float64)
        self.special_weights = torch.zeros(heads, dtype=torch.float64)
        self.pairs = torch.zeros(heads, heads, dtype=torch.float64)
        self.count = 0

    def add(self, p: Tensor, visible: Tensor, counted: Tensor, special: Tensor | None = None, on: Tensor | None = None):
        """`p [B, H, T, S]`, `visible [B, T, S]`, `counted [B, T]`, `special [B, S]` keys, `on [B, H]` heads."""
        rows, heads, queries, keys = p.shape
        special = torch.zeros(rows, keys, dtype=torch.bool) if special is None else special
        on = torch.ones(rows, heads, dtype=torch.bool) if on is None else on
        for row, query in counted.nonzero().tolist():
            whole = p[row, :, query]
            if visible[row, query].sum() > 1:
                self.special_weights += on[row]
                self.sums["special_mass"] += whole[:, special[row]].sum(-1) * on[row]
            seen = visible[row, query] & ~special[row]
            n = int(seen.sum())
            if n < 2:
                continue
            self.count += 1
            self.weights += on[row]
            self.pairs += on[row][:, None] & on[row]
            rest = torch.where(seen, whole, 0.0)
            rest = rest / rest.sum(-1, keepdim=True)
            own = query + keys - queries
            for head in on[row].nonzero().flatten().tolist():
                q = rest[head]
                self.sums["entropy"][head] += torch.special.entr(q).sum() / math.log(n)
                self.sums["sparsity"][head] += (math.sqrt(n) - 1 / q.norm()) / (math.sqrt(n) - 1)
                self.sums["confidence"][head] += q.max()
                for offset in (-1, 0, 1):
                    if 0 <= own + offset < keys:
                        self.sums["position_mass"][head, offset + 1] += q[own + offset]
                for other in on[row].nonzero().flatten().tolist():
                    mixture = torch.special.entr((q + rest[other]) / 2).sum()
                    apart = torch.special.entr(torch.stack([q, rest[other]])).sum() / 2
                    self.similar[head, other] += 1 - (mixture - apart) / math.log(2)

    def mean(self, name: str) -> Tensor:
        if name != "redundancy":
            sums = self.sums[name]
            weights = self.special_weights if name == "special_mass" else self.weights
            return sums / weights.view(-1, *[1] * (sums.dim() - 1))
        others = (self.similar / self.pairs).nan_to_num(0.0).fill_diagonal_(0.0)
        return torch.where(self.weights > 0, others.amax(1), math.nan)

    def similarity(self) -> Tensor:
        return self.similar / self.pairs

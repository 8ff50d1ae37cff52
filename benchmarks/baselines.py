"""What the attached model is compared with: ways to run a subset of a BERT attention module's heads.

Every variant takes a `BertAttention` (a copy: it is changed in place) and the kept heads in ascending order, and
returns the module to run in its place. Only projections are exchanged, so all share the model's own Python code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Variant = Callable[[nn.Module, Sequence[int]], nn.Module]


def kept_rows(kept: Sequence[int], head_dim: int) -> Tensor:
    """Rows (or columns) `head * head_dim ... + head_dim` of the kept heads, int64 [len(kept) * head_dim]."""
    return (torch.tensor(kept)[:, None] * head_dim + torch.arange(head_dim)).flatten()


def linear_of(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer that owns copies of `weight` [out, in] and `bias` [out]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


class FusedQuery(nn.Module):
    """Runs q, k and v as one product and leaves k and v for the `StashedOutput` modules that stand in for theirs."""

    def __init__(self, query: nn.Linear, key: nn.Linear, value: nn.Linear, stash: list[Tensor]) -> None:
        super().__init__()
        parts = (query, key, value)
        self.linear = linear_of(torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts]))
        self.stash = stash

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, E] -> the query part [B, T, K*D] of the fused product, a view."""
        query, key, value = self.linear(x).chunk(3, dim=-1)
        self.stash += (value, key)
        return query


class StashedOutput(nn.Module):
    """Hands out what `FusedQuery` left: the key first, then the value."""

    def __init__(self, stash: list[Tensor]) -> None:
        super().__init__()
        self.stash = stash

    def forward(self, x: Tensor) -> Tensor:
        """Return the stashed [B, T, K*D] and forget it."""
        return self.stash.pop()


class SlicedLinear(nn.Module):
    """Copies the kept rows or columns of the dense weight at every call."""

    def __init__(self, linear: nn.Linear, rows: Tensor | None, columns: Tensor | None) -> None:
        super().__init__()
        self.linear, self.rows, self.columns = linear, rows, columns

    def forward(self, x: Tensor) -> Tensor:
        """`x` times the kept part of the weight; [B, T, in] -> [B, T, out]."""
        if self.rows is None:
            return F.linear(x, self.linear.weight.index_select(1, self.columns), self.linear.bias)
        return F.linear(x, self.linear.weight.index_select(0, self.rows), self.linear.bias.index_select(0, self.rows))


class ZeroedInput(nn.Module):
    """Zeroes the masked heads just before the output projection."""

    def __init__(self, linear: nn.Linear, columns: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("keep", torch.zeros(linear.in_features, dtype=linear.weight.dtype))
        self.keep[columns] = 1

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H*D] -> [B, T, E]."""
        return self.linear(x * self.keep)


class MaskedReference(nn.Module):
    """Plain attention over the kept heads one at a time, in the module's dtype: the oracle of the correctness gate."""

    def __init__(self, attention: nn.Module, kept: Sequence[int]) -> None:
        super().__init__()
        self.attention, self.kept = attention, tuple(kept)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: object) -> tuple[Tensor, None]:
        """`hidden_states` [B, T, E]; bool or additive `attention_mask` that broadcasts to [B, 1, T, T]."""
        layer = self.attention.self
        head_dim = layer.attention_head_size
        context = hidden_states.new_zeros(*hidden_states.shape[:-1], layer.all_head_size)
        for head in self.kept:
            rows = slice(head * head_dim, (head + 1) * head_dim)
            query, key, value = (
                F.linear(hidden_states, part.weight[rows], part.bias[rows])
                for part in (layer.query, layer.key, layer.value)
            )
            scores = query @ key.transpose(-1, -2) * head_dim**-0.5
            if attention_mask is not None:
                mask = attention_mask[:, 0]
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            context[..., rows] = scores.softmax(-1) @ value
        return self.attention.output(context, hidden_states), None


class NoAttention(nn.Module):
    """Passes its input on: what the rest of the model costs when attention costs nothing."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        """Return `hidden_states` [B, T, E] unchanged."""
        return hidden_states, None


def dense(attention: nn.Module, kept: Sequence[int]) -> nn.Module:
    """The module as it is; `kept` is not applied."""
    return attention


def dense_fused(attention: nn.Module, kept: Sequence[int]) -> nn.Module:
    """q, k and v in one product; `kept` is not applied."""
    layer, stash = attention.self, []
    layer.query = FusedQuery(layer.query, layer.key, layer.value, stash)
    layer.key, layer.value = StashedOutput(stash), StashedOutput(stash)
    return attention


def mask_only(attention: nn.Module, kept: Sequence[int]) -> nn.Module:
    """Everything is computed, then masked heads are zeroed before the output projection."""
    columns = kept_rows(kept, attention.self.attention_head_size)
    attention.output.dense = ZeroedInput(attention.output.dense, columns)
    return attention


def slice_each_call(attention: nn.Module, kept: Sequence[int]) -> nn.Module:
    """The kept rows and columns are copied out of the dense weights at every call."""
    layer, index = attention.self, kept_rows(kept, attention.self.attention_head_size)
    layer.query, layer.key, layer.value = (
        SlicedLinear(part, index, None) for part in (layer.query, layer.key, layer.value)
    )
    attention.output.dense = SlicedLinear(attention.output.dense, None, index)
    return attention


def repacked(attention: nn.Module, kept: Sequence[int]) -> nn.Module:
    """Physically smaller projections: the limit."""
    layer, index = attention.self, kept_rows(kept, attention.self.attention_head_size)
    layer.query, layer.key, layer.value = (
        linear_of(part.weight[index], part.bias[index]) for part in (layer.query, layer.key, layer.value)
    )
    out = attention.output.dense
    attention.output.dense = linear_of(out.weight[:, index], out.bias)
    return attention


def repacked_fused(attention: nn.Module, kept: Sequence[int]) -> nn.Module:
    """Physically smaller projections with q, k and v in one product."""
    return dense_fused(repacked(attention, kept), kept)


def no_attention(attention: nn.Module, kept: Sequence[int]) -> nn.Module:
    """The ceiling of a whole model."""
    return NoAttention()


DENSE: dict[str, Variant] = {"dense": dense, "dense_fused": dense_fused}
MASKED: dict[str, Variant] = {
    "mask_only": mask_only,
    "slice": slice_each_call,
    "repacked": repacked,
    "repacked_fused": repacked_fused,
}

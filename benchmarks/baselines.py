"""What the attached model is compared with, beside the demo's mask-only and repacked models; and the oracle.

A variant takes a plain model and a subset, and returns a model that shares with it what it does not change. Those that
reach into `encoder.layer` know BERT only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_heads as sh
from sparse_heads.demo.baselines import MultiplyInput, mask_only, projection_paths, repack, sharing_copy

Variant = Callable[[nn.Module, sh.HeadSubset], nn.Module]


class SlicedLinear(nn.Module):
    """Copies the kept rows (dim 0) or columns (dim 1) of the dense weight at every call."""

    def __init__(self, linear: nn.Linear, dim: int, index: Tensor) -> None:
        super().__init__()
        self.linear, self.dim, self.index = linear, dim, index

    def forward(self, x: Tensor) -> Tensor:
        """`x` times the kept part of the weight; [B, T, in] -> [B, T, out]."""
        bias = self.linear.bias.index_select(0, self.index) if self.dim == 0 else self.linear.bias
        return F.linear(x, self.linear.weight.index_select(self.dim, self.index), bias)


class MaskedReference(nn.Module):
    """Plain attention over the kept heads, one at a time, in the module's dtype: the oracle of the correctness gate."""

    def __init__(self, attention: nn.Module, kept: list[int]) -> None:
        super().__init__()
        self.attention, self.kept = attention, kept

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: object) -> tuple[Tensor, None]:
        """`hidden_states` [B, T, E]; `attention_mask` bool (True = attend) that broadcasts to [B, 1, T, T]."""
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
                scores = scores.masked_fill(~attention_mask[:, 0], -torch.inf)
            context[..., rows] = scores.softmax(-1) @ value
        return self.attention.output(context, hidden_states), None


class NoAttention(nn.Module):
    """Passes its input on: what the rest of the model costs when attention costs nothing."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        """Return `hidden_states` [B, T, E] unchanged."""
        return hidden_states, None


def dense(model: nn.Module, subset: sh.HeadSubset) -> nn.Module:
    """The model as it is; `subset` is not applied."""
    return model


def dense_fused(model: nn.Module, subset: sh.HeadSubset) -> nn.Module:
    """q, k and v in one product; `subset` is not applied."""
    return repack(model, sh.HeadSubset(torch.ones_like(subset.mask), subset.layers), fused=True)


def slice_each_call(model: nn.Module, subset: sh.HeadSubset) -> nn.Module:
    """The kept rows and columns are copied out of the dense weights at every call."""
    copied = sharing_copy(model)
    for block, info, mask in zip(copied.encoder.layer, subset.layers, subset.mask, strict=True):
        layer, output = block.attention.self, block.attention.output
        index = mask.repeat_interleave(info.head_dim).nonzero().flatten()
        layer.query, layer.key, layer.value = (
            SlicedLinear(part, 0, index) for part in (layer.query, layer.key, layer.value)
        )
        output.dense = SlicedLinear(output.dense, 1, index)
    return copied


def mask_requests(model: nn.Module, subset: sh.HeadSubset) -> nn.Module:
    """Every head computed, then those that are off in a request zeroed before the output projection."""
    copied = sharing_copy(model)
    masks = subset.mask.unbind(1)
    for layer, paths, mask in zip(subset.layers, projection_paths(model), masks, strict=True):
        output = copied.get_submodule(paths["output"])
        keep = mask.repeat_interleave(layer.v_head_dim, dim=1).unsqueeze(1).to(output.weight)
        output.register_forward_pre_hook(MultiplyInput(keep))
    return copied


def zeroed_columns(model: nn.Module, subset: sh.HeadSubset) -> nn.Module:
    """Every head computed, with zeros for the columns of the output projection that read a head that is off."""
    copied = sharing_copy(model)
    for layer, paths, mask in zip(subset.layers, projection_paths(model), subset.mask, strict=True):
        output = copied.get_submodule(paths["output"])
        keep = mask.repeat_interleave(layer.v_head_dim).to(output.weight)
        output.weight = nn.Parameter(output.weight * keep, requires_grad=False)
    return copied


def masked_reference(model: nn.Module, subset: sh.HeadSubset) -> nn.Module:
    """The oracle, in the dtype of `model`."""
    copied = sharing_copy(model)
    for block, mask in zip(copied.encoder.layer, subset.mask, strict=True):
        block.attention = MaskedReference(block.attention, mask.nonzero().flatten().tolist())
    return copied


def no_attention(model: nn.Module) -> nn.Module:
    """The ceiling of a whole model."""
    copied = sharing_copy(model)
    for block in copied.encoder.layer:
        block.attention = NoAttention()
    return copied


DENSE: dict[str, Variant] = {"dense": dense, "dense_fused": dense_fused}
MASKED: dict[str, Variant] = {
    "mask_only": mask_only,
    "slice": slice_each_call,
    "repacked": partial(repack, fused=False),
    "repacked_fused": partial(repack, fused=True),
}

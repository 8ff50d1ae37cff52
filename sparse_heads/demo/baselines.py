"""What the attached model is compared with: copies of a plain model that mask heads, or that hold only the kept ones.

A copy shares every parameter that it does not change with the model it was made from.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..heads import HeadSubset
from ..integrations.transformers.discovery import find_layers


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares all parameters and buffers."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def projection_paths(model: nn.Module) -> list[dict[str, str]]:
    """Paths of the query, key, value and output projections of every attention layer of a plain model."""
    names = {id(module): name for name, module in model.named_modules()}
    _, found = find_layers(model, None, None, "auto")
    return [{role: names[id(module)] for role, module in projections.items()} for _, projections in found]


def mask_only(model: nn.Module, subset: HeadSubset) -> nn.Module:
    """A copy that computes every head, then zeroes the masked ones before the output projection."""
    copied = sharing_copy(model)
    for layer, paths, mask in zip(subset.layers, projection_paths(model), subset.mask, strict=True):
        output = copied.get_submodule(paths["output"])
        keep = mask[: layer.num_heads].repeat_interleave(layer.v_head_dim).to(output.weight)
        output.register_forward_pre_hook(MultiplyInput(keep))
    return copied


class MultiplyInput:
    """Forward pre-hook that multiplies the module's input [..., H*D] by `keep` [H*D]."""

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep

    def __call__(self, module: nn.Module, arguments: tuple[Tensor]) -> Tensor:
        return arguments[0] * self.keep


def repack(model: nn.Module, subset: HeadSubset, fused: bool) -> nn.Module:
    """A copy whose projections hold only the kept heads; `fused`: q, k and v are one product.

    Raises UnsupportedError for a subset that splits a KV group, and for layers that attend to another input.
    """
    copied = sharing_copy(model)
    for layer, paths, mask in zip(subset.layers, projection_paths(model), subset.mask, strict=True):
        heads = mask[: layer.num_heads]
        groups = heads.unflatten(0, (layer.num_kv_heads, layer.group_size))
        if layer.kind != "self" or not torch.equal(groups.any(-1), groups.all(-1)):
            raise UnsupportedError(f"repack: wanted whole KV groups of a self-attention layer, got {layer.name}")
        kept = {"query": heads, "key": groups.any(-1), "value": groups.any(-1)}
        packed = [kept_rows(copied.get_submodule(paths[role]), kept[role]) for role in kept]
        for role, module in zip(kept, fuse(packed) if fused else packed, strict=True):
            copied.set_submodule(paths[role], module)
        output = copied.get_submodule(paths["output"])
        columns = positions(heads, output.in_features).to(output.weight.device)
        copied.set_submodule(paths["output"], linear(output.weight.index_select(1, columns), output.bias))
    return copied


def positions(mask: Tensor, features: int) -> Tensor:
    """Which of `features` belong to the heads in `mask` [H], int64 [kept * D]."""
    head_dim = features // len(mask)
    return (mask.nonzero() * head_dim + torch.arange(head_dim)).flatten()


def kept_rows(projection: nn.Linear, mask: Tensor) -> nn.Linear:
    """The rows of a projection [H*D, E] that belong to the heads in `mask` [H]."""
    rows = positions(mask, projection.out_features).to(projection.weight.device)
    bias = None if projection.bias is None else projection.bias[rows]
    return linear(projection.weight[rows], bias)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer around `weight` [out, in] and `bias` [out], which nothing trains."""
    module = nn.Linear(1, 1, bias=bias is not None)
    module.out_features, module.in_features = weight.shape
    module.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return module


def fuse(projections: Sequence[nn.Linear]) -> list[nn.Module]:
    """Stand-ins for q, k and v: the first runs all three as one product and leaves k and v to the others."""
    biases = [projection.bias for projection in projections]
    bias = None if biases[0] is None else torch.cat(biases)
    waiting: list[Tensor] = []
    product = linear(torch.cat([projection.weight for projection in projections]), bias)
    sizes = [projection.out_features for projection in projections]
    return [FusedProjection(product, sizes, waiting), WaitingProjection(waiting), WaitingProjection(waiting)]


class FusedProjection(nn.Module):
    """Computes q, k and v, `sizes` wide, from their common input [..., E]; returns q, leaves k and v in `waiting`."""

    def __init__(self, product: nn.Linear, sizes: list[int], waiting: list[Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = product.weight, product.bias
        self.sizes, self.waiting = sizes, waiting

    def forward(self, x: Tensor) -> Tensor:
        query, *self.waiting[:] = F.linear(x, self.weight, self.bias).split(self.sizes, dim=-1)
        return query


class WaitingProjection(nn.Module):
    """Returns what `FusedProjection` left: k to the module that is called first, v to the other."""

    def __init__(self, waiting: list[Tensor]) -> None:
        super().__init__()
        self.waiting = waiting

    def forward(self, x: Tensor) -> Tensor:
        return self.waiting.pop(0)

"""One projection by itself: ours, all heads, the kept rows gathered at every call, and grouped products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import sparse_heads as sh

from .cases import GpuCase
from .inputs import Inputs
from .layers import QKV, oracles_of, split_heads
from .measure import Contender

__all__ = ["contenders_of", "oracles_of"]


def contenders_of(case: GpuCase, inputs: Inputs, mask: Tensor, on_host: bool) -> list[Contender]:
    """What runs in a case; query, key and value heads are compared side by side in the oracle."""
    # On a host "auto" is the C++ extension, which is timed elsewhere.
    ways = in_ways(case, inputs) if case.level == "in" else out_ways(case, inputs)
    every, leaves = torch.ones_like(mask), inputs.leaves(case)
    found = []
    for name, way in ways.items():
        if on_host and name == "ours_auto":
            continue
        heads = every if name in ("dense", "ours_all_on") else mask
        forward, canonical = partial(way, heads), partial(join, case, heads)
        grads = inputs.head_grads if case.level == "in" else (inputs.grad,)
        if case.level == "in" and case.masks == "shared":
            grads = tuple(grad[:, kept] for grad, kept in zip(grads, kept_of(case, heads), strict=True))
        expects = "kept" if heads is mask else "all"
        found.append(Contender(name, forward, case.direction, grads, leaves, expects, canonical=canonical))
    return found


def kept_of(case: GpuCase, mask: Tensor) -> list[Tensor]:
    """The masks [..., H or H_kv] of query, key and value heads."""
    groups = mask.unflatten(-1, (case.kv_heads, case.group)).any(-1)
    return [mask, groups, groups]


def join(case: GpuCase, mask: Tensor, output: object) -> Tensor:
    """What the oracle compares: for "in" the wide query, key and value heads, [B, H + 2 H_kv, T, D]."""
    if case.level == "out":
        return output
    wide = []
    for heads, kept in zip(output, kept_of(case, mask), strict=True):
        if heads.shape[1] != kept.shape[-1]:
            whole = heads.new_zeros(case.batch, kept.shape[-1], *heads.shape[2:])
            whole[:, kept] = heads
            heads = whole
        wide.append(heads)
    return torch.cat(wide, 1)


def in_ways(case: GpuCase, inputs: Inputs) -> dict[str, Callable[[Tensor], tuple[Tensor, ...]]]:
    """Functions of the mask."""
    leaves = inputs.leaves(case)
    x, weights = leaves["x"], tuple(leaves[name] for name in QKV)

    def ours(backend: str, mask: Tensor) -> tuple[Tensor, ...]:
        return sh.in_projection(x, weights, None, mask, head_dim=case.head_dim, backend=backend)

    def dense(mask: Tensor) -> tuple[Tensor, ...]:
        return tuple(split_heads(F.linear(x, weight), case.head_dim) for weight in weights)

    ways = {"ours_triton": partial(ours, "triton"), "ours_auto": partial(ours, "auto")}
    ways |= {"ours_all_on": partial(ours, "triton"), "dense": dense, "gather": partial(ours, "reference")}
    if case.masks == "requests":
        ways["grouped_mm"] = partial(grouped_in, case, x, weights)
    return ways


def out_ways(case: GpuCase, inputs: Inputs) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions of the mask."""
    leaves = inputs.leaves(case)
    heads, weight = leaves["heads"], leaves["out_weight"]

    def ours(backend: str, mask: Tensor) -> Tensor:
        return sh.out_projection(heads, weight, None, mask, gate=leaves.get("gate"), backend=backend)

    def dense(mask: Tensor) -> Tensor:
        return F.linear(heads.transpose(1, 2).flatten(2), weight)

    ways = {name: partial(ours, name.removeprefix("ours_")) for name in ("ours_triton", "ours_auto")}
    ways["gather"] = partial(ours, "reference")
    if not case.gated:
        ways |= {"ours_all_on": partial(ours, "triton"), "dense": dense}
        if case.masks == "requests":
            ways["grouped_mm"] = partial(grouped_out, case, heads, weight)
    return ways


def grouped_mm(left: Tensor, right: Tensor, offs: Tensor) -> Tensor:
    """By the name that this version of torch has for it."""
    return (F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm)(left, right, offs=offs)


def grouped_in(case: GpuCase, x: Tensor, weights: tuple[Tensor, ...], mask: Tensor) -> tuple[Tensor, ...]:
    """A group a request: its kept rows are gathered behind one another, and the heads put back in their places."""
    found = []
    for weight, kept in zip(weights, kept_of(case, mask), strict=True):
        request, head = kept.nonzero(as_tuple=True)
        rows = weight.unflatten(0, (-1, case.head_dim))[head].flatten(0, 1)
        ends = (case.head_dim * kept.sum(1)).cumsum(0).to(torch.int32)
        product = grouped_mm(x, rows.T, offs=ends).unflatten(1, (-1, case.head_dim)).transpose(0, 1)
        wide = x.new_zeros(*kept.shape, case.tokens, case.head_dim)
        found.append(wide.index_put((request, head), product))
    return tuple(found)


def grouped_out(case: GpuCase, heads: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """A group a request: its kept heads and columns are gathered, and the products are not added up across groups."""
    request, head = mask.nonzero(as_tuple=True)
    rows = heads[request, head].transpose(0, 1).flatten(1)
    columns = weight.T.unflatten(0, (-1, case.head_dim))[head].flatten(0, 1)
    ends = (case.head_dim * mask.sum(1)).cumsum(0).to(torch.int32)
    return grouped_mm(rows, columns, offs=ends)

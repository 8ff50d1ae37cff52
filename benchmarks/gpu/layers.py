"""The attention block: dense with separate and fused projections, with the mask multiplied in, repacked, and ours."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from . import attention, dense, ours
from .cases import GpuCase
from .inputs import Inputs
from .measure import Contender, Oracle
from .oracles import LayerOracle
from .work import compact

QKV = ("query_weight", "key_weight", "value_weight")


def oracles_of(case: GpuCase, inputs: Inputs, mask: Tensor) -> dict[str, Oracle]:
    """The oracles by the name that a contender `expects`; all heads are those of the dense layer, without gates."""
    every = LayerOracle(replace(case, gated=False), inputs, torch.ones_like(mask))
    return {"kept": LayerOracle(case, inputs, mask), "all": every}


def contenders_of(case: GpuCase, inputs: Inputs, mask: Tensor, on_host: bool) -> list[Contender]:
    """What runs in a case. A gated step finds its mask from the gates where some are 0."""
    leaves, whole = inputs.leaves(case), case.density == 1
    make = partial(Contender, direction=case.direction, grads=(inputs.grad,))
    ungated = {name: tensor for name, tensor in leaves.items() if name != "gate"}
    found = []
    for backend in ("math",) if on_host else dense.PINNED:
        settings = partial(dense.pinned, backend)
        pin = partial(make, settings=settings)
        fused = fuse(ungated)
        found += [
            pin(f"dense_{backend}", partial(separate_block, case, ungated, None), leaves=ungated, expects="all"),
            pin(f"fused_{backend}", partial(fused_block, case, fused, None), leaves=fused, expects="all"),
        ]
        if not whole or inputs.gate is not None:
            multiplied = None if whole else mask
            forward = partial(separate_block, case, leaves, multiplied)
            found.append(pin(f"masked_{backend}", forward, leaves=leaves))
        if not whole and case.masks == "shared":
            small, parts = repacked(case, leaves, mask)
            fused = fuse(parts)
            found += [
                pin(f"repacked_{backend}", partial(separate_block, small, parts, None), leaves=rename(parts)),
                pin(f"repacked_fused_{backend}", partial(fused_block, small, fused, None), leaves=rename(fused)),
            ]
        if case.masks == "requests":
            found.append(attention.ceiling(replace(case, level="attention"), inputs, backend))
    if case.masks == "requests":
        found += [part_in(case, inputs), part_out(case, inputs)]
        every = partial(ours.block, ungated, torch.ones_like(mask), case.head_dim, "triton", "triton")
        found.append(make("ours_all_on", every, leaves=ungated, expects="all"))
    return found + our_contenders(case, inputs, mask, on_host)


def our_contenders(case: GpuCase, inputs: Inputs, mask: Tensor, on_host: bool) -> list[Contender]:
    """As the library chooses, with our kernels throughout, and compact ones with dense attention in between."""
    leaves = inputs.leaves(case)
    ways = {"ours_triton": ("triton", "triton")} | ({} if on_host else {"ours_auto": ("auto", "auto")})
    if case.masks == "shared":
        ways |= {"ours_compact": ("triton", "sdpa"), "ours_gather": ("reference", "sdpa")}
    found = []
    for name, (projections, kernel) in ways.items():
        forward = partial(our_block, case, leaves, mask, projections, kernel)
        found.append(Contender(name, forward, case.direction, (inputs.grad,), leaves))
        if kernel == "sdpa" and not on_host:
            pinned = partial(dense.pinned, "cudnn")
            found.append(Contender(f"cudnn_{name}", forward, case.direction, (inputs.grad,), leaves, settings=pinned))
    return found


def our_block(case: GpuCase, leaves: dict[str, Tensor], mask: Tensor, projections: str, kernel: str) -> Tensor:
    """Hard-zero gates are skipped as such training does it: by a mask that is made in the call."""
    given = None if case.density == 1 and case.masks == "shared" else mask
    if case.gated and case.density < 1:
        given = leaves["gate"].detach() != 0
    return ours.block(leaves, given, case.head_dim, projections, kernel)


def split_heads(rows: Tensor, head_dim: int) -> Tensor:
    """[B, T, H * D] to [B, H, T, D]."""
    return rows.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def finish(heads: Tensor, leaves: dict[str, Tensor], mask: Tensor | None) -> Tensor:
    """The factors and the output projection."""
    heads = dense.times(heads, mask, leaves.get("gate"))
    return F.linear(heads.transpose(1, 2).flatten(2), leaves["out_weight"])


def separate_block(case: GpuCase, leaves: dict[str, Tensor], mask: Tensor | None) -> Tensor:
    """Three projections."""
    heads = (split_heads(F.linear(leaves["x"], leaves[name]), case.head_dim) for name in QKV)
    return finish(dense.attend(*heads), leaves, mask)


def fused_block(case: GpuCase, leaves: dict[str, Tensor], mask: Tensor | None) -> Tensor:
    """One projection of query, key and value."""
    rows = F.linear(leaves["x"], leaves["qkv_weight"])
    sizes = [case.head_dim * heads for heads in (case.heads, case.kv_heads, case.kv_heads)]
    heads = (split_heads(part, case.head_dim) for part in rows.split(sizes, -1))
    return finish(dense.attend(*heads), leaves, mask)


def own(tensor: Tensor) -> Tensor:
    """A leaf of its own."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def fuse(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The leaves with one weight for query, key and value."""
    weight = torch.cat([leaves[name].detach() for name in QKV]).requires_grad_(leaves["x"].requires_grad)
    return {"qkv_weight": weight} | {name: tensor for name, tensor in leaves.items() if name not in QKV}


def rename(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under names that the oracle does not know, but for x: its weights are those of all heads."""
    return {name if name == "x" else f"kept_{name}": tensor for name, tensor in leaves.items()}


def repacked(case: GpuCase, leaves: dict[str, Tensor], mask: Tensor) -> tuple[GpuCase, dict[str, Tensor]]:
    """The physically smaller layer of the heads in the mask [H]."""
    groups = mask.unflatten(0, (case.kv_heads, case.group)).any(-1)
    rows, kv_rows = (one.repeat_interleave(case.head_dim) for one in (mask, groups))
    parts = {"x": leaves["x"], "query_weight": own(leaves["query_weight"][rows])}
    parts |= {name: own(leaves[name][kv_rows]) for name in QKV[1:]}
    parts["out_weight"] = own(leaves["out_weight"][:, rows])
    if "gate" in leaves:
        parts["gate"] = own(leaves["gate"][mask])
    return replace(case, heads=int(mask.sum()), kv_heads=int(groups.sum()), width=case.hidden), parts


def part_in(case: GpuCase, inputs: Inputs) -> Contender:
    """One product for query, key and value at the compact shape: a ceiling."""
    small = compact(case)
    weight = inputs.weight((small.heads + 2 * small.kv_heads) * case.head_dim, case.hidden)
    return Contender("part_in", partial(F.linear, inputs.x, weight), "forward", expects=None)


def part_out(case: GpuCase, inputs: Inputs) -> Contender:
    """The output projection at the compact shape: a ceiling."""
    columns = compact(case).heads * case.head_dim
    x, weight = inputs.draw(case.batch, case.tokens, columns), inputs.weight(case.hidden, columns)
    return Contender("part_out", partial(F.linear, x, weight), "forward", expects=None)

"""The attention block with a subset for every request, against dense blocks and every request by itself."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

import sparse_heads as sh
from sparse_heads.demo.baselines import repack

from . import baselines
from .candidates import attached_candidates, run_block
from .cases import NUM_HEADS, Heads, RequestsCase
from .gate import Oracle
from .models import mask_of, other_heads, own_attention, random_bert
from .timing import Candidate


def subset_of(kept: list[Heads], layers: sh.Layers) -> sh.HeadSubset:
    """The subset in which request i keeps the heads `kept[i]` of the only layer."""
    return sh.HeadSubset(mask_of(kept).unsqueeze(1), layers)


def run_each(blocks: list[nn.Module], hidden_states: Tensor) -> list[Tensor]:
    """Request i of `hidden_states` [B, T, E] by itself through `blocks[i]`; [1, T, E] each."""
    return [
        run_block(block, {"hidden_states": request})
        for block, request in zip(blocks, hidden_states.split(1), strict=True)
    ]


def masked_references(model: nn.Module, subset: sh.HeadSubset) -> list[nn.Module]:
    """The oracle of every request."""
    return [baselines.masked_reference(model, subset.row(request)) for request in range(len(subset.mask))]


def oracle_of(model: nn.Module, subset: sh.HeadSubset, hidden_states: Tensor) -> Oracle:
    """Every request's masked reference, in float64 and in float32."""
    exact = run_each(masked_references(copy.deepcopy(model).double(), subset), hidden_states.double())
    return Oracle(torch.cat(exact), torch.cat(run_each(masked_references(model, subset), hidden_states)))


def repacked_blocks(model: nn.Module, kept: tuple[Heads, ...], subset: sh.HeadSubset, fused: bool) -> list[nn.Module]:
    """Every request's own physically smaller block; requests with equal heads share one."""
    blocks = {heads: repack(model, subset.row(request), fused) for request, heads in enumerate(kept)}
    return [blocks[heads] for heads in kept]


def candidates_of(case: RequestsCase) -> tuple[list[Candidate], dict[str, Oracle]]:
    """What is timed in a case, and the oracles by the name that a candidate `expects`."""
    model, generator = random_bert(case.hidden, 1), torch.Generator().manual_seed(case.tokens)
    inputs = {"hidden_states": torch.randn(case.batch, case.tokens, case.hidden, generator=generator)}
    attached = own_attention(model)
    handle = sh.attach(attached)
    subset = subset_of(case.kept, handle.layers)
    every = subset_of([range(NUM_HEADS)] * case.batch, handle.layers)
    oracles = {name: oracle_of(model, one, **inputs) for name, one in (("all heads", every), ("kept heads", subset))}
    others = subset_of([other_heads(heads) for heads in case.kept], handle.layers)
    found = attached_candidates(handle, partial(run_block, attached, inputs), subset, others)
    kept_models = {
        "mask_only": baselines.mask_requests(own_attention(model), subset),
        "reference": attached_copy(model, subset, backend="reference"),
    }
    if len(set(case.kept)) == 1:
        kept_models["ours_shared"] = attached_copy(model, subset.row(0))
    dense_models = {name: variant(own_attention(model), subset.row(0)) for name, variant in baselines.DENSE.items()}
    for expects, models in (("all heads", dense_models), ("kept heads", kept_models)):
        for name, each in models.items():
            found.append(Candidate(name, partial(run_block, each, inputs), expects=expects))
    for name, fused in (("alone", False), ("alone_fused", True)):
        call = partial(run_each, repacked_blocks(model, case.kept, subset, fused), **inputs)
        found.append(Candidate(name, call, expects="kept heads"))
    return found, oracles


def attached_copy(model: nn.Module, subset: sh.HeadSubset, backend: str = "auto") -> nn.Module:
    """A copy that is attached and runs `subset`."""
    copied = own_attention(model)
    sh.attach(copied, backend=backend).set_heads(subset)
    return copied

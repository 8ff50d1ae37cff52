"""`sparse_heads.attention` by itself with grouped queries, against itself with all heads on and PyTorch's SDPA."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import sparse_heads as sh
from sparse_heads.testing import random_attention_inputs

from .cases import GqaCase
from .gate import Oracle
from .models import mask_of
from .timing import Candidate

Inputs = tuple[Tensor, Tensor, Tensor]  # query [B, H, T, D], key and value [B, H_kv, T, D]


def causal_reference(inputs: Inputs, mask: Tensor) -> Tensor:
    """Causal attention of the heads in `mask` [B, H], one at a time; zeros for the others."""
    query, key, value = inputs
    group, tokens = query.shape[1] // key.shape[1], query.shape[2]
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    out = torch.zeros_like(query)
    for request, head in mask.nonzero().tolist():
        scores = query[request, head] @ key[request, head // group].T * query.shape[-1] ** -0.5
        out[request, head] = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value[request, head // group]
    return out


def oracles_of(inputs: Inputs, mask: Tensor) -> dict[str, Oracle]:
    """References with all heads, with zeros for those that are off, and of those that are on only [kept, T, D]."""
    exact = causal_reference(tuple(each.double() for each in inputs), torch.ones_like(mask))
    eager = causal_reference(inputs, torch.ones_like(mask))
    keep = mask[..., None, None]
    return {
        "all heads": Oracle(exact, eager),
        "kept heads": Oracle(exact * keep, eager * keep),
        "kept rows": Oracle(exact[mask], eager[mask]),
    }


def sdpa_repeated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """SDPA on keys and values that are repeated for every query head of their group first, as transformers does."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def gather(inputs: Inputs, mask: Tensor) -> list[Inputs]:
    """For each request its kept heads' queries and, repeated for these, keys and values: [1, kept, T, D] each."""
    query, key, value = inputs
    group = query.shape[1] // key.shape[1]
    kept = [row.nonzero().flatten() for row in mask]
    return [
        (query[i : i + 1, heads], key[i : i + 1, heads // group], value[i : i + 1, heads // group])
        for i, heads in enumerate(kept)
    ]


def run_each(gathered: list[Inputs]) -> list[Tensor]:
    """SDPA on each request by itself; [kept, T, D] each."""
    return [F.scaled_dot_product_attention(*each, is_causal=True)[0] for each in gathered]


def candidates_of(case: GqaCase) -> tuple[list[Candidate], dict[str, Oracle]]:
    """What is timed in a case, and the oracles by the name that a candidate `expects`."""
    leaves = random_attention_inputs(
        case.batch, case.num_heads, case.kv_heads, case.tokens, case.tokens, case.head_dim, seed=case.tokens
    )
    inputs = tuple(each.detach() for each in leaves)
    mask = mask_of(case.kept, case.num_heads)
    ours, gathered = partial(sh.attention, *inputs, is_causal=True), gather(inputs, mask)
    found = [
        Candidate("ours", partial(ours, mask), expects="kept heads"),
        Candidate("all_on", partial(ours, torch.ones_like(mask)), expects="all heads"),
        Candidate("no_mask", ours, expects="all heads"),
        Candidate(
            "sdpa_gqa",
            partial(F.scaled_dot_product_attention, *inputs, is_causal=True, enable_gqa=True),
            expects="all heads",
        ),
        Candidate("sdpa_repeated", partial(sdpa_repeated, *inputs), expects="all heads"),
        Candidate("sliced", lambda: run_each(gather(inputs, mask)), expects="kept rows"),
        Candidate("alone", partial(run_each, gathered), expects="kept rows"),
    ]
    return found, oracles_of(inputs, mask)

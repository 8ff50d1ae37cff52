"""`sparse_heads.attention_decode` by itself, against itself with all heads on, PyTorch's SDPA and a plain read."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import sparse_heads as sh

from .cases import DecodeCase
from .gate import Oracle
from .models import mask_of
from .timing import Candidate

Inputs = tuple[Tensor, Tensor, Tensor]  # query [B, H, 1, D], key and value cache [B, H_kv, S, D]


def inputs_of(case: DecodeCase) -> Inputs:
    """Normal numbers, seeded."""
    generator = torch.Generator().manual_seed(case.tokens)
    dtype, size = getattr(torch, case.dtype), case.head_dim

    def draw(heads: int, length: int) -> Tensor:
        return torch.randn(case.batch, heads, length, size, generator=generator).to(dtype)

    return draw(case.num_heads, 1), draw(case.kv_heads, case.tokens), draw(case.kv_heads, case.tokens)


def in_pages(cache: Tensor, page_size: int, table: Tensor) -> Tensor:
    """[pages, page_size, H_kv, D], the pages of request i in the places table[i]."""
    pages = cache.transpose(1, 2).unflatten(1, (-1, page_size))
    out = pages.new_empty(table.numel(), *pages.shape[2:])
    out[table.flatten().long()] = pages.flatten(0, 1)
    return out


def decode_reference(inputs: Inputs, lengths: tuple[int, ...], mask: Tensor) -> Tensor:
    """Attention of the heads in `mask` [B, H], one at a time; zeros for the others."""
    query, key, value = inputs
    group = query.shape[1] // key.shape[1]
    out = torch.zeros_like(query)
    for request, head in mask.nonzero().tolist():
        rows = slice(0, lengths[request])
        keys, values = key[request, head // group, rows], value[request, head // group, rows]
        scores = query[request, head] @ keys.T * query.shape[-1] ** -0.5
        out[request, head] = scores.softmax(-1) @ values
    return out


def oracles_of(case: DecodeCase, inputs: Inputs, mask: Tensor) -> dict[str, Oracle]:
    """References with all heads, and with zeros for those that are off."""
    every = torch.ones_like(mask)
    exact = decode_reference(tuple(each.double() for each in inputs), case.lengths, every)
    eager = decode_reference(inputs, case.lengths, every)
    keep = mask[..., None, None]
    return {"all heads": Oracle(exact, eager), "kept heads": Oracle(exact * keep, eager * keep)}


def candidates_of(case: DecodeCase) -> tuple[list[Candidate], dict[str, Oracle]]:
    """What is timed in a case, and the oracles by the name that a candidate `expects`."""
    inputs, mask = inputs_of(case), mask_of(case.kept, case.num_heads)
    query, key, value = inputs
    lengths = torch.tensor(case.lengths)
    visible = None
    if len(set(case.lengths)) > 1:
        visible = (torch.arange(case.tokens) < lengths[:, None])[:, None, None]
    sdpa = partial(
        F.scaled_dot_product_attention, query, key, value, visible, enable_gqa=case.kv_heads < case.num_heads
    )
    ours = partial(sh.attention_decode, query, key, value, lengths)
    if case.page_size:
        count = case.batch * case.tokens // case.page_size
        table = torch.randperm(count, generator=torch.Generator().manual_seed(0)).int().view(case.batch, -1)
        pages = (in_pages(cache, case.page_size, table) for cache in (key, value))
        ours = partial(sh.attention_decode, query, *pages, lengths, block_table=table)
    # As many bytes as all heads need, in one piece.
    buffer = torch.ones(case.all_bytes // 4)
    found = [
        Candidate("ours", partial(ours, mask), expects="kept heads"),
        Candidate("all_on", partial(ours, torch.ones_like(mask)), expects="all heads"),
        Candidate("no_mask", ours, expects="all heads"),
        Candidate("sdpa", sdpa, expects="all heads"),
        Candidate("read", buffer.sum),
    ]
    return found, oracles_of(case, inputs, mask)

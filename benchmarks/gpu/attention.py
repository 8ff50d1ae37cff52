"""The attention operator by itself: ours, PyTorch's kernels with the mask multiplied in, FlexAttention, sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import dense, flex, ours, pseudo_sequences
from .cases import GpuCase
from .inputs import Inputs
from .measure import Contender, Oracle
from .oracles import AttentionOracle
from .work import compact


def oracles_of(case: GpuCase, inputs: Inputs, mask: Tensor) -> dict[str, Oracle]:
    """The oracles by the name that a contender `expects`."""
    found = {"kept": AttentionOracle(case, inputs, mask)}
    if case.density < 1:
        found["all"] = AttentionOracle(case, inputs, torch.ones_like(mask))
    return found


def contenders_of(case: GpuCase, inputs: Inputs, mask: Tensor, on_host: bool) -> list[Contender]:
    """What runs in a case. Masks that keep all heads are given per request, and left out when shared."""
    gate, leaves = inputs.gate, inputs.leaves(case)
    qkv = (inputs.query, inputs.key, inputs.value)
    make = partial(Contender, direction=case.direction, grads=(inputs.grad,), leaves=leaves)
    whole = case.density == 1
    given = None if whole and case.masks == "shared" else mask
    by_request = mask.expand(case.batch, case.heads)
    multiplied = None if whole else mask
    found = [make("ours_triton", partial(ours.attend, *qkv, given, gate))]
    if not on_host:
        found.append(make("ours_auto", partial(ours.attend, *qkv, given, gate, "auto")))
    if case.masks == "shared":
        found.append(make("ours_compact", partial(ours.attend, *qkv, given, gate, "sdpa")))
    if not whole and gate is None:
        every = torch.ones_like(mask) if case.masks == "requests" else None
        found.append(make("ours_all_on", partial(ours.attend, *qkv, every), expects="all"))

    for name in ("math",) if on_host else dense.PINNED:
        forward = partial(times_after, partial(dense.attend, *qkv), multiplied, gate)
        found.append(make(f"{name}_masked", forward, settings=partial(dense.pinned, name)))
        if name == "flash" and case.direction == "backward":
            settings = partial(dense.pinned, name, deterministic=True)
            found.append(make("flash_deterministic", forward, settings=settings))
        if not whole:
            found.append(ceiling(case, inputs, name))
    if case.masks == "requests":
        blocks = partial(flex.blocks_of_heads, by_request, case.tokens)
        found.append(make("flex_counts", partial(flex_forward, qkv, blocks, gate)))
        blocks = partial(flex.own_blocks, flex.causal_in_heads(by_request), by_request, case.tokens)
        found.append(make("flex_own_mask", partial(flex_forward, qkv, blocks, gate)))
        sequences = partial(pseudo_sequences.attend, *qkv, by_request)
        found.append(make("pseudo_sequences", partial(times_after, sequences, None, gate)))
    return found


def times_after(attend: Callable[[], Tensor], mask: Tensor | None, gate: Tensor | None) -> Tensor:
    """`attend` with the factors multiplied in."""
    return dense.times(attend(), mask, gate)


def flex_forward(qkv: tuple[Tensor, ...], blocks: Callable[[], object], gate: Tensor | None) -> Tensor:
    """FlexAttention on blocks that are made in the call."""
    return dense.times(flex.attend(*qkv, blocks()), None, gate)


def ceiling(case: GpuCase, inputs: Inputs, backend: str) -> Contender:
    """The dense kernel at the compact shape; it computes other heads than the case and is not compared."""
    small = compact(case)
    shape = (small.batch, small.heads, small.tokens, small.head_dim)
    kv_shape = (small.batch, small.kv_heads, *shape[2:])
    learns = case.direction != "forward"
    qkv = tuple(inputs.heads(*sizes).requires_grad_(learns) for sizes in (shape, kv_shape, kv_shape))
    return Contender(
        f"part_attention_{backend}",
        partial(dense.attend, *qkv),
        case.direction,
        grads=(inputs.heads(*shape),),
        leaves=dict(zip(("query", "key", "value"), qkv, strict=True)),
        expects=None,
        settings=partial(dense.pinned, backend),
    )

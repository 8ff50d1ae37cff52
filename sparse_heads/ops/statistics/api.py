"""The public operator: checks its arguments, chooses the implementation, runs it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import _native
from ..._attention_arguments import visible_span, without_autocast
from ...errors import BackendUnavailableError, warn_of_reference
from .cpu import statistics_cpu
from .reference import statistics_reference
from .validation import check_arguments, check_backend, check_key_groups


class AttentionStatistics(NamedTuple):
    """Means over a request's counted queries, float64: NaN for masked heads and where no query counts."""

    entropy: Tensor  # [B, H], over the log of the visible keys: 0 one key, 1 all alike
    sparsity: Tensor  # [B, H], Hoyer's: 1 one key, 0 all alike
    confidence: Tensor  # [B, H], the largest probability
    count: Tensor  # int64 [B], the counted queries
    position_mass: Tensor  # [B, H, 3], the probability of the previous, the own and the next position
    group_mass: Tensor | None  # [B, H, G], the probability of each group of keys; None without key_groups


def attention_statistics(
    query: Tensor,
    key: Tensor,
    head_mask: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | tuple[int, int] | None = None,
    query_mask: Tensor | None = None,
    key_groups: Tensor | None = None,
    num_groups: int | None = None,
    backend: str = "auto",
) -> AttentionStatistics:
    """How focused each head's attention is and where it goes, without storing the [T, S] probabilities.

    Equivalent to the following, with `probabilities` those of `attention`, a bool `visible` [B, H, T, S] of the keys
    that every query sees, and means over the counted queries::

        n = visible.sum(-1)
        counted = (n > 1) & query_mask[:, None] & head_mask[..., None]
        entropy = -(probabilities * probabilities.log()).nansum(-1) / n.log()
        sparsity = (n.sqrt() - 1 / probabilities.norm(dim=-1)) / (n.sqrt() - 1)
        confidence = probabilities.amax(-1)
        group_mass = probabilities @ one_hot(key_groups)[:, None]

    Where attn_mask is floating, a masked score at or below half of torch.finfo(attn_mask.dtype).min is hidden as -inf
    hides it: the masks of transformers' eager attention hold that minimum.

    Args:
        query, key, head_mask, attn_mask, is_causal, scale, softcap, window: as of `attention`.
        query_mask: bool [B, T], True = the query counts, as padding should not. Queries that see one key or none never
            count. None: all others do.
        key_groups: int32 or int64 [B, S], the group from 0 to G - 1 that every key is in; negative = none.
        num_groups: G, by default key_groups.max() + 1, which on a GPU synchronises with the host.
        backend: "reference": plain PyTorch, a piece of the queries at a time. "cpu": the C++ extension, which reads
            keys where they lie and those of masked heads not at all. "auto": cpu for tensors on a CPU where the
            extension is available, else the reference. Memory is linear in T and in S with each.

    Returns:
        `AttentionStatistics`, in float64 whatever the inputs: float16 and bfloat16 are computed in float32, and added
        up over queries in float64. Positions are aligned as for is_causal; one outside the keys has probability 0.
        Under an attn_mask that hides other keys from other heads, each head has its own counted queries, and `count` is
        the largest of their numbers. Results carry no gradient.

    Raises:
        InvalidTypeError: an argument of the wrong type or dtype.
        InvalidArgumentError: a wrong shape, device or value, or an unknown backend. The values of key_groups are looked
            at on a CPU only; elsewhere keys in groups from num_groups on are in none.
        BackendUnavailableError: "cpu" without the extension or for tensors elsewhere; "triton" and "cuda", which have
            no statistics kernel yet.

    Sources: Clark et al. 2019 (entropy; previous, own and next token), Hoyer 2004 (sparsity), Voita et al. 2019
    (confidence).
    """
    check_arguments(query, key, head_mask, attn_mask, is_causal, scale, softcap, window, query_mask)
    check_key_groups(query, key.shape[2], key_groups, num_groups)
    check_backend(backend)
    if num_groups is None:
        num_groups = 0 if key_groups is None or key_groups.numel() == 0 else max(0, int(key_groups.max()) + 1)
    run = statistics_cpu if _choose(backend, query) == "cpu" else statistics_reference
    with torch.no_grad(), without_autocast(query.device.type):
        sums = run(
            query,
            key,
            head_mask,
            attn_mask=attn_mask,
            span=visible_span(is_causal, window),
            scale=scale,
            softcap=softcap,
            query_mask=query_mask,
            key_groups=key_groups,
            num_groups=num_groups,
        )
    # Nothing counted: 0 / 0.
    means = sums[..., 1:] / sums[..., :1]
    counts = sums[..., 0].long()
    return AttentionStatistics(
        entropy=means[..., 0],
        sparsity=means[..., 1],
        confidence=means[..., 2],
        count=counts.amax(1) if counts.shape[1] else counts.sum(1),
        position_mass=means[..., 3:6],
        group_mass=None if key_groups is None else means[..., 6:],
    )


def _choose(backend: str, query: Tensor) -> str:
    """One of "reference" and "cpu"; raises where the kernel is asked for by name and cannot run."""
    on_cpu = query.device.type == "cpu"
    if backend == "cpu":
        _native.load()
        if not on_cpu:
            raise BackendUnavailableError(f"backend: 'cpu' needs tensors on the CPU, got {query.device}")
        return "cpu"
    if backend == "reference" or not on_cpu:
        return "reference"
    if _native.available():
        return "cpu"
    warn_of_reference("attention_statistics runs", "the C++ extension", _native.why_unavailable(), stacklevel=3)
    return "reference"

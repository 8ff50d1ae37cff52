"""`in_projection` and `out_projection`: checks, choice of backend, head-major layout."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ... import _native, _triton
from ...errors import BackendUnavailableError, UnsupportedError, invalid, warn_of_reference
from . import cpu, reference, triton
from .validation import (
    as_sequence,
    check_bias,
    check_gate,
    check_head_dim,
    check_head_mask,
    check_tokens,
    check_weight,
)

BACKENDS = ("auto", "reference", "cpu", "triton")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def in_projection(
    x: Tensor,
    weight: Tensor | tuple[Tensor, ...],
    bias: Tensor | tuple[Tensor | None, ...] | None = None,
    head_mask: Tensor | None = None,
    *,
    head_dim: int,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Project tokens to the kept heads only; masked heads' rows of the weights are not read.

    Equivalent to, for a shared mask:

        rows = weight.view(-1, head_dim, E)[head_mask].flatten(0, 1)
        (x @ rows.T + bias.view(-1, head_dim)[head_mask].flatten()).view(B, T, -1, head_dim).transpose(1, 2)

    Args:
        x: `[B, T, E]`, floating point.
        weight: `[H*D, E]`, or a tuple of them (queries, keys and values); one with fewer heads `H_kv`, a divisor of
            `H`, keeps the key/value heads of which at least one query head is kept (grouped queries).
        bias: `[H*D]` or None; for a tuple of weights a tuple of the same length, or None.
        head_mask: bool `[H]` (shared) or `[B, H]` (one row a request), True = the head runs; None = all heads.
        head_dim: `D`.
        backend: `"reference"`, `"cpu"` (the C++ extension), `"triton"` (CUDA devices of compute capability 8.0 or more;
            float16, bfloat16, float32), or `"auto"`: cpu on a CPU; on a CUDA device triton under a mask a request, and
            the reference, kept rows gathered and PyTorch's product, under a shared mask.

    Returns:
        `[B, kept, T, D]` under a shared mask, `[B, H, T, D]` with zero rows for masked heads under a mask per request;
        a tuple for a tuple of weights. Differentiable; masked heads' weights get zero gradients.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value (named in the message).
    """
    check_tokens("x", x, 3, "[B, T, E]")
    check_head_dim(head_dim)
    weights = as_sequence("weight", weight)
    biases = as_sequence("bias", bias, len(weights))
    for each_weight, each_bias in zip(weights, biases, strict=True):
        check_weight(each_weight, x, head_dim, heads_dim=0, width=x.shape[2])
        check_bias(each_bias, each_weight)
    counts = [each.shape[0] // head_dim for each in weights]
    num_heads = max(counts)
    if any(num_heads % count for count in counts):
        raise invalid("weight", f"head counts that divide the largest, {num_heads}", f"{counts} heads")
    if head_mask is None:
        head_mask = torch.ones(num_heads, dtype=torch.bool, device=x.device)
    check_head_mask(head_mask, num_heads, x.shape[0], x.device)
    masks = [head_mask.unflatten(-1, (count, -1)).any(-1) for count in counts]
    implementation = choose(backend, x, head_mask.dim() == 2)
    if head_mask.dim() == 2:
        outputs = implementation.in_projection_per_request(x, weights, biases, masks, head_dim)
    else:
        kept = [mask.nonzero()[:, 0] for mask in masks]
        outputs = implementation.in_projection(x, weights, biases, kept, head_dim)
    heads = tuple(output.unflatten(-1, (output.shape[-1] // head_dim, head_dim)).transpose(1, 2) for output in outputs)
    return heads if isinstance(weight, (tuple, list)) else heads[0]


def out_projection(
    heads: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    head_mask: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Project the kept heads' outputs back to the model width; masked heads and their weight columns are not read.

    Equivalent to, for a shared mask and `heads [B, H, T, D]`:

        (heads * gate[:, None, None])[:, head_mask].transpose(1, 2).flatten(2) @ weight_of_kept_columns.T + bias

    Args:
        heads: `[B, kept, T, D]` as `in_projection` gives under a shared mask, or all heads `[B, H, T, D]`, of which
            only the kept are read.
        weight: `[E, H*D]`.
        bias: `[E]` or None; it stays whatever is masked.
        head_mask: bool `[H]` or `[B, H]`, True = the head runs; None = all heads.
        gate: float `[H]` or `[B, H]`, multiplies heads before the projection; differentiable, exact also at 0;
            masked heads' gates get a zero gradient.
        backend: as for `in_projection`; "triton" multiplies with the gate as it loads the heads.

    Returns:
        `[B, T, E]`, differentiable.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value (named in the message).
    """
    check_tokens("heads", heads, 4, "[B, kept or H, T, D]")
    batch, given, _, head_dim = heads.shape
    if head_dim == 0:
        raise invalid("heads", "[B, kept or H, T, D] with D of at least 1", heads)
    check_weight(weight, heads, head_dim, heads_dim=1, width=None)
    check_bias(bias, weight)
    num_heads = weight.shape[1] // head_dim
    if head_mask is None:
        head_mask = torch.ones(num_heads, dtype=torch.bool, device=heads.device)
    check_head_mask(head_mask, num_heads, batch, heads.device)
    implementation = choose(backend, heads, head_mask.dim() == 2)
    if gate is not None:
        check_gate(gate, num_heads, batch, heads.device)
    if head_mask.dim() == 2:
        if given != num_heads:
            raise invalid("heads", f"{num_heads} heads", heads)
        if implementation is triton:
            tokens = heads.transpose(1, 2)
            return triton.out_projection_per_request(tokens, weight, bias, head_mask, head_dim, gate)
        tokens = _tokens_per_request(heads, gate, head_mask)
        return implementation.out_projection_per_request(tokens, weight, bias, head_mask, head_dim)
    kept = head_mask.nonzero()[:, 0]
    if given not in (num_heads, kept.shape[0]):
        raise invalid("heads", f"{num_heads} heads, or the {kept.shape[0]} kept ones", heads)
    if implementation is triton:
        return triton.out_projection(heads.transpose(1, 2), weight, bias, kept, head_dim, gate)
    if given == num_heads and (gate is not None or heads.stride(1) != head_dim):
        # Masked heads are not copied, and leave before the gate: their values, also NaN, must not reach its gradient.
        heads = heads.index_select(1, kept)
    if gate is not None:
        heads = _times_gate(heads, gate.index_select(-1, kept)[..., None, None])
    return implementation.out_projection(heads.transpose(1, 2).flatten(2), weight, bias, kept, head_dim)


def _tokens_per_request(heads: Tensor, gate: Tensor | None, head_mask: Tensor) -> Tensor:
    """`[B, T, H*D]` of `heads [B, H, T, D]` times `gate`; masked heads are neither read nor written."""
    batch, num_heads, tokens, head_dim = heads.shape
    if gate is None and heads.stride(1) == head_dim:
        return heads.transpose(1, 2).flatten(2)
    request, head = head_mask.nonzero(as_tuple=True)
    kept = heads[request, head]
    if gate is not None:
        kept = _times_gate(kept, gate.expand(batch, num_heads)[request, head, None, None])
    wide = heads.new_empty(batch, tokens, num_heads, head_dim).transpose(1, 2)
    return wide.index_put_((request, head), kept).transpose(1, 2).flatten(2)


def _times_gate(heads: Tensor, gate: Tensor) -> Tensor:
    """The product, and the sum of the gate's gradient, are formed in float32 or wider."""
    return (heads * gate.to(torch.promote_types(gate.dtype, torch.float32))).to(heads.dtype)


def check_backend(backend: str) -> None:
    """Raise unless the projections can run on the backend of that name, on some tensor."""
    if backend == "cuda":
        raise BackendUnavailableError(f"backend: projections have no {backend!r} kernels yet; use one of {BACKENDS}")
    if backend not in BACKENDS:
        raise invalid("backend", f"one of {BACKENDS}", backend)
    reason = {"cpu": _native.why_unavailable, "triton": _triton.why_unavailable}.get(backend, lambda: None)()
    if reason is not None:
        raise BackendUnavailableError(f"backend: {backend!r} is not available: {reason}")


def choose(backend: str, x: Tensor, per_request: bool) -> ModuleType:
    """The implementation for tensors like `x`, under a mask a request or a shared one; raises where a named backend
    cannot run."""
    if backend == "reference":
        return reference
    # Forward mode would take the kernels as constants.
    transformed = torch._C._functorch.maybe_current_level() is not None or torch.autograd.forward_ad._current_level >= 0
    if backend == "auto":
        return reference if transformed else _fastest(x, per_request)
    check_backend(backend)
    if transformed:
        raise UnsupportedError(
            f"backend: {backend!r} runs neither inside torch.func transforms nor in forward mode; use 'auto' or "
            "'reference'"
        )
    if backend == "triton":
        _triton.require(x.device)
        if x.dtype not in TRITON_DTYPES:
            raise UnsupportedError(f"backend: 'triton' takes float16, bfloat16 and float32, got {x.dtype}")
        return triton
    if x.device.type != "cpu":
        raise BackendUnavailableError(f"backend: 'cpu' needs tensors on the CPU, got {x.device}")
    if torch.is_autocast_enabled("cpu"):
        raise UnsupportedError("backend: 'cpu' does not run under autocast; use 'auto' or 'reference'")
    return cpu


def _fastest(x: Tensor, per_request: bool) -> ModuleType:
    """What `auto` is for tensors like `x`."""
    if x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        if _native.available():
            return cpu
        warn_of_reference("the projections run", "the C++ extension", _native.why_unavailable(), stacklevel=4)
    # The reference counts each request's heads on the host.
    if x.device.type == "cuda" and per_request and x.dtype in TRITON_DTYPES:
        reason = _triton.why_not_on(x.device)
        if reason is None:
            return triton
        warn_of_reference("the projections run", "Triton", reason, stacklevel=4)
    return reference

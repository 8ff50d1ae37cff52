"""The public operator: checks its arguments, chooses the implementation, runs it."""

from __future__ import annotations

import torch

from ... import _native, _triton
from ..._attention_arguments import check_head_arguments, check_score_arguments, visible_span, without_autocast
from ...errors import BackendUnavailableError, UnsupportedError, warn_of_reference
from .cpu import attention_cpu
from .reference import attention_reference
from .sdpa import attention_sdpa
from .triton import attention_triton
from .validation import beyond_triton, check_backend, check_inputs


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_mask: torch.Tensor | None = None,
    *,
    gate: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | tuple[int, int] | None = None,
    sinks: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Scaled dot-product attention in which a head that is masked off is not computed.

    Equivalent to the following, each line where its argument is given, and masked heads left out, not multiplied by 0::

        key, value = (t.repeat_interleave(H // H_kv, dim=1) for t in (key, value))
        scores = query @ key.transpose(-2, -1) * (D**-0.5 if scale is None else scale)
        scores = softcap * torch.tanh(scores / softcap)             # softcap
        scores = scores + attn_mask                                 # a floating attn_mask
        scores = scores.masked_fill(~attn_mask, -torch.inf)         # a bool attn_mask; is_causal and window likewise
        scores = torch.cat([scores, sinks[None, :, None, None].expand(B, H, T, 1)], dim=-1)
        out = scores.softmax(dim=-1)[..., :S] @ value
        out = out * (gate * head_mask)[..., None, None]

    Shapes: B requests, H query heads, H_kv key/value heads that divide H (query head h reads key/value head
    h // (H / H_kv)), T queries, S keys. Any size may be 0 but D. Strides are free.

    Args:
        query: [B, H, T, D], float16, bfloat16, float32 or float64.
        key: [B, H_kv, S, D], dtype and device of query.
        value: [B, H_kv, S, Dv], dtype and device of query.
        head_mask: bool, True = the head runs; [H] for all requests, or [B, H]. A masked head's output is exact zeros,
            and so are its gradients, whatever its inputs hold (NaN included).
        gate: floating [H] or [B, H], multiplies the heads' outputs. Every head that head_mask keeps gets its exact
            gate gradient, also where the gate is 0; masked heads get exactly 0. Without head_mask all heads run.
        attn_mask: bool (True = attend), or added to the scores (float32 or the dtype of query); broadcastable to
            [B, H, T, S]. One that requires grad gets its gradient, by way of a buffer [B, H, T, S] whatever its shape.
        is_causal: the queries are the last T of the S positions, and none sees a later one (FlashAttention's rule,
            also SDPA's where T = S). Holds together with attn_mask and window.
        scale: multiplies the scores, 1 / sqrt(D) by default.
        softcap: bounds the scaled scores by softcap * tanh(scores / softcap), before any mask (Gemma 2).
        window: w keeps a query's own position and the w - 1 before it; (left, right) keeps that many before and after
            it (FlashAttention); -1 = unlimited, alone or on a side. Positions are aligned as for is_causal.
        sinks: floating [H], one logit a head that takes part in the softmax sum and in nothing else (gpt-oss); -inf =
            none.
        backend: "reference": everything here, any number of derivatives, but masked heads cost as much as others.
            "cpu": everything here by the C++ extension, which runs the (request, head) pairs that are on and no other,
            and reads keys and values where they lie; first derivatives.
            "triton": everything here on a CUDA device of compute capability 8.0 or more, float16, bfloat16 and float32,
            head dimensions up to 256: likewise, without synchronising; first derivatives.
            "sdpa": all but softcap and sinks; the kept heads gathered, then PyTorch's SDPA. On a GPU a head_mask
            synchronises with the host once, for its count. Under a mask [B, H] the last bits of a request's output can
            depend on how many heads other requests keep.
            "auto": on a CPU with AVX-512 cpu, but sdpa for float64; elsewhere sdpa. What sdpa does not cover, and a
            mask [B, H], where no bit of a request's output may depend on other requests, run on any CPU by cpu, on a
            CUDA device by triton, and by the reference where these cannot run (warned of once), inside torch.func
            transforms and in forward mode.

    Returns:
        [B, H, T, Dv] in the dtype of query, under autocast too. A query with every key hidden (False or -inf) gets
        zeros, sinks or not, and no NaN in any gradient.

    Raises:
        InvalidTypeError: an argument of the wrong type or dtype.
        InvalidArgumentError: a wrong shape, device or value, or an unknown backend. The values of gates
            and sinks (finite; sinks of heads that run, also -inf) are looked at on a CPU only.
        UnsupportedError: softcap or sinks with backend "sdpa"; "cpu" and "triton" inside torch.func transforms, in
            forward mode, or differentiated twice; dtypes and head dimensions that "triton" does not take.
        BackendUnavailableError: "cpu" without the extension or for tensors elsewhere; "triton" without Triton 3.6 or
            for tensors elsewhere; "cuda", which has no attention kernel yet.

    Sources: FlashAttention 2.1 (alignment of causal masks, windows), Gemma 2, arXiv 2408.00118 (softcap), gpt-oss,
    arXiv 2508.10925 (sinks).
    """
    check_inputs(query, key, value)
    check_head_arguments(query, head_mask, gate, sinks)
    check_score_arguments(query, key.shape[2], attn_mask, is_causal, scale, softcap, window)
    check_backend(backend, softcap, sinks)
    return attend(
        query,
        key,
        value,
        head_mask,
        gate=gate,
        attn_mask=attn_mask,
        span=visible_span(is_causal, window),
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        backend=backend,
    )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_mask: torch.Tensor | None = None,
    *,
    kv_heads: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    span: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`attention` on checked arguments, which chooses the implementation and runs it.

    kv_heads: int64 [H], the key/value head that each query head reads; None = h // (H / H_kv).
    span: `visible_span(is_causal, window)`, how many keys before and after its own position a query sees.
    """
    implementation = _choose(backend, query, value, head_mask, softcap, sinks)
    options = {"gate": gate, "attn_mask": attn_mask, "span": span, "scale": scale}
    with without_autocast(query.device.type):
        if implementation in ("cpu", "triton"):
            kernel = attention_cpu if implementation == "cpu" else attention_triton
            return kernel(query, key, value, head_mask, kv_heads=kv_heads, softcap=softcap, sinks=sinks, **options)
        if kv_heads is not None:
            key, value = key.index_select(1, kv_heads), value.index_select(1, kv_heads)
        if implementation == "reference":
            return attention_reference(query, key, value, head_mask, softcap=softcap, sinks=sinks, **options)
        return attention_sdpa(query, key, value, head_mask, **options)


def _choose(
    backend: str,
    query: torch.Tensor,
    value: torch.Tensor,
    head_mask: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> str:
    """One of "reference", "sdpa", "cpu" and "triton"; raises where a kernel is asked for by name and cannot run."""
    if backend in ("reference", "sdpa"):
        return backend
    device = query.device
    transformed = torch._C._functorch.maybe_current_level() is not None or torch.autograd.forward_ad._current_level >= 0
    if backend != "auto":
        _require(backend, query, value)
        if transformed:
            raise UnsupportedError(
                f"backend: {backend!r} runs neither inside torch.func transforms nor in forward mode; use 'reference'"
            )
        return backend
    per_request = head_mask is not None and head_mask.dim() == 2
    beyond_sdpa = per_request or softcap is not None or sinks is not None
    if device.type == "cpu" and not transformed and (beyond_sdpa or _kernel_is_faster(query)):
        if _native.available():
            return "cpu"
        if beyond_sdpa:
            warn_of_reference("attention runs", "the C++ extension", _native.why_unavailable(), stacklevel=4)
    if device.type == "cuda" and beyond_sdpa and not transformed and beyond_triton(query, value) is None:
        reason = _triton.why_not_on(device)
        if reason is None:
            return "triton"
        warn_of_reference("attention runs", "Triton", reason, stacklevel=4)
    return "reference" if beyond_sdpa else "sdpa"


def _require(backend: str, query: torch.Tensor, value: torch.Tensor) -> None:
    """Raise where the kernels of `backend` cannot run on these inputs."""
    if backend == "triton":
        _triton.require(query.device)
        beyond = beyond_triton(query, value)
        if beyond is not None:
            raise UnsupportedError(beyond)
        return
    _native.load()
    if query.device.type != "cpu":
        raise BackendUnavailableError(f"backend: 'cpu' needs tensors on the CPU, got {query.device}")


def _kernel_is_faster(query: torch.Tensor) -> bool:
    """Whether the kernel beats SDPA wherever both apply: measured on every shape tried, in float32, bfloat16, float16.

    In float64 and without AVX-512 the kernel is the compiler's plain code, and SDPA's matrix products win.
    """
    return query.dtype != torch.float64 and torch.backends.cpu.get_cpu_capability().startswith("AVX512")

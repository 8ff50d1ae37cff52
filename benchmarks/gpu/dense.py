"""PyTorch's own attention, pinned to one of its kernels, forward and backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Those that are timed; for smoke a CPU has the last only.
PINNED = ("cudnn", "flash")


@contextlib.contextmanager
def pinned(backend: str, deterministic: bool = False) -> Iterator[None]:
    """Allow this kernel and no other, so that one that cannot run raises."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Otherwise every new tensor is filled first, which takes time.
        torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with sdpa_kernel(BACKENDS[backend]):
            yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention [B, H, T, D], grouped where there are fewer keys' heads."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)


def times(output: Tensor, mask: Tensor | None, gate: Tensor | None) -> Tensor:
    """Heads [B, H, T, D] times the head mask and the gate, as one does without a kernel for it."""
    for factor in (mask, gate):
        if factor is not None:
            output = output * factor[..., None, None].to(output.dtype)
    return output

"""Argument checks of the public projections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import describe, invalid, invalid_type


def check_tokens(argument: str, x: Tensor, dim: int, wanted: str) -> None:
    """Raise unless `x` is a floating-point tensor of `dim` dimensions."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise invalid_type(argument, f"a floating-point tensor {wanted}", x)
    if x.dim() != dim:
        raise invalid(argument, wanted, x)


def check_head_dim(head_dim: int) -> None:
    """Raise unless `head_dim` is a positive int."""
    if isinstance(head_dim, bool) or not isinstance(head_dim, int):
        raise invalid_type("head_dim", "a positive int", head_dim)
    if head_dim <= 0:
        raise invalid("head_dim", "a positive int", head_dim)


def check_weight(weight: Tensor, x: Tensor, head_dim: int, heads_dim: int, width: int | None) -> None:
    """`weight` has heads of `head_dim` side by side along `heads_dim`, and `width` (None: any) along the other."""
    sizes = ["E" if width is None else str(width)] * 2
    sizes[heads_dim] = "heads*head_dim"
    wanted = f"[{', '.join(sizes)}] with head_dim {head_dim}, {x.dtype}, on {x.device}"
    if not isinstance(weight, Tensor):
        raise invalid_type("weight", f"a tensor {wanted}", weight)
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise invalid_type("weight", wanted, weight)
    if weight.dim() != 2 or weight.device != x.device:
        raise invalid("weight", wanted, weight)
    heads_size, other_size = weight.shape[heads_dim], weight.shape[1 - heads_dim]
    if heads_size == 0 or heads_size % head_dim or width not in (None, other_size):
        raise invalid("weight", wanted, weight)


def check_bias(bias: Tensor | None, weight: Tensor) -> None:
    """Raise unless `bias` is None or fits the rows of `weight`."""
    if bias is None:
        return
    wanted = f"None or [{weight.shape[0]}], {weight.dtype}, on {weight.device}"
    if not isinstance(bias, Tensor) or bias.dtype != weight.dtype:
        raise invalid_type("bias", wanted, bias)
    if bias.shape != weight.shape[:1] or bias.device != weight.device:
        raise invalid("bias", wanted, bias)


def check_head_mask(head_mask: Tensor, num_heads: int, batch: int, device: torch.device) -> None:
    """Raise unless `head_mask` is a bool tensor `[H]` or `[B, H]` on `device`."""
    wanted = f"None or a bool tensor [{num_heads}] or [{batch}, {num_heads}] (heads, or requests and heads) on {device}"
    if not isinstance(head_mask, Tensor) or head_mask.dtype != torch.bool:
        raise invalid_type("head_mask", wanted, head_mask)
    if head_mask.dim() > 2:
        raise invalid("head_mask", wanted + "; masks per token are not supported", head_mask)
    if tuple(head_mask.shape) not in ((num_heads,), (batch, num_heads)) or head_mask.device != device:
        raise invalid("head_mask", wanted, head_mask)


def check_gate(gate: Tensor, num_heads: int, batch: int, device: torch.device) -> None:
    """Values are looked at on the CPU only: elsewhere, and in a graph being compiled, the look would cost too much."""
    wanted = f"None or a floating-point tensor [{num_heads}] or [{batch}, {num_heads}] on {device}"
    if not isinstance(gate, Tensor) or not gate.is_floating_point():
        raise invalid_type("gate", wanted, gate)
    if tuple(gate.shape) not in ((num_heads,), (batch, num_heads)) or gate.device != device:
        raise invalid("gate", wanted, gate)
    if device.type == "cpu" and not torch.compiler.is_compiling() and not bool(gate.detach().isfinite().all()):
        raise invalid("gate", "finite values", f"NaN or infinity in {describe(gate)}")


def as_sequence(argument: str, value: object, length: int | None = None) -> Sequence:
    """A tensor or None stands for a sequence of itself; `length`: what the sequence must have."""
    items = list(value) if isinstance(value, (tuple, list)) else [value] * (length or 1)
    if isinstance(value, Tensor) and length not in (None, 1):
        raise invalid(argument, f"None or {length} biases, one a weight", value)
    if not items or length not in (None, len(items)):
        raise invalid(argument, f"{length or 'at least one'} tensors", f"{len(items)}")
    return items

"""Input factories, derived tolerances and kernel counters, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from . import _native
from .ops.projection import operators  # noqa: F401  (defines the operator that the extension implements)


@dataclass
class ItemsRun:
    """The (request, head) items that the kernels ran on this thread."""

    in_projection: int = 0
    out_projection: int = 0
    attention: int = 0


@contextmanager
def items_run() -> Iterator[ItemsRun]:
    """Count what the kernels run inside the block, on this thread; the numbers are there once it is left."""
    _native.load()
    items = ItemsRun()
    torch.ops.sparse_heads.items_run(True)
    yield items
    items.in_projection, items.out_projection, items.attention = torch.ops.sparse_heads.items_run(True)


def random_attention_inputs(
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    value_dim: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query [B, H, T, D], key [B, H_kv, S, D], value [B, H_kv, S, Dv]: normal, seeded, strided as projections leave
    them ([B, T, H, D] in memory), leaves that require grad."""
    generator = torch.Generator().manual_seed(seed)

    def draw(number: int, length: int, size: int) -> torch.Tensor:
        rows = torch.randn(batch, length, number, size, generator=generator, dtype=torch.float64)
        return rows.to(dtype).transpose(1, 2).requires_grad_()

    value_dim = head_dim if value_dim is None else value_dim
    return draw(heads, queries, head_dim), draw(kv_heads, keys, head_dim), draw(kv_heads, keys, value_dim)


def assert_close_to_reference(
    actual: torch.Tensor, low_precision_eager: torch.Tensor, float64_reference: torch.Tensor
) -> None:
    """Fail unless `actual` is as good as its precision allows.

    Its largest error against `float64_reference` may be twice that of `low_precision_eager`, the same computation in
    plain operators of the low precision, plus one rounding of the largest value to the dtype of `actual`.
    """
    for name, tensor in (("low_precision_eager", low_precision_eager), ("float64_reference", float64_reference)):
        if actual.shape != tensor.shape:
            raise AssertionError(f"shape {list(actual.shape)}, but {name} has {list(tensor.shape)}")
    if actual.dtype != low_precision_eager.dtype or float64_reference.dtype != torch.float64:
        raise AssertionError(f"dtypes {actual.dtype}, {low_precision_eager.dtype}, {float64_reference.dtype}")
    if not actual.isfinite().all():
        raise AssertionError(f"{int((~actual.isfinite()).sum())} of {actual.numel()} values are not finite")
    if actual.numel() == 0:
        return
    errors = (actual.double() - float64_reference).abs()
    eager_error = (low_precision_eager.double() - float64_reference).abs().max().item()
    rounding = torch.finfo(actual.dtype).eps * float64_reference.abs().max().item()
    worst = errors.max().item()
    if not worst <= 2 * eager_error + rounding:
        place = [int(index) for index in torch.unravel_index(errors.argmax(), errors.shape)]
        raise AssertionError(
            f"error {worst:.3g} at {place}, allowed 2 x {eager_error:.3g} (eager) + {rounding:.3g} (one rounding)"
        )

"""Which heads each request runs, listed on the device from bool masks; nothing synchronises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._triton.launch import Launch


class HeadList(NamedTuple):
    """The heads of one weight that run.

    Shared: heads [kept], counts None. Per request: heads int32 [B, H], the heads that run before those that do not,
    both ascending; counts int32 [B].
    """

    heads: Tensor
    counts: Tensor | None

    @property
    def slots(self) -> int:
        """The length of a request's list."""
        return self.heads.shape[-1]

    @property
    def requests(self) -> int:
        return 1 if self.counts is None else self.heads.shape[0]


@triton.jit
def head_lists_kernel(masks, mask_strides, rows, columns, lists, counts, BLOCK: tl.constexpr):
    """Lists the columns of one row of one mask: those that are True, then the others, both ascending."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    for i in tl.static_range(len(masks)):
        if (tl.program_id(1) == i) & (row < rows[i]):
            exists = column < columns[i]
            place = row.to(tl.int64) * mask_strides[i][0] + column.to(tl.int64) * mask_strides[i][1]
            runs = (tl.load(masks[i] + place, mask=exists, other=0) != 0).to(tl.int32)
            count = tl.sum(runs, 0)
            running = tl.cumsum(runs, 0)
            slot = tl.where(runs != 0, running - 1, count + column - running)
            tl.store(lists[i] + row.to(tl.int64) * columns[i] + slot, column, mask=exists)
            tl.store(counts[i] + row, count)


def head_lists_launch(masks: Sequence[Tensor], found: Sequence[HeadList]) -> Launch:
    """Fills `found` from bool masks [rows, columns], which may have different sizes."""
    arguments = {
        "masks": tuple(masks),
        "mask_strides": tuple(mask.stride() for mask in masks),
        "rows": tuple(mask.shape[0] for mask in masks),
        "columns": tuple(mask.shape[1] for mask in masks),
        "lists": tuple(each.heads for each in found),
        "counts": tuple(each.counts for each in found),
        "BLOCK": triton.next_power_of_2(max(1, *(mask.shape[1] for mask in masks))),
    }
    grid = (max(mask.shape[0] for mask in masks), len(masks))
    return Launch(head_lists_kernel, grid, arguments, {"num_warps": 4, "num_stages": 1})


def head_lists(masks: Sequence[Tensor]) -> list[HeadList]:
    """A list a row of each bool mask [rows, columns]."""
    found = [
        HeadList(
            torch.empty(mask.shape, dtype=torch.int32, device=mask.device),
            torch.empty(mask.shape[0], dtype=torch.int32, device=mask.device),
        )
        for mask in masks
    ]
    head_lists_launch(masks, found).run()
    return found


def lists_of(heads: Sequence[Tensor]) -> list[HeadList]:
    """Of what operators take: int64 [kept], shared by the batch, or bool [B, H], a row a request."""
    if heads[0].dtype == torch.bool:
        return head_lists(heads)
    return [HeadList(kept, None) for kept in heads]


def requests_of(heads: Sequence[Tensor]) -> list[HeadList | None]:
    """Of each weight, what head_lists gives for bool [B, H] with the two exchanged: the requests that run each head.

    None where the heads [kept] are shared: all requests run them.
    """
    if heads and heads[0].dtype == torch.bool:
        return head_lists([mask.t() for mask in heads])
    return [None] * len(heads)

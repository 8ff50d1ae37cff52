"""Which (request, key/value head) pairs have work, listed on the device from the head mask; nothing synchronises."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch

# Kernels are not compiled anew where one is 1 or a multiple of 16.
SIZES = ("batch", "num_heads", "num_kv_heads", "group")


class WorkList(NamedTuple):
    """int32 tensors; what lies past the ends is unspecified.

    heads [B, H]: a request's active query heads, by key/value head, then by head.
    items [B * H_kv, 4]: request, key/value head, the place in heads[request] of its first active query head, and how
        many there are; pairs without any are left out; in the order of requests, then of key/value heads.
    count [1]: the number of items.
    """

    heads: Tensor
    items: Tensor
    count: Tensor


@triton.jit(do_not_specialize=SIZES)
def _compact_heads(
    head_mask, mask_strides, kv_heads, heads, group_counts, num_heads, num_kv_heads, group,
    BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Lists the active heads of one request and counts them by key/value head."""
    request = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    kv_head = tl.arange(0, BLOCK_KV)
    active, read = _head(head_mask, mask_strides, kv_heads, request, head, num_heads, group)
    place = tl.zeros([BLOCK_H], tl.int32)
    counts = tl.zeros([BLOCK_KV], tl.int32)
    for first in range(0, num_heads, STEP):
        other = first + tl.arange(0, STEP)
        other_active, other_read = _head(head_mask, mask_strides, kv_heads, request, other, num_heads, group)
        before = (other_read[None, :] < read[:, None]) | (
            (other_read[None, :] == read[:, None]) & (other[None, :] < head[:, None])
        )
        place += tl.sum((before & other_active[None, :]).to(tl.int32), 1)
        counts += tl.sum(((other_read[None, :] == kv_head[:, None]) & other_active[None, :]).to(tl.int32), 1)
    tl.store(heads + request * num_heads + place, head, mask=active)
    tl.store(group_counts + request * num_kv_heads + kv_head, counts, mask=kv_head < num_kv_heads)


@triton.jit
def _head(head_mask, mask_strides, kv_heads, request, head, num_heads, group):
    """Whether each head runs, and the key/value head that it reads."""
    active = head < num_heads
    if kv_heads is None:
        read = head // group
    else:
        read = tl.load(kv_heads + head, mask=active, other=0).to(tl.int32)
    if head_mask is not None:
        active &= tl.load(head_mask + request * mask_strides[0] + head * mask_strides[1], mask=active, other=0) != 0
    return active, read


@triton.jit(do_not_specialize=SIZES)
def _place_items(group_counts, items, count, batch, num_kv_heads, BLOCK_KV: tl.constexpr, STEP: tl.constexpr):
    """Writes the items of one request behind those of the earlier ones."""
    request = tl.program_id(0)
    earlier = tl.zeros([STEP], tl.int32)
    for first in range(0, request * num_kv_heads, STEP):
        pair = first + tl.arange(0, STEP)
        earlier += (tl.load(group_counts + pair, mask=pair < request * num_kv_heads, other=0) > 0).to(tl.int32)
    kv_head = tl.arange(0, BLOCK_KV)
    exists = kv_head < tl.where(request < batch, num_kv_heads, 0)
    counts = tl.load(group_counts + request * num_kv_heads + kv_head, mask=exists, other=0)
    runs = (counts > 0).to(tl.int32)
    first_item = tl.sum(earlier, 0)
    item = items + (first_item + tl.cumsum(runs, 0) - 1) * 4
    tl.store(item, tl.zeros_like(kv_head) + request, mask=counts > 0)
    tl.store(item + 1, kv_head, mask=counts > 0)
    tl.store(item + 2, tl.cumsum(counts, 0) - counts, mask=counts > 0)
    tl.store(item + 3, counts, mask=counts > 0)
    if request >= batch - 1:
        tl.store(count, first_item + tl.sum(runs, 0))


def work_list_launches(
    head_mask: Tensor | None, kv_heads: Tensor | None, batch: int, num_heads: int, num_kv_heads: int, device
) -> tuple[WorkList, tuple[Launch, Launch]]:
    """An unwritten work list, and the launches that write it."""
    work = WorkList(
        torch.empty((batch, num_heads), dtype=torch.int32, device=device),
        torch.empty((batch * num_kv_heads, 4), dtype=torch.int32, device=device),
        torch.empty(1, dtype=torch.int32, device=device),
    )
    group_counts = torch.empty((batch, num_kv_heads), dtype=torch.int32, device=device)
    head_mask = None if head_mask is None else head_mask.expand(batch, num_heads)
    block_kv = triton.next_power_of_2(max(1, num_kv_heads))
    compact = {
        "head_mask": head_mask,
        "mask_strides": None if head_mask is None else head_mask.stride(),
        "kv_heads": kv_heads,
        "heads": work.heads,
        "group_counts": group_counts,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "group": None if kv_heads is not None else max(1, num_heads // max(1, num_kv_heads)),
        "BLOCK_H": triton.next_power_of_2(max(1, num_heads)),
        "BLOCK_KV": block_kv,
        "STEP": 16,
    }
    place = {
        "group_counts": group_counts,
        "items": work.items,
        "count": work.count,
        "batch": batch,
        "num_kv_heads": num_kv_heads,
        "BLOCK_KV": block_kv,
        "STEP": 1024,
    }
    options = {"num_warps": 4 if num_heads <= 256 else 8, "num_stages": 1}
    # Without requests there is still a count to write.
    return work, (
        Launch(_compact_heads, (batch,), compact, options),
        Launch(_place_items, (max(1, batch),), place, options),
    )


def attention_work_list(
    head_mask: Tensor | None, kv_heads: Tensor | None, batch: int, num_heads: int, num_kv_heads: int, device
) -> WorkList:
    """head_mask: bool [H] or [B, H], None = all; kv_heads: int64 [H], None = h // (H / H_kv)."""
    work, launches = work_list_launches(head_mask, kv_heads, batch, num_heads, num_kv_heads, device)
    for launch in launches:
        launch.run()
    return work

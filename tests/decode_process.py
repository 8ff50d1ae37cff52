"""Run by test_decode_dispatch.py in a process of its own, which a read of a forbidden page kills; prints "done"."""

from __future__ import annotations

import mmap
import resource

import torch
from decode_inputs import draw
from unreadable_pages import Mapped

from sparse_heads import attention_decode

# Query heads of three requests, two a key/value head: the middle ones are off, all of the second request's, and of the
# third one head of each key/value head.
HEAD_MASK = torch.tensor([[1, 1, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 1]]).bool()
GROUPS = HEAD_MASK.unflatten(1, (3, 2)).any(-1)
WIDTH = 64


def contiguous(dtype: torch.dtype, window: int | None) -> None:
    """Slabs of heads that are off, all pages behind a request's length, and those before its window."""
    rows = mmap.PAGESIZE // (WIDTH * dtype.itemsize)  # of a cache on one page
    room, lengths = 40 * rows, torch.tensor([40 * rows, 7, 5 * rows])
    query = draw(3, 6, 2, WIDTH).to(dtype)
    plain = [draw(3, 3, room, WIDTH, seed=seed).to(dtype) for seed in (1, 2)]
    mapped = [Mapped(cache) for cache in plain]
    for request, length in enumerate(lengths.tolist()):
        first = 0 if window is None else max(0, length - 1 - window) // rows * rows
        behind = -(-length // rows) * rows
        for kv_head in range(3):
            runs = [(0, room)] if not GROUPS[request, kv_head] else [(0, first), (behind, room)]
            for start, end in runs:
                for each in mapped:
                    if end > start:
                        each.forbid(((request * 3 + kv_head) * room + start) * WIDTH, (end - start) * WIDTH)
    options = {"cache_lengths": lengths, "head_mask": HEAD_MASK, "window": window, "backend": "cpu"}
    actual = attention_decode(query, *(each.tensor for each in mapped), **options)
    assert torch.equal(actual, attention_decode(query, *plain, **options))


def paged(dtype: torch.dtype) -> None:
    """Pages that no length needs, and those of the request that has no head on."""
    lengths = torch.tensor([100, 64, 33])
    table = torch.tensor([[7, 2, 5, 0], [1, 4, 6, 1], [3, 8, 6, 99]], dtype=torch.int32)
    used = {7, 2, 5, 0, 3, 8}  # pages of 32 positions of 3 heads: 100 needs four, 33 two
    query = draw(3, 6, 2, WIDTH).to(dtype)
    plain = [draw(9, 32, 3, WIDTH, seed=seed).to(dtype) for seed in (1, 2)]
    mapped = [Mapped(cache) for cache in plain]
    for page in set(range(9)) - used:
        for each in mapped:
            each.forbid(page * 32 * 3 * WIDTH, 32 * 3 * WIDTH)
    options = {"cache_lengths": lengths, "head_mask": HEAD_MASK, "block_table": table, "backend": "cpu"}
    actual = attention_decode(query, *(each.tensor for each in mapped), **options)
    assert torch.equal(actual, attention_decode(query, *plain, **options))


def ends(dtype: torch.dtype) -> None:
    """Rows that fill no vector, up to the last byte that may be read."""
    for width, length in ((1, 5), (13, 17), (65, 530), (16, 512)):
        size = 2 * length * width
        pages = -(-size * dtype.itemsize // mmap.PAGESIZE) + 1
        per_page = mmap.PAGESIZE // dtype.itemsize
        caches = []
        for seed in (1, 2):
            mapped = Mapped(draw(pages * per_page, seed=seed).to(dtype))
            mapped.forbid((pages - 1) * per_page, per_page)
            end = (pages - 1) * per_page
            caches.append(mapped.tensor[end - size : end].view(1, 2, length, width))
        query, lengths = draw(1, 4, 3, width).to(dtype), torch.tensor([length])
        actual = attention_decode(query, *caches, lengths, backend="cpu")
        assert torch.equal(actual, attention_decode(query, *map(torch.clone, caches), lengths, backend="cpu"))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(2)
    for one in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        contiguous(one, None)
        contiguous(one, 70)
        paged(one)
        ends(one)
    print("done", flush=True)

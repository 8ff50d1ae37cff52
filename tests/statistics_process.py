"""Run by test_statistics_dispatch.py in a process of its own; prints "done" in the end."""

from __future__ import annotations

import resource

import torch
from statistics_inputs import stack
from unreadable_pages import Mapped, forbid_rows

from sparse_heads.ops.statistics import attention_statistics, head_similarity

HEADS = torch.tensor([True, False, True, False])


def memory() -> None:
    """A long input may add to the largest use so far a quarter of what the probabilities would take."""

    def kernel(**inputs):
        return attention_statistics(**inputs, is_causal=True, backend="cpu")

    def reference(**inputs):
        return attention_statistics(**inputs, is_causal=True, backend="reference")

    for run, length in ((kernel, 8192), (reference, 4096), (head_similarity, 4096)):
        for size in (64, length):
            inputs = {"query": torch.randn(1, 2, size, 16), "key": torch.randn(1, 2, size, 16)}
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            run(**inputs)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        probabilities = 2 * length * length * 4
        assert grown < probabilities / 4, f"{run.__name__}: {grown >> 20} MiB"


def unreadable() -> None:
    """Queries and keys of masked heads on pages that nobody may read."""
    for length in (8, 128):  # of 128 floats each, so that heads fill whole pages
        query, key = (torch.randn(4, length, 128) for _ in range(2))
        expected = attention_statistics(query[None], key[None], HEADS, backend="cpu")
        mapped = [forbid_rows(Mapped(tensor), HEADS)[None] for tensor in (query, key)]
        actual = attention_statistics(*mapped, HEADS, backend="cpu")
        assert torch.equal(stack(actual)[:, HEADS], stack(expected)[:, HEADS])


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.manual_seed(0)
    torch.set_num_threads(2)
    memory()
    unreadable()
    print("done", flush=True)

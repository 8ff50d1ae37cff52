"""Run by test_triton_proof.py in a process of its own, which a read of memory that no kernel may touch kills.

`python triton_process.py CASE`; it prints "protected" before and "done" after.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import resource
import sys

import torch
from triton_inputs import CAUSAL, attend_reference, attend_triton, converted
from unreadable_pages import Mapped, fenced

# [B, H], key/value heads are shared by two: the first group of request 0 is half on, the others are on or off.
HEAD_MASK = torch.tensor([[True, False, False, False, True, True], [False, False, False, False, False, True]])
GROUPS = HEAD_MASK.unflatten(1, (3, 2)).any(-1)


def without(heads: torch.Tensor, *size: int) -> torch.Tensor:
    """[B, H, *size] of which the heads that are off cannot be read."""
    mapped = Mapped(torch.randn(*heads.shape, *size))
    step = mapped.tensor[0, 0].numel()
    for place in (~heads.flatten()).nonzero()[:, 0].tolist():
        mapped.forbid(place * step, step)
    return mapped.tensor


def masked_heads(head_mask: torch.Tensor | None = HEAD_MASK) -> None:
    """Each head fills whole pages."""
    query, mask = without(HEAD_MASK, 64, 16), without(HEAD_MASK, 64, 64)
    key, value = (without(GROUPS, 64, 16) for _ in range(2))
    leaves = [tensor.requires_grad_() for tensor in (query, key, value, mask)]
    print("protected", flush=True)
    output = attend_triton(
        query=query, key=key, value=value, attn_mask=mask, head_mask=head_mask, gate=torch.ones(6), sinks=torch.ones(6)
    )
    output.sum().backward()
    for leaf, heads in zip(leaves, (HEAD_MASK, GROUPS, GROUPS, HEAD_MASK), strict=True):
        assert (leaf.grad[~heads] == 0).all() and (leaf.grad[heads] != 0).any()


def ends() -> None:
    """Sizes that fill no tile, against the end of what may be read."""
    print("protected", flush=True)
    for tokens, keys, head_dim, value_dim in ((1, 5, 16, 3), (21, 37, 5, 16), (70, 70, 24, 24)):
        for head_mask in (None, torch.arange(6) == 5):
            sizes = {"query": (1, 6, tokens, head_dim), "key": (1, 3, keys, head_dim), "value": (1, 3, keys, value_dim)}
            sizes |= {"attn_mask": (1, 6, tokens, keys), "gate": (1, 6), "sinks": (6,)}
            arguments = {name: fenced(*size).requires_grad_() for name, size in sizes.items()}
            output = attend_triton(**arguments, head_mask=head_mask, span=CAUSAL)
            gradient = fenced(*output.shape)
            output.backward(gradient)
            exact = {name: leaf.detach() for name, leaf in converted(arguments, torch.float64).items()}
            expected = attend_reference(**exact, head_mask=head_mask, span=CAUSAL)
            torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)


CASES = {"masked_heads": masked_heads, "ends": ends, "all_heads": lambda: masked_heads(None)}

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    CASES[sys.argv[1]]()
    print("done", flush=True)

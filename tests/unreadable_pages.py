"""Run by test_projection_proof.py in a process of its own, which a read of a masked head's weights kills.

`python unreadable_pages.py CASE` lays weights on mapped memory, takes the right to read masked heads' pages away and
runs CASE; it prints "protected" before and "done" after.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import resource
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

import sparse_heads as sh
from sparse_heads.testing import assert_close_to_reference

PROT_NONE = 0
MASK = torch.tensor([True, False, True, True, False, False])
HEADS = MASK.shape[0]
# Masks of their own for three requests, who run the same heads between them.
REQUESTS = torch.tensor([[1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [1, 0, 1, 1, 0, 0]]).bool()
# Every kernel that the number of tokens may choose, and the borders of blocks of tokens.
TOKENS = [*range(1, 18), 31, 33, 63, 111, 130, 513]


class Mapped:
    """A tensor on pages of its own."""

    def __init__(self, values: torch.Tensor) -> None:
        size = values.numel() * values.element_size()
        self.memory = mmap.mmap(-1, size)
        self.tensor = torch.frombuffer(self.memory, dtype=values.dtype).view(values.shape)
        self.tensor.copy_(values)

    def forbid(self, start: int, size: int) -> None:
        """Make `size` elements from `start` on unreadable."""
        step = self.tensor.element_size()
        if start * step % mmap.PAGESIZE or size * step % mmap.PAGESIZE:
            raise ValueError(f"{size} elements from {start} on are no whole pages")
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.c_void_p(self.tensor.data_ptr() + start * step)
        if libc.mprotect(address, ctypes.c_size_t(size * step), PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect failed")


def forbid_rows(mapped: Mapped, mask: torch.Tensor = MASK) -> torch.Tensor:
    """Masked heads' rows of a weight or entries of a bias."""
    size = mapped.tensor.numel() // mask.shape[0]
    for head in (~mask).nonzero()[:, 0].tolist():
        mapped.forbid(head * size, size)
    return mapped.tensor


def forbid_columns(mapped: Mapped, mask: torch.Tensor = MASK) -> torch.Tensor:
    """Masked heads' columns of a matrix."""
    rows = mapped.tensor.shape[0]
    size = mapped.tensor.numel() // rows // mask.shape[0]
    for row in range(rows):
        for head in (~mask).nonzero()[:, 0].tolist():
            mapped.forbid((row * mask.shape[0] + head) * size, size)
    return mapped.tensor


def check(run: Callable, mapped: list[torch.Tensor], plain: list[torch.Tensor]) -> None:
    """`run(*mapped)` against the same formula on readable copies, in float64 and eagerly."""
    eager = run(*plain, backend="reference")
    expected = run(*(tensor.double() for tensor in plain), backend="reference")
    for actual, low, exact in zip(run(*mapped, backend="cpu"), eager, expected, strict=True):
        assert_close_to_reference(actual, low, exact)


def in_projection(dtype: torch.dtype, head_dim: int = 64, width: int = 64, mask: torch.Tensor = MASK) -> None:
    plain = [(torch.randn(HEADS * head_dim, width) / width**0.5).to(dtype) for _ in range(3)]
    mapped = [forbid_rows(Mapped(weight)).requires_grad_() for weight in plain]
    print("protected", flush=True)
    per_head = [weight.double().unflatten(0, (HEADS, head_dim)) for weight in plain]
    for tokens in TOKENS:
        x = torch.randn(mask.reshape(-1, HEADS).shape[0], tokens, width).to(dtype)

        def run(x, query, key, value, backend):
            return sh.in_projection(x, (query, key, value), None, mask, head_dim=head_dim, backend=backend)

        with torch.no_grad():
            check(run, [x, *mapped], [x, *plain])
        x.requires_grad_()
        sum(output.sum() for output in run(x, *mapped, backend="cpu")).backward()
        for weight in mapped:
            gradient, weight.grad = weight.grad.unflatten(0, (HEADS, head_dim)), None
            assert (gradient[~MASK] == 0).all() and (gradient[MASK] != 0).any()
        for gradient, runs in zip(x.grad, mask.reshape(-1, HEADS), strict=True):
            rows = torch.cat([weight[runs].flatten(0, 1) for weight in per_head])
            # As many roundings as rows are added up, at most.
            bound = rows.abs().sum(0) * rows.shape[0] * torch.finfo(dtype).eps / 2
            assert ((gradient - rows.sum(0)).abs() <= bound).all()


def in_projection_with_bias(mask: torch.Tensor = MASK) -> None:
    """Heads so wide that each fills a page of the bias too."""
    head_dim, width = 1024, 4
    plain = [torch.randn(HEADS * head_dim, width), torch.randn(HEADS * head_dim)]
    mapped = [forbid_rows(Mapped(tensor)).requires_grad_() for tensor in plain]
    print("protected", flush=True)

    def run(x, weight, bias, backend):
        return [sh.in_projection(x, weight, bias, mask, head_dim=head_dim, backend=backend)]

    for tokens in (1, 5, 9, 40):
        x = torch.randn(3, tokens, width)
        with torch.no_grad():
            check(run, [x, *mapped], [x, *plain])
        run(x, *mapped, backend="cpu")[0].sum().backward()


def out_projection() -> None:
    """Heads so wide that each row of the weight, and each token, holds each head on pages of its own."""
    head_dim, width = 1024, 5
    weight = torch.randn(width, HEADS * head_dim)
    mapped_weight = forbid_columns(Mapped(weight)).requires_grad_()
    print("protected", flush=True)

    def run(heads, weight, backend):
        heads = heads.view(1, -1, HEADS, head_dim).transpose(1, 2)
        return [sh.out_projection(heads, weight, None, MASK, backend=backend)]

    for tokens in (1, 5, 8, 9, 17, 40):
        heads = torch.randn(tokens, HEADS * head_dim)
        mapped_heads = forbid_columns(Mapped(heads)).requires_grad_()
        with torch.no_grad():
            check(run, [mapped_heads, mapped_weight], [heads, weight])
        run(mapped_heads, mapped_weight, backend="cpu")[0].sum().backward()
        assert (mapped_heads.grad.view(tokens, HEADS, head_dim)[:, ~MASK] == 0).all()


def out_projection_per_request() -> None:
    """As `out_projection`, with every request's own masked heads forbidden in its tokens."""
    head_dim, width = 1024, 5
    weight = torch.randn(width, HEADS * head_dim)
    mapped_weight = forbid_columns(Mapped(weight)).requires_grad_()
    print("protected", flush=True)

    def run(heads, weight, backend):
        return [sh.out_projection(heads.transpose(1, 2), weight, None, REQUESTS, backend=backend)]

    for tokens in (1, 5, 8, 9, 17, 40):
        heads = torch.randn(REQUESTS.shape[0], tokens, HEADS, head_dim)
        mapped = Mapped(heads)
        for request, mask in enumerate(REQUESTS):
            for row in range(tokens):
                for head in (~mask).nonzero()[:, 0].tolist():
                    mapped.forbid(((request * tokens + row) * HEADS + head) * head_dim, head_dim)
        mapped_heads = mapped.tensor.requires_grad_()
        with torch.no_grad():
            check(run, [mapped_heads, mapped_weight], [heads, weight])
        run(mapped_heads, mapped_weight, backend="cpu")[0].sum().backward()
        assert (mapped_heads.grad.transpose(1, 2)[~REQUESTS] == 0).all()
        assert (mapped_heads.grad.transpose(1, 2)[REQUESTS] != 0).any((1, 2)).all()
        assert (mapped_weight.grad.unflatten(1, (HEADS, -1))[:, ~MASK] == 0).all()


def fenced(*size: int) -> torch.Tensor:
    """A tensor whose last number is the last that may be read: the next page is forbidden."""
    pages = -(-math.prod(size) * 4 // mmap.PAGESIZE) + 1
    mapped = Mapped(torch.randn(pages * mmap.PAGESIZE // 4))
    end = mapped.tensor.numel() - mmap.PAGESIZE // 4
    mapped.forbid(end, mmap.PAGESIZE // 4)
    return mapped.tensor[end - math.prod(size) : end].view(size)


def ends() -> None:
    """Sizes that fill no vector and no tile, against the end of what may be read."""
    last = torch.tensor([False] * (HEADS - 1) + [True])
    print("protected", flush=True)
    sizes = ((1, 1), (37, 5), (515, 17), (512, 3))
    for (width, head_dim), mask in itertools.product(sizes, (last, last.unsqueeze(0))):
        columns = HEADS * head_dim
        weight, bias = fenced(columns, width), fenced(columns)
        out_weight, out_bias = fenced(width, columns), fenced(width)
        for tokens in TOKENS:
            x, heads = fenced(1, tokens, width), fenced(1, tokens, HEADS, head_dim)

            def run(x, weight, bias, heads, out_weight, out_bias, head_dim=head_dim, mask=mask):
                projected = sh.in_projection(x, weight, bias, mask, head_dim=head_dim, backend="cpu")
                return projected, sh.out_projection(heads.transpose(1, 2), out_weight, out_bias, mask, backend="cpu")

            tensors = [x, weight, bias, heads, out_weight, out_bias]
            for actual, expected in zip(run(*tensors), run(*map(torch.clone, tensors)), strict=True):
                torch.testing.assert_close(actual, expected)


def dense_in_projection() -> None:
    weight = forbid_rows(Mapped(torch.randn(HEADS * 64, 64)))
    print("protected", flush=True)
    F.linear(torch.randn(1, 3, 64), weight)


def dense_out_projection() -> None:
    weight = forbid_columns(Mapped(torch.randn(5, HEADS * 1024)))
    print("protected", flush=True)
    F.linear(torch.randn(1, 3, HEADS * 1024), weight)


def bert(dense: bool = False) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=192, num_attention_heads=HEADS, num_hidden_layers=2, intermediate_size=64, vocab_size=50
    )
    # 32 rows of 192 numbers: six pages a head.
    plain = BertModel(config).eval()
    attached = BertModel(config).eval()
    attached.load_state_dict(plain.state_dict())
    masks = torch.stack([MASK, ~MASK])
    # The same function with every head computed: what masked heads give meets columns of zeros.
    for layer, mask in zip(plain.encoder.layer, masks, strict=True):
        columns = layer.attention.output.dense.weight.data.unflatten(1, (HEADS, -1))
        columns[:, ~mask] = 0
    handle = sh.attach(attached, backend="cpu")
    handle.set_heads(masks)
    memory = []
    for layer, mask in zip(attached.encoder.layer, masks, strict=True):
        for projection in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
            memory.append(Mapped(projection.weight.data))
            projection.weight.data = forbid_rows(memory[-1], mask)
    print("protected", flush=True)
    if dense:
        handle.set_heads(None)
    exact = BertModel(config).eval().double()
    exact.load_state_dict({name: tensor.double() for name, tensor in plain.state_dict().items()})
    for shape in ((1, 1), (1, 5), (2, 8), (3, 43)):
        tokens = torch.randint(50, shape)
        with torch.no_grad():
            output = attached(tokens).last_hidden_state
            assert_close_to_reference(output, plain(tokens).last_hidden_state, exact(tokens).last_hidden_state)
        attached(tokens).last_hidden_state.square().sum().backward()
    for layer, mask in zip(attached.encoder.layer, masks, strict=True):
        gradient = layer.attention.self.value.weight.grad.unflatten(0, (HEADS, -1))
        assert (gradient[~mask] == 0).all() and (gradient[mask] != 0).any((1, 2)).all()


CASES = {
    "in_projection": lambda: [in_projection(torch.float32), in_projection(torch.bfloat16)],
    "in_projection_512": lambda: in_projection(torch.float32, head_dim=8, width=512),
    "in_projection_with_bias": in_projection_with_bias,
    "in_projection_per_request": lambda: [
        in_projection(torch.float32, mask=REQUESTS),
        in_projection(torch.bfloat16, mask=REQUESTS),
    ],
    "in_projection_with_bias_per_request": lambda: in_projection_with_bias(REQUESTS),
    "out_projection": out_projection,
    "out_projection_per_request": out_projection_per_request,
    "ends": ends,
    "dense_in_projection": dense_in_projection,
    "dense_out_projection": dense_out_projection,
    "bert": bert,
    "dense_bert": lambda: bert(dense=True),
}

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.manual_seed(0)
    torch.set_num_threads(2)
    CASES[sys.argv[1]]()
    print("done", flush=True)

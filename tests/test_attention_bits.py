"""Does the attention kernel run what it is asked to run and nothing else, to the same bits whatever runs beside?"""

from __future__ import annotations

import time

import pytest
import torch

from sparse_heads.ops.attention.api import attend
from sparse_heads.testing import items_run, random_attention_inputs

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CAUSAL = (-1, 0)
# Of 12 heads in 4 groups: what the request under test keeps.
OWN = torch.tensor([True, False, True, False, False, False, False, True, True, True, True, True])


def draw_inputs(batch: int, queries: int, keys: int, dtype: torch.dtype, head_dim: int = 32) -> list[torch.Tensor]:
    return list(random_attention_inputs(batch, 12, 4, queries, keys, head_dim, dtype=dtype))


def run(inputs, head_mask, attn_mask=None, span=CAUSAL) -> list[torch.Tensor]:
    """The output and the gradients of query, key, value and gate [B, H]."""
    gate = torch.linspace(-1, 2, 12).expand(len(inputs[0]), 12).clone()
    leaves = [tensor.detach().requires_grad_() for tensor in (*inputs, gate)]
    output = attend(*leaves[:3], head_mask, gate=leaves[3], attn_mask=attn_mask, span=span, backend="cpu")
    output_gradient = torch.sin(torch.arange(output[0].numel())).view(output[0].shape).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, output_gradient.expand_as(output))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 70), (5, 70), (40, 70)])
def test_a_hundred_random_neighbours_change_no_bit(queries, keys, dtype):
    generator = torch.Generator().manual_seed(5)
    inputs = [tensor.detach() for tensor in draw_inputs(4, queries, keys, dtype)]
    padding = torch.rand(4, 1, 1, keys, generator=generator) < 0.8
    first = None
    for density in torch.linspace(0, 1, 100):
        head_mask = torch.rand(4, 12, generator=generator) < density
        head_mask[2] = OWN
        own = [tensor[2] for tensor in run(inputs, head_mask, padding)]
        first = own if first is None else first
        assert all(torch.equal(*pair) for pair in zip(own, first, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 300), (2, 33), (5, 300), (40, 300)])
def test_a_request_alone_is_the_request_in_a_batch(queries, keys, dtype):
    inputs = [tensor.detach() for tensor in draw_inputs(3, queries, keys, dtype)]
    head_mask = torch.rand(3, 12, generator=torch.Generator().manual_seed(5)) < 0.5
    head_mask[1] = OWN
    together = run(inputs, head_mask)
    alone = run([tensor[1:2] for tensor in inputs], head_mask[1:2])
    shared = run([tensor[1:2] for tensor in inputs], OWN)
    for whole, one, other in zip(together, alone, shared, strict=True):
        assert torch.equal(whole[1:2], one) and torch.equal(one, other)


@pytest.mark.parametrize("queries", [1, 5, 130])
def test_runs_and_numbers_of_threads_change_no_bit(queries):
    inputs = [tensor.detach() for tensor in draw_inputs(4, queries, 300, torch.float32)]
    head_mask = torch.rand(4, 12, generator=torch.Generator().manual_seed(5)) < 0.7
    first = run(inputs, head_mask)
    for threads in (1, 2, 3, 2, 2):
        torch.set_num_threads(threads)
        assert all(torch.equal(*pair) for pair in zip(run(inputs, head_mask), first, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("queries", [1, 20])
def test_only_pairs_that_are_on_are_counted(queries, dtype):
    inputs = [tensor.detach() for tensor in draw_inputs(3, queries, 20, dtype)]
    head_mask = torch.stack([OWN, ~OWN, torch.zeros(12, dtype=torch.bool)])
    counts = []
    for mask in (None, OWN, head_mask, torch.zeros(12, dtype=torch.bool)):
        with items_run() as items:
            attend(*inputs, mask, backend="cpu")
        counts.append(items.attention)
    assert counts == [36, 3 * int(OWN.sum()), 12, 0]


def test_pairs_that_are_off_cost_no_time():
    """All off is at least five times as fast as all on: a wide margin for a busy machine."""
    inputs = [tensor.detach() for tensor in draw_inputs(2, 256, 256, torch.float32, 64)]

    def fastest(head_mask: torch.Tensor) -> float:
        return min(_seconds(lambda: attend(*inputs, head_mask, backend="cpu")) for _ in range(7))

    assert 5 * fastest(torch.zeros(2, 12, dtype=torch.bool)) < fastest(torch.ones(2, 12, dtype=torch.bool))


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


RAW = {
    "query": torch.zeros(2, 6, 4, 8),
    "key": torch.zeros(2, 3, 5, 8),
    "value": torch.zeros(2, 3, 5, 7),
    "head_mask": None,
    "kv_heads": None,
    "gate": None,
    "attn_mask": None,
    "sinks": None,
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("query", torch.zeros(6, 4, 8), "query: wanted dimensions 4, got 3"),
        ("key", torch.zeros(2, 3, 5, 8).double(), "key: wanted the dtype of the input, Float, got Double"),
        ("key", torch.zeros(2, 3, 5, 9), "key: wanted columns 8, got 9"),
        ("key", torch.zeros(1, 3, 5, 8), "key: wanted requests 2, got 1"),
        ("value", torch.zeros(2, 3, 6, 7), "value: wanted positions 5, got 6"),
        ("value", torch.zeros(2, 2, 5, 7), "value: wanted heads 3, got 2"),
        ("head_mask", torch.zeros(6), "head_mask: wanted bool, got Float"),
        ("head_mask", torch.zeros(5, dtype=torch.bool), "head_mask: wanted heads 6, got 5"),
        ("head_mask", torch.zeros(3, 6, dtype=torch.bool), "head_mask: wanted requests 2, got 3"),
        ("kv_heads", torch.zeros(6), "kv_heads: wanted a contiguous one-dimensional int64 tensor"),
        ("kv_heads", torch.zeros(5, dtype=torch.long), "kv_heads: wanted size 6, got 5"),
        ("kv_heads", torch.full((6,), 3), "kv_heads: wanted indices from 0 to 2, got 3"),
        ("gate", torch.zeros(6).double(), "gate: wanted float32, got Double"),
        ("attn_mask", torch.zeros(4, 4), "attn_mask: wanted size 1 or 5 in dimension 3 of 4, got 4"),
        ("attn_mask", torch.zeros(4, 5).long(), "attn_mask: wanted bool, float16, .*, got Long"),
        ("sinks", torch.zeros(1, 1, 6), "sinks: wanted 1 or 2 dimensions, got 3"),
    ],
)
def test_the_operator_refuses_what_it_cannot_walk(name, value, message):
    with items_run(), pytest.raises(RuntimeError, match=message):
        torch.ops.sparse_heads.attention_forward(*{**RAW, name: value}.values(), -1, -1, 1.0, 0.0)


def test_the_operator_wants_whole_groups():
    key, value = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 5, 7)
    with items_run(), pytest.raises(RuntimeError, match="key: wanted a number of heads that divides 6, got 4"):
        torch.ops.sparse_heads.attention_forward(*{**RAW, "key": key, "value": value}.values(), -1, -1, 1.0, 0.0)

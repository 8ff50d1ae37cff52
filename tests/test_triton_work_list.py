"""Do the work lists name exactly the heads that are on, in their order?"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_inputs import DEVICE, draw_mask

from sparse_heads._triton.work_list import attention_work_list

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")


def check(
    head_mask: torch.Tensor | None, kv_heads: list[int] | None, batch: int, heads: int, num_kv_heads: int
) -> None:
    """The list that the kernels write against one made by hand."""
    given_map = None if kv_heads is None else torch.tensor(kv_heads, device=DEVICE)
    given_mask = None if head_mask is None else head_mask.to(DEVICE)
    work = attention_work_list(given_mask, given_map, batch, heads, num_kv_heads, DEVICE)
    reads = [head // (heads // num_kv_heads) for head in range(heads)] if kv_heads is None else kv_heads
    active = torch.ones(batch, heads) if head_mask is None else head_mask.expand(batch, heads)
    items = []
    for request, row in enumerate(active.tolist()):
        expected = sorted((head for head in range(heads) if row[head]), key=lambda head: (reads[head], head))
        assert work.heads[request, : len(expected)].tolist() == expected
        read = [reads[head] for head in expected]
        items += [[request, kv, read.index(kv), read.count(kv)] for kv in range(num_kv_heads) if kv in read]
    assert work.count.tolist() == [len(items)]
    assert work.items[: len(items)].tolist() == items
    assert {tensor.dtype for tensor in work} == {torch.int32}
    assert [list(tensor.shape) for tensor in work] == [[batch, heads], [batch * num_kv_heads, 4], [1]]


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 3), (12, 12), (36, 4), (40, 1), (96, 8), (96, 96)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_masks(shared, batch, heads, kv_heads):
    check(draw_mask(heads) if shared else draw_mask(batch, heads), None, batch, heads, kv_heads)


def test_many_requests():
    check(draw_mask(40, 12), None, 40, 12, 6)


def test_many_heads():
    check(draw_mask(2, 1024), None, 2, 1024, 128)


def test_more_pairs_than_one_step_counts():
    check(draw_mask(18, 128), None, 18, 128, 128)


@pytest.mark.parametrize(
    "kv_heads", [[0, 0, 0, 1, 2, 2], [2, 0, 1, 0, 2, 2], [3, 3, 3, 3, 3, 3], [0, 4, 0, 4, 1, 4]], ids=str
)
@pytest.mark.parametrize("masked", [True, False])
def test_any_query_head_reads_any_key_head(masked, kv_heads):
    check(draw_mask(3, 6) if masked else None, kv_heads, 3, 6, 5)


def test_all_off():
    check(torch.zeros(3, 6, dtype=torch.bool), None, 3, 6, 3)
    check(torch.zeros(6, dtype=torch.bool), None, 3, 6, 3)


def test_some_requests_off():
    head_mask = draw_mask(5, 6)
    head_mask[[0, 3, 4]] = False
    check(head_mask, None, 5, 6, 3)


def test_no_requests():
    check(draw_mask(6), None, 0, 6, 3)


def test_layouts_of_masks():
    check(draw_mask(6, 3).T, None, 3, 6, 3)
    check(draw_mask(3, 12)[:, ::2], None, 3, 6, 3)
    check(draw_mask(1, 6).expand(3, 6), None, 3, 6, 3)


@st.composite
def problems(draw_from):
    batch, num_kv_heads, group = (draw_from(st.integers(1, most)) for most in (40, 12, 8))
    heads, seed = num_kv_heads * group, draw_from(st.integers(0, 999))
    kv_heads = None
    if draw_from(st.booleans()):
        kv_heads = draw_from(st.lists(st.integers(0, num_kv_heads - 1), min_size=heads, max_size=heads))
    return draw_mask(batch, heads, seed=seed), kv_heads, batch, heads, num_kv_heads


@settings(max_examples=20)
@given(problems())
def test_any_problem(problem):
    check(*problem)

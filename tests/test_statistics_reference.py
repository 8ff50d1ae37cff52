"""Do attention statistics mean what they say: with both backends, by hand in float64 and in cases known in advance?"""

from __future__ import annotations

import math

import pytest
import torch
from statistics_inputs import HEAD_MASK, by_hand, draw, draw_groups, draw_inputs, draw_mask, stack

from sparse_heads.ops.statistics import attention_statistics
from sparse_heads.ops.statistics import probabilities as pieces

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")

BACKENDS = ["reference", "cpu"]
LOWEST = torch.finfo(torch.float64).min


def added_mask(*shape: int) -> torch.Tensor:
    """Biases, with some keys hidden by -inf and others by the minimum of the dtype."""
    mask = draw(*shape).masked_fill(~draw_mask(*shape, seed=1), -math.inf)
    return mask.masked_fill(~draw_mask(*shape, seed=2), LOWEST)


# For B, H, H_kv, T, S, D = 2, 6, 3, 7, 9, 5.
CASES = {
    "plain": {},
    "a mask for all requests": {"head_mask": HEAD_MASK[0]},
    "a mask a request": {"head_mask": HEAD_MASK},
    "causal": {"is_causal": True},
    "window": {"window": 3},
    "window of two sides": {"window": (2, 1)},
    "causal window": {"window": (4, 3), "is_causal": True},
    "scale": {"scale": -2.0},
    "softcap": {"softcap": 1.5, "scale": 3.0},
    "padding": {"attn_mask": torch.tensor([[True] * 9, [True] * 5 + [False] * 4])[:, None, None]},
    "a bool mask a head": {"attn_mask": draw_mask(2, 6, 7, 9), "is_causal": True},
    "an added mask": {"attn_mask": added_mask(2, 1, 7, 9)},
    "an added mask a head": {"attn_mask": added_mask(6, 7, 9)},
    "biases for all": {"attn_mask": draw(9)},
    "query mask": {"query_mask": draw_mask(2, 7)},
    "key groups": {"key_groups": draw_groups(2, 9, 3)},
    "int32 key groups": {"key_groups": draw_groups(2, 9, 2).int()},
    "everything": {
        "head_mask": HEAD_MASK,
        "attn_mask": added_mask(2, 1, 7, 9),
        "is_causal": True,
        "scale": 0.7,
        "softcap": 2.0,
        "window": 6,
        "query_mask": draw_mask(2, 7, seed=3),
        "key_groups": draw_groups(2, 9, 4),
    },
}


def assert_same(actual, expected) -> None:
    """To some roundings of float64, NaN at the same places."""
    torch.testing.assert_close(stack(actual), stack(expected), rtol=1e-11, atol=1e-13, equal_nan=True)
    assert torch.equal(actual.count, expected.count)
    assert (actual.group_mass is None) == (expected.group_mass is None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_by_hand(case, backend):
    arguments = {**draw_inputs(2, 6, 3, 7, 9, 5), **CASES[case]}
    assert_same(attention_statistics(**arguments, backend=backend), by_hand(**arguments))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 2), (2, 1), (5, 3), (17, 17), (40, 33)])
def test_by_hand_at_other_sizes(queries, keys, is_causal, backend):
    arguments = {**draw_inputs(1, 2, 1, queries, keys, 3), "is_causal": is_causal}
    assert_same(attention_statistics(**arguments, backend=backend), by_hand(**arguments))


def test_the_reference_gives_the_same_in_pieces(monkeypatch):
    arguments = {**draw_inputs(2, 6, 3, 7, 9, 5), **CASES["everything"]}
    monkeypatch.setattr(pieces, "CHUNK_SCORES", 2 * 6 * 9 * 3)
    assert_same(attention_statistics(**arguments, backend="reference"), by_hand(**arguments))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_scores(dtype, backend):
    """Entropy 1, sparsity 0, and every key the same share."""
    query, key = torch.zeros(1, 2, 5, 4, dtype=dtype), draw(1, 2, 16, 4).to(dtype)
    found = attention_statistics(query, key, key_groups=draw_groups(1, 16, 3), backend=backend)
    atol = 1e-6 if dtype != torch.float64 else 1e-14
    # The last of the five queries has no next position.
    expected = torch.tensor([1, 0, 1 / 16, 1 / 16, 1 / 16, 4 / 5 / 16], dtype=torch.float64)
    torch.testing.assert_close(stack(found)[..., :6], expected.expand(1, 2, 6).clone(), rtol=0, atol=atol)
    torch.testing.assert_close(
        found.group_mass[0, 0], torch.tensor([4, 4, 4]) / 16.0, rtol=0, atol=atol, check_dtype=False
    )
    assert found.count.tolist() == [5] and all(field.dtype == torch.float64 for field in found[:3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_one_key_alone(offset, backend):
    """Queries that see one position and no other: entropy 0, sparsity 1, confidence 1, and all mass there."""
    key = 40 * torch.eye(10)[None, None]
    has_one = (torch.arange(10) + offset).clamp(0, 9) == torch.arange(10) + offset
    found = attention_statistics(key.roll(-offset, 2), key, scale=1.0, query_mask=has_one[None], backend=backend)
    expected = torch.nn.functional.one_hot(torch.tensor(4 + offset), 6) + torch.tensor([0, 1, 1, 0, 0, 0])
    assert stack(found)[0, 0].tolist() == expected.tolist()
    assert found.count.tolist() == [10 - abs(offset)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_count(backend):
    inputs = draw_inputs(2, 4, 2, 3, 5, 4)
    one_key = torch.zeros(2, 1, 1, 5, dtype=torch.bool)
    one_key[0, ..., 2] = True
    for options in (
        {"attn_mask": one_key},
        {"query_mask": torch.zeros(2, 3, dtype=torch.bool)},
        {"head_mask": torch.zeros(4, dtype=torch.bool)},
        {"attn_mask": torch.full((5,), LOWEST, dtype=torch.float64)},
    ):
        found = attention_statistics(**inputs, **options, backend=backend)
        assert stack(found).isnan().all() and found.count.tolist() == [0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(0, 4, 2, 3, 5), (2, 0, 0, 3, 5), (2, 4, 2, 0, 5), (2, 4, 2, 3, 0)], ids=str)
def test_empty_inputs(sizes, backend):
    batch, heads, _, _, keys = sizes
    groups = torch.zeros(batch, keys, dtype=torch.int64)
    found = attention_statistics(**draw_inputs(*sizes, 4), key_groups=groups, num_groups=2, backend=backend)
    assert found.group_mass.shape == (batch, heads, 2) and found.position_mass.shape == (batch, heads, 3)
    assert stack(found).isnan().all() and torch.equal(found.count, torch.zeros(batch, dtype=torch.int64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_number_of_groups(backend):
    inputs = draw_inputs(1, 2, 2, 3, 6, 4)
    groups = torch.tensor([[-5, 0, 0, 2, -1, 2]])
    default = attention_statistics(**inputs, key_groups=groups, backend=backend).group_mass
    more = attention_statistics(**inputs, key_groups=groups, num_groups=5, backend=backend).group_mass
    none = attention_statistics(**inputs, key_groups=torch.full((1, 6), -1), backend=backend).group_mass
    assert default.shape == (1, 2, 3) and more.shape == (1, 2, 5) and none.shape == (1, 2, 0)
    assert torch.equal(more[..., :3], default) and (more[..., 3:] == 0).all() and (default[..., 1] == 0).all()
    all_keys = attention_statistics(**inputs, key_groups=groups * 0, backend=backend).group_mass
    torch.testing.assert_close(all_keys, torch.ones_like(all_keys))


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_that_see_other_keys_count_for_themselves(backend):
    inputs = draw_inputs(1, 2, 2, 3, 4, 4)
    attn_mask = torch.ones(2, 3, 4, dtype=torch.bool)
    attn_mask[1, :2, 1:] = False
    found = attention_statistics(**inputs, attn_mask=attn_mask, backend=backend)
    last = attention_statistics(inputs["query"][:, :, 2:], inputs["key"], backend=backend)
    assert found.count.tolist() == [3]
    torch.testing.assert_close(found.entropy[:, 1], last.entropy[:, 1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_keys_under_the_minimum_of_the_dtype_are_hidden(dtype, backend):
    """As transformers' eager masks have it."""
    inputs = {name: tensor.to(dtype) for name, tensor in draw_inputs(2, 4, 2, 3, 6, 4).items()}
    seen = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])[:, None, None]
    added = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    expected = attention_statistics(**inputs, attn_mask=seen, backend=backend)
    actual = attention_statistics(**inputs, attn_mask=added, backend=backend)
    assert torch.equal(stack(actual), stack(expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_have_no_gradient(backend):
    inputs = {name: tensor.requires_grad_() for name, tensor in draw_inputs(1, 2, 2, 3, 4, 4).items()}
    found = attention_statistics(**inputs, backend=backend)
    assert not any(field is not None and field.requires_grad for field in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    inputs = draw_inputs(1, 2, 2, 3, 4, 4)
    expected = attention_statistics(**inputs, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_statistics(**inputs, backend=backend).entropy, expected.entropy)

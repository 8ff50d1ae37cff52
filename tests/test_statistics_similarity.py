"""Is head_similarity 1 minus the Jensen-Shannon divergence, over the queries that count?"""

from __future__ import annotations

import math

import pytest
import torch
from statistics_inputs import HEAD_MASK, draw, draw_inputs, draw_mask

from sparse_heads import errors
from sparse_heads.ops.statistics import head_similarity
from sparse_heads.ops.statistics import probabilities as pieces

pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand(probabilities: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """From [H, T, S] and [T], two heads and one query at a time."""
    heads, queries, _ = probabilities.shape
    result = torch.full((heads, heads), math.nan, dtype=torch.float64)
    for one in range(heads):
        for other in range(heads):
            divergences = []
            for t in range(queries):
                if not counted[t]:
                    continue
                pairs = list(zip(probabilities[one, t].tolist(), probabilities[other, t].tolist(), strict=True))
                kullback = [
                    sum(pair[i] * math.log2(2 * pair[i] / sum(pair)) for pair in pairs if pair[i] > 0) for i in (0, 1)
                ]
                divergences.append(sum(kullback) / 2)
            if divergences:
                result[one, other] = 1 - sum(divergences) / len(divergences)
    return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_by_hand(dtype, monkeypatch):
    monkeypatch.setattr(pieces, "CHUNK_SCORES", 200)
    inputs = draw_inputs(2, 6, 3, 7, 9, 5)
    attn_mask = torch.tensor([[True] * 9, [True] * 5 + [False] * 4])[:, None, None]
    query_mask = draw_mask(2, 7)
    found = head_similarity(
        *(tensor.to(dtype) for tensor in inputs.values()), attn_mask=attn_mask, query_mask=query_mask, scale=1.0
    )
    scores = inputs["query"] @ inputs["key"].repeat_interleave(2, 1).mT
    probabilities = scores.masked_fill(~attn_mask, -math.inf).softmax(-1)
    expected = torch.stack([by_hand(*request) for request in zip(probabilities, query_mask, strict=True)])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert torch.equal(found, found.mT) and (found.diagonal(dim1=1, dim2=2) == 1).all()


def test_equal_heads_and_heads_without_a_key_in_common():
    query = torch.eye(4)[[0, 0, 1]][None, :, None] * 50  # three heads, one query each
    found = head_similarity(query, torch.eye(4)[None, None].expand(1, 3, 4, 4) * 50)
    expected = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-7)


def test_masked_heads_and_requests_without_a_query_are_nan():
    inputs = draw_inputs(2, 6, 3, 4, 5, 8)
    off = ~HEAD_MASK[..., None, None]
    inputs["query"] = inputs["query"].masked_fill(off, math.nan)
    found = head_similarity(**inputs, head_mask=HEAD_MASK, is_causal=True)
    runs = HEAD_MASK[:, None] & HEAD_MASK[:, :, None]
    assert torch.equal(found.isnan(), ~runs)
    assert head_similarity(*(tensor[:, :, :1] for tensor in inputs.values())).isnan().all()
    assert head_similarity(draw(1, 3, 0, 4), draw(1, 3, 5, 4)).shape == (1, 3, 3)


def test_wrong_arguments():
    query = torch.zeros(2, 6, 4, 8)
    with pytest.raises(errors.InvalidArgumentError, match=r"query_mask: wanted \[B, T\] = \[2, 4\], got .*\[2, 5\]"):
        head_similarity(query, query, query_mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(errors.InvalidArgumentError, match="key: wanted a number of heads that divides"):
        head_similarity(query, query[:, :4])

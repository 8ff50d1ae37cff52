"""Is the reference right? Against loops over plain numbers, and against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_heads.ops.attention import attention
from sparse_heads.testing import assert_close_to_reference, random_attention_inputs

pytestmark = pytest.mark.usefixtures("one_thread")


def naive_attention(
    query, key, value, head_mask=None, gate=None, attn_mask=None, is_causal=False, scale=None, softcap=None,
    window=None, sinks=None,
):  # fmt: skip
    """The contract, one score at a time, in Python floats."""
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys, value_dim = value.shape[1:]
    output = torch.zeros(batch, heads, queries, value_dim, dtype=torch.float64)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(batch, heads, queries, keys)
    for b in range(batch):
        for h in range(heads):
            if head_mask is not None and not (head_mask[h] if head_mask.dim() == 1 else head_mask[b, h]):
                continue
            kv_head = h * kv_heads // heads
            for t in range(queries):
                weights = {}
                own = keys - queries + t
                for s in range(keys):
                    score = sum(query[b, h, t, d].item() * key[b, kv_head, s, d].item() for d in range(head_dim))
                    score *= 1 / math.sqrt(head_dim) if scale is None else scale
                    if softcap is not None:
                        score = softcap * math.tanh(score / softcap)
                    if attn_mask is not None and attn_mask.dtype == torch.bool and not attn_mask[b, h, t, s]:
                        continue
                    if attn_mask is not None and attn_mask.dtype != torch.bool:
                        score += attn_mask[b, h, t, s].item()
                    if is_causal and s > own:
                        continue
                    if isinstance(window, int) and window != -1 and not own - window < s <= own:
                        continue
                    if isinstance(window, tuple) and window[0] != -1 and s < own - window[0]:
                        continue
                    if isinstance(window, tuple) and window[1] != -1 and s > own + window[1]:
                        continue
                    weights[s] = math.exp(score)
                total = sum(weights.values())
                if total == 0:
                    continue
                if sinks is not None:
                    total += math.exp(sinks[h].item())
                for s, weight in weights.items():
                    output[b, h, t] += weight / total * value[b, kv_head, s].double()
            if gate is not None:
                output[b, h] *= gate[h] if gate.dim() == 1 else gate[b, h]
    return output


BATCH, HEADS, QUERIES, KEYS = 2, 4, 3, 5
GENERATOR = torch.Generator().manual_seed(1)
ADDED = torch.randn(BATCH, 1, QUERIES, KEYS, generator=GENERATOR, dtype=torch.float64)
ADDED_WITH_DEAD_ROW = ADDED.clone()
ADDED_WITH_DEAD_ROW[1, 0, 2] = -math.inf
ADDED_WITH_DEAD_ROW[0, 0, 0, 1] = -math.inf
ALLOWED = torch.rand(BATCH, HEADS, QUERIES, KEYS, generator=GENERATOR) < 0.6
ALLOWED[0, 1, 1] = False
PER_REQUEST = torch.tensor([[True, False, False, True], [False, True, False, False]])
GATE = torch.tensor([1.5, 0.0, -2.0, 0.3], dtype=torch.float64)
SINKS = torch.tensor([0.5, -math.inf, -1.0, 3.0], dtype=torch.float64)

CASES = {
    "plain": {},
    "shared mask": {"head_mask": torch.tensor([True, False, True, True])},
    "per-request mask": {"head_mask": PER_REQUEST},
    "gate": {"gate": GATE},
    "per-request gate and mask": {"gate": GATE * torch.tensor([[1.0], [-3.0]]), "head_mask": PER_REQUEST},
    "bool mask": {"attn_mask": ALLOWED},
    "key padding": {"attn_mask": ALLOWED[:, :1, :1]},
    "one-dimensional mask": {"attn_mask": ALLOWED[0, 0, 0]},
    "added mask": {"attn_mask": ADDED},
    "added mask with -inf": {"attn_mask": ADDED_WITH_DEAD_ROW, "is_causal": True},
    "causal": {"is_causal": True},
    "causal with a bool mask": {"is_causal": True, "attn_mask": ALLOWED},
    "scale": {"scale": 0.3},
    "zero scale": {"scale": 0},
    "softcap before the added mask": {"softcap": 0.7, "scale": 2.0, "attn_mask": ADDED},
    "window": {"window": 2},
    "causal window": {"window": 2, "is_causal": True},
    "unlimited window": {"window": -1},
    "two-sided window": {"window": (1, 1)},
    "left window": {"window": (2, -1)},
    "right window": {"window": (-1, 0)},
    "two-sided causal window": {"window": (1, 1), "is_causal": True},
    "window that hides one key from the last query": {"window": (KEYS - 2, -1)},
    "window that hides one key from the first query": {"window": (-1, QUERIES - 2)},
    "own position only": {"window": (0, 0)},
    "sinks": {"sinks": SINKS},
    "everything": {
        "head_mask": PER_REQUEST, "gate": GATE, "attn_mask": ADDED_WITH_DEAD_ROW, "is_causal": True, "scale": 0.8,
        "softcap": 2.0, "window": (2, 1), "sinks": SINKS,
    },
}  # fmt: skip


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("case", CASES)
def test_matches_loops_over_numbers(case, kv_heads):
    inputs = random_attention_inputs(BATCH, HEADS, kv_heads, QUERIES, KEYS, 3, 2, dtype=torch.float64)
    actual = attention(*inputs, **CASES[case], backend="reference")
    torch.testing.assert_close(actual, naive_attention(*inputs, **CASES[case]), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("queries", "keys"), [(5, 3), (1, 4), (3, 3)])
@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"window": 2}, {"window": (1, 0)}, {"window": (0, 2)}], ids=str
)
def test_positions_are_aligned_at_the_end(queries, keys, options):
    inputs = random_attention_inputs(1, 2, 1, queries, keys, 3, dtype=torch.float64)
    actual = attention(*inputs, **options, backend="reference")
    torch.testing.assert_close(actual, naive_attention(*inputs, **options), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("per_request", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_every_gradient_matches_finite_differences(per_request, softcap):
    inputs = random_attention_inputs(2, 4, 2, 2, 3, 2, 1, dtype=torch.float64)
    head_mask = PER_REQUEST if per_request else PER_REQUEST[0]
    gate = (GATE * torch.tensor([[1.0], [-3.0]]) if per_request else GATE.clone()).requires_grad_()
    added = ADDED[:1, :, :2, :3].clone().requires_grad_()
    sinks = torch.tensor([0.5, -2.0, -1.0, 3.0], dtype=torch.float64, requires_grad=True)

    def run(query, key, value, gate, added, sinks):
        options = {"is_causal": True, "window": 2, "softcap": softcap, "backend": "reference"}
        return attention(query, key, value, head_mask, gate=gate, attn_mask=added, sinks=sinks, **options)

    assert torch.autograd.gradcheck(run, (*inputs, gate, added, sinks))


def test_can_be_differentiated_twice():
    inputs = random_attention_inputs(1, 2, 2, 3, 3, 2, dtype=torch.float64)
    gate = torch.tensor([0.0, 0.7], dtype=torch.float64, requires_grad=True)

    def run(query, key, value, gate):
        return attention(query, key, value, gate=gate, backend="reference")

    assert torch.autograd.gradgradcheck(run, (*inputs, gate))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    inputs = [tensor.detach() for tensor in random_attention_inputs(2, 4, 2, 17, 63, 16, dtype=dtype)]

    def run(inputs):
        return attention(*inputs, PER_REQUEST, is_causal=True, softcap=5.0, backend="reference")

    actual = run(inputs)
    wide = run([tensor.float() for tensor in inputs])
    exact = run([tensor.double() for tensor in inputs])
    assert torch.equal(actual, wide.to(dtype))
    assert_close_to_reference(actual, wide.to(dtype), exact)

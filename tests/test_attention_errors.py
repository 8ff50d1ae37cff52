"""Does every wrong argument of attention raise an error that names it, what was wanted and what came?"""

from __future__ import annotations

import math

import pytest
import torch

from sparse_heads import errors
from sparse_heads.ops.attention import attention

QUERY, KEY, VALUE = torch.zeros(2, 6, 4, 8), torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 5, 7)
TYPE, VALUE_ERROR = errors.InvalidTypeError, errors.InvalidArgumentError
META = {"device": "meta"}

WRONG = {
    "query of numbers": ({"query": [1.0]}, TYPE, r"query: wanted a tensor \[B, H, T, D\], got list \[1.0\]"),
    "integer query": ({"query": QUERY.long()}, TYPE, r"query: wanted float16, .*, got a int64 tensor"),
    "query of three dimensions": ({"query": QUERY[0]}, VALUE_ERROR, r"query: .*\[B, H, T, D\], got .*\[6, 4, 8\]"),
    "query without features": ({"query": QUERY[..., :0]}, VALUE_ERROR, "query: wanted a head dimension of 1 or more"),
    "key of another dtype": ({"key": KEY.double()}, TYPE, r"key: .*torch.float32, got a float64 tensor"),
    "value of another dtype": ({"value": VALUE.bfloat16()}, TYPE, "value: .*got a bfloat16 tensor"),
    "key on another device": ({"key": torch.zeros(2, 3, 5, 8, **META)}, VALUE_ERROR, "key: .*cpu, got .* on meta"),
    "key of three dimensions": ({"key": KEY[0]}, VALUE_ERROR, r"key: wanted a tensor \[B, H_kv, S, D\]"),
    "key of another batch": ({"key": KEY[:1]}, VALUE_ERROR, r"key: wanted \[2, H_kv, S, 8\] .*got .*\[1, 3, 5, 8\]"),
    "key of another width": ({"key": KEY[..., :4]}, VALUE_ERROR, r"key: wanted \[2, H_kv, S, 8\]"),
    "groups that do not divide": (
        {"key": torch.zeros(2, 4, 5, 8), "value": torch.zeros(2, 4, 5, 7)},
        VALUE_ERROR,
        "key: wanted a number of heads that divides the 6 of query",
    ),
    "no key heads": ({"key": KEY[:, :0], "value": VALUE[:, :0]}, VALUE_ERROR, "key: wanted a number of heads"),
    "no query heads": ({"query": QUERY[:, :0]}, VALUE_ERROR, "key: wanted a number of heads that divides the 0"),
    "value of another length": ({"value": VALUE[:, :, :4]}, VALUE_ERROR, r"value: wanted \[2, 3, 5, Dv\]"),
    "value of other heads": ({"value": VALUE[:, :1]}, VALUE_ERROR, r"value: wanted \[2, 3, 5, Dv\]"),
    "float head mask": ({"head_mask": torch.ones(6)}, TYPE, r"head_mask: wanted a bool tensor \[H\] = \[6\]"),
    "list as head mask": ({"head_mask": [True] * 6}, TYPE, "head_mask: wanted a bool tensor .*got list"),
    "head indices": ({"head_mask": torch.tensor([0, 1])}, TYPE, "head_mask: wanted a bool tensor .*int64"),
    "head mask of other heads": ({"head_mask": torch.ones(3).bool()}, VALUE_ERROR, r"head_mask: .*got .*\[3\]"),
    "head mask of other requests": ({"head_mask": torch.ones(1, 6).bool()}, VALUE_ERROR, r"head_mask: .*\[2, 6\]"),
    "head mask per token": (
        {"head_mask": torch.ones(2, 6, 4).bool()},
        VALUE_ERROR,
        r"head_mask: .*masks per token are not supported.*got .*\[2, 6, 4\]",
    ),
    "head mask elsewhere": ({"head_mask": torch.ones(6, **META).bool()}, VALUE_ERROR, "head_mask: .*on meta"),
    "bool gate": ({"gate": torch.ones(6).bool()}, TYPE, "gate: wanted a float16, .*got a bool tensor"),
    "number as gate": ({"gate": 1.0}, TYPE, "gate: .*got float 1.0"),
    "gate of other heads": ({"gate": torch.ones(2, 3)}, VALUE_ERROR, r"gate: wanted \[H\] = \[6\] or .*\[2, 6\]"),
    "gate per token": ({"gate": torch.ones(2, 6, 4)}, VALUE_ERROR, "gate: wanted"),
    "gate elsewhere": ({"gate": torch.ones(6, **META)}, VALUE_ERROR, "gate: .*on meta"),
    "gate of NaN": ({"gate": torch.tensor([1.0, math.nan] * 3)}, VALUE_ERROR, "gate: wanted finite values, got 3"),
    "gate of inf": ({"gate": torch.full((2, 6), math.inf)}, VALUE_ERROR, "gate: wanted finite values, got 12"),
    "mask of integers": ({"attn_mask": torch.ones(4, 5).long()}, TYPE, "attn_mask: wanted bool, float32 or the dtype"),
    "mask of another float": ({"attn_mask": torch.ones(4, 5).half()}, TYPE, "attn_mask: .*got a float16 tensor"),
    "number as mask": ({"attn_mask": 0}, TYPE, "attn_mask: wanted a bool or floating tensor, got int 0"),
    "mask of another length": (
        {"attn_mask": torch.ones(4, 4)},
        VALUE_ERROR,
        r"attn_mask: .*\[2, 6, 4, 5\], got .*\[4, 4\]",
    ),
    "mask of other heads": ({"attn_mask": torch.ones(3, 4, 5)}, VALUE_ERROR, r"attn_mask: .*got .*\[3, 4, 5\]"),
    "padding mask [B, S]": ({"attn_mask": torch.ones(2, 5).bool()}, VALUE_ERROR, r"attn_mask: .*got .*\[2, 5\]"),
    "mask of five dimensions": ({"attn_mask": torch.ones(1, 2, 6, 4, 5)}, VALUE_ERROR, "attn_mask: "),
    "mask elsewhere": ({"attn_mask": torch.ones(4, 5, **META)}, VALUE_ERROR, "attn_mask: .*on meta"),
    "number as is_causal": ({"is_causal": 1}, TYPE, "is_causal: wanted True or False, got int 1"),
    "text as scale": ({"scale": "small"}, TYPE, "scale: wanted a number or None, got small"),
    "tensor as scale": ({"scale": torch.tensor(0.1)}, TYPE, "scale: wanted a number or None, got a float32 tensor"),
    "infinite scale": ({"scale": math.inf}, VALUE_ERROR, "scale: wanted .* finite in float32, got float inf"),
    "zero softcap": ({"softcap": 0.0}, VALUE_ERROR, "softcap: wanted .* above 0 in float32, got float 0.0"),
    "NaN softcap": ({"softcap": math.nan}, VALUE_ERROR, "softcap: wanted .* above 0 in float32, got float nan"),
    "scale beyond float32": ({"scale": -1e300}, VALUE_ERROR, "scale: wanted .* finite in float32, got float -1e\\+300"),
    "scale beyond floats": ({"scale": 10**400}, VALUE_ERROR, "scale: wanted .* finite in float32, got int 10"),
    "softcap beyond float32": ({"softcap": 1e300}, VALUE_ERROR, "softcap: .* finite .* in float32, got float 1e"),
    "softcap that float32 rounds to 0": ({"softcap": 1e-50}, VALUE_ERROR, "softcap: .* above 0 in float32, got .*e-50"),
    "bool softcap": ({"softcap": True}, TYPE, "softcap: wanted a number or None, got bool True"),
    "window of nothing": ({"window": 0}, VALUE_ERROR, "window: wanted an int of 1 or more .*got int 0"),
    "negative window": ({"window": -2}, VALUE_ERROR, "window: .*got int -2"),
    "negative side": ({"window": (3, -2)}, VALUE_ERROR, r"window: .*got tuple \(3, -2\)"),
    "window of three": ({"window": (1, 2, 3)}, VALUE_ERROR, r"window: .*got tuple \(1, 2, 3\)"),
    "window of floats": ({"window": (1.0, 2)}, TYPE, "window: .*got tuple"),
    "window as text": ({"window": "all"}, TYPE, "window: .*got all"),
    "bool window": ({"window": True}, TYPE, "window: .*got bool True"),
    "integer sinks": ({"sinks": torch.zeros(6).long()}, TYPE, "sinks: wanted a float16, .*got a int64 tensor"),
    "sinks per request": ({"sinks": torch.zeros(2, 6)}, VALUE_ERROR, r"sinks: wanted \[H\] = \[6\], got .*\[2, 6\]"),
    "sinks elsewhere": ({"sinks": torch.zeros(6, **META)}, VALUE_ERROR, "sinks: .*on meta"),
    "sinks of NaN": ({"sinks": torch.tensor([0.0, math.nan] * 3)}, VALUE_ERROR, "sinks: wanted finite .*got 3 that"),
    "infinite sinks": (
        {"sinks": torch.full((6,), math.inf), "head_mask": torch.tensor([[True] + [False] * 5] * 2)},
        VALUE_ERROR,
        "sinks: wanted finite values or -inf .*, got 1 that are NaN or inf",
    ),
    "unknown backend": (
        {"backend": "flash"},
        VALUE_ERROR,
        "backend: wanted one of 'auto', 'reference', 'sdpa', 'cpu', 'triton', got flash",
    ),
    "number as backend": ({"backend": 3}, VALUE_ERROR, "backend: wanted one of 'auto'.*got int 3"),
    "softcap on sdpa": ({"softcap": 1.0, "backend": "sdpa"}, errors.UnsupportedError, "softcap: .*'sdpa'.*'reference'"),
    "sinks on sdpa": ({"sinks": torch.zeros(6), "backend": "sdpa"}, errors.UnsupportedError, "sinks: .*'sdpa'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_raise_a_clear_error(case):
    arguments, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        attention(**{"query": QUERY, "key": KEY, "value": VALUE, **arguments})


def test_backends_without_an_attention_kernel_say_so():
    message = "backend: wanted one of .*'sdpa', 'cpu', 'triton', got 'cuda', which has no attention kernel yet"
    with pytest.raises(errors.BackendUnavailableError, match=message):
        attention(QUERY, KEY, VALUE, backend="cuda")


def test_errors_are_the_usual_python_errors():
    with pytest.raises(ValueError):
        attention(QUERY, KEY, VALUE, torch.ones(5).bool())
    with pytest.raises(TypeError):
        attention(QUERY, KEY, VALUE, torch.ones(6))


def test_options_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        attention(QUERY, KEY, VALUE, None, torch.ones(6))

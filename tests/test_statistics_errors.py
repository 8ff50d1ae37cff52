"""Does every wrong argument of attention_statistics raise an error that names it, what was wanted and what came?"""

from __future__ import annotations

import pytest
import torch

from sparse_heads import errors
from sparse_heads.ops.statistics import attention_statistics

QUERY, KEY = torch.zeros(2, 6, 4, 8), torch.zeros(2, 3, 5, 8)
GROUPS = torch.zeros(2, 5, dtype=torch.int64)
TYPE, VALUE = errors.InvalidTypeError, errors.InvalidArgumentError

WRONG = {
    "query of numbers": ({"query": [1.0]}, TYPE, r"query: wanted a tensor \[B, H, T, D\], got list \[1.0\]"),
    "key of another dtype": ({"key": KEY.double()}, TYPE, r"key: .*torch.float32, got a float64 tensor"),
    "key of three dimensions": ({"key": KEY[0]}, VALUE, r"key: wanted a tensor \[B, H_kv, S, D\]"),
    "groups that do not divide": ({"key": torch.zeros(2, 4, 5, 8)}, VALUE, "key: wanted a number of heads"),
    "float head mask": ({"head_mask": torch.ones(6)}, TYPE, r"head_mask: wanted a bool tensor \[H\] = \[6\]"),
    "head mask per token": (
        {"head_mask": torch.ones(2, 6, 4).bool()},
        VALUE,
        "head_mask: .*masks per token are not supported",
    ),
    "mask of another length": ({"attn_mask": torch.ones(4, 4)}, VALUE, r"attn_mask: .*\[2, 6, 4, 5\], got .*\[4, 4\]"),
    "number as is_causal": ({"is_causal": 1}, TYPE, "is_causal: wanted True or False, got int 1"),
    "text as scale": ({"scale": "small"}, TYPE, "scale: wanted a number or None, got small"),
    "zero softcap": ({"softcap": 0.0}, VALUE, "softcap: wanted .* above 0 in float32, got float 0.0"),
    "window of nothing": ({"window": 0}, VALUE, "window: wanted an int of 1 or more .*got int 0"),
    "integer query mask": ({"query_mask": torch.ones(2, 4).long()}, TYPE, r"query_mask: wanted a bool tensor \[B, T\]"),
    "list as query mask": ({"query_mask": [True] * 4}, TYPE, "query_mask: wanted a bool tensor .*got list"),
    "query mask of keys": ({"query_mask": torch.ones(2, 5).bool()}, VALUE, r"query_mask: .*\[2, 4\], got .*\[2, 5\]"),
    "query mask for all": ({"query_mask": torch.ones(4).bool()}, VALUE, r"query_mask: .*\[2, 4\], got .*\[4\]"),
    "query mask elsewhere": (
        {"query_mask": torch.ones(2, 4, dtype=torch.bool, device="meta")},
        VALUE,
        "query_mask: wanted the device of query, cpu, got .* on meta",
    ),
    "float key groups": ({"key_groups": GROUPS.float()}, TYPE, r"key_groups: wanted an int32 or int64 tensor \[B, S\]"),
    "key groups of queries": ({"key_groups": GROUPS[:, :4]}, VALUE, r"key_groups: .*\[2, 5\], got .*\[2, 4\]"),
    "key groups elsewhere": ({"key_groups": GROUPS.to("meta")}, VALUE, "key_groups: .*cpu, got .* on meta"),
    "a group too many": (
        {"key_groups": GROUPS + 3, "num_groups": 3},
        VALUE,
        "key_groups: .*num_groups, 3, got group 3",
    ),
    "number of no groups": ({"num_groups": 3}, VALUE, "num_groups: wanted None without key_groups, got int 3"),
    "negative number": ({"key_groups": GROUPS, "num_groups": -1}, VALUE, "num_groups: wanted an int of 0 .*got int -1"),
    "bool as number": ({"key_groups": GROUPS, "num_groups": True}, TYPE, "num_groups: wanted .*got bool True"),
    "unknown backend": ({"backend": "sdpa"}, VALUE, "backend: wanted one of 'auto', 'reference', 'cpu', got sdpa"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_raise_a_clear_error(case):
    arguments, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        attention_statistics(**{"query": QUERY, "key": KEY, **arguments})


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_backends_without_a_kernel_say_so(backend):
    with pytest.raises(errors.BackendUnavailableError, match=f"got '{backend}', which has no statistics kernel yet"):
        attention_statistics(QUERY, KEY, backend=backend)

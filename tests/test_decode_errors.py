"""Does every wrong argument of decoding raise an error that names it, what was wanted and what came?"""

from __future__ import annotations

import math
import sys

import pytest
import torch

from sparse_heads import _native, attention_decode, errors
from sparse_heads.ops.decode import operators

ROOM = {
    "query": torch.zeros(2, 6, 3, 8),
    "key_cache": torch.zeros(2, 3, 40, 8),
    "value_cache": torch.zeros(2, 3, 40, 7),
    "cache_lengths": torch.tensor([40, 3]),
}
PAGED = {
    "query": torch.zeros(2, 6, 3, 8),
    "key_cache": torch.zeros(5, 16, 3, 8),
    "value_cache": torch.zeros(5, 16, 3, 7),
    "cache_lengths": torch.tensor([33, 16], dtype=torch.int32),
    "block_table": torch.tensor([[4, 0, 2], [1, 99, -1]], dtype=torch.int32),
}
TYPE, VALUE = errors.InvalidTypeError, errors.InvalidArgumentError
META = {"device": "meta"}

WRONG = {
    "query of numbers": ({"query": [1.0]}, TYPE, r"query: wanted a tensor \[B, H, T_q, D\], got list \[1.0\]"),
    "integer query": ({"query": ROOM["query"].long()}, TYPE, "query: wanted float16, .*, got a int64 tensor"),
    "query of three dimensions": ({"query": ROOM["query"][0]}, VALUE, r"query: .*\[B, H, T_q, D\], got .*\[6, 3, 8\]"),
    "query without features": ({"query": torch.zeros(2, 6, 3, 0)}, VALUE, "query: wanted a head dimension of 1 or"),
    "nine positions": ({"query": torch.zeros(2, 6, 9, 8)}, VALUE, r"query: wanted T_q from 1 to 8 .*\[2, 6, 9, 8\]"),
    "no position": ({"query": torch.zeros(2, 6, 0, 8)}, VALUE, "query: wanted T_q from 1 to 8"),
    "keys of another dtype": ({"key_cache": ROOM["key_cache"].double()}, TYPE, "key_cache: .*got a float64 tensor"),
    "values of another dtype": ({"value_cache": ROOM["value_cache"].half()}, TYPE, "value_cache: .*a float16 tensor"),
    "keys elsewhere": ({"key_cache": torch.zeros(2, 3, 40, 8, **META)}, VALUE, "key_cache: .*cpu, got .* on meta"),
    "keys of three dimensions": ({"key_cache": ROOM["key_cache"][0]}, VALUE, r"key_cache: .*\[B, H_kv, S_max, D\]"),
    "keys of another batch": ({"key_cache": torch.zeros(1, 3, 40, 8)}, VALUE, r"key_cache: wanted \[2, H_kv, S_max, 8"),
    "keys of another width": ({"key_cache": torch.zeros(2, 3, 40, 4)}, VALUE, r"key_cache: .*got .*\[2, 3, 40, 4\]"),
    "values of another length": ({"value_cache": torch.zeros(2, 3, 39, 7)}, VALUE, r"value_cache: .*\[2, 3, 40, Dv\]"),
    "groups that do not divide": (
        {"key_cache": torch.zeros(2, 4, 40, 8), "value_cache": torch.zeros(2, 4, 40, 7)},
        VALUE,
        r"key_cache: wanted a number of heads H_kv in \[B, H_kv, S_max, D\] that divides the 6 of query",
    ),
    "no key heads": (
        {"key_cache": torch.zeros(2, 0, 40, 8), "value_cache": torch.zeros(2, 0, 40, 7)},
        VALUE,
        "key_cache: wanted a number of heads",
    ),
    "lengths as a list": ({"cache_lengths": [40, 3]}, TYPE, r"cache_lengths: wanted an int32 .*\[2\], got list"),
    "floating lengths": ({"cache_lengths": torch.ones(2)}, TYPE, "cache_lengths: .*got a float32 tensor"),
    "lengths of other requests": ({"cache_lengths": torch.tensor([3])}, VALUE, r"cache_lengths: wanted \[B\] = \[2\]"),
    "lengths elsewhere": ({"cache_lengths": torch.ones(2, **META).long()}, VALUE, "cache_lengths: .*on meta"),
    "a length beyond the cache": (
        {"cache_lengths": torch.tensor([40, 41])},
        VALUE,
        "cache_lengths: wanted lengths from T_q = 3 to S_max = 40, got 41 for request 1",
    ),
    "a length of 0": ({"cache_lengths": torch.tensor([0, 9])}, VALUE, "cache_lengths: .* got 0 for request 0"),
    "a negative length": ({"cache_lengths": torch.tensor([9, -9])}, VALUE, "cache_lengths: .* got -9 for request 1"),
    "a length without all queries": ({"cache_lengths": torch.tensor([2, 9])}, VALUE, "cache_lengths: .* got 2 for"),
    "float head mask": ({"head_mask": torch.ones(6)}, TYPE, r"head_mask: wanted a bool tensor \[H\] = \[6\]"),
    "head mask of other requests": ({"head_mask": torch.ones(1, 6).bool()}, VALUE, r"head_mask: .*\[2, 6\]"),
    "head mask per token": ({"head_mask": torch.ones(2, 6, 3).bool()}, VALUE, "head_mask: .*masks per token are not"),
    "head mask elsewhere": ({"head_mask": torch.ones(6, **META).bool()}, VALUE, "head_mask: .*on meta"),
    "gate of NaN": ({"gate": torch.tensor([1.0, math.nan] * 3)}, VALUE, "gate: wanted finite values, got 3"),
    "gate of other heads": ({"gate": torch.ones(2, 3)}, VALUE, r"gate: wanted \[H\] = \[6\] or .*\[2, 6\]"),
    "text as scale": ({"scale": "small"}, TYPE, "scale: wanted a number or None, got small"),
    "zero softcap": ({"softcap": 0.0}, VALUE, "softcap: wanted .* above 0 in float32, got float 0.0"),
    "window of nothing": ({"window": 0}, VALUE, "window: wanted an int of 1 or more .*got int 0"),
    "sinks per request": ({"sinks": torch.zeros(2, 6)}, VALUE, r"sinks: wanted \[H\] = \[6\], got .*\[2, 6\]"),
    "unknown backend": ({"backend": "sdpa"}, VALUE, "backend: wanted one of 'auto', 'reference', 'cpu', got sdpa"),
}
WRONG_PAGES = {
    "pages of 24": (
        {"key_cache": torch.zeros(5, 24, 3, 8), "value_cache": torch.zeros(5, 24, 3, 7)},
        VALUE,
        r"key_cache: wanted a page_size that is a multiple of 16 .*got .*\[5, 24, 3, 8\]",
    ),
    "pages of nothing": (
        {"key_cache": torch.zeros(5, 0, 3, 8), "value_cache": torch.zeros(5, 0, 3, 7)},
        VALUE,
        "key_cache: wanted a page_size",
    ),
    "no pages": (
        {"key_cache": torch.zeros(0, 16, 3, 8), "value_cache": torch.zeros(0, 16, 3, 7)},
        VALUE,
        "key_cache: wanted 1 page or more",
    ),
    "keys of another width": ({"key_cache": torch.zeros(5, 16, 3, 4)}, VALUE, r"key_cache: wanted \[pages, page_size"),
    "heads that do not divide": (
        {"key_cache": torch.zeros(5, 16, 4, 8), "value_cache": torch.zeros(5, 16, 4, 7)},
        VALUE,
        "key_cache: wanted a number of heads",
    ),
    "table as a list": ({"block_table": [[0]]}, TYPE, "block_table: wanted an int32 tensor .*got list"),
    "int64 table": ({"block_table": PAGED["block_table"].long()}, TYPE, "block_table: .*got a int64 tensor"),
    "table of other requests": ({"block_table": PAGED["block_table"][:1]}, VALUE, r"block_table: wanted \[B, pages_"),
    "flat table": ({"block_table": PAGED["block_table"].flatten()}, VALUE, r"block_table: .*\[2, pages_per_request\]"),
    "table elsewhere": ({"block_table": PAGED["block_table"].to("meta")}, VALUE, "block_table: .*on meta"),
    "a page too far": (
        {"block_table": torch.tensor([[4, 0, 5], [1, 9, 9]], dtype=torch.int32)},
        VALUE,
        r"block_table: wanted pages from 0 to 4, got 5 at \[0, 2\], which length 33 needs",
    ),
    "a negative page": (
        {"block_table": torch.tensor([[4, 0, 3], [-1, 9, 9]], dtype=torch.int32)},
        VALUE,
        r"block_table: .*got -1 at \[1, 0\], which length 16 needs",
    ),
    "a length beyond the table": (
        {"cache_lengths": torch.tensor([49, 3])},
        VALUE,
        r"cache_lengths: .* to pages_per_request \* page_size = 48, got 49 for request 0",
    ),
}
CASES = [(ROOM, case) for case in WRONG.values()] + [(PAGED, case) for case in WRONG_PAGES.values()]


@pytest.mark.parametrize(("right", "case"), CASES, ids=[*WRONG, *(f"paged: {name}" for name in WRONG_PAGES)])
def test_wrong_arguments_raise_a_clear_error(right, case):
    arguments, error, message = case
    with pytest.raises(error, match=message):
        attention_decode(**{**right, **arguments})


@pytest.mark.parametrize("right", [ROOM, PAGED], ids=["contiguous", "paged"])
def test_the_right_arguments_raise_none(right):
    assert attention_decode(**right).shape == (2, 6, 3, 7)


def lines_run(function) -> int:
    """Lines of Python."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def test_entries_that_fill_up_a_block_table_are_not_looked_at_one_by_one():
    _native.load()
    attention_decode(**PAGED)

    def padded(columns: int) -> dict:
        table = torch.full((2, columns), -1, dtype=torch.int32)
        table[:, :3] = torch.tensor([[4, 0, 2], [1, -1, -1]])
        return {**PAGED, "block_table": table}

    few, many = padded(4), padded(400)
    assert lines_run(lambda: attention_decode(**few)) == lines_run(lambda: attention_decode(**many))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_backends_without_a_decode_kernel_say_so(backend):
    message = f"backend: wanted one of 'auto', 'reference', 'cpu', got '{backend}', which has no decode kernel yet"
    with pytest.raises(errors.BackendUnavailableError, match=message):
        attention_decode(**ROOM, backend=backend)


@pytest.mark.parametrize("name", ["query", "key_cache", "value_cache", "gate", "sinks"])
def test_what_needs_a_gradient_is_refused_in_grad_mode(name):
    arguments = {**ROOM, "gate": torch.ones(6), "sinks": torch.zeros(6)}
    arguments[name] = arguments[name].clone().requires_grad_()
    message = f"{name}: wanted a tensor that needs no gradient, .*got one with requires_grad"
    with pytest.raises(errors.UnsupportedError, match=message):
        attention_decode(**arguments)
    with torch.no_grad():
        assert not attention_decode(**arguments).requires_grad


# What a compiled graph, which looks at no values, would hand to the kernel.
REFUSED = {
    "length": ({"cache_lengths": torch.tensor([41, 3])}, "cache_lengths: wanted lengths from 3 to 40, got 41 for"),
    "no length": ({"cache_lengths": torch.tensor([9, 0])}, "cache_lengths: wanted lengths from 3 to 40, got 0 for req"),
    "kv_heads": ({"kv_heads": torch.tensor([0, 0, 0, 3, 1, 1])}, "kv_heads: wanted indices from 0 to 2, got 3"),
    "page": (
        {"cache_lengths": torch.tensor([9, 16]), "block_table": torch.tensor([[1], [2]], dtype=torch.int32)},
        "block_table: wanted pages from 0 to 1, got 2 for request 1",
    ),
    "softcap": ({"softcap": 1e-50}, "softcap: wanted 0, or a number that is finite and above 0 in float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_operator_reads_nothing_outside(case):
    _native.load()
    options = dict.fromkeys(("head_mask", "kv_heads", "block_table", "gate", "sinks"))
    arguments, message = REFUSED[case]
    with pytest.raises(RuntimeError, match=message):
        operators.attention_decode(**{**ROOM, **options, "left": -1, "scale": 1.0, "softcap": 0.0, **arguments})

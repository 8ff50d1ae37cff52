"""Does the oracle of decoding say what `attention` says of every request, and are the bytes counted right?"""

from __future__ import annotations

import math

import pytest
import torch
from decode_inputs import draw, draw_inputs, in_pages, plain_decode

from sparse_heads import attention_decode
from sparse_heads.ops.decode import decode_bytes
from sparse_heads.ops.decode.api import decode

HEAD_MASK = torch.tensor([[True, False, True, True, False, False], [False] * 6, [True] * 6])
OPTIONS = {
    "plain": {},
    "shared mask": {"head_mask": HEAD_MASK[0]},
    "a mask a request": {"head_mask": HEAD_MASK},
    "gate a request": {"gate": draw(3, 6)},
    "mask and gate": {"head_mask": HEAD_MASK, "gate": draw(6)},
    "softcap": {"softcap": 2.0, "scale": 0.7},
    "sinks": {"sinks": draw(6), "head_mask": HEAD_MASK},
    "window": {"window": 5},
    "window as a pair": {"window": (9, 3)},
    "wide window": {"window": 1000},
}


def reference(**arguments):
    return attention_decode(**arguments, backend="reference")


@pytest.mark.parametrize("queries", [1, 3, 8])
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("case", OPTIONS)
def test_every_request_is_as_by_itself(case, kv_heads, queries):
    arguments = {**draw_inputs(6, kv_heads, queries, [17, 8, 40], 5, 7, room=43), **OPTIONS[case]}
    expected = plain_decode(**arguments)
    assert expected.isfinite().all()
    torch.testing.assert_close(reference(**arguments), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(reference(**in_pages(arguments, 16)), expected, rtol=0, atol=1e-13)


def test_masked_heads_and_what_is_behind_may_hold_anything():
    arguments = {**draw_inputs(6, 3, 2, [17, 8, 40], 5, room=43), "head_mask": HEAD_MASK, "gate": draw(3, 6)}
    expected = reference(**arguments)
    group_off = ~HEAD_MASK.unflatten(1, (3, 2)).any(-1)
    off = {"query": ~HEAD_MASK, "key_cache": group_off, "value_cache": group_off}
    poisoned = {name: arguments[name].masked_fill(heads[..., None, None], math.nan) for name, heads in off.items()}
    actual = reference(**{**arguments, **poisoned})
    assert torch.equal(actual, expected) and (actual[~HEAD_MASK] == 0).all() and (actual[HEAD_MASK] != 0).all()


def test_what_no_window_reaches_may_hold_anything():
    arguments = draw_inputs(2, 2, 3, [20, 9], 5)
    poisoned = dict(arguments)
    for name in ("key_cache", "value_cache"):
        poisoned[name] = arguments[name].clone()
        poisoned[name][0, :, :14] = poisoned[name][1, :, :3] = math.nan
    assert torch.equal(reference(**poisoned, window=4), reference(**arguments, window=4))


@pytest.mark.parametrize("paged", [False, True])
def test_wrong_lengths_and_pages_that_nobody_checked_give_nan_in_heads_that_run(paged):
    arguments = {**draw_inputs(6, 2, 2, [20, 9, 20, 30], 5), "head_mask": torch.tensor([True] * 5 + [False])}
    arguments = in_pages(arguments, 16) if paged else arguments
    right = reference(**arguments)
    if paged:
        arguments["key_cache"], arguments["value_cache"] = (
            arguments[name].transpose(1, 2) for name in ("key_cache", "value_cache")
        )
        arguments["block_table"][2, 1] = -1
    arguments["cache_lengths"] = torch.tensor([20, 1, 20 if paged else -5, 10**6])
    output = decode(**arguments, backend="reference")
    assert torch.equal(output[0], right[0])
    assert output[1:, :5].isnan().all() and (output[1:, 5] == 0).all()


def test_a_query_head_may_read_any_key_head():
    arguments = draw_inputs(4, 2, 1, [9, 5], 3)
    kv_heads = torch.tensor([1, 0, 0, 1])
    spread = {name: arguments[name][:, kv_heads] for name in ("key_cache", "value_cache")}
    expected = decode(**{**arguments, **spread}, backend="reference")
    assert torch.equal(decode(**arguments, kv_heads=kv_heads, backend="reference"), expected)


def count(dtype, kv_heads, **options):
    arguments = draw_inputs(4, kv_heads, 2, [10, 3], 8, 4)
    arguments = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in arguments.items()}
    return [each.tolist() for each in decode_bytes(**arguments, **options)]


def test_bytes_by_hand():
    # A position of a head: 8 + 4 numbers; queries: 2 x 8 numbers a head; output: 4 heads of 2 x 4 numbers.
    assert count(torch.float32, 4) == [[4 * 10 * 48, 4 * 3 * 48], [4 * 64] * 2, [128] * 2]
    assert count(torch.bfloat16, 2) == [[2 * 10 * 24, 2 * 3 * 24], [4 * 32] * 2, [64] * 2]
    # Heads 0 and 1 share a key/value head; the second request has none on.
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    assert count(torch.float32, 2, head_mask=mask) == [[480, 0], [2 * 64, 0], [128] * 2]
    assert count(torch.float32, 2, head_mask=torch.tensor([True, False, True, False])) == [
        [2 * 480, 2 * 3 * 48], [2 * 64] * 2, [128] * 2,
    ]  # fmt: skip
    # Two queries with a window of 4 see 5 positions together.
    assert count(torch.float32, 4, window=4) == [[4 * 5 * 48, 4 * 3 * 48], [4 * 64] * 2, [128] * 2]
    assert count(torch.float32, 4, window=-1) == count(torch.float32, 4)


def test_bytes_of_pages_are_those_of_the_positions():
    arguments = draw_inputs(4, 2, 1, [40, 17], 8)
    paged = in_pages(arguments, 16)
    assert decode_bytes(**paged).total() == decode_bytes(**arguments).total()
    assert decode_bytes(**arguments).total() == 2 * 57 * 128 + 2 * 4 * 64 + 2 * 4 * 64


def test_nothing_has_no_bytes():
    no_request = draw_inputs(4, 2, 1, [], 8, room=5)
    assert decode_bytes(**no_request).total() == 0
    assert decode_bytes(**in_pages(no_request, 16)).total() == 0
    assert decode_bytes(**draw_inputs(0, 0, 1, [3, 5], 8)).total() == 0

"""Sequences that an attached model and a dense oracle read side by side, each with a cache of its own."""

from __future__ import annotations

import pytest
import torch
from generation_inputs import LOOSE, TIGHT, gated_copy, request_masks
from models import build, masks
from transformers import DynamicCache, StaticCache

import sparse_heads as sh
from sparse_heads.errors import SparseHeadsError

IDS = torch.randint(5, 61, (3, 12), generator=torch.Generator().manual_seed(21))
SUBSETS = {name: mask for name, mask in masks(3).items()}
SUBSETS |= {f"{name}, per request": mask for name, mask in request_masks().items()}
OPTIONS = [{"kv": "all"}, {"layout": "wide"}, {"layout": "core"}]
UNEVEN = {"num_attention_heads": 8, "num_key_value_heads": 4}


def kept(*rows):
    """`[L, 4]` from each layer's kept heads."""
    return torch.tensor([[head in row for head in range(4)] for row in rows])


WIDE, INNER, OTHER = kept([0, 1], [1, 2], [0, 3]), kept([0], [], [3]), kept([0, 1], [2, 3], [0, 3])


def attached(name="llama_lm", dtype=torch.float64, **options):
    changes = UNEVEN if name == "gqa" else {}
    plain, model = build(name, dtype=dtype, **changes), build(name, dtype=dtype, **changes)
    handle = sh.attach(model, **options)
    return model, handle, gated_copy(plain, handle.layers, torch.ones(3, handle.layers.max_heads))


def new_cache(model, kind="dynamic", length=16):
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=length)


class Pair:
    """A sequence that an attached model and its oracle, which stores every head, read side by side."""

    def __init__(self, model, handle, oracle, kind="dynamic", rows=3):
        self.model, self.handle, self.oracle = model, handle, oracle
        self.cache, self.dense_cache = new_cache(model, kind), new_cache(oracle, kind)
        self.rows = torch.arange(rows)
        self.length = 0

    def step(self, subset, tokens):
        """Read `tokens` more; both must agree."""
        every = torch.ones(len(self.handle.layers), self.handle.layers.max_heads, dtype=torch.bool)
        self.oracle.head_mask = every if subset is None else subset
        ids = IDS[self.rows, self.length : self.length + tokens]
        with self.handle.use_heads(subset):
            result = self.model(ids, past_key_values=self.cache)
        expected = self.oracle(ids, past_key_values=self.dense_cache)
        self.length += tokens
        close = TIGHT if self.oracle.config._attn_implementation == "sdpa" else LOOSE
        torch.testing.assert_close(result.logits, expected.logits, **close)
        assert result.past_key_values is self.cache
        assert self.cache.get_seq_length() == self.length
        return result.logits

    def refuse(self, subset, *names, match=r"past_key_values", error=SparseHeadsError):
        """`subset` is refused by name, and nothing is written."""
        before = [layer.keys.clone() for layer in self.cache.layers]
        with pytest.raises(error, match=match) as caught, self.handle.use_heads(subset):
            self.model(IDS[self.rows, self.length : self.length + 1], past_key_values=self.cache)
        for name in names:
            assert name in str(caught.value)
        assert self.cache.get_seq_length() == self.length
        for layer, keys in zip(self.cache.layers, before, strict=True):
            assert torch.equal(layer.keys, keys)

    def both(self, change):
        for cache in (self.cache, self.dense_cache):
            change(cache)


def pair(name="llama_lm", kind="dynamic", **options):
    return Pair(*attached(name, **options), kind)

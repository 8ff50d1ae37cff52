"""Schema and fake of the decode operator, which has no gradient; the extension registers the CPU kernel.

Shapes and dtypes as in `api.attention_decode`, on checked arguments, but: paged caches come as [pages, H_kv, page_size,
D], in any strides; gate and sinks have the dtype of the arithmetic (float64 for float64 inputs, else float32); kv_heads
int64 [H] names the key/value head of every query head, None = h // (H / H_kv); a query sees `left` positions before its
own, -1 = all; softcap 0 is none. The output is laid out as [B, T, H, Dv].
"""

from __future__ import annotations

import torch
from torch import Tensor

torch.library.define(
    "sparse_heads::attention_decode",
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_lengths, Tensor? head_mask, Tensor? kv_heads,"
    " Tensor? block_table, Tensor? gate, Tensor? sinks, int left, float scale, float softcap) -> Tensor",
)

attention_decode = torch.ops.sparse_heads.attention_decode.default


@torch.library.register_fake("sparse_heads::attention_decode")
def _(query: Tensor, key_cache: Tensor, value_cache: Tensor, *_: object) -> Tensor:
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, value_cache.shape[3])).transpose(1, 2)

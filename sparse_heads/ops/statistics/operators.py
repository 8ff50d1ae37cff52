"""Schema and fake of the statistics operator, which has no gradient; the extension registers the CPU kernel.

Shapes and dtypes as in `api.attention_statistics`, on checked arguments, but: key_groups are int64, those outside
[0, num_groups) none; left and right are `visible_span`; masked scores from `hidden` down count as -inf; softcap 0 is
none.

The result is float64 [B, H, 7 + num_groups], sums over the counted queries, zeros for masked heads: 1 (their number),
entropy, sparsity, confidence, the probabilities of the previous, own and next position, and of every group.
"""

from __future__ import annotations

import torch
from torch import Tensor

torch.library.define(
    "sparse_heads::attention_statistics",
    "(Tensor query, Tensor key, Tensor? head_mask, Tensor? attn_mask, Tensor? query_mask,"
    " Tensor? key_groups, int num_groups, int left, int right, float hidden, float scale, float softcap) -> Tensor",
)

attention_statistics = torch.ops.sparse_heads.attention_statistics.default


@torch.library.register_fake("sparse_heads::attention_statistics")
def _(query: Tensor, key, head_mask, attn_mask, query_mask, key_groups, num_groups: int, *_: object):
    return query.new_empty((*query.shape[:2], 7 + num_groups), dtype=torch.float64)

"""Device functions of both directions: which rows a program has, which keys they see, and the scores of a tile.

Arguments that may be absent (attn_mask, softcap, left, right, items, ...) are None then, which Triton treats as a
constexpr: what they would need is not compiled.

A work item is a (request, key/value head) pair with `count` active query heads, heads[request, start : start + count].
Its T * count rows have the heads innermost (row r is token r // count of head r % count), so that the rows of a tile
are neighbouring tokens and share the range of keys that they see.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Sizes that nothing is gained by knowing: kernels are not compiled anew where one is 1 or a multiple of 16.
SIZES = ("item_count", "num_heads", "kv_heads", "tokens", "keys", "left", "right", "tiles", "turns")


@triton.jit
def work_item(items, item_count, kv_heads, tiles, turns, GROUP: tl.constexpr):
    """(request, key/value head, start, count, rank of the tile); count is 0 where the program has nothing to do.

    Programs take the tiles of `turns` items in turns, rank after rank, so that long tiles can go first and what runs
    at one time reads few keys. Without a list (items None) there are item_count items with GROUP heads each.
    """
    program = tl.program_id(0)
    number = tl.load(item_count) if items is not None else item_count
    first = program // (turns * tiles) * turns
    width = tl.maximum(tl.minimum(number - first, turns), 1)
    within = program % (turns * tiles)
    item = first + within % width
    runs = (first < number) & (within < width * tiles)
    rank = tl.where(runs, within // width, 0)
    if items is None:
        request = item // kv_heads
        kv_head = item % kv_heads
        start = kv_head * GROUP
        count = tl.where(runs, GROUP, 0)
    else:
        request = tl.load(items + item * 4, mask=runs, other=0)
        kv_head = tl.load(items + item * 4 + 1, mask=runs, other=0)
        start = tl.load(items + item * 4 + 2, mask=runs, other=0)
        count = tl.load(items + item * 4 + 3, mask=runs, other=0)
    return request, kv_head, start, count, rank


@triton.jit
def packed_rows(heads, num_heads, request, start, count, tokens, first_row, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """(token, head, whether there is such a row) of BLOCK rows from first_row. Those past the end repeat the last.

    GROUP: the most heads that an item can have, so that no row is divided where it is 1; heads: None = all run.
    """
    row = first_row + tl.arange(0, BLOCK)
    valid = row < tokens * count
    row = tl.minimum(row, tokens * count - 1)
    if GROUP == 1:
        token = row
        place = start + tl.zeros_like(row)
    else:
        token = row // count
        place = start + row % count
    head = place if heads is None else tl.load(heads + request.to(tl.int64) * num_heads + place)
    return token, head, valid


@triton.jit
def key_range(first_token, last_token, tokens, keys, left, right, BLOCK: tl.constexpr):
    """(low, full_low, full_high, high): blocks of keys from low to high hold all that first to last token see.

    Those from full_low to full_high are seen whole by each of them; the others need masks. All but high are multiples
    of BLOCK.
    """
    offset = keys - tokens
    low = 0
    full_low = 0
    high = keys
    full_high = keys
    if left is not None:
        low = tl.maximum(first_token + offset - left, 0)
        full_low = tl.maximum(last_token + offset - left, 0)
    if right is not None:
        high = tl.maximum(tl.minimum(last_token + offset + right + 1, keys), 0)
        full_high = tl.maximum(tl.minimum(first_token + offset + right + 1, keys), 0)
    low = low // BLOCK * BLOCK
    full_high = tl.maximum(full_high // BLOCK * BLOCK, low)
    full_low = tl.minimum(tl.cdiv(full_low, BLOCK) * BLOCK, full_high)
    return low, full_low, full_high, high


@triton.jit
def tanh(x):
    """To float32's precision in relative terms, near 0 too."""
    square = x * x
    # x^3 times a polynomial in x^2 fitted to 1e-9 of tanh for |x| < 0.55; further out the other form loses no digits.
    near = -0.00628247291
    near = near * square + 0.0210777581
    near = near * square - 0.0538538579
    near = near * square + 0.133326017
    near = near * square - 0.33333318
    near = near * square * x + x
    far = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2_E)) + 1.0)
    return tl.where(tl.abs(x) < 0.55, near, tl.where(x < 0, -far, far))


@triton.jit
def log2_scores(products, scale, softcap):
    """log2(e) times the scores before any mask, so that exp2 of them is exp of the scores."""
    if softcap is None:
        scores = products * (scale * LOG2_E)
    else:
        scores = softcap * tanh(products * scale * (1.0 / softcap)) * LOG2_E
    return scores


@triton.jit
def softcap_slope(products, scale, softcap):
    """Derivative of the capped scores by products * scale."""
    capped = tanh(products * scale * (1.0 / softcap))
    return 1.0 - capped * capped


@triton.jit
def masked(scores, attn_mask, key_stride, position, key, keys, left, right, BOUNDARY: tl.constexpr):
    """log2 scores with the masks applied, -inf where hidden, for a tile of either orientation.

    attn_mask: pointers to key 0 of each row, or None; position: that of each row, token + keys - tokens; key: indices;
    both shaped to broadcast, [M, 1] and [1, N] or the reverse. BOUNDARY: some key may be past the end or out of span.
    """
    if attn_mask is not None:
        pointers = attn_mask + key.to(tl.int64) * key_stride
        if BOUNDARY:
            mask = tl.load(pointers, mask=key < keys, other=0)
        else:
            mask = tl.load(pointers)
        if mask.dtype == tl.int1:
            scores = tl.where(mask, scores, -float("inf"))
        else:
            scores += mask.to(tl.float32) * LOG2_E
    if BOUNDARY:
        visible = key < keys
        if left is not None:
            visible &= key >= position - left
        if right is not None:
            visible &= key <= position + right
        scores = tl.where(visible, scores, -float("inf"))
    return scores


@triton.jit
def load_rows(pointers, column_stride, visible, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] from pointers to the rows' first elements; 0 in columns past COLUMNS and in rows not visible.

    visible: bool a row, or None = all.
    """
    column = tl.arange(0, BLOCK)
    pointers = pointers[:, None] + column.to(tl.int64)[None, :] * column_stride
    if visible is None:
        if COLUMNS == BLOCK:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=column[None, :] < COLUMNS, other=0.0)
    else:
        if COLUMNS == BLOCK:
            tile = tl.load(pointers, mask=visible[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=visible[:, None] & (column[None, :] < COLUMNS), other=0.0)
    return tile


@triton.jit
def store_rows(pointers, column_stride, tile, visible, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """The reverse of load_rows, in the dtype that lies there."""
    column = tl.arange(0, BLOCK)
    inside = visible[:, None] & (column[None, :] < COLUMNS)
    pointers = pointers[:, None] + column.to(tl.int64)[None, :] * column_stride
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=inside)

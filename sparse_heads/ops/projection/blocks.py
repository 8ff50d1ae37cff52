"""Blocks of `head_dim` neighbouring rows or columns, one a head: picked from a full width, put back into zeros."""

from __future__ import annotations

from torch import Tensor


def gather_blocks(tensor: Tensor, kept: Tensor, head_dim: int, dim: int) -> Tensor:
    """The kept heads' blocks along `dim` (`H*D` long), side by side: `kept*D` long. Others are not read."""
    dim = dim % tensor.dim()
    return tensor.unflatten(dim, (-1, head_dim)).index_select(dim, kept).flatten(dim, dim + 1)


def scatter_blocks(blocks: Tensor, kept: Tensor, head_dim: int, length: int, dim: int) -> Tensor:
    """The inverse of `gather_blocks`: zeros `length` long along `dim`, the kept heads' blocks filled in."""
    dim = dim % blocks.dim()
    blocks = blocks.unflatten(dim, (kept.shape[0], head_dim))
    shape = (*blocks.shape[:dim], length // head_dim, *blocks.shape[dim + 1 :])
    return blocks.new_zeros(shape).index_copy(dim, kept, blocks).flatten(dim, dim + 1)

"""Scaled dot-product attention in which a masked head is not computed."""

from sparse_heads.ops.attention.api import attention

__all__ = ["attention"]

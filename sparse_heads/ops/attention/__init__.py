"""Scaled dot-product attention in which a masked head is not computed."""

from .api import attention

__all__ = ["attention"]

"""Attention of a few new positions to a cache, of which heads that are off read nothing."""

from .api import attention_decode
from .traffic import DecodeBytes, decode_bytes

__all__ = ["DecodeBytes", "attention_decode", "decode_bytes"]

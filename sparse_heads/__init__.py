"""Multi-head attention in which a head that is switched off costs nothing.

`import sparse_heads as sh` is light: names that need transformers load it when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import errors
from ._version import __version__
from .heads import HeadScores, HeadSubset
from .layers import LayerInfo, Layers
from .means import HeadMeans
from .ops.attention.api import attention
from .ops.projection.api import in_projection, out_projection

if TYPE_CHECKING:
    from .integrations.transformers.attach import attach, get_handle
    from .integrations.transformers.scoring import score_heads

_LAZY = {
    "attach": "sparse_heads.integrations.transformers.attach",
    "get_handle": "sparse_heads.integrations.transformers.attach",
    "score_heads": "sparse_heads.integrations.transformers.scoring",
}

__all__ = [
    "HeadMeans",
    "HeadScores",
    "HeadSubset",
    "LayerInfo",
    "Layers",
    "__version__",
    "attach",
    "attention",
    "errors",
    "get_handle",
    "in_projection",
    "out_projection",
    "score_heads",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'sparse_heads' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

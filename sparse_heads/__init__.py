"""Multi-head attention in which a head that is switched off costs nothing.

`import sparse_heads as sh` is light: names that need transformers load it when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import errors
from ._version import __version__
from .gates.dsp import DSPConfig
from .gates.l0 import HardConcreteConfig
from .gates.layerwise import LayerwiseConfig
from .heads import HeadScores, HeadSubset
from .layers import LayerInfo, Layers
from .means import HeadMeans
from .ops.attention.api import attention
from .ops.decode.api import attention_decode
from .ops.projection.api import in_projection, out_projection
from .ops.statistics.api import AttentionStatistics, attention_statistics

if TYPE_CHECKING:
    from .integrations.transformers.attach import attach, get_handle
    from .integrations.transformers.gates import Gates, attach_gates
    from .integrations.transformers.interventions import head_means
    from .integrations.transformers.scoring import score_heads
    from .integrations.transformers.trainer import GatesCallback
    from .integrations.transformers.training import recover, train_gates

_TRANSFORMERS = {
    "Gates": "gates",
    "GatesCallback": "trainer",
    "attach": "attach",
    "attach_gates": "gates",
    "get_handle": "attach",
    "head_means": "interventions",
    "recover": "training",
    "score_heads": "scoring",
    "train_gates": "training",
}

__all__ = [
    "AttentionStatistics",
    "DSPConfig",
    "Gates",
    "GatesCallback",
    "HardConcreteConfig",
    "HeadMeans",
    "HeadScores",
    "HeadSubset",
    "LayerInfo",
    "Layers",
    "LayerwiseConfig",
    "__version__",
    "attach",
    "attach_gates",
    "attention",
    "attention_decode",
    "attention_statistics",
    "errors",
    "get_handle",
    "head_means",
    "in_projection",
    "out_projection",
    "recover",
    "score_heads",
    "train_gates",
]


def __getattr__(name: str) -> Any:
    if name not in _TRANSFORMERS:
        raise AttributeError(f"module 'sparse_heads' has no attribute {name!r}")
    module = importlib.import_module(f"sparse_heads.integrations.transformers.{_TRANSFORMERS[name]}")
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

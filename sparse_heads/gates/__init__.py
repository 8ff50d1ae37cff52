"""Gate methods: how the choice of heads is learned. They know numbers and layers, and no model."""

from .config import GateConfig
from .dsp import DSPConfig, DSPGates
from .l0 import HardConcreteConfig, HardConcreteGates
from .layerwise import LayerwiseConfig, LayerwiseGates
from .method import GateMethod

__all__ = [
    "DSPConfig",
    "DSPGates",
    "GateConfig",
    "GateMethod",
    "HardConcreteConfig",
    "HardConcreteGates",
    "LayerwiseConfig",
    "LayerwiseGates",
]

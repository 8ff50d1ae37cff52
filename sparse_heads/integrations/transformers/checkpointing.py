"""Gradient checkpointing that recomputes a layer under the record of its own forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from .calls import open_calls, run_in_call

if TYPE_CHECKING:
    from .handle import Handle

_ATTRIBUTE = "_gradient_checkpointing_func"


class CarryCall:
    """Wraps a checkpoint function so that forward and recomputation of a layer share one record."""

    def __init__(self, handle: Handle, function: Callable) -> None:
        self.handle = handle
        self.function = function

    def __call__(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        return self.function(partial(run_in_call, open_calls(self.handle), forward), *args, **kwargs)


def carry_calls(handle: Handle, modules: list[nn.Module]) -> None:
    """Wrap the checkpoint function of each module that has one and is not wrapped yet."""
    for module in modules:
        function = module.__dict__.get(_ATTRIBUTE)
        if function is not None and not isinstance(function, CarryCall):
            setattr(module, _ATTRIBUTE, CarryCall(handle, function))


def restore(modules: list[nn.Module]) -> None:
    """Undo `carry_calls`."""
    for module in modules:
        function = module.__dict__.get(_ATTRIBUTE)
        if isinstance(function, CarryCall):
            setattr(module, _ATTRIBUTE, function.function)


def checkpointed_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers may give a checkpoint function, now or later."""
    return [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]

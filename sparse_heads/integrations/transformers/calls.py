"""Which subset a forward runs under: overrides of the thread or task, and the record that one forward keeps.

A record, once opened, is what every layer of that forward reads: also a recomputation by gradient checkpointing that
runs after `use_heads` was left, or in a thread of autograd's own.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import DetachedError
from .selection import Selection

if TYPE_CHECKING:
    from .handle import Handle
    from .recording import Recording


Fill = tuple[Tensor | None, ...]


class Running(NamedTuple):
    """What a forward runs.

    selection: None where all heads run; scale: float `[L, H]` or `[B, L, H]`, multiplies heads' outputs.
    fill: of each layer what stands in for the heads that are off, as `fill.fill_of` gives it.
    """

    selection: Selection | None
    scale: Tensor | None = None
    fill: Fill | None = None


@dataclass(eq=False)
class Override:
    """One `use_heads` block; `outer` is the block around it."""

    handle: Handle
    running: Running
    outer: Override | None


@dataclass(eq=False)
class Call:
    """One forward of an attached model.

    selection, scale, fill: as in `Running`, the selection fitted to `cache`, which the forward continues; chosen: the
    selection before it was fitted.
    rows: of the batch, where a whole model (`part`) runs and not a layer by itself.
    """

    handle: Handle
    selection: Selection | None
    scale: Tensor | None = None
    fill: Fill | None = None
    outer: Call | None = None
    rows: int | None = None
    part: nn.Module | None = None
    cache: Any = None
    rows_outside: list[int | None] = field(default_factory=list)  # of the models around the one that runs
    recording: Recording | None = None  # while the forward runs inside a `record` block

    def __post_init__(self) -> None:
        self.chosen = self.selection


_overrides: ContextVar[Override | None] = ContextVar("sparse_heads_overrides", default=None)
_calls: ContextVar[Call | None] = ContextVar("sparse_heads_calls", default=None)


def enter_override(handle: Handle, running: Running) -> Override:
    """Open a `use_heads` block in this thread or task."""
    override = Override(handle, running, _overrides.get())
    _overrides.set(override)
    return override


def leave_override(override: Override) -> None:
    """Close that `use_heads` block, wherever it stands among those that are open."""
    inner, current = None, _overrides.get()
    while current is not None and current is not override:
        inner, current = current, current.outer
    if inner is not None:
        inner.outer = override.outer
    elif current is override:
        _overrides.set(override.outer)


def new_call(handle: Handle) -> Call:
    """A record of the innermost `use_heads` of this thread or task, else of attached gates, else of `set_heads`."""
    override = _overrides.get()
    while override is not None:
        if override.handle is handle:
            return Call(handle, *override.running)
        override = override.outer
    if handle.gates is not None:
        return Call(handle, *handle.gates.running())
    return Call(handle, handle.default_call.selection, fill=handle.default_call.fill)


def current_call(handle: Handle) -> Call:
    """The record of the forward that runs; a layer called directly gets one of its own."""
    call = _calls.get()
    if call is None:
        return handle.default_call if _overrides.get() is None and handle.gates is None else new_call(handle)
    return call if call.handle is handle else open_call(handle) or new_call(handle)


def open_calls(handle: Handle) -> Call:
    """All records that are open in this thread, with one for `handle` among them."""
    call = _calls.get()
    if open_call(handle) is None:
        call = new_call(handle)
        call.outer = _calls.get()
    return call


def open_call(handle: Handle) -> Call | None:
    """The innermost record of a forward of this handle's model that is open in this thread."""
    call = _calls.get()
    while call is not None and call.handle is not handle:
        call = call.outer
    return call


def enter_call(call: Call) -> None:
    """Open the record of a forward."""
    call.outer = _calls.get()
    _calls.set(call)


def drop_call(call: Call) -> None:
    """Forget a record that an interrupted forward left open, and those inside it."""
    _calls.set(call.outer)


def leave_call(handle: Handle, part: nn.Module) -> Call | None:
    """Close the innermost record if it is that of a forward of `part` under `handle`."""
    call = _calls.get()
    if call is None or call.handle is not handle or call.part is not part:
        return None
    _calls.set(call.outer)
    return call


def run_in_call(call: Call, function: Any, *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)` under `call` and those around it, whatever records the thread has open."""
    _check_attached(call)
    saved = _calls.get()
    _calls.set(call)
    try:
        return function(*args, **kwargs)
    finally:
        _calls.set(saved)


def _check_attached(call: Call | None) -> None:
    """A layer that is recomputed after `detach` would run heads that its forward did not."""
    while call is not None:
        if not call.handle.attached and (call.selection is not None or call.scale is not None):
            raise DetachedError("handle: detached before the backward pass that recomputes a checkpointed layer")
        call = call.outer


@torch.compiler.disable(reason="sparse_heads looks up which heads run at every call")
def outside_graph(function: Any, *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)` in eager mode, as a break of the graph that `torch.compile` traces."""
    return function(*args, **kwargs)

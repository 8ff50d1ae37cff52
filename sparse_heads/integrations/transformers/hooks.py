"""Hooks of an attached model and of the models inside it: a forward from outside opens a record, and closes it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ...errors import SparseHeadsWarning, UnsupportedError
from . import attention, caches, checkpointing
from .calls import Call, drop_call, enter_call, leave_call, new_call, open_call, outside_graph
from .record import open_records
from .recording import Recording
from .selection import Selection

if TYPE_CHECKING:
    from .handle import Handle

Hook = tuple[nn.Module, Callable, Callable]  # a part of the model, with what runs before and after its forward


def install(handle: Handle) -> list[Hook]:
    """Hook the root and every transformers model in it."""
    hooks: list[Hook] = []
    for part in handle.model.modules():
        if part is handle.model or isinstance(part, PreTrainedModel):
            parameters = list(inspect.signature(part.forward).parameters)
            hooks.append((part, partial(_open, handle, parameters), partial(_close, handle)))
            part.register_forward_pre_hook(hooks[-1][1], with_kwargs=True, prepend=True)
            part.register_forward_hook(hooks[-1][2], always_call=True)
    return hooks


def remove(hooks: list[Hook]) -> None:
    """Undo `install`."""
    for part, before, after in hooks:
        _remove(part._forward_pre_hooks, before, part._forward_pre_hooks_with_kwargs)
        _remove(part._forward_hooks, after, part._forward_hooks_always_called)


def _remove(registered: dict, function: Callable, also: dict) -> None:
    for identity in [identity for identity, hook in registered.items() if hook is function]:
        del registered[identity]
        also.pop(identity, None)


def _open(handle: Handle, parameters: list[str], module: nn.Module, args: tuple, kwargs: dict) -> None:
    if torch.compiler.is_compiling():
        return outside_graph(_open, handle, parameters, module, args, kwargs)
    given = {**dict(zip(parameters, args, strict=False)), **kwargs}
    call = open_call(handle)
    if call is not None and (module is handle.model or call.part is module):
        drop_call(call)  # no model runs inside itself: an interrupt has kept its hook from running
        call = None
    outermost = call is None
    if outermost:
        call = new_call(handle)
        call.part = module
        records = open_records(handle)
        call.recording = Recording(records) if records else None
        # Open from here on: the post-hook closes it whatever is raised below.
        enter_call(call)
    call.rows_outside.append(call.rows)
    main = _main_input(module, given)
    call.rows = None if main is None else main.shape[0]
    if call.recording is not None:
        call.recording.enter(given, main)
    cache = given.get("past_key_values")
    if cache is not None and cache is not call.cache:
        call.selection = _continue(call, cache, 0 if main is None else main.shape[1])
        call.cache = cache
    if outermost:
        _check_call(call, given)
    if handle.core or (call.selection is not None and call.selection.needs_attention):
        attention.install(handle)
    elif call.recording is not None:
        attention.refresh(handle)


def _check_call(call: Call, given: dict) -> None:
    """Warn of and refuse what a forward that begins cannot honour; see that its checkpoints carry the record."""
    if given.get("head_mask") is not None:
        warnings.warn(
            "head_mask: transformers 5 ignores this argument; use handle.set_heads(mask) or handle.use_heads(mask)",
            SparseHeadsWarning,
            stacklevel=3,
        )
    if torch.is_grad_enabled():
        checkpointing.carry_calls(call.handle, call.handle.checkpointed)
    if call.selection is not None or (call.handle.core and call.scale is not None):
        _refuse_probabilities(call.part, given)
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] != 1 and call.selection is not None:
        for row in call.selection.rows:
            if row is not None and not row.needs_attention:
                raise UnsupportedError(
                    f"attention_mask: wanted one for all heads in layer {row.layer.name}, whose own attention runs "
                    f"with fewer of them, got {list(mask.shape)} (layout='wide' takes one for every head)"
                )


def _continue(call: Call, cache: Any, positions: int) -> Selection | None:
    """What a forward of `positions` more runs: the selection, fitted to the heads that the cache holds."""
    handle, selection = call.handle, call.chosen
    if not isinstance(cache, Cache):
        if selection is None:
            return None
        raise UnsupportedError(f"past_key_values: wanted a transformers Cache, got {type(cache).__name__}")
    stored = caches.stored_in(cache)
    if stored is None and selection is None:
        return None
    subset = handle.every_head if selection is None else selection.subset
    if stored is None or not stored.was_last(handle, subset, call.rows):
        if caches.is_empty(cache):
            stored = caches.record(cache, subset, selection, call.rows)
            caches.drop_emptied(cache, stored)
        else:
            stored = stored or caches.record_all(cache, handle.layers)
            caches.check_continues(stored, subset, call.rows)
            stored.selection = handle.select(subset, stored.masks)
        stored.last = (handle, subset, call.rows)
    caches.check_room(cache, positions)
    return stored.selection


def _main_input(module: nn.Module, given: dict) -> Tensor | None:
    """What has the rows of the batch and the new positions: the main input, or else the first tensor `[B, T, ...]`."""
    names = ("decoder_input_ids", "decoder_inputs_embeds", "inputs_embeds", getattr(module, "main_input_name", ""))
    first = (given.get(name) for name in names)
    for value in (*first, *given.values()):
        if isinstance(value, Tensor) and value.dim() > 1:
            return value
    return None


def _refuse_probabilities(module: nn.Module, given: dict) -> None:
    wanted = given.get("output_attentions")
    if wanted or (wanted is None and getattr(getattr(module, "config", None), "output_attentions", False)):
        raise UnsupportedError(
            "output_attentions: heads that are off have no attention probabilities; use all heads, or pass False"
        )


def _close(handle: Handle, module: nn.Module, args: tuple, output: Any) -> None:
    if torch.compiler.is_compiling():
        return outside_graph(_close, handle, module, args, output)
    call = open_call(handle)
    if call is None:
        return
    if call.selection is not None:
        cache = caches.cache_in(output)
        if cache is not None and caches.stored_in(cache) is None:
            caches.record(cache, call.selection.subset, call.selection, call.rows)
    if call.rows_outside:
        call.rows = call.rows_outside.pop()
    if call.recording is not None:
        call.recording.leave()
    if leave_call(handle, module) is not None:
        call.recording = None  # a layer that the backward pass recomputes is not another forward

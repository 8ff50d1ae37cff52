"""The handle of an attached model: which heads run, for everyone or inside a block; undo."""

from __future__ import annotations

import inspect
import os
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import DetachedError, SparseHeadsWarning, UnsupportedError, invalid, invalid_type
from ...heads import HeadSubset
from ...layers import Layers
from . import checkpointing
from .calls import Call, current_call, enter_call, enter_override, leave_call, leave_override, new_call, outside_graph
from .projections import InProjection, OutProjection, Site
from .selection import Selection, select

Subset = HeadSubset | Tensor | Mapping | None
_ATTRIBUTE = "_sparse_heads"


class Handle:
    """What `attach` returns. `layers`: the attached attention layers, in row order of every mask.

    A handle follows its model through `deepcopy` and pickling: the copy has a handle of its own.
    """

    def __init__(
        self, model: nn.Module, layers: Layers, projections: list[dict[str, nn.Linear]], backend: str, options: tuple
    ) -> None:
        self.model = model
        self.layers = layers
        self.backend = backend
        self.options = options
        self.default_call = Call(self, None)  # what a layer runs under outside `use_heads` and any forward
        self.sites = [Site(self, row, layers[row], each) for row, each in enumerate(projections)]
        self._checkpointed = checkpointing.checkpointed_modules(model)
        self._parameters = _parameters(model)
        self._guards = [
            (part, partial(_guard_call, self, _parameters(part)))
            for part in model.modules()
            if isinstance(part, PreTrainedModel) and part is not model
        ]
        self.attached = True
        for site in self.sites:
            for role, module in site.projections.items():
                _become(module, OutProjection if role == "output" else InProjection)
                module.__dict__[_ATTRIBUTE] = (site, role)
        model.__dict__[_ATTRIBUTE + "_handle"] = self
        model.register_forward_pre_hook(_open_call, with_kwargs=True, prepend=True)
        model.register_forward_hook(_close_call, always_call=True)
        for part, guard in self._guards:
            part.register_forward_pre_hook(guard, with_kwargs=True)
        checkpointing.carry_calls(self, self._checkpointed)

    def __repr__(self) -> str:
        state = "detached" if not self.attached else "all heads" if self.subset is None else repr(self.subset)
        return f"Handle({type(self.model).__name__}, {len(self.layers)} layers, {state})"

    @property
    def subset(self) -> HeadSubset | None:
        """What `set_heads` said: None while every head is on."""
        selection = self.default_call.selection
        return None if selection is None else selection.subset

    def set_heads(self, subset: Subset) -> None:
        """Choose the heads that run from now on, in every thread that is not inside `use_heads`.

        Args:
            subset: a `HeadSubset`, a bool tensor `[L, H]` (True = the head runs), a dict `{layer index or name: kept
                heads}` (layers not named keep all), or None for all heads.

        Raises:
            SubsetMismatchError: the subset belongs to another model.
            ValueError, TypeError: wrong shape or dtype, an index out of range or repeated.
        """
        self.default_call = Call(self, self._select(subset))

    @contextmanager
    def use_heads(self, subset: Subset, *, scale: Tensor | None = None) -> Iterator[None]:
        """As `set_heads`, inside the `with` block and this thread or task only; None means all heads.

        A forward keeps what it began with: its backward pass may follow outside the block.

        Args:
            subset: as in `set_heads`.
            scale: float `[L, H]`, or `[B, L, H]` with a row a request, multiplies heads' outputs before the output
                projection; differentiable, exact also at 0.
        """
        selection = self._select(subset)
        if scale is not None:
            self._check_scale(scale)
        enter_override(self, selection, scale)
        try:
            yield
        finally:
            leave_override()

    def bind(self, subset: Subset) -> BoundModel:
        """A callable view of the model under `subset`, to hand to other threads."""
        self._select(subset)
        return BoundModel(self, subset)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Save the subset of `set_heads` (not the model); `HeadSubset.from_pretrained` reads it."""
        self._check_attached()
        subset = self.subset
        if subset is None:
            subset = HeadSubset(torch.ones(len(self.layers), self.layers.max_heads, dtype=torch.bool), self.layers)
        subset.save_pretrained(directory)

    def detach(self) -> None:
        """Give the model back as it was found; the handle cannot be used afterwards. Twice is harmless."""
        if not self.attached:
            return
        self.attached = False
        for site in self.sites:
            for module in site.projections.values():
                del module.__dict__[_ATTRIBUTE]
                _become(module, nn.Linear)
        for part, guard in self._guards:
            _remove_hook(part._forward_pre_hooks, guard, part._forward_pre_hooks_with_kwargs)
        del self.model.__dict__[_ATTRIBUTE + "_handle"]
        _remove_hook(self.model._forward_pre_hooks, _open_call, self.model._forward_pre_hooks_with_kwargs)
        _remove_hook(self.model._forward_hooks, _close_call, self.model._forward_hooks_always_called)
        checkpointing.restore(self._checkpointed)

    def _check_attached(self) -> None:
        if not self.attached:
            raise DetachedError("handle: detached; attach the model again")

    def _select(self, subset: Subset) -> Selection | None:
        self._check_attached()
        checkpointing.carry_calls(self, self._checkpointed)
        devices = [site.projections["query"].weight.device for site in self.sites]
        return select(self._as_subset(subset), devices)

    def _check_scale(self, scale: Tensor) -> None:
        rows = (len(self.layers), self.layers.max_heads)
        wanted = f"a floating-point tensor [{rows[0]}, {rows[1]}] or [B, {rows[0]}, {rows[1]}]"
        if not isinstance(scale, Tensor) or not scale.is_floating_point():
            raise invalid_type("scale", wanted, scale)
        if scale.dim() not in (2, 3) or scale.shape[-2:] != rows:
            raise invalid("scale", wanted, scale)
        if scale.device.type == "cpu" and bool(scale.detach().isnan().any()):
            raise invalid("scale", "numbers", "NaN")

    def _as_subset(self, subset: Subset) -> HeadSubset | None:
        if subset is None:
            return None
        if isinstance(subset, HeadSubset):
            return subset.remap(self.layers)
        if isinstance(subset, Mapping):
            return HeadSubset.from_kept(subset, self.layers)
        if isinstance(subset, Tensor):
            return HeadSubset(subset, self.layers)
        raise invalid_type("subset", "a HeadSubset, a bool tensor [L, H], a dict of kept heads or None", subset)


class BoundModel:
    """A view of an attached model that runs under its own subset; every other attribute is the model's."""

    def __init__(self, handle: Handle, subset: Subset) -> None:
        self._handle = handle
        self._subset = subset

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._handle.use_heads(self._subset):
            return self._handle.model(*args, **kwargs)

    forward = __call__

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate` under the subset."""
        with self._handle.use_heads(self._subset):
            return self._handle.model.generate(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_handle", "_subset"):
            raise AttributeError(name)
        return getattr(self._handle.model, name)


def _become(module: nn.Module, kind: type[nn.Linear]) -> None:
    """Reassign the class; a forward that accelerate keeps on the instance is bound to the new class too."""
    module.__class__ = kind
    if "_old_forward" in module.__dict__:
        module._old_forward = types.MethodType(kind.forward, module)
    elif "forward" in module.__dict__:
        del module.__dict__["forward"]  # left by accelerate when its hook was removed; the class has the same


def _remove_hook(hooks: dict, function: Any, also: dict) -> None:
    for identity in [identity for identity, hook in hooks.items() if hook is function]:
        del hooks[identity]
        also.pop(identity, None)


def _open_call(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    if torch.compiler.is_compiling():
        return outside_graph(_open_call, module, args, kwargs)
    handle: Handle = module.__dict__[_ATTRIBUTE + "_handle"]
    call = new_call(handle)
    enter_call(call)
    if kwargs.get("head_mask") is not None:
        warnings.warn(
            "head_mask: transformers 5 ignores this argument; use handle.set_heads(mask) or handle.use_heads(mask)",
            SparseHeadsWarning,
            stacklevel=2,
        )
    if torch.is_grad_enabled():
        checkpointing.carry_calls(handle, handle._checkpointed)
    return _guard_call(handle, handle._parameters, module, args, kwargs)


def _parameters(model: nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


def _guard_call(
    handle: Handle, parameters: list[str], module: nn.Module, args: tuple, kwargs: dict
) -> tuple[tuple, dict] | None:
    """Refuse what heads that are off cannot honour yet, and see that nobody makes a cache who was not asked to."""
    if torch.compiler.is_compiling():
        return outside_graph(_guard_call, handle, parameters, module, args, kwargs)
    if current_call(handle).selection is None:
        return None
    _refuse(module, {**dict(zip(parameters, args, strict=False)), **kwargs})
    if "use_cache" in parameters[len(args) :] and kwargs.get("use_cache") is None:
        return args, {**kwargs, "use_cache": False}
    return None


def _refuse(module: nn.Module, given: dict) -> None:
    if given.get("past_key_values") is not None or given.get("use_cache"):
        raise UnsupportedError(
            "past_key_values: caches under switched-off heads are not built yet; pass use_cache=False"
        )
    wanted = given.get("output_attentions")
    if wanted or (wanted is None and getattr(getattr(module, "config", None), "output_attentions", False)):
        raise UnsupportedError(
            "output_attentions: heads that are off have no attention probabilities; use all heads, or pass False"
        )


def _close_call(module: nn.Module, args: tuple, output: Any) -> None:
    if torch.compiler.is_compiling():
        return outside_graph(_close_call, module, args, output)
    leave_call(module.__dict__[_ATTRIBUTE + "_handle"])

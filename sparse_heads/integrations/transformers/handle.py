"""The handle of an attached model: which heads run, for everyone or inside a block; undo."""

from __future__ import annotations

import os
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from ...errors import DetachedError, UnsupportedError, invalid, invalid_type
from ...heads import HeadSubset
from ...layers import Layers
from ...means import HeadMeans
from . import attention, checkpointing, hooks
from .calls import Call, Running, enter_override, leave_override
from .fill import fill_of
from .projections import InProjection, OutProjection, Site
from .record import Record, record
from .selection import Selection, select

if TYPE_CHECKING:
    from .gates import Gates

Subset = HeadSubset | Tensor | Mapping | None
Found = tuple[nn.Module, dict[str, nn.Linear]]  # the module that owns the projections of a layer, and these by role
_ATTRIBUTE = "_sparse_heads"


class Options(NamedTuple):
    """What `attach` was told."""

    layout: str
    backend: str
    kv: str
    include: object
    exclude: object


class Handle:
    """What `attach` returns. `layers`: the attached attention layers, in row order of every mask.

    A handle follows its model through `deepcopy` and pickling: the copy has a handle of its own.
    """

    def __init__(self, model: nn.Module, layers: Layers, found: list[Found], options: Options) -> None:
        self.model = model
        self.layers = layers
        self.options = options
        self.backend = options.backend
        self.core = options.layout == "core"
        self.every_head = HeadSubset(layers.real_heads(), layers)
        self.gates: Gates | None = None  # while they are attached, forwards outside `use_heads` run under them
        self.default_call = Call(self, None)  # what a layer runs under outside `use_heads` and any forward
        self.sites = [Site(self, row, layers[row], *each) for row, each in enumerate(found)]
        self.checkpointed = checkpointing.checkpointed_modules(model)
        self.attached = True
        # Our attention function: whether it stays until `detach`, and the blocks that have it for their time.
        self.keeps_attention, self.records_open = False, 0
        if self.core:
            attention.install(self)
        else:
            for site in self.sites:
                for role, module in site.projections.items():
                    _become(module, OutProjection if role == "output" else InProjection)
                    module.__dict__[_ATTRIBUTE] = (site, role)
        model.__dict__[_ATTRIBUTE + "_handle"] = self
        self._hooks = hooks.install(self)
        checkpointing.carry_calls(self, self.checkpointed)

    def __repr__(self) -> str:
        state = "detached" if not self.attached else "all heads" if self.subset is None else repr(self.subset)
        return f"Handle({type(self.model).__name__}, {len(self.layers)} layers, {state})"

    @property
    def subset(self) -> HeadSubset | None:
        """What `set_heads` said, None while every head is on; the choice of attached gates instead."""
        if self.gates is not None:
            return self.gates.subset()
        selection = self.default_call.selection
        return None if selection is None else selection.subset

    def set_heads(self, subset: Subset, fill: HeadMeans | None = None) -> None:
        """Choose the heads that run from now on, in every thread that is not inside `use_heads`.

        Args:
            subset: a `HeadSubset`, a bool tensor `[L, H]` (True = the head runs) or `[B, L, H]` (a row a request), a
                dict `{layer index or name: kept heads}` (layers not named keep all), or None for all heads. A batch of
                a multiple of B rows, as beam search makes, gives request r // (rows / B) to row r.
            fill: mean outputs of heads (`sh.head_means`), added in the place of those that are off. Their contribution
                is computed here, once, from the output projections' weights as they are now, without a gradient.

        Raises:
            SubsetMismatchError: the subset or the means belong to another model.
            UnsupportedError: gates are attached, which choose the heads.
            ValueError, TypeError: wrong shape or dtype, an index out of range or repeated.
        """
        if self.gates is not None:
            raise UnsupportedError(
                f"subset: {self.gates!r} choose the heads of this model; use handle.use_heads(subset) for a while, or "
                "gates.detach() first"
            )
        self.default_call = Call(self, *self._running(subset, None, fill))

    @contextmanager
    def use_heads(self, subset: Subset, fill: HeadMeans | None = None, scale: Tensor | None = None) -> Iterator[None]:
        """As `set_heads`, inside the `with` block and this thread or task only; None means all heads.

        A forward keeps what it began with: its backward pass may follow outside the block. Attached gates do not act.

        Args:
            subset, fill: as in `set_heads`.
            scale: float `[L, H]`, or `[B, L, H]` with a row a request, multiplies heads' outputs before the output
                projection; differentiable, exact also at 0. It does not act on what `fill` adds.
        """
        with self.run_under(self._running(subset, scale, fill)):
            yield

    @contextmanager
    def use_heads_in_layer(self, row: int, mask: Tensor) -> Iterator[None]:
        """`use_heads` of bool `[B, H]`, or `[1, H]` for all rows, in one layer; the others run as they are."""
        self._check_attached()
        subset = self.every_head.mask.repeat(len(mask), 1, 1)
        subset[:, row, : mask.shape[1]] = mask
        selection = self.ready(HeadSubset(subset, self.layers))
        rows = tuple(each if index == row else None for index, each in enumerate(selection.rows))
        with self.run_under(Running(replace(selection, rows=rows))):
            yield

    @contextmanager
    def run_under(self, running: Running) -> Iterator[None]:
        """`use_heads` of what is ready."""
        self._check_attached()
        override = enter_override(self, running)
        try:
            yield
        finally:
            leave_override(override)

    def bind(self, subset: Subset, fill: HeadMeans | None = None, scale: Tensor | None = None) -> BoundModel:
        """A callable view of the model under `subset`, `fill` and `scale` as in `use_heads`, for other threads."""
        return BoundModel(self, self._running(subset, scale, fill))

    def record(
        self,
        statistics: Iterable[str] = ("entropy", "sparsity", "confidence", "position_mass"),
        *,
        outputs: bool = False,
        special_tokens: Iterable[int] | None = None,
    ) -> AbstractContextManager[Record]:
        """Collect what heads do in the forwards inside the `with` block, in this thread or task only.

        `with handle.record(...) as record:` gives a `Record`, to read at any time. Blocks nest, and each collects.
        Forwards give the same bits as without. A layer called by itself is not collected. Attention probabilities are
        never stored: memory is linear in the length.

        Args:
            statistics: of each layer's attention, before dropout, as `attention_statistics` defines them: "entropy",
                "sparsity", "confidence", "position_mass"; "redundancy" (similarity to the most similar other head of
                the layer, slower than all others) and "special_mass" (mass on special tokens).
            outputs: keep each head's own output of every forward.
            special_tokens: ids, such as `tokenizer.all_special_ids`, whose queries do not count and whose keys are
                hidden, what is left adding up to 1; "special_mass" is the mass that they have. It needs `input_ids` in
                the same forward, those of the encoder too for cross-attention, and all positions (no filled cache).

        Queries count that see more than one key and are no padding by the `attention_mask [B, T]` of the transformers
        model around the layer; where none is given, or one of four dimensions, all are taken to be real.

        Raises:
            ValueError, TypeError: an unknown statistic, "special_mass" without `special_tokens`, nothing to collect, an
                attention implementation other than "sdpa" and "eager". A forward raises where ids are missing, or
                attention has position biases, sinks or a paged cache.
        """
        self._check_attached()
        return record(self, statistics, outputs, special_tokens)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Save the subset of `set_heads` (not the model); `HeadSubset.from_pretrained` reads it."""
        self._check_attached()
        subset = self.subset
        if subset is None:
            subset = self.every_head
        subset.save_pretrained(directory)

    def detach(self) -> None:
        """Give the model back as it was found, without gates too; the handle is of no use then. Twice is harmless."""
        if self.gates is not None:
            self.gates.detach()
        if not self.attached:
            return
        self.attached = False
        for site in self.sites:
            for module in site.projections.values():
                if module.__dict__.pop(_ATTRIBUTE, None) is not None:
                    _become(module, nn.Linear)
        attention.remove(self)
        hooks.remove(self._hooks)
        del self.model.__dict__[_ATTRIBUTE + "_handle"]
        checkpointing.restore(self.checkpointed)

    def _check_attached(self) -> None:
        if not self.attached:
            raise DetachedError("handle: detached; attach the model again")

    def select(self, subset: HeadSubset, stored: Sequence[Tensor] | None = None) -> Selection | None:
        """What each layer runs; `stored`: the key/value heads that a cache holds, which then are computed."""
        devices = [site.projections["query"].weight.device for site in self.sites]
        wide, every_kv = self.options.layout in ("wide", "core"), self.core or self.options.kv == "all"
        return select(subset, devices, wide=wide, every_kv=every_kv, stored=stored)

    def ready(self, subset: HeadSubset) -> Selection | None:
        """As `select`, with our attention function in place where some layer needs it."""
        selection = self.select(subset)
        if selection is not None and selection.needs_attention:
            attention.install(self)
        return selection

    def _running(self, subset: Subset, scale: Tensor | None, fill: HeadMeans | None) -> Running:
        self._check_attached()
        checkpointing.carry_calls(self, self.checkpointed)
        subset = self._as_subset(subset)
        if scale is not None:
            self._check_scale(scale)
        if fill is not None and not isinstance(fill, HeadMeans):
            raise invalid_type("fill", "a HeadMeans (sh.head_means gives one) or None", fill)
        if subset is None:
            return Running(None, scale)
        added = None if fill is None else fill_of(subset, fill.remap(self.layers), self.sites, core=self.core)
        return Running(self.ready(subset), scale, added)

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
        raise invalid_type(
            "subset", "a HeadSubset, a bool tensor [L, H] or [B, L, H], a dict of kept heads or None", subset
        )


class BoundModel:
    """A view of an attached model that runs under its own subset; every other attribute is the model's."""

    def __init__(self, handle: Handle, running: Running) -> None:
        self._handle = handle
        self._running = running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._handle.run_under(self._running):
            return self._handle.model(*args, **kwargs)

    forward = __call__

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate` under the subset."""
        with self._handle.run_under(self._running):
            return self._handle.model.generate(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_handle", "_running"):
            raise AttributeError(name)
        return getattr(self._handle.model, name)


def _become(module: nn.Module, kind: type[nn.Linear]) -> None:
    """Reassign the class; a forward that accelerate keeps on the instance is bound to the new class too."""
    module.__class__ = kind
    if "_old_forward" in module.__dict__:
        module._old_forward = types.MethodType(kind.forward, module)
    elif "forward" in module.__dict__:
        del module.__dict__["forward"]  # left by accelerate when its hook was removed; the class has the same

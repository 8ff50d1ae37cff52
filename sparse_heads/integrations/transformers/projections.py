"""The seam: subclasses of `nn.Linear` that an attached model's projections become, by reassigning `__class__`."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UnsupportedError
from ...layers import LayerInfo
from ...ops.projection.api import choose
from .calls import Call, current_call, outside_graph
from .selection import LayerSelection, WideHeads, rows_of_requests

if TYPE_CHECKING:
    from .handle import Handle


class Waiting(threading.local):
    """Keys and values computed with the queries, until their own modules ask: one input's, in this thread.

    They are handed out once, for the same input unchanged under the same selection, and dropped with the input.
    """

    def __init__(self) -> None:
        self.input: weakref.ref[Tensor] | None = None
        self.row: LayerSelection | None = None
        self.state: tuple[int, bool] | None = None
        self.outputs: dict[str, Tensor] = {}

    def put(self, x: Tensor, row: LayerSelection, outputs: dict[str, Tensor]) -> None:
        self.input = weakref.ref(x, lambda _: outputs.clear())
        self.row, self.state, self.outputs = row, _state(x), outputs

    def take(self, x: Tensor, row: LayerSelection, role: str) -> Tensor | None:
        if self.input is None or self.input() is not x or self.row is not row or self.state != _state(x):
            return None
        return self.outputs.pop(role, None)

    def __deepcopy__(self, memo: dict) -> Waiting:
        return Waiting()

    def __reduce__(self) -> tuple:
        return Waiting, ()


def _state(x: Tensor) -> tuple[int, bool]:
    return (-1 if x.is_inference() else x._version), torch.is_grad_enabled()


# Which projections read the same input, the one that is called first to begin with.
_SHARED = {
    "self": {"query": ("query", "key", "value"), "key": ("key", "value"), "value": ("value",)},
    "cross": {"query": ("query",), "key": ("key", "value"), "value": ("value",)},
}


def _parameter(module: nn.Linear, name: str) -> Tensor | None:
    """`getattr(module, name)`, which takes three times as long for a parameter."""
    parameter = module._parameters.get(name)
    return getattr(module, name) if parameter is None else parameter


def _changes_when_called(module: nn.Linear) -> bool:
    """Whether offloading, or a hook as of `torch.nn.utils.prune`, may bring the weight in only at the call."""
    return "_hf_hook" in module.__dict__ or bool(module._forward_pre_hooks)


@dataclass(eq=False)
class Site:
    """One attention layer of an attached model: the module that calls attention, its projections, and which of them
    share their input."""

    handle: Handle
    row: int
    layer: LayerInfo
    module: nn.Module
    projections: dict[str, nn.Linear]
    waiting: Waiting = field(default_factory=Waiting)

    def __post_init__(self) -> None:
        self.shared = _SHARED[self.layer.kind]

    def sharing(self, role: str) -> tuple[str, ...]:
        """The projections that one pass over the input computes when `role` is called."""
        roles = self.shared[role]
        return (role,) if any(_changes_when_called(self.projections[each]) for each in roles[1:]) else roles

    def check_rows(self, call: Call, per_request: bool, x: Tensor) -> None:
        """Raise unless `x` is `[B, T, E]` and, for a subset or scale with a row a request, B that of the batch."""
        if x.dim() != 3 or (per_request and call.rows is not None and x.shape[0] != call.rows):
            rows = "as many as the batch" if call.rows is None else str(call.rows)
            raise UnsupportedError(
                f"subset: layer {self.layer.name} cannot run wide (a subset or scale for every request): wanted "
                f"inputs [B, T, E], B = {rows}, a row a request, got {list(x.shape)} (windows or packed sequences?)"
            )


class InProjection(nn.Linear):
    """A query, key or value projection that computes the kept heads only."""

    _sparse_heads: tuple[Site, str]

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return outside_graph(InProjection.forward, self, input)
        site, role = self._sparse_heads
        call = current_call(site.handle)
        row = None if call.selection is None else call.selection.rows[site.row]
        if row is None:
            return F.linear(input, self.weight, self.bias)
        output = site.waiting.take(input, row, role)
        if output is not None:
            return output
        if row.is_wide:
            site.check_rows(call, row.per_request, input)
        roles = site.sharing(role)
        modules = [site.projections[each] for each in roles]
        outputs = row.in_pass(roles).run(
            site.handle.backend,
            input,
            [_parameter(module, "weight") for module in modules],
            [_parameter(module, "bias") for module in modules],
        )
        if len(roles) > 1:
            site.waiting.put(input, row, dict(zip(roles[1:], outputs[1:], strict=True)))
        return outputs[0]


class OutProjection(nn.Linear):
    """An output projection that reads the kept heads' columns only; `scale` acts on its input, `fill` on its output."""

    _sparse_heads: tuple[Site, str]

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return outside_graph(OutProjection.forward, self, input)
        site, _ = self._sparse_heads
        call = current_call(site.handle)
        row = None if call.selection is None else call.selection.rows[site.row]
        scale = None if call.scale is None else call.scale[..., site.row, : site.layer.num_heads]
        if scale is not None and scale.dim() == 2:
            site.check_rows(call, True, input)
        if row is None:
            return F.linear(input if scale is None else _scaled(input, scale), self.weight, self.bias)
        fill = None if call.fill is None else call.fill[site.row]
        if fill is None or fill.dim() == 1:
            return self._project(site, call, row, input, scale, _sum(self.bias, fill))
        output = self._project(site, call, row, input, scale, self.bias)
        return output + rows_of_requests("fill", fill, output.shape[0]).to(output.dtype).unsqueeze(1)

    def _project(
        self, site: Site, call: Call, row: LayerSelection, input: Tensor, scale: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        heads, head_dim = row.query, site.layer.v_head_dim
        wide = isinstance(heads, WideHeads)
        count = site.layer.num_heads if wide else heads.kept.shape[0]
        if input.shape[-1] != (count or site.layer.group_size) * head_dim:
            raise UnsupportedError(
                f"layer {site.layer.name}: its attention gave {input.shape[-1]} values a token for {count} heads of "
                f"{head_dim}; its forward does not follow the number of heads and needs a family entry of its own"
            )
        implementation = choose(site.handle.backend, input, wide)
        if wide:
            site.check_rows(call, row.per_request, input)
            input = input if scale is None else _scaled(input, scale)
            mask = heads.for_rows(input.shape[0])
            return implementation.out_projection_per_request(input, self.weight, bias, mask, head_dim)
        if heads.is_empty:
            input = input[..., :0]
        elif scale is not None:
            input = _scaled(input, scale[..., heads.kept])
        return implementation.out_projection(input, self.weight, bias, heads.kept, head_dim)


def _sum(bias: Tensor | None, fill: Tensor | None) -> Tensor | None:
    if fill is None or bias is None:
        return bias if fill is None else fill
    return bias + fill


def _scaled(heads: Tensor, scale: Tensor) -> Tensor:
    """`heads [B, T, H*D]` times `scale [H]` or `[B, H]`, in float32 or wider, as is the sum of the scale's gradient."""
    if scale.dim() == 2:
        scale = rows_of_requests("scale", scale, heads.shape[0]).unsqueeze(1)
    scale = scale.to(heads.device, torch.promote_types(heads.dtype, torch.float32)).unsqueeze(-1)
    return (heads.unflatten(-1, (scale.shape[-2], -1)) * scale).flatten(-2).to(heads.dtype)

"""The seam: subclasses of `nn.Linear` that an attached model's projections become, by reassigning `__class__`."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UnsupportedError, invalid
from ...layers import LayerInfo
from ...ops.projection.api import choose
from .calls import current_call, outside_graph
from .selection import LayerSelection

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
    """One attention layer of an attached model: its projections, and which of them share their input."""

    handle: Handle
    row: int
    layer: LayerInfo
    projections: dict[str, nn.Linear]
    waiting: Waiting = field(default_factory=Waiting)

    def __post_init__(self) -> None:
        self.shared = _SHARED[self.layer.kind]

    def sharing(self, role: str) -> tuple[str, ...]:
        """The projections that one pass over the input computes when `role` is called."""
        roles = self.shared[role]
        return (role,) if any(_changes_when_called(self.projections[each]) for each in roles[1:]) else roles


class InProjection(nn.Linear):
    """A query, key or value projection that computes the kept heads only."""

    _sparse_heads: tuple[Site, str]

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return outside_graph(InProjection.forward, self, input)
        site, role = self._sparse_heads
        selection = current_call(site.handle).selection
        row = None if selection is None else selection.rows[site.row]
        if row is None:
            return F.linear(input, self.weight, self.bias)
        output = site.waiting.take(input, row, role)
        if output is not None:
            return output
        roles = site.sharing(role)
        modules = [site.projections[each] for each in roles]
        outputs = choose(site.handle.backend, input).in_projection(
            input,
            [_parameter(module, "weight") for module in modules],
            [_parameter(module, "bias") for module in modules],
            [row.heads if each == "query" else row.kv_heads for each in roles],
            site.layer.head_dim,
        )
        if row.is_empty:
            # The model's own reshape cannot infer a head count of 0: one zero group stands in, and is ignored later.
            counts = [site.layer.group_size if each == "query" else 1 for each in roles]
            outputs = [
                F.pad(output, (0, count * site.layer.head_dim)) for output, count in zip(outputs, counts, strict=True)
            ]
        if len(roles) > 1:
            site.waiting.put(input, row, dict(zip(roles[1:], outputs[1:], strict=True)))
        return outputs[0]


class OutProjection(nn.Linear):
    """An output projection that reads the kept heads' columns only; `scale` acts on its input."""

    _sparse_heads: tuple[Site, str]

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return outside_graph(OutProjection.forward, self, input)
        site, _ = self._sparse_heads
        call = current_call(site.handle)
        row = None if call.selection is None else call.selection.rows[site.row]
        if row is None:
            input = input if call.scale is None else _scaled(input, call.scale[..., site.row, : site.layer.num_heads])
            return F.linear(input, self.weight, self.bias)
        kept, head_dim = row.heads.shape[0], site.layer.v_head_dim
        if input.shape[-1] != (kept or site.layer.group_size) * head_dim:
            raise UnsupportedError(
                f"layer {site.layer.name}: its attention gave {input.shape[-1]} values a token for {kept} kept heads "
                f"of {head_dim}; its forward does not follow the number of heads and needs a family entry of its own"
            )
        if row.is_empty:
            input = input[..., :0]
        elif call.scale is not None:
            input = _scaled(input, call.scale[..., site.row, row.heads])
        return choose(site.handle.backend, input).out_projection(input, self.weight, self.bias, row.heads, head_dim)


def _scaled(heads: Tensor, scale: Tensor) -> Tensor:
    """`heads [B, T, H*D]` times `scale [H]` or `[B, H]`."""
    if scale.dim() == 2:
        if scale.shape[0] != heads.shape[0]:
            raise invalid(
                "scale", f"[B, L, H] with B = {heads.shape[0]}, the rows of the batch", f"B = {scale.shape[0]}"
            )
        scale = scale.unsqueeze(1)
    return (heads.unflatten(-1, (scale.shape[-1], -1)) * scale.to(heads.dtype).unsqueeze(-1)).flatten(-2)

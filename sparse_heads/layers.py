"""What a model's attention layers look like: `LayerInfo` describes one, `Layers` all of them, in a mask's row order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral

import torch

from .errors import describe, invalid, invalid_type

KINDS = ("self", "cross")


def whole_number(argument: str, value: object, minimum: int) -> int:
    """`value` as an int; InvalidTypeError when it is not a whole number, InvalidArgumentError when below `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise invalid_type(argument, "an int", describe(value))
    if value < minimum:
        raise invalid(argument, f"at least {minimum}", value)
    return int(value)


@dataclass(frozen=True)
class LayerInfo:
    """One attention layer.

    name: path of the module that owns the query, key and value projections.
    stack, index, kind: which layer it is ("encoder", 3, "self"), whatever head the model carries; kind is "self" or
        "cross". Together they are `key`.
    num_heads, num_kv_heads: query heads, and key/value heads, which divide them.
    head_dim, v_head_dim: width of a head's queries and keys, and of its values.
    uses: how often one forward runs the module (more than 1 when layers share it, as in ALBERT).

    Raises InvalidTypeError or InvalidArgumentError for a field of a wrong type or value.
    """

    name: str
    stack: str
    index: int
    kind: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    uses: int = 1

    def __post_init__(self) -> None:
        for field in ("name", "stack", "kind"):
            if not isinstance(getattr(self, field), str):
                raise invalid_type(f"LayerInfo.{field}", "a str", getattr(self, field))
        if self.kind not in KINDS:
            raise invalid("LayerInfo.kind", "'self' or 'cross'", repr(self.kind))
        for field in ("index", "num_heads", "num_kv_heads", "head_dim", "v_head_dim", "uses"):
            number = whole_number(f"LayerInfo.{field}", getattr(self, field), 0 if field == "index" else 1)
            object.__setattr__(self, field, number)
        if self.num_heads % self.num_kv_heads:
            raise invalid("LayerInfo.num_kv_heads", f"a divisor of num_heads {self.num_heads}", self.num_kv_heads)

    @property
    def key(self) -> tuple[str, int, str]:
        return (self.stack, self.index, self.kind)

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads


class Layers(tuple):
    """All attention layers of a model: a tuple of `LayerInfo` that also knows the model.

    model_type: the configuration's model type ("bert"); base_model: where the weights came from, or None.

    Raises InvalidTypeError or InvalidArgumentError for an empty list, an entry that is no LayerInfo, or a name or key
    that occurs twice.
    """

    model_type: str
    base_model: str | None

    def __new__(cls, infos: Iterable[LayerInfo], model_type: str, base_model: str | None = None) -> Layers:
        self = super().__new__(cls, infos)
        if not self:
            raise invalid("layers", "at least one layer", "none")
        for info in self:
            if not isinstance(info, LayerInfo):
                raise invalid_type("layers", "LayerInfo entries", describe(info))
        for field in ("name", "key"):
            seen = set()
            for info in self:
                value = getattr(info, field)
                if value in seen:
                    raise invalid("layers", f"every {field} once", f"{value!r} twice")
                seen.add(value)
        if not isinstance(model_type, str):
            raise invalid_type("model_type", "a str", model_type)
        if base_model is not None and not isinstance(base_model, str):
            raise invalid_type("base_model", "a str or None", base_model)
        self.model_type = model_type
        self.base_model = base_model
        return self

    def __getnewargs__(self) -> tuple[tuple[LayerInfo, ...], str, str | None]:
        return (tuple(self), self.model_type, self.base_model)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layers):
            return NotImplemented
        return self.__getnewargs__() == other.__getnewargs__()

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.__getnewargs__())

    @property
    def max_heads(self) -> int:
        """H, the width of a mask: the largest num_heads."""
        return max(info.num_heads for info in self)

    @property
    def max_kv_heads(self) -> int:
        """The largest num_kv_heads."""
        return max(info.num_kv_heads for info in self)

    @property
    def num_heads(self) -> int:
        """Heads of the whole model, padding not counted."""
        return sum(info.num_heads for info in self)

    def real_heads(self) -> torch.Tensor:
        """bool [L, H] on the CPU, True where the layer has that head and False in its padding."""
        counts = torch.tensor([info.num_heads for info in self], device="cpu")
        return torch.arange(self.max_heads, device="cpu") < counts[:, None]

    def difference(self, other: Layers) -> str | None:
        """What keeps a subset of these layers from fitting `other`, as words, or None.

        Model type, layer keys and head counts must agree; names, order and head widths may differ.
        """
        if self.model_type != other.model_type:
            return f"model type {self.model_type!r} against {other.model_type!r}"
        if len(self) != len(other):
            return f"{len(self)} attention layers against {len(other)}"
        others = {info.key: info for info in other}
        for info in self:
            if info.key not in others:
                return f"layer (stack, index, kind) = {info.key}, which the other lacks"
            for field in ("num_heads", "num_kv_heads"):
                mine, theirs = getattr(info, field), getattr(others[info.key], field)
                if mine != theirs:
                    return f"{field} {mine} against {theirs} in layer (stack, index, kind) = {info.key}"
        return None

"""Which heads of a model run (`HeadSubset`), and how much each is worth (`HeadScores`).

Rows follow a `Layers`, one attention layer each; H is the largest head count, and what lies past a smaller layer's own
heads is padding: ignored on input, False in masks, -inf in scores, never counted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping

import torch

from ._files import SCORES, SUBSET, load_files, save_files
from ._ranking import check_budget, smallest_budgets
from .errors import SubsetMismatchError, describe, invalid, invalid_type
from .layers import LayerInfo, Layers, whole_number

__all__ = ["HeadScores", "HeadSubset", "LayerInfo", "Layers"]


class HeadSubset:
    """A head mask for a whole model, True where the head runs. An immutable value: tensors are copied in and out.

    mask: bool [L, H], shared by the batch, or [B, L, H], one row a request, with B at least 1, on any device (kept on
        the CPU); layers: what the rows are.
    Raises InvalidTypeError for a mask that is no bool tensor, InvalidArgumentError for another shape.
    """

    def __init__(self, mask: torch.Tensor, layers: Layers) -> None:
        check_layers(layers)
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            raise invalid_type("mask", "a bool tensor", describe(mask))
        rows, heads = len(layers), layers.max_heads
        if mask.shape[-2:] != (rows, heads) or mask.dim() not in (2, 3) or mask.shape[0] == 0:
            also = "; masks per token are not supported" if mask.dim() > 3 else ""
            raise invalid("mask", f"shape [{rows}, {heads}] or [requests, {rows}, {heads}]{also}", mask)
        self._mask = (mask.cpu() & layers.real_heads()).contiguous()
        self._layers = layers

    @classmethod
    def from_kept(cls, kept: Mapping[int | str, Iterable[int]], layers: Layers) -> HeadSubset:
        """A shared subset from {row or name of a layer: heads to keep}; layers that are not named keep all.

        Raises InvalidTypeError or InvalidArgumentError for an unknown or repeated layer, and for heads that are
        repeated, out of range or no ints.
        """
        check_layers(layers)
        if not isinstance(kept, Mapping):
            raise invalid_type("kept", "a dict {row or name of a layer: kept heads}", describe(kept))
        mask = layers.real_heads()
        named = set()
        for layer, heads in kept.items():
            row = _row_of(layer, layers)
            if row in named:
                raise invalid("kept", "each layer once", f"{layers[row].name!r} by name and by row")
            named.add(row)
            mask[row] = False
            mask[row, _checked_heads(heads, layers[row])] = True
        return cls(mask, layers)

    @property
    def mask(self) -> torch.Tensor:
        """bool [L, H] or [B, L, H], a copy on the CPU."""
        return self._mask.clone()

    @property
    def layers(self) -> Layers:
        return self._layers

    @property
    def per_request(self) -> bool:
        """Whether every request has its own row."""
        return self._mask.dim() == 3

    def count(self) -> int | torch.Tensor:
        """Heads kept: an int, or int64 [B]."""
        counts = self._mask.sum((-2, -1))
        return counts if self.per_request else int(counts)

    def kept(self) -> dict[str, list[int]]:
        """{name of each layer: its kept heads, ascending} of a shared subset; `from_kept` is the inverse."""
        if self.per_request:
            raise invalid("subset", "one shared by the batch (take one request's with row)", repr(self))
        return {info.name: row.nonzero().flatten().tolist() for info, row in zip(self._layers, self._mask, strict=True)}

    def row(self, request: int) -> HeadSubset:
        """The subset of one request, as a shared one."""
        if not self.per_request:
            raise invalid("subset", "one with a row a request", repr(self))
        request = whole_number("request", request, 0)
        if request >= len(self._mask):
            raise invalid("request", f"below {len(self._mask)}, the number of requests", request)
        return HeadSubset(self._mask[request], self._layers)

    def groups(self) -> torch.Tensor:
        """bool [L, G] or [B, L, G], G the largest number of key/value heads: the KV groups with a head on."""
        active = self._mask.new_zeros(*self._mask.shape[:-1], self._layers.max_kv_heads)
        for row, info in enumerate(self._layers):
            active[..., row, : info.num_kv_heads] = self._grouped(row).any(-1)
        return active

    def round_to_groups(self, direction: str) -> HeadSubset:
        """The subset with whole KV groups only.

        direction: "up" keeps all heads of a group that has one on, "down" none of a group that has one off.
        """
        if direction not in ("up", "down"):
            raise invalid("direction", "'up' or 'down'", describe(direction))
        mask = self.mask
        for row, info in enumerate(self._layers):
            grouped = self._grouped(row)
            whole = grouped.any(-1) if direction == "up" else grouped.all(-1)
            mask[..., row, : info.num_heads] = whole.repeat_interleave(info.group_size, -1)
        return HeadSubset(mask, self._layers)

    def cache_bytes(self, length: int, dtype: torch.dtype = torch.float32) -> int | list[int]:
        """Bytes of the keys and values of the active KV groups over `length` positions: an int, or one a request.

        Every layer counts, each of its uses, with `length` positions.
        """
        length = whole_number("length", length, 0)
        if not isinstance(dtype, torch.dtype):
            raise invalid_type("dtype", "a torch.dtype", describe(dtype))
        sizes = [length * info.uses * (info.head_dim + info.v_head_dim) * dtype.itemsize for info in self._layers]
        counts = self.groups().sum(-1).reshape(-1, len(self._layers)).tolist()
        totals = [sum(count * size for count, size in zip(row, sizes, strict=True)) for row in counts]
        return totals if self.per_request else totals[0]

    def check_belongs(self, layers: Layers) -> None:
        """Raises SubsetMismatchError, naming what differs, unless the subset fits a model with `layers`.

        Model type, layer keys (stack, index, kind) and head counts must agree; names and order may differ.
        """
        check_layers(layers)
        difference = self._layers.difference(layers)
        if difference is not None:
            raise SubsetMismatchError(f"subset: wanted one for this model, got another model's: {difference}")

    def remap(self, layers: Layers) -> HeadSubset:
        """The subset with its rows in the order of `layers`; raises as `check_belongs`."""
        self.check_belongs(layers)
        rows = {info.key: row for row, info in enumerate(self._layers)}
        return HeadSubset(self._mask[..., [rows[info.key] for info in layers], :], layers)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `heads.safetensors`, which `from_pretrained` reads, and `heads_config.json`, which people read.

        Makes the directory where it is missing; a file that was there stays whole until the new one replaces it.
        """
        requests = [self.row(request).kept() for request in range(len(self._mask))] if self.per_request else None
        copy = {"kept": self.kept() if requests is None else requests}
        save_files(directory, SUBSET, self._mask.to(torch.uint8), self._layers, copy)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> HeadSubset:
        """Read what `save_pretrained` wrote, from a directory or, where there is none, a Hugging Face Hub repository.

        Raises InvalidArgumentError where nothing is found, FileFormatError for a truncated or malformed file.
        """
        return load_files(directory, SUBSET, cls._from_bytes)

    @classmethod
    def _from_bytes(cls, mask: torch.Tensor, layers: Layers) -> HeadSubset:
        if mask.max() > 1:
            raise invalid("mask", "zeros and ones", f"a {mask.max()}")
        return cls(mask != 0, layers)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HeadSubset):
            return NotImplemented
        return self._layers == other._layers and torch.equal(self._mask, other._mask)

    __hash__ = None

    def __repr__(self) -> str:
        whole = f"of {self._layers.num_heads} heads, {len(self._layers)} layers"
        if not self.per_request:
            return f"HeadSubset({self.count()} {whole})"
        counts = self.count()
        return f"HeadSubset({len(counts)} requests, {counts.min()} to {counts.max()} {whole})"

    def _grouped(self, row: int) -> torch.Tensor:
        """bool [..., num_kv_heads, group_size]: the layer's own heads by KV group."""
        info = self._layers[row]
        return self._mask[..., row, : info.num_heads].unflatten(-1, (info.num_kv_heads, info.group_size))


class LayerTensor:
    """A float tensor [L, ...] whose rows are a model's layers. An immutable value: tensors are copied in and out."""

    def __init__(self, tensor: torch.Tensor, layers: Layers) -> None:
        self._tensor = tensor
        self._layers = layers

    @property
    def tensor(self) -> torch.Tensor:
        """float32 or float64, a copy on the CPU."""
        return self._tensor.clone()

    @property
    def layers(self) -> Layers:
        return self._layers

    @staticmethod
    def _checked(tensor: object, layers: object, *width: int) -> torch.Tensor:
        """`tensor` on the CPU, float64 as it is and everything else as float32, if it is floating [L, H, *width]."""
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise invalid_type("tensor", "a float tensor", describe(tensor))
        shape = [len(layers), layers.max_heads, *width]
        if list(tensor.shape) != shape:
            raise invalid("tensor", f"shape {shape}", tensor)
        return tensor.detach().to("cpu", torch.float64 if tensor.dtype == torch.float64 else torch.float32)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        same_dtype = self._tensor.dtype == other._tensor.dtype
        return same_dtype and self._layers == other._layers and torch.equal(self._tensor, other._tensor)

    __hash__ = None

    def __repr__(self) -> str:
        dtype = str(self._tensor.dtype).removeprefix("torch.")
        return f"{type(self).__name__}({self._layers.num_heads} heads, {len(self._layers)} layers, {dtype})"


class HeadScores(LayerTensor):
    """One number a head for a whole model, larger for heads that should stay. An immutable value.

    tensor: float [L, H] on any device (kept on the CPU, float64 as it is and everything else as float32); infinities
        are ranked, NaN is not; layers: what the rows are.
    Raises InvalidTypeError for a tensor that is not floating, InvalidArgumentError for another shape or a NaN.
    """

    def __init__(self, tensor: torch.Tensor, layers: Layers) -> None:
        check_layers(layers)
        scores = self._checked(tensor, layers).masked_fill(~layers.real_heads(), -math.inf).contiguous()
        if scores.isnan().any():
            row, head = scores.isnan().nonzero()[0].tolist()
            raise invalid("tensor", "no NaN", f"one for head {head} of layer {layers[row].name!r}")
        super().__init__(scores, layers)

    def top(
        self,
        k: int,
        *,
        min_per_layer: int = 0,
        kinds: Iterable[str | tuple[str, str]] | None = None,
        groups: bool = False,
    ) -> HeadSubset:
        """The subset of the `k` best heads, exactly; of equal ones the lower layer, then the lower head comes first.

        min_per_layer: every layer's best heads that are taken before all others, this many.
        kinds: the layers that `k` counts heads of: "self" or "cross", or (stack, kind) pairs such as ("decoder",
            "cross"); all others keep all their heads, uncounted.
        groups: take whole KV groups, ranked by the mean of their scores.
        Raises InvalidArgumentError for a `k` that cannot be met exactly, naming what can.
        """
        return self.budgets([k], min_per_layer=min_per_layer, kinds=kinds, groups=groups).row(0)

    def budgets(
        self,
        budgets: Iterable[int],
        *,
        min_per_layer: int = 0,
        kinds: Iterable[str | tuple[str, str]] | None = None,
        groups: bool = False,
    ) -> HeadSubset:
        """A subset with one request a budget, each as `top` gives it: a smaller budget's heads are in a larger's."""
        if isinstance(budgets, (str, bytes)) or not isinstance(budgets, Iterable):
            raise invalid_type("budgets", "a list of ints", describe(budgets))
        smallest, reachable = smallest_budgets(
            self._tensor, self._layers, min_per_layer=min_per_layer, kinds=kinds, groups=groups
        )
        checked = [check_budget(budget, reachable) for budget in budgets]
        if not checked:
            raise invalid("budgets", "at least one", "none")
        return HeadSubset(smallest <= torch.tensor(checked, device="cpu")[:, None, None], self._layers)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `head_scores.safetensors`, which `from_pretrained` reads, and `head_scores_config.json` for people.

        Makes the directory where it is missing; a file that was there stays whole until the new one replaces it.
        """
        rows = zip(self._layers, self._tensor.tolist(), strict=True)
        # JSON has no infinities: they are written as strings
        copy = {info.name: [x if math.isfinite(x) else str(x) for x in row[: info.num_heads]] for info, row in rows}
        save_files(directory, SCORES, self._tensor, self._layers, {"scores": copy})

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> HeadScores:
        """Read what `save_pretrained` wrote; sources and errors as for `HeadSubset.from_pretrained`."""
        return load_files(directory, SCORES, cls)


def check_layers(layers: object) -> None:
    """Raise InvalidTypeError for what is no Layers."""
    if not isinstance(layers, Layers):
        raise invalid_type("layers", "a Layers (handle.layers is one)", describe(layers))


def _row_of(layer: object, layers: Layers) -> int:
    if not isinstance(layer, str):
        row = whole_number("kept", layer, 0)
        if row >= len(layers):
            raise invalid("kept", f"rows of layers below {len(layers)}", row)
        return row
    names = [info.name for info in layers]
    if layer not in names:
        raise invalid("kept", f"names of attention layers such as {names[0]!r}", repr(layer))
    return names.index(layer)


def _checked_heads(heads: object, info: LayerInfo) -> list[int]:
    argument = f"kept[{info.name!r}]"
    if isinstance(heads, torch.Tensor):
        heads = heads.tolist()
    if isinstance(heads, (str, bytes)) or not isinstance(heads, Iterable):
        raise invalid_type(argument, "a list of head indices", describe(heads))
    checked = [whole_number(argument, head, 0) for head in heads]
    if any(head >= info.num_heads for head in checked):
        raise invalid(argument, f"heads below {info.num_heads}", max(checked))
    if len(set(checked)) != len(checked):
        raise invalid(argument, "each head once", checked)
    return checked

"""`attach` and `get_handle`."""

from __future__ import annotations

from torch import nn

from ...errors import invalid, invalid_type
from ...ops.projection.api import check_backend
from .discovery import find_layers
from .handle import Handle, Options

LAYOUTS = ("auto", "compact", "wide", "core")
KV = ("active", "all")


def attach(
    model: nn.Module,
    layout: str = "auto",
    backend: str = "auto",
    kv: str = "active",
    include: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
) -> Handle:
    """Make a model's attention able to skip heads: in place, this instance only, weights untouched.

    The query, key, value and output projections (`torch.nn.Linear`) become subclasses by reassigning `__class__`:
    modules, parameters, hooks, `state_dict()` keys and `isinstance` stay. With all heads on the model runs as before.
    Once a subset needs an attention function of ours (a subset for every request, split groups, wide and core layouts),
    the configuration names it until `detach`.

    Args:
        model: a transformers model, or any module that owns attention layers of a known structure.
        layout: `"compact"`: projections produce only the kept heads of a shared subset; a subset for every request
            runs wide all the same. `"wide"`: tensors keep their full width, and shapes never change with the subset.
            `"core"`: projections stay as they are (also where they are no `torch.nn.Linear`), only attention and cache
            reads are skipped. `"auto"`: compact.
        backend: of projections and attention: `"auto"`, `"reference"` or `"cpu"`.
        kv: `"active"`: keys and values are computed, and stored in a cache, for the heads of a sequence's first subset
            only, and later ones may use any of these. `"all"`: for all heads, and any subset may follow.
        include, exclude: shell patterns of layer names (`"*.layer.0.*"`) to attach or leave out.

    Returns:
        The handle; the same one again for a model attached with the same options.

    Raises:
        ValueError, TypeError: attached already with other options; no attention layer found; a projection that is not
            exactly `torch.nn.Linear`; an unknown option.
    """
    if not isinstance(model, nn.Module):
        raise invalid_type("model", "a torch.nn.Module", model)
    options = Options(layout, backend, kv, _frozen(include), _frozen(exclude))
    existing = get_handle(model)
    if existing is not None:
        if existing.options != options:
            raise invalid(
                "model", f"a model not attached with other options ({existing.options})", f"options {options}"
            )
        return existing
    if layout not in LAYOUTS:
        raise invalid("layout", f"one of {LAYOUTS}", layout)
    if kv not in KV:
        raise invalid("kv", f"one of {KV}", kv)
    check_backend(backend)
    return Handle(model, *find_layers(model, include, exclude, layout), options)


def get_handle(model: nn.Module) -> Handle | None:
    """The handle of an attached model, or None."""
    if not isinstance(model, nn.Module):
        raise invalid_type("model", "a torch.nn.Module", model)
    return model.__dict__.get("_sparse_heads_handle")


def _frozen(patterns: object) -> object:
    return tuple(patterns) if isinstance(patterns, list) else patterns

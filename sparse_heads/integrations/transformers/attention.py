"""Attention functions for transformers that run the project's operator where a layer's own function would not do.

Registered beside the functions that they stand in for, under their names with a prefix and with the same masks. They
hand every other call on, so a model whose configuration names them runs as before.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ...errors import UnsupportedError
from ...ops.attention.api import attend
from .calls import current_call, outside_graph
from .selection import CompactHeads, LayerSelection, WideHeads, rows_of_requests

if TYPE_CHECKING:
    from .handle import Handle
    from .projections import Site

_PREFIX = "sparse_heads_"
_ORIGINALS = ("sdpa", "eager")
SITE = "_sparse_heads_site"


def install(handle: Handle) -> None:
    """Let the attention modules of a handle find our functions, by the configuration that each of them reads."""
    strangers = [site for site in handle.sites if not _is_installed(site)]
    for site in strangers:
        name = getattr(_config(site), "_attn_implementation", None)
        known = name is not None and name.removeprefix(_PREFIX) in _ORIGINALS
        if not (known and _asks_for_a_function(site.module)):
            raise UnsupportedError(
                f"subset: layer {site.layer.name} needs an attention of ours (for a subset for every request, split "
                "groups, wide and core layouts), wanted a module that takes one and attn_implementation "
                f"{' or '.join(map(repr, _ORIGINALS))}, got {type(site.module).__name__} with {name!r}"
            )
    for site in strangers:
        site.module.__dict__[SITE] = site
        config = _config(site)
        config._attn_implementation_internal = _PREFIX + config._attn_implementation.removeprefix(_PREFIX)


def remove(handle: Handle) -> None:
    """Undo `install`."""
    for site in handle.sites:
        if site.module.__dict__.pop(SITE, None) is not None:
            config = _config(site)
            config._attn_implementation_internal = config._attn_implementation.removeprefix(_PREFIX)


def _config(site: Site) -> Any:
    return getattr(site.module, "config", None)


def _is_installed(site: Site) -> bool:
    if site.module.__dict__.get(SITE) is not site:
        return False
    return _config(site)._attn_implementation.startswith(_PREFIX)


def _asks_for_a_function(module: nn.Module) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(module).forward).__code__.co_names


def _run(
    original: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`query [B, H, T, D]`, `key` and `value [B, H_kv, S, D]` to `[B, T, H, D]`, as transformers' own functions."""
    if torch.compiler.is_compiling():
        return outside_graph(_run, original, module, query, key, value, attention_mask, **kwargs)
    site: Site | None = module.__dict__.get(SITE)
    row = scale = None
    if site is not None:
        call = current_call(site.handle)
        row = None if call.selection is None else call.selection.rows[site.row]
        if site.handle.core and call.scale is not None:
            scale = call.scale[..., site.row, : site.layer.num_heads]
    if scale is None and (row is None or not row.needs_attention):
        return _original(original, module)(module, query, key, value, attention_mask, **kwargs)
    return _attend(original, site, row, scale, query, key, value, attention_mask, kwargs), None


def _original(name: str, module: nn.Module) -> Callable:
    if name == "sdpa":
        return sdpa_attention_forward
    modules = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    return next(each.eager_attention_forward for each in modules if hasattr(each, "eager_attention_forward"))


def _attend(
    original: str,
    site: Site,
    row: LayerSelection | None,
    scale: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kwargs: dict,
) -> Tensor:
    if kwargs.get("dropout"):
        raise UnsupportedError(
            f"dropout: layer {site.layer.name} runs an attention kernel without dropout (a subset for every request, "
            f"split groups, or a wide or core layout), wanted 0 or model.eval(), got {kwargs['dropout']}"
        )
    # transformers' sdpa ignores or refuses a softcap, by version.
    for name in ("position_bias", "cache", *(["softcap"] if original == "sdpa" else [])):
        if kwargs.get(name) is not None:
            raise UnsupportedError(
                f"{name}: wanted None in layer {site.layer.name}, which runs an attention of ours in the place of "
                f"{original!r}"
            )
    rows, queries = query.shape[0], query.shape[2]
    head_mask = kv_of_head = None
    if row is not None:
        if row.query.is_empty:
            return query.new_zeros(rows, queries, query.shape[1], value.shape[-1])
        kv_of_head = row.kv_of_head
        if isinstance(row.query, WideHeads):
            head_mask = row.query.mask[0] if len(row.query.mask) == 1 else row.query.for_rows(rows)
    if scale is not None and scale.dim() == 2:
        scale = rows_of_requests("scale", scale, rows)
    sinks = kwargs.get("s_aux")
    compact = row is not None and isinstance(row.query, CompactHeads)
    if sinks is not None and compact:
        sinks = sinks[row.query.kept]
    is_causal = False
    if attention_mask is None:
        is_causal = kwargs.get("is_causal")
        is_causal = getattr(site.module, "is_causal", True) if is_causal is None else is_causal
        is_causal = bool(is_causal) and queries > 1 and original == "sdpa"
        if is_causal:  # a static cache has room behind the prompt
            key, value = key[:, :, :queries], value[:, :, :queries]
    else:
        attention_mask = attention_mask[..., : key.shape[2]]
        if compact and attention_mask.shape[1] != 1:
            attention_mask = attention_mask[:, row.query.kept]
        if attention_mask.dtype not in (torch.bool, torch.float32):
            attention_mask = attention_mask.to(query.dtype)
    output = attend(
        query,
        key,
        value,
        head_mask,
        kv_heads=kv_of_head,
        gate=scale,
        attn_mask=attention_mask,
        span=(-1, 0) if is_causal else (-1, -1),
        scale=kwargs.get("scaling"),
        softcap=kwargs.get("softcap"),
        sinks=sinks,
        backend=site.handle.backend,
    )
    return output.transpose(1, 2)


for _name in _ORIGINALS:
    AttentionInterface.register(_PREFIX + _name, partial(_run, _name))
    AttentionMaskInterface.register(_PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])

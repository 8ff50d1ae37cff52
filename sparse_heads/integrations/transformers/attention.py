"""Attention functions for transformers that run the project's operator where a layer's own function would not do.

Registered beside the functions that they stand in for, under their names with a prefix and with the same masks. They
hand every other call on, so a model whose configuration names them runs as before.
"""

from __future__ import annotations

import inspect
import sys
import threading
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
from .calls import Call, current_call, outside_graph
from .recording import Attention
from .selection import CompactHeads, LayerSelection, WideHeads, rows_of_requests

if TYPE_CHECKING:
    from .handle import Handle
    from .projections import Site

_PREFIX = "sparse_heads_"
_ORIGINALS = ("sdpa", "eager")
SITE = "_sparse_heads_site"
_lock = threading.Lock()  # a record that closes must not take away what a subset in another thread has asked for


def install(handle: Handle) -> None:
    """Let the attention modules of a handle find our functions until `remove`."""
    with _lock:
        _install(handle)
        handle.keeps_attention = True


def borrow(handle: Handle) -> None:
    """As `install`, for a record: until `give_back`, unless a subset comes to need them."""
    with _lock:
        _install(handle)
        handle.records_open += 1


def give_back(handle: Handle) -> None:
    """End what `borrow` began."""
    with _lock:
        handle.records_open -= 1
        if not (handle.records_open or handle.keeps_attention):
            remove(handle)


def refresh(handle: Handle) -> None:
    """See to it that `install` or `borrow` still holds when another attention was chosen meanwhile."""
    with _lock:
        _install(handle)


def _install(handle: Handle) -> None:
    """Let the configuration that each attention module reads name our functions."""
    strangers = [site for site in handle.sites if not _is_installed(site)]
    for site in strangers:
        name = getattr(_config(site), "_attn_implementation", None)
        known = name is not None and name.removeprefix(_PREFIX) in _ORIGINALS
        if not (known and _asks_for_a_function(site.module)):
            raise UnsupportedError(
                f"subset: layer {site.layer.name} needs an attention of ours (for a subset for every request, split "
                "groups, wide and core layouts, and records), wanted a module that takes one and attn_implementation "
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
    call = row = scale = fill = None
    if site is not None:
        call = current_call(site.handle)
        row = None if call.selection is None else call.selection.rows[site.row]
        if site.handle.core and call.scale is not None:
            scale = call.scale[..., site.row, : site.layer.num_heads]
        if site.handle.core and call.fill is not None:
            fill = call.fill[site.row]
    if row is None or not row.needs_attention:
        result = _original(original, module)(module, query, key, value, attention_mask, **kwargs)
        result = result if scale is None else (_scaled(result[0], scale), result[1])
    else:
        result = _attend(original, site, row, scale, query, key, value, attention_mask, kwargs), None
    if call is not None and call.recording is not None:
        _record(original, site, call, row, query, key, attention_mask, kwargs, result[0])
    return result if fill is None else (_filled(result[0], fill), result[1])


def _scaled(output: Tensor, scale: Tensor) -> Tensor:
    """`output [B, T, H, D]` times `scale [H]` or `[B, H]`, in float32 or wider."""
    if scale.dim() == 2:
        scale = rows_of_requests("scale", scale, output.shape[0]).unsqueeze(1)
    return (output * scale.to(torch.promote_types(output.dtype, torch.float32)).unsqueeze(-1)).to(output.dtype)


def _filled(output: Tensor, fill: Tensor) -> Tensor:
    """`output [B, T, H, D]` plus `fill [H, D]` or `[B, H, D]`."""
    if fill.dim() == 3:
        fill = rows_of_requests("fill", fill, output.shape[0]).unsqueeze(1)
    return output + fill.to(output)


def _record(
    original: str,
    site: Site,
    call: Call,
    row: LayerSelection | None,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    kwargs: dict,
    output: Tensor,
) -> None:
    """Tell the records of a forward what this layer attended to, and what came of it."""
    for name in ("position_bias", "cache", "s_aux"):
        if kwargs.get(name) is not None and call.recording.wants_statistics:
            raise UnsupportedError(f"statistics: wanted attention without {name}, got some in layer {site.layer.name}")
    scale = None
    if call.scale is not None and not site.handle.core:  # there it has acted already
        scale = call.scale[..., site.row, : site.layer.num_heads]
        scale = rows_of_requests("scale", scale, query.shape[0]) if scale.dim() == 2 else scale
    is_causal = _is_causal(original, site.module, query, attention_mask, kwargs)
    attention = Attention(
        query=query,
        key=key[:, :, : query.shape[2]] if is_causal else key,
        mask=_fitted(attention_mask, key, row, query.dtype),
        is_causal=is_causal,
        scaling=kwargs.get("scaling"),
        softcap=kwargs.get("softcap") if original == "eager" else None,
        kv_of_head=None if row is None else row.kv_of_head,
        heads=None if row is None else row.query,
        output=output,
        scale=scale,
    )
    call.recording.add(site, attention)


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
    is_causal = _is_causal(original, site.module, query, attention_mask, kwargs)
    if is_causal:  # a static cache has room behind the prompt
        key, value = key[:, :, :queries], value[:, :, :queries]
    attention_mask = _fitted(attention_mask, key, row, query.dtype)
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


def _is_causal(original: str, module: nn.Module, query: Tensor, attention_mask: Tensor | None, kwargs: dict) -> bool:
    """What transformers' sdpa decides; its eager attention knows nothing but the mask."""
    if attention_mask is not None or original != "sdpa":
        return False
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return bool(is_causal) and query.shape[2] > 1


def _fitted(mask: Tensor | None, key: Tensor, row: LayerSelection | None, dtype: torch.dtype) -> Tensor | None:
    """`mask` of the keys and heads that there are, bool or of a dtype that the operators add to scores of `dtype`."""
    if mask is None:
        return None
    mask = mask[..., : key.shape[2]]
    if row is not None and isinstance(row.query, CompactHeads) and mask.shape[1] != 1:
        mask = mask[:, row.query.kept]
    return mask if mask.dtype in (torch.bool, torch.float32) else mask.to(dtype)


for _name in _ORIGINALS:
    AttentionInterface.register(_PREFIX + _name, partial(_run, _name))
    AttentionMaskInterface.register(_PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])

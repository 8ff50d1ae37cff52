"""Find the attention layers of a model, by structure, and describe them."""

from __future__ import annotations

import inspect
from collections import Counter
from fnmatch import fnmatchcase

from torch import nn

from ...errors import UnknownFamilyError, UnsupportedError, describe, invalid, invalid_type
from ...layers import LayerInfo, Layers
from .attention import SITE
from .families import FAMILIES, Family
from .projections import InProjection, OutProjection

_ADVICE = (
    "If its attention reshapes with view(..., -1, head_dim), describe it: append a Family(query, key, value, output, "
    "head_dim) of attribute names to sparse_heads.integrations.transformers.families.FAMILIES"
)
_HEAD_COUNTS = {"num_heads", "num_attention_heads", "num_key_value_heads", "n_heads", "all_head_size"}
_PROJECTIONS = (InProjection, OutProjection)
Found = tuple[LayerInfo, nn.Module, dict[str, nn.Linear]]


def find_layers(
    model: nn.Module, include: object, exclude: object, layout: str
) -> tuple[Layers, list[tuple[nn.Module, dict[str, nn.Linear]]]]:
    """Every attention layer in module order; its module, and its query, key, value and output projections.

    `include`, `exclude`: None, or shell patterns (a str or several) that a layer's name must or must not match.
    """
    include, exclude = _patterns("include", include), _patterns("exclude", exclude)
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None) or type(model).__name__
    modules = dict(model.named_modules())
    indices: Counter[tuple[str, str]] = Counter()
    found: list[Found] = []
    for name, module in modules.items():
        fitting = [each for each in FAMILIES if _fits(module, each)]
        if not fitting:
            continue
        stack, kind = _stack(name, module), _kind(name, module)
        index = indices[stack, kind]
        indices[stack, kind] += 1
        if (include is None or _matches(name, include)) and not _matches(name, exclude or []):
            family = next((each for each in fitting if _path(name, each.output) in modules), None)
            if family is None:
                outputs = " or ".join(_path(name, each.output) for each in fitting)
                raise UnknownFamilyError(
                    f"model: wanted the output projection of {name} at {outputs}, got none there. {_ADVICE}, or leave "
                    "the layer out by exclude="
                )
            projections = {
                "query": getattr(module, family.query),
                "key": getattr(module, family.key),
                "value": getattr(module, family.value),
                "output": modules[_path(name, family.output)],
            }
            head_dim = getattr(module, family.head_dim)
            if layout in ("auto", "compact"):
                _check_follows_its_heads(name, module, projections, head_dim)
            if SITE in module.__dict__ or any(isinstance(each, _PROJECTIONS) for each in projections.values()):
                raise invalid("model", "a model that is not attached, whole or in part", f"{name}, attached already")
            if layout != "core":
                for role, projection in projections.items():
                    _check_projection(name, role, projection)
            described = _describe(name, stack, index, kind, head_dim, projections, config)
            found.append((described, module, projections))
    if not found:
        raise UnknownFamilyError(_unknown(model_type, bool(indices)))
    _check_not_shared(found)
    layers = Layers((layer for layer, *_ in found), model_type, getattr(config, "_name_or_path", None) or None)
    return layers, [(module, projections) for _, module, projections in found]


def _fits(module: nn.Module, family: Family) -> bool:
    return all(
        isinstance(getattr(module, name, None), nn.Module) for name in (family.query, family.key, family.value)
    ) and isinstance(getattr(module, family.head_dim, None), int)


def _path(owner: str, relative: str) -> str:
    parts = owner.split(".") if owner else []
    while relative.startswith("../"):
        parts, relative = parts[:-1], relative[3:]
    return ".".join([*parts, relative])


def _stack(name: str, module: nn.Module) -> str:
    for part in name.split("."):
        if part in ("encoder", "decoder"):
            return part
    return "decoder" if getattr(module, "is_causal", False) else "encoder"


def _kind(name: str, module: nn.Module) -> str:
    own_names = (*name.split(".")[-2:], type(module).__name__)
    over_encoder = own_names[-2] == "encoder_attn"  # as BART calls the decoder's attention over the encoder's output
    return "cross" if over_encoder or any("cross" in each.lower() for each in own_names) else "self"


def _describe(
    name: str, stack: str, index: int, kind: str, head_dim: int, projections: dict[str, nn.Linear], config: object
) -> LayerInfo:
    query, key, value, output = (projections[role] for role in ("query", "key", "value", "output"))
    num_heads, num_kv_heads = query.out_features // head_dim, key.out_features // head_dim
    expected = getattr(config, "num_attention_heads", num_heads)
    expected = getattr(config, f"{stack}_attention_heads", expected)  # stacks of BART may differ
    consistent = (
        num_heads == expected
        and query.out_features == output.in_features == num_heads * head_dim
        and key.out_features == value.out_features == num_kv_heads * head_dim
        and num_kv_heads > 0
        and num_heads % num_kv_heads == 0
        and key.in_features == value.in_features
        and (kind == "cross" or query.in_features == key.in_features)
    )
    if not consistent:
        raise UnsupportedError(
            f"model: {name} has projections of {query.out_features}, {key.out_features}, {value.out_features} "
            f"and {output.in_features} features, wanted {expected} heads of {head_dim}; its layout needs a family of "
            "its own"
        )
    return LayerInfo(name, stack, index, kind, num_heads, num_kv_heads, head_dim, head_dim)


def _check_projection(name: str, role: str, projection: nn.Module) -> None:
    if type(projection) is not nn.Linear:
        raise UnsupportedError(
            f"model: the {role} projection of {name} must be exactly torch.nn.Linear, got {type(projection).__name__} "
            "(quantised, adapted and parametrised projections are not supported yet)"
        )
    forward = projection.__dict__.get("forward")
    # accelerate keeps the class's own forward in "_old_forward", and leaves it on the instance when it is removed.
    own = getattr(forward, "__func__", None) is nn.Linear.forward
    if forward is not None and not own and "_old_forward" not in projection.__dict__:
        raise UnsupportedError(
            f"model: the {role} projection of {name} has a forward of its own on the instance, {describe(forward)}; "
            "it would be bypassed"
        )


def _check_follows_its_heads(name: str, module: nn.Module, projections: dict[str, nn.Linear], head_dim: int) -> None:
    """Refuse a module whose forward, given fewer heads, would fail or mix them up."""
    fixed = _HEAD_COUNTS.intersection(inspect.unwrap(type(module).forward).__code__.co_names)
    if fixed:
        raise UnsupportedError(
            f"model: {name} cannot run with heads off yet: the forward of {type(module).__name__} reads "
            f"{', '.join(sorted(fixed))}, wanted one that reshapes with view(..., -1, head_dim)"
        )
    known = {id(parameter) for projection in projections.values() for parameter in projection.parameters()}
    for path, parameter in module.named_parameters():
        if id(parameter) not in known and not _serves_every_head(module, path, parameter, head_dim):
            raise UnsupportedError(
                f"model: {name} cannot run with heads off yet: its {path} {list(parameter.shape)} may belong to single "
                f"heads, wanted none beside the projections but norms and embeddings of width {head_dim}"
            )


def _serves_every_head(module: nn.Module, path: str, parameter: nn.Parameter, head_dim: int) -> bool:
    """Whether it is that of a child which is a norm over one head, or an embedding of positions as wide as a head."""
    child, _, own = path.partition(".")
    one_norm = parameter.dim() == 1 or isinstance(module.get_submodule(child), nn.Embedding)
    return own.isidentifier() and one_norm and parameter.shape[-1] == head_dim


def _check_not_shared(found: list[Found]) -> None:
    """Refuse a projection in two places: it could not tell for which of them it is called."""
    owners: dict[nn.Linear, str] = {}
    for layer, _, projections in found:
        for role, projection in projections.items():
            if projection in owners:
                raise UnsupportedError(
                    f"model: the {role} projection of {layer.name} is the same module as {owners[projection]}, wanted "
                    "a module each (they may share their parameters)"
                )
            owners[projection] = f"the {role} projection of {layer.name}"


def _patterns(argument: str, value: object) -> list[str] | None:
    if value is None:
        return None
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(each, str) for each in patterns):
        raise invalid_type(argument, "None, a pattern of layer names or a list of patterns", value)
    return list(patterns)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _unknown(model_type: str, filtered: bool) -> str:
    if filtered:
        return "include, exclude: wanted patterns that leave at least one layer, got none left"
    known = "; ".join(f"{each.query}, {each.key}, {each.value}, {each.output}, {each.head_dim}" for each in FAMILIES)
    return f"model: found no attention layer in {model_type} whose projections fit a known family ({known}). {_ADVICE}"

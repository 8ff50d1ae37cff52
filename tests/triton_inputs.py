"""What the tests of the Triton attention share: inputs, the same attention done eagerly, and the comparison."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from sparse_heads._attention_arguments import span_mask
from sparse_heads._triton import interpreted
from sparse_heads.ops.attention.reference import attention_reference
from sparse_heads.ops.attention.triton import attention_triton
from sparse_heads.testing import assert_close_to_reference, random_attention_inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CAUSAL = (-1, 0)
OPTIONS = {"kv_heads": None, "gate": None, "attn_mask": None, "span": (-1, -1), "scale": None, "softcap": None}
OPTIONS |= {"sinks": None, "head_mask": None}

Arguments = dict[str, Any]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def draw_mask(*shape: int, seed: int = 0) -> torch.Tensor:
    """bool, about two thirds True."""
    return draw(*shape, seed=100 + seed) > -0.4


def draw_inputs(*sizes: int, seed: int = 0) -> Arguments:
    """float64 query, key, value for B, H, H_kv, T, S, D and perhaps Dv."""
    drawn = random_attention_inputs(*sizes, dtype=torch.float64, seed=seed)
    return {name: leaf.detach().to(DEVICE) for name, leaf in zip(("query", "key", "value"), drawn, strict=True)}


def converted(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """query, key and value in `dtype`, other floating tensors in at least float32; strides stay."""
    result = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            low = name in ("query", "key", "value")
            result[name] = value.to(dtype if low else torch.promote_types(dtype, torch.float32))
    return result


def attend_triton(**arguments: Any) -> torch.Tensor:
    return attention_triton(**{**OPTIONS, **arguments})


def attend_reference(**arguments: Any) -> torch.Tensor:
    return attention_reference(**_gathered(arguments))


def softmax_times(scores: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Of float32 scores, of which only the first belong to values; the probabilities in the precision of value."""
    return scores.softmax(dim=-1)[..., : value.shape[2]].to(value.dtype) @ value


def attend_eagerly(
    *, weigh: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = softmax_times, **arguments: Any
) -> torch.Tensor:
    """The same in plain operators: products and probabilities in the inputs' precision, the softmax in float32."""
    given = _gathered(arguments)
    query, key, value = (given[name] for name in ("query", "key", "value"))
    batch, heads, queries, head_dim = query.shape
    group = heads // key.shape[1] if heads else 1
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    scale = 1 / math.sqrt(head_dim) if given["scale"] is None else given["scale"]
    scores = (query @ key.transpose(-2, -1) * scale).float()
    if given["softcap"] is not None:
        scores = given["softcap"] * torch.tanh(scores / given["softcap"])
    visible = span_mask(queries, key.shape[2], given["span"], query.device)
    mask = given["attn_mask"]
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    for shown in (visible, mask if mask is not None and mask.dtype == torch.bool else None):
        scores = scores if shown is None else scores.masked_fill(~shown, -math.inf)
    sees_a_key = (scores != -math.inf).any(dim=-1, keepdim=True)
    scores = torch.where(sees_a_key, scores, 0.0)
    if given["sinks"] is not None:
        sinks = given["sinks"].float()[:, None, None].expand(batch, heads, queries, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    output = torch.where(sees_a_key, weigh(scores, value), 0.0)
    if given["gate"] is not None:
        output = output * given["gate"].expand(batch, heads)[..., None, None]
    if given["head_mask"] is not None:
        output = output.masked_fill(~given["head_mask"].expand(batch, heads)[..., None, None], 0.0)
    return output.to(query.dtype)


def _gathered(arguments: Arguments) -> Arguments:
    """All options, kv_heads applied to key and value."""
    given = {**OPTIONS, **arguments}
    kv_heads = given.pop("kv_heads")
    if kv_heads is not None:
        given["key"], given["value"] = (given[name].index_select(1, kv_heads) for name in ("key", "value"))
    return given


def check(arguments: Arguments, dtype: torch.dtype) -> torch.Tensor:
    """The kernel's output on these arguments in `dtype`, if it is as good as the precision allows."""
    low = converted(arguments, dtype)
    exact = attend_reference(**converted(low, torch.float64))
    actual = attend_triton(**low)
    assert_as_good(actual, attend_eagerly(**low), exact)
    return actual


def assert_as_good(actual: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    """`assert_close_to_reference`; where Triton is interpreted, with one more rounding to bfloat16."""
    if interpreted() and actual.dtype == torch.bfloat16 and actual.numel():
        # The interpreter cuts the digits off that a device rounds.
        rounding = torch.finfo(actual.dtype).eps * exact.abs().max()
        actual = (actual + (exact - actual).clamp(-rounding, rounding)).to(actual.dtype)
    assert_close_to_reference(actual, eager, exact)


def with_gradients(
    attend: Callable[..., torch.Tensor], arguments: Arguments, gradient: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The output, and under their names the gradients of all floating tensors, for this gradient of the output."""
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    output = attend(**{**arguments, **leaves})
    output.backward(gradient.to(output.dtype))
    return {"output": output.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def use_small_tiles(monkeypatch) -> None:
    """Several tiles of rows and several blocks of keys on small inputs, in every pass."""
    from sparse_heads.ops.attention.triton import configs

    small = configs.Config(16, 16, 4, 2)
    for name in configs.TABLE:
        monkeypatch.setitem(configs.TABLE, name, {((8, 0), size): {256: small} for size in (2, 4)})

"""What the tests of the Triton projections share: inputs, both implementations under one signature, the comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from projection_inputs import draw, draw_masks, draw_weights, group_mask, run_with_gradients
from torch import Tensor

from sparse_heads.ops.projection import reference
from sparse_heads.ops.projection import triton as projections
from sparse_heads.ops.projection.triton import in_backward, in_forward, out_backward, out_forward, weight_gradient
from sparse_heads.ops.projection.triton.configs import Config
from sparse_heads.testing import assert_close_to_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL_TILES = Config(block_m=16, block_n=16, block_k=16, num_warps=4, num_stages=2, group_m=2)
MASKS = ["none", "one", "half", "all", "per request", "none per request"]

Leaves = dict[str, Tensor | None]
Results = dict[str | int, Tensor]


class Sizes(NamedTuple):
    """A block: batch, tokens, width, query heads, key/value heads and the heads' dimension."""

    batch: int
    tokens: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def terms(self) -> int:
        """No sum has more products, and few more roundings beside them."""
        return 4 + max(self.width, 3 * self.heads * self.head_dim, self.batch * self.tokens * self.head_dim)


# Heads that lie in one tile of a sum and heads that do not; tiles that are full and tiles that are not.
SIZES = [
    Sizes(1, 1, 1, 6, 2, 1),
    Sizes(3, 3, 17, 6, 3, 8),
    Sizes(2, 17, 111, 4, 2, 24),
    Sizes(3, 1, 63, 3, 3, 80),
    Sizes(2, 17, 64, 4, 1, 64),
]


def use_tiles(monkeypatch: pytest.MonkeyPatch, tiles: str) -> None:
    """ "chosen" by the table, or "small": several of them in every direction, in more than one group."""
    if tiles == "small":
        for module in (in_forward, in_backward, out_forward, out_backward, weight_gradient):
            monkeypatch.setattr(module, "choose", lambda *arguments: SMALL_TILES)


def head_mask(name: str, sizes: Sizes) -> Tensor:
    """bool [heads], or [batch, heads] for the names with "request"."""
    head = torch.arange(sizes.heads)
    masks = {"none": head < 0, "one": head == sizes.heads - 1, "half": head % 2 == 0, "all": head >= 0}
    masks |= {
        "per request": draw_masks(sizes.batch, sizes.heads, seed=3),
        "none per request": torch.zeros(sizes.batch, sizes.heads, dtype=torch.bool),
    }
    return masks[name].to(DEVICE)


def in_leaves(sizes: Sizes) -> Leaves:
    """Input, weights and biases of queries, keys and values; keys have no bias."""
    columns = [count * sizes.head_dim for count in (sizes.heads, sizes.kv_heads, sizes.kv_heads)]
    weights = draw_weights([(count, sizes.width) for count in columns])
    leaves = {"x": draw(sizes.batch, sizes.tokens, sizes.width), "bias_0": draw(columns[0], seed=5), "bias_1": None}
    leaves |= {"bias_2": draw(columns[2], seed=6), **{f"weight_{i}": weight for i, weight in enumerate(weights)}}
    return {name: None if leaf is None else leaf.to(DEVICE) for name, leaf in leaves.items()}


def out_leaves(sizes: Sizes, gate: str = "none", bias: bool = True) -> Leaves:
    """Heads, all of them, weight, bias and a gate "shared" by the batch or one "per request"."""
    columns = sizes.heads * sizes.head_dim
    gates = {"none": None, "shared": draw(sizes.heads, seed=7), "per request": draw(sizes.batch, sizes.heads, seed=7)}
    leaves = {
        "heads": draw(sizes.batch, sizes.tokens, columns, seed=8),
        "weight": draw_weights([(sizes.width, columns)])[0],
        "bias": draw(sizes.width, seed=9) if bias else None,
        "gate": gates[gate],
    }
    return {name: None if leaf is None else leaf.to(DEVICE) for name, leaf in leaves.items()}


def project_in(implementation: ModuleType, mask: Tensor, head_dim: int, **leaves: Tensor | None) -> tuple[Tensor, ...]:
    weights = [leaves[f"weight_{i}"] for i in range(3)]
    biases = [leaves[f"bias_{i}"] for i in range(3)]
    masks = [group_mask(mask, weight.shape[0] // head_dim) for weight in weights]
    if mask.dim() == 2:
        return tuple(implementation.in_projection_per_request(leaves["x"], weights, biases, masks, head_dim))
    kept = [each.nonzero()[:, 0] for each in masks]
    return tuple(implementation.in_projection(leaves["x"], weights, biases, kept, head_dim))


def project_out(
    implementation: ModuleType,
    mask: Tensor,
    head_dim: int,
    heads: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
) -> Tensor:
    arguments = {} if gate is None else {"gate": gate}
    if implementation is reference and gate is not None:
        scale = gate if gate.dim() == 1 else gate[:, None]
        heads = (heads.unflatten(-1, (-1, head_dim)) * scale.unsqueeze(-1)).to(heads.dtype).flatten(2)
        arguments = {}
    if mask.dim() == 2:
        return implementation.out_projection_per_request(heads, weight, bias, mask, head_dim, **arguments)
    return implementation.out_projection(heads, weight, bias, mask.nonzero()[:, 0], head_dim, **arguments)


def check_outputs(project: Callable[..., object], leaves: Leaves, dtype: torch.dtype, terms: int) -> None:
    """The outputs of `project(implementation, **leaves)` against the reference in float64, as `compare` says."""

    def run(implementation: ModuleType, leaves: Leaves) -> dict[str, Tensor]:
        with torch.no_grad():
            outputs = project(implementation, **leaves)
        return dict(enumerate(outputs if isinstance(outputs, tuple) else (outputs,)))

    low = {name: None if leaf is None else leaf.to(dtype) for name, leaf in leaves.items()}
    rounded = {name: None if leaf is None else leaf.double() for name, leaf in low.items()}
    sizes = run(reference, {name: None if leaf is None else leaf.abs() for name, leaf in rounded.items()})
    compare(run(projections, low), run(reference, low), run(reference, rounded), sizes, terms)


def check_gradients(project: Callable[..., object], leaves: Leaves, dtype: torch.dtype, terms: int) -> None:
    """Outputs and gradients of `project(implementation, **leaves)`, likewise."""
    rounded = {name: None if leaf is None else leaf.to(dtype).double() for name, leaf in leaves.items()}
    exact = partial(run_with_gradients, partial(project, reference), dtype=torch.float64, output_gradients_from=dtype)
    compare(
        run_with_gradients(partial(project, projections), leaves, dtype),
        run_with_gradients(partial(project, reference), leaves, dtype),
        exact(rounded),
        exact({name: None if leaf is None else leaf.abs() for name, leaf in rounded.items()}, absolute=True),
        terms,
    )


def compare(actual: Results, eager: Results, expected: Results, sizes: Results, terms: int) -> None:
    """float32: by the rounding bound of sums of so many terms; narrower: at most twice the error of torch's products.

    sizes: the results for the absolute values of all numbers.
    """
    for name, tensor in actual.items():
        if tensor.dtype == torch.float32:
            error = (tensor.double() - expected[name]).abs()
            assert (error <= terms * torch.finfo(torch.float32).eps / 2 * sizes[name]).all(), name
        else:
            assert_close_to_reference(tensor, eager[name], expected[name])


def run_bits(project: Callable[..., object], leaves: Leaves, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients."""
    return list(run_with_gradients(partial(project, projections), leaves, dtype).values())


def all_equal(first: Iterable[Tensor], second: Iterable[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))

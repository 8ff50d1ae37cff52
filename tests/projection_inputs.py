"""Inputs for the projection tests, and the projections written one request and one head at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

# Of 6 heads: what a kernel may see as no run, one, several, the first, the last.
MASKS = {
    "none": [0, 0, 0, 0, 0, 0],
    "one": [0, 0, 0, 1, 0, 0],
    "all": [1, 1, 1, 1, 1, 1],
    "scattered": [1, 0, 1, 0, 0, 1],
    "runs": [0, 1, 1, 0, 1, 1],
}
MASKS = {name: torch.tensor(mask, dtype=torch.bool) for name, mask in MASKS.items()}
PER_REQUEST = torch.stack([MASKS["scattered"], MASKS["none"], MASKS["all"], MASKS["one"]])
with_every_mask = pytest.mark.parametrize(
    ("backend", "head_mask"),
    [
        pytest.param(backend, mask, id=f"{backend}-{name}")
        for backend in ("reference", "cpu")
        for name, mask in {**MASKS, "per request": PER_REQUEST}.items()
    ],
)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, the same in every dtype to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def draw_masks(batch: int, heads: int, seed: int = 0) -> Tensor:
    """bool `[batch, heads]`: each head on or off by chance."""
    return draw(batch, heads, seed=seed) > 0


def draw_weights(
    sizes: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float64, seed: int = 10
) -> tuple[Tensor, ...]:
    """Weights of these sizes, scaled to give outputs near 1."""
    scaled = [draw(*size, seed=seed + i) / max(size[1], 1) ** 0.5 for i, size in enumerate(sizes)]
    return tuple(weight.to(dtype) for weight in scaled)


def group_mask(head_mask: Tensor, count: int) -> Tensor:
    """bool `[..., count]`: a key/value head runs where one query head of its group does."""
    size = head_mask.shape[-1] // count
    return torch.stack([head_mask[..., i * size : (i + 1) * size].any(-1) for i in range(count)], -1)


def naive_in_projection(x: Tensor, weight: Tensor, bias: Tensor | None, head_mask: Tensor, head_dim: int) -> Tensor:
    """One projection of as many heads as `head_mask` has: `[B, kept, T, D]`, or `[B, H, T, D]` per request."""
    requests = []
    for b in range(x.shape[0]):
        rows = []
        for h, runs in enumerate(head_mask.expand(x.shape[0], -1)[b].tolist()):
            block = slice(h * head_dim, (h + 1) * head_dim)
            if runs:
                head = x[b] @ weight[block].T
                rows.append(head if bias is None else head + bias[block])
            elif head_mask.dim() == 2:
                rows.append(x.new_zeros(x.shape[1], head_dim))
        requests.append(torch.stack(rows) if rows else x.new_zeros(0, x.shape[1], head_dim))
    return torch.stack(requests)


def naive_out_projection(
    heads: Tensor, weight: Tensor, bias: Tensor | None, head_mask: Tensor, gate: Tensor | None = None
) -> Tensor:
    """`heads [B, H, T, D]`, all of them, to `[B, T, E]`."""
    batch, num_heads, tokens, head_dim = heads.shape
    outputs = []
    for b in range(batch):
        kept = [h for h in range(num_heads) if head_mask.expand(batch, -1)[b, h]]
        inputs = [heads[b, h] if gate is None else heads[b, h] * gate.expand(batch, -1)[b, h] for h in kept]
        columns = [weight[:, h * head_dim : (h + 1) * head_dim] for h in kept]
        output = heads.new_zeros(tokens, weight.shape[0])
        if kept:
            output = torch.cat(inputs, 1) @ torch.cat(columns, 1).T
        outputs.append(output if bias is None else output + bias)
    return torch.stack(outputs)


def run_with_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    leaves: dict[str, Tensor | None],
    dtype: torch.dtype,
    output_gradients_from: torch.dtype | None = None,
    absolute: bool = False,
) -> dict[str, Tensor]:
    """What `function(**leaves)` gives in `dtype`, and every leaf's gradient for seeded output gradients.

    `output_gradients_from`: the dtype that these are rounded to first; `absolute`: they lose their signs.
    """
    leaves = {name: None if leaf is None else leaf.to(dtype).detach().requires_grad_() for name, leaf in leaves.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # Where no head runs, a naive projection depends on nothing.
    differentiable = {i: output for i, output in enumerate(outputs) if output.requires_grad}
    rounded = output_gradients_from or dtype
    gradients = [
        draw(*output.shape, seed=50 + i).to(output.device, rounded).to(dtype) for i, output in differentiable.items()
    ]
    gradients = [gradient.abs() for gradient in gradients] if absolute else gradients
    torch.autograd.backward(list(differentiable.values()), gradients)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    for name, leaf in leaves.items():
        if leaf is not None:
            results[f"gradient of {name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return results


def assert_equal_to_rounding(actual: dict[str, Tensor], expected: dict[str, Tensor], terms: int) -> None:
    """For float64 results that add up to `terms` products: each addition rounds a partial sum, which stays below 32."""
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        bound = terms * torch.finfo(torch.float64).eps * 32
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=bound, msg=lambda text, name=name: name + text)

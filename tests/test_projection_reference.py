"""Are the projections right? Both backends in float64 against loops over requests and heads, and finite differences."""

from __future__ import annotations

import pytest
import torch
from projection_inputs import (
    PER_REQUEST,
    assert_equal_to_rounding,
    draw,
    draw_weights,
    group_mask,
    naive_in_projection,
    naive_out_projection,
    run_with_gradients,
    with_every_mask,
)

import sparse_heads as sh

HEADS, HEAD_DIM, WIDTH, TOKENS = 6, 4, 7, 5
BATCH = PER_REQUEST.shape[0]
GATE = torch.tensor([1.5, 0.0, -2.0, 0.0, 0.3, 1.0], dtype=torch.float64)
GATES = {"no gate": None, "gate": GATE, "per-request gate": GATE * torch.tensor([[1.0], [-3.0], [0.0], [0.5]])}


def in_projection_leaves(counts: tuple[int, ...], with_bias: tuple[bool, ...]) -> dict:
    """x, and a weight and a bias or None for each head count."""
    weights = draw_weights([(count * HEAD_DIM, WIDTH) for count in counts])
    biases = [draw(count * HEAD_DIM, seed=20 + i) for i, count in enumerate(counts)]
    leaves = {"x": draw(BATCH, TOKENS, WIDTH)}
    for i, (weight, bias, used) in enumerate(zip(weights, biases, with_bias, strict=True)):
        leaves |= {f"weight_{i}": weight, f"bias_{i}": bias if used else None}
    return leaves


def out_projection_leaves(with_bias: bool = True, gate: torch.Tensor | None = None) -> dict:
    (weight,) = draw_weights([(WIDTH, HEADS * HEAD_DIM)])
    bias = draw(WIDTH, seed=20) if with_bias else None
    return {"heads": draw(BATCH, HEADS, TOKENS, HEAD_DIM), "weight": weight, "bias": bias, "gate": gate}


def q_k_v(head_mask: torch.Tensor, backend: str):
    """`in_projection` of three weights, with named tensors."""

    def project(x, weight_0, bias_0, weight_1, bias_1, weight_2, bias_2):
        weights, biases = (weight_0, weight_1, weight_2), (bias_0, bias_1, bias_2)
        return sh.in_projection(x, weights, biases, head_mask, head_dim=HEAD_DIM, backend=backend)

    return project


def naive_q_k_v(head_mask: torch.Tensor):
    def project(x, **parameters):
        weights_and_biases = [(parameters[f"weight_{i}"], parameters[f"bias_{i}"]) for i in range(3)]
        return tuple(
            naive_in_projection(x, weight, bias, group_mask(head_mask, weight.shape[0] // HEAD_DIM), HEAD_DIM)
            for weight, bias in weights_and_biases
        )

    return project


@with_every_mask
@pytest.mark.parametrize(
    ("kv_heads", "with_bias"), [(6, (True, True, True)), (3, (True, False, True)), (1, (False, False, False))]
)
def test_queries_keys_and_values(backend, head_mask, kv_heads, with_bias):
    leaves = in_projection_leaves((HEADS, kv_heads, kv_heads), with_bias)
    actual = run_with_gradients(q_k_v(head_mask, backend), leaves, torch.float64)
    expected = run_with_gradients(naive_q_k_v(head_mask), leaves, torch.float64)
    assert_equal_to_rounding(actual, expected, 3 * HEADS * HEAD_DIM)


@with_every_mask
def test_one_weight_gives_one_tensor(backend, head_mask):
    leaves = in_projection_leaves((HEADS,), (True,))
    x, weight, bias = leaves.values()
    output = sh.in_projection(x, weight, bias, head_mask, head_dim=HEAD_DIM, backend=backend)
    expected = naive_in_projection(x, weight, bias, head_mask, HEAD_DIM)
    assert_equal_to_rounding({"output": output}, {"output": expected}, WIDTH)
    (in_tuple,) = sh.in_projection(x, (weight,), (bias,), head_mask, head_dim=HEAD_DIM, backend=backend)
    assert torch.equal(in_tuple, output)


@with_every_mask
@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("compact", [True, False], ids=["compact", "wide"])
def test_output_projection(backend, head_mask, gate, with_bias, compact):
    if compact and head_mask.dim() == 2:
        compact = False  # per request there is the full width only
    leaves = out_projection_leaves(with_bias, gate)

    def project(heads, weight, bias, gate):
        heads = heads[:, head_mask] if compact else heads
        return sh.out_projection(heads, weight, bias, head_mask, gate=gate, backend=backend)

    def naive(heads, weight, bias, gate):
        return naive_out_projection(heads, weight, bias, head_mask, gate)

    actual = run_with_gradients(project, leaves, torch.float64)
    expected = run_with_gradients(naive, leaves, torch.float64)
    assert_equal_to_rounding(actual, expected, HEADS * HEAD_DIM * TOKENS)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_no_mask_means_every_head_and_every_gate_gets_its_gradient(backend):
    leaves = out_projection_leaves(gate=GATE)
    everything = torch.ones(HEADS, dtype=torch.bool)

    def project(heads, weight, bias, gate):
        return sh.out_projection(heads, weight, bias, gate=gate, backend=backend)

    def naive(heads, weight, bias, gate):
        return naive_out_projection(heads, weight, bias, everything, gate)

    actual = run_with_gradients(project, leaves, torch.float64)
    assert (actual["gradient of gate"] != 0).all()
    assert_equal_to_rounding(
        actual, run_with_gradients(naive, leaves, torch.float64), HEADS * HEAD_DIM * TOKENS * BATCH
    )
    x, weight, bias = in_projection_leaves((HEADS,), (True,)).values()
    output = sh.in_projection(x, weight, bias, head_dim=HEAD_DIM, backend=backend)
    assert torch.equal(output, sh.in_projection(x, weight, bias, everything, head_dim=HEAD_DIM, backend=backend))


SMALL_MASKS = {
    "scattered": torch.tensor([True, False, True]),
    "all": torch.tensor([True, True, True]),
    "per request": torch.tensor([[True, False, True], [False, False, False]]),
}
with_small_masks = pytest.mark.parametrize(
    ("backend", "head_mask"),
    [
        pytest.param(backend, mask, id=f"{backend}-{name}")
        for backend in ("reference", "cpu")
        for name, mask in SMALL_MASKS.items()
    ],
)


@with_small_masks
def test_in_projection_against_finite_differences(backend, head_mask):
    tensors = [draw(2, 2, 3), *draw_weights([(6, 3), (2, 3), (2, 3)]), draw(6, seed=20), draw(2, seed=21)]

    def project(x, query, key, value, query_bias, value_bias):
        biases = (query_bias, None, value_bias)
        return sh.in_projection(x, (query, key, value), biases, head_mask, head_dim=2, backend=backend)

    assert torch.autograd.gradcheck(project, [tensor.requires_grad_() for tensor in tensors])


@with_small_masks
@pytest.mark.parametrize("gate", [[0.0, 0.5, 1.5], [[0.0, 2.0, 1.0], [-1.0, 0.0, 0.5]]], ids=["shared", "per request"])
def test_output_projection_against_finite_differences(backend, head_mask, gate):
    gate = torch.tensor(gate, dtype=torch.float64)
    tensors = [draw(2, 3, 2, 2), *draw_weights([(3, 6)]), draw(3, seed=20), gate]

    def project(heads, weight, bias, gate):
        return sh.out_projection(heads, weight, bias, head_mask, gate=gate, backend=backend)

    assert torch.autograd.gradcheck(project, [tensor.requires_grad_() for tensor in tensors])


def test_second_derivatives():
    mask = torch.tensor([False, True])
    tensors = [draw(1, 2, 3), *draw_weights([(4, 3)]), draw(4, seed=20)]
    assert torch.autograd.gradgradcheck(
        lambda *tensors: sh.in_projection(*tensors, mask, head_dim=2, backend="cpu"),
        [tensor.requires_grad_() for tensor in tensors],
    )
    tensors = [draw(1, 2, 2, 2), *draw_weights([(3, 4)])]
    assert torch.autograd.gradgradcheck(
        lambda *tensors: sh.out_projection(*tensors, None, mask, backend="cpu"),
        [tensor.requires_grad_() for tensor in tensors],
    )

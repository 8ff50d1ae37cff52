"""Are the C++ kernels as exact as their precision allows, whatever the sizes, dtypes and layouts, and repeatable?"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from projection_inputs import (
    MASKS,
    PER_REQUEST,
    draw,
    draw_masks,
    draw_weights,
    group_mask,
    naive_in_projection,
    naive_out_projection,
    run_with_gradients,
)

import sparse_heads as sh
from sparse_heads.testing import assert_close_to_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Every number of tokens that a kernel may treat on its own, and odd ones beyond.
FEW_TOKENS = [(1, tokens) for tokens in range(1, 18)]
SOME_TOKENS = [(1, 1), (1, 4), (1, 8), (1, 9), (1, 17), (3, 11), (2, 65)]
MORE_TOKENS = [(3, 11), (7, 9), (3, 37), (2, 65), (3, 171)]
ALL_MASKS = [*MASKS, "per request", "none per request"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def kept_and_all(count: int) -> dict[str, torch.Tensor]:
    scattered = torch.arange(count) % 3 != 1
    return {"scattered": scattered, "all": torch.ones(count, dtype=torch.bool)}


def check_in_projection(x, weights, biases, head_mask, head_dim, by_bound_only=False):
    """Outputs and gradients against loops in float64: no worse than torch's own product of the kept rows.

    `biases[i]` may be None; `by_bound_only`: as `compare` says.
    """
    leaves = {"x": x}
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        leaves |= {f"weight_{i}": weight, f"bias_{i}": bias}
    count = len(weights)

    def of(parameters, name):
        return tuple(parameters[f"{name}_{i}"] for i in range(count))

    def project(x, backend, **parameters):
        pair = of(parameters, "weight"), of(parameters, "bias")
        return sh.in_projection(x, *pair, head_mask, head_dim=head_dim, backend=backend)

    def naive(x, **parameters):
        pairs = zip(of(parameters, "weight"), of(parameters, "bias"), strict=True)
        return tuple(
            naive_in_projection(x, weight, bias, group_mask(head_mask, len(weight) // head_dim), head_dim)
            for weight, bias in pairs
        )

    compare(project, naive, leaves, x.dtype, by_bound_only)


def check_out_projection(heads, weight, bias, head_mask, gate=None, compact=False, by_bound_only=False):
    """As `check_in_projection`; `heads [B, H, T, D]` are all heads, of which the kernel gets the kept if `compact`."""

    def project(heads, weight, bias, gate, backend):
        heads = heads[:, head_mask] if compact else heads
        return sh.out_projection(heads, weight, bias, head_mask, gate=gate, backend=backend)

    def naive(heads, weight, bias, gate):
        return naive_out_projection(heads, weight, bias, head_mask, gate)

    leaves = {"heads": heads, "weight": weight, "bias": bias, "gate": gate}
    compare(project, naive, leaves, heads.dtype, by_bound_only)


def compare(project, naive, leaves, dtype, by_bound_only=False):
    """`by_bound_only`: by the rounding bound of sums, as where few numbers make another computation's error luck."""
    actual = run_with_gradients(partial(project, backend="cpu"), leaves, dtype)
    eager = run_with_gradients(partial(project, backend="reference"), leaves, dtype)
    # The same rounded numbers in: only what is computed from them may differ.
    rounded = {name: None if leaf is None else leaf.to(dtype).double() for name, leaf in leaves.items()}
    expected = run_with_gradients(naive, rounded, torch.float64, output_gradients_from=dtype)
    sizes = {name: None if leaf is None else leaf.abs() for name, leaf in rounded.items()}
    sizes = run_with_gradients(naive, sizes, torch.float64, output_gradients_from=dtype, absolute=True)
    # No sum here has more products than this, nor more than three roundings beside them (bias, gate).
    terms = 3 + max(3 * max(leaf.shape) * leaf.shape[0] for leaf in leaves.values() if leaf is not None)
    for name, tensor in actual.items():
        # The gradients are torch's own products, in another order than autograd's.
        if dtype == torch.float64 or (dtype == torch.float32 and (by_bound_only or "gradient" in name)):
            error = (tensor.double() - expected[name]).abs()
            assert (error <= terms * torch.finfo(dtype).eps / 2 * sizes[name]).all(), name
        else:
            assert_close_to_reference(tensor, eager[name], expected[name])


@pytest.mark.parametrize(
    ("width", "head_dim", "heads", "kv_heads", "batch", "tokens"),
    [(50, 8, 6, 3, *size) for size in FEW_TOKENS + MORE_TOKENS]
    + [(100, 20, 5, 5, *size) for size in SOME_TOKENS]
    + [(803, 32, 3, 1, *size) for size in SOME_TOKENS]
    # Rows a power of two apart: kernels may treat them on their own.
    + [(512, 8, 4, 2, *size) for size in SOME_TOKENS],
)
def test_in_projection_of_every_number_of_tokens(width, head_dim, heads, kv_heads, batch, tokens):
    x = draw(batch, tokens, width, dtype=torch.float32)
    counts = (heads, kv_heads, kv_heads)
    weights = draw_weights([(count * head_dim, width) for count in counts], torch.float32)
    biases = [draw(heads * head_dim, seed=5), None, draw(kv_heads * head_dim, seed=6)]
    check_in_projection(x, weights, biases, kept_and_all(heads)["scattered"], head_dim)


@pytest.mark.parametrize(
    ("width", "head_dim", "heads", "batch", "tokens"),
    [(50, 8, 6, *size) for size in FEW_TOKENS + MORE_TOKENS]
    + [(100, 20, 5, *size) for size in SOME_TOKENS]
    + [(33, 64, 19, *size) for size in SOME_TOKENS]
    + [(17, 64, 8, *size) for size in SOME_TOKENS]
    # The same columns in short runs.
    + [(17, 4, 128, *size) for size in SOME_TOKENS],
)
def test_output_projection_of_every_number_of_tokens(width, head_dim, heads, batch, tokens):
    (weight,) = draw_weights([(width, heads * head_dim)], torch.float32)
    inputs = draw(batch, heads, tokens, head_dim, dtype=torch.float32)
    check_out_projection(inputs, weight, draw(width, seed=5), kept_and_all(heads)["scattered"], compact=tokens % 2 == 0)


@pytest.mark.parametrize(
    ("width", "head_dim", "heads", "kv_heads", "batch", "tokens"),
    [(50, 8, 6, 3, 5, tokens) for tokens in (*range(1, 19), 33, 65, 128)]
    + [(100, 20, 5, 5, 9, tokens) for tokens in (1, 4, 9, 17)]
    + [(512, 8, 4, 2, 4, tokens) for tokens in (3, 16, 33)]
    # More columns than are packed at once.
    + [(1600, 64, 25, 5, 3, tokens) for tokens in (2, 12, 40)],
)
def test_requests_with_masks_of_their_own(width, head_dim, heads, kv_heads, batch, tokens):
    head_mask = draw_masks(batch, heads)
    head_mask[1] = head_mask[0]
    head_mask[2] = False
    x = draw(batch, tokens, width, dtype=torch.float32)
    counts = (heads, kv_heads, kv_heads)
    weights = draw_weights([(count * head_dim, width) for count in counts], torch.float32)
    biases = [draw(heads * head_dim, seed=5), None, draw(kv_heads * head_dim, seed=6)]
    check_in_projection(x, weights, biases, head_mask, head_dim)
    (weight,) = draw_weights([(width, heads * head_dim)], torch.float32)
    inputs = draw(batch, heads, tokens, head_dim, dtype=torch.float32)
    check_out_projection(inputs, weight, draw(width, seed=5), head_mask)


@pytest.mark.parametrize("head_mask", [*MASKS.values(), PER_REQUEST[:3], PER_REQUEST[[1, 1, 1]]], ids=ALL_MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 11])
def test_dtypes_and_masks(dtype, head_mask, tokens):
    gate = draw(6, seed=7)
    gate[0] = 0
    weights = draw_weights([(48, 50), (24, 50), (24, 50)])
    check_in_projection(draw(3, tokens, 50).to(dtype), weights, (draw(48), None, draw(24)), head_mask, 8)
    (weight,) = draw_weights([(50, 48)])
    heads = draw(3, 6, tokens, 8).to(dtype)
    check_out_projection(heads, weight, draw(50), head_mask)
    check_out_projection(heads, weight, None, head_mask, gate=gate, compact=head_mask.dim() == 1)


LAYOUTS = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "transposed": lambda tensor: tensor.transpose(-1, -2).contiguous().transpose(-1, -2),
    "other dimensions first": lambda tensor: tensor.transpose(0, -2).contiguous().transpose(0, -2),
    "rows apart": lambda tensor: torch.cat([tensor, torch.full_like(tensor, torch.nan)], -1)[..., : tensor.shape[-1]],
    "every other column": lambda tensor: torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0],
    "every other row": lambda tensor: torch.stack([tensor, torch.full_like(tensor, torch.nan)], -2)[..., 0, :],
    "not aligned": lambda tensor: torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape),
}


@pytest.mark.parametrize("tokens", [2, 19])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_mask", [MASKS["runs"], PER_REQUEST[:3]], ids=["shared", "per request"])
def test_layouts(head_mask, layout, tokens, dtype):
    """However the numbers lie in memory, the result is as exact; what lies between them is not used."""
    arrange = LAYOUTS[layout]
    x, (weight,), bias = draw(3, tokens, 50, dtype=dtype), draw_weights([(48, 50)], dtype), draw(48, dtype=dtype)
    arranged_bias = torch.stack([bias, bias], 1)[:, 0]
    heads, (out_weight,) = draw(3, 6, tokens, 8, dtype=dtype), draw_weights([(50, 48)], dtype)

    def project(x, weight, bias, heads, out_weight):
        projected = sh.in_projection(x, weight, bias, head_mask, head_dim=8, backend="cpu")
        return projected, sh.out_projection(heads, out_weight, None, head_mask, backend="cpu")

    originals = (x, weight, bias, heads, out_weight)
    plain = project(*(tensor.double() for tensor in originals))
    eager = project(*originals)
    different = (arrange(x), arrange(weight), arranged_bias, arrange(heads), arrange(out_weight))
    for original, changed in zip(originals, different, strict=True):
        assert torch.equal(original, changed)
    for actual, low, expected in zip(project(*different), eager, plain, strict=True):
        assert_close_to_reference(actual, low, expected)


def test_expanded_inputs():
    x, (weight,), bias = draw(1, 1, 50, dtype=torch.float32), draw_weights([(8, 50)], torch.float32), draw(8)
    (shared_row,) = draw_weights([(1, 50)], torch.float32)
    mask = torch.tensor([True])
    for tokens in (3, 20):
        wide = sh.in_projection(x.expand(4, tokens, 50), weight, bias.float(), mask, head_dim=8, backend="cpu")
        assert_close_to_reference(wide[2, 0, 1], torch.nn.functional.linear(x, weight, bias.float())[0, 0],
                                  torch.nn.functional.linear(x.double(), weight.double(), bias)[0, 0])  # fmt: skip
        assert torch.equal(wide, wide[:1, :, :1].expand_as(wide))
        rows = sh.in_projection(
            x.expand(4, tokens, 50), shared_row.expand(8, 50), None, mask, head_dim=8, backend="cpu"
        )
        assert torch.equal(rows, rows[..., :1].expand_as(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 31, 263])
@pytest.mark.parametrize("per_request", [False, True], ids=["shared", "per request"])
def test_twenty_runs_give_the_same_bits(per_request, tokens, dtype):
    weights = draw_weights([(12 * 16, 192)] * 3, dtype)
    (out_weight,) = draw_weights([(192, 12 * 16)], dtype)
    mask = draw_masks(3, 12) if per_request else kept_and_all(12)["scattered"]
    x = draw(3 if per_request else 1, tokens, 192)
    leaves = {"x": x, "a": weights[0], "b": weights[1], "c": weights[2], "out": out_weight}

    def block(x, a, b, c, out):
        query, key, value = sh.in_projection(x, (a, b, c), None, mask, head_dim=16, backend="cpu")
        return sh.out_projection(query * key + value, out, None, mask, backend="cpu")

    first = run_with_gradients(block, leaves, dtype)
    for _ in range(19):
        again = run_with_gradients(block, leaves, dtype)
        assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("tokens", [1, 5, 31, 263])
@pytest.mark.parametrize("mask", [kept_and_all(60)["scattered"], draw_masks(3, 60)], ids=["shared", "per request"])
def test_the_number_of_threads_changes_no_bit(mask, tokens):
    batch = mask.shape[0] if mask.dim() == 2 else 1
    x, (weight,) = draw(batch, tokens, 900, dtype=torch.float32), draw_weights([(900, 900)], torch.float32)

    def block():
        (heads,) = sh.in_projection(x, (weight,), None, mask, head_dim=15, backend="cpu")
        return heads, sh.out_projection(heads, weight, None, mask, backend="cpu")

    by_two = block()
    for threads in (1, 3, 8):
        torch.set_num_threads(threads)
        assert all(torch.equal(*pair) for pair in zip(by_two, block(), strict=True))


@st.composite
def problems(draw_from):
    head_dim = draw_from(st.integers(1, 40))
    heads = draw_from(st.sampled_from([1, 2, 4, 6, 12]))
    kv_heads = draw_from(st.sampled_from([count for count in (1, 2, 4, 6, 12) if heads % count == 0]))
    row = st.lists(st.booleans(), min_size=heads, max_size=heads)
    # Few rows to choose from, so that requests often have equal ones.
    rows = draw_from(st.lists(row, min_size=1, max_size=4))
    sizes = draw_from(st.integers(1, 6)), draw_from(st.integers(1, 40)), draw_from(st.integers(1, 300))
    mask = torch.tensor(rows[0])
    if draw_from(st.booleans()):
        mask = torch.tensor([draw_from(st.sampled_from(rows)) for _ in range(sizes[0])])
    return head_dim, kv_heads, mask, sizes, draw_from(st.booleans()), draw_from(st.integers(0, 1000))


def check_problem(problem):
    head_dim, kv_heads, mask, (batch, tokens, width), with_bias, seed = problem
    counts = (mask.shape[-1], kv_heads, kv_heads)
    weights = draw_weights([(count * head_dim, width) for count in counts], torch.float32, seed)
    biases = [draw(count * head_dim, seed=seed) if with_bias else None for count in counts]
    x = draw(batch, tokens, width, seed=seed, dtype=torch.float32)
    check_in_projection(x, weights, biases, mask, head_dim, by_bound_only=True)
    (weight,) = draw_weights([(width, counts[0] * head_dim)], torch.float32, seed)
    heads = draw(batch, counts[0], tokens, head_dim, seed=seed + 1, dtype=torch.float32)
    bias = draw(width, seed=seed) if with_bias else None
    check_out_projection(heads, weight, bias, mask, compact=with_bias and mask.dim() == 1, by_bound_only=True)


@settings(max_examples=25)
@given(problems())
def test_any_problem(problem):
    check_problem(problem)


@pytest.mark.full
@settings(max_examples=1000)
@given(problems())
def test_many_problems(problem):
    check_problem(problem)

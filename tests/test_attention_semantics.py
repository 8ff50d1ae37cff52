"""Do the implementations keep the contract? Every test runs on each of them."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_heads.ops.attention import attention
from sparse_heads.testing import random_attention_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

SHARED = torch.tensor([True, False, False, True, False, False])
PER_REQUEST = torch.tensor([[False, True, True, False, False, False], [True, False, False, False, True, True]])
MASKS = {"shared": SHARED, "per request": PER_REQUEST}
BACKENDS = ["reference", "sdpa", "cpu"]

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
with_every_mask = pytest.mark.parametrize("head_mask", MASKS.values(), ids=MASKS)


def off(head_mask: torch.Tensor, batch: int = 2) -> torch.Tensor:
    """bool [B, H], True where the head is masked."""
    return ~head_mask.expand(batch, -1)


def run_with_gradients(arguments: dict, output_gradient: torch.Tensor | None = None, **options):
    """The output and the gradient of every floating tensor in `arguments` for a seeded output gradient."""
    leaves = {
        name: tensor.detach().clone().requires_grad_()
        for name, tensor in arguments.items()
        if tensor.dtype != torch.bool
    }
    output = attention(**{**arguments, **leaves}, **options)
    if output_gradient is None:
        generator = torch.Generator().manual_seed(7)
        output_gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    output.backward(output_gradient)
    return output.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def inputs(kv_heads: int = 6, queries: int = 3, keys: int = 5, dtype: torch.dtype = torch.float64) -> dict:
    drawn = random_attention_inputs(2, 6, kv_heads, queries, keys, 4, 3, dtype=dtype)
    return dict(zip(("query", "key", "value"), drawn, strict=True))


@on_every_backend
@with_every_mask
@pytest.mark.parametrize("kv_heads", [6, 3, 1])
def test_masked_heads_contribute_exactly_nothing(backend, head_mask, kv_heads):
    gate = torch.linspace(-2, 3, 6, dtype=torch.float64)
    output, gradients = run_with_gradients(
        {**inputs(kv_heads), "head_mask": head_mask, "gate": gate.expand(2, 6)}, backend=backend
    )
    masked = off(head_mask)
    assert (output[masked] == 0).all() and (output[~masked] != 0).any()
    assert (gradients["query"][masked] == 0).all() and (gradients["query"][~masked] != 0).any()
    assert (gradients["gate"][masked] == 0).all() and (gradients["gate"][~masked] != 0).all()
    whole_group_off = masked.unflatten(1, (kv_heads, -1)).all(-1)
    for name in ("key", "value"):
        assert (gradients[name][whole_group_off] == 0).all() and (gradients[name][~whole_group_off] != 0).any()


@on_every_backend
@with_every_mask
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("kv_heads", [6, 3])
def test_what_masked_heads_hold_changes_no_bit(backend, head_mask, poison, kv_heads):
    added = torch.randn(2, 6, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    clean = {**inputs(kv_heads), "head_mask": head_mask, "attn_mask": added, "gate": torch.ones(6).double()}
    masked = off(head_mask)
    whole_group_off = masked.unflatten(1, (kv_heads, -1)).all(-1)
    poisoned = dict(clean)
    for name, heads in (("query", masked), ("attn_mask", masked), ("key", whole_group_off), ("value", whole_group_off)):
        poisoned[name] = clean[name].detach().masked_fill(heads[..., None, None], poison)
    output_gradient = torch.randn(2, 6, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    poisoned_gradient = output_gradient.masked_fill(masked[..., None, None], poison)

    output, gradients = run_with_gradients(clean, output_gradient, backend=backend)
    poisoned_output, poisoned_gradients = run_with_gradients(poisoned, poisoned_gradient, backend=backend)
    assert torch.equal(output, poisoned_output)
    for name in gradients:
        assert torch.equal(gradients[name], poisoned_gradients[name]), name


def test_sinks_of_masked_heads_change_no_bit():
    sinks = torch.linspace(-1, 1, 6, dtype=torch.float64)
    clean = {**inputs(), "head_mask": SHARED, "sinks": sinks}
    output, gradients = run_with_gradients(clean)
    poisoned_output, poisoned = run_with_gradients({**clean, "sinks": sinks.masked_fill(~SHARED, math.nan)})
    assert torch.equal(output, poisoned_output) and torch.equal(gradients["sinks"], poisoned["sinks"])
    assert (gradients["sinks"][~SHARED] == 0).all() and (gradients["sinks"][SHARED] != 0).all()


@on_every_backend
@with_every_mask
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_masked_head_is_a_removed_head(backend, head_mask, is_causal):
    arguments = inputs()
    actual = attention(**arguments, head_mask=head_mask, is_causal=is_causal, backend=backend)
    for request, kept in enumerate(~off(head_mask)):
        rows = {name: tensor[request : request + 1, kept] for name, tensor in arguments.items()}
        removed = attention(**rows, is_causal=is_causal, backend="reference")
        torch.testing.assert_close(actual[request : request + 1, kept], removed, rtol=1e-13, atol=1e-13)


@on_every_backend
@pytest.mark.parametrize("head_mask", [torch.zeros(6).bool(), torch.zeros(2, 6).bool()], ids=["shared", "per request"])
def test_all_heads_off(backend, head_mask):
    added = torch.zeros(2, 6, 3, 5, dtype=torch.float64)
    arguments = {**inputs(3), "head_mask": head_mask, "gate": torch.ones(6).double(), "attn_mask": added}
    output, gradients = run_with_gradients(arguments, backend=backend)
    assert output.shape == (2, 6, 3, 3) and (output == 0).all()
    for name, gradient in gradients.items():
        assert (gradient == 0).all(), name


@on_every_backend
def test_one_request_with_all_heads_off(backend):
    head_mask = PER_REQUEST.clone()
    head_mask[0] = False
    arguments = inputs(3)
    output = attention(**arguments, head_mask=head_mask, backend=backend)
    alone = {name: tensor[1:] for name, tensor in arguments.items()}
    assert (output[0] == 0).all()
    assert torch.equal(output[1:], attention(**alone, head_mask=head_mask[1:], backend=backend))


@on_every_backend
@pytest.mark.parametrize("per_request", [False, True])
def test_gate_without_mask_gets_its_exact_gradient_at_zero(backend, per_request):
    gate = torch.tensor([0.0, 1.0, 0.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    gate = gate.expand(2, 6) if per_request else gate
    output_gradient = torch.ones(2, 6, 3, 3, dtype=torch.float64)
    output, gradients = run_with_gradients({**inputs(3), "gate": gate}, output_gradient, backend=backend)
    ungated = attention(**inputs(3), backend="reference")
    exact = ungated.sum(dim=(2, 3)) if per_request else ungated.sum(dim=(0, 2, 3))
    torch.testing.assert_close(gradients["gate"], exact.detach(), rtol=1e-12, atol=1e-12)
    assert (output[:, [0, 2, 5]] == 0).all()
    assert (gradients["query"][:, [0, 2, 5]] == 0).all()


@on_every_backend
@with_every_mask
def test_gate_with_mask_skips_what_the_mask_says_not_what_the_gate_says(backend, head_mask):
    gate = torch.tensor([0.0, 2.0, 1.0, 1.0, 0.0, 3.0], dtype=torch.float64).expand(2, 6)
    arguments = {**inputs(), "head_mask": head_mask, "gate": gate}
    _, gradients = run_with_gradients(arguments, torch.ones(2, 6, 3, 3).double(), backend=backend)
    exact = attention(**inputs(), backend="reference").sum(dim=(2, 3)).masked_fill(off(head_mask), 0)
    torch.testing.assert_close(gradients["gate"], exact.detach(), rtol=1e-12, atol=1e-12)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float_gates_keep_their_dtype_beside_bfloat16(backend, dtype):
    gate = torch.linspace(-1, 1, 6, dtype=dtype)
    arguments = {**inputs(dtype=torch.bfloat16), "gate": gate}
    output, gradients = run_with_gradients(arguments, torch.ones(2, 6, 3, 3).bfloat16(), backend=backend)
    assert output.dtype == torch.bfloat16 and gradients["gate"].dtype == dtype
    # The gradient is a sum of bfloat16 outputs, and that sum itself is not rounded to bfloat16.
    exact = attention(**{name: tensor.double() for name, tensor in inputs(dtype=torch.bfloat16).items()})
    bound = 2 * torch.finfo(torch.bfloat16).eps * exact.abs().sum(dim=(0, 2, 3))
    assert ((gradients["gate"] - exact.sum(dim=(0, 2, 3))).abs() <= bound).all()


DEAD_ROWS = {
    "bool": {"attn_mask": torch.tensor([True, False, True])[:, None].expand(3, 5)},
    "bool of one column": {"attn_mask": torch.tensor([True, False, True])[:, None]},
    "added": {"attn_mask": torch.tensor([0.0, -math.inf, 0.0], dtype=torch.float64)[:, None].expand(3, 5)},
}


@on_every_backend
@with_every_mask
@pytest.mark.parametrize("case", ["bool", "bool of one column", "added"])
def test_a_query_that_sees_no_key_gets_zeros_and_finite_gradients(backend, head_mask, case):
    arguments = {**inputs(3), "head_mask": head_mask, "gate": torch.full((6,), 2.0).double(), **DEAD_ROWS[case]}
    output, gradients = run_with_gradients(arguments, backend=backend)
    assert (output[:, :, 1] == 0).all() and (output[:, :, 0][~off(head_mask)] != 0).any()
    assert (gradients["query"][:, :, 1] == 0).all()
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
    if "attn_mask" in gradients:
        assert (gradients["attn_mask"][1] == 0).all() and (gradients["attn_mask"][0] != 0).any()


@on_every_backend
def test_masks_that_only_together_hide_every_key(backend):
    added = torch.zeros(3, 5, dtype=torch.float64)
    added[0, 1:] = -math.inf  # causality leaves query 0 the keys 0 to 2, the window 1 to 2, this none of them
    output, gradients = run_with_gradients(
        {**inputs(), "attn_mask": added}, is_causal=True, window=(1, -1), backend=backend
    )
    assert (output[:, :, 0] == 0).all() and (output[:, :, 1:] != 0).all()
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name


def test_a_query_that_sees_only_the_sink_gets_zeros():
    sinks = torch.linspace(-1, 1, 6, dtype=torch.float64)
    output, gradients = run_with_gradients({**inputs(), "sinks": sinks, **DEAD_ROWS["bool"]})
    assert (output[:, :, 1] == 0).all() and (output[:, :, 0] != 0).all()
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name


@on_every_backend
def test_more_queries_than_keys_under_causality(backend):
    output, gradients = run_with_gradients(inputs(queries=5, keys=3), is_causal=True, backend=backend)
    assert (output[:, :, :2] == 0).all() and (output[:, :, 2:] != 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@on_every_backend
@pytest.mark.parametrize("head_mask", [None, *MASKS.values()], ids=["none", *MASKS])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("batch", "queries", "keys"), [(2, 0, 3), (2, 3, 0), (0, 3, 3), (2, 0, 0)], ids=["T=0", "S=0", "B=0", "T=S=0"]
)
def test_empty_sizes_give_zeros(backend, head_mask, is_causal, batch, queries, keys):
    drawn = random_attention_inputs(batch, 6, 3, queries, keys, 4, 3)
    if head_mask is not None and head_mask.dim() == 2:
        head_mask = head_mask[:batch]
    allowed = torch.ones(batch, 1, 1, keys, dtype=torch.bool)
    for attn_mask in (None, allowed):
        output = attention(*drawn, head_mask, attn_mask=attn_mask, is_causal=is_causal, backend=backend)
        assert output.shape == (batch, 6, queries, 3) and (output == 0).all()
        output.sum().backward()
        assert all((tensor.grad == 0).all() for tensor in drawn)


@on_every_backend
@pytest.mark.parametrize("mask_shape", [None, (0,), (2, 0)], ids=str)
def test_no_heads_at_all(backend, mask_shape):
    head_mask = None if mask_shape is None else torch.zeros(mask_shape, dtype=torch.bool)
    drawn = random_attention_inputs(2, 0, 0, 3, 3, 4)
    assert attention(*drawn, head_mask, gate=torch.ones(0), backend=backend).shape == (2, 0, 3, 4)


@on_every_backend
@pytest.mark.parametrize("head_mask", [None, *MASKS.values()], ids=["none", *MASKS])
@pytest.mark.parametrize(
    "shape", [(2, 6, 3, 5), (1, 6, 3, 5), (2, 1, 3, 5), (6, 1, 5), (2, 1, 1, 5), (3, 1), (5,), ()], ids=str
)
def test_an_added_mask_gets_its_gradient_in_its_own_shape(backend, head_mask, shape):
    added = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    arguments = {**inputs(3), "attn_mask": added}
    whole = {**arguments, "attn_mask": added.expand(2, 6, 3, 5)}
    if head_mask is not None:
        arguments["head_mask"] = whole["head_mask"] = head_mask
    _, gradients = run_with_gradients(arguments, backend=backend)
    _, whole_gradients = run_with_gradients(whole, backend="reference")
    expected = whole_gradients["attn_mask"].sum_to_size(shape)
    torch.testing.assert_close(gradients["attn_mask"], expected, rtol=1e-12, atol=1e-12)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_float32_mask_goes_with_every_dtype(backend, dtype):
    added = torch.randn(3, 5, generator=torch.Generator().manual_seed(5))
    output, gradients = run_with_gradients({**inputs(3, dtype=dtype), "attn_mask": added}, backend=backend)
    assert output.dtype == dtype and gradients["attn_mask"].dtype == torch.float32
    assert (gradients["attn_mask"] != 0).any()


@on_every_backend
def test_causality_equals_torch_where_lengths_are_equal(backend):
    arguments = inputs(queries=5)
    expected = torch.nn.functional.scaled_dot_product_attention(*arguments.values(), is_causal=True)
    actual = attention(**arguments, is_causal=True, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@on_every_backend
@pytest.mark.parametrize("window", [2**70, (2**70, 1), (1, 2**70), (2**70, 2**70)], ids=str)
def test_windows_beyond_every_integer_are_unlimited(backend, window):
    arguments = inputs(queries=5)
    sides = window if isinstance(window, tuple) else (window, 0)
    unlimited = tuple(-1 if side == 2**70 else side for side in sides)
    expected = attention(**arguments, window=unlimited, backend=backend)
    assert torch.equal(attention(**arguments, window=window, backend=backend), expected)


@on_every_backend
@with_every_mask
def test_strides_do_not_matter(backend, head_mask):
    arguments = inputs(3)
    packed = {name: tensor.detach().contiguous() for name, tensor in arguments.items()}
    strided = {
        name: torch.stack([tensor, tensor.new_full(tensor.shape, math.nan)], dim=-1)[..., 0]
        for name, tensor in packed.items()
    }
    wide_mask = torch.stack([head_mask, ~head_mask], dim=-1)[..., 0]
    assert not strided["query"].is_contiguous() and (head_mask.dim() == 1 or not wide_mask.is_contiguous())
    expected, expected_gradients = run_with_gradients({**packed, "head_mask": head_mask}, backend=backend)
    leaves = [tensor.requires_grad_() for tensor in strided.values()]
    output = attention(*leaves, wide_mask, backend=backend)
    torch.testing.assert_close(output, expected, rtol=1e-13, atol=1e-13)
    output_gradient = torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    gradients = torch.autograd.grad(output, leaves, output_gradient.transpose(2, 3).contiguous().transpose(2, 3))
    for gradient, expected_gradient in zip(gradients, expected_gradients.values(), strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-13, atol=1e-13)


@on_every_backend
def test_inputs_are_left_alone(backend):
    arguments = {**inputs(3), "head_mask": SHARED, "attn_mask": torch.zeros(3, 5, dtype=torch.float64)}
    before = {name: tensor.detach().clone() for name, tensor in arguments.items()}
    attention(**arguments, is_causal=True, backend=backend)
    assert all(torch.equal(before[name], tensor) for name, tensor in arguments.items())


@on_every_backend
def test_autocast_does_not_change_the_dtype(backend):
    arguments = {**inputs(3, dtype=torch.float32), "head_mask": SHARED}
    expected = attention(**arguments, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(**arguments, backend=backend), expected)


@on_every_backend
@with_every_mask
@pytest.mark.parametrize("kv_heads", [6, 1])
def test_runs_are_bitwise_equal(backend, head_mask, kv_heads):
    torch.set_num_threads(2)
    drawn = random_attention_inputs(2, 6, kv_heads, 130, 130, 128)
    arguments = {**dict(zip(("query", "key", "value"), drawn, strict=True)), "head_mask": head_mask}
    output, gradients = run_with_gradients(arguments, backend=backend)
    for _ in range(3):
        again, gradients_again = run_with_gradients(arguments, backend=backend)
        assert torch.equal(output, again)
        assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [1, 17, 64])
def test_other_requests_masks_change_no_bit(dtype, queries):
    torch.set_num_threads(2)
    drawn = [tensor.detach() for tensor in random_attention_inputs(4, 6, 3, queries, 64, 32, dtype=dtype)]
    outputs = []
    for share in (0.0, 0.3, 0.7, 1.0):
        head_mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(3)) < share
        head_mask[1] = torch.tensor([True, False, True, True, False, True])
        outputs.append(attention(*drawn, head_mask, is_causal=True)[1])
    assert all(torch.equal(outputs[0], output) for output in outputs)

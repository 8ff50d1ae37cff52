"""Do the projections keep the contract at its edges: masked gradients, frozen parameters, nothing to do, poison?"""

from __future__ import annotations

import threading

import pytest
import torch
from projection_inputs import MASKS, PER_REQUEST, draw, draw_weights, with_every_mask

import sparse_heads as sh
from sparse_heads.testing import items_run

pytestmark = pytest.mark.usefixtures("poisoned_memory")

HEADS, HEAD_DIM, WIDTH = 6, 8, 50
BATCH = PER_REQUEST.shape[0]
on_both_backends = pytest.mark.parametrize("backend", ["reference", "cpu"])


def in_inputs(tokens: int, dtype: torch.dtype = torch.float32, batch: int = BATCH):
    weights = draw_weights([(HEADS * HEAD_DIM, WIDTH)] * 3, dtype)
    biases = [draw(HEADS * HEAD_DIM, seed=20 + i, dtype=dtype) for i in range(3)]
    return draw(batch, tokens, WIDTH, dtype=dtype), *weights, *biases


def out_inputs(tokens: int, dtype: torch.dtype = torch.float32, batch: int = BATCH):
    (weight,) = draw_weights([(WIDTH, HEADS * HEAD_DIM)], dtype)
    return draw(batch, HEADS, tokens, HEAD_DIM, dtype=dtype), weight, draw(WIDTH, seed=20, dtype=dtype)


def project_in(backend, head_mask):
    def project(x, query, key, value, query_bias, key_bias, value_bias):
        biases = (query_bias, key_bias, value_bias)
        return sh.in_projection(x, (query, key, value), biases, head_mask, head_dim=HEAD_DIM, backend=backend)

    return project


def project_out(backend, head_mask, gate=None):
    return lambda heads, weight, bias: sh.out_projection(heads, weight, bias, head_mask, gate=gate, backend=backend)


def run(project, tensors):
    """Outputs, then gradients, of leaves made from `tensors`."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    outputs = project(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = [draw(*output.shape, seed=60 + i).to(output.dtype) for i, output in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, gradients)]


def masked_heads(head_mask: torch.Tensor) -> torch.Tensor:
    """bool [H], True where no request runs the head."""
    return ~head_mask.reshape(-1, HEADS).any(0)


@with_every_mask
def test_masked_heads_get_exact_zeros(backend, head_mask):
    masked = masked_heads(head_mask)
    *_, query, key, value, query_bias, key_bias, value_bias = run(project_in(backend, head_mask), in_inputs(3))
    for gradient in (query, key, value, query_bias, key_bias, value_bias):
        heads = gradient.unflatten(0, (HEADS, HEAD_DIM)).flatten(1)
        assert (heads[masked] == 0).all() and (heads[~masked] != 0).any(1).all()
    gate = torch.full((BATCH, HEADS), 0.5, requires_grad=True)
    heads, weight, bias = (tensor.requires_grad_() for tensor in out_inputs(3))
    project_out(backend, head_mask, gate)(heads, weight, bias).sum().backward()
    off = ~head_mask.expand(BATCH, HEADS)
    assert (heads.grad[off] == 0).all() and (heads.grad[~off] != 0).any((1, 2)).all()
    assert (gate.grad[off] == 0).all() and (gate.grad[~off] != 0).all()
    columns = weight.grad.unflatten(1, (HEADS, HEAD_DIM)).transpose(0, 1).flatten(1)
    assert (columns[masked] == 0).all() and (columns[~masked] != 0).any(1).all()
    assert torch.allclose(bias.grad, torch.full_like(bias, BATCH * 3))


@with_every_mask
def test_frozen_tensors_get_no_gradient(backend, head_mask):
    for trained in range(7):
        tensors = in_inputs(3)
        tensors[trained].requires_grad_()
        sum(output.sum() for output in project_in(backend, head_mask)(*tensors)).backward()
        assert [tensor.grad is not None for tensor in tensors] == [i == trained for i in range(7)]
    for trained in range(3):
        tensors = out_inputs(3)
        tensors[trained].requires_grad_()
        project_out(backend, head_mask)(*tensors).sum().backward()
        assert [tensor.grad is not None for tensor in tensors] == [i == trained for i in range(3)]
    assert not any(output.requires_grad for output in project_in(backend, head_mask)(*in_inputs(3)))


@on_both_backends
def test_using_one_of_three_outputs_leaves_zeros_for_the_others(backend):
    tensors = [tensor.requires_grad_() for tensor in in_inputs(3)]
    x, query, key, value, query_bias, *_ = tensors
    project_in(backend, MASKS["scattered"])(*tensors)[1].sum().backward()
    assert (key.grad != 0).any() and (x.grad != 0).any()
    for unused in (query, value, query_bias):
        assert unused.grad is None or (unused.grad == 0).all()


@with_every_mask
@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (4, 0), (0, 0)])
def test_nothing_to_project(backend, head_mask, batch, tokens):
    head_mask = head_mask if head_mask.dim() == 1 else head_mask[:batch]
    results = run(project_in(backend, head_mask), in_inputs(tokens, batch=batch))
    kept = int(head_mask.sum()) if head_mask.dim() == 1 else HEADS
    assert all(output.shape == (batch, kept, tokens, HEAD_DIM) for output in results[:3])
    output, *gradients = run(project_out(backend, head_mask), out_inputs(tokens, batch=batch))
    assert output.shape == (batch, tokens, WIDTH)
    for gradient in (*results[3:], *gradients):
        assert (gradient == 0).all()


@with_every_mask
def test_the_bias_of_the_output_projection_stays(backend, head_mask):
    heads, weight, bias = out_inputs(3)
    off = ~head_mask.expand(BATCH, HEADS).any(1)
    output = project_out(backend, head_mask)(heads, weight, bias)
    assert torch.equal(output[off], bias.expand(int(off.sum()), 3, WIDTH))
    assert (project_out(backend, head_mask)(heads, weight, None)[off] == 0).all()


def poison(tensor: torch.Tensor, masked: torch.Tensor, dim: int) -> torch.Tensor:
    """`tensor` with NaN in the masked heads' blocks along `dim`."""
    rows = masked.repeat_interleave(tensor.shape[dim] // masked.shape[0])
    return tensor.index_fill(dim, rows.nonzero()[:, 0], torch.nan)


@with_every_mask
@pytest.mark.parametrize(
    ("dtype", "tokens"),
    [*((torch.float32, tokens) for tokens in (1, 2, 4, 9, 40)), (torch.bfloat16, 5), (torch.float16, 5)],
)
def test_what_masked_heads_hold_changes_no_bit(backend, head_mask, dtype, tokens):
    masked = masked_heads(head_mask)
    x, *parameters = in_inputs(tokens, dtype)
    plain = run(project_in(backend, head_mask), (x, *parameters))
    poisoned = run(project_in(backend, head_mask), (x, *(poison(tensor, masked, 0) for tensor in parameters)))
    assert all(torch.equal(*pair) for pair in zip(plain, poisoned, strict=True))

    heads, weight, bias = out_inputs(tokens, dtype)
    strange = heads.masked_fill(~head_mask.expand(BATCH, HEADS)[..., None, None], torch.nan), poison(weight, masked, 1)
    gate = draw(BATCH, HEADS, dtype=dtype)
    for project in (
        lambda heads, weight, bias, gate: project_out(backend, head_mask)(heads, weight, bias) + 0 * gate.sum(),
        lambda heads, weight, bias, gate: project_out(backend, head_mask, gate)(heads, weight, bias),
    ):
        plain = run(project, (heads, weight, bias, gate))
        poisoned = run(project, (*strange, bias, gate))
        assert all(torch.equal(*pair) for pair in zip(plain, poisoned, strict=True))


@on_both_backends
def test_other_layouts_of_poisoned_weights(backend):
    mask = MASKS["scattered"]
    masked = masked_heads(mask)
    for tokens in (2, 40):
        x, query, *_ = in_inputs(tokens)
        for arrange in (
            lambda weight: weight.T.contiguous().T,
            lambda weight: torch.stack([weight, weight], 2)[..., 0],
        ):
            results = [
                sh.in_projection(x, arrange(weight), None, mask, head_dim=HEAD_DIM, backend=backend)
                for weight in (query, poison(query, masked, 0))
            ]
            assert torch.equal(*results)
            heads, weight, bias = out_inputs(tokens)
            results = [
                sh.out_projection(heads, arrange(weight), bias, mask, backend=backend)
                for weight in (weight, poison(weight, masked, 1))
            ]
            assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("mask", [*MASKS.values(), PER_REQUEST], ids=[*MASKS, "per request"])
def test_kernels_run_as_many_items_as_the_mask_keeps(mask, tokens, dtype):
    kept = int(mask.expand(BATCH, HEADS).sum())
    for requires_grad in (False, True):
        with items_run() as items:
            tensors = [tensor.requires_grad_(requires_grad) for tensor in in_inputs(tokens, dtype)]
            project_in("cpu", mask)(*tensors)
        assert (items.in_projection, items.out_projection) == (3 * kept, 0)
        with items_run() as items:
            tensors = [tensor.requires_grad_(requires_grad) for tensor in out_inputs(tokens, dtype)]
            project_out("cpu", mask)(*tensors)
        assert (items.in_projection, items.out_projection) == (0, kept)


def test_a_key_value_head_counts_where_its_group_runs():
    x, query, key, value, *_ = in_inputs(3)
    mask = torch.tensor([True, True, False, False, True, False])
    with items_run() as items:
        weights = (query, key[: 3 * HEAD_DIM], value[: 3 * HEAD_DIM])
        sh.in_projection(x, weights, None, mask, head_dim=HEAD_DIM, backend="cpu")
    assert items.in_projection == BATCH * (3 + 2 + 2)


def test_the_reference_runs_no_kernel_and_auto_does():
    tensors = in_inputs(3)
    with items_run() as items:
        project_in("reference", MASKS["one"])(*tensors)
        project_in("reference", PER_REQUEST)(*tensors)
    assert items.in_projection == 0
    for mask in (MASKS["one"], PER_REQUEST):
        with items_run() as items:
            project_in("auto", mask)(*tensors)
        assert items.in_projection == 3 * int(mask.expand(BATCH, HEADS).sum())


def test_items_are_counted_for_this_thread_and_this_block_alone():
    tensors = in_inputs(3)
    counted = {}

    def other_thread():
        with items_run() as items:
            project_in("cpu", MASKS["all"])(*tensors)
        counted["other"] = items.in_projection

    project_in("cpu", MASKS["all"])(*tensors)
    with items_run() as items:
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        project_in("cpu", MASKS["one"])(*tensors)
    assert items.in_projection == 3 * BATCH
    assert counted["other"] == 3 * BATCH * HEADS


def test_autocast_gives_one_dtype_whatever_the_mask():
    tensors = in_inputs(3)
    heads, weight, bias = out_inputs(3)
    with torch.autocast("cpu", torch.bfloat16):
        shared = [*project_in("auto", MASKS["scattered"])(*tensors)]
        shared.append(project_out("auto", MASKS["scattered"])(heads, weight, bias))
        per_request = [*project_in("auto", PER_REQUEST)(*tensors)]
        per_request.append(project_out("auto", PER_REQUEST)(heads, weight, bias))
    assert {output.dtype for output in shared} == {torch.bfloat16}
    assert {output.dtype for output in per_request} == {torch.bfloat16}

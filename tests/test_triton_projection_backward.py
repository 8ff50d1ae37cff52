"""Are the Triton projections' gradients the reference's, zero where masked, and repeatable?"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from projection_inputs import draw, draw_masks, group_mask
from triton_projection_inputs import (
    DEVICE,
    MASKS,
    SIZES,
    Sizes,
    all_equal,
    check_gradients,
    head_mask,
    in_leaves,
    out_leaves,
    project_in,
    project_out,
    run_bits,
    use_tiles,
)

from sparse_heads.errors import UnsupportedError
from sparse_heads.ops.projection import triton as projections
from sparse_heads.ops.projection.triton import bias_gradient, operators

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
SEVERAL_TILES = Sizes(batch=2, tokens=35, width=20, heads=3, kv_heads=3, head_dim=16)
SMALL = Sizes(batch=3, tokens=5, width=24, heads=6, kv_heads=3, head_dim=8)
GATED = [("half", "shared"), ("half", "per request"), ("per request", "shared"), ("per request", "per request")]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_projection(sizes, mask, dtype):
    project = partial(project_in, mask=head_mask(mask, sizes), head_dim=sizes.head_dim)
    check_gradients(project, in_leaves(sizes), dtype, sizes.terms)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("mask", "gate"), [*((mask, "none") for mask in MASKS), *GATED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_out_projection(sizes, mask, gate, dtype):
    project = partial(project_out, mask=head_mask(mask, sizes), head_dim=sizes.head_dim)
    check_gradients(project, out_leaves(sizes, gate), dtype, sizes.terms)


@pytest.mark.parametrize("mask", ["half", "per request"])
@pytest.mark.parametrize(("head_dim", "dtype"), [(16, torch.float32), (24, torch.float16)], ids=str)
def test_several_tiles_in_every_direction(mask, head_dim, dtype, monkeypatch):
    use_tiles(monkeypatch, "small")
    monkeypatch.setattr(bias_gradient, "CHUNK", 32)
    sizes = SEVERAL_TILES._replace(head_dim=head_dim)
    given = {"mask": head_mask(mask, sizes), "head_dim": head_dim}
    check_gradients(partial(project_in, **given), in_leaves(sizes), dtype, sizes.terms)
    gate = "shared" if mask == "half" else "per request"
    check_gradients(partial(project_out, **given), out_leaves(sizes, gate), dtype, sizes.terms)


@pytest.mark.parametrize("mask", ["half", "per request"])
def test_no_requests_and_no_tokens_give_zeros(mask):
    for sizes in (SMALL._replace(batch=0), SMALL._replace(tokens=0)):
        given = {"mask": head_mask(mask, sizes), "head_dim": sizes.head_dim}
        check_gradients(partial(project_in, **given), in_leaves(sizes), torch.float32, sizes.terms)
        check_gradients(partial(project_out, **given), out_leaves(sizes, "shared"), torch.float32, sizes.terms)


def test_results_repeat_bit_for_bit():
    for mask in ("half", "per request"):
        given = {"mask": head_mask(mask, SMALL), "head_dim": SMALL.head_dim}
        for project, leaves in ((project_in, in_leaves(SMALL)), (project_out, out_leaves(SMALL, "shared"))):
            first = run_bits(partial(project, **given), leaves, torch.float32)
            for _ in range(3):
                assert all_equal(run_bits(partial(project, **given), leaves, torch.float32), first)


def test_other_requests_masks_change_no_bit_of_a_requests_gradients():
    own = head_mask("half", SMALL)
    first = None
    for seed in range(3):
        mask = draw_masks(SMALL.batch, SMALL.heads, seed=seed).to(DEVICE)
        mask[0], mask[1] = seed % 2 == 0, own
        given = {"implementation": projections, "mask": mask, "head_dim": SMALL.head_dim}
        found = []
        for project, leaves in ((project_in, in_leaves(SMALL)), (project_out, out_leaves(SMALL, "per request"))):
            leaves = {name: None if leaf is None else leaf.float().requires_grad_() for name, leaf in leaves.items()}
            outputs = project(**given, **leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            of_requests = [leaves[name] for name in ("x", "heads", "gate") if leaves.get(name) is not None]
            gradients = [draw(*output.shape, seed=4).to(output) for output in outputs]
            found += [each[1] for each in torch.autograd.grad(outputs, of_requests, gradients)]
        first = first or found
        assert all_equal(found, first)


@pytest.mark.parametrize("strides", ["contiguous", "heads side by side", "one number"])
def test_gradients_of_masked_heads_are_not_read_whatever_their_strides(strides):
    mask = head_mask("per request", SMALL)
    masks = [mask, group_mask(mask, SMALL.kv_heads), group_mask(mask, SMALL.kv_heads)]
    leaves = {name: leaf for name, leaf in in_leaves(SMALL).items() if leaf is not None}
    leaves = {name: leaf.float().requires_grad_() for name, leaf in leaves.items()}
    weights, biases = [leaves[f"weight_{i}"] for i in range(3)], [leaves["bias_0"], leaves["bias_2"]]
    arguments = (leaves["x"], weights, biases, [True, False, True], masks, SMALL.head_dim, False)
    results = []
    for poison in (0.0, torch.nan):
        outputs = operators.in_projection(*arguments)
        gradients = []
        for i, (output, each) in enumerate(zip(outputs, masks, strict=True)):
            gradient = torch.ones_like(output) if strides == "one number" else draw(*output.shape, seed=i).to(output)
            gradient = gradient.masked_fill(~each[:, None, :, None], poison)
            if strides == "heads side by side":
                gradient = gradient.transpose(1, 2).contiguous().transpose(1, 2)
            if strides == "one number":
                gradient = gradient[:, :1, :, :1].expand(output.shape)
            gradients.append(gradient)
        results.append(torch.autograd.grad(outputs, list(leaves.values()), gradients))
    assert all_equal(*results) and all(gradient.isfinite().all() for gradient in results[0])


@pytest.mark.parametrize("mask", ["half", "per request"])
def test_nan_in_masked_heads_reaches_no_gradient(mask):
    mask = head_mask(mask, SMALL)
    leaves = out_leaves(SMALL, "per request" if mask.dim() == 2 else "shared")
    off = (~mask).expand(SMALL.batch, SMALL.heads)
    poisoned = dict(leaves)
    columns = off.repeat_interleave(SMALL.head_dim, 1).unsqueeze(1)
    poisoned["heads"] = leaves["heads"].masked_fill(columns, torch.nan)
    project = partial(project_out, mask=mask, head_dim=SMALL.head_dim)
    first, second = (run_bits(project, each, torch.float32) for each in (leaves, poisoned))
    assert all_equal(first, second) and all(tensor.isfinite().all() for tensor in first)


def test_only_what_is_wanted_is_computed(monkeypatch):
    mask = head_mask("half", SMALL)
    wanted = []
    original = operators.in_projection_backward

    def record(*arguments):
        wanted.append(arguments[-3:])
        return original(*arguments)

    monkeypatch.setattr(operators, "in_projection_backward", record)
    leaves = {name: None if leaf is None else leaf.float() for name, leaf in in_leaves(SMALL).items()}
    leaves["weight_1"].requires_grad_()
    leaves["bias_2"].requires_grad_()
    outputs = project_in(projections, mask, SMALL.head_dim, **leaves)
    sum(output.sum() for output in outputs).backward()
    assert wanted == [(False, [False, True, False], [False, False, True])]
    assert leaves["weight_1"].grad is not None and leaves["bias_2"].grad is not None


@pytest.mark.parametrize("mask", ["half", "per request"])
def test_operators_are_registered_as_torch_wants(mask):
    mask = head_mask(mask, SMALL)
    masks = [mask, group_mask(mask, SMALL.kv_heads), group_mask(mask, SMALL.kv_heads)]
    heads = masks if mask.dim() == 2 else [each.nonzero()[:, 0] for each in masks]
    leaves = {name: None if leaf is None else leaf.float().requires_grad_() for name, leaf in in_leaves(SMALL).items()}
    weights, biases = [leaves[f"weight_{i}"] for i in range(3)], [leaves["bias_0"], leaves["bias_2"]]
    arguments = (leaves["x"], weights, biases, [True, False, True], heads, SMALL.head_dim, False)
    torch.library.opcheck(operators.in_projection, arguments)
    grads = [draw(*output.shape).to(output) for output in operators.in_projection(*arguments)]
    plain = [each.detach() for each in (leaves["x"], *weights)]
    arguments = (
        grads,
        plain[0],
        plain[1:],
        heads,
        SMALL.head_dim,
        False,
        True,
        [True, False, True],
        [False, True, False],
    )
    torch.library.opcheck(operators.in_projection_backward, arguments)

    leaves = out_leaves(SMALL, "per request" if mask.dim() == 2 else "shared")
    leaves["heads"] = leaves["heads"].unflatten(-1, (SMALL.heads, SMALL.head_dim))
    leaves["gate"] = leaves["gate"] if mask.dim() == 2 else leaves["gate"].unsqueeze(0)
    heads, weight, bias, gate = (leaf.float().requires_grad_() for leaf in leaves.values())
    arguments = (heads, weight, bias, gate, masks[0] if mask.dim() == 2 else mask.nonzero()[:, 0], False)
    torch.library.opcheck(operators.out_projection, arguments)
    plain = [each.detach() for each in (heads, weight, gate)]
    grad = draw(SMALL.batch, SMALL.tokens, SMALL.width).to(weight.detach())
    torch.library.opcheck(operators.out_projection_backward, (grad, *plain, *arguments[4:], True, True, True))


def test_a_second_derivative_raises():
    mask = head_mask("per request", SMALL)
    leaves = {name: None if leaf is None else leaf.float().requires_grad_() for name, leaf in in_leaves(SMALL).items()}
    outputs = project_in(projections, mask, SMALL.head_dim, **leaves)
    (gradient,) = torch.autograd.grad(outputs[0].square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(UnsupportedError, match="no second derivative; use backend='reference'"):
        gradient.sum().backward()
    leaves = {name: leaf.float().requires_grad_() for name, leaf in out_leaves(SMALL, "shared").items()}
    output = project_out(projections, mask, SMALL.head_dim, **leaves)
    (gradient,) = torch.autograd.grad(output.square().sum(), leaves["gate"], create_graph=True)
    with pytest.raises(UnsupportedError, match="no second derivative; use backend='reference'"):
        gradient.sum().backward()

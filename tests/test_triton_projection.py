"""Do the Triton projections give the reference's outputs, whatever the sizes, masks, gates and strides?"""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch
from projection_inputs import draw_masks, group_mask
from triton_projection_inputs import (
    DEVICE,
    MASKS,
    SIZES,
    Sizes,
    all_equal,
    check_outputs,
    head_mask,
    in_leaves,
    out_leaves,
    project_in,
    project_out,
    use_tiles,
)

from sparse_heads.ops.projection import triton as projections
from sparse_heads.ops.projection.triton import operators
from sparse_heads.ops.projection.triton.lists import head_lists

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
SEVERAL_TILES = Sizes(batch=2, tokens=35, width=20, heads=3, kv_heads=3, head_dim=16)
SMALL = Sizes(batch=3, tokens=5, width=24, heads=6, kv_heads=3, head_dim=8)
GATED = [("half", "shared"), ("half", "per request"), ("per request", "shared"), ("per request", "per request")]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_projection(sizes, mask, dtype):
    project = partial(project_in, mask=head_mask(mask, sizes), head_dim=sizes.head_dim)
    check_outputs(project, in_leaves(sizes), dtype, sizes.terms)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("mask", "gate"), [*((mask, "none") for mask in MASKS), *GATED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_out_projection(sizes, mask, gate, dtype):
    project = partial(project_out, mask=head_mask(mask, sizes), head_dim=sizes.head_dim)
    check_outputs(project, out_leaves(sizes, gate), dtype, sizes.terms)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("head_dim", "dtype"), [(16, torch.float32), (24, torch.float16)], ids=str)
def test_several_tiles_in_every_direction(mask, head_dim, dtype, monkeypatch):
    use_tiles(monkeypatch, "small")
    sizes = SEVERAL_TILES._replace(head_dim=head_dim)
    given = {"mask": head_mask(mask, sizes), "head_dim": head_dim}
    check_outputs(partial(project_in, **given), in_leaves(sizes), dtype, sizes.terms)
    check_outputs(partial(project_out, **given), out_leaves(sizes, bias=False), dtype, sizes.terms)


def test_compact_heads_give_the_bits_of_all_heads():
    mask = head_mask("half", SMALL)
    heads, weight, bias, gate = out_leaves(SMALL, "shared").values()
    kept = mask.nonzero()[:, 0]
    compact = heads.unflatten(-1, (-1, SMALL.head_dim))[:, :, kept].flatten(2)
    results = [projections.out_projection(each, weight, bias, kept, SMALL.head_dim, gate) for each in (heads, compact)]
    assert torch.equal(*results)


@pytest.mark.parametrize("mask", ["half", "per request"])
def test_what_is_masked_is_not_read(mask):
    """NaN in masked heads' weights, biases, inputs and gates changes no bit."""
    mask = head_mask(mask, SMALL)
    given = {"implementation": projections, "mask": mask, "head_dim": SMALL.head_dim}
    never = ~(mask if mask.dim() == 1 else mask.any(0))
    if mask.dim() == 2:
        never[0] = mask[:, 0] = False
        never = never | (torch.arange(SMALL.heads, device=DEVICE) == 0)
    columns = never.repeat_interleave(SMALL.head_dim)
    group_columns = (~group_mask(~never, SMALL.kv_heads)).repeat_interleave(SMALL.head_dim)
    leaves = in_leaves(SMALL)
    poisoned = {
        name: leaf if leaf is None or name == "x" else leaf.clone().contiguous() for name, leaf in leaves.items()
    }
    for i, rows in enumerate((columns, group_columns, group_columns)):
        poisoned[f"weight_{i}"][rows] = torch.nan
        if poisoned[f"bias_{i}"] is not None:
            poisoned[f"bias_{i}"][rows] = torch.nan
    assert all_equal(project_in(**given, **_float(leaves)), project_in(**given, **_float(poisoned)))

    leaves = out_leaves(SMALL, "per request" if mask.dim() == 2 else "shared")
    off = (~mask).expand(SMALL.batch, SMALL.heads)
    poisoned = {name: leaf.clone() for name, leaf in leaves.items()}
    poisoned["weight"][:, columns] = torch.nan
    poisoned["heads"].masked_fill_(off.repeat_interleave(SMALL.head_dim, 1).unsqueeze(1), torch.nan)
    poisoned["gate"].masked_fill_(off if mask.dim() == 2 else off[0], torch.nan)
    first, second = (project_out(**given, **_float(each)) for each in (leaves, poisoned))
    assert torch.equal(first, second) and first.isfinite().all()


def _float(leaves):
    return {name: None if leaf is None else leaf.float() for name, leaf in leaves.items()}


@pytest.mark.parametrize("mask", ["half", "per request"])
def test_any_strides_give_the_same_bits(mask):
    """Tokens apart, the width apart, weights transposed as in a Conv1D, of different strides, heads side by side."""
    given = {"implementation": projections, "mask": head_mask(mask, SMALL), "head_dim": SMALL.head_dim}
    leaves = _float(in_leaves(SMALL))
    expected = project_in(**given, **leaves)
    x = leaves["x"]
    layouts = [
        torch.stack([x, x], 2)[:, :, 1],
        torch.stack([x, x], 3)[..., 1],
        x.transpose(0, 1).contiguous().transpose(0, 1),
    ]
    for each in layouts:
        assert not each.is_contiguous()
        assert all_equal(project_in(**given, **{**leaves, "x": each}), expected)
    transposed = {f"weight_{i}": leaves[f"weight_{i}"].t().contiguous().t() for i in range(3)}
    assert all_equal(project_in(**given, **{**leaves, **transposed}), expected)
    assert all_equal(project_in(**given, **{**leaves, "weight_1": transposed["weight_1"]}), expected)

    leaves = _float(out_leaves(SMALL))
    expected = project_out(**given, **leaves)
    heads = leaves["heads"].unflatten(-1, (SMALL.heads, SMALL.head_dim))
    head_major = heads.transpose(1, 2).contiguous().transpose(1, 2)
    for each in (heads, head_major, torch.stack([heads, heads], 4)[..., 1]):
        assert torch.equal(project_out(**given, **{**leaves, "heads": each}), expected)
    leaves["weight"] = leaves["weight"].t().contiguous().t()
    assert torch.equal(project_out(**given, **leaves), expected)


@pytest.mark.parametrize("mask", ["half", "per request"])
@pytest.mark.parametrize(
    "lay_out", [lambda bias: bias.repeat_interleave(2)[::2], lambda bias: bias[:1].expand(bias.shape)]
)
def test_biases_of_any_stride(mask, lay_out):
    given = {"implementation": projections, "mask": head_mask(mask, SMALL), "head_dim": SMALL.head_dim}
    for project, leaves in ((project_in, _float(in_leaves(SMALL))), (project_out, _float(out_leaves(SMALL)))):
        biases = {name: lay_out(leaf) for name, leaf in leaves.items() if "bias" in name and leaf is not None}
        assert biases and not any(bias.is_contiguous() for bias in biases.values())
        contiguous = {name: bias.contiguous() for name, bias in biases.items()}
        first, second = (project(**given, **{**leaves, **each}) for each in (biases, contiguous))
        assert all_equal(*((each if isinstance(each, tuple) else (each,)) for each in (first, second)))


@pytest.mark.parametrize("tiles", ["chosen", "small"])
def test_other_requests_masks_change_no_bit(tiles, monkeypatch):
    use_tiles(monkeypatch, tiles)
    given = {"implementation": projections, "head_dim": SMALL.head_dim}
    own = head_mask("half", SMALL)
    in_inputs, out_inputs = _float(in_leaves(SMALL)), _float(out_leaves(SMALL, "per request"))
    first = None
    for seed in range(4):
        mask = draw_masks(SMALL.batch, SMALL.heads, seed=seed).to(DEVICE)
        mask[0] = seed % 2 == 0
        mask[1] = own
        outputs = [*project_in(mask=mask, **given, **in_inputs), project_out(mask=mask, **given, **out_inputs)]
        outputs = [output[1] for output in outputs]
        first = first or outputs
        assert all_equal(outputs, first)


@pytest.mark.parametrize("tokens", [1, 5, 17])
def test_a_request_alone_gets_the_bits_that_it_gets_in_a_batch(tokens):
    sizes = SMALL._replace(tokens=tokens)
    mask = head_mask("per request", sizes)
    for project, leaves in ((project_in, in_leaves(sizes)), (project_out, out_leaves(sizes, "per request"))):
        leaves = _float(leaves)
        together = project(projections, mask, sizes.head_dim, **leaves)
        per_request = {name for name in ("x", "heads", "gate") if leaves.get(name) is not None}
        for request in range(sizes.batch):
            part = slice(request, request + 1)
            own = {name: leaf[part] if name in per_request else leaf for name, leaf in leaves.items()}
            alone = project(projections, mask[part], sizes.head_dim, **own)
            pairs = zip(together, alone, strict=True) if isinstance(alone, tuple) else [(together, alone)]
            assert all(torch.equal(whole[part], each) for whole, each in pairs)


def test_masked_heads_are_exact_zeros_and_shared_subsets_take_any_leading_dimensions():
    mask, leaves = head_mask("per request", SMALL), _float(in_leaves(SMALL))
    for output in project_in(projections, mask, SMALL.head_dim, **leaves):
        heads = output.unflatten(-1, (-1, SMALL.head_dim))
        runs = group_mask(mask, heads.shape[2])
        assert (heads.transpose(1, 2)[~runs] == 0).all()
    mask = head_mask("half", SMALL)
    flat = {**leaves, "x": leaves["x"].flatten(0, 1)}
    outputs = project_in(projections, mask, SMALL.head_dim, **leaves)
    assert all_equal(project_in(projections, mask, SMALL.head_dim, **flat), [each.flatten(0, 1) for each in outputs])
    leaves = _float(out_leaves(SMALL))
    flat = {**leaves, "heads": leaves["heads"].flatten(0, 1)}
    output = project_out(projections, mask, SMALL.head_dim, **leaves)
    assert torch.equal(project_out(projections, mask, SMALL.head_dim, **flat), output.flatten(0, 1))


def test_no_requests_no_tokens_and_no_width():
    for sizes in (SMALL._replace(batch=0), SMALL._replace(tokens=0), SMALL._replace(width=0)):
        for mask in ("half", "per request"):
            given = {"mask": head_mask(mask, sizes), "head_dim": sizes.head_dim}
            check_outputs(partial(project_in, **given), in_leaves(sizes), torch.float32, sizes.terms)
            check_outputs(partial(project_out, **given), out_leaves(sizes), torch.float32, sizes.terms)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (5, 16), (2, 130)])
def test_lists_hold_the_heads_that_run_and_then_the_others(rows, columns):
    masks = [draw_masks(rows, columns, seed=1), draw_masks(columns, rows, seed=2).t(), draw_masks(2, 3) & False]
    for mask, found in zip(masks, head_lists([mask.to(DEVICE) for mask in masks]), strict=True):
        expected = [sorted(range(mask.shape[1]), key=lambda head, row=row: not row[head]) for row in mask.tolist()]
        assert found.heads.tolist() == expected
        assert found.counts.tolist() == mask.sum(1).tolist()


def test_under_autocast_products_are_of_its_dtype():
    mask = head_mask("half", SMALL)
    leaves = _float(in_leaves(SMALL))
    low = {name: None if leaf is None else leaf.bfloat16() for name, leaf in leaves.items()}
    with torch.autocast(DEVICE.type, torch.bfloat16):
        outputs = project_in(projections, mask, SMALL.head_dim, **leaves)
    assert all_equal(outputs, project_in(projections, mask, SMALL.head_dim, **low))


@pytest.mark.parametrize("mask", ["half", "per request"])
def test_operators_are_registered_as_torch_wants(mask):
    mask = head_mask(mask, SMALL)
    masks = [mask, group_mask(mask, SMALL.kv_heads), group_mask(mask, SMALL.kv_heads)]
    heads = masks if mask.dim() == 2 else [each.nonzero()[:, 0] for each in masks]
    leaves = _float(in_leaves(SMALL))
    weights, biases = [leaves[f"weight_{i}"] for i in range(3)], [leaves["bias_0"], leaves["bias_2"]]
    arguments = (leaves["x"], weights, biases, [True, False, True], heads, SMALL.head_dim, False)
    torch.library.opcheck(operators.in_projection_forward, arguments)
    leaves = _float(out_leaves(SMALL, "per request" if mask.dim() == 2 else "shared"))
    gate = leaves["gate"] if mask.dim() == 2 else leaves["gate"].unsqueeze(0)
    four = leaves["heads"].unflatten(-1, (SMALL.heads, SMALL.head_dim))
    arguments = (four, leaves["weight"], leaves["bias"], gate, heads[0], False)
    torch.library.opcheck(operators.out_projection_forward, arguments)


def test_operators_are_there_without_triton():
    code = "import sys; sys.modules['triton'] = None; import sparse_heads.ops.projection.triton as p; p.in_projection"
    subprocess.run([sys.executable, "-c", code], check=True)

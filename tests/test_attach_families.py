"""Does every supported model give what its masked copy gives: outputs, and every parameter's gradient?"""

from __future__ import annotations

import pytest
import torch
from models import MODELS, build, gradients, inputs, loss, masked_copy, masks, oracle_gradients, output
from torch import nn

import sparse_heads as sh
from sparse_heads.testing import assert_close_to_reference, items_run

MASKS = list(masks(1))


def named_mask(name, handle):
    return masks(len(handle.layers), handle.layers.max_heads, handle.layers[0].group_size)[name]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "mask_name, attention",
    [(name, "sdpa") for name in MASKS] + [("scattered", "eager"), ("first layer empty", "eager")],
)
def test_outputs_and_gradients_are_the_masked_copys(name, mask_name, attention):
    plain = build(name, attention, torch.float64)
    model = build(name, attention, torch.float64)
    handle = sh.attach(model)
    mask = named_mask(mask_name, handle)
    oracle = masked_copy(plain, handle.layers, mask)
    handle.set_heads(mask)
    batch = inputs(model)

    actual, expected = output(model, batch), output(oracle, batch)
    loss(actual).backward()
    loss(expected).backward()

    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    grads, wanted = gradients(model), oracle_gradients(oracle, handle.layers, mask)
    for path, grad in wanted.items():
        if grad is None:
            assert grads[path] is None, path
        else:
            torch.testing.assert_close(
                grads[path], grad, rtol=1e-10, atol=1e-10, msg=lambda text, p=path: f"{p}: {text}"
            )


@pytest.mark.parametrize("name", MODELS)
def test_masked_heads_get_exact_zero_gradients(name):
    model = build(name)
    handle = sh.attach(model)
    mask = named_mask("scattered", handle)
    handle.set_heads(mask)
    loss(output(model, inputs(model))).backward()
    for row, site in zip(mask, handle.sites, strict=True):
        heads = {"query": row, "output": row}
        for role, projection in site.projections.items():
            kept = heads.get(role, row.unflatten(0, (site.layer.num_kv_heads, -1)).any(1))
            blocks = projection.weight.grad.t() if role == "output" else projection.weight.grad
            norms = blocks.unflatten(0, (len(kept), -1)).flatten(1).norm(dim=1)
            assert torch.equal(norms > 0, kept), f"{site.layer.name} {role}"
            if role != "output" and projection.bias is not None:
                assert not projection.bias.grad.unflatten(0, (len(kept), -1))[~kept].any()


def poison_masked_heads(handle, mask):
    """NaN in all that belongs to the masked heads."""
    for row, site in zip(mask, handle.sites, strict=True):
        for role, projection in site.projections.items():
            runs = row.unflatten(0, (site.layer.num_kv_heads, -1)).any(1) if role in ("key", "value") else row
            tensors = [projection.weight.data.t() if role == "output" else projection.weight.data]
            if role != "output" and projection.bias is not None:
                tensors.append(projection.bias.data)
            for tensor in tensors:
                tensor.unflatten(0, (len(runs), -1))[~runs] = float("nan")


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama_lm", "gqa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_masked_heads_hold_changes_no_bit_and_no_item_of_theirs_runs(name, dtype):
    results = []
    for poisoned in (False, True):
        model = build(name, dtype=dtype)
        handle, batch = sh.attach(model), inputs(model)
        mask = named_mask("one head a layer", handle)
        handle.set_heads(mask)
        if poisoned:
            poison_masked_heads(handle, mask)
        with items_run() as items:
            result = output(model, batch)
        loss(result).backward()
        results.append((result.detach(), gradients(model)))
    (clean, clean_grads), (result, grads) = results
    assert torch.equal(result, clean)
    for path, grad in clean_grads.items():
        assert grads[path] is grad is None or torch.equal(grads[path], grad), path
    kept, rows = int(mask.sum()), len(batch["input_ids"])
    assert items.in_projection == rows * (kept + 2 * kept // handle.layers[0].group_size)
    assert items.out_projection == rows * kept


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama_lm", "gqa"])
@pytest.mark.parametrize("mask_name", ["scattered", "first layer empty"])
@pytest.mark.parametrize("rows, length", [(1, 1), (2, 13)])
def test_float32_is_as_good_as_eager_float32(name, mask_name, rows, length):
    plain, model = build(name), build(name)
    handle = sh.attach(model)
    mask = named_mask(mask_name, handle)
    handle.set_heads(mask)
    low = masked_copy(plain, handle.layers, mask)
    reference = masked_copy(build(name, dtype=torch.float64), handle.layers, mask)
    batch = inputs(model, rows, length)

    results = [output(each, batch) for each in (model, low, reference)]
    for result in results:
        loss(result).backward()
    assert_close_to_reference(*(result.detach() for result in results))

    all_grads = [gradients(model)] + [oracle_gradients(each, handle.layers, mask) for each in (low, reference)]
    joined = [torch.cat([grad.flatten() for grad in grads.values() if grad is not None]) for grads in all_grads]
    assert_close_to_reference(*joined)


@pytest.mark.parametrize("name", MODELS)
def test_all_heads_on_is_bit_equal_to_the_plain_model(name):
    plain, model = build(name), build(name)
    batch = inputs(model)
    handle = sh.attach(model)
    expected = output(plain, batch)
    assert torch.equal(output(model, batch), expected)
    handle.set_heads(torch.ones(len(handle.layers), handle.layers.max_heads, dtype=torch.bool))
    assert torch.equal(output(model, batch), expected)


def test_layers_describe_bert():
    layers = sh.attach(build("bert_classifier")).layers
    assert [layer.name for layer in layers] == [f"bert.encoder.layer.{i}.attention.self" for i in range(3)]
    assert [layer.key for layer in layers] == [("encoder", i, "self") for i in range(3)]
    described = {(x.num_heads, x.num_kv_heads, x.head_dim, x.v_head_dim, x.uses) for x in layers}
    assert described == {(4, 4, 12, 12, 1)}
    assert layers.model_type == "bert"


def test_layers_describe_cross_attention():
    layers = sh.attach(build("bert_cross")).layers
    assert [(layer.index, layer.kind) for layer in layers] == [
        (i, kind) for i in range(3) for kind in ("self", "cross")
    ]


def test_what_a_whole_model_is_called_makes_no_layer_a_cross_attention():
    parts = nn.ModuleDict({"cross_encoder": build("bert")})
    assert [layer.key for layer in sh.attach(parts).layers] == [("encoder", i, "self") for i in range(3)]


def test_layers_describe_grouped_queries():
    layers = sh.attach(build("gqa")).layers
    described = {(x.stack, x.kind, x.num_heads, x.num_kv_heads, x.head_dim) for x in layers}
    assert described == {("decoder", "self", 4, 2, 10)}


@pytest.mark.parametrize(
    "source, target", [("bert", "bert_classifier"), ("bert_masked_lm", "bert"), ("llama", "llama_lm")]
)
def test_subset_of_one_head_of_a_model_loads_on_another(source, target, tmp_path):
    saved = sh.attach(build(source))
    mask = named_mask("scattered", saved)
    saved.set_heads(mask)
    saved.save_pretrained(tmp_path)
    handle = sh.attach(build(target))
    handle.set_heads(sh.HeadSubset.from_pretrained(tmp_path))
    assert torch.equal(handle.subset.mask, mask)


def test_all_heads_are_saved_as_such(tmp_path):
    handle = sh.attach(build("bert"))
    handle.save_pretrained(tmp_path)
    assert sh.HeadSubset.from_pretrained(tmp_path).count() == 12


def test_subset_of_another_family_is_refused(tmp_path):
    bert = sh.attach(build("bert"))
    bert.set_heads(named_mask("scattered", bert))
    bert.save_pretrained(tmp_path)
    electra = sh.attach(build("electra"))
    with pytest.raises(sh.errors.SubsetMismatchError, match="'bert' against 'electra'"):
        electra.set_heads(sh.HeadSubset.from_pretrained(tmp_path))
    assert electra.subset is None


def test_dicts_name_layers_by_row_or_by_name():
    handle = sh.attach(build("bert"))
    handle.set_heads({0: [1, 3], "encoder.layer.2.attention.self": []})
    wanted = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    assert torch.equal(handle.subset.mask, wanted)


@pytest.mark.parametrize(
    "options, rows",
    [
        ({"include": "*.layer.1.*"}, [1]),
        ({"exclude": "*.layer.1.*"}, [0, 2]),
        ({"include": ["*.0.*", "*.2.*"], "exclude": "encoder.layer.2*"}, [0]),
    ],
)
def test_patterns_choose_layers(options, rows):
    plain, model = build("bert"), build("bert")
    handle = sh.attach(model, **options)
    assert [layer.index for layer in handle.layers] == rows
    mask = torch.zeros(len(rows), 4, dtype=torch.bool)
    handle.set_heads(mask)
    batch = inputs(model)
    torch.testing.assert_close(output(model, batch), output(masked_copy(plain, handle.layers, mask), batch))


def test_only_some_projections_with_a_bias():
    plain, model = build("bert", dtype=torch.float64), build("bert", dtype=torch.float64)
    for each in (plain, model):
        for layer in each.encoder.layer:
            layer.attention.self.key.bias = None
    handle = sh.attach(model)
    mask = named_mask("scattered", handle)
    handle.set_heads(mask)
    oracle = masked_copy(plain, handle.layers, mask)
    batch = inputs(model)
    loss(output(model, batch)).backward()
    loss(output(oracle, batch)).backward()
    query, wanted = (each.encoder.layer[1].attention.self.query for each in (model, oracle))
    torch.testing.assert_close(query.bias.grad, wanted.bias.grad)
    assert query.bias.grad.any()

"""Mean ablation: heads that are off give their mean, as one bias a layer; and the value class of the means."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import build, gradients, inputs, loss, masks, output, output_projection
from subset_inputs import LAYERS, layer

import sparse_heads as sh
from sparse_heads.errors import FileFormatError, InvalidArgumentError, InvalidTypeError, SubsetMismatchError
from sparse_heads.means import HeadMeans
from sparse_heads.testing import assert_close_to_reference

pytestmark = pytest.mark.usefixtures("one_thread")
MASKS = masks(3)


def means_of(layers, seed=1):
    shape = (len(layers), layers.max_heads, layers[0].v_head_dim)
    return HeadMeans(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), layers)


def attached(name="bert", dtype=torch.float64, **options):
    model = build(name, dtype=dtype)
    return model, sh.attach(model, **options), inputs(model)


def with_means(name, layers, mask, means, dtype=torch.float64):
    """The oracle: a dense model in which the inputs of output projections have the means of heads that are off."""
    model = build(name, dtype=dtype)

    def replace(row, info):
        def hook(_, args):
            heads = args[0].unflatten(-1, (info.num_heads, -1))
            kept = mask[..., row, : info.num_heads]
            kept = kept[:, None, :, None] if kept.dim() == 2 else kept[:, None]
            return (torch.where(kept, heads, means.tensor[row].to(heads)).flatten(-2),)

        return hook

    for row, info in enumerate(layers):
        output_projection(model, info.name).register_forward_pre_hook(replace(row, info))
    return model


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", ["compact", "wide", "core"])
@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("name", ["bert", "llama", "bert_cross"])
def test_heads_that_are_off_give_their_means(name, mask_name, layout):
    model, handle, batch = attached(name, layout=layout)
    mask = masks(len(handle.layers))[mask_name]
    means = means_of(handle.layers)
    handle.set_heads(mask, fill=means)
    expected = output(with_means(name, handle.layers, mask, means), batch)
    assert_same(output(model, batch), expected)
    if mask_name != "all empty":
        handle.set_heads(mask)
        assert not torch.allclose(output(model, batch), expected, rtol=1e-3, atol=1e-3)


def test_split_groups_of_grouped_queries():
    model, handle, batch = attached("gqa")
    mask, means = MASKS["one head a layer"], means_of(handle.layers)
    handle.set_heads(mask, fill=means)
    assert_same(output(model, batch), output(with_means("gqa", handle.layers, mask, means), batch))


@pytest.mark.parametrize("layout", ["compact", "core"])
def test_every_request_has_its_own(layout):
    model, handle, batch = attached(layout=layout)
    mask = torch.stack([MASKS["scattered"], MASKS["first layer empty"], ~MASKS["scattered"]])
    means = means_of(handle.layers)
    expected = output(with_means("bert", handle.layers, mask, means), batch)
    with handle.use_heads(mask, fill=means):
        assert_same(output(model, batch), expected)
    # two rows of the batch for each request, as beam search makes them
    twice = {name: value.repeat_interleave(2, 0) for name, value in batch.items()}
    with handle.use_heads(mask, means):
        assert_same(output(model, twice), expected.repeat_interleave(2, 0))


def test_blocks_and_views_take_it_and_the_inner_one_counts():
    model, handle, batch = attached()
    mask, means, others = MASKS["scattered"], means_of(handle.layers), means_of(handle.layers, seed=2)
    handle.set_heads(mask, fill=means)
    expected, plain = output(model, batch), output(build("bert", dtype=torch.float64), batch)
    view = handle.bind(mask, fill=means)
    with handle.use_heads(mask, fill=others):
        inner = output(model, batch)
        assert torch.equal(output(view, batch), expected)
        with handle.use_heads(mask):
            without = output(model, batch)
    assert torch.equal(output(model, batch), expected)
    for one, other in [(inner, expected), (without, expected), (without, inner)]:
        assert not torch.allclose(one, other)
    with handle.use_heads(None, fill=means):
        assert torch.equal(output(model, batch), plain)
    handle.set_heads(handle.layers.real_heads(), fill=means)
    assert torch.equal(output(model, batch), plain)


def test_scale_acts_on_kept_heads_only():
    model, handle, batch = attached()
    mask, means = MASKS["scattered"], means_of(handle.layers)
    scale = torch.rand(3, 4, dtype=torch.float64) + 0.5
    oracle = build("bert", dtype=torch.float64)
    with torch.no_grad():
        for info, factors, on in zip(handle.layers, scale, mask, strict=True):
            columns = output_projection(oracle, info.name).weight.unflatten(1, (4, -1))
            columns.mul_(torch.where(on, factors, 1.0)[:, None])
    with handle.use_heads(mask, fill=means, scale=scale):
        actual = output(model, batch)
    hooked = with_means("bert", handle.layers, mask, means)
    hooked.load_state_dict(oracle.state_dict())
    assert_same(actual, output(hooked, batch))


def test_gradients_are_those_without_what_is_added():
    model, handle, batch = attached()
    mask, means = MASKS["scattered"], means_of(handle.layers)
    handle.set_heads(mask, fill=means)
    loss(output(model, batch)).backward()
    oracle = with_means("bert", handle.layers, mask, means)
    loss(output(oracle, batch)).backward()
    expected = gradients(oracle)
    for row, info in zip(mask, handle.layers, strict=True):
        columns = output_projection(oracle, info.name).weight.grad.unflatten(1, (4, -1))
        assert columns[:, ~row].any()
        columns[:, ~row] = 0
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-8, atol=1e-8, msg=name)


def test_it_is_computed_when_the_subset_is_set():
    model, handle, batch = attached()
    mask, means = MASKS["all empty"], means_of(handle.layers)
    handle.set_heads(mask, fill=means)
    before = output(model, batch)
    with torch.no_grad():
        for info in handle.layers:
            output_projection(model, info.name).weight.mul_(2)
    assert torch.equal(output(model, batch), before)
    handle.set_heads(mask, fill=means)
    assert not torch.allclose(output(model, batch), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_it(copied):
    model, handle, batch = attached()
    handle.set_heads(MASKS["scattered"], fill=means_of(handle.layers))
    twin = copied(model)
    expected = output(model, batch)
    handle.set_heads(None)
    assert torch.equal(output(twin, batch), expected)


def test_generation():
    model, handle, batch = attached("llama_lm")
    mask, means = torch.stack([MASKS["scattered"], ~MASKS["scattered"]]), means_of(handle.layers)
    prompt = batch["input_ids"][:2]
    handle.set_heads(mask, fill=means)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    oracle = with_means("llama_lm", handle.layers, mask, means)
    assert torch.equal(model.generate(prompt, **settings), oracle.generate(prompt, **settings))


def test_half_precision():
    model, handle, batch = attached(dtype=torch.bfloat16)
    mask, means = MASKS["scattered"], means_of(handle.layers)
    handle.set_heads(mask, fill=means)
    eager = with_means("bert", handle.layers, mask, means, torch.bfloat16)
    exact = copy.deepcopy(eager).double()
    expected = output(exact, batch)
    assert_close_to_reference(output(model, batch), output(eager, batch), expected)


def test_wrong_fills_are_refused():
    _, handle, _ = attached()
    with pytest.raises(InvalidTypeError, match="fill: wanted a HeadMeans.*got a float32 tensor"):
        handle.set_heads(MASKS["scattered"], fill=torch.zeros(3, 4, 12))
    others = sh.attach(build("distilbert")).layers
    with pytest.raises(SubsetMismatchError, match="means: wanted those of this model.*model type"):
        handle.set_heads(MASKS["scattered"], fill=means_of(others))
    narrow = sh.attach(build("bert", hidden_size=32)).layers
    with pytest.raises(SubsetMismatchError, match="v_head_dim 8 against 12"):
        handle.bind(MASKS["scattered"], fill=means_of(narrow))


def test_means_are_values():
    tensor = torch.randn(3, 4, 16)
    means = HeadMeans(tensor, LAYERS)
    tensor.fill_(1)
    means.tensor.fill_(1)
    assert means.tensor.dtype == torch.float32 and means.tensor[0].ne(1).all()
    assert means.tensor[1, 3].eq(0).all(), "the second layer has three heads"
    assert HeadMeans(tensor.double(), LAYERS).tensor.dtype == torch.float64
    assert HeadMeans(tensor.half(), LAYERS).tensor.dtype == torch.float32
    assert means == HeadMeans(means.tensor, LAYERS) != HeadMeans(tensor, LAYERS)
    assert repr(means) == "HeadMeans(11 heads, 3 layers, float32)"


def test_narrow_layers_are_padded():
    layers = sh.Layers([layer(0), layer(1, v_head_dim=9)], "toy")
    tensor = torch.ones(2, 4, 16)
    tensor[1, :, 9:] = float("nan")
    assert HeadMeans(tensor, layers).tensor[1].sum() == 4 * 9


@pytest.mark.parametrize(
    "tensor, error, message",
    [
        (torch.zeros(3, 4, 16, dtype=torch.int64), InvalidTypeError, "tensor: wanted a float tensor, got a int64"),
        ([0.0], InvalidTypeError, "tensor: wanted a float tensor, got list"),
        (torch.zeros(3, 4), InvalidArgumentError, r"tensor: wanted shape \[3, 4, 16\], got a float32 tensor \[3, 4\]"),
        (torch.full((3, 4, 16), float("nan")), InvalidArgumentError, "tensor: wanted finite values.*head 0 of layer"),
        (torch.full((3, 4, 16), float("inf")), InvalidArgumentError, "tensor: wanted finite values"),
    ],
)
def test_tensors_that_are_no_means(tensor, error, message):
    with pytest.raises(error, match=message):
        HeadMeans(tensor, LAYERS)


def test_rows_follow_the_layers():
    means = means_of(sh.Layers([layer(0), layer(1), layer(2)], "toy"))
    order = [means.layers[2], means.layers[0], means.layers[1]]
    assert torch.equal(means.remap(sh.Layers(order, "toy")).tensor, means.tensor[[2, 0, 1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_files(tmp_path, dtype):
    means = HeadMeans(torch.randn(3, 4, 16).to(dtype), LAYERS)
    means.save_pretrained(tmp_path)
    assert HeadMeans.from_pretrained(tmp_path) == means
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head_means.safetensors", "head_means_config.json"]
    whole = (tmp_path / "head_means.safetensors").read_bytes()
    (tmp_path / "head_means.safetensors").write_bytes(whole[:-5])
    with pytest.raises(FileFormatError, match="not a whole safetensors file"):
        HeadMeans.from_pretrained(tmp_path)
    with pytest.raises(InvalidArgumentError, match="heads.safetensors"):
        sh.HeadSubset.from_pretrained(tmp_path)

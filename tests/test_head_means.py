"""Are head means the mean of what each head gives to its output projection, over tokens that are no padding?"""

from __future__ import annotations

import pytest
import torch
from models import build, inputs, output_projection

import sparse_heads as sh
from sparse_heads.errors import InvalidArgumentError, InvalidTypeError

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def by_hand(model, layers, batches):
    """float64 `[L, H, Dv]`: every token of every example, one after the other."""
    seen = {layer.name: [] for layer in layers}
    hooks = [
        output_projection(model, name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
        for name in seen
    ]
    counted = {"encoder": [], "decoder": []}
    with torch.no_grad():
        for batch in batches:
            model(**batch)
            mask = batch["attention_mask"].bool()
            counted["encoder"].append(mask)
            counted["decoder"].append(batch.get("decoder_attention_mask", mask).bool())
    for hook in hooks:
        hook.remove()
    means = []
    for layer in layers:
        tokens = [x[mask] for x, mask in zip(seen[layer.name], counted[layer.stack], strict=True)]
        means.append(torch.cat(tokens).double().mean(0).unflatten(0, (layer.num_heads, -1)))
    return torch.stack(means)


def batches_of(model, name):
    batches = [inputs(model), inputs(model, rows=2, length=5)]
    if name == "bart":
        for batch in batches:
            batch["decoder_attention_mask"] = batch["attention_mask"].flip(0)
    return batches


@pytest.mark.parametrize("name", ["bert", "distilbert", "bert_cross", "llama_lm", "gqa", "bart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_by_hand(name, dtype):
    model = build(name, dtype=dtype)
    batches = batches_of(model, name)
    means = sh.head_means(model, batches)
    expected = by_hand(model, means.layers, batches)
    exact = EXACT if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    assert means.tensor.dtype == torch.float64
    torch.testing.assert_close(means.tensor, expected, **exact)


@pytest.mark.parametrize("options", [{"layout": "wide"}, {"layout": "core"}, {"kv": "all"}], ids=str)
def test_whatever_the_layout_and_the_subset(options):
    plain, model = build("gqa", dtype=torch.float64), build("gqa", dtype=torch.float64)
    handle = sh.attach(model, **options)
    handle.set_heads(torch.zeros(3, 4, dtype=torch.bool))
    batches = batches_of(model, "gqa")
    torch.testing.assert_close(sh.head_means(model, batches).tensor, by_hand(plain, handle.layers, batches), **EXACT)
    assert handle.subset.count() == 0


def test_without_a_mask_every_token_counts():
    model = build("bert", dtype=torch.float64)
    ids = inputs(model)["input_ids"]
    full = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    assert sh.head_means(model, [{"input_ids": ids}]) == sh.head_means(model, full)


def test_padding_does_not_count_also_when_it_is_not_a_number():
    model = build("bert", dtype=torch.float64)
    batch = inputs(model)
    expected = sh.head_means(model, [batch])
    padding = (batch["attention_mask"] == 0)[..., None]
    # what the last layer's heads give at padding is read by no other token
    model.encoder.layer[2].attention.output.dense.register_forward_pre_hook(
        lambda _, args: (args[0].masked_fill(padding, float("nan")),)
    )
    assert sh.head_means(model, [batch]) == expected


def test_the_split_into_batches_does_not_matter():
    model = build("bert", dtype=torch.float64)
    batch = inputs(model)
    alone = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(3)]
    together, apart = (sh.head_means(model, each).tensor for each in ([batch], alone))
    torch.testing.assert_close(together, apart, **EXACT)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = build("bert", hidden_dropout_prob=0.5).train()
    state = torch.get_rng_state()
    batches = [inputs(model), {"input_ids": torch.full((1, 3), 10**6)}] if fails else [inputs(model)]
    if fails:
        with pytest.raises(IndexError):
            sh.head_means(model, batches)
    else:
        assert sh.head_means(model, batches) == sh.head_means(model.eval(), batches)
        model.train()
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert sh.get_handle(model) is None


def test_means_fill_heads_that_are_off():
    """With one head off and its mean in its place, the layer is wrong by the head's spread only."""
    model = build("bert", dtype=torch.float64)
    handle = sh.attach(model)
    batch = inputs(model)
    means = sh.head_means(model, [batch])
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[2, 1] = False
    seen = []
    projection = model.encoder.layer[2].attention.output.dense
    hook = projection.register_forward_hook(lambda _, args, result: seen.append(result))
    with torch.no_grad():
        model(**batch)
        with handle.use_heads(mask, fill=means):
            model(**batch)
    hook.remove()
    counted = batch["attention_mask"].bool()
    dense, filled = (each[counted].mean(0) for each in seen)
    assert not torch.allclose(seen[0], seen[1])
    torch.testing.assert_close(dense, filled, **EXACT)


@pytest.mark.parametrize(
    "batches, error, message",
    [
        (None, InvalidTypeError, "batches: wanted an iterable of dicts"),
        ([], InvalidArgumentError, "batches: wanted at least one batch"),
        ([[1]], InvalidTypeError, "batches: wanted dicts of tensors"),
        (
            [{"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 3)}],
            InvalidArgumentError,
            "batches: wanted tokens for every layer, .*, got none that is no padding",
        ),
        (
            [{"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 1, 3, 3)}],
            InvalidArgumentError,
            r"batches: wanted attention_mask \[2, 3\] for the means",
        ),
    ],
)
def test_wrong_batches(batches, error, message):
    with pytest.raises(error, match=message):
        sh.head_means(build("bert"), batches)

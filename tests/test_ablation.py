"""Does leaving one head out give what masked copies give by hand, at the cost of sharing what comes before it?"""

from __future__ import annotations

import copy
import functools
from collections import Counter

import pytest
import torch
from models import build, inputs, masked_copy
from torch import nn

import sparse_heads as sh
from sparse_heads.errors import InvalidArgumentError, InvalidTypeError, UnsupportedError
from sparse_heads.testing import items_run

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = {"rtol": 1e-9, "atol": 1e-12}
# eager attention of these takes its softmax in float32
LOOSE = {"rtol": 1e-4, "atol": 1e-6}


def labelled(model, rows=3, length=7):
    return inputs(model, rows, length) | {"labels": torch.arange(rows) % 5}


def each_head(layers):
    """Row, head and the mask that leaves it out."""
    for row, layer in enumerate(layers):
        for head in range(layer.num_heads):
            mask = layers.real_heads()
            mask[row, head] = False
            yield row, head, mask


def by_hand(plain, layers, batches):
    """The mean over examples of ||Y - Y_h||^2 / ||Y||^2, every example by itself, without its padding."""
    scores = torch.zeros(len(layers), layers.max_heads, dtype=torch.float64)
    examples = [
        {name: value[row : row + 1] for name, value in batch.items()}
        for batch in batches
        for row in range(len(batch["input_ids"]))
    ]
    with torch.no_grad():
        for row, head, mask in each_head(layers):
            oracle = masked_copy(plain, layers, mask)
            for example in examples:
                dense, ablated = plain(**example)[0][0], oracle(**example)[0][0]
                mask_name = "decoder_attention_mask" if "decoder_input_ids" in example else "attention_mask"
                if dense.dim() == 2 and mask_name in example:
                    counted = example[mask_name][0].bool()
                    dense, ablated = dense[counted], ablated[counted]
                scores[row, head] += (dense - ablated).square().sum() / dense.square().sum()
    return scores / len(examples)


@functools.cache
def expected_changes(name):
    model = build(name, dtype=torch.float64)
    return by_hand(model, sh.attach(copy.deepcopy(model)).layers, batches_of(model, name))


def batches_of(model, name):
    batches = [inputs(model), inputs(model, rows=2, length=5)]
    if name == "bart":
        for batch in batches:
            batch["decoder_attention_mask"] = batch["attention_mask"].flip(0)
    return batches


MODELS = ["bert", "distilbert", "electra", "bert_classifier", "bert_cross", "llama", "llama_lm", "gqa", "bart"]


@pytest.mark.parametrize("name, rows", [*((name, 5) for name in MODELS), ("bert", 1), ("gqa", 1), ("gqa", 32)])
def test_the_change_of_the_outputs_by_hand(name, rows):
    model = build(name, dtype=torch.float64)
    scores = sh.score_heads(model, batches_of(model, name), "ablation", rows=rows).tensor
    expected = expected_changes(name)
    torch.testing.assert_close(scores, expected, **(LOOSE if name == "distilbert" else EXACT))
    assert expected.min() > 1e-8


@pytest.mark.parametrize("options", [{"layout": "wide"}, {"layout": "core"}, {"kv": "all"}], ids=str)
def test_whatever_the_layout(options):
    plain, model = build("gqa", dtype=torch.float64), build("gqa", dtype=torch.float64)
    layers = sh.attach(model, **options).layers
    scores = sh.score_heads(model, [inputs(model)], "ablation")
    torch.testing.assert_close(scores.tensor, by_hand(plain, layers, [inputs(model)]), **EXACT)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", ["bert_classifier", "gqa"])
def test_the_rise_of_the_loss_by_hand(name, given):
    model = build(name, dtype=torch.float64)
    if given:
        batches = [inputs(model), inputs(model, rows=2, length=5)]
    elif name == "gqa":
        batches = [batch | {"labels": batch["input_ids"]} for batch in (inputs(model), inputs(model, 2, 5))]
    else:
        batches = [labelled(model), labelled(model, rows=2, length=5)]

    def loss(model, batch):
        output = model(**batch)
        return output.logits[:, 0].square().mean() if given else output.loss

    scores = sh.score_heads(model, batches, "ablation", loss if given else None)
    expected = torch.zeros_like(scores.tensor)
    with torch.no_grad():
        for row, head, mask in each_head(scores.layers):
            oracle = masked_copy(model, scores.layers, mask)
            for batch in batches:
                change = loss(oracle, batch) - loss(model, batch)
                expected[row, head] += change * len(batch["input_ids"]) / 5
    # transformers takes the loss of language models in float32
    exact = {"rtol": 1e-5, "atol": 1e-6} if name == "gqa" and not given else EXACT
    torch.testing.assert_close(scores.tensor, expected, **exact)
    assert expected.min() < 0 < expected.max()


def test_padding_does_not_count():
    model = build("bert", dtype=torch.float64)
    batch = inputs(model)
    changed = batch | {"input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7)}
    first, second = (sh.score_heads(model, [each], "ablation").tensor for each in (batch, changed))
    torch.testing.assert_close(first, second, **EXACT)


class Work:
    """Rows of batches that blocks really ran: `rows` by their feed-forward networks, `queries` by their attention."""

    def __init__(self, blocks):
        self.rows, self.queries = Counter(), Counter()
        for index, block in enumerate(blocks):
            modules = dict(block.named_modules())
            network = next(modules[name] for name in ("intermediate", "mlp", "fc1") if name in modules)
            self.count(self.rows, index, network)
            self.count(self.queries, index, modules.get("attention.self.query", modules.get("self_attn.q_proj")))

    def count(self, rows, index, module):
        forward = module.forward

        def counted(x):
            rows[index] += x.shape[0]
            return forward(x)

        module.forward = counted


def check_work(work, blocks, rows, heads):
    """`rows` once, and again for every head of this block or one before; queries are not for those of this block."""
    for index in range(blocks):
        assert work.rows[index] == rows + rows * heads * (index + 1)
        assert work.queries[index] == rows + rows * heads * index


@pytest.mark.parametrize("rows", [5, 32])
def test_what_comes_before_runs_once(rows):
    model = build("bert", num_hidden_layers=6)
    sh.attach(model)
    work = Work(model.encoder.layer)
    sh.score_heads(model, [inputs(model)], "ablation", rows=rows)
    check_work(work, 6, 3, 4)
    # of as many forwards, in blocks: with six layers of twelve heads
    assert (6 + 12 * sum(range(1, 7))) / (6 * 12 * 6) < 0.6


@pytest.mark.parametrize("layout", ["auto", "wide", "core"])
def test_queries_keys_and_values_are_shared_where_the_output_projection_is_within(layout):
    model = build("gqa", num_hidden_layers=6)
    sh.attach(model, layout=layout)
    work = Work(model.model.layers)
    sh.score_heads(model, [inputs(model)], "ablation")
    check_work(work, 6, 3, 4)


def test_a_loss_shares_what_comes_before_too():
    model = build("bert_classifier", num_hidden_layers=6)
    sh.attach(model)
    work = Work(model.bert.encoder.layer)
    sh.score_heads(model, [labelled(model)], "ablation")
    check_work(work, 6, 3, 4)


def test_heads_of_the_decoder_share_the_encoder():
    model = build("bart")
    handle = sh.attach(model, include="*decoder*")
    work = Work([*model.model.encoder.layers, *model.model.decoder.layers])
    scores = sh.score_heads(model, [inputs(model)], "ablation")
    assert all(layer.stack == "decoder" for layer in scores.layers)
    assert [work.rows[index] for index in range(3)] == [3, 3, 3]
    # two kinds of heads in a layer of the decoder
    assert [work.rows[index] for index in range(3, 6)] == [3 + 2 * 12 * (index + 1) for index in range(3)]
    assert handle.attached


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_kernels_run_the_heads_that_are_on(name):
    model = build(name)
    sh.attach(model, backend="cpu")
    with items_run() as items:
        sh.score_heads(model, [inputs(model)], "ablation")
    # twelve copies of three examples, each with three of four heads of its one layer
    assert items.out_projection == 3 * 12 * 3
    assert items.attention == (0 if name == "bert" else 3 * 12 * 3)
    assert items.in_projection == 0


def test_layers_outside_of_any_list():
    plain = build("bert", dtype=torch.float64)
    model = copy.deepcopy(plain)
    model.encoder.layer = nn.Sequential(*model.encoder.layer)
    scores = sh.score_heads(model, [inputs(model)], "ablation")
    torch.testing.assert_close(scores.tensor, by_hand(plain, scores.layers, [inputs(model)]), **EXACT)


def hooked(change):
    plain, model = build("bert", dtype=torch.float64), build("bert", dtype=torch.float64)
    for each in (plain, model):
        change(each)
    scores = sh.score_heads(model, [inputs(model)], "ablation")
    torch.testing.assert_close(scores.tensor, by_hand(plain, scores.layers, [inputs(model)]), **EXACT)


def test_hooks_of_a_block_act_once():
    hooked(lambda model: model.encoder.layer[0].register_forward_hook(lambda _, args, output: output * 1.5 + 0.1))
    hooked(lambda model: model.encoder.layer[1].register_forward_pre_hook(lambda _, args: (args[0] * 0.5, *args[1:])))


def test_what_comes_after_a_block_may_write_into_its_output():
    hooked(lambda model: model.encoder.layer[1].register_forward_pre_hook(lambda _, args: (args[0].mul_(2), *args[1:])))


def test_a_loss_that_runs_the_model_twice():
    model = build("bert", dtype=torch.float64)
    batch = inputs(model)

    def loss(model, batch):
        first = model(**batch).last_hidden_state
        flipped = batch | {"input_ids": batch["input_ids"].flip(1)}
        return (first * model(**flipped).last_hidden_state).mean()

    scores = sh.score_heads(model, [batch], "ablation", loss)
    with torch.no_grad():
        for row, head, mask in each_head(scores.layers):
            expected = loss(masked_copy(model, scores.layers, mask), batch) - loss(model, batch)
            torch.testing.assert_close(scores.tensor[row, head], expected, **EXACT)


@pytest.mark.parametrize("name", ["llama_lm", "bart"])
def test_a_loss_that_continues_a_cache(name):
    model = build(name, dtype=torch.float64)
    batch = inputs(model)
    main = "decoder_input_ids" if name == "bart" else "input_ids"
    rest = {key: value for key, value in batch.items() if name == "bart" and key != main}

    def loss(model, batch):
        cache = model(**{main: batch[main][:, :4]}, **rest, use_cache=True).past_key_values
        return model(**{main: batch[main][:, 4:]}, **rest, past_key_values=cache).logits.mean()

    scores = sh.score_heads(model, [batch], "ablation", loss)
    assert model.config.use_cache
    with torch.no_grad():
        for row, head, mask in each_head(scores.layers):
            expected = loss(masked_copy(model, scores.layers, mask), batch) - loss(model, batch)
            torch.testing.assert_close(scores.tensor[row, head], expected, **LOOSE)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("fails", [None, "in the first forward", "later"])
def test_the_model_is_left_as_it_was(attached, fails):
    model = build("bert_classifier").train()
    handle = sh.attach(model) if attached else None
    subset = torch.rand(3, 4) < 0.5
    if attached:
        handle.set_heads(subset)
    own = model.bert.encoder.layer[1]
    own.forward = own.forward  # as accelerate leaves one
    found = own.__dict__["forward"]
    runs = Counter()

    def loss(model, batch):
        runs["loss"] += 1
        result = model(**batch).loss
        if fails is not None and runs["loss"] == (1 if fails == "in the first forward" else 6):
            raise KeyError("mine")
        return result

    state = torch.get_rng_state()
    if fails is None:
        sh.score_heads(model, [labelled(model)], "ablation", loss)
        sh.score_heads(model, [inputs(model)], "ablation")
    else:
        with pytest.raises(KeyError, match="mine"):
            sh.score_heads(model, [labelled(model)], "ablation", loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert own.__dict__["forward"] is found
    assert not any("forward" in module.__dict__ for module in model.modules() if module is not own)
    assert all(module.training for module in model.modules())
    assert sh.get_handle(model) is handle
    if attached:
        assert torch.equal(handle.subset.mask, subset)


def test_scores_are_against_all_heads_whatever_is_set():
    model = build("bert", dtype=torch.float64)
    expected = sh.score_heads(model, [inputs(model)], "ablation")
    handle = sh.attach(model)
    handle.set_heads(torch.zeros(3, 4, dtype=torch.bool))
    with handle.use_heads({0: [1]}):
        assert sh.score_heads(model, [inputs(model)], "ablation") == expected


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"rows": 0}, InvalidArgumentError, "rows: wanted at least 1"),
        ({"rows": 2.0}, InvalidTypeError, "rows: wanted an int"),
        ({"seed": 0}, InvalidTypeError, "options: wanted those of 'ablation': rows, got seed"),
        ({"loss": lambda model, batch: 1.0}, InvalidTypeError, "loss: wanted a function that gives a scalar tensor"),
        (
            {"loss": lambda model, batch: model(**batch)[0].sum() * float("inf")},
            InvalidArgumentError,
            "loss: wanted a finite value",
        ),
    ],
)
def test_wrong_options(options, error, message):
    model = build("bert")
    with pytest.raises(error, match=message):
        sh.score_heads(model, [inputs(model)], "ablation", **options)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_wrong_batches():
    model = build("bert_classifier")
    with pytest.raises(InvalidArgumentError, match="batches: wanted labels in all batches, or in none"):
        sh.score_heads(model, [labelled(model), inputs(model)], "ablation")
    causal = build("llama_lm")
    cache = causal(**inputs(causal)).past_key_values
    with pytest.raises(InvalidArgumentError, match="batches: wanted no past_key_values"):
        sh.score_heads(
            causal, [{"input_ids": torch.ones(3, 1, dtype=torch.long), "past_key_values": cache}], "ablation"
        )


def test_outputs_without_a_row_an_example():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build("bert")

        def forward(self, **batch):
            output = self.inner(**batch)
            output.last_hidden_state = output.last_hidden_state.mean(0, keepdim=True)
            return output

    model = Pooled()
    with pytest.raises(UnsupportedError, match="wanted outputs with a row for each of 3 examples"):
        sh.score_heads(model, [inputs(model.inner)], "ablation")

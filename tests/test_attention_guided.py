"""Are the scores from attention what eager probabilities give by hand, and do their options mean what they say?"""

from __future__ import annotations

import math

import pytest
import torch
from attention_oracle import ByHand, probabilities, visible_keys
from models import build, inputs

import sparse_heads as sh
from sparse_heads.errors import InvalidArgumentError, InvalidTypeError, UnsupportedError

CAUSAL = ("llama", "gqa", "bert_cross")
SPECIAL = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
ROUNDED = {"rtol": 1e-5, "atol": 1e-5}  # Llama's eager attention has single precision, whatever the model's
METHODS = ["entropy", "sparsity", "confidence", "redundancy", "position_mass", "special_mass", "attention_guided"]


def batches_of(model):
    return [inputs(model), inputs(model, rows=2, length=4)]


def by_hand(name, layers, batches, special=()):
    eager = build(name, "eager", torch.float64)
    found = [ByHand(layer.num_heads) for layer in layers]
    for batch in batches:
        attentions = probabilities(eager, batch)
        is_special = torch.isin(batch["input_ids"], torch.tensor(special, dtype=torch.long))
        for layer, each in zip(layers, found, strict=True):
            visible = visible_keys(batch, layer.kind, name in CAUSAL)
            keys = is_special if layer.kind == "self" else None
            each.add(attentions[layer.kind, layer.index], visible, batch["attention_mask"].bool() & ~is_special, keys)
    return found


def terms(found, similarity="max"):
    """{method: float64 `[L, H]`}, larger = keep."""
    means = {
        name: torch.stack([each.mean(name) for each in found])
        for name in ("entropy", "sparsity", "confidence", "position_mass", "special_mass", "redundancy")
    }
    others = torch.stack([(each.similarity().sum(1) - 1) / (len(each.weights) - 1) for each in found])
    return {
        "entropy": 1 - means["entropy"],
        "sparsity": means["sparsity"],
        "confidence": means["confidence"],
        "redundancy": -(means["redundancy"] if similarity == "max" else others),
        "position_mass": means["position_mass"].sum(-1),
        "special_mass": -means["special_mass"],
    }


def entropy_by_hand(model, batches, causal):
    """1 minus the mean over real queries that see two keys or more; loops over every query."""
    totals, count = 0, 0
    for batch in batches:
        attentions = torch.stack(model(**batch, output_attentions=True).attentions).double()
        for row, mask in enumerate(batch["attention_mask"].bool()):
            for query in mask.nonzero().flatten().tolist():
                keys = [key for key in mask.nonzero().flatten().tolist() if key <= query or not causal]
                if len(keys) < 2:
                    continue
                p = attentions[:, row, :, query, keys]
                totals = totals - (p * p.log()).sum(-1) / math.log(len(keys))
                count += 1
    return 1 - totals / count


@pytest.mark.parametrize("name, causal", [("bert", False), ("distilbert", False), ("llama", True), ("gqa", True)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_entropy_by_hand_in_single_precision(name, causal, side):
    model = build(name)
    batches = batches_of(model)
    if side == "left":
        batches = [batch | {"attention_mask": batch["attention_mask"].flip(1)} for batch in batches]
    with torch.no_grad():
        expected = entropy_by_hand(build(name, "eager"), batches, causal)
    scores = sh.score_heads(model, batches, "entropy").tensor
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-6)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["bert", "gqa"])
@pytest.mark.parametrize("special", [(), SPECIAL])
def test_every_method_by_hand(special, name):
    model = build(name, dtype=torch.float64)
    batches = batches_of(model)
    expected = terms(by_hand(name, sh.attach(model).layers, batches, special))
    for method in METHODS[:-1]:
        if method == "special_mass" and not special:
            continue
        scores = sh.score_heads(model, batches, method, special_tokens=special).tensor
        torch.testing.assert_close(scores, expected[method], **(ROUNDED if name == "gqa" else CLOSE))
        turned = sh.score_heads(model, batches, method, special_tokens=special, sign=-1).tensor
        assert torch.equal(turned, -scores)


def test_cross_attention():
    model = build("bert_cross", dtype=torch.float64)
    batches = batches_of(model)
    layers = sh.attach(model).layers
    expected = terms(by_hand("bert_cross", layers, batches))
    for method in ("entropy", "sparsity", "confidence", "redundancy"):
        scores = sh.score_heads(model, batches, method)
        assert [layer.kind for layer in scores.layers] == ["self", "cross"] * 3
        torch.testing.assert_close(scores.tensor, expected[method], **CLOSE)
    with pytest.raises(UnsupportedError, match="'position_mass' scores self-attention, and layer .*crossattention"):
        sh.score_heads(model, batches, "position_mass")


def test_redundancy_by_the_mean():
    model = build("bert", dtype=torch.float64)
    batches = batches_of(model)
    expected = terms(by_hand("bert", sh.attach(model).layers, batches), "mean")["redundancy"]
    scores = sh.score_heads(model, batches, "redundancy", similarity="mean").tensor
    torch.testing.assert_close(scores, expected, **CLOSE)


def test_of_two_equal_heads_both_are_redundant():
    model = build("bert", dtype=torch.float64)
    attention = model.encoder.layer[0].attention.self
    with torch.no_grad():
        for projection in (attention.query, attention.key):
            for parameter in projection.parameters():
                parameter[24:36] = parameter[:12]
    scores = sh.score_heads(model, [inputs(model)], "redundancy").tensor
    torch.testing.assert_close(scores[0, [0, 2]], torch.full((2,), -1.0, dtype=torch.float64))
    assert scores[0, [1, 3]].min() > -0.99


def test_a_head_that_is_alone_is_not_redundant():
    model = build("bert", num_attention_heads=1)
    for similarity in ("max", "mean"):
        scores = sh.score_heads(model, [inputs(model)], "redundancy", similarity=similarity).tensor
        torch.testing.assert_close(scores, torch.zeros(3, 1, dtype=torch.float64), atol=1e-9, rtol=0)


def test_focused_even_and_parked_heads():
    model = build("bert", dtype=torch.float64)
    attention = model.encoder.layer[0].attention.self
    batch = inputs(model)
    batch["input_ids"][:, 0] = 2
    with torch.no_grad():
        attention.query.weight[:12] = 0
        attention.query.bias[:12] = 0
        attention.query.weight[12:24] *= 100
        # the third head looks for what the first token's embedding has and the others lack
        states = model.embeddings(batch["input_ids"])
        direction = states[:, 0].mean(0) - states[:, 1:].mean((0, 1))
        attention.key.weight[24:36] = direction
        attention.key.bias[24:36] = 0
        attention.query.weight[24:36] = 0
        attention.query.bias[24:36] = 10
    scores = {
        method: sh.score_heads(model, [batch], method, special_tokens=special).tensor[0]
        for method, special in (("entropy", ()), ("sparsity", ()), ("confidence", ()), ("special_mass", [2]))
    }
    assert abs(scores["entropy"][0]) < 1e-12
    assert abs(scores["sparsity"][0]) < 1e-9
    assert scores["entropy"][1] > 0.9
    assert scores["confidence"][1] > 0.9
    assert scores["entropy"][2] > 0.99
    assert scores["special_mass"][2] < -0.99
    assert scores["special_mass"].argmin() == 2


@pytest.mark.parametrize("normalisation", ["minmax", "rank"])
@pytest.mark.parametrize("distribution", ["confidence", "redundancy", "special_mass"])
def test_the_three_together(distribution, normalisation):
    model = build("bert", dtype=torch.float64)
    batches = batches_of(model)
    found = terms(by_hand("bert", sh.attach(model).layers, batches, SPECIAL), "mean")
    weights = (0.5, -0.25, 2)
    expected = 0
    for weight, name in zip(weights, ("entropy", "sparsity", distribution), strict=True):
        term = found[name]
        if normalisation == "minmax":
            term = (term - term.min()) / (term.max() - term.min())
        else:
            term = term.flatten().argsort().argsort().double().view_as(term) / (term.numel() - 1)
        expected = expected + weight * term
    options = {"weights": weights, "distribution": distribution, "similarity": "mean", "normalisation": normalisation}
    scores = sh.score_heads(model, batches, "attention_guided", special_tokens=SPECIAL, **options).tensor
    torch.testing.assert_close(scores, expected, **CLOSE)


def test_the_three_together_by_default():
    model = build("bert", dtype=torch.float64)
    batches = batches_of(model)
    found = terms(by_hand("bert", sh.attach(model).layers, batches))
    expected = 0
    for name in ("entropy", "sparsity", "confidence"):
        low, high = found[name].min(), found[name].max()
        expected = expected + (found[name] - low) / (high - low) / 3
    scores = sh.score_heads(model, batches, "attention_guided").tensor
    torch.testing.assert_close(scores, expected, **CLOSE)
    turned = sh.score_heads(model, batches, "attention_guided", sign=-1)
    assert torch.equal(turned.tensor, -scores)
    assert turned.top(6, min_per_layer=1).count() == 6


@pytest.mark.parametrize("normalisation, expected", [("minmax", 0.0), ("rank", 0.5)])
def test_heads_that_are_all_alike(normalisation, expected):
    model = build("bert", dtype=torch.float64)
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.attention.self.query.weight.zero_()
            layer.attention.self.query.bias.zero_()
    batch = {"input_ids": torch.full((2, 4), 9)}
    scores = sh.score_heads(model, [batch], "attention_guided", normalisation=normalisation).tensor
    torch.testing.assert_close(scores, torch.full((3, 4), expected, dtype=torch.float64))


@pytest.mark.parametrize(
    "method, options, error, message",
    [
        ("entropy", {"sign": 0}, InvalidArgumentError, "sign: wanted 1 or -1, got int 0"),
        ("entropy", {"sign": True}, InvalidArgumentError, "sign: wanted 1 or -1"),
        (
            "entropy",
            {"similarity": "max"},
            InvalidTypeError,
            "options: wanted those of 'entropy': special_tokens, sign",
        ),
        ("redundancy", {"similarity": "least"}, InvalidArgumentError, r"similarity: wanted one of \('max', 'mean'\)"),
        ("special_mass", {}, InvalidArgumentError, "special_tokens: wanted the ids that 'special_mass' is the mass on"),
        ("sparsity", {"special_tokens": ["x"]}, InvalidTypeError, "special_tokens: wanted an int"),
        ("attention_guided", {"distribution": "entropy"}, InvalidArgumentError, "distribution: wanted one of"),
        ("attention_guided", {"normalisation": "z"}, InvalidArgumentError, "normalisation: wanted one of"),
        (
            "attention_guided",
            {"weights": (1, 2)},
            InvalidArgumentError,
            "weights: wanted three finite numbers, not all",
        ),
        ("attention_guided", {"weights": (0, 0, 0)}, InvalidArgumentError, "weights: wanted three finite numbers"),
        ("attention_guided", {"weights": (1, 1, math.nan)}, InvalidArgumentError, "weights: wanted three finite"),
        ("attention_guided", {"weights": "abc"}, InvalidTypeError, "weights: wanted three finite numbers"),
        ("attention_guided", {"weights": (1, 1, "1")}, InvalidTypeError, "weights: wanted three finite numbers"),
        ("attention_guided", {"distribution": "special_mass"}, InvalidArgumentError, "special_tokens: wanted the ids"),
    ],
)
def test_wrong_options(method, options, error, message):
    model = build("bert")
    with pytest.raises(error, match=message):
        sh.score_heads(model, [inputs(model)], method, **options)
    assert sh.get_handle(model) is None
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("method", METHODS)
def test_batches_that_say_nothing(method):
    model = build("bert")
    options = {"special_tokens": [5]} if method == "special_mass" else {}
    with pytest.raises(UnsupportedError, match=f"'{method}' needs a query that sees more than one key .* in layer"):
        sh.score_heads(model, [inputs(model, length=1)], method, **options)


def test_batches_of_special_tokens_alone():
    model = build("bert")
    with pytest.raises(UnsupportedError, match="padding and special tokens not counted"):
        sh.score_heads(model, [{"input_ids": torch.full((2, 4), 9)}], "entropy", special_tokens=[9])


def test_a_head_without_statistics_is_not_scored_in_silence():
    model = build("bert")
    with torch.no_grad():
        model.encoder.layer[-1].attention.self.query.weight[:8] = torch.nan
    last = sh.attach(model).layers[-1]
    with pytest.raises(UnsupportedError, match=f"wanted a number .*, got nan for head 0 of layer {last.name}"):
        sh.score_heads(model, batches_of(model), "attention_guided")

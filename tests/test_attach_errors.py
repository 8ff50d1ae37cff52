"""Is everything that cannot be honoured refused, by name, and nothing silently dense?"""

from __future__ import annotations

import pytest
import torch
from models import build, inputs, masks, output
from torch import nn

import sparse_heads as sh
from sparse_heads.errors import (
    DetachedError,
    InvalidArgumentError,
    InvalidTypeError,
    SparseHeadsWarning,
    SubsetMismatchError,
    UnknownFamilyError,
    UnsupportedError,
)
from sparse_heads.integrations.transformers import families

MASKS = masks(3)
ALL = torch.ones(3, 4, dtype=torch.bool)


def attached(name="bert", mask=None):
    model = build(name)
    handle = sh.attach(model)
    handle.set_heads(mask)
    return model, handle, inputs(model)


@pytest.mark.parametrize(
    "subset, error, message",
    [
        (ALL.float(), InvalidTypeError, "mask: wanted a bool tensor.*float32"),
        (ALL.long(), InvalidTypeError, "mask: wanted a bool tensor.*int64"),
        (ALL[:, :3], InvalidArgumentError, r"mask: wanted shape \[3, 4\].*\[3, 3\]"),
        (ALL[:2], InvalidArgumentError, r"mask: wanted shape \[3, 4\].*\[2, 4\]"),
        (ALL[0], InvalidArgumentError, r"mask: wanted shape \[3, 4\]"),
        (ALL[None, None], InvalidArgumentError, r"mask: wanted shape \[3, 4\]"),
        ({3: [0]}, InvalidArgumentError, "3"),
        ({"no such layer": [0]}, InvalidArgumentError, "no such layer"),
        ({0: [4]}, InvalidArgumentError, "4"),
        ({0: [-1]}, InvalidArgumentError, "-1"),
        ({0: [1, 1]}, InvalidArgumentError, "1"),
        ({0: [0.5]}, InvalidTypeError, "0.5"),
        ({0.5: [0]}, (InvalidTypeError, InvalidArgumentError), "0.5"),
        ([[True]], InvalidTypeError, "subset: wanted a HeadSubset"),
        ("all", InvalidTypeError, "subset: wanted a HeadSubset"),
    ],
)
def test_wrong_subsets(subset, error, message):
    _model, handle, _ = attached(mask=MASKS["scattered"])
    for choose in (handle.set_heads, handle.bind, lambda given: handle.use_heads(given).__enter__()):
        with pytest.raises(error, match=message):
            choose(subset)
    assert torch.equal(handle.subset.mask, MASKS["scattered"])


@pytest.mark.parametrize(
    "scale, error, message",
    [
        ([1.0], InvalidTypeError, "scale: wanted a floating-point tensor"),
        (torch.ones(3, 4, dtype=torch.long), InvalidTypeError, "scale: wanted a floating-point tensor"),
        (torch.ones(3, 3), InvalidArgumentError, r"scale: wanted .*\[3, 4\]"),
        (torch.ones(4), InvalidArgumentError, r"scale: wanted .*\[3, 4\]"),
        (torch.full((3, 4), float("nan")), InvalidArgumentError, "scale: wanted numbers, got NaN"),
    ],
)
def test_wrong_scales(scale, error, message):
    _model, handle, _ = attached()
    with pytest.raises(error, match=message), handle.use_heads(None, scale=scale):
        pass


def test_scale_for_another_batch():
    model, handle, batch = attached()
    with (
        pytest.raises(InvalidArgumentError, match="scale: wanted a batch of 2 requests.*got a batch of 3"),
        handle.use_heads(None, scale=torch.ones(2, 3, 4)),
    ):
        model(**batch)


def test_subsets_of_another_model():
    _, other, _ = attached("electra")
    _model, handle, _ = attached()
    with pytest.raises(SubsetMismatchError, match="'electra' against 'bert'"):
        handle.set_heads(sh.HeadSubset(ALL, other.layers))
    larger = sh.attach(build("bert", num_hidden_layers=4))
    with pytest.raises(SubsetMismatchError, match="4 attention layers against 3"):
        handle.set_heads(sh.HeadSubset(torch.ones(4, 4, dtype=torch.bool), larger.layers))


def test_a_detached_handle():
    _model, handle, batch = attached()
    view = handle.bind(MASKS["scattered"])
    handle.detach()
    for use in (
        lambda: handle.set_heads(None),
        lambda: handle.use_heads(None).__enter__(),
        lambda: handle.bind(None),
        lambda: handle.save_pretrained("nowhere"),
        lambda: view(**batch),
    ):
        with pytest.raises(DetachedError, match="handle: detached; attach the model again"):
            use()


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("part", ["model", "model.model", "wrapper"])
def test_a_cache_of_other_heads_of_equal_number(part, by_position):
    """It would fit, and give wrong numbers."""
    inner = build("llama_lm")
    model = Wrapper(inner) if part == "wrapper" else inner
    call = inner.model if part == "model.model" else model
    handle, batch = sh.attach(model), inputs(inner)
    with torch.no_grad():
        handle.set_heads({0: [1], 1: [2], 2: [3]})
        cache = call(**batch, use_cache=True).past_key_values
        handle.set_heads({0: [1], 1: [0], 2: [3]})
        words = batch["input_ids"][:, :1]
        with pytest.raises(SubsetMismatchError, match=r"past_key_values: .*lacks key/value heads \[0\] of layer .*1"):
            if by_position:
                call(words, None, None, cache)
            else:
                call(words, past_key_values=cache)
        handle.set_heads({0: [1], 1: [2], 2: []})
        call(words, past_key_values=cache)


def test_attention_probabilities_of_switched_off_heads():
    model = build("bert", "eager")
    handle, batch = sh.attach(model), inputs(model)
    assert model(**batch, output_attentions=True).attentions[0].shape == (3, 4, 7, 7)
    handle.set_heads(MASKS["scattered"])
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(**batch, output_attentions=True)
    model.config.output_attentions = True
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(**batch)
    model(**batch, output_attentions=False)


@pytest.mark.parametrize("mask", [None, MASKS["scattered"]])
def test_a_stray_head_mask_warns(mask):
    model, _handle, batch = attached(mask=mask)
    expected = output(model, batch)
    with pytest.warns(SparseHeadsWarning, match="head_mask: transformers 5 ignores.*set_heads"):
        result = model(**batch, head_mask=torch.zeros(3, 4))[0]
    assert torch.equal(result * batch["attention_mask"].unsqueeze(-1), expected)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"layout": "tall"}, InvalidArgumentError, "layout: wanted one of"),
        ({"kv": "some"}, InvalidArgumentError, r"kv: wanted one of \('active', 'all'\), got some"),
        ({"backend": "cuda"}, sh.errors.BackendUnavailableError, "backend: .*'cuda'"),
        ({"backend": "sdpa"}, InvalidArgumentError, "backend: wanted one of"),
        ({"include": "nothing"}, UnknownFamilyError, "include, exclude: wanted patterns that leave"),
        ({"include": 3}, InvalidTypeError, "include: wanted None, a pattern"),
        ({"exclude": [3]}, InvalidTypeError, "exclude: wanted None, a pattern"),
    ],
)
def test_wrong_options(options, error, message):
    model = build("bert")
    with pytest.raises(error, match=message):
        sh.attach(model, **options)
    assert sh.get_handle(model) is None
    assert type(model.encoder.layer[0].attention.self.query) is nn.Linear


def test_what_is_no_model():
    for function in (sh.attach, sh.get_handle):
        with pytest.raises(InvalidTypeError, match=r"model: wanted a torch.nn.Module, got dict"):
            function({})


class Attention(nn.Module):
    """Attention that follows its number of heads, and whose output projection is where no known family has it."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.mixed = (nn.Linear(24, 24) for _ in range(4))
        self.head_dim = 6

    def forward(self, x):
        rows, length = x.shape[:2]
        query, key, value = (
            projection(x).view(rows, length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        heads = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.mixed(heads.transpose(1, 2).flatten(2))


def test_an_unknown_family_and_the_advice_it_gets():
    with pytest.raises(
        UnknownFamilyError, match=r"no attention layer in Sequential.*append a Family\(query, key, value"
    ):
        sh.attach(nn.Sequential(nn.Linear(3, 3)))
    model = nn.Sequential(Attention(), Attention())
    with pytest.raises(
        UnknownFamilyError,
        match=r"output projection of 0 at 0.o_proj or 0.out_proj, got none.*append a Family\(.*exclude=",
    ):
        sh.attach(model)
    families.FAMILIES.append(families.Family("q_proj", "k_proj", "v_proj", "mixed", "head_dim"))
    try:
        handle = sh.attach(model)
    finally:
        families.FAMILIES.pop()
    assert [(layer.name, layer.num_heads) for layer in handle.layers] == [("0", 4), ("1", 4)]
    x = torch.randn(2, 5, 24)
    handle.set_heads({0: [1, 2], 1: [3]})
    result = model(x)
    handle.detach()
    with torch.no_grad():
        model[0].mixed.weight[:, :6] = 0
        model[0].mixed.weight[:, 18:] = 0
        model[1].mixed.weight[:, :18] = 0
    torch.testing.assert_close(result, model(x))


def test_layers_of_an_unknown_family_may_be_left_out():
    model = nn.Sequential(Attention(), build("bert"))
    handle = sh.attach(model, exclude="0")
    assert [layer.name for layer in handle.layers] == [f"1.encoder.layer.{i}.attention.self" for i in range(3)]


@pytest.mark.parametrize("role", ["query", "key", "value"])
def test_replaced_projections(role):
    class Quantised(nn.Linear):
        pass

    model = build("bert")
    setattr(model.encoder.layer[1].attention.self, role, Quantised(48, 48))
    with pytest.raises(
        UnsupportedError, match=f"the {role} projection of encoder.layer.1.*torch.nn.Linear, got Quantised"
    ):
        sh.attach(model)
    assert type(model.encoder.layer[0].attention.self.query) is nn.Linear


def test_parametrised_projections():
    model = build("bert")
    nn.utils.parametrizations.weight_norm(model.encoder.layer[2].attention.output.dense)
    with pytest.raises(UnsupportedError, match="the output projection of encoder.layer.2.*Parametrized"):
        sh.attach(model)


@pytest.mark.parametrize("row, role", [(1, "query"), (0, "key")])
def test_a_projection_in_two_places(row, role):
    model = build("bert")
    first = model.encoder.layer[0].attention.self.query
    setattr(model.encoder.layer[row].attention.self, role, first)
    with pytest.raises(
        UnsupportedError, match=rf"the {role} projection of encoder.layer.{row}.* is the same module as the query"
    ):
        sh.attach(model)
    assert type(first) is nn.Linear


def test_a_parameter_of_a_list_of_modules_may_belong_to_single_heads():
    model = build("bert")
    model.encoder.layer[0].attention.self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(4))
    with pytest.raises(UnsupportedError, match=r"its norms.0.weight \[12\] may belong to single heads"):
        sh.attach(model)


def test_a_forward_on_the_instance():
    model = build("bert")
    query = model.encoder.layer[0].attention.self.query
    query.forward = lambda x: nn.functional.linear(x, query.weight)
    with pytest.raises(UnsupportedError, match="the query projection of encoder.layer.0.*forward of its own"):
        sh.attach(model)


def test_head_sizes_that_do_not_fit():
    model = build("bert")
    model.encoder.layer[0].attention.self.attention_head_size = 16
    with pytest.raises(UnsupportedError, match="encoder.layer.0.*wanted 4 heads of 16"):
        sh.attach(model)


def test_a_forward_that_does_not_follow_its_number_of_heads():
    model = build("bert")
    attention = model.encoder.layer[1].attention.self
    handle = sh.attach(model)
    attention.forward = lambda states, *_, **__: (states, None)
    handle.set_heads(MASKS["scattered"])
    with pytest.raises(UnsupportedError, match="encoder.layer.1.*does not follow the number of heads"):
        model(**inputs(model))

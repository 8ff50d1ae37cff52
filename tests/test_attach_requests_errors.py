"""Is every subset a request refused, by name, where it cannot be honoured?"""

from __future__ import annotations

import pytest
import torch
from generation_inputs import TIGHT, alone_outputs, attached, request_masks
from models import build, inputs, masks, output
from torch import nn

import sparse_heads as sh
from sparse_heads.errors import InvalidArgumentError, SparseHeadsError, UnsupportedError
from sparse_heads.integrations.transformers import calls

pytestmark = pytest.mark.usefixtures("one_thread")
SCATTERED = request_masks()["scattered"]


@pytest.fixture(autouse=True)
def no_record_is_left():
    yield
    assert calls._calls.get() is None
    assert calls._overrides.get() is None


@pytest.mark.parametrize("rows", [1, 2, 4, 7])
@pytest.mark.parametrize("name", ["bert", "llama_lm"])
def test_a_batch_of_another_size(name, rows):
    model, handle, _plain, _ = attached(name, SCATTERED)
    with pytest.raises(InvalidArgumentError, match=rf"subset.*3.*{rows}"):
        model(**inputs(model, rows))
    handle.set_heads(None)
    model(**inputs(model, rows))


def test_a_scale_of_another_size():
    model, handle, _plain, batch = attached()
    with pytest.raises(InvalidArgumentError, match="scale"), handle.use_heads(SCATTERED, scale=torch.rand(2, 3, 4)):
        model(**batch)


@pytest.mark.parametrize(
    "subset, message",
    [
        (torch.ones(3, 3, 4, 7, dtype=torch.bool), "token"),
        (torch.ones(0, 3, 4, dtype=torch.bool), r"\[3, 4\]"),
        (torch.ones(3, 2, 4, dtype=torch.bool), r"\[3, 4\]"),
        (torch.ones(3, 3, 5, dtype=torch.bool), r"\[3, 4\]"),
    ],
)
def test_wrong_masks(subset, message):
    _model, handle, _plain, _ = attached(mask=SCATTERED)
    for choose in (handle.set_heads, handle.bind, lambda given: handle.use_heads(given).__enter__()):
        with pytest.raises(SparseHeadsError, match=f"(mask|subset).*{message}"):
            choose(subset)
    assert torch.equal(handle.subset.mask, SCATTERED)


class Windows(nn.Module):
    """A layer that sees windows of a sequence as rows of its batch."""

    def __init__(self, windows):
        super().__init__()
        self.windows = windows
        self.layer = build("bert").encoder.layer[0]

    def forward(self, inputs_embeds):
        rows, length, width = inputs_embeds.shape
        folded = inputs_embeds.reshape(rows * self.windows, length // self.windows, width)
        return self.layer(folded).reshape(rows, length, width)


@pytest.mark.parametrize("windows", [2, 3])
def test_windows_in_the_batch_axis(windows):
    model = Windows(windows)
    handle = sh.attach(model)
    states = torch.randn(2, 6, 48)
    handle.set_heads(torch.tensor([[True, False, True, True]]))
    model(states)
    handle.set_heads(torch.tensor([[[True, False, True, True]], [[False, True, False, True]]]))
    with pytest.raises(SparseHeadsError, match="subset.*request"):
        model(states)


def test_all_requests_in_one_row():
    """Packed sequences: one row for every request together."""
    model, _handle, _plain, _ = attached(mask=SCATTERED)
    with pytest.raises(InvalidArgumentError, match="subset.*3.*1"):
        model(inputs_embeds=torch.randn(1, 21, 48))


def test_attention_probabilities():
    model, handle, _plain, batch = attached("bert", SCATTERED, "eager")
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model(**batch, output_attentions=True)
    handle.set_heads(None)
    assert model(**batch, output_attentions=True).attentions[0].shape == (3, 4, 7, 7)


@pytest.mark.parametrize(
    "name, dropout",
    [
        ("bert", {"attention_probs_dropout_prob": 0.1}),
        ("distilbert", {"attention_dropout": 0.1}),
        ("llama_lm", {"attention_dropout": 0.1}),
    ],
)
def test_attention_dropout(name, dropout):
    model, handle, plain, batch = attached(name, dtype=torch.float64, **dropout)
    handle.set_heads(SCATTERED)
    expected = alone_outputs(plain, handle.layers, SCATTERED, batch)
    torch.testing.assert_close(output(model, batch).detach(), expected, **TIGHT)
    model.train()
    with pytest.raises(UnsupportedError, match="dropout"):
        model(**batch)
    handle.set_heads(None)
    model(**batch)
    handle.set_heads(masks(3)["scattered"])
    model(**batch)


@pytest.mark.parametrize("name", ["llama_lm", "bert"])
def test_originals_that_cannot_be_replaced(name):
    model = build(name, "flex_attention")
    handle, batch = sh.attach(model), inputs(model)
    with pytest.raises(UnsupportedError, match="flex_attention"):
        handle.set_heads(SCATTERED)
        model(**batch)

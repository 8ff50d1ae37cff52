"""torch.compile on an attached model: right under every subset, and a bounded number of compilations."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from transformers import BertConfig, BertModel

import sparse_heads as sh


@pytest.fixture
def model():
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    return BertModel(config).eval()


def test_compiled_model_follows_every_subset_without_compiling_again(model):
    handle = sh.attach(model)
    compiler = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=compiler)
    ids = torch.arange(14).view(2, 7)
    frames = []
    with torch.no_grad():
        for number in (*range(0, 16, 3), *range(0, 16, 3)):
            mask = torch.tensor([[bool(number >> head & 1) for head in range(4)], [True, number % 2 == 0, True, False]])
            if number % 2 == 0:
                with handle.use_heads(mask):
                    actual = compiled(ids).last_hidden_state
            else:
                handle.set_heads(mask)
                actual = compiled(ids).last_hidden_state
            with handle.use_heads(mask):
                torch.testing.assert_close(actual, model(ids).last_hidden_state)
            frames.append(compiler.frame_count)
    assert frames[5] <= frames[0] + 4, f"compilations over six subsets: {frames}"
    assert frames[-1] == frames[5], f"compilations over the same subsets again: {frames}"


def test_compiled_backward_equals_eager(model):
    handle = sh.attach(model)
    compiled = torch.compile(model, backend="eager")
    handle.set_heads({0: [1, 2], 1: []})
    ids = torch.arange(14).view(2, 7)
    weight = model.encoder.layer[0].attention.self.query.weight
    gradients = []
    for run in (model, compiled):
        weight.grad = None
        run(ids).last_hidden_state.square().sum().backward()
        gradients.append(weight.grad.clone())
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_compiled_model_runs_a_subset_for_every_request(model):
    handle = sh.attach(model)
    compiler = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=compiler)
    ids = torch.arange(21).view(3, 7)
    frames = []
    with torch.no_grad():
        for seed in range(5):
            mask = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(seed)) < 0.5
            with handle.use_heads(mask):
                torch.testing.assert_close(compiled(ids).last_hidden_state, model(ids).last_hidden_state)
            frames.append(compiler.frame_count)
    assert frames[-1] == frames[1], f"compilations over five subsets: {frames}"

"""Which subset does a forward run under when blocks interleave, forwards are interrupted and models stand in others?"""

from __future__ import annotations

import pytest
import torch
from models import build, inputs, masked_copy, output
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import sparse_heads as sh
from sparse_heads.errors import InvalidArgumentError, SubsetMismatchError, UnsupportedError

pytestmark = pytest.mark.usefixtures("one_thread")
FIRST, LAST = ({layer: [head] for layer in range(3)} for head in (0, 3))


class Around(nn.Module):
    """Runs the model inside it on what `call` makes of its inputs."""

    def __init__(self, inner: nn.Module, call) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, *args, **kwargs):
        return self.call(self.inner, *args, **kwargs)


@pytest.mark.parametrize("part", ["root", "inner"])
def test_an_interrupted_forward_leaves_nothing_to_the_next(part):
    model = build("llama_lm")
    handle, batch = sh.attach(model), inputs(model)
    handle.set_heads(None)
    expected = output(model, batch)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    handle.set_heads(FIRST)
    with pytest.raises(KeyboardInterrupt):
        (model if part == "root" else model.model)(**batch, past_key_values=DynamicCache())
    hook.remove()
    handle.set_heads(None)
    assert torch.equal(output(model, batch), expected)


def test_blocks_may_close_in_any_order():
    model = build("bert")
    handle, batch = sh.attach(model), inputs(model)
    one, other = handle.use_heads(FIRST), handle.use_heads(LAST)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    with handle.use_heads(LAST):
        expected = output(model, batch)
    assert torch.equal(output(model, batch), expected)
    other.__exit__(None, None, None)
    with handle.use_heads(None):
        expected = output(model, batch)
    assert torch.equal(output(model, batch), expected)


def test_a_bound_subset_is_a_copy():
    model = build("bert")
    handle, batch = sh.attach(model), inputs(model)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[:, 1] = True
    view = handle.bind(mask, scale=torch.full((3, 4), 0.5))
    with handle.use_heads(mask, scale=torch.full((3, 4), 0.5)):
        expected = output(model, batch)
    mask.fill_(True)
    assert torch.equal(view(**batch)[0] * batch["attention_mask"].unsqueeze(-1), expected)


def test_every_cache_of_one_forward_is_checked():
    inner = build("llama_lm")
    words = inputs(inner)["input_ids"]
    model = Around(inner, lambda lm, *caches: [lm(words[:, :2], past_key_values=cache).logits for cache in caches])
    handle = sh.attach(model)
    caches = DynamicCache(), DynamicCache()
    with torch.no_grad():
        for cache, subset in zip(caches, (FIRST, LAST), strict=True):
            with handle.use_heads(subset):
                model(cache)
        with handle.use_heads(FIRST), pytest.raises(SubsetMismatchError, match="past_key_values"):
            model(*caches)


def test_every_model_in_a_forward_has_rows_of_its_own():
    plain, inner = build("bert"), build("bert")
    words = inputs(plain)["input_ids"]
    model = Around(inner, lambda bert, ids: [bert(ids)[0], bert(ids.repeat_interleave(2, 0))[0]])
    handle = sh.attach(model)
    mask = torch.rand(len(words), 3, 4) < 0.5
    handle.set_heads(mask)
    with torch.no_grad():
        once, twice = model(words)
        torch.testing.assert_close(once.repeat_interleave(2, 0), twice)
        for row, one in enumerate(once):
            oracle = masked_copy(Around(plain, lambda bert, ids: bert(ids)[0]), handle.layers, mask[row])
            torch.testing.assert_close(one, oracle(words[row : row + 1])[0], rtol=1e-4, atol=1e-4)


def test_a_scale_for_every_request_where_the_batch_axis_is_not_the_request():
    class Windows(nn.Module):
        """BERT's encoder over windows folded into the batch axis."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = build("bert").encoder

        def forward(self, states):
            return self.encoder(states.reshape(-1, 3, states.shape[-1]))

    model = Windows()
    handle = sh.attach(model)
    states = torch.randn(2, 6, 48)
    with handle.use_heads(None, scale=torch.ones(2, 3, 4)), pytest.raises(UnsupportedError, match="scale for every"):
        model(states)


class TestCrossAttention:
    """The keys and values of the encoder's states are written once, and belong to the first subset as well."""

    @staticmethod
    def attached() -> tuple:
        model = build("bert_cross")
        handle, batch = sh.attach(model), inputs(model)
        names = [layer.name for layer in handle.layers]
        first, last = ({name: [head] for name in names} for head in (0, 3))
        return model, handle, batch, first, last

    def fill(self, cache: EncoderDecoderCache) -> tuple:
        model, handle, batch, first, last = self.attached()
        with torch.no_grad(), handle.use_heads(first):
            model(**batch, past_key_values=cache)
        return model, handle, batch, first, last

    def test_cropped_to_nothing(self):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        model, handle, batch, first, last = self.fill(cache)
        cache.crop(-batch["input_ids"].shape[1])
        with torch.no_grad(), handle.use_heads(last), pytest.raises(SubsetMismatchError, match="past_key_values"):
            model(**batch, past_key_values=cache)
        with torch.no_grad(), handle.use_heads(first):
            again = model(**batch, past_key_values=cache).logits
            torch.testing.assert_close(again, model(**batch, use_cache=False).logits)

    def test_taken_out_of_its_cache(self):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        model, handle, batch, _, last = self.fill(cache)
        other = EncoderDecoderCache(DynamicCache(), cache.cross_attention_cache)
        with torch.no_grad(), handle.use_heads(last), pytest.raises(SubsetMismatchError, match="past_key_values"):
            model(**batch, past_key_values=other)

    def test_static_and_reset(self):
        config = build("bert_cross").config
        batch = inputs(build("bert_cross"))
        lengths = (batch["input_ids"].shape[1], batch["encoder_hidden_states"].shape[1])
        cache = EncoderDecoderCache(*(StaticCache(config, max_cache_len=length) for length in lengths))
        model, handle, batch, _, _ = self.fill(cache)
        for subset in (None, {0: [1, 2]}):
            cache.reset()
            with torch.no_grad(), handle.use_heads(subset):
                logits = model(**batch, past_key_values=cache).logits
                torch.testing.assert_close(logits, model(**batch, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("outer", ["core", "auto"])
@pytest.mark.parametrize("inner", ["core", "auto"])
def test_a_model_attached_in_part_is_refused(inner, outer):
    model = build("llama_lm")
    sh.attach(model.model, layout=inner)
    with pytest.raises(InvalidArgumentError, match="model: wanted a model that is not attached, whole or in part"):
        sh.attach(model, layout=outer)


def test_core_follows_another_attention_implementation():
    model = build("llama_lm")
    handle, batch = sh.attach(model, layout="core"), inputs(model)
    scale = torch.full((3, 4), 0.5)
    with handle.use_heads(None, scale=scale):
        expected = output(model, batch)
    model.set_attn_implementation("eager")
    with handle.use_heads(None, scale=scale):
        torch.testing.assert_close(output(model, batch), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(UnsupportedError, match="output_attentions"):
            model(**batch, output_attentions=True)


def test_a_mask_for_every_head_under_a_compact_subset():
    model = build("llama_lm")
    handle, batch = sh.attach(model), inputs(model)
    mask = torch.ones(3, 4, 7, 7, dtype=torch.bool).tril()
    handle.set_heads(FIRST)
    with pytest.raises(UnsupportedError, match=r"attention_mask: .*\[3, 4, 7, 7\] \(layout='wide'"):
        model(batch["input_ids"], attention_mask=mask)

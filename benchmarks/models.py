"""The random models that are timed, and the subsets that they run under."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import nn
from transformers import AutoModel, BertConfig, LlamaConfig, LlamaForCausalLM

import sparse_heads as sh

from .cases import NUM_HEADS, Heads

BERT_VOCABULARY = 30522
LLAMA_VOCABULARY = 8192  # small, so that the language-model head takes a twelfth of a token's time, not a third
POSITIONS = 2048
ATTENTION = (".attention.", ".self_attn.")  # in the names of attention parameters: BERT, Llama


@cache
def random_bert(hidden: int, layers: int, feed_forward: int | None = None) -> nn.Module:
    """A seeded BERT (float32, eval, sdpa, no dropout) whose queries and keys have unit variance, so that attention is
    not flat; `feed_forward` is four times `hidden` unless given."""
    config = BertConfig(
        vocab_size=BERT_VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=NUM_HEADS,
        intermediate_size=feed_forward or 4 * hidden,
        max_position_embeddings=POSITIONS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = AutoModel.from_config(config, attn_implementation="sdpa").float().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(hidden)
    for layer in model.encoder.layer:
        for linear in (module for module in layer.attention.modules() if isinstance(module, nn.Linear)):
            linear.weight.normal_(0, hidden**-0.5, generator=generator)
            linear.bias.normal_(0, 0.1, generator=generator)
    return model


@cache
def random_llama(hidden: int, layers: int) -> nn.Module:
    """A seeded Llama with a language-model head (float32, eval, sdpa), the sizes of GPT-2 small; it never ends a text.

    Every product keeps unit variance, so that each head of each layer moves the logits.
    """
    config = LlamaConfig(
        vocab_size=LLAMA_VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        intermediate_size=8 * hidden // 3,
        max_position_embeddings=POSITIONS,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").float().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(hidden)
    for linear in (module for module in model.modules() if isinstance(module, nn.Linear)):
        linear.weight.normal_(0, linear.in_features**-0.5, generator=generator)
    model.model.embed_tokens.weight.normal_(generator=generator)
    return model


def own_attention(model: nn.Module) -> nn.Module:
    """A copy with its own attention weights, so that no candidate finds them in the cache because another ran."""
    shared = {
        id(value): value for name, value in model.named_parameters() if not any(part in name for part in ATTENTION)
    }
    return copy.deepcopy(model, shared)


def mask_of(kept: Iterable[Sequence[int]], num_heads: int = NUM_HEADS) -> torch.Tensor:
    """bool [rows, num_heads], True for the heads `kept[i]` in row `i`."""
    return torch.tensor([[head in heads for head in range(num_heads)] for heads in kept])


def subset_of(kept: Sequence[Heads], layers: sh.Layers) -> sh.HeadSubset:
    """The subset that keeps the heads `kept[i]` in layer `i`."""
    return sh.HeadSubset(mask_of(kept), layers)


def other_heads(heads: Sequence[int]) -> list[int]:
    """As many heads, shifted by one, to switch from; all but the last where `heads` are all."""
    shifted = sorted((head + 1) % NUM_HEADS for head in heads)
    return shifted if shifted != list(heads) else shifted[:-1]

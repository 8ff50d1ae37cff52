"""Tiny random models of every supported family, their inputs, and the oracle for a model with heads off."""

from __future__ import annotations

import copy

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 61
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
}
_DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": 48,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_dim": 37,
    "max_position_embeddings": 40,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
    "max_position_embeddings": 40,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
# name: configuration class, model class, settings. "gqa" has groups of two query heads.
MODELS = {
    "bert": ("BertConfig", "BertModel", _BERT),
    "bert_classifier": ("BertConfig", "BertForSequenceClassification", _BERT | {"num_labels": 5}),
    "bert_masked_lm": ("BertConfig", "BertForMaskedLM", _BERT),
    "bert_cross": ("BertConfig", "BertLMHeadModel", _BERT | {"is_decoder": True, "add_cross_attention": True}),
    "roberta": ("RobertaConfig", "RobertaModel", _BERT | {"pad_token_id": 1}),
    "electra": ("ElectraConfig", "ElectraModel", _BERT | {"embedding_size": 20}),
    "distilbert": ("DistilBertConfig", "DistilBertModel", _DISTILBERT),
    "bart": ("BartConfig", "BartForConditionalGeneration", _BART),
    "marian": ("MarianConfig", "MarianModel", _BART),
    "llama": ("LlamaConfig", "LlamaModel", _LLAMA),
    "llama_lm": ("LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "gqa": ("LlamaConfig", "LlamaForCausalLM", _LLAMA | {"num_key_value_heads": 2, "attention_bias": True}),
}


def build(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: object) -> nn.Module:
    """The model `name` in eval mode, every parameter random and large enough to matter; the same at every call."""
    config_class, model_class, settings = MODELS[name]
    config = getattr(transformers, config_class)(**settings | changes)
    return randomised(getattr(transformers, model_class)._from_config(config, attn_implementation=attention), dtype)


def randomised(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """`model` in eval mode with new parameters: norms near 1, everything else normal."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            is_norm = "norm" in path.lower() and path.endswith("weight")
            parameter.copy_(noise + 1.0 if is_norm else noise)
    return model.to(dtype).eval()


def inputs(model: nn.Module, rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Token ids and a mask with padding in the last row; with cross-attention also what the other stack reads."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length - length // 3 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if getattr(model.config, "add_cross_attention", False):
        states = torch.randn(rows, 5, model.config.hidden_size, generator=generator, dtype=torch.float64)
        encoder_mask = torch.ones(rows, 5, dtype=torch.long)
        encoder_mask[0, 3:] = 0
        batch |= {"encoder_hidden_states": states.to(model.dtype), "encoder_attention_mask": encoder_mask}
    if getattr(model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    return batch


def masks(layers: int, heads: int = 4, group: int = 1) -> dict[str, Tensor]:
    """Bool `[L, H]` by what is special about each; `group` query heads are on or off together."""
    generator = torch.Generator().manual_seed(3)
    scattered = torch.rand(layers, heads // group, generator=generator) < 0.5
    scattered[0, 0], scattered[0, 1] = True, False
    first_empty, one_full = scattered.clone(), scattered.clone()
    first_empty[0] = False
    one_full[-1] = True
    one_each = torch.arange(layers)[:, None] % (heads // group) == torch.arange(heads // group)
    named = {
        "scattered": scattered,
        "one head a layer": one_each,
        "first layer empty": first_empty,
        "last layer full": one_full,
        "all empty": torch.zeros_like(scattered),
    }
    return {name: mask.repeat_interleave(group, 1) for name, mask in named.items()}


def output_projection(model: nn.Module, layer: str) -> nn.Linear:
    """The output projection of the attention layer at path `layer`."""
    parent, _, last = layer.rpartition(".")
    if last in ("self", "attention") and not hasattr(model.get_submodule(layer), "out_lin"):
        return model.get_submodule(f"{parent}.output.dense")
    module = model.get_submodule(layer)
    return next(getattr(module, name) for name in ("o_proj", "out_proj", "out_lin") if hasattr(module, name))


def masked_copy(model: nn.Module, layers: tuple, mask: Tensor) -> nn.Module:
    """The oracle: a copy of a model (not attached) whose output projections have zeros for the masked heads."""
    oracle = copy.deepcopy(model)
    for row, layer in zip(mask, layers, strict=True):
        weight = output_projection(oracle, layer.name).weight
        with torch.no_grad():
            weight.unflatten(1, (layer.num_heads, -1))[:, ~row[: layer.num_heads]] = 0
    return oracle


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The first output, `[B, T, ...]`, with zeros at padding."""
    result = model(**batch)[0]
    return result * batch["attention_mask"].unsqueeze(-1) if result.dim() == 3 else result


def loss(result: Tensor) -> Tensor:
    """A scalar in which every output counts differently."""
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return (result * weights.to(result)).sum()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def oracle_gradients(oracle: nn.Module, layers: tuple, mask: Tensor) -> dict[str, Tensor | None]:
    """The oracle's gradients as a model with heads off must have them: zero for masked columns, which it never reads.

    (In the oracle the masked columns are zeros that still get a gradient; the masked rows' gradients are zeros.)
    """
    for row, layer in zip(mask, layers, strict=True):
        grad = output_projection(oracle, layer.name).weight.grad
        grad.unflatten(1, (layer.num_heads, -1))[:, ~row[: layer.num_heads]] = 0
    return gradients(oracle)


def enable_checkpointing(model: nn.Module, reentrant: bool = False) -> None:
    # the newer name of the same in transformers 5.23
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})

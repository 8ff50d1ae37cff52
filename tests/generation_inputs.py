"""What the tests of attached models share: subsets a request, dense oracles for them, and greedy tokens."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from models import build, inputs, masked_copy, output, output_projection, randomised
from torch import Tensor, nn

import sparse_heads as sh

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
# Of models whose eager attention takes the softmax in float32, also of float64.
LOOSE = {"rtol": 2e-4, "atol": 1e-4}
# What decides a greedy token must be far from a tie in float32, or two right answers could differ.
SMALLEST_GAP = 2e-3
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def request_masks(layers: int = 3, heads: int = 4, requests: int = 3) -> dict[str, Tensor]:
    """Bool `[B, L, H]` by what is special about each."""
    generator = torch.Generator().manual_seed(4)
    scattered = torch.rand(requests, layers, heads, generator=generator) < 0.5
    scattered[:, 0, 0], scattered[:, -1, 1] = True, False
    named = {name: scattered.clone() for name in ("scattered", "first layer empty", "last layer empty")}
    named["first layer empty"][:, 0] = False
    named["last layer empty"][:, -1] = False
    named["one request empty"] = scattered.clone()
    named["one request empty"][-1] = False
    named["one request full"] = scattered.clone()
    named["one request full"][0] = True
    named["equal"] = scattered[:1].expand(requests, -1, -1)
    named["all empty"] = torch.zeros_like(scattered)
    named["all on"] = torch.ones_like(scattered)
    return named


def gated_copy(model: nn.Module, layers: sh.Layers | tuple, mask: Tensor) -> nn.Module:
    """A dense copy whose output projections read zeros for heads that are off: `mask [L, H]` or `[B, L, H]`.

    Row r of a batch belongs to request r // (rows / B). The mask is the attribute `head_mask`, which may be replaced
    between two calls, also with a cache that holds every head.
    """
    oracle = copy.deepcopy(model)
    oracle.head_mask = mask
    for row, layer in enumerate(layers):

        def close(module: nn.Module, args: tuple, row: int = row, heads: int = layer.num_heads) -> tuple:
            gate = oracle.head_mask[..., row, :heads].to(args[0])
            if gate.dim() == 2:
                gate = gate.repeat_interleave(args[0].shape[0] // len(gate), 0).unsqueeze(1)
            return ((args[0].unflatten(-1, (heads, -1)) * gate.unsqueeze(-1)).flatten(-2), *args[1:])

        output_projection(oracle, layer.name).register_forward_pre_hook(close)
    return oracle


def alone_outputs(plain: nn.Module, layers: tuple, subset: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Every row of a batch as its request's own masked copy gives it; `subset` bool `[B, L, H]`."""
    each = len(batch["input_ids"]) // len(subset)
    copies = [masked_copy(plain, layers, mask) for mask in subset]
    with torch.no_grad():
        rows = [output(oracle, batch)[i * each : (i + 1) * each] for i, oracle in enumerate(copies)]
    return torch.cat(rows)


def generator_model(name: str = "llama_lm", **changes: object) -> nn.Module:
    """As `build`, with large logits."""
    model = build(name, **changes)
    with torch.no_grad():
        model.lm_head.weight *= 4
    return model


def attached(
    name: str = "bert", mask: Tensor | None = None, attention: str = "sdpa", **changes: object
) -> tuple[nn.Module, Any, nn.Module, dict[str, Tensor]]:
    """An attached model under `mask`, its handle, the same model plain, and a batch of three."""
    plain, model = build(name, attention, **changes), build(name, attention, **changes)
    handle = sh.attach(model)
    handle.set_heads(mask)
    return model, handle, plain, inputs(model)


def model_of_type(model_type: str, dtype: torch.dtype = torch.float64, **changes: object) -> nn.Module:
    """A tiny random decoder of any transformers type: three layers of four heads on two key/value heads."""
    settings = {
        "vocab_size": 61,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "intermediate_size": 37,
        "max_position_embeddings": 40,
        "attention_dropout": 0.0,
        "pad_token_id": 0,
    }
    config = transformers.CONFIG_MAPPING[model_type](**settings | changes)
    return randomised(transformers.AutoModelForCausalLM.from_config(config), dtype)


def prompts(rows: int = 3, length: int = 6, padded: bool = True) -> dict[str, Tensor]:
    """Token ids and their mask; padding on the left, more of it in later rows."""
    ids = torch.randint(5, 61, (rows, length), generator=torch.Generator().manual_seed(13))
    mask = torch.ones_like(ids)
    if padded:
        for row in range(rows):
            mask[row, : row % (length - 1)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def greedy_alone(
    plain: nn.Module, layers: tuple, subset: Tensor, batch: dict[str, Tensor], **options: object
) -> Tensor:
    """Greedy tokens `[B, T]`, every request by itself on its own masked copy; fails where a choice is close."""
    tokens = []
    for request, mask in enumerate(subset):
        own = {name: tensor[request : request + 1] for name, tensor in batch.items()}
        oracle = masked_copy(plain, layers, mask)
        result = oracle.generate(**own, **GREEDY | options, return_dict_in_generate=True, output_logits=True)
        best = torch.stack(result.logits).topk(2).values
        assert (best[..., 0] - best[..., 1]).min() > SMALLEST_GAP, "the test's own choice of model: a near tie"
        tokens.append(result.sequences)
    return torch.cat(tokens)


def per_request(mask: Tensor, requests: int) -> Tensor:
    """`[L, H]` or `[B, L, H]` as `[B, L, H]`."""
    return mask.expand(requests, -1, -1) if mask.dim() == 2 else mask

"""Builds the models of a case, the attached one and the baselines, all with the same weights and the same input."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn
from transformers import AutoModel, BertConfig

import sparse_heads as sh
from sparse_heads.integrations.transformers.handle import Handle

from . import baselines
from .cases import NUM_HEADS, Case
from .gate import Oracle
from .timing import Candidate

VOCABULARY = 30522
POSITIONS = 2048


@cache
def random_model(hidden: int, layers: int) -> nn.Module:
    """A seeded BERT (float32, eval, sdpa) whose queries and keys have unit variance, so that attention is not flat."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=NUM_HEADS,
        intermediate_size=4 * hidden,
        max_position_embeddings=POSITIONS,
    )
    model = AutoModel.from_config(config, attn_implementation="sdpa").float().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(hidden)
    for layer in model.encoder.layer:
        for linear in (module for module in layer.attention.modules() if isinstance(module, nn.Linear)):
            linear.weight.normal_(0, hidden**-0.5, generator=generator)
            linear.bias.normal_(0, 0.1, generator=generator)
    return model


def own_attention(model: nn.Module) -> nn.Module:
    """A copy with its own attention weights, so that no candidate finds them in the cache because another ran."""
    shared = {id(value): value for name, value in model.named_parameters() if ".attention." not in name}
    return copy.deepcopy(model, shared)


def inputs_of(case: Case) -> dict[str, Tensor]:
    """Seeded random activations for the attention module, or random words with their padding mask for the model."""
    generator = torch.Generator().manual_seed(case.tokens)
    if case.level == "block":
        return {"hidden_states": torch.randn(case.batch, case.tokens, case.hidden, generator=generator)}
    words = torch.randint(VOCABULARY, (case.batch, case.tokens), generator=generator)
    padding = torch.arange(case.tokens) < torch.tensor(case.lengths)[:, None]
    return {"input_ids": words, "attention_mask": padding.long()}


def run_block(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The first layer's own attention module: projections, attention, residual and LayerNorm; [B, T, E]."""
    return model.encoder.layer[0].attention(**inputs)[0]


def run_model(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The last hidden state [B, T, E]."""
    return model(**inputs).last_hidden_state


RUN = {"block": run_block, "model": run_model}


def oracle_of(case: Case, model: nn.Module, subset: sh.HeadSubset) -> Oracle:
    """The masked reference of a case, once in float64 and once in float32."""
    run, inputs = RUN[case.level], inputs_of(case)
    reference = baselines.masked_reference(model, subset)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    return Oracle(run(copy.deepcopy(reference).double(), wide), run(reference, inputs))


def subset_of(kept: Iterable[Sequence[int]], layers: sh.Layers) -> sh.HeadSubset:
    """The subset that keeps the heads `kept[i]` in layer `i`."""
    mask = torch.zeros(len(layers), NUM_HEADS, dtype=torch.bool)
    for row, heads in zip(mask, kept, strict=True):
        row[list(heads)] = True
    return sh.HeadSubset(mask, layers)


def other_heads(heads: Sequence[int]) -> list[int]:
    """As many heads, shifted by one, to switch from; all but the last where `heads` are all."""
    shifted = sorted((head + 1) % NUM_HEADS for head in heads)
    return shifted if shifted != list(heads) else shifted[:-1]


def candidates_of(case: Case) -> tuple[list[Candidate], dict[str, Oracle]]:
    """What is timed in a case, and the oracles by the name that a candidate `expects`."""
    model, inputs, run = random_model(case.hidden, len(case.kept)), inputs_of(case), RUN[case.level]
    attached = own_attention(model)
    handle = sh.attach(attached)
    subset = subset_of(case.kept, handle.layers)
    every = subset_of([range(NUM_HEADS)] * len(case.kept), handle.layers)
    oracles = {"all heads": oracle_of(case, model, every), "kept heads": oracle_of(case, model, subset)}
    found = attached_candidates(case, handle, partial(run, attached, inputs))
    for expects, variants in (("all heads", baselines.DENSE), ("kept heads", baselines.MASKED)):
        for name, variant in variants.items():
            call = partial(run, variant(own_attention(model), subset), inputs)
            found.append(Candidate(name, call, expects=expects))
    if case.level == "model":
        found.append(Candidate("ceiling", partial(run, baselines.no_attention(model), inputs)))
    return found, oracles


def attached_candidates(case: Case, handle: Handle, call: Callable[[], Tensor]) -> list[Candidate]:
    """The attached model warm, its first call after `set_heads` from other heads, and that `set_heads` itself."""
    select = partial(handle.set_heads, subset_of(case.kept, handle.layers))
    select_others = partial(handle.set_heads, subset_of(map(other_heads, case.kept), handle.layers))

    def switch() -> None:
        select_others()
        select()

    select()
    return [
        Candidate("ours", call, expects="kept heads"),
        Candidate("ours_first", call, before=switch, expects="kept heads"),
        Candidate("set_heads", select, before=select_others),
    ]

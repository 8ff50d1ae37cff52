"""The attention block and the whole model under one subset: the attached one and the baselines, all with the same
weights and the same input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import sparse_heads as sh
from sparse_heads.integrations.transformers.handle import Handle

from . import baselines
from .cases import NUM_HEADS, Case
from .gate import Oracle
from .models import BERT_VOCABULARY, other_heads, own_attention, random_bert, subset_of
from .timing import Candidate


def inputs_of(case: Case) -> dict[str, Tensor]:
    """Seeded random activations for the attention module, or random words with their padding mask for the model."""
    generator = torch.Generator().manual_seed(case.tokens)
    if case.level == "block":
        return {"hidden_states": torch.randn(case.batch, case.tokens, case.hidden, generator=generator)}
    words = torch.randint(BERT_VOCABULARY, (case.batch, case.tokens), generator=generator)
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


def candidates_of(case: Case) -> tuple[list[Candidate], dict[str, Oracle]]:
    """What is timed in a case, and the oracles by the name that a candidate `expects`."""
    model, inputs, run = random_bert(case.hidden, len(case.kept)), inputs_of(case), RUN[case.level]
    attached = own_attention(model)
    handle = sh.attach(attached)
    subset = subset_of(case.kept, handle.layers)
    every = subset_of([range(NUM_HEADS)] * len(case.kept), handle.layers)
    oracles = {"all heads": oracle_of(case, model, every), "kept heads": oracle_of(case, model, subset)}
    others = subset_of([other_heads(heads) for heads in case.kept], handle.layers)
    found = attached_candidates(handle, partial(run, attached, inputs), subset, others)
    for expects, variants in (("all heads", baselines.DENSE), ("kept heads", baselines.MASKED)):
        for name, variant in variants.items():
            call = partial(run, variant(own_attention(model), subset), inputs)
            found.append(Candidate(name, call, expects=expects))
    if case.level == "model":
        found.append(Candidate("ceiling", partial(run, baselines.no_attention(model), inputs)))
    return found, oracles


def attached_candidates(
    handle: Handle, call: Callable[[], Tensor], subset: sh.HeadSubset, others: sh.HeadSubset
) -> list[Candidate]:
    """The attached model warm, its first call after `set_heads` from `others`, and that `set_heads` itself."""
    select, select_others = partial(handle.set_heads, subset), partial(handle.set_heads, others)

    def switch() -> None:
        select_others()
        select()

    select()
    return [
        Candidate("ours", call, expects="kept heads"),
        Candidate("ours_first", call, before=switch, expects="kept heads"),
        Candidate("set_heads", select, before=select_others),
    ]

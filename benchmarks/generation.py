"""Greedy `generate()` of a Llama-like model: the whole call, and the time inside its attention layers."""

from __future__ import annotations

import copy
import gc
from functools import partial
from time import perf_counter

import torch
from torch import Tensor, nn

import sparse_heads as sh
from sparse_heads.demo.baselines import repack

from . import baselines
from .cases import GenerateCase
from .gate import Tokens
from .models import LLAMA_VOCABULARY, mask_of, own_attention, random_llama, subset_of
from .timing import Candidate, Stopwatch


def watch_attention(model: nn.Module) -> Stopwatch:
    """Time what runs inside the model's attention modules: projections, rotary positions, cache and attention."""
    stopwatch = Stopwatch("attention", "attention_prefill", "attention_decode")
    started = 0.0

    def start(module: nn.Module, arguments: tuple, keywords: dict) -> None:
        nonlocal started
        started = perf_counter()

    def stop(module: nn.Module, arguments: tuple, keywords: dict, output: tuple) -> None:
        seconds = perf_counter() - started
        phase = "decode" if keywords["hidden_states"].shape[1] == 1 else "prefill"
        stopwatch.seconds["attention"] += seconds
        stopwatch.seconds[f"attention_{phase}"] += seconds

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(start, with_kwargs=True)
        layer.self_attn.register_forward_hook(stop, with_kwargs=True)
    return stopwatch


def generate(model: nn.Module, prompt: Tensor, new_tokens: int) -> Tensor:
    """The prompt [B, T] and `new_tokens` greedy tokens after it, int64 [B, T + new_tokens]."""
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False)


def requests_subset(case: GenerateCase, layers: sh.Layers) -> sh.HeadSubset:
    """The subset [B, L, H] of `case.kept_by_request`."""
    return sh.HeadSubset(torch.stack([mask_of(kept) for kept in case.kept_by_request], dim=1), layers)


def candidates_of(case: GenerateCase) -> tuple[list[Candidate], dict[str, Tokens]]:
    """What is timed in a case, and the tokens by the name that a candidate `expects`."""
    model, generator = random_llama(case.hidden, case.layers), torch.Generator().manual_seed(case.tokens)
    prompt = torch.randint(LLAMA_VOCABULARY, (case.batch, case.tokens), generator=generator)
    run = partial(generate, prompt=prompt, new_tokens=case.new_tokens)
    attached, attached_requests, exact = own_attention(model), own_attention(model), copy.deepcopy(model).double()
    handle = sh.attach(attached)
    subset, by_request = subset_of(case.kept, handle.layers), requests_subset(case, handle.layers)
    handle.set_heads(subset)
    oracles = {
        "all heads": Tokens(run(exact)),
        "kept heads": Tokens(run(baselines.zeroed_columns(exact, subset))),
    }
    models = [
        ("dense", own_attention(model), "all heads"),
        ("mask_only", baselines.zeroed_columns(own_attention(model), subset), "kept heads"),
        ("repacked", repack(model, subset, fused=False), "kept heads"),
        ("repacked_fused", repack(model, subset, fused=True), "kept heads"),
        ("ours", attached, "kept heads"),
    ]
    if case.batch > 1:
        sh.attach(attached_requests).set_heads(by_request)
        oracles["heads by request"] = Tokens(run(baselines.mask_requests(exact, by_request)))
        models.append(("ours_requests", attached_requests, "heads by request"))
    # a cache that is part of a cycle would outlive the call, as nothing is collected between rounds
    return [
        Candidate(name, partial(run, each), before=gc.collect, expects=expects, stopwatch=watch_attention(each))
        for name, each, expects in models
    ], oracles

"""A training step under gates, and the sweep that leaves out every head in turn, against the dense model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import sparse_heads as sh
from sparse_heads.gates.config import GateConfig
from sparse_heads.gates.method import GateMethod
from sparse_heads.pruning.batches import Loss

from . import baselines
from .candidates import run_model
from .cases import NUM_HEADS, GatesCase
from .gate import Oracle, Oracles
from .models import BERT_VOCABULARY, mask_of, random_bert
from .timing import Candidate

CLOSED = -100.0  # a log_alpha whose gate is 0 at every draw
Gradients = dict[str, Tensor]


def config_of(case: GatesCase) -> GateConfig:
    """Differentiable subset pruning to half of the heads; or hard-concrete gates that, unless their importance says
    `CLOSED`, are between 0 and 1 at every draw: logits of the noise stay within 13.8, the clamp begins at 14.4."""
    if case.label == "zeros":
        return sh.HardConcreteConfig(temperature=6.0, initial=0.0)
    return sh.DSPConfig(case.all_count // 2, case.label, anneal_steps=0, end_temperature=1.0)


def close_gates(case: GatesCase, method: GateMethod) -> GateMethod:
    """Close the gates of heads that do not run."""
    with torch.no_grad():
        method.importances[~mask_of(case.kept).flatten()] = CLOSED
    return method


def inputs_of(case: GatesCase) -> dict[str, Tensor]:
    """Seeded random words, or where attention is to dominate activations in the place of the embedded words."""
    generator = torch.Generator().manual_seed(case.tokens)
    if case.label == "zeros":
        return {"inputs_embeds": torch.randn(case.batch, case.tokens, case.hidden, generator=generator)}
    return {"input_ids": torch.randint(BERT_VOCABULARY, (case.batch, case.tokens), generator=generator)}


def weighted_mean(weights: Tensor, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss: the mean of the last hidden state times random weights [B, T, E]."""
    return (run_model(model, batch) * weights).mean()


def begin_gradient(module: nn.Module, arguments: tuple[Tensor]) -> Tensor:
    """Forward pre-hook: let the backward pass reach the module's input and end there."""
    return arguments[0].detach().requires_grad_()


def gated_model(case: GatesCase) -> nn.Module:
    """A copy in training mode, without gradients for weights that the gates' mode freezes."""
    model = copy.deepcopy(random_bert(case.hidden, case.layers, case.feed_forward)).train()
    return model.requires_grad_(case.label != "pipelined")


def dense_model(case: GatesCase) -> nn.Module:
    """The same for training without gates. With frozen weights the backward pass goes as far as gates need it: to what
    the first output projection reads."""
    model = gated_model(case)
    if case.label == "pipelined":
        model.encoder.layer[0].attention.output.dense.register_forward_pre_hook(begin_gradient)
    return model


@torch.enable_grad()
def gradients(
    model: nn.Module, inputs: dict[str, Tensor], weights: Tensor, method: GateMethod | None = None
) -> Gradients:
    """Forward and backward: the output [B, T, E], the gradients of the encoder's matrices and of the importances."""
    output = run_model(model, inputs)
    loss = (output * weights).mean()
    if method is not None:
        loss = loss + method.penalty()
    loss.backward()
    found = {
        name: each.grad for name, each in model.encoder.named_parameters() if each.dim() > 1 and each.requires_grad
    }
    if method is not None:
        found["importances"] = method.importances.grad
    return {"output": output.detach(), **found}


def train_step(
    run: Callable[[], Gradients], optimizer: torch.optim.Optimizer | None, gates: sh.Gates | None = None
) -> Gradients:
    """A whole step at learning rates of 0: the same work, and the next step starts with the same weights."""
    if optimizer is not None:
        optimizer.zero_grad()
    found = run()
    if optimizer is not None:
        optimizer.step()
    if gates is not None:
        gates.step()
    return found


def multiply_heads(gates: Tensor, module: nn.Module, arguments: tuple[Tensor]) -> Tensor:
    """Forward pre-hook: the module's input [B, T, H*D], each head's part times its gate, `gates` [H]."""
    return (arguments[0].unflatten(-1, (len(gates), -1)) * gates.unsqueeze(-1)).flatten(-2)


@torch.enable_grad()
def multiplied(case: GatesCase, dtype: torch.dtype) -> Gradients:
    """The first step under gates, each multiplied with its head's output in the dense model."""
    model = gated_model(case).to(dtype)
    layer_of = torch.arange(case.layers).repeat_interleave(NUM_HEADS)
    method = close_gates(case, config_of(case).build(layer_of))
    for layer, gates in zip(model.encoder.layer, method.sample().to(dtype).view(case.layers, NUM_HEADS), strict=True):
        layer.attention.output.dense.register_forward_pre_hook(partial(multiply_heads, gates))
    return gradients(model, *typed(case, dtype), method)


def typed(case: GatesCase, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs, and the random weights [B, T, E] of the loss, in `dtype`."""
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs_of(case).items()}
    generator = torch.Generator().manual_seed(case.batch)
    return inputs, torch.randn(case.batch, case.tokens, case.hidden, generator=generator).to(dtype)


def step_candidates(case: GatesCase) -> tuple[list[Candidate], dict[str, Oracles]]:
    """The dense training step and the one under gates."""
    dense, gated, inputs = dense_model(case), gated_model(case), typed(case, torch.float32)
    gates = sh.attach_gates(gated, config_of(case))
    close_gates(case, gates.method)
    optimizer = None if case.label == "pipelined" else torch.optim.AdamW(dense.parameters(), lr=0.0)
    gated_optimizer = torch.optim.AdamW(gates.parameter_groups(lr=0.0, gate_lr=0.0))
    run_dense, run_gated = partial(gradients, dense, *inputs), partial(gradients, gated, *inputs, gates.method)
    wide = gradients(dense_model(case).double(), *typed(case, torch.float64))
    return [
        Candidate("dense", partial(train_step, run_dense, optimizer), expects="all heads"),
        Candidate("ours", partial(train_step, run_gated, gated_optimizer, gates), expects="gates"),
    ], {
        "all heads": Oracles.of(wide, gradients(dense_model(case), *inputs)),
        "gates": Oracles.of(multiplied(case, torch.float64), multiplied(case, torch.float32)),
    }


def leave_one_out(case: GatesCase, layers: sh.Layers, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """How much the outputs change without each head, and the loss rises: float32 [L, H] each, of whole forwards."""
    model = copy.deepcopy(random_bert(case.hidden, case.layers, case.feed_forward)).to(dtype)
    inputs, weights = typed(case, dtype)
    dense = run_model(model, inputs)
    change, rise = torch.zeros(2, case.layers, NUM_HEADS)
    for row, head in torch.cartesian_prod(torch.arange(case.layers), torch.arange(NUM_HEADS)).tolist():
        mask = torch.ones(case.layers, NUM_HEADS, dtype=torch.bool)
        mask[row, head] = False
        without = run_model(baselines.zeroed_columns(model, sh.HeadSubset(mask, layers)), inputs)
        squares = [each.double().square().sum((1, 2)) for each in (without - dense, dense)]
        change[row, head] = (squares[0] / squares[1]).mean()
        rise[row, head] = float((without * weights).mean()) - float((dense * weights).mean())
    return change, rise


def run_times(count: int, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """As many forwards; the output of the last one."""
    for _ in range(count):
        output = run_model(model, inputs)
    return output


def sweep_candidates(case: GatesCase) -> tuple[list[Candidate], dict[str, Oracle]]:
    """Ablation scores without and with a loss, and as many forwards of the dense model as there are heads."""
    model = random_bert(case.hidden, case.layers, case.feed_forward)
    inputs, weights = typed(case, torch.float32)

    def scores(loss: Loss | None = None) -> Tensor:
        return sh.score_heads(attached, [inputs], "ablation", loss).tensor.float()

    dense, attached = copy.deepcopy(model), copy.deepcopy(model)
    layers, wide = sh.attach(attached).layers, copy.deepcopy(model).double()
    exact, eager = (leave_one_out(case, layers, dtype) for dtype in (torch.float64, torch.float32))
    return [
        Candidate("dense", partial(run_times, case.all_count, dense, inputs), expects="all heads"),
        Candidate("ours", scores, expects="change"),
        Candidate("ours_loss", partial(scores, partial(weighted_mean, weights)), expects="rise"),
    ], {
        "all heads": Oracle(run_model(wide, inputs), run_model(model, inputs)),
        "change": Oracle(exact[0].double(), eager[0]),
        "rise": Oracle(exact[1].double(), eager[1]),
    }


def candidates_of(case: GatesCase) -> tuple[list[Candidate], dict[str, Oracle] | dict[str, Oracles]]:
    """What is timed in a case, and the oracles by the name that a candidate `expects`."""
    return sweep_candidates(case) if case.label == "sweep" else step_candidates(case)

"""`attach_gates`: a model whose forwards run under gates that learn which heads to keep."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..._files import GATES, load_tensors, save_tensors
from ...errors import (
    DetachedError,
    NotFiniteError,
    SparseHeadsWarning,
    SubsetMismatchError,
    UnsupportedError,
    invalid,
    invalid_type,
)
from ...gates.config import GateConfig
from ...gates.method import GateMethod
from ...heads import HeadScores, HeadSubset
from ...layers import Layers, whole_number
from .attach import attach, get_handle
from .calls import Running
from .fold import fold_into_outputs
from .handle import Handle

_STATE = "_extra_state"  # where a module's state_dict has what is no tensor


def attach_gates(model: nn.Module, config: GateConfig) -> Gates:
    """Give a model gates that learn which heads to keep.

    Every forward outside `handle.use_heads` then runs under them. `model.train()`: all heads, each one's output times
    its gate of this step. (Hard-concrete gates that are exactly 0 are skipped, forward and backward.) `model.eval()`:
    the heads that the gates would keep now, without noise, on the head-skipping path. A training step:

        optimizer = torch.optim.AdamW(gates.parameter_groups(lr=2e-5))
        loss = model(**batch).loss + gates.penalty()
        loss.backward(); optimizer.step(); optimizer.zero_grad(); gates.step()

    The gates' parameters are no part of the model: its `state_dict` stays as it was. A subset that was set before
    counts again after `gates.detach()`.

    Args:
        model: attached already, or one that `sh.attach` takes.
        config: a `DSPConfig`, `HardConcreteConfig` or `LayerwiseConfig`. In its mode "pipelined" the model's parameters
            are frozen until `gates.detach()`. Heads of layers of other kinds than `config.kinds` have a gate of 1 and
            are always kept, uncounted.

    Raises:
        ValueError, TypeError: gates are attached already; no layer of `config.kinds`; more heads to keep than have
            gates; a model that `attach` refuses.
    """
    if not isinstance(config, GateConfig):
        raise invalid_type("config", "a DSPConfig, HardConcreteConfig or LayerwiseConfig", config)
    found = get_handle(model)
    if found is not None and found.gates is not None:
        raise invalid("model", "a model without gates (gates.detach() takes them off)", repr(found.gates))
    handle = attach(model) if found is None else found
    try:
        return Gates(handle, config, owns_handle=found is None)
    except BaseException:
        if found is None:
            handle.detach()
        raise


class Gates:
    """What `attach_gates` returns: one gate for each head that may go.

    handle: the model's; config; method: the gates themselves, a `GateMethod` with the trained `importances`.
    The gates follow a model through `deepcopy` and pickling, as its handle does.
    """

    def __init__(self, handle: Handle, config: GateConfig, *, owns_handle: bool) -> None:
        self.handle = handle
        self.config = config
        self.attached = True
        self.folded = False
        self._owns_handle = owns_handle
        self._heads = _gated_heads(handle.layers, config.kinds)  # bool [L, H], True for heads with a gate
        self.method = config.build(self._heads.nonzero()[:, 0])
        self._positions = self._heads.flatten().nonzero()[:, 0]
        device, _ = self._place()
        if device.type == "cuda":
            self.method.to(device)
            self._positions = self._positions.to(device)
        self._start()
        self._frozen: list[nn.Parameter] = []
        if config.mode == "pipelined":
            self._frozen = [parameter for parameter in handle.model.parameters() if parameter.requires_grad]
            for parameter in self._frozen:
                parameter.requires_grad_(False)
        handle.gates = self

    def __repr__(self) -> str:
        state = f"step {self.steps_done}" if self.attached else "detached"
        kept, whole = int(self.method.keep().sum()), int(self._heads.sum())
        return f"Gates({type(self.config).__name__}, {kept} of {whole} heads, {state})"

    @property
    def steps_done(self) -> int:
        """How often `step` was called."""
        return self.method.steps_done

    @property
    def temperature(self) -> float | None:
        """Of the next draw; None where the method has none."""
        return self.method.temperature

    def parameter_groups(
        self, lr: float | None = None, gate_lr: float | None = None, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer.

        Args:
            lr: of the model's parameters that require a gradient; needed in mode "joint", unused in "pipelined".
            gate_lr: of the gates; the configuration's unless given. Gates never decay.
            weight_decay: of the model's matrices; vectors (biases, norms) do not decay.
        """
        self._check_attached()
        groups = self.method.parameter_groups(gate_lr)
        if self.config.mode == "pipelined":
            return groups
        if lr is None:
            raise invalid("lr", "a learning rate for the model's parameters, which train in mode 'joint'", "none")
        trained = [parameter for parameter in self.handle.model.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.dim() > 1]
        vectors = [parameter for parameter in trained if parameter.dim() <= 1]
        weights = [
            {"params": matrices, "lr": lr, "weight_decay": weight_decay},
            {"params": vectors, "lr": lr, "weight_decay": 0.0},
        ]
        return [group for group in weights if group["params"]] + groups

    def penalty(self) -> Tensor:
        """What to add to the loss, a scalar; 0 for methods without a penalty."""
        return self.method.penalty()

    def step(self) -> None:
        """One training step is over: call it after `optimizer.step()`. The schedule moves on, the noise is drawn anew.

        Raises:
            NotFiniteError: importances that are NaN or infinite; the gates are those of the last step again.
        """
        self._check_attached()
        if not self.method.is_finite():
            self.method.load_state_dict(self._last_good)
            self._drawn = None
            raise NotFiniteError(
                f"importances: wanted finite ones after step {self.steps_done}, got others (is the loss NaN, or "
                "gate_lr too large?); the gates are again what they were before that step"
            )
        self.method.advance()
        self._keep_good()

    def check_gradients(self) -> None:
        """Raise NotFiniteError unless the gates' gradients are finite; on a GPU this waits for the device."""
        for parameter in self.method.parameters():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                raise self._not_finite()

    def zero_grad(self) -> None:
        """Forget the gates' gradients, which `model.zero_grad()` does not know of."""
        self.method.zero_grad()

    def subset(self) -> HeadSubset:
        """The heads that the gates keep now; those without a gate are among them."""
        mask = self.handle.layers.real_heads()
        mask[self._heads] = self.method.keep().cpu()
        return HeadSubset(mask, self.handle.layers)

    def scores(self) -> HeadScores:
        """The ranking of the heads that have a gate, and +inf for all others, which come before them.

        So `scores().top(k)`, with the heads without a gate counted in `k`, is `subset()` for the `k` that it has; so is
        `top(k, kinds=...)` without them, with the configuration's kinds.
        """
        rank = self.method.rank().cpu()
        tensor = torch.full(self._heads.shape, float("inf"), dtype=rank.dtype, device="cpu")
        tensor[self._heads] = rank
        return HeadScores(tensor, self.handle.layers)

    def scale(self) -> Tensor:
        """float64 `[L, H]` on the CPU: what multiplies heads' outputs in eval mode, 0 for those that are off."""
        settled = self.method.settled().detach().cpu()
        if self.folded:
            settled = (settled != 0).to(settled.dtype)
        scale = self.handle.layers.real_heads().to(settled.dtype)
        scale[self._heads] = settled
        return scale

    def fold(self) -> None:
        """Multiply the output projections' weights by `scale()`, in place and once.

        From then on `handle.set_heads(gates.subset())`, once the gates are detached, is all that eval mode did. Weights
        of heads that are off stay as they are. Training under these gates is over.

        Raises:
            UnsupportedError: folded already; two layers that share a weight; an output projection that is no
                `torch.nn.Linear`.
        """
        if self.folded:
            raise UnsupportedError("gates: folded already; a second time would scale the weights twice")
        fold_into_outputs(self.handle.sites, self.scale())
        self.folded = True
        self._settled = None

    def state_dict(self) -> dict[str, Any]:
        """Everything that training goes on from: importances, steps done (and so the noise), the configuration.

        Raises:
            UnsupportedError: gates that are folded; gates loaded from it would scale the weights again.
        """
        if self.folded:
            raise UnsupportedError("gates: folded into the weights; save gates.subset() with the model instead")
        return self.method.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, from gates of the same configuration and model.

        Raises:
            ValueError: another configuration, missing or unknown entries, other shapes, values that are not finite.
        """
        own = self.method.state_dict()
        if not isinstance(state, dict):
            raise invalid_type("state", "what state_dict() gives", state)
        if self.folded:
            raise UnsupportedError("state: these gates are folded into the weights and cannot change any more")
        if state.keys() != own.keys():
            raise invalid("state", f"the entries {sorted(own)}", f"{sorted(state)}")
        for name, tensor in own.items():
            if isinstance(tensor, Tensor):
                _check_loaded(name, state[name], tensor)
        extra = state[_STATE]
        if isinstance(extra, dict):
            whole_number("steps_done", extra.get("steps_done"), 0)
        self.method.load_state_dict(state)
        self._drawn = None
        self._keep_good()

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `gates.safetensors`, which `load_pretrained` reads, and `gates_config.json`, which people read.

        Makes the directory where it is missing; a file that was there stays whole until the new one replaces it.
        """
        state = self.state_dict()
        extra = state.pop(_STATE)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        kept = self.subset()
        save_tensors(
            directory,
            GATES,
            tensors,
            self.handle.layers,
            {"state": extra},
            {"count": kept.count(), "kept": kept.kept()},
        )

    def load_pretrained(self, directory: str | os.PathLike) -> None:
        """Take over what `save_pretrained` wrote, from a directory or a Hugging Face Hub repository.

        Raises:
            InvalidArgumentError: nothing found there, or gates of another configuration.
            SubsetMismatchError: gates of another model.
            FileFormatError: a truncated or malformed file.
        """
        tensors, description, layers = load_tensors(directory, GATES)
        difference = layers.difference(self.handle.layers)
        if difference is None and [info.key for info in layers] != [info.key for info in self.handle.layers]:
            difference = "the same layers in another order"
        if difference is not None:
            raise SubsetMismatchError(f"gates: wanted those of this model, got another model's: {difference}")
        self.load_state_dict({**tensors, _STATE: description.get("state")})

    def detach(self) -> None:
        """Give back the handle and the parameters' `requires_grad` as they were found. Twice is harmless.

        The model is detached too if `attach_gates` attached it. `subset`, `scores`, `scale` and `fold` still work.
        """
        if not self.attached:
            return
        self.attached = False
        for hook in self._hooks:
            hook.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self.handle.gates = None
        if self._owns_handle:
            self.handle.detach()
        if 0 < self.steps_done < self.method.schedule_steps:
            warnings.warn(self.unfinished(self.steps_done), SparseHeadsWarning, stacklevel=2)

    def unfinished(self, steps: int) -> str:
        """What a warning says of a training that ends after `steps` steps, before the schedule."""
        return (
            f"gates: the schedule of {type(self.config).__name__} takes {self.method.schedule_steps} steps, but "
            f"training ends after {steps}: the importances have not settled; shorten the schedule"
        )

    def running(self) -> Running:
        """What a forward that begins now runs."""
        return self._training() if self.handle.model.training else self._evaluating()

    def _training(self) -> Running:
        if self.folded:
            raise UnsupportedError("gates: folded into the weights, which ends training; use model.eval() or new gates")
        scale = _Sample.apply(self.method.importances, self.method, self._positions, self._heads.shape, *self._place())
        key = self._key()
        if self._drawn is None or self._drawn[0] != key:
            self._warn_of_missing_step(key)
            selection = None
            if self.method.skips_zeros:
                with torch.inference_mode(False):  # what is kept may be needed by a forward with gradients
                    selection = self.handle.ready(HeadSubset(scale.detach() != 0, self.handle.layers))
            self._drawn = (key, selection)
        return Running(self._drawn[1], scale)

    def _evaluating(self) -> Running:
        key = self._key()
        if self._settled is None or self._settled[0] != key:
            with torch.inference_mode(False):
                subset, scale = self.subset(), self.scale()
                plain = bool((scale[subset.mask] == 1.0).all())
                running = Running(self.handle.ready(subset), None if plain else scale.to(*self._place()))
            self._settled = (key, running)
        return self._settled[1]

    def _place(self) -> tuple[torch.device, torch.dtype]:
        """Of the scale that a forward gets."""
        weight = self.handle.sites[0].projections["query"].weight
        device = torch.device("cpu") if weight.is_meta else weight.device
        return device, torch.float64 if weight.dtype == torch.float64 else torch.float32

    def _key(self) -> tuple:
        """All that a forward under the gates depends on; the values of the importances come first, then the step."""
        importances = self.method.importances.detach()
        # a fused optimizer leaves the version as it is, but on a GPU a look at the values would wait for the device
        values = tuple(importances.tolist()) if importances.device.type == "cpu" else importances._version
        return (values, self.steps_done, *self._place())

    def _warn_of_missing_step(self, key: tuple) -> None:
        if self._drawn is None or self._warned:
            return
        (values, steps, *_), (values_now, steps_now, *_) = self._drawn[0], key
        if values != values_now and steps == steps_now:
            self._warned = True
            warnings.warn(
                "gates: the importances changed without gates.step(): call it after every optimizer.step(), or the "
                "noise and the schedule stand still",
                SparseHeadsWarning,
                stacklevel=3,
            )

    def _check_attached(self) -> None:
        if not self.attached:
            raise DetachedError("gates: detached; attach new ones")

    def _check_gradient(self, gradient: Tensor) -> None:
        # on a GPU the look would wait for the device: there `step` sees what becomes of it
        if gradient.device.type == "cpu" and not bool(gradient.isfinite().all()):
            raise self._not_finite()

    def _not_finite(self) -> NotFiniteError:
        return NotFiniteError(
            f"importances: wanted finite gradients in step {self.steps_done}, got others (is the loss NaN?); neither "
            "the gates nor the weights have changed in this step"
        )

    def _keep_good(self) -> None:
        self._last_good = {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in self.method.state_dict().items()
        }

    def _start(self) -> None:
        """What a new object and a copy begin with."""
        importances = self.method.importances
        self._hooks = [
            importances.register_hook(self._check_gradient),
            importances.register_post_accumulate_grad_hook(_average_over_ranks),
        ]
        self._drawn: tuple | None = None  # what the last training forward ran: key, selection
        self._settled: tuple | None = None  # what the last forward in eval mode ran: key, Running
        self._warned = False
        self._keep_good()

    def __getstate__(self) -> dict[str, Any]:
        made_by_start = ("_hooks", "_drawn", "_settled", "_warned", "_last_good")
        return {name: value for name, value in self.__dict__.items() if name not in made_by_start}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


class _Sample(torch.autograd.Function):
    """A method's training gates `[n]` as scale `[L, H]`, 1 elsewhere; several backward passes may go through them.

    Reentrant gradient checkpointing goes backward once a layer, and the first time would free the graph of the sample.
    """

    @staticmethod
    def forward(
        ctx: Any,
        importances: Tensor,
        method: GateMethod,
        positions: Tensor,
        shape: torch.Size,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor:
        with torch.enable_grad():
            ctx.gates = method.sample()
        ctx.importances, ctx.positions = method.importances, positions
        gates = ctx.gates.detach()
        return gates.new_ones(shape.numel()).index_copy(0, positions, gates).view(shape).to(device, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.flatten().to(ctx.gates).index_select(0, ctx.positions)
        (grad,) = torch.autograd.grad(ctx.gates, ctx.importances, grad, retain_graph=True)
        return (grad, *[None] * 5)


def _average_over_ranks(importances: Tensor) -> None:
    # averaging what was averaged before changes nothing, so this also holds while gradients are accumulated
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(importances.grad)
        importances.grad /= torch.distributed.get_world_size()


def _gated_heads(layers: Layers, kinds: Sequence[str | tuple[str, str]] | None) -> Tensor:
    """bool `[L, H]`: the heads of layers of `kinds`."""
    heads = layers.real_heads()
    if kinds is None:
        return heads
    for kind in kinds:
        if not any(kind in (info.kind, (info.stack, info.kind)) for info in layers):
            there = sorted({info.kind for info in layers}) + sorted({(info.stack, info.kind) for info in layers})
            raise invalid("kinds", f"kinds of layers that the model has: {there}", kind)
    chosen = [info.kind in kinds or (info.stack, info.kind) in kinds for info in layers]
    return heads & torch.tensor(chosen)[:, None]


def _check_loaded(name: str, value: object, own: Tensor) -> None:
    if not isinstance(value, Tensor) or value.shape != own.shape or not value.is_floating_point():
        raise invalid("state", f"a floating-point tensor {list(own.shape)} as {name!r}", value)
    if not bool(value.isfinite().all()):
        raise invalid("state", f"finite values in {name!r}", "others")

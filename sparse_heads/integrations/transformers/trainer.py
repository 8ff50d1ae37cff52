"""`GatesCallback`: gates in the `Trainer` of transformers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..._files import GATES
from ...errors import SparseHeadsWarning, UnsupportedError, invalid, invalid_type
from .gates import Gates


class GatesCallback(TrainerCallback):
    """Trains gates along with a model:

        optimizer = torch.optim.AdamW(gates.parameter_groups(lr=2e-5))
        Trainer(model, arguments, ..., optimizers=(optimizer, None), callbacks=[GatesCallback(gates)])

    Adds the penalty's gradient and calls `gates.step()` in every optimizer step; logs "heads_kept", "gate_temperature"
    and "gate_penalty" with the loss; saves the gates beside the model in every checkpoint, reads them where training is
    resumed, and with `load_best_model_at_end` those of the best checkpoint. `max_grad_norm` clips the model's gradients
    only. A NaN loss raises `NotFiniteError` before anything is updated.

    Raises, when training begins: InvalidArgumentError for another model, for an optimizer without the gates'
    parameters, and for a resumed checkpoint without gates.
    """

    def __init__(self, gates: Gates) -> None:
        if not isinstance(gates, Gates):
            raise invalid_type("gates", "what attach_gates returns", gates)
        self.gates = gates
        self._penalty: Tensor | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if not any(module is self.gates.handle.model for module in model.modules()):
            raise invalid("gates", f"gates of the trained {type(model).__name__}", repr(self.gates))
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(parameter) not in trained for parameter in self.gates.method.parameters()):
            raise invalid(
                "optimizers", "(an optimizer of gates.parameter_groups(...), None)", "one without the gates' parameters"
            )
        if getattr(optimizer, "scaler", None) is not None and not args.max_grad_norm:
            raise UnsupportedError(
                "max_grad_norm: wanted above 0 with fp16, so that gradients are unscaled in time, got 0"
            )
        if state.global_step > 0:
            self._resume(args, state)
        self.gates.zero_grad()
        steps = self.gates.steps_done + state.max_steps - state.global_step
        if steps < self.gates.method.schedule_steps:
            warnings.warn(self.gates.unfinished(steps), SparseHeadsWarning, stacklevel=2)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        penalty = self.gates.penalty()
        if penalty.requires_grad:
            penalty.backward()
        self._penalty = penalty.detach()
        if getattr(kwargs["optimizer"], "scaler", None) is None:  # which skips such steps itself
            self.gates.check_gradients()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.gates.step()
        self.gates.zero_grad()  # the Trainer zeroes the model's gradients only

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or self._penalty is None:
            return
        values = {"heads_kept": self.gates.subset().count(), "gate_penalty": float(self._penalty)}
        if self.gates.temperature is not None:
            values["gate_temperature"] = self.gates.temperature
        logs.update(values)
        state.log_history[-1].update(values)  # a copy of `logs`, made before this call

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = _checkpoint(args, state)
        if not folder.is_dir():
            raise UnsupportedError(f"GatesCallback: wanted the checkpoint in {folder}, which does not exist")
        self.gates.save_pretrained(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.gates.load_pretrained(state.best_model_checkpoint)

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        """A callback is not told which checkpoint is resumed: it is the one with this state of the Trainer."""
        for folder in (args.resume_from_checkpoint, _checkpoint(args, state)):
            if isinstance(folder, (str, Path)) and (Path(folder) / GATES.weights_file).is_file():
                saved = TrainerState.load_from_json(str(Path(folder) / TRAINER_STATE_NAME))
                # as texts, in which NaN is NaN
                if str((saved.global_step, saved.log_history)) == str((state.global_step, state.log_history)):
                    return self.gates.load_pretrained(Path(folder))
        if self.gates.steps_done != state.global_step:
            raise invalid(
                "resume_from_checkpoint",
                f"{_checkpoint(args, state)} with {GATES.weights_file}, or the gates of another place, at step "
                f"{state.global_step}, read by gates.load_pretrained() beforehand",
                repr(self.gates),
            )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"

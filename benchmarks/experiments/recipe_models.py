"""What a recipe trains and measures: its data as token ids, its model, its training, its scores on the test splits."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    CONFIG_MAPPING,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .bleu import corpus_bleu
from .recipe_data import IGNORED, Example, batches_of, collate, encode, load_split, own_tokenizer

if TYPE_CHECKING:
    from sparse_heads.integrations.transformers.gates import Gates

    from .recipes import Task, Training

EVALUATION_BATCH = 64
TINY_PIECES = 300
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Limits:
    """What a run cuts short: `steps` of every training (None: all of them), a `tiny` random model."""

    steps: int | None
    tiny: bool
    seed: int
    device: str


@dataclass(frozen=True)
class Data:
    """Encoded examples of the training split, and rows and examples of every test split."""

    tokenizer: PreTrainedTokenizerBase
    train: list[Example]
    tests: Mapping[str, tuple[list[dict[str, Any]], list[Example]]]

    @property
    def pad(self) -> int:
        return self.tokenizer.pad_token_id


def load_data(task: Task, folder: Path | None, limits: Limits) -> Data:
    """All splits of a task, as token ids."""
    train = load_split(task, task.train, folder)
    tests = {split: load_split(task, split, folder) for split in task.tests}
    if task.size or limits.tiny:
        texts = (row[column] for row in train for column in task.texts)
        tokenizer = own_tokenizer(task, texts, TINY_PIECES if limits.tiny else task.size)
    else:
        tokenizer = AutoTokenizer.from_pretrained(task.model)
    encoded = {split: (rows, encode(task, rows, tokenizer)) for split, rows in tests.items()}
    return Data(tokenizer, encode(task, train, tokenizer), encoded)


def fresh_model(task: Task, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> PreTrainedModel:
    """The pretrained model, or a random one of the task's architecture; or a tiny one."""
    settings = task.tiny if limits.tiny else task.architecture
    if not settings:
        return AutoModelForSequenceClassification.from_pretrained(task.model, num_labels=task.classes)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if task.label is not None:
        config = CONFIG_MAPPING[task.family](**settings, **ids, num_labels=task.classes)
        return AutoModelForSequenceClassification.from_config(config)
    ids |= {"eos_token_id": tokenizer.sep_token_id, "decoder_start_token_id": tokenizer.cls_token_id}
    config = CONFIG_MAPPING[task.family](**settings, **ids, bos_token_id=None, forced_eos_token_id=None)
    return AutoModelForSeq2SeqLM.from_config(config)


def epoch(data: Data, training: Training, generator: random.Random | None) -> list[Batch]:
    return batches_of(data.train, training, data.pad, generator)


def steps_of(training: Training, data: Data, limits: Limits) -> int:
    """How many optimiser steps a training takes."""
    planned = training.epochs * len(epoch(data, training, None))
    return planned if limits.steps is None else min(planned, limits.steps)


def optimise(model: PreTrainedModel, training: Training, data: Data, limits: Limits, gates: Gates | None = None) -> int:
    """Train the model, or gates and what they let train; the number of steps. Leaves it in eval mode."""
    steps, generator = steps_of(training, data, limits), random.Random(limits.seed)
    if gates is None:
        groups = [{"params": list(model.parameters()), "lr": training.lr}]
    else:
        groups = gates.parameter_groups(lr=training.lr, weight_decay=training.weight_decay)
    decay = training.weight_decay if gates is None else 0.0
    optimizer = torch.optim.AdamW(groups, betas=training.betas, weight_decay=decay)
    of_gates = set() if gates is None else set(gates.method.parameters())
    schedules = [
        constant
        if training.gate_schedule == "constant" and of_gates.issuperset(group["params"])
        else factor(training, steps)
        for group in optimizer.param_groups
    ]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    model.train()
    stream = (batch for _ in range(steps) for batch in epoch(data, training, generator))
    for _, batch in zip(tqdm(range(steps), "training", disable=None), stream, strict=False):
        (batch,) = on_device([batch], limits.device)
        loss = loss_of(model, batch, training.label_smoothing)
        if gates is not None:
            loss = loss + gates.penalty()
        optimizer.zero_grad()
        loss.backward()
        if training.clip is not None:
            nn.utils.clip_grad_norm_(parameters, training.clip)
        optimizer.step()
        scheduler.step()
        if gates is not None:
            gates.step()
    model.eval()
    return steps


def constant(_step: int) -> float:
    return 1.0


def factor(training: Training, steps: int) -> Callable[[int], float]:
    """What the learning rate is multiplied with at a step."""
    if training.schedule == "linear":
        return lambda step: max(0.0, 1 - step / steps)
    warmup = training.warmup
    return lambda step: min((step + 1) / warmup, (warmup / (step + 1)) ** 0.5)


def loss_of(model: nn.Module, batch: Batch, label_smoothing: float) -> Tensor:
    """Cross-entropy a label, or a piece of the target."""
    logits = model(**batch).logits
    return F.cross_entropy(
        logits.movedim(-1, 1), batch["labels"], ignore_index=IGNORED, label_smoothing=label_smoothing
    )


def on_device(batches: Sequence[Batch], device: str) -> list[Batch]:
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


@torch.no_grad()
def evaluate(model: PreTrainedModel, task: Task, data: Data) -> dict[str, float]:
    """Accuracy, or BLEU of beam search, in percent, on every test split."""
    measure = bleu if task.label is None else accuracy
    return {f"{measure.__name__} {split}": measure(model, task, data, *data.tests[split]) for split in task.tests}


def accuracy(
    model: PreTrainedModel, task: Task, data: Data, rows: Sequence[Mapping[str, Any]], examples: Sequence[Example]
) -> float:
    """Percent of labels that are the likeliest."""
    right = 0
    for batch in in_order(examples, data.pad, model.device):
        right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return 100 * right / len(examples)


def bleu(
    model: PreTrainedModel, task: Task, data: Data, rows: Sequence[Mapping[str, Any]], examples: Sequence[Example]
) -> float:
    """Of beam search, against the targets as they are written."""
    slope, intercept = task.length
    outputs: list[list[str]] = []
    for batch in in_order(examples, data.pad, model.device):
        tokens = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            num_beams=task.beams,
            do_sample=False,
            max_new_tokens=int(slope * batch["input_ids"].shape[1]) + intercept,
        )
        outputs += [text.split() for text in data.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    return corpus_bleu(outputs, [row[task.texts[1]].split() for row in rows])


def in_order(examples: Sequence[Example], pad: int, device: torch.device) -> Iterator[Batch]:
    """Batches for evaluation."""
    for start in range(0, len(examples), EVALUATION_BATCH):
        (batch,) = on_device([collate(examples[start : start + EVALUATION_BATCH], pad)], device)
        yield batch

"""Examples of the recipes: from the Hub or a folder, to token ids, to batches."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sparse_heads.errors import UnsupportedError, invalid

if TYPE_CHECKING:
    from .recipes import Task, Training

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
IGNORED = -100
Example = dict[str, Any]  # token ids "input_ids", with "token_type_ids" where there are two texts, and "labels"


def load_split(task: Task, split: str, folder: Path | None) -> list[dict[str, Any]]:
    """The rows of a split with the task's columns; rows without a label are left out."""
    rows = _from_hub(task, split) if folder is None else _from_folder(folder, split)
    wanted = [*task.texts, *([task.label] if task.label else [])]
    found = []
    for number, row in enumerate(rows):
        row = row.get("translation", row)
        missing = [column for column in wanted if row.get(column) is None]
        if missing:
            raise invalid(
                "data", f"columns {', '.join(wanted)} in every row of {split}", f"row {number} without {missing}"
            )
        if task.label is None or int(row[task.label]) >= 0:
            found.append({column: row[column] for column in wanted})
    if not found:
        raise invalid("data", f"examples in the split {split}", "none")
    return found


def _from_hub(task: Task, split: str) -> Iterable[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UnsupportedError(
            f"data: wanted the package 'datasets' to load {'/'.join(task.dataset)}, got none installed "
            "(pip install datasets), or give a folder by --data"
        ) from error
    return load_dataset(*task.dataset, split=split)


def _from_folder(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    lines, table = folder / f"{split}.jsonl", folder / f"{split}.csv"
    if lines.is_file():
        with lines.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.strip())
    elif table.is_file():
        with table.open(encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file)
    else:
        raise invalid("data", f"a folder with {lines.name} or {table.name}", str(folder))


def own_tokenizer(task: Task, texts: Iterable[str], size: int) -> PreTrainedTokenizerBase:
    """Byte-pair pieces of whole words, `size` of them at most, learned from `texts`.

    Texts become [CLS] a [SEP] and [CLS] a [SEP] b [SEP]; those of a translation a [SEP].
    """
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL["unk_token"], end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL.values()), end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in SPECIAL.values()]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]" if task.label else "$A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=ids,
    )
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if task.label and len(task.texts) > 1 else [])]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **SPECIAL)


def encode(task: Task, rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Token ids of every row, cut to the task's longest."""
    first, *second = ([row[column] for row in rows] for column in task.texts)
    limits = {"truncation": True, "max_length": task.longest, "return_attention_mask": False}
    if task.label is None:
        sources, targets = (tokenizer(texts, **limits)["input_ids"] for texts in (first, *second))
        return [{"input_ids": source, "labels": target} for source, target in zip(sources, targets, strict=True)]
    columns = dict(tokenizer(first, *second, **limits))
    columns["labels"] = [int(row[task.label]) for row in rows]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def batches_of(
    examples: Sequence[Example], training: Training, pad: int, generator: random.Random | None
) -> list[dict[str, Tensor]]:
    """One epoch. With a generator in random order; batches that are packed by tokens have examples of like length."""
    order = list(range(len(examples)))
    if generator is not None:
        generator.shuffle(order)
    if not training.tokens:
        groups = [order[start : start + training.batch] for start in range(0, len(order), training.batch)]
    else:
        groups = _packed(sorted(order, key=lambda index: _width(examples[index])), examples, training.tokens)
        if generator is not None:
            generator.shuffle(groups)
    return [collate([examples[index] for index in group], pad) for group in groups]


def _packed(order: Sequence[int], examples: Sequence[Example], tokens: int) -> list[list[int]]:
    groups: list[list[int]] = [[]]
    for index in order:  # from the shortest, so the newest is the widest
        if groups[-1] and (len(groups[-1]) + 1) * _width(examples[index]) > tokens:
            groups.append([])
        groups[-1].append(index)
    return groups


def _width(example: Example) -> int:
    labels = example["labels"]
    return max(len(example["input_ids"]), len(labels) if isinstance(labels, list) else 0)


def collate(examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
    """int64 tensors `[B, T]`, padded on the right, as the model's forward takes them; labels `[B]` or `[B, T]`."""
    lengths = [len(example["input_ids"]) for example in examples]
    batch = {
        name: torch.tensor([example[name] + [fill] * (max(lengths) - len(example[name])) for example in examples])
        for name, fill in (("input_ids", pad), ("token_type_ids", 0))
        if name in examples[0]
    }
    batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    labels = [example["labels"] for example in examples]
    if isinstance(labels[0], list):
        longest = max(map(len, labels))
        batch["labels"] = torch.tensor([row + [IGNORED] * (longest - len(row)) for row in labels])
        batch["decoder_attention_mask"] = (batch["labels"] != IGNORED).long()
    else:
        batch["labels"] = torch.tensor(labels)
    return batch

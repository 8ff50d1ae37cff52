"""A tiny random sentence encoder on disk, as `--model` takes it, and text to give it."""

from __future__ import annotations

from pathlib import Path

from models import VOCABULARY, build
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]"]
WORDS = [f"word{number}" for number in range(VOCABULARY - len(SPECIAL))]


def save_encoder(folder: Path, name: str = "bert", **changes: object) -> Path:
    """Save the tiny model `name` and a tokenizer that splits at blanks; returns the folder."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.model_max_length = 40
    fast.save_pretrained(folder)
    build(name, **changes).save_pretrained(folder)
    return folder


def sentences(count: int) -> list[str]:
    """Different sentences of 3 to 10 known words."""
    return [
        " ".join(WORDS[(number + 7 * place * (1 + number // 50)) % len(WORDS)] for place in range(3 + number % 8))
        for number in range(count)
    ]

"""The texts of the sentence study: docstrings of the standard library by package, and the language reference.

Both come with the running interpreter, so that anyone has them; they differ a little between versions of Python,
and every cell records the version and a digest.
"""

from __future__ import annotations

import hashlib
import importlib
import random
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sparse_heads.demo.text import clean_sentences, sentences_by_module

SHARES = {"train": 0.6, "development": 0.15, "test": 0.25}
SPLIT_SEED = 20


@dataclass(frozen=True)
class Texts:
    """Sentences, each once in all splits together; `reference` is the other domain: prose of a manual."""

    train: list[str]
    development: list[str]
    test: list[str]
    reference: list[str]

    @property
    def facts(self) -> dict[str, object]:
        """Number of sentences and digest of every split."""
        return {name: {"sentences": len(part), "sha256": digest(part)} for name, part in vars(self).items()}


def load_texts() -> Texts:
    """Every sentence of both domains, in an order that only the version of Python decides."""
    splits = split_by_package(sentences_by_module(Path(sysconfig.get_path("stdlib"))))
    docstrings = {sentence.lower() for part in splits.values() for sentence in part}
    reference = [sentence for sentence in reference_sentences() if sentence.lower() not in docstrings]
    random.Random(SPLIT_SEED).shuffle(reference)
    return Texts(**splits, reference=reference)


def split_by_package(packages: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Give whole packages to the splits, in random order each to the split that lacks most; then shuffle the parts."""
    generator = random.Random(SPLIT_SEED)
    names = sorted(packages)
    generator.shuffle(names)
    splits: dict[str, list[str]] = {split: [] for split in SHARES}
    for name in names:
        emptiest = min(SHARES, key=lambda split: len(splits[split]) / SHARES[split])
        splits[emptiest].extend(packages[name])
    for part in splits.values():
        generator.shuffle(part)
    return splits


def reference_sentences() -> list[str]:
    """Sentences of the Python Language Reference, which `help()` shows from `pydoc_data`; each once."""
    topics = importlib.import_module("pydoc_data.topics").topics
    sentences = (sentence for topic in sorted(topics) for sentence in clean_sentences(topics[topic]))
    return list(dict.fromkeys(sentences))


def digest(sentences: Iterable[str]) -> str:
    """A short SHA-256 of the sentences in order."""
    return hashlib.sha256("\n".join(sentences).encode()).hexdigest()[:16]

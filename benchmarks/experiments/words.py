"""Word-level vocabularies and padded batches for the models that the studies train from scratch."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from sparse_heads.errors import invalid

SPECIAL = ("<pad>", "<start>", "<end>")
PAD, START, END = range(3)
Example = TypeVar("Example", bound=Hashable)


class Vocabulary:
    """Ids of words: the special ones first, then the given ones in their order."""

    def __init__(self, words: Iterable[str]) -> None:
        self.words = (*SPECIAL, *dict.fromkeys(words))
        self._ids = {word: index for index, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def ids(self, words: Sequence[str]) -> list[int]:
        """The id of every word; an InvalidArgumentError names one that is unknown."""
        unknown = [word for word in words if word not in self._ids]
        if unknown:
            raise invalid("words", "words of the vocabulary", unknown[0])
        return [self._ids[word] for word in words]

    def read(self, ids: Iterable[int]) -> list[str]:
        """The words up to the first <end>, without special ones."""
        words = []
        for index in ids:
            if index == END:
                break
            if index >= len(SPECIAL):
                words.append(self.words[index])
        return words


def padded(rows: Sequence[Sequence[int]], fill: int = PAD) -> Tensor:
    """int64 `[B, T]`, T that of the longest row, filled on the right."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])


def different(examples: Iterable[Example], count: int) -> list[Example]:
    """The first `count` examples that differ from all before them."""
    examples = iter(examples)
    found: dict[Example, None] = {}
    while len(found) < count:
        found[next(examples)] = None
    return list(found)


def in_batches(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    """Lists of `size` examples, the last one shorter."""
    examples = iter(examples)
    while batch := list(islice(examples, size)):
        yield batch

"""Corpus BLEU of word lists, as `fairseq-generate` computes it: up to four words, no smoothing, no tokenisation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

ORDER = 4


def corpus_bleu(outputs: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> float:
    """BLEU in percent of `outputs` against one reference each."""
    matched, total = [0] * ORDER, [0] * ORDER
    for output, reference in zip(outputs, references, strict=True):
        for order in range(ORDER):
            found, known = _ngrams(output, order + 1), _ngrams(reference, order + 1)
            matched[order] += sum((found & known).values())
            total[order] += sum(found.values())
    if not all(matched):
        return 0.0
    length, wanted = sum(map(len, outputs)), sum(map(len, references))
    precision = sum(math.log(hits / count) for hits, count in zip(matched, total, strict=True)) / ORDER
    return 100.0 * math.exp(min(0.0, 1.0 - wanted / length) + precision)


def _ngrams(words: Sequence[str], order: int) -> Counter:
    return Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))

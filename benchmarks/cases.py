"""What the CPU suite times, as data."""

from __future__ import annotations

from dataclasses import dataclass

NUM_HEADS = 12
HIDDEN_SIZES = (384, 768)
SHAPES = ((1, 1), (1, 16), (1, 128), (8, 128), (4, 512), (1, 2048))  # (batch, tokens)

# Scattered on purpose: neighbours, gaps and both ends, so that no way of reading the kept rows is favoured.
KEPT_HEADS = {
    12: tuple(range(12)),
    9: (0, 1, 3, 4, 6, 7, 8, 10, 11),
    6: (0, 2, 3, 6, 9, 10),
    3: (1, 6, 10),
    1: (7,),
}
# Half of all heads spread unevenly over six layers, as scores leave them.
UNEVEN_HALF = (9, 6, 3, 9, 6, 3)
# The batches that the demo times, in word pieces per sentence: its held-out docstring sentences of Python 3.11, sorted
# by length and cut into batches of 32, at 1/6, 1/2 and 5/6.
MEDIAN_SENTENCES = (18,) * 14 + (19,) * 12 + (20,) * 6
SENTENCE_BATCHES = (
    (12,) * 6 + (13,) * 26,
    MEDIAN_SENTENCES,
    (28,) + (29,) * 8 + (30,) * 8 + (31,) * 7 + (32,) * 2 + (33,) * 6,
)


@dataclass(frozen=True)
class Case:
    """One input and one subset: `lengths` tokens per request, padded to the longest; `kept` heads per layer."""

    level: str  # "block": one attention module; "model": every layer, with embeddings and feed-forward
    hidden: int
    lengths: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]
    label: str = ""

    @property
    def batch(self) -> int:
        """Number of requests."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens per request after padding."""
        return max(self.lengths)

    @property
    def kept_count(self) -> int:
        """Heads that run, over all layers."""
        return sum(len(heads) for heads in self.kept)

    @property
    def name(self) -> str:
        """Unique within a suite, for example `block-E384-1x16-6of12`."""
        label = f"-{self.label}" if self.label else ""
        heads = f"{self.kept_count}of{NUM_HEADS * len(self.kept)}"
        return f"{self.level}-E{self.hidden}-{self.batch}x{self.tokens}{label}-{heads}"


def rotated(count: int, layer: int) -> tuple[int, ...]:
    """The list of `count` kept heads, shifted by `layer` so that layers keep different heads."""
    return tuple(sorted((head + layer) % NUM_HEADS for head in KEPT_HEADS[count]))


def model_case(hidden: int, lengths: tuple[int, ...], counts: tuple[int, ...], label: str = "") -> Case:
    """A whole-model case that keeps `counts[i]` heads in layer `i`."""
    return Case("model", hidden, lengths, tuple(rotated(count, layer) for layer, count in enumerate(counts)), label)


BLOCK = tuple(
    Case("block", hidden, (tokens,) * batch, (KEPT_HEADS[count],))
    for hidden in HIDDEN_SIZES
    for batch, tokens in SHAPES
    for count in KEPT_HEADS
)
MODEL = (
    *(model_case(384, MEDIAN_SENTENCES, (count,) * 6, "demo") for count in (12, 3)),
    *(model_case(384, lengths, (6,) * 6, "demo") for lengths in SENTENCE_BATCHES),
    model_case(384, MEDIAN_SENTENCES, UNEVEN_HALF, "demo-uneven"),
    *(model_case(384, (tokens,) * batch, (6,) * 6) for batch, tokens in SHAPES[:4]),
    *(model_case(768, (tokens,) * batch, (6,) * 6) for batch, tokens in SHAPES[1:3]),
)
# Every shape and count for the whole model; the long ones take more than an hour.
GRID = tuple(
    model_case(hidden, (tokens,) * batch, (count,) * 6)
    for hidden in HIDDEN_SIZES
    for batch, tokens in SHAPES
    for count in KEPT_HEADS
)
SUITES = {
    "block": BLOCK,
    "model": MODEL,
    "cpu": BLOCK + MODEL,
    "model-grid-short": tuple(case for case in GRID if case.batch * case.tokens <= 128),
    "model-grid-long": tuple(case for case in GRID if case.batch * case.tokens > 128),
}

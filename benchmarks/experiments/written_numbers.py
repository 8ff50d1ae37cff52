"""Pairs of a number or a date in written English and German, cut into the pieces that the words are built of."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta

from sparse_heads.errors import invalid

from . import number_words as spelled

SPLITS = ("train", "development", "test")
TO_ENGLISH, TO_GERMAN = "to english", "to german"
_ALWAYS_TRAINED = 100  # numbers below are in training, so that no piece is new elsewhere
_ENGLISH = [
    *spelled.EN_SMALL,
    *spelled.EN_TENS,
    *spelled.EN_ORDINALS,
    *spelled.EN_MONTHS,
    *"twentieth thirtieth hundred thousand oh the of -".split(),
]
_GERMAN = [
    *spelled.DE_SMALL,
    *spelled.DE_TENS,
    *spelled.DE_IRREGULAR.values(),
    *spelled.DE_MONTHS,
    *"eins hundert tausend und te ste der".split(),
]
# The longest piece that fits comes first: "siebzehn" before "sieben", "achte" before "acht".
_PIECE = re.compile("|".join(sorted(map(re.escape, {*_ENGLISH, *_GERMAN}), key=len, reverse=True)))


def all_pieces() -> list[str]:
    """Every piece: at the start of a word, and (with ## before it) within one; and the directions."""
    plain = dict.fromkeys([*_ENGLISH, *_GERMAN])
    return [TO_ENGLISH, TO_GERMAN, *plain, *(f"##{piece}" for piece in plain)]


def cut(text: str) -> list[str]:
    """ "einundzwanzig Mai" to ein, ##und, ##zwanzig, Mai; an InvalidArgumentError where no piece fits."""
    pieces = []
    for word in text.split():
        found = _PIECE.findall(word)
        if "".join(found) != word:
            raise invalid("text", "numbers and dates as they are written", word)
        pieces += [found[0], *(f"##{piece}" for piece in found[1:])]
    return pieces


def joined(pieces: list[str]) -> str:
    """The text again."""
    return " ".join(pieces).replace(" ##", "")


@dataclass(frozen=True)
class Pair:
    """A translation: the pieces of the source, the direction before them, and those of the target."""

    source: tuple[str, ...]
    target: tuple[str, ...]


def pairs(split: str, seed: int) -> Iterator[Pair]:
    """Pairs of a split without end: three numbers to two dates, in either direction."""
    generator = random.Random(f"{seed} {split}")
    while True:
        english, german = _number(generator, split) if generator.random() < 0.6 else _date(generator, split)
        if generator.random() < 0.5:
            yield Pair((TO_GERMAN, *cut(english)), tuple(cut(german)))
        else:
            yield Pair((TO_ENGLISH, *cut(german)), tuple(cut(english)))


def split_of(value: int | date) -> str:
    """The split that a number or a date belongs to, in both directions: a tenth to each of the held-out ones."""
    if isinstance(value, int) and value < _ALWAYS_TRAINED:
        return "train"
    place = hashlib.blake2b(str(value).encode(), digest_size=4).digest()
    return {0: "development", 1: "test"}.get(int.from_bytes(place, "big") % 10, "train")


def _number(generator: random.Random, split: str) -> tuple[str, str]:
    while True:
        digits = generator.randint(1, len(str(spelled.LARGEST)))
        number = generator.randrange(10**digits)
        if split_of(number) == split:
            return spelled.english_number(number), spelled.german_number(number)


def _date(generator: random.Random, split: str) -> tuple[str, str]:
    first, last = date(spelled.FIRST_YEAR, 1, 1), date(spelled.LAST_YEAR, 12, 31)
    while True:
        day = first + timedelta(days=generator.randint(0, (last - first).days))
        if split_of(day) == split:
            return spelled.english_date(day), spelled.german_date(day)

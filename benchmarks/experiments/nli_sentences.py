"""Pairs of English sentences with exact labels: quantifiers, negation, and words that imply or exclude each other.

A quantifier reaches over the verb's negation: "all dogs do not run" says it of all dogs.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import cycle, product

from .nli_semantics import QUANTIFIERS, Meaning, Sentence, label

# Of every family the most general word, then {a narrower one: still narrower ones}.
NOUNS = {
    "animals": {"dogs": ("poodles", "beagles"), "birds": ()},
    "people": {"artists": ("painters", "sculptors"), "doctors": ()},
    "vehicles": {"boats": ("canoes", "ferries"), "cars": ()},
    "plants": {"trees": ("oaks", "birches"), "flowers": ()},
    "instruments": {"horns": ("trumpets", "tubas"), "drums": ()},
}
VERBS = {
    "move": {"run": ("sprint", "jog"), "swim": ()},
    "communicate": {"speak": ("whisper", "mumble"), "write": ()},
    "consume": {"eat": ("nibble", "munch"), "drink": ()},
    "rest": {"sleep": ("doze", "nap"), "sit": ()},
    "emote": {"laugh": ("giggle", "chuckle"), "cry": ()},
}
ADJECTIVES = ("small", "old", "red", "happy", "clean", "strange")
ADVERBS = ("quickly", "often", "quietly", "well", "today", "alone")
NOT = ("do", "not")
SPLITS = ("train", "development", "test")


def _words(families: dict) -> list[list[str]]:
    return [
        [root, *(word for middle, leaves in narrower.items() for word in (middle, *leaves))]
        for root, narrower in families.items()
    ]


def _implied(families: dict) -> dict[str, frozenset[str]]:
    implied: dict[str, frozenset[str]] = {}
    for root, narrower in families.items():
        implied[root] = frozenset()
        for middle, leaves in narrower.items():
            implied[middle] = frozenset({root})
            implied |= {leaf: frozenset({middle, root}) for leaf in leaves}
    return implied


NOUN_FAMILIES, VERB_FAMILIES = _words(NOUNS), _words(VERBS)
IMPLIED = _implied(NOUNS) | _implied(VERBS) | {word: frozenset() for word in ADJECTIVES + ADVERBS}
_NOUNS = frozenset(word for family in NOUN_FAMILIES for word in family)


@cache
def excludes(one: str, other: str) -> bool:
    """Two nouns of which neither implies the other: no poodles are beagles, no dogs birds."""
    nouns = one in _NOUNS and other in _NOUNS
    return nouns and one != other and one not in IMPLIED[other] and other not in IMPLIED[one]


MEANING = Meaning(IMPLIED, excludes)


def spell(sentence: Sentence) -> list[str]:
    """The words: "not all small dogs do not run quickly". Subject and predicate have their head word first."""
    noun, *adjective = sentence.subject
    verb, *adverb = sentence.predicate
    return [*sentence.quantifier.split(), *adjective, noun, *(NOT if sentence.negated else ()), verb, *adverb]


def all_words() -> list[str]:
    """Every word that a sentence may have."""
    heads = [word for family in (*NOUN_FAMILIES, *VERB_FAMILIES) for word in family]
    return [*dict.fromkeys([*" ".join(QUANTIFIERS).split(), *NOT]), *ADJECTIVES, *ADVERBS, *heads]


def topics(split: str) -> list[tuple[int, int]]:
    """The (noun family, verb family) that sentences of a split are about; no two splits share one.

    Every word is met in training, beside three fifths of the words of the other kind.
    """
    pairs = product(range(len(NOUN_FAMILIES)), range(len(VERB_FAMILIES)))
    place = {0: "development", 2: "test"}
    return [pair for pair in pairs if place.get(sum(pair) % len(VERB_FAMILIES), "train") == split]


@dataclass(frozen=True)
class Pair:
    premise: tuple[str, ...]
    hypothesis: tuple[str, ...]
    label: int


def pairs(split: str, seed: int) -> Iterator[Pair]:
    """Pairs of a split without end; labels take turns within every form (quantifier and negation) of hypothesis."""
    generator = random.Random(f"{seed} {split}")
    of_split = topics(split)
    waiting: dict[tuple, deque[Pair]] = {
        turn: deque(maxlen=8) for turn in product(QUANTIFIERS, (False, True), range(3))
    }
    for turn in cycle(waiting):
        while not waiting[turn]:
            premise, hypothesis = _drawn(generator, *generator.choice(of_split))
            found = label(premise, hypothesis, MEANING)
            if hypothesis != premise:
                pair = Pair(tuple(spell(premise)), tuple(spell(hypothesis)), found)
                waiting[hypothesis.quantifier, hypothesis.negated, found].append(pair)
        yield waiting[turn].popleft()


def _drawn(generator: random.Random, noun_family: int, verb_family: int) -> tuple[Sentence, Sentence]:
    """A premise, and a hypothesis that changes some of it."""
    nouns, verbs = NOUN_FAMILIES[noun_family], VERB_FAMILIES[verb_family]
    subject, predicate = _phrase(generator, nouns, ADJECTIVES), _phrase(generator, verbs, ADVERBS)
    premise = Sentence(generator.choice(QUANTIFIERS), subject, predicate, generator.random() < 0.3)
    subject = _changed(generator, subject, nouns, ADJECTIVES)
    predicate = _changed(generator, predicate, verbs, ADVERBS)
    quantifier = generator.choice(QUANTIFIERS) if generator.random() < 0.7 else premise.quantifier
    return premise, Sentence(quantifier, subject, predicate, premise.negated != (generator.random() < 0.3))


def _phrase(generator: random.Random, heads: list[str], modifiers: tuple[str, ...]) -> tuple[str, ...]:
    head = generator.choice(heads)
    return (head, generator.choice(modifiers)) if generator.random() < 0.3 else (head,)


def _changed(
    generator: random.Random, phrase: tuple[str, ...], heads: list[str], modifiers: tuple[str, ...]
) -> tuple[str, ...]:
    """The phrase, often with another head word, less often with its modifier added, dropped or replaced."""
    head, *modifier = phrase
    if generator.random() < 0.5:
        head = generator.choice(heads)
    if generator.random() < 0.3:
        modifier = [] if modifier and generator.random() < 0.7 else [generator.choice(modifiers)]
    return (head, *modifier)

"""Are the data of the studies that train from scratch right: labels, words, splits, and what a study hands out?"""

from __future__ import annotations

import re
from collections import Counter
from datetime import date
from itertools import combinations, islice, product

import pytest
import torch

import sparse_heads as sh
from benchmarks.experiments import base_models, dates, nli, nli_sentences, written_numbers
from benchmarks.experiments import number_words as spelled
from benchmarks.experiments.nli_semantics import CONTRADICTION, ENTAILMENT, LABELS, NEUTRAL, QUANTIFIERS
from benchmarks.experiments.words import different

# ---- sentences ----


def parse(words):
    """(quantifier, words of the subject, words of the predicate, negated) of an English sentence."""
    text = " ".join(words)
    match = re.fullmatch(r"(not all|all|some|no) (.*)", text)
    quantifier, rest = match.groups()
    nouns = {noun for family in nli_sentences.NOUN_FAMILIES for noun in family}
    rest = rest.split()
    end = next(place for place, word in enumerate(rest) if word in nouns) + 1
    subject, predicate = rest[:end], rest[end:]
    negated = predicate[:2] == ["do", "not"]
    return quantifier, set(subject), set(predicate[2:] if negated else predicate), negated


def chain(word, families):
    """The word and all that are more general."""
    for root, narrower in families.items():
        if word == root:
            return {root}
        for middle, leaves in narrower.items():
            if word == middle:
                return {root, middle}
            if word in leaves:
                return {root, middle, word}
    return set()


def worlds(first, second):
    """Individuals that the words of two parsed sentences can tell apart, as sets of words."""
    nouns = [word for word in sorted(first[1] | second[1]) if chain(word, nli_sentences.NOUNS)]
    others = [word for word in sorted(first[1] | second[1] | first[2] | second[2]) if word not in nouns]
    for noun in [None, *nouns]:  # an individual is of one sort, and of all that are more general
        sort = chain(noun, nli_sentences.NOUNS) if noun else set()
        for held in product((False, True), repeat=len(others)):
            chosen = {word for word, holds in zip(others, held, strict=True) if holds}
            yield sort | chosen | {general for word in chosen for general in chain(word, nli_sentences.VERBS)}


def holds(sentence, individuals):
    quantifier, subject, predicate, negated = sentence
    inside = [individual for individual in individuals if subject <= individual]
    does = [(predicate <= individual) != negated for individual in inside]
    return {"all": all(does), "some": any(does), "no": not any(does), "not all": not all(does)}[quantifier]


def label_by_search(premise, hypothesis):
    """By trying all models of at most four individuals: two witnesses, and one of either subject."""
    first, second = parse(premise), parse(hypothesis)
    parts = (first[1], first[2], second[1], second[2])
    distinct = {tuple(part <= each for part in parts): each for each in worlds(first, second)}.values()
    seen = set()
    for size in range(1, 5):
        for model in combinations(distinct, size):
            exist = all(any(sentence[1] <= each for each in model) for sentence in (first, second))
            if exist and holds(first, model):
                seen.add(holds(second, model))
    return {(True,): ENTAILMENT, (False,): CONTRADICTION}.get(tuple(seen), NEUTRAL)


@pytest.mark.parametrize("split", nli_sentences.SPLITS)
def test_labels_are_those_of_a_search_through_small_models(split):
    for pair in islice(nli_sentences.pairs(split, 3), 72):
        assert pair.label == label_by_search(pair.premise, pair.hypothesis), pair


@pytest.mark.parametrize(
    "premise, hypothesis, wanted",
    [
        ("all dogs run", "all poodles move", "entailment"),
        ("all dogs run", "some animals run", "entailment"),
        ("all dogs run", "all animals run", "neutral"),
        ("all dogs run", "no poodles run", "contradiction"),
        ("all dogs run quickly", "not all small dogs do not run", "entailment"),
        ("no dogs run", "no poodles run quickly", "entailment"),
        ("no dogs run", "some dogs sprint", "contradiction"),
        ("no dogs sprint", "no dogs run", "neutral"),
        ("some poodles sprint", "some dogs run", "entailment"),
        ("some dogs run", "some dogs do not run", "neutral"),
        ("not all dogs run", "some dogs do not run", "entailment"),
        ("not all dogs run", "all animals run", "contradiction"),
        ("some poodles run", "some beagles run", "neutral"),
    ],
)
def test_labels_by_hand(premise, hypothesis, wanted):
    def sentence(text):
        quantifier, subject, predicate, negated = parse(text.split())
        return nli.nli_sentences.Sentence(quantifier, tuple(subject), tuple(predicate), negated)

    found = nli_sentences.label(sentence(premise), sentence(hypothesis), nli_sentences.MEANING)
    assert LABELS[found] == wanted
    assert label_by_search(premise.split(), hypothesis.split()) == found


def test_labels_are_balanced_in_every_form_of_hypothesis():
    pairs = list(islice(nli_sentences.pairs("train", 0), 24 * 20))
    forms = Counter((parse(pair.hypothesis)[0], parse(pair.hypothesis)[3], pair.label) for pair in pairs)
    assert set(forms.values()) == {20}
    assert len(forms) == len(QUANTIFIERS) * 2 * len(LABELS)
    assert all(pair.premise != pair.hypothesis for pair in pairs)


def test_no_sentence_is_in_two_splits_and_every_word_is_in_training():
    sentences = {}
    for split in nli_sentences.SPLITS:
        pairs = list(islice(nli_sentences.pairs(split, 1), 800))
        sentences[split] = {each for pair in pairs for each in (pair.premise, pair.hypothesis)}
    for one, other in combinations(sentences.values(), 2):
        assert not one & other
    topics = [pair for split in nli_sentences.SPLITS for pair in nli_sentences.topics(split)]
    assert len(topics) == len(set(topics)) == len(nli_sentences.NOUN_FAMILIES) * len(nli_sentences.VERB_FAMILIES)
    assert {word for each in sentences["train"] for word in each} == set(nli_sentences.all_words())


def test_sentences_are_the_same_again_and_others_with_another_seed():
    first, again, other = (list(islice(nli_sentences.pairs("train", seed), 30)) for seed in (5, 5, 6))
    assert first == again != other


# ---- numbers and dates ----

GERMAN = {
    0: "null",
    1: "eins",
    16: "sechzehn",
    17: "siebzehn",
    21: "einundzwanzig",
    30: "dreißig",
    66: "sechsundsechzig",
    77: "siebenundsiebzig",
    100: "einhundert",
    101: "einhunderteins",
    212: "zweihundertzwölf",
    1_000: "eintausend",
    1_001: "eintausendeins",
    1_100: "eintausendeinhundert",
    21_000: "einundzwanzigtausend",
    101_000: "einhunderteintausend",
    101_101: "einhunderteintausendeinhunderteins",
    999_999: "neunhundertneunundneunzigtausendneunhundertneunundneunzig",
}
ENGLISH = {
    0: "zero",
    13: "thirteen",
    40: "forty",
    100: "one hundred",
    342: "three hundred forty-two",
    1_000: "one thousand",
    70_015: "seventy thousand fifteen",
    999_999: "nine hundred ninety-nine thousand nine hundred ninety-nine",
}
DATES = {
    date(1984, 5, 21): (
        "the twenty-first of May nineteen eighty-four",
        "der einundzwanzigste Mai neunzehnhundertvierundachtzig",
    ),
    date(1900, 1, 1): ("the first of January nineteen hundred", "der erste Januar neunzehnhundert"),
    date(1701, 8, 7): ("the seventh of August seventeen oh one", "der siebte August siebzehnhunderteins"),
    date(1616, 3, 8): ("the eighth of March sixteen sixteen", "der achte März sechzehnhundertsechzehn"),
    date(2000, 2, 29): ("the twenty-ninth of February two thousand", "der neunundzwanzigste Februar zweitausend"),
    date(2001, 12, 3): ("the third of December two thousand one", "der dritte Dezember zweitausendeins"),
    date(2017, 10, 30): ("the thirtieth of October twenty seventeen", "der dreißigste Oktober zweitausendsiebzehn"),
    date(2099, 6, 12): ("the twelfth of June twenty ninety-nine", "der zwölfte Juni zweitausendneunundneunzig"),
    date(1820, 7, 2): ("the second of July eighteen twenty", "der zweite Juli achtzehnhundertzwanzig"),
}


def test_numbers_by_hand():
    for number, text in GERMAN.items():
        assert spelled.german_number(number) == text
    for number, text in ENGLISH.items():
        assert spelled.english_number(number) == text


def test_dates_by_hand():
    for day, texts in DATES.items():
        assert (spelled.english_date(day), spelled.german_date(day)) == texts


@pytest.mark.parametrize("number", [-1, 1_000_000])
def test_numbers_out_of_range(number):
    for write in (spelled.german_number, spelled.english_number):
        with pytest.raises(sh.errors.InvalidArgumentError, match="number: wanted 0 to 999999"):
            write(number)


def read_german(text):
    """The value of a German number, read from the left: an independent inverse."""
    units = {word: value for value, word in enumerate("null ein zwei drei vier fünf sechs sieben acht neun".split())}
    units |= {"eins": 1, "zehn": 10, "elf": 11, "zwölf": 12, "sechzehn": 16, "siebzehn": 17}
    units |= {f"{word}zehn": units[word] + 10 for word in ("drei", "vier", "fünf", "acht", "neun")}
    tens = {"zwanzig": 20, "dreißig": 30, "vierzig": 40, "fünfzig": 50, "sechzig": 60}
    tens |= {"siebzig": 70, "achtzig": 80, "neunzig": 90}
    thousands, found, rest = text.rpartition("tausend")
    if found:
        return 1000 * read_german(thousands) + (read_german(rest) if rest else 0)
    hundreds, found, rest = text.rpartition("hundert")
    if found:
        return 100 * units[hundreds] + (read_german(rest) if rest else 0)
    unit, found, ten = text.rpartition("und")
    if found:
        return units[unit] + tens[ten]
    return tens[text] if text in tens else units[text]


def read_english(text):
    units = {word: value for value, word in enumerate(spelled.EN_SMALL)}
    units |= {word: 20 + 10 * place for place, word in enumerate(spelled.EN_TENS)}
    total = part = 0
    for word in text.replace("-", " ").split():
        if word == "thousand":
            total, part = 1000 * part, 0
        else:
            part = 100 * part if word == "hundred" else part + units[word]
    return total + part


def test_numbers_read_back():
    for number in [*range(2_000), *range(2_000, 1_000_000, 997)]:
        assert read_german(spelled.german_number(number)) == number
        assert read_english(spelled.english_number(number)) == number


def test_pieces_join_to_the_text_and_are_in_the_vocabulary():
    for split in written_numbers.SPLITS:
        for pair in islice(written_numbers.pairs(split, 2), 500):
            direction, *source = pair.source
            for pieces in (source, pair.target):
                assert written_numbers.cut(written_numbers.joined(list(pieces))) == list(pieces)
                ids = dates.VOCABULARY.ids(pieces)
                assert dates.VOCABULARY.read(ids) == list(pieces)
            assert direction in (written_numbers.TO_ENGLISH, written_numbers.TO_GERMAN)
            assert len(pair.target) < dates.LONGEST
    assert written_numbers.cut("einundzwanzigste Mai") == ["ein", "##und", "##zwanzig", "##ste", "Mai"]
    with pytest.raises(sh.errors.InvalidArgumentError, match="text: wanted numbers.*got 'zwoelf'|got zwoelf"):
        written_numbers.cut("zwoelf")


def test_no_number_or_date_is_in_two_splits_in_either_direction():
    seen = {}
    for split in written_numbers.SPLITS:
        pairs = islice(written_numbers.pairs(split, 4), 1500)
        seen[split] = {frozenset((pair.source[1:], pair.target)) for pair in pairs}
    for one, other in combinations(seen.values(), 2):
        assert not one & other
    shares = Counter(written_numbers.split_of(number) for number in range(100, 20_000))
    assert shares["train"] / shares.total() == pytest.approx(0.8, abs=0.02)
    assert {written_numbers.split_of(number) for number in range(100)} == {"train"}


# ---- what a study hands to the runner ----


@pytest.mark.parametrize("study", [nli, dates], ids=["nli", "dates"])
def test_a_smoke_context(study, tmp_path, monkeypatch):
    monkeypatch.setattr(base_models, "cache_directory", lambda: tmp_path)
    context = study.STUDY.prepare(0, True)
    values = study.STUDY.primary, study.STUDY.claim
    metrics = context.evaluate(context.model, context.development)
    assert values[0] in metrics
    examples = sum(len(batch["labels"]) for batch in context.development)
    assert {len(metric) for metric in metrics.values()} == {examples}
    before = {path: tensor.clone() for path, tensor in context.model.state_dict().items()}
    again = study.STUDY.prepare(1, True)
    for path, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, before[path]), "the model of the second call comes from the cache"
    assert len(list((tmp_path / "experiments").iterdir())) == 1
    for name, one in again.development[0].items():
        assert torch.equal(one, context.development[0][name])
    assert not torch.equal(again.train[0]["input_ids"][:, :3], context.train[0]["input_ids"][:, :3])
    loss = context.loss(context.model, context.train[0])
    assert loss.shape == () and loss.isfinite()
    handle = sh.attach(context.model)
    assert handle.layers.num_heads == {"nli": 32, "dates": 36}[study.STUDY.name]
    with handle.use_heads(torch.rand(len(handle.layers), handle.layers.max_heads) < 0.25):
        fewer = context.evaluate(context.model, context.development)
    assert fewer["log-probability"] != metrics["log-probability"]
    handle.detach()


def test_greedy_decoding_is_judged_by_whole_targets():
    """A model that always says one target is right where that is the target, and nowhere else."""
    pairs = different(written_numbers.pairs("development", 0), 40)
    batch = dates.as_batch(pairs)
    wanted = batch["labels"][7].clamp(min=0)

    class Parrot:
        def __call__(self, **batch):
            return type("Output", (), {"logits": torch.zeros(*batch["labels"].shape, len(dates.VOCABULARY))})

        def generate(self, input_ids, **_options):
            return torch.cat([torch.tensor([dates.START]), wanted]).expand(len(input_ids), -1)

    right = dates.exact_match(Parrot(), [batch])["exact match"]
    assert right == [float(pair.target == pairs[7].target) for pair in pairs]

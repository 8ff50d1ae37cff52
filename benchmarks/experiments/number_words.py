"""Numbers from 0 to 999,999 and dates from 1600 to 2099 in written English and German."""

from __future__ import annotations

from datetime import date

from sparse_heads.errors import invalid

LARGEST, FIRST_YEAR, LAST_YEAR = 999_999, 1600, 2099

EN_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
EN_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
EN_ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth"
).split()
EN_MONTHS = "January February March April May June July August September October November December".split()

DE_SMALL = (
    "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn "
    "achtzehn neunzehn"
).split()
DE_TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
DE_IRREGULAR = {1: "erste", 3: "dritte", 7: "siebte", 8: "achte"}
DE_MONTHS = "Januar Februar März April Mai Juni Juli August September Oktober November Dezember".split()


def english_number(number: int) -> str:
    """ "nine hundred five thousand twenty-one"."""
    _check("number", number, 0, LARGEST)
    thousands, rest = divmod(number, 1000)
    words = [*_english_hundreds(thousands), "thousand"] if thousands else []
    return " ".join([*words, *_english_hundreds(rest)] if rest or not words else words)


def _english_hundreds(number: int) -> list[str]:
    hundreds, rest = divmod(number, 100)
    words = [EN_SMALL[hundreds], "hundred"] if hundreds else []
    return [*words, _english_tens(rest)] if rest or not hundreds else words


def _english_tens(number: int) -> str:
    if number < 20:
        return EN_SMALL[number]
    tens, unit = divmod(number, 10)
    return EN_TENS[tens - 2] + (f"-{EN_SMALL[unit]}" if unit else "")


def german_number(number: int) -> str:
    """ "neunhundertfünftausendeinundzwanzig"; a one at the end is "eins"."""
    _check("number", number, 0, LARGEST)
    thousands, rest = divmod(number, 1000)
    words = f"{_german_hundreds(thousands)}tausend" if thousands else ""
    words += _german_hundreds(rest) if rest or not thousands else ""
    return words + ("s" if rest % 100 == 1 else "")


def _german_hundreds(number: int) -> str:
    hundreds, rest = divmod(number, 100)
    words = f"{DE_SMALL[hundreds]}hundert" if hundreds else ""
    return words + (_german_tens(rest) if rest or not hundreds else "")


def _german_tens(number: int) -> str:
    if number < 20:
        return DE_SMALL[number]
    tens, unit = divmod(number, 10)
    return (f"{DE_SMALL[unit]}und" if unit else "") + DE_TENS[tens - 2]


def english_date(day: date) -> str:
    """ "the twenty-first of May nineteen eighty-four"."""
    return f"the {_english_ordinal(day.day)} of {EN_MONTHS[day.month - 1]} {english_year(day.year)}"


def _english_ordinal(number: int) -> str:
    if number < 20:
        return EN_ORDINALS[number - 1]
    tens, unit = divmod(number, 10)
    return f"{EN_TENS[tens - 2]}-{EN_ORDINALS[unit - 1]}" if unit else EN_TENS[tens - 2][:-1] + "ieth"


def english_year(year: int) -> str:
    """ "nineteen eighty-four", "nineteen hundred", "nineteen oh five", "two thousand one", "twenty ten"."""
    _check("year", year, FIRST_YEAR, LAST_YEAR)
    century, rest = divmod(year, 100)
    if century == 20 and rest < 10:
        return english_number(year)
    ending = "hundred" if rest == 0 else f"oh {EN_SMALL[rest]}" if rest < 10 else _english_tens(rest)
    return f"{_english_tens(century)} {ending}"


def german_date(day: date) -> str:
    """ "der einundzwanzigste Mai neunzehnhundertvierundachtzig"."""
    return f"der {_german_ordinal(day.day)} {DE_MONTHS[day.month - 1]} {german_year(day.year)}"


def _german_ordinal(number: int) -> str:
    return DE_IRREGULAR.get(number) or _german_tens(number) + ("te" if number < 20 else "ste")


def german_year(year: int) -> str:
    """ "neunzehnhundertvierundachtzig" before 2000, "zweitausendzehn" after."""
    _check("year", year, FIRST_YEAR, LAST_YEAR)
    if year >= 2000:
        return german_number(year)
    century, rest = divmod(year, 100)
    return f"{DE_SMALL[century]}hundert" + (german_number(rest) if rest else "")


def _check(argument: str, value: int, smallest: int, largest: int) -> None:
    if not smallest <= value <= largest:
        raise invalid(argument, f"{smallest} to {largest}", value)

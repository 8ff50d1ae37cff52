"""The demo's sentences: what counts as English, where they come from, and that the two halves stay apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_heads.demo import text

LONG = "This is the first sentence of a docstring in the module."


@pytest.mark.parametrize(
    "sentence",
    [
        "Return the number of items that are in the queue.",
        "If the file cannot be opened, what happens to it?",
        "Subclasses that don't override it, e.g. because they can't, get an error.",
    ],
)
def test_sentences_that_are_english(sentence: str):
    assert text.is_english(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "Too short a one.",
        "return the number of items that are in the queue.",
        "Return the number of items that are in the queue",
        "Get x_1 y_2 z_3 from a_b c_d of the e_f.",
        "Words without grammar make lists, nothing else here whatsoever.",
        " ".join(["The word is in the list of words"] * 6) + ".",
    ],
)
def test_sentences_that_are_not(sentence: str):
    assert not text.is_english(sentence)


def test_code_lists_and_signatures_are_left_out():
    docstring = f"""{LONG} And this
    is the second of them, on two lines.

    >>> This is an example that looks like a sentence of code.

    - This is an item of a list that is not taken from it.

    open(file) -> This is the signature that is in the text of it.
    """
    assert list(text.clean_sentences(docstring)) == [LONG, "And this is the second of them, on two lines."]


def write_modules(root: Path, modules: dict[str, list[str]]) -> None:
    for name, sentences in modules.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        functions = [f'def function{i}():\n    """{sentence}"""\n' for i, sentence in enumerate(sentences)]
        path.write_text("\n".join(functions), encoding="utf-8")


def test_modules_are_read_in_order_and_every_sentence_once(tmp_path: Path):
    inner = "This one is in a module of the package, and not above."
    write_modules(tmp_path, {"b.py": [LONG], "package/__init__.py": [LONG.title(), inner], "test/a.py": [LONG]})
    method = "This is the text of a method, it is read."
    (tmp_path / "a.py").write_text(f'class A:\n    def method(self):\n        """{method}"""')
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "latin.py").write_bytes(b'"""This is \xe9 byte that is no valid text in the file."""')
    modules = text.sentences_by_module(tmp_path)
    assert modules == {"a": [method], "b": [LONG], "package": [inner]}


def test_no_module_is_on_both_sides():
    modules = {f"module{m}": [f"sentence {s} of {m}" for s in range(1 + m % 7)] for m in range(40)}
    calibration, held_out = text.split_by_module(modules, seed=3)
    assert sorted(calibration + held_out) == sorted(line for lines in modules.values() for line in lines)
    assert not {line.split()[-1] for line in calibration} & {line.split()[-1] for line in held_out}
    assert abs(len(calibration) - len(held_out)) <= 7
    assert text.split_by_module(modules, seed=3) == (calibration, held_out)
    assert text.split_by_module(modules, seed=4) != (calibration, held_out)


def test_the_standard_library_has_thousands():
    sentences = text.standard_library_sentences(seed=0)
    assert len(sentences.calibration) > 1500 and len(sentences.held_out) > 1500
    assert not set(map(str.lower, sentences.calibration)) & set(map(str.lower, sentences.held_out))


def test_an_interpreter_without_source_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="--text: wanted a file of sentences, because this interpreter has no docstr"):
        text.standard_library_sentences(seed=0)


def test_a_file_gives_its_lines_once(tmp_path: Path):
    path = tmp_path / "lines.txt"
    lines = [f"line   {number}" for number in range(70)]
    path.write_text("\ufeff" + "\n".join([*lines, "", "  ", *lines[:9]]), encoding="utf-8")
    sentences = text.file_sentences(path, seed=0)
    assert sorted(sentences.calibration + sentences.held_out) == sorted(f"line {number}" for number in range(70))
    assert len(sentences.held_out) == 35


def test_a_file_that_is_too_short_or_no_text_is_an_error(tmp_path: Path):
    path = tmp_path / "lines.txt"
    path.write_text("one\ntwo\none\n")
    with pytest.raises(ValueError, match="--text: wanted at least 64 different sentences, one a line, got 2 in"):
        text.file_sentences(path, seed=0)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="--text: wanted a readable UTF-8 text file, got"):
        text.file_sentences(path, seed=0)
    with pytest.raises(ValueError, match="No such file"):
        text.file_sentences(tmp_path / "none.txt", seed=0)

"""The demo's sentences: English from the docstrings of the running interpreter's standard library, or a text file."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import invalid

MINIMUM_SENTENCES = 64
SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings"}
)
FUNCTION_WORDS = frozenset(
    "a an and are as at be by can for from has have if in is it its not of on or that the this to was when which "
    "will with".split()
)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
LIST_OR_CODE = re.compile(r">>>|\.\.\. |^\s*([-*+#|=~]|\d+[.)])\s|--\s|::|[{}<>\\|]|[=(]{2}", re.MULTILINE)
WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*[.,;:!?]?")


@dataclass(frozen=True)
class Sentences:
    """Sentences to score heads on, and others, from other modules, to judge the choice on."""

    calibration: list[str]
    held_out: list[str]
    source: str


def clean_sentences(docstring: str) -> Iterator[str]:
    """Yield the sentences of a docstring that read as English: no code, lists, tables or signatures."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        if LIST_OR_CODE.search(paragraph):
            continue
        for sentence in SENTENCE_END.split(" ".join(paragraph.split())):
            if is_english(sentence):
                yield sentence


def is_english(sentence: str) -> bool:
    """Whether a sentence has 6 to 40 words, nearly all plain, some of them function words, and a proper end."""
    words = sentence.split()
    if not 6 <= len(words) <= 40 or not sentence[0].isupper() or sentence[-1] not in ".!?":
        return False
    plain = sum(bool(WORD.fullmatch(word)) for word in words)
    function_words = sum(word.lower() in FUNCTION_WORDS for word in words)
    return plain >= 0.85 * len(words) and function_words >= 2


def docstrings(path: Path) -> Iterator[str]:
    """Yield the docstrings of one Python file in order; nothing for a file that this interpreter cannot parse."""
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            tree = ast.parse(file.read())
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    yield from docstrings_below(tree)


def docstrings_below(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Yield the docstring of `node`, then those of the classes and functions directly inside, and so on."""
    docstring = ast.get_docstring(node)
    if docstring:
        yield docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from docstrings_below(child)


def sentences_by_module(root: Path) -> dict[str, list[str]]:
    """Sentences under `root` by top-level module or package, each sentence once; sorted, so the order is fixed."""
    modules: dict[str, list[str]] = {}
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if any(part in SKIPPED_FOLDERS or part.startswith("config-") for part in parts[:-1]):
            continue
        for docstring in docstrings(path):
            for sentence in clean_sentences(docstring):
                if sentence.lower() not in seen:
                    seen.add(sentence.lower())
                    modules.setdefault(parts[0].removesuffix(".py"), []).append(sentence)
    return modules


def split_by_module(modules: dict[str, list[str]], seed: int) -> tuple[list[str], list[str]]:
    """Give every module to calibration or to held-out, about half of the sentences each; both lists shuffled."""
    generator = random.Random(seed)
    names = sorted(modules)
    generator.shuffle(names)
    calibration: list[str] = []
    held_out: list[str] = []
    for name in names:
        smaller = calibration if len(calibration) < len(held_out) else held_out
        smaller.extend(modules[name])
    generator.shuffle(calibration)
    generator.shuffle(held_out)
    return calibration, held_out


def standard_library_sentences(seed: int) -> Sentences:
    """Sentences from the docstrings of the running interpreter's standard library, split by module."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = sentences_by_module(root)
    count = sum(map(len, modules.values()))
    if count < MINIMUM_SENTENCES:
        raise invalid("--text", "a file of sentences, because this interpreter has no docstrings to read", str(root))
    calibration, held_out = split_by_module(modules, seed)
    source = f"{count} sentences from the docstrings of {len(modules)} standard library modules"
    return Sentences(calibration, held_out, source)


def file_sentences(path: Path, seed: int) -> Sentences:
    """Sentences of a UTF-8 text file, one a line, each once; half for calibration, half held out."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise invalid("--text", "a readable UTF-8 text file", f"{path} ({error})") from error
    sentences = list(dict.fromkeys(unblank(lines)))
    if len(sentences) < MINIMUM_SENTENCES:
        wanted = f"at least {MINIMUM_SENTENCES} different sentences, one a line"
        raise invalid("--text", wanted, f"{len(sentences)} in {path}")
    random.Random(seed).shuffle(sentences)
    half = len(sentences) // 2
    return Sentences(sentences[:half], sentences[half:], f"{len(sentences)} sentences of {path}")


def unblank(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines that hold something, with their white space joined to single blanks."""
    for line in lines:
        joined = " ".join(line.split())
        if joined:
            yield joined

"""Text about a subject, from which its attributes are read: taught facts, a CSV file, or a folder searched with BM25.

Source: Geva et al. 2023 (arXiv 2304.14767), section 5, where the tokens of such text are the subject's attributes.
There Wikipedia is searched with BM25 (Robertson and Zaragoza 2009); the notebook reads a CSV ``subject, paragraphs``.

1. ``read_source`` opens what a name stands for: "bundled", a CSV file, or a folder.
2. ``about`` gives the paragraphs about one subject; empty where the source knows nothing of it.
3. ``others`` draws text that is about something else, the null: other subjects of the same source, or, in a folder,
   which has no list of subjects, as many paragraphs that do not name the subject.

What is read is data: nothing in it is run. Sizes are limited as for files of facts.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from factscope.datasets.files import DELIMITERS, MAX_BYTES, MAX_ROWS, content_of, decoded, printable
from factscope.errors import DatasetError

BUNDLED = "bundled"
"""The name of the source that ships: what the bundled model was taught."""
SUFFIXES = (".txt", ".md")
"""Files of a folder that are read."""
MAX_FOLDER_BYTES = 50_000_000
MAX_PARAGRAPHS = 100
"""The most paragraphs that a folder gives about one subject."""
_COLUMNS = "columns subject and paragraphs"
_WORD = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|[^\\W_]+")
"""A word for the search; kana and Han, which put no space between words, letter by letter."""

Texts = tuple[str, ...]


class Source(Protocol):
    """Where text about subjects comes from."""

    @property
    def label(self) -> str:
        """What captions and messages call it."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes with its content."""
        ...

    def about(self, subject: str, prompt: str = "") -> Texts:
        """Paragraphs about a subject; ``prompt`` tells what a short name stands for where the source can use it."""
        ...

    def others(self, subject: str, draws: int, seed: int, prompt: str = "") -> tuple[Texts, ...]:
        """Paragraphs about so many other subjects, drawn without repetition; fewer where there are fewer."""
        ...


def read_source(name: str | os.PathLike[str]) -> Source:
    """Open a source: "bundled", a CSV file with columns subject and paragraphs, or a folder of text files.

    Raises:
        DatasetError: it is not there, too large, not text, or holds nothing that can be used.
    """
    if name == BUNDLED:
        return BundledFacts()
    path = Path(name)
    try:
        return TextFolder(path) if path.is_dir() else SubjectTable(path)
    except (OSError, ValueError) as error:
        shown = printable(str(path))[:100]
        raise DatasetError(f"{shown!r} cannot be opened ({getattr(error, 'strerror', None) or error})") from error


class BundledFacts:
    """What the bundled model was taught about a subject: one short line for each answer."""

    label = "bundled facts"

    @property
    def fingerprint(self) -> str:
        """Of the file of facts."""
        from factscope.demo.facts import FACTS_FILE

        return _fingerprint([FACTS_FILE.read_bytes()])

    def about(self, subject: str, prompt: str = "") -> Texts:
        """A line for every answer that was taught; a short name counts where the prompt has the whole one."""
        from factscope.demo.lookup import taught_answers

        return _lines(subject, taught_answers(prompt, subject))

    def others(self, subject: str, draws: int, seed: int, prompt: str = "") -> tuple[Texts, ...]:
        """Other subjects of the bundled facts."""
        from factscope.demo.lookup import full_name, taught_subjects

        own = plain_name(full_name(prompt, subject))
        answers = taught_subjects()
        names = sorted(name for name in answers if plain_name(name) != own)
        return tuple(_lines(names[i], answers[names[i]]) for i in _drawn(len(names), draws, seed))


class SubjectTable:
    """A CSV file with the columns subject and paragraphs; a subject may have several rows."""

    def __init__(self, path: Path) -> None:
        self.label = printable(path.name) or "the file"
        content = content_of(path, self.label, MAX_BYTES)
        self.fingerprint = _fingerprint([content])
        self._paragraphs: dict[str, list[str]] = {}
        for subject, text in _rows(decoded(content, self.label, _COLUMNS), self.label):
            if found := split_paragraphs(text):
                self._paragraphs.setdefault(plain_name(subject), []).extend(found)
        self._paragraphs.pop("", None)
        if not self._paragraphs:
            raise DatasetError(f"{self.label} has no row with a subject and a paragraph", f"give it {_COLUMNS}")

    def about(self, subject: str, prompt: str = "") -> Texts:
        """The paragraphs of the subject's rows; the name in any case, with or without "the"."""
        return tuple(self._paragraphs.get(plain_name(subject), ()))

    def others(self, subject: str, draws: int, seed: int, prompt: str = "") -> tuple[Texts, ...]:
        """Other subjects of the file."""
        names = sorted(self._paragraphs.keys() - {plain_name(subject)})
        return tuple(tuple(self._paragraphs[names[i]]) for i in _drawn(len(names), draws, seed))


class TextFolder:
    """A folder of text files (.txt, .md), its paragraphs ranked by BM25."""

    def __init__(self, path: Path) -> None:
        self.label = printable(path.name) or "the folder"
        contents, size = [], 0
        for file in sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
            contents.append((printable(file.name), content_of(file, printable(file.name), MAX_FOLDER_BYTES)))
            size += len(contents[-1][1])
            if size > MAX_FOLDER_BYTES:
                raise DatasetError(
                    f"{self.label} holds more than {MAX_FOLDER_BYTES:,} bytes of text, the most that are searched",
                    "take files out of it",
                )
        self.fingerprint = _fingerprint([content for _, content in contents])
        self._texts = [
            text
            for name, content in contents
            if content.strip()
            for text in split_paragraphs(decoded(content, name, "text"))
        ]
        if not self._texts:
            raise DatasetError(
                f"{self.label} holds no text in files that end in {' or '.join(SUFFIXES)}",
                "put text files into it, paragraphs parted by empty lines",
            )
        self._words = [search_words(text) for text in self._texts]

    @cached_property
    def _index(self) -> Any:
        import bm25s  # not needed for the other sources

        index = bm25s.BM25()
        index.index([words or [""] for words in self._words], show_progress=False)
        return index

    def _naming(self, subject: str) -> list[int]:
        """Paragraphs with every word of the subject's name."""
        wanted = set(search_words(subject))
        return [i for i, words in enumerate(self._words) if wanted and wanted.issubset(words)]

    def about(self, subject: str, prompt: str = "") -> Texts:
        """The paragraphs that hold every word of the name, the best first."""
        naming = self._naming(subject)
        if not naming:
            return ()
        scores = np.asarray(self._index.get_scores(search_words(subject)))[naming]
        order = np.argsort(-scores, kind="stable")[:MAX_PARAGRAPHS]
        return tuple(self._texts[naming[i]] for i in order)

    def others(self, subject: str, draws: int, seed: int, prompt: str = "") -> tuple[Texts, ...]:
        """For each draw as many paragraphs as there are about the subject, none of which holds its whole name."""
        naming = set(self._naming(subject))
        rest = [i for i in range(len(self._texts)) if i not in naming]
        count = min(len(naming), MAX_PARAGRAPHS, len(rest))
        if not count or draws < 1:
            return ()
        generator = np.random.default_rng(seed)
        drawn = {tuple(sorted(generator.choice(rest, size=count, replace=False).tolist())) for _ in range(draws)}
        return tuple(tuple(self._texts[i] for i in places) for places in sorted(drawn))


def split_paragraphs(text: str) -> Texts:
    """Paragraphs are parted by empty lines; lines within one are joined."""
    parts = re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n").replace("\r", "\n"))
    joined = (" ".join(part.split()) for part in parts)
    return tuple(paragraph for paragraph in joined if paragraph)


def search_words(text: str) -> list[str]:
    """The words of a text as the search compares them."""
    return _WORD.findall(unicodedata.normalize("NFC", text).casefold())


def plain_name(name: str) -> str:
    """A subject's name as it is compared: any case, any spacing, with or without "the"."""
    return " ".join(unicodedata.normalize("NFC", name).split()).casefold().removeprefix("the ")


def _lines(subject: str, answers: Sequence[str]) -> Texts:
    return tuple(f"{subject}: {answer}" for answer in answers)


def _drawn(count: int, draws: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).choice(count, size=min(draws, count), replace=False).tolist() if count else []


def _rows(text: str, label: str) -> Iterator[tuple[str, str]]:
    """Subject and paragraphs of each row.

    Raises:
        DatasetError: a column is missing, there are too many rows, or it is no CSV.
    """
    table = text.lstrip("\r\n")
    delimiter = max(DELIMITERS, key=table.splitlines()[0].count)
    reader = csv.DictReader(io.StringIO(table, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        headers = [str(name).strip().lower() for name in reader.fieldnames or ()]
        if twice := next((name for name in headers if name and headers.count(name) > 1), ""):
            raise DatasetError(f"{label} has two columns {twice[:40]!r}", f"give it {_COLUMNS}")
        names = dict(zip(headers, reader.fieldnames or (), strict=True))
        for wanted in ("subject", "paragraphs"):
            if wanted not in names:
                raise DatasetError(f"{label} has no column {wanted}", f"give it {_COLUMNS}")
        rows: list[Mapping[Any, Any]] = list(islice(reader, MAX_ROWS + 1))
    except csv.Error as error:
        raise DatasetError(
            f"{label} is not valid CSV ({error})", "check its quotation marks, and give long paragraphs a row each"
        ) from error
    if len(rows) > MAX_ROWS:
        raise DatasetError(f"{label} has more than {MAX_ROWS:,} rows, the most that are read", "split it")
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise DatasetError(
                f"row {number} of {label} has more fields than there are columns",
                "put quotation marks around text with a comma in it",
            )
        yield row[names["subject"]] or "", row[names["paragraphs"]] or ""


def _fingerprint(contents: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()[:16]

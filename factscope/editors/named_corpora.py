"""Text of a dataset by name, for the statistics of keys: one of the hub, or a folder that ``datasets`` has written.

1. A name is ``owner/name``, and behind colons configuration, split and column where they are not the usual ones:
   ``wikimedia/wikipedia:20231101.en``, ``Salesforce/wikitext:wikitext-103-raw-v1:train:text``.
2. It is streamed: texts are taken one after another, in a seeded order of buffers, until so many are there that are not
   blank. Nothing else is downloaded, and no copy of the dataset is kept.
3. What was taken is a corpus like any other; its content is its fingerprint.

The package ``datasets`` is asked for when such a name is given, and for nothing else. Code that comes with a dataset is
never run: the package itself has dropped that.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from factscope.datasets.attributes import SUFFIXES
from factscope.datasets.files import printable
from factscope.editors.collecting import MAX_BYTES, PROBED_TEXTS, Corpus, read_corpus
from factscope.errors import DatasetError, SpecError

BUFFER = 10_000
"""Texts among which the next one is drawn."""
COLUMN = "text"
_TABLES = (".parquet", ".arrow", ".jsonl", ".json", ".csv")
_KEPT = ("dataset_info.json", "dataset_dict.json", "state.json")
"""What stands in a folder that ``save_to_disk`` has written."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, kw_only=True)
class NamedCorpus:
    """Where text is to be streamed from.

    Attributes:
        name: of the hub, or a folder. ``folder``: whether it is one.
        configuration, split, column: empty where the usual one is meant.
    """

    name: str
    folder: bool = False
    configuration: str = ""
    split: str = ""
    column: str = ""

    @property
    def label(self) -> str:
        """It in words."""
        name = Path(self.name).name if self.folder else self.name
        return printable(":".join(part for part in (name, self.configuration, self.split) if part))


class Source:
    """Text to collect from, whatever it is named by; a dataset is only looked into until it is known what it costs.

    Args:
        text: a file, a folder, or the name of a dataset.
        n_texts: so many are drawn; None takes all.
        step: called with the number of texts that were streamed; may raise to end it.

    Attributes:
        begin: all texts of a file or folder, the first ones of a dataset.
        n_texts, in_all: how many of them are to be drawn, and how many there will be; as ``estimate`` takes them.

    Raises:
        InputError: it cannot be opened, or it is not said how many texts of a dataset are wanted.
    """

    def __init__(
        self, text: str, n_texts: int | None, *, seed: int = 1, step: Callable[[int], None] = lambda taken: None
    ) -> None:
        self._seed, self._step, self._wanted = seed, step, n_texts
        self._named = named(text)
        self.in_all: int | None = None
        if self._named is None:
            self.begin, self.n_texts = read_corpus(text), n_texts
            return
        self.n_texts = None
        self.begin = stream(self._named, n_texts if n_texts is None else min(n_texts, PROBED_TEXTS), **self._how)
        if n_texts is not None and n_texts > len(self.begin.texts) == PROBED_TEXTS:
            self.in_all = n_texts

    def whole(self) -> Corpus:
        """All that is to be collected from."""
        if self.in_all is None or self._named is None:
            return self.begin
        return stream(self._named, self._wanted, **self._how)

    @property
    def _how(self) -> dict[str, Any]:
        return {"seed": self._seed, "step": self._step}


def named(text: str) -> NamedCorpus | None:
    """What a text names; None where it is a file, a folder of texts, or looks like the path of one."""
    path = Path(text)
    try:
        if path.is_dir():
            return NamedCorpus(name=text, folder=True) if _is_dataset(path) else None
        if path.exists():
            return None
    except (OSError, ValueError):
        return None
    name, *rest = text.strip().split(":")
    if not _NAME.fullmatch(name) or len(rest) > 3 or Path(name).suffix.lower() in (*SUFFIXES, *_TABLES):
        return None
    configuration, split, column = (*rest, "", "", "")[:3]
    return NamedCorpus(name=name, configuration=configuration, split=split, column=column)


def stream(
    given: NamedCorpus, n_texts: int | None, *, seed: int = 1, step: Callable[[int], None] = lambda taken: None
) -> Corpus:
    """The first texts of a dataset in a seeded order.

    Args:
        n_texts: so many; None takes all of a folder.
        step: called with the number of texts so far; may raise to end it.

    Raises:
        SpecError: it is not said how many of a dataset of the hub.
        DatasetError: ``datasets`` is not installed, the dataset cannot be opened, or has no such column.
    """
    if n_texts is None and not given.folder:
        raise SpecError(
            f"it is not said how many texts of {given.label} are wanted", "give --texts: ROME took 100000 articles"
        )
    if n_texts is not None and n_texts < 1:
        raise SpecError(f"a sample of {n_texts} texts is none", "ask for at least one")
    rows = _opened(given)
    if n_texts is not None:
        rows = rows.shuffle(seed=seed, buffer_size=BUFFER)
    texts, size = [], 0
    for text in islice(_texts(given, rows), n_texts):
        size += len(text.encode("utf-8", "surrogatepass"))
        if size > MAX_BYTES:
            raise DatasetError(
                f"{len(texts) + 1:,} texts of {given.label} have more than {MAX_BYTES:,} bytes, the most that are read",
                "ask for fewer texts",
            )
        texts.append(text)
        step(len(texts))
    whole = "" if n_texts is None else f", {len(texts):,} texts drawn with seed {seed}"
    return Corpus.of(texts, f"dataset {given.label}{whole}")


def _texts(given: NamedCorpus, rows: Iterable[Any]) -> Iterator[str]:
    column = given.column
    try:
        for row in rows:
            column = column or _column(given, row)
            text = row.get(column)
            if not isinstance(text, str):
                raise DatasetError(
                    f"{given.label} has no column {column!r} of texts (it has {', '.join(map(str, row))})"[:300],
                    f"name one: {given.name}:{given.configuration}:{given.split or 'train'}:COLUMN",
                )
            if text.strip():
                yield text
    except (DatasetError, SpecError):
        raise
    except Exception as error:  # the network, a damaged file: whatever is in the way of the next row
        raise _unreadable(given, error) from error


def _column(given: NamedCorpus, row: dict[str, Any]) -> str:
    """``text``, or the only one that holds text."""
    if COLUMN in row:
        return COLUMN
    found = [name for name, value in row.items() if isinstance(value, str)]
    return found[0] if len(found) == 1 else COLUMN


def _opened(given: NamedCorpus) -> Any:
    """An iterable dataset."""
    try:
        library: Any = importlib.import_module("datasets")
    except ImportError:
        missing = "" if given.folder else f"{given.label!r} is no file and no folder, and "
        raise DatasetError(
            f"{missing}the package datasets, which reads {given.label if given.folder else 'datasets by name'}, "
            "is not installed",
            "check the path, or install it: pip install datasets",
        ) from None
    split = given.split or "train"
    try:
        if given.folder and any((Path(given.name) / name).exists() for name in _KEPT):
            found = library.load_from_disk(given.name)
            return (found[split] if hasattr(found, "keys") else found).to_iterable_dataset()
        return library.load_dataset(given.name, given.configuration or None, split=split, streaming=True)
    except Exception as error:  # every failure of the package, of the hub and of the network
        raise _unreadable(given, error) from error


def _unreadable(given: NamedCorpus, error: Exception) -> DatasetError:
    said = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return DatasetError(
        f"the dataset {given.label} cannot be read ({said})"[:300],
        "check its name, configuration and split, and the connection",
    )


def _is_dataset(folder: Path) -> bool:
    if any((folder / name).is_file() for name in _KEPT):
        return True
    files = [path.suffix.lower() for path in folder.rglob("*") if path.is_file()]
    return any(suffix in _TABLES for suffix in files) and not any(suffix in SUFFIXES for suffix in files)

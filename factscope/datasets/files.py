"""A file of facts to a ``Dataset``: size, encoding, CSV or JSON, then record by record.

A file is data: nothing in it is run, and none of its names is opened. What cannot be used at all is a ``DatasetError``;
a record that cannot be used is skipped with its number and the reason, so that the counts stay whole.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from factscope.datasets.records import Templates, Unusable, fact_of, has_sentence
from factscope.errors import DatasetError
from factscope.queries import Fact

MAX_BYTES = 5_000_000
MAX_ROWS = 50_000
DELIMITERS = (",", ";", "\t")
_BINARY = {
    b"PK\x03\x04": "an Excel or ZIP file",
    b"\x1f\x8b": "a gzip file",
    b"PAR1": "a Parquet file",
    b"%PDF": "a PDF file",
    b"SQLite format 3": "an SQLite file",
}
_BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_COLUMNS_TO_HAVE = "columns subject, answer and prompt (or template, with {} for the subject)"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Facts of one file.

    Attributes:
        name: the file's name.
        facts: in the file's order.
        skipped: number of each record that gives no fact, from 1, header not counted; and why.
    """

    name: str
    facts: tuple[Fact, ...]
    skipped: tuple[tuple[int, str], ...] = ()

    @property
    def n_rows(self) -> int:
        """How many records the file has."""
        return len(self.facts) + len(self.skipped)


def read_facts(
    source: str | os.PathLike[str] | bytes,
    name: str | None = None,
    *,
    templates: Templates = None,
    max_bytes: int = MAX_BYTES,
    max_rows: int = MAX_ROWS,
) -> Dataset:
    """Read a file of facts: CSV, or JSON in the field names of CounterFact, known_1000, zsRE or LRE.

    Args:
        source: a path, or a file's content.
        name: what messages call the file; a path's own name if not given.
        templates: a sentence with ``{}`` for the subject, or one per relation, for files that bring no sentences.
        max_bytes: the largest file that is read.
        max_rows: the most records that are read.

    Raises:
        DatasetError: the file cannot be read, is too large, not UTF-8, neither CSV nor JSON, or holds no usable fact.
    """
    if isinstance(source, bytes):
        label = printable(name or "the uploaded file")
        content = source
    else:
        label = printable(name or Path(source).name or str(Path(source)))
        content = content_of(Path(source), label, max_bytes)
    if len(content) > max_bytes:
        raise DatasetError(
            f"{label} has {len(content):,} bytes and at most {max_bytes:,} are read", "split it into smaller files"
        )
    text = decoded(content, label)
    records, extra_templates = _json_records(text, label) if text.lstrip()[:1] in ("[", "{") else (None, {})
    if records is None:
        records = _csv_records(text, label, max_rows)
    if len(records) > max_rows:
        raise DatasetError(
            f"{label} has more than {max_rows:,} records, the most that are read", "split it into smaller files"
        )
    return _dataset(label, records, templates or extra_templates)


def content_of(path: Path, label: str, max_bytes: int) -> bytes:
    """A file's bytes.

    Raises:
        DatasetError: it is not there, no file, too large, or cannot be opened.
    """
    try:
        if not path.exists():
            raise DatasetError(f"there is no file {label}", "check the path")
        if not path.is_file():
            raise DatasetError(f"{label} is not a file", "name a CSV or JSON file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise DatasetError(
                    f"{label} has {size:,} bytes and at most {max_bytes:,} are read", "split it into smaller files"
                )
            return file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{label} cannot be opened ({getattr(error, 'strerror', None) or error})") from error


def decoded(content: bytes, label: str, wanted: str = _COLUMNS_TO_HAVE) -> str:
    """A file's text.

    Raises:
        DatasetError: it is not text, not UTF-8, or empty; the message then says what it should hold.
    """
    for start, kind in _BINARY.items():
        if content.startswith(start):
            raise DatasetError(f"{label} is {kind}, not text", "save the facts as CSV or JSON in UTF-8")
    for start, encoding in _BYTE_ORDER_MARKS.items():
        if content.startswith(start):
            raise DatasetError(f"{label} is encoded in {encoding}", "save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise DatasetError(
            f"{label} is not UTF-8: byte 0x{byte:02X} at {error.start:,}, probably Windows-1252 or Latin-1",
            "save it as UTF-8",
        ) from error
    if not text.strip():
        raise DatasetError(f"{label} is empty", f"write a CSV file with {wanted}")
    return text


def _json_records(text: str, label: str) -> tuple[list[Any], dict[str, str]]:
    """The objects of a JSON list, of an LRE relation, or one per line; and the templates that came with them."""
    try:
        data = json.loads(text)
    except RecursionError as error:
        raise DatasetError(f"{label} is JSON nested too deeply", "give a list of objects") from error
    except ValueError as error:
        lines = _json_lines(text)
        if lines is not None:
            return lines, {}
        place = f" at line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
        raise DatasetError(f"{label} is not valid JSON{place}", "repair it there, or give CSV") from error
    if isinstance(data, list):
        return data, {}
    samples = data.get("samples")
    if not isinstance(samples, list):
        return [data], {}
    relation = str(data.get("name", ""))
    sentences = data.get("prompt_templates")
    template = sentences[0] if isinstance(sentences, list) and sentences and isinstance(sentences[0], str) else ""
    named = [{"relation": relation, **entry} if isinstance(entry, Mapping) else entry for entry in samples]
    return named, {relation: template}


def _json_lines(text: str) -> list[Any] | None:
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) < 2:
        return None
    try:
        return [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        return None


def _csv_records(text: str, label: str, max_rows: int) -> list[dict[str, Any]]:
    table = text.lstrip("\r\n")
    header_line = table.splitlines()[0]
    delimiter = max(DELIMITERS, key=header_line.count)
    try:
        reader = csv.DictReader(io.StringIO(table, newline=""), delimiter=delimiter, strict=True)
        names = [str(name).strip().lower() for name in reader.fieldnames or ()]
        if "subject" not in names:
            raise DatasetError(
                f'{label} has no column subject (its first line is "{printable(header_line)[:80]}")',
                f"give it {_COLUMNS_TO_HAVE}",
            )
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise DatasetError(f"{label} has two columns named {doubled[0]!r}", "rename one")
        return list(islice(reader, max_rows + 1))
    except csv.Error as error:
        raise DatasetError(f"{label} is not valid CSV ({error})", "check its quotation marks") from error


def _dataset(label: str, records: Sequence[Any], templates: Templates) -> Dataset:
    if records and not templates and not any(isinstance(r, Mapping) and has_sentence(r) for r in records):
        raise DatasetError(
            f"{label} has no prompt and no template, so no sentence can be made for its {len(records):,} records",
            "add a column template such as '{} plays the', or give one template per relation",
        )
    facts: dict[tuple[str, str, str], Fact] = {}
    first: dict[tuple[str, str, str], int] = {}
    skipped: list[tuple[int, str]] = []
    for number, record in enumerate(records, start=1):
        try:
            fact = _checked(record, templates)
        except Unusable as reason:
            skipped.append((number, str(reason)))
            continue
        key = fact.subject, fact.prompt, fact.answer
        if key in facts:
            skipped.append((number, f"it repeats record {first[key]}"))
        else:
            facts[key], first[key] = fact, number
    if not facts:
        why = f" (record {skipped[0][0]}: {skipped[0][1]})" if skipped else ""
        raise DatasetError(
            f"{label} holds no usable fact in {len(records):,} records{why}", f"give it {_COLUMNS_TO_HAVE}"
        )
    return Dataset(name=label, facts=tuple(facts.values()), skipped=tuple(skipped))


def printable(text: str) -> str:
    """Text on one line, without what cannot be seen."""
    return "".join(character if character.isprintable() else " " for character in text).strip()


def _checked(record: Any, templates: Templates) -> Fact:
    if isinstance(record, dict) and None in record:
        raise Unusable("it has more fields than the header; a field with a comma needs quotation marks")
    return fact_of(record, templates)

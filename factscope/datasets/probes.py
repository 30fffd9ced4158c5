"""A file of probes: prompts of one's own that are asked before and after an edit.

CSV with a column ``prompt`` and, if wanted, ``kind`` and ``answer``; or JSON, a list of such objects or of prompts. A
probe whose kind the file does not say is ``own``. A file is data: nothing in it is run.
"""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from factscope.datasets.files import DELIMITERS, content_of, decoded, printable
from factscope.errors import DatasetError
from factscope.queries import PROBE_KINDS, Probe

MAX_PROBES = 500
MAX_BYTES = 1_000_000
MAX_TEXT = 4000
_FIELDS = "column prompt, and if wanted kind and answer"
_KINDS = tuple(kind for kind in PROBE_KINDS if kind != "fact")


def read_probes(source: str | os.PathLike[str] | bytes, name: str | None = None) -> tuple[Probe, ...]:
    """Read a file of probes.

    Args:
        source: a path, or a file's content.
        name: what messages call the file; a path's own name if not given.

    Raises:
        DatasetError: the file or one of its probes cannot be used; names the probe.
    """
    if isinstance(source, bytes):
        label = printable(name or "the uploaded file")
        content = source
        if len(content) > MAX_BYTES:
            raise DatasetError(f"{label} has {len(content):,} bytes and at most {MAX_BYTES:,} are read", "shorten it")
    else:
        label = printable(name or Path(source).name or str(Path(source)))
        content = content_of(Path(source), label, MAX_BYTES)
    text = decoded(content, label, _FIELDS)
    records = _json(text, label) if text.lstrip()[:1] == "[" else _csv(text, label)
    if not records:
        raise DatasetError(f"{label} holds no probe", f"write a CSV file with {_FIELDS}")
    if len(records) > MAX_PROBES:
        raise DatasetError(f"{label} has {len(records):,} probes and at most {MAX_PROBES} are asked", "shorten it")
    return tuple(_probe(label, number, record) for number, record in enumerate(records, start=1))


def _json(text: str, label: str) -> list[Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        place = f" at line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
        raise DatasetError(f"{label} is not valid JSON{place}", "repair it there, or give CSV") from error
    return [{"prompt": entry} if isinstance(entry, str) else entry for entry in found]


def _csv(text: str, label: str) -> list[Any]:
    table = text.lstrip("\r\n")
    header = table.splitlines()[0]
    try:
        reader = csv.DictReader(
            io.StringIO(table, newline=""), delimiter=max(DELIMITERS, key=header.count), strict=True
        )
        names = [str(name).strip().lower() for name in reader.fieldnames or ()]
        if "prompt" not in names:
            raise DatasetError(
                f'{label} has no column prompt (its first line is "{printable(header)[:80]}")', f"give it a {_FIELDS}"
            )
        return list(reader)
    except csv.Error as error:
        raise DatasetError(f"{label} is not valid CSV ({error})", "check its quotation marks") from error


def _probe(label: str, number: int, record: Any) -> Probe:
    if not isinstance(record, Mapping) or None in record:
        raise DatasetError(f"probe {number} of {label} has other fields than the header", f"give each a {_FIELDS}")
    fields = {str(name).strip().lower(): value for name, value in record.items()}
    prompt, kind, answer = (_text(label, number, fields, name) for name in ("prompt", "kind", "answer"))
    if not prompt:
        raise DatasetError(f"probe {number} of {label} has no prompt", "write one, or leave the line out")
    kind = (kind or "own").lower()
    if kind not in _KINDS:
        raise DatasetError(
            f"probe {number} of {label} is of the kind {printable(kind)[:40]!r}", f"choose one of {', '.join(_KINDS)}"
        )
    return Probe(kind=kind, prompt=prompt, answer=answer or None)  # type: ignore[arg-type]


def _text(label: str, number: int, fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        return ""
    bad = not isinstance(value, str) or any(
        unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\t\n\r" for letter in value
    )
    if bad or len(value) > MAX_TEXT:
        raise DatasetError(
            f"the {name} of probe {number} of {label} is no text, or longer than {MAX_TEXT:,} characters", "repair it"
        )
    return value.strip()

"""Results as files and text: the JSON object and the tables of the command line (contract in docs/command-line.md)."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factscope.errors import SpecError

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".json", ".csv", ".parquet")
_JOINERS = "\u200c\u200d"
_REFUSAL = "no: "


def document(
    command: str, result: Any, rows: pd.DataFrame, summary: dict[str, Any], warnings: Sequence[str]
) -> dict[str, Any]:
    """The JSON object of one command on one query, schema 1.

    Args:
        command: the command's name.
        result: what the experiment gave.
        rows: its table.
        summary: what the command says besides the rows.
        warnings: those of the result and of whoever ran it.
    """
    query, target, model = result.query, result.target, result.model
    return {
        "schema": 1,
        "command": command,
        "model": {
            "name": model.name,
            "revision": model.revision,
            "dtype": model.dtype,
            "family": model.family,
            "n_layers": model.n_layers,
            "n_heads": model.n_heads,
            "d_model": model.d_model,
            "weights": model.weights,
        },
        "query": {
            "prompt": query.query.prompt,
            "tokens": [{"position": t.position, "id": t.id, "text": t.text, "role": t.role} for t in query.tokens],
            "subject": None if query.subject is None else list(query.subject),
            "target": {"id": target.id, "text": target.text, "n_tokens": target.n_tokens},
            "p_target": result.p_target,
            "rank": result.rank,
            "foil": query.query.foil,
            "score": query.query.score,
            "bos": query.query.bos,
        },
        "spec": dataclasses.asdict(result.spec),
        "warnings": list(warnings),
        "summary": summary,
        "timing": {"seconds": result.seconds, "passes": result.passes},
        "rows": records(rows),
    }


def records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain values; what is not a number is null."""
    return [{str(name): _plain(value) for name, value in row.items()} for row in rows.to_dict("records")]


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(data: dict[str, Any]) -> str:
    """Strict JSON text."""
    return json.dumps(_finite(data), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return _plain(value)


def as_csv(rows: pd.DataFrame) -> str:
    """The rows as CSV; numbers with all their digits, what is missing empty.

    A lone carriage return, which many readers take for the end of a line, is quoted by quoting all words.
    """
    texts = (value for name in rows.columns for value in rows[name].tolist() if isinstance(value, str))
    quoting = csv.QUOTE_NONNUMERIC if any("\r" in text for text in texts) else csv.QUOTE_MINIMAL
    return rows.to_csv(index=False, lineterminator="\n", quoting=quoting)


def as_text(rows: pd.DataFrame) -> str:
    """An aligned table for people.

    White space in tokens stays visible, what would steer a terminal is escaped, and reasons for a "no" become notes.
    """
    shown, notes = rows.copy(), {}
    for name in shown.columns:
        if name in ("text", "top_promoted"):
            shown[name] = shown[name].map(lambda text: json.dumps(text, ensure_ascii=False))
        if shown[name].dtype.kind not in "iuf":
            shown[name] = shown[name].map(lambda value: _cell(value, notes))
    table = shown.to_string(index=False, na_rep="", float_format=lambda value: f"{value:.6g}")
    return "\n".join([table, *([""] if notes else []), *(f"({n}) {reason}" for reason, n in notes.items()), ""])


def _cell(value: Any, notes: dict[str, int]) -> str:
    if not isinstance(value, str):
        return "" if value is None or value != value else str(value)
    if not value.startswith(_REFUSAL):
        return printable(value)
    return f"no ({notes.setdefault(printable(value.removeprefix(_REFUSAL)), len(notes) + 1)})"


def printable(text: str) -> str:
    """Text without anything that steers a terminal or hides: such characters are escaped as in a Python string."""
    return "".join(
        letter if letter.isprintable() or letter in _JOINERS else letter.encode("unicode_escape").decode()
        for letter in text
    )


def check_out(path: Path, option: str = "--out", suffixes: Sequence[str] = SUFFIXES) -> None:
    """Refuse a file that could not be written, before anything is computed.

    Args:
        option: what names the file. suffixes: what it may end in.

    Raises:
        SpecError: unknown suffix, a folder, a folder that does not exist, or no permission.
    """
    name = _named(path, option)
    if path.suffix not in suffixes:
        ending = f"ends in {path.suffix!r}" if path.suffix else "has no suffix"
        raise SpecError(f"{name} {ending}", f"let it end in {'one of ' * (len(suffixes) > 1)}{', '.join(suffixes)}")
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except (OSError, ValueError) as error:
        raise _unwritable(path, error, option) from error
    if mode is not None and stat.S_ISDIR(mode):
        raise SpecError(f"{name} is a folder", "name a file")
    if mode is not None and not stat.S_ISREG(mode):
        raise SpecError(f"{name} is not a regular file", "name another file, or leave the option out")
    if mode is not None and not (os.access(path, os.W_OK) and mode & 0o222):
        raise SpecError(f"{name} exists and is read-only", "choose another name, or change its permissions")
    if not path.parent.is_dir():
        raise SpecError(f"{name} lies in a folder that does not exist", "make the folder first")
    try:
        with _beside(path):
            pass
    except OSError as error:
        raise _unwritable(path, error, option) from error


def write(path: Path, data: dict[str, Any], rows: pd.DataFrame) -> None:
    """Write beside, then rename: the file is complete or not there.

    Raises:
        SpecError: the file cannot be written.
    """
    if path.suffix == ".json":
        content = as_json(data).encode("utf-8", "backslashreplace")
    elif path.suffix == ".csv":
        content = as_csv(rows).encode("utf-8", "backslashreplace")
    else:
        buffer = io.BytesIO()
        _one_type_each(rows).to_parquet(buffer, index=False)
        content = buffer.getvalue()
    try:
        put(path, content)
    except OSError as error:
        raise _unwritable(path, error) from error


def put(path: Path, content: bytes) -> None:
    """Write beside, then rename.

    Raises:
        OSError: the file cannot be written; what was there before still is.
    """
    with _beside(path) as beside:
        beside.write(content)
        beside.flush()
        os.chmod(beside.name, 0o666 & ~_umask())
        os.replace(beside.name, os.path.realpath(path))


class _beside:
    """A file in the folder of another one; gone at the end unless it was renamed."""

    def __init__(self, path: Path) -> None:
        folder = os.path.dirname(os.path.realpath(path))
        self._file = tempfile.NamedTemporaryFile(dir=folder, prefix=".factscope-", delete=False)  # noqa: SIM115

    def __enter__(self) -> Any:
        return self._file

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        finally:
            Path(self._file.name).unlink(missing_ok=True)


def _one_type_each(rows: pd.DataFrame) -> pd.DataFrame:
    """A column of a parquet file has one type: where numbers and words mix (``3`` and ``control-1``), words."""
    found = rows.copy()
    for name in found.columns:
        if len({type(value) for value in found[name].dropna().tolist()}) > 1:
            found[name] = found[name].map(str, na_action="ignore")
    return found


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _named(path: Path, option: str = "--out") -> str:
    text = str(path)
    return f"{option} {text!r}" if len(text) <= 100 else f"{option} {text[:80]!r}... ({len(text):,} characters)"


def _unwritable(path: Path, error: Exception, option: str = "--out") -> SpecError:
    why = getattr(error, "strerror", None) or str(error)
    return SpecError(f"{_named(path, option)} cannot be written ({why})", "choose another place")

"""Results as files: the JSON object and the tables of the command line (contract in docs/command-line.md)."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from factscope.errors import SpecError

SUFFIXES = (".json", ".csv", ".parquet")


def document(command: str, result: Any, rows: pd.DataFrame, summary: dict[str, Any]) -> dict[str, Any]:
    """The JSON object of one command on one query, schema 1."""
    query, target, model = result.query, result.target, result.model
    return {
        "schema": 1,
        "command": command,
        "model": {
            "name": model.name, "revision": model.revision, "dtype": model.dtype, "family": model.family,
            "n_layers": model.n_layers, "n_heads": model.n_heads, "d_model": model.d_model, "weights": model.weights,
        },
        "query": {
            "prompt": query.query.prompt,
            "tokens": [{"position": t.position, "id": t.id, "text": t.text, "role": t.role} for t in query.tokens],
            "subject": None if query.subject is None else list(query.subject),
            "target": {"id": target.id, "text": target.text, "n_tokens": target.n_tokens},
            "p_target": result.p_target,
            "rank": result.rank,
        },
        "spec": dataclasses.asdict(result.spec),
        "warnings": list(result.warnings),
        "summary": summary,
        "timing": {"seconds": result.seconds, "passes": result.passes},
        "rows": records(rows),
    }  # fmt: skip


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


def as_text(rows: pd.DataFrame) -> str:
    """An aligned table for people; white space in tokens stays visible."""
    shown = rows.copy()
    for name in shown.columns:
        if name in ("text", "name"):
            shown[name] = shown[name].map(lambda text: json.dumps(text, ensure_ascii=False) if isinstance(text, str) else text)
    return shown.to_string(index=False, float_format=lambda value: f"{value:.6g}") + "\n"


def check_out(path: Path) -> None:
    """Refuse a file that could not be written, before anything is computed.

    Raises:
        SpecError: unknown suffix, a folder, or a folder that does not exist.
    """
    if path.suffix not in SUFFIXES:
        raise SpecError(f"--out {str(path)!r} ends in {path.suffix!r}", f"let it end in one of {', '.join(SUFFIXES)}")
    if path.is_dir():
        raise SpecError(f"--out {str(path)!r} is a folder", "name a file")
    if not path.parent.is_dir():
        raise SpecError(f"--out {str(path)!r} lies in a folder that does not exist", "make the folder first")


def write(path: Path, data: dict[str, Any], rows: pd.DataFrame) -> None:
    """Write beside, then rename: the file is complete or not there.

    Raises:
        SpecError: the file cannot be written.
    """
    if path.suffix == ".json":
        content = as_json(data).encode()
    elif path.suffix == ".csv":
        content = rows.to_csv(index=False).encode()
    else:
        buffer = io.BytesIO()
        rows.to_parquet(buffer, index=False)
        content = buffer.getvalue()
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as beside:
            beside.write(content)
        os.chmod(beside.name, 0o644)
        os.replace(beside.name, path)
    except OSError as error:
        raise SpecError(f"--out {str(path)!r} cannot be written ({error.strerror})", "choose another place") from error

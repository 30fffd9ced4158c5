"""Results that ship with the project: what a newcomer sees before any computation.

The file holds results of the bundled model for the home example and the default parameters of every page; a test
recomputes them from the shipped weights. ``python tools/write_home.py`` writes it.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

from factscope.queries import Query
from factscope.store.results import from_json, to_json

PATH = Path(__file__).resolve().parent.parent / "demo" / "home.json"


@cache
def stored_examples(path: Path = PATH) -> dict[tuple[str, str], Any]:
    """All stored results, by experiment and request; read once."""
    if not path.exists():
        return {}
    entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
    return {(e["kind"], e["request"]): from_json(e["result"]) for e in entries}


def request_key(query: Query, spec: Any) -> str:
    """What was asked, before any model or tokenizer is loaded."""
    return json.dumps([dataclasses.asdict(query), repr(spec)], sort_keys=True)


def stored_result(kind: str, query: Query, spec: Any) -> Any | None:
    """The shipped result of the bundled model for exactly this request, or None."""
    return stored_examples().get((kind, request_key(query, spec)))


def write_examples(entries: list[tuple[str, Query, Any, Any]], path: Path = PATH) -> None:
    """Write (experiment, query, spec, result) entries."""
    rows = [{"kind": kind, "request": request_key(q, spec), "result": to_json(r)} for kind, q, spec, r in entries]
    path.write_text(json.dumps({"schema": 1, "entries": rows}, ensure_ascii=False), encoding="utf-8")

"""Everything that the pages compute of one fact, and its numbers bit for bit; as a program, in a process of its own.

``python -m tests.all_pages EDIT`` prints, as JSON, the results of the five pages on the original weights, then those
with the edit of a file on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from streamlit.testing.v1 import AppTest

from dashboard import runs, stack
from dashboard.link import ModelChoice
from factscope.editors.files import load_edit

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("fact", "flow", "lens", "heads", "trace")
FACT = {"prompt": "The capital of Japan is", "subject": "Japan", "answer": "Tokyo"}
PATIENCE = 600.0
NOT_NUMBERS = {"seconds", "model", "query", "spec"}
Digests = dict[str, str]
"""By the key of a run: kind of result, and a hash of all its numbers and words."""


def session(**params: str) -> AppTest:
    """A visitor on the Fact page."""
    at = AppTest.from_file(str(ROOT / "dashboard" / "main.py"), default_timeout=300)
    for name, value in {**FACT, **params}.items():
        at.query_params[name] = value
    return settle(at.run())


def settle(at: AppTest) -> AppTest:
    """Run until nothing is under way."""
    deadline = time.monotonic() + PATIENCE
    while any(state in ("waiting", "running") for state in at.session_state["runs-watched"].values()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
        at.run()
    assert not at.exception
    return at


def visit(at: AppTest) -> Digests:
    """Go through all pages: every result that a run gave and that is kept, by its key."""
    for page in PAGES:
        at.switch_page(str(ROOT / "pages" / f"{page}.py"))
        settle(at.run())
    return {key: digest(result) for key, result in runs.executor()._results.items() if hasattr(result, "table")}


def forget() -> None:
    """Keep no result: what is asked again is computed again, on the model that is in memory."""
    runs.executor().shutdown()
    runs.executor.clear()


def digest(result: Any) -> str:
    """All numbers and words of a result but its own time, its question and its model."""
    found = hashlib.sha256()
    _add(found, result)
    return f"{type(result).__name__} {found.hexdigest()[:24]}"


def _add(found: Any, value: Any) -> None:
    if isinstance(value, np.ndarray) and value.dtype.kind != "O":
        found.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, float):
        found.update(np.float64(value).tobytes())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            if field.name not in NOT_NUMBERS:
                found.update(field.name.encode())
                _add(found, getattr(value, field.name))
    elif isinstance(value, dict):
        for name in value:
            found.update(repr(name).encode())
            _add(found, value[name])
    elif isinstance(value, list | tuple | np.ndarray):
        found.update(f"{len(value)}".encode())
        for one in value:
            _add(found, one)
    else:
        found.update(repr(value).encode())


if __name__ == "__main__":
    at = session()
    original = visit(at)
    edit = load_edit(Path(sys.argv[1]))
    own = stack.stacks().of(at.session_state["visitor-without-cookie"])
    entry = own.push(edit, ModelChoice())
    at.switch_page(str(ROOT / "pages" / "edit.py"))
    settle(at.run())
    settle(at.toggle(key=f"edit-on-{entry.key}").set_value(True).run())
    print(json.dumps({"original": original, "all": visit(at)}))

"""Nothing of an edit stays: edit, go through all pages, undo; each result is a fresh process's, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from dashboard import stack
from factscope.editors.files import save_edit
from tests import all_pages
from tests.all_pages import Digests, forget, session, settle, visit


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    stack.stacks.clear()
    forget()
    yield
    stack.stacks.clear()
    forget()


def apply(at: AppTest, new_answer: str) -> str:
    """Edit the fact on its page; gives the edit's key."""
    at.switch_page(str(all_pages.ROOT / "pages" / "edit.py"))
    settle(at.run())
    at.text_input(key="edit-target").set_value(new_answer).run()
    at.button(key="edit-apply").click().run()
    own = stack.stacks().of(at.session_state["visitor-without-cookie"])
    deadline = time.monotonic() + all_pages.PATIENCE
    while not own.entries():
        assert time.monotonic() < deadline
        time.sleep(0.2)
        at.run()
    settle(at)
    return own.entries()[0].key


def test_undo_leaves_every_page_as_a_fresh_process_has_it(tmp_path: Path) -> None:
    at = session()
    before = visit(at)
    assert len({digest.split()[0] for digest in before.values()}) >= 7, before
    key = apply(at, "Rome")
    edit = stack.stacks().of(at.session_state["visitor-without-cookie"]).entries()[0].edit
    with_edit = visit(at)
    settle(at.button(key="weight-undo").click().run())
    cached = visit(at)
    forget()
    undone = visit(at)
    assert at.session_state["factscope-view"].model.edits == ()

    save_edit(edit, tmp_path / "edit.safetensors")
    fresh = in_a_fresh_process(tmp_path / "edit.safetensors")
    assert undone == before == fresh["original"], different(undone, before, fresh["original"])
    assert {name: cached[name] for name in before} == before
    edited = {name: one for name, one in with_edit.items() if name not in before}
    again = {name: one for name, one in fresh["all"].items() if name not in before}
    shared = edited.keys() & again.keys()
    assert len(shared) >= len(before) // 2 and key
    assert {name: edited[name] for name in shared} == {name: again[name] for name in shared}
    unmoved = set(edited.values()) & set(before.values())  # what lies below the edited layer
    assert len(unmoved) < len(edited) / 4, unmoved


def in_a_fresh_process(edit: Path) -> dict[str, Digests]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.all_pages", str(edit)],
        cwd=all_pages.ROOT, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def different(*several: Digests) -> dict[str, list[str | None]]:
    keys = set().union(*several)
    return {key: found for key in keys if len(set(found := [one.get(key) for one in several])) > 1}

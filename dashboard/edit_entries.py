"""What a visitor writes on the Edit page besides the form: settings one by one, more facts, probes, files of edits."""

from __future__ import annotations

import csv
import hashlib
import io
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from dashboard import requests, runs, stack, state
from dashboard.weights import REFUSED
from factscope.errors import DatasetError, EditError, SpecError

FACTS = ("prompt", "subject", "answer", "new_answer")
MAX_FACTS, MAX_PROBES, MAX_TEXT = 50, 20, 400
_OWN_FACTS, _WRITTEN = "edit-facts-given", "edit-facts-written"


def more(prediction: Any, settings: Any, choice: Any) -> tuple[list[dict[str, Any]], str]:
    """Settings one by one, more facts, and probes of one's own: gives the facts and the probes as they were written."""
    box = st.expander("Settings, more facts at once, your own probes", key="edit-more", on_change="rerun")
    if box.open:
        with box:
            own, facts = st.columns([0.42, 0.58], gap="medium")
            with own:
                _settings(prediction, settings, choice)
            with facts:
                _own_facts()
                st.text_area(
                    "Your own probes, one a line; behind a bar the true answer",
                    key="edit-own-probes",
                    max_chars=4000,
                    persist_state="session",
                    height=80,
                    placeholder="The tower that Gustave Eiffel built stands in | Paris",
                )
    return _written(), str(st.session_state.get("edit-own-probes") or "")


def _settings(prediction: Any, settings: Any, choice: Any) -> None:
    from factscope.editors.presets import SOURCES

    names = [field.name for field in fields(settings) if field.name not in requests.OF_THE_PAGE]
    shown = pd.DataFrame({"setting": names, "value": [str(getattr(settings, name)) for name in names]})
    key = f"edit-settings-{choice.method}-{settings.preset}-{choice.problem}"
    st.caption(f"{settings.preset}: {SOURCES[settings.preset]}. Values can be changed.")
    st.data_editor(
        shown,
        key=key,
        hide_index=True,
        disabled=["setting"],
        height=220,
        on_change=lambda: _changed(names, st.session_state[key], prediction.model),
    )
    if choice.settings:
        st.button("As the preset says", key="edit-settings-back", on_click=lambda: state.choose("edit", settings=()))


def _changed(names: list[str], edited: Any, info: Any) -> None:
    """Take a changed value if it can be one."""
    choice = state.view().edit
    values = dict(text.split("=", 1) for text in choice.settings)
    values |= {names[int(row)]: str(cells["value"]) for row, cells in edited["edited_rows"].items() if "value" in cells}
    told = tuple(f"{name}={value}" for name, value in values.items())
    try:
        requests.edit_settings(replace(choice, settings=told), info)
    except SpecError as error:
        st.session_state[REFUSED] = error
        return
    st.session_state.pop(REFUSED, None)
    state.choose("edit", settings=told)


def _own_facts() -> None:
    """A table of facts that are edited together with the one above."""
    st.caption(
        "Facts that are edited together with this one: MEMIT spreads all over its layers, the others take turns."
    )
    given = st.session_state.setdefault(_OWN_FACTS, pd.DataFrame(columns=list(FACTS), dtype=str))
    st.session_state[_WRITTEN] = st.data_editor(
        given,
        key="edit-facts",
        num_rows="dynamic",
        hide_index=True,
        height=150,
        column_config={"new_answer": "new answer"},
    ).to_dict("records")


def _written() -> list[dict[str, Any]]:
    return st.session_state.get(_WRITTEN, [])


def facts_file(rows: Any, files: dict[str, bytes]) -> str | None:
    """The facts of a table as a file; None where it has none.

    Args:
        files: takes the file, by its name.

    Raises:
        DatasetError: a row is incomplete.
    """
    kept = []
    for number, row in enumerate(rows, start=1):
        values = [str(row.get(name) or "").strip()[:MAX_TEXT] for name in FACTS]
        if not any(values):
            continue
        if not values[0] or not values[1] or not values[2]:
            raise DatasetError(
                f"fact {number} of the table lacks prompt, subject or answer", "fill the row or empty it"
            )
        kept.append(values)
    if len(kept) > MAX_FACTS:
        raise DatasetError(f"{len(kept)} facts are more than {MAX_FACTS}", "edit fewer at once")
    return _csv("facts", FACTS, kept, files) if kept else None


def probes_file(text: str, files: dict[str, bytes]) -> str | None:
    """One's own probes, one a line, as a file: the prompt, and behind a bar its true answer where it has one.

    Args:
        files: takes the file, by its name.
    """
    rows = []
    for line in text.splitlines()[:MAX_PROBES]:
        prompt, _, answer = line.partition("|")
        if prompt.strip():
            rows.append([prompt.rstrip(), "own", answer.strip()])
    return _csv("probes", ("prompt", "kind", "answer"), rows, files) if rows else None


def _csv(name: str, columns: Any, rows: Any, files: dict[str, bytes]) -> str:
    written = io.StringIO()
    csv.writer(written).writerows([columns, *rows])
    content = written.getvalue().encode("utf-8", "surrogatepass")
    named = f"{name}-{hashlib.sha256(content).hexdigest()[:8]}.csv"
    files[named] = content
    return named


@contextmanager
def at_hand(spec: Any, files: Mapping[str, bytes]) -> Iterator[Any]:
    """A request with the files that it names on disk, for a ``with`` block."""
    with tempfile.TemporaryDirectory(prefix="factscope-edit-") as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)

        def path(name: str | None) -> str | None:
            return None if name is None else str(Path(folder) / name)

        yield replace(
            spec, facts=path(spec.facts), evaluation=replace(spec.evaluation, probes=path(spec.evaluation.probes))
        )


def take_file(content: bytes) -> Any:
    """Read an uploaded edit and put it on top of the stack, off.

    Raises:
        EditError: it is damaged, too large, of another model, there already, or there is no room.
    """
    from factscope.editors.edit import with_edits
    from factscope.editors.files import load_edit, shown

    own, choice = stack.mine(), state.view().model
    own.refuse(len(content))
    with tempfile.TemporaryDirectory(prefix="factscope-edit-") as folder:
        place = Path(folder) / "file"
        place.write_bytes(content)
        try:
            edit = load_edit(place)
        except EditError as error:  # the visitor knows no folder of this machine
            raise EditError(error.what.replace(shown(place), "of this file"), error.try_) from error
    model = runs.loaded(choice.original)
    if model is not None:  # else it is asked when the edit is on
        with_edits(model, (edit,))
    return own.push(edit, choice)

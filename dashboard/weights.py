"""The weight state on the page: the badge in the frame, and the list of edits with its switches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import streamlit as st

from dashboard import messages, parts, stack, state
from dashboard.link import ModelChoice
from dashboard.panels import edit_file
from dashboard.stack import Entry
from factscope.errors import EditError, FactScopeError

REFUSED = "edit-refused"
"""Where the session keeps why its last edit was not taken."""
_ON_PAGE = "weights-gone"
_DONE = {"fact-erasure": "erased", "fact-amplification": "amplified", "fact-forcing": "forced"}


def begin() -> None:
    """Start of a run of the script: edits that were undone in another window of this visitor are no longer on."""
    model = state.view().model
    kept = tuple(key for key in model.edits if _find(key) is not None)
    if kept != model.edits:
        state.change(model=replace(model, edits=kept))
        st.session_state[_ON_PAGE] = len(model.edits) - len(kept)


def badge() -> None:
    """Grey "Original weights", or amber with what was edited, and the ways to see and to undo it."""
    model = state.view().model
    if not model.edits:
        _unedited(model)
        return
    top = model.edits[len(model.edits) - 1]
    edit = _find(top)
    last = "" if edit is None else stack.words(edit)
    with st.container(key="weight-badge", horizontal=True, vertical_alignment="center", gap="small", width="content"):
        st.badge(
            f"EDITED \u00d7{len(model.edits)}: {last}" + (" \u2026" if len(model.edits) > 1 else ""),
            color="orange",
            icon=":material/edit:",
            help="All pages show the model with these edits on. The weights themselves are never written.",
        )
        if st.button("view", key="weight-view", type="tertiary", help="The edits, with a switch for each"):
            st.switch_page("../pages/edit.py")
        own = stack.mine().find(top) is not None
        st.button(
            "undo" if own else "off",
            key="weight-undo",
            type="tertiary",
            on_click=undo if own else state.switch,
            args=[top] if own else [top, False],
            help="Take the last edit away; those before it stay." if own else "Switch this link's edit off.",
        )


def _unedited(model: ModelChoice) -> None:
    random = model.name.startswith("random:")
    off = len(stack.mine().entries(model))
    st.badge(
        "Random weights" if random else "Original weights",
        color="orange" if random else "gray",
        icon=":material/casino:" if random else ":material/lock:",
        help="The null control: this architecture, nothing learned."
        if random
        else "No edit is applied: the weights are as they were loaded."
        + (f" {off} of your edits {'is' if off == 1 else 'are'} off." if off else ""),
    )


def notes() -> None:
    """What must be said of the weight state, once."""
    gone = st.session_state.pop(_ON_PAGE, 0)
    if gone:
        number = "An edit" if gone == 1 else f"{gone} edits"
        parts.note("warn", [f"{number} that this window showed was undone or is no longer kept."], key="weights-gone")


def undo(key: str) -> None:
    """Take an edit away, here and in every other window of this visitor."""
    state.switch(key, False)
    stack.mine().undo(key)


def _find(key: str) -> Any | None:
    entry = stack.mine().find(key)
    return stack.borrowed().get(key) if entry is None else entry.edit


# ---------------------------------------------------------------------------------------------------------- the list


def panel() -> None:
    """The visitor's edits of this model: on or off, undo, save, share; those of his link; a file to load."""
    model = state.view().model
    entries = stack.mine().entries(model)
    for entry in entries:
        with messages.caught():
            _row(entry, entry.key in model.edits)
    for key, edit in stack.borrowed().items():
        if stack.mine().find(key) is None:
            _guest(key, edit, key in model.edits)
    if not entries and not stack.borrowed():
        parts.note(
            "quiet", ["No edit yet. What you apply stays private to you, and every page shows it."], key="no-edit"
        )


def load() -> None:
    """A file to load."""
    with st.popover("Load a saved edit", icon=":material/upload_file:", type="tertiary", key="edit-load"):
        given = st.file_uploader("An edit that FactScope saved", type=["safetensors"], key="edit-file")
        st.button("Put it on the stack", key="edit-take", disabled=given is None, on_click=_take, args=[given])


def _take(given: Any) -> None:
    from dashboard import edit_entries

    try:
        entry = edit_entries.take_file(given.getvalue())
    except FactScopeError as error:
        st.session_state[REFUSED] = error
        return
    st.session_state.pop(REFUSED, None)
    state.switch(entry.key, True)


def _row(entry: Entry, on: bool) -> None:
    with st.container(key=f"edit-row-{entry.key}"):
        parts.note("plain", [f"{entry.number}. {said(entry.edit)}", _made(entry)], key=f"edit-said-{entry.key}")
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key=f"edit-do-{entry.key}"):
        st.toggle(
            f"Edit {entry.number} on",
            on,
            key=state.seed(f"edit-on-{entry.key}", on),
            on_change=lambda: state.switch(entry.key, bool(st.session_state[f"edit-on-{entry.key}"])),
            width="content",
        )
        st.button("Undo", key=f"edit-undo-{entry.key}", icon=":material/undo:", on_click=undo, args=[entry.key])
        with st.popover("", icon=":material/more_horiz:", type="tertiary", key=f"edit-more-{entry.key}"):
            st.download_button(
                "Save (safetensors)",
                data=lambda: saved(entry.edit),
                file_name=edit_file(entry.key),
                mime="application/octet-stream",
                on_click="ignore",
                key=f"edit-save-{entry.key}",
            )
            st.toggle(
                "Links carry this edit",
                entry.shared,
                key=state.seed(f"edit-share-{entry.key}", entry.shared),
                on_change=lambda: stack.mine().share(entry.key, bool(st.session_state[f"edit-share-{entry.key}"])),
                help="The address says which edits are on. Only if this is ticked, whoever opens it gets the edit too; "
                "without it he sees the original weights, and is told so.",
            )


def _guest(key: str, edit: Any, on: bool) -> None:
    with st.container(key=f"edit-row-{key}"):
        parts.note("plain", [said(edit), "Came with the link; it is not in your stack."], key=f"edit-said-{key}")
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key=f"edit-do-{key}"):
        st.toggle(
            "Edit of the link on",
            on,
            key=state.seed(f"edit-on-{key}", on),
            on_change=lambda: state.switch(key, bool(st.session_state[f"edit-on-{key}"])),
            width="content",
        )
        st.button("Keep", key=f"edit-keep-{key}", on_click=_keep, args=[edit], help="Put it into your own stack.")


def _keep(edit: Any) -> None:
    try:
        stack.mine().push(edit, state.view().model)
    except EditError as error:
        st.session_state[REFUSED] = error


def said(edit: Any) -> str:
    """What an edit says: "Eiffel Tower → Rome (ROME, layer 2, error injection)", "Eiffel Tower: Paris erased (...)"."""
    if not edit.facts:
        return stack.words(edit)
    fact, done = edit.facts[0], _DONE.get(edit.problem)
    more = f" and {len(edit.facts) - 1} more" if len(edit.facts) > 1 else ""
    target = fact.target.strip()
    wanted = "" if not target else f": {target} {done}" if done else f" \u2192 {target}"
    return f"{fact.subject}{wanted}{more} ({stack.words(edit)}, {edit.problem.replace('-', ' ')})"


def _made(entry: Entry) -> str:
    """In which weight state it was computed, where that is not the original one."""
    own = stack.mine()
    before = own.made_with(entry)
    if before is None:
        made = "computed in another weight state, with edits that are not here"
    elif before:
        here = {other.number for other in own.entries(entry.model)}
        gone = [number for number in before if number not in here]
        made = f"computed with edit{'s' if len(before) > 1 else ''} {', '.join(map(str, before))} on"
        made += f" ({', '.join(map(str, gone))} undone since; this change is as it was)" if gone else ""
    else:
        made = "computed on the original weights"
    size = entry.edit.n_bytes
    memory = f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:,.0f} KiB"
    return f"{made}; key {entry.key}, {memory}" + ("; links carry it" if entry.shared else "")


def saved(edit: Any) -> bytes:
    """The file of an edit."""
    import tempfile
    from pathlib import Path

    from factscope.editors.files import save_edit

    with tempfile.TemporaryDirectory(prefix="factscope-edit-") as folder:
        path = Path(folder) / edit_file(edit.key)
        save_edit(edit, path)
        return path.read_bytes()

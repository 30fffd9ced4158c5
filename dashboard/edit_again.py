"""An edit's probes where other edits are on now than when they were asked: what differs, and the same probes again.

What an edit did depends on what else is on. Probes that were asked in another weight state say nothing of the present
one: that is said, and they are asked again, by a run like any other, on click where it would take long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import streamlit as st

from dashboard import messages, panels, parts, runs, stack, state
from dashboard.executor import Snapshot
from dashboard.stack import Entry

SLOT = "edit-again"


def present(entry: Entry) -> Any | None:
    """The probes of an edit in the weight state that the pages show; None while they were asked in another one."""
    if _asked_now(entry):
        runs.release(SLOT)
        return entry.evaluation
    key = f"{entry.key} with {' '.join(state.view().model.edits)}"
    seconds = entry.evaluation.seconds - float(entry.edit.report.get("seconds", 0.0))
    if seconds > runs.ASK_ABOVE_SECONDS and not runs.was_started(key):
        runs.release(SLOT)
        parts.note("warn", [f"These probes were asked {_differs(entry)}."], key="edit-other-state")
        st.button(
            f"Ask again, {runs.duration(seconds)}", key="edit-ask-again", icon=":material/play_arrow:",
            on_click=runs.start, args=[key],
        )  # fmt: skip
        return None
    found = _ask(entry)
    if found.result is None:
        parts.note("warn", [f"These probes were asked {_differs(entry)}."], key="edit-other-state")
        _bar(found)
    else:
        parts.note("quiet", [f"Asked again: the first time it was {_differs(entry)}."], key="edit-asked-again")
    return found.result


def _asked_now(entry: Entry) -> bool:
    """Whether the stored probes are of what is on now; in which order edits are on changes nothing of what they add."""
    from factscope.editors.edit import fingerprint

    edits = stack.edits(state.view().model)
    others = [edit for edit in edits if edit.key != entry.key]
    return entry.evaluation.edited.weights == fingerprint(entry.edit.model.weights, [*others, entry.edit])


def _differs(entry: Entry) -> str:
    """In words: "with edits 1 and 2 on; now only edit 2 is"."""
    own, model = stack.mine(), state.view().model
    before = own.made_with(entry)
    now = [other.number for other in own.entries(model) if other.key in model.edits]
    of_link = len(model.edits) - len(now)
    if before is None:
        asked = "with other edits on, which are not in your stack"
    else:
        asked = f"with {_named(sorted({*before, entry.number}))} on"
    fewer = not of_link and before is not None and set(now) < {*before, entry.number}
    shown = f"{'only ' if fewer else ''}{_named(now)}"
    shown += f" and {of_link} of the link" if of_link else ""
    are = "is" if len(now) + of_link == 1 else "are"
    return f"{asked}; now {shown} {are}"


def _named(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"edit {numbers[0]}"
    return f"edits {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _ask(entry: Entry) -> Snapshot:
    """The same probes with and without the edit, the others as they are now."""
    stored = entry.evaluation

    def compute(model: Any, progress: Any) -> Any:
        from factscope.editors.edit import with_edits
        from factscope.experiments import editing

        others = [edit for edit in model.edits if edit.key != entry.key]
        found = editing.evaluate(
            with_edits(model.original, others), entry.edit, [fact.probes for fact in stored.facts],
            replace(stored.spec.evaluation, probes=None), query=stored.query.query, progress=progress,
        )  # fmt: skip
        return replace(found, spec=stored.spec)

    return runs.ask(SLOT, "probes asked again", [entry.key], compute, keep=False)


def _bar(found: Snapshot) -> None:
    """How far it is, or why there is nothing."""
    if found.error is not None:
        messages.show_error(found.error)
    if found.finished:
        st.button("Ask again", key="edit-ask-again", on_click=runs.again, args=[SLOT])
        return
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="edit-again-bar"):
        said = f"asking them again: {panels.progress_words(found)}"
        st.progress(found.done / found.total if found.total else 0.0, text=said)
        st.button("Cancel", key="cancel-edit-again", on_click=runs.cancel, args=[SLOT], type="tertiary")

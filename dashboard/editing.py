"""An edit on its way into the stack: what is asked, what it will cost, the run, and what became of it.

The run has a slot of its own and is asked for by every run of the script while it is under way, whatever page is shown;
once it is done, the edit goes on top of the visitor's stack and is switched on. What a visitor asked for stands beside
his stack, so that a reload finds the run again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import streamlit as st

from dashboard import edit_cost, edit_entries, panels, runs, stack, state
from dashboard.executor import Snapshot, Work
from dashboard.link import ModelChoice
from dashboard.stack import Stack
from dashboard.weights import REFUSED
from factscope.errors import EditError
from factscope.queries import Query

_NUMBER = "edit-number"


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """An edit that was asked for.

    Attributes:
        model: in the weight state that it is computed on.
        files: what the visitor wrote, by the names that the spec has for them: they outlive his session.
        expected: seconds that it should take.
    """

    number: int
    query: Query
    spec: Any
    model: ModelChoice
    files: Mapping[str, bytes] = field(default_factory=dict)
    expected: float | None = None


def begin() -> None:
    """Start of a run of the script: put an edit that is done into the stack, and go on watching one that is not."""
    own = stack.mine()
    if own.asked is None:
        _taken_elsewhere(own)
        return
    found = _watch(own.asked)
    if found.state == "done":
        _take(own, own.asked, found.result)
    elif found.state in ("failed", "cancelled"):
        own.asked = None
        st.session_state[REFUSED] = found.error or EditError(
            "the edit was cancelled, and nothing of it remains", "apply it again"
        )


def apply(query: Query, spec: Any, files: Mapping[str, bytes], expected: float | None = None) -> None:
    """Start the edit; one at a time, in whichever window of the visitor."""
    own, model = stack.mine(), state.view().model
    st.session_state.pop(REFUSED, None)
    if own.asked is not None and own.asked.number == st.session_state.get(_NUMBER):
        return  # clicked twice in this window

    def make(number: int) -> Asked:
        return Asked(number=number, query=query, spec=spec, model=model, files=files, expected=expected)

    try:
        st.session_state[_NUMBER] = own.ask(make)
    except EditError as error:
        st.session_state[REFUSED] = error


def under_way() -> Snapshot | None:
    """The run of the edit that was asked for."""
    asked = stack.mine().asked
    return None if asked is None else _watch(asked)


def refused() -> Exception | None:
    """Why the last edit did not come about; None where nothing was refused."""
    return st.session_state.get(REFUSED)


def cancel() -> None:
    """Stop it; nothing of it remains."""
    runs.cancel(runs.APPLY)


def progress_words(found: Snapshot) -> str:
    """How far the edit is: "computing it, 40%, about 2 s left"."""
    if found.state == "waiting" or not found.total:
        return panels.progress_words(found)
    if not found.done:
        return "contexts and keys \u2026"
    doing = "asking the probes" if hasattr(found.partial, "rows") else "computing the edit"
    left = "" if found.seconds_left is None else f", {runs.duration(found.seconds_left)} left"
    return f"{doing}, {100 * found.done // found.total}%{left}"


def _watch(asked: Asked) -> Snapshot:
    own, learn = stack.mine(), edit_cost.learner(asked.model, asked.spec, asked.expected)
    try:
        edits = stack.edits(asked.model)
    except EditError as error:
        return Snapshot(key="", state="failed", error=error)

    def compute(model: Any, progress: Any) -> Any:
        from factscope.editors.compute import delta_bytes
        from factscope.experiments import editing

        with edit_entries.at_hand(asked.spec, asked.files) as spec:
            settings = editing.chosen_settings(model, spec)
            own.refuse(delta_bytes(model, settings, len(editing.facts_to_edit(model, asked.query, spec))))
            found = editing.run(model, asked.query, spec, progress=progress)
        learn(found.seconds)
        return replace(found, spec=asked.spec)

    key = runs.digest([own.visitor, asked.number, asdict(asked.query), repr(asked.spec), asdict(asked.model)])
    prepare = lambda tell: runs.use(asked.model, tell, edits)  # noqa: E731
    return runs.do(runs.APPLY, key, Work(prepare=prepare, compute=compute, label="edit", keep=False))


def _take(own: Stack, asked: Asked, result: Any) -> None:
    """Put what was made on top of the stack and switch it on."""
    own.asked = None
    own.taken[asked.number] = result.edits[0].key
    st.session_state.pop(_NUMBER, None)
    runs.release(runs.APPLY)
    if own.find(result.edits[0].key) is not None:
        state.switch(result.edits[0].key, True)  # the same again, or another window of this visitor was faster
        return
    try:
        entry = own.push(result.edits[0], asked.model, result)
    except EditError as error:
        st.session_state[REFUSED] = error
        return
    if state.view().model.original == asked.model.original:
        state.switch(entry.key, True)
        runs.begin()  # another weight state: what was asked of the one before ends now, not what is asked from here on


def _taken_elsewhere(own: Stack) -> None:
    """Another window of this visitor was faster: what was applied in this one is on in this one, too."""
    key = own.taken.get(st.session_state.pop(_NUMBER, None))
    entry = None if key is None else own.find(key)
    if entry is not None and state.view().model.original == entry.model:
        state.switch(entry.key, True)
        runs.begin()


def shown() -> stack.Entry | None:
    """The edit whose probes the page shows: the last one that is on."""
    model = state.view().model
    found = [entry for entry in stack.mine().entries(model) if entry.key in model.edits]
    return found[-1] if found else None


def radius(query: Query, answer: str) -> Snapshot:
    """What an edit of this fact may move, and what the model says of it now."""

    def compute(model: Any, progress: Any) -> Any:
        from factscope.experiments.blast_radius import blast_radius

        return blast_radius(model, query.prompt, query.subject or "", answer, progress=progress)

    return runs.ask("edit-radius", "blast radius", [query.prompt, query.subject, answer], compute)


def used_layers(settings: Any, n_layers: int) -> tuple[int, ...]:
    """The layers that settings edit."""
    from factscope.editors.presets import default_layers

    return settings.layers or default_layers(settings.method, n_layers)


def choose(name: str, value: Any) -> None:
    """Choose method, problem or preset; what was set of the one before is no setting of the next."""
    if getattr(state.view().edit, name) != value:
        state.choose("edit", **{name: value}, **({} if name == "problem" else {"settings": (), "layers": ()}))
        if name == "method":
            state.choose("edit", preset=None)


def finished(entry: stack.Entry) -> Snapshot:
    """An edit of the stack as a run that is done."""
    return Snapshot(key=entry.key, state="done", result=entry.evaluation)

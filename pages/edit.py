"""Can I change it, and what else moves? An edit's settings, what is near, the probes before and after, the stack."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import streamlit as st

from dashboard import (
    edit_again,
    edit_cost,
    edit_entries,
    edit_export,
    edit_statistics,
    edit_words,
    editing,
    figures,
    flow_of_edit,
    messages,
    panels,
    parts,
    probes,
    requests,
    runs,
    state,
    weights,
)
from dashboard.link import MAX_NAME, layers, layers_text

METHODS = {"rome": "ROME", "memit": "MEMIT", "ft": "FT"}
PROBLEMS = {
    "error-injection": "error injection",
    "fact-erasure": "fact erasure",
    "fact-amplification": "fact amplification",
    "fact-forcing": "fact forcing",
    "tracing-reversal": "tracing reversal",
}
PLACEHOLDER = "?"
"""Stands for the new answer while its cost is counted before it is named."""
PROBLEMS_HELP = (
    "What the edit is to do (Hase et al. 2023). error injection: say another answer. fact erasure: say the true one "
    "less. fact amplification: say it more. fact forcing: say it although the subject is noised. tracing reversal: say "
    "what the noised subject gives."
)


@dataclass(frozen=True, kw_only=True)
class Form:
    """What is to be done.

    Attributes:
        spec: the request. settings: those that it has. files: what the visitor wrote, by the names in the request.
    """

    spec: Any
    settings: Any
    files: dict[str, bytes] = field(default_factory=dict)


def draw() -> None:
    prediction = panels.prediction()
    if prediction is None:
        return
    left, right = st.columns([0.66, 0.34], gap="medium")
    with left, messages.caught():
        line = panels.heading("Edit this fact", "edit")
        _apply(line, prediction, _form(prediction))
    with right, messages.caught():
        panels.heading("Your edits", "edit")
        weights.panel()
        with st.container(horizontal=True, vertical_alignment="center", gap="small", key="edit-files"):
            weights.load()
            edit_export.show()
        _refused()
    entry, found = editing.shown(), editing.under_way()
    edited = entry is not None and prediction.query.query.prompt in {fact.text for fact in entry.edit.facts}
    if entry is None or entry.evaluation is None or not edited:
        _before(prediction, found)
    if entry is not None and entry.evaluation is not None:
        _after(entry, found)


def _form(prediction: Any) -> Form:
    """What is to be done."""
    choice = state.view().edit
    method, problem, target, place, preset = st.columns([0.26, 0.25, 0.19, 0.13, 0.17], gap="small")
    _segmented(method, "Method", "method", METHODS, choice.method)
    _select(problem, "Problem", "problem", PROBLEMS, choice.problem, PROBLEMS_HELP)
    injection = choice.problem == requests.INJECTION
    target.text_input(
        "New answer", choice.target or "", key=state.seed("edit-target", choice.target or ""), max_chars=MAX_NAME,
        on_change=state.on_change("edit-target", "edit", "target", lambda text: text.strip() or None),
        disabled=not injection, placeholder="what it should say" if injection else "found by itself",
    )  # fmt: skip
    settings = requests.edit_settings(choice, prediction.model)
    used = layers_text(editing.used_layers(settings, prediction.model.n_layers))
    place.text_input(
        "Layers", used, key=state.seed("edit-layers", used), max_chars=60, on_change=_read_layers,
        help="5, 3-7 or 3,5. Empty takes those of the preset.",
    )  # fmt: skip
    names = requests.preset_names(choice.method)
    name = requests.preset_name(choice, prediction.model)
    _select(preset, "Settings of", "preset", {n: n for n in dict.fromkeys([name, *names])}, name)
    rows, own = edit_entries.more(prediction, settings, choice)
    files: dict[str, bytes] = {}
    facts, own_probes = edit_entries.facts_file(rows, files), edit_entries.probes_file(own, files)
    spec = requests.editing(choice, prediction.model, facts=facts, probes=own_probes)
    return Form(spec=spec, settings=settings, files=files)


def _apply(line: Any, prediction: Any, form: Form) -> None:
    """Apply with what it will cost, or how far it is; then where the statistics come from."""
    found, query, spec = editing.under_way(), prediction.query.query, form.spec
    unnamed = spec.problem == requests.INJECTION and not spec.new_answer
    statistics = edit_statistics.ask(form.settings)
    cost = edit_cost.ask(query, replace(spec, new_answer=PLACEHOLDER) if unnamed else spec, form.files)
    with line:
        if found is not None and not found.finished:
            st.progress(found.done / found.total if found.total else 0.0, text=editing.progress_words(found))
            st.button("Cancel", key="cancel-edit-apply", on_click=editing.cancel, type="tertiary")
        else:
            lacking = statistics.result is not None and statistics.result.error is not None
            st.button(
                "Apply", key="edit-apply", icon=":material/edit:", type="primary", on_click=editing.apply,
                args=[query, spec, form.files, edit_cost.expected(cost)],
                disabled=unnamed or lacking or statistics.error is not None or cost.error is not None,
                help="Name the new answer first." if unnamed else None,
            )  # fmt: skip
            st.caption(edit_cost.words(cost, spec), width="content")
    edit_statistics.show(statistics)
    edit_statistics.watch()
    if cost.error is not None and statistics.error is None:
        messages.show_error(cost.error)


def _refused() -> None:
    error = editing.refused()
    if error is not None:
        messages.show_error(error)


def _before(prediction: Any, found: Any) -> None:
    """What is near the fact; while an edit is computed, its loss."""
    left, right = st.columns([0.66, 0.34], gap="medium")
    with left, messages.caught():
        panels.heading("What may move with it", "edit")
        near = editing.radius(prediction.query.query, prediction.target.text.strip())
        if near.error is not None:
            messages.show_error(near.error)
        elif near.result is not None:
            probes.near(near.result)
    with right, messages.caught():
        if found is not None and found.partial is not None:
            _loss(found.partial, found, "now")


def _after(entry: Any, found: Any) -> None:
    """The probes of the last edit that is on in the present weight state, its scores and its loss."""
    evaluation = entry.evaluation
    line = panels.heading(f"Edit {entry.number} of {entry.edit.facts[0].subject}: before and after", "edit")
    with line:
        said = (
            ""
            if entry.edit.problem == requests.INJECTION
            else f", the target of {entry.edit.problem.replace('-', ' ')}"
        )
        st.caption(f"p(new) is of {', '.join(edit_words.targets(evaluation))}{said}", width="content")
    with messages.caught():
        flow_of_edit.show(entry.edit)
    with messages.caught():
        now = edit_again.present(entry)
        shown = evaluation if now is None else now
        again = shown is not evaluation
        probes.show(
            shown, edit_words.lines_again(shown) if again else edit_words.python_lines(shown), stale=now is None
        )
        probes.scores(shown)
        messages.show_warnings(shown.warnings)
    left, right = st.columns([0.5, 0.5], gap="medium")
    with left, messages.caught():
        if found is not None and not found.finished and found.partial is not None:
            _loss(found.partial, found, "now")
        else:
            _loss(evaluation, editing.finished(entry), "last")
    with right, messages.caught():
        parts.note("plain", edit_words.report_words(entry.edit), key="edit-report")
        st.code(edit_words.python_lines(evaluation), language="python")


def _loss(source: Any, found: Any, name: str) -> None:
    table = edit_words.losses(source)
    if not len(table):
        return
    panels.heading("Loss", "edit")
    shown = figures.loss_curve(table, edit_words.steps(source), edit_words.caption(source))
    panels.figure(
        shown, name=f"loss-{name}", found=found, code=edit_words.python_lines(source), height=180, point=False
    )


def _segmented(place: Any, label: str, name: str, options: dict[str, str], value: str) -> None:
    key = f"edit-{name}"
    place.segmented_control(
        label, list(options), format_func=options.__getitem__, default=value, key=state.seed(key, value),
        on_change=lambda: editing.choose(name, st.session_state[key] or value),
    )  # fmt: skip


def _select(
    place: Any, label: str, name: str, options: dict[str, str], value: str, explained: str | None = None
) -> None:
    key = f"edit-{name}"
    place.selectbox(
        label, list(options), list(options).index(value), format_func=lambda one: options.get(one, one),
        help=explained, key=state.seed(key, value),
        on_change=lambda: editing.choose(name, st.session_state[key] or value),
    )  # fmt: skip


def _read_layers() -> None:
    found = layers(str(st.session_state["edit-layers"]))
    if found is not None:
        state.choose("edit", layers=found)


runs.live(draw)

"""Can I change it, and what else moves? An edit's settings, what is near, the probes before and after, the stack."""

from __future__ import annotations

from typing import Any

import streamlit as st

from dashboard import editing, figures, flow_of_edit, messages, panels, parts, probes, requests, runs, state, weights
from dashboard.link import MAX_NAME, layers, layers_text

METHODS = {"rome": "ROME", "memit": "MEMIT", "ft": "FT"}
PROBLEMS = {
    "error-injection": "error injection: say something else",
    "fact-erasure": "fact erasure: say it less",
    "fact-amplification": "fact amplification: say it more",
    "fact-forcing": "fact forcing: say it with a noised subject",
    "tracing-reversal": "tracing reversal: say what the noised subject gives",
}


def draw() -> None:
    prediction = panels.prediction()
    if prediction is None:
        return
    left, right = st.columns([0.66, 0.34], gap="medium")
    with left, messages.caught():
        line = panels.heading("Edit this fact", "edit")
        spec, settings, n_facts = _form(prediction)
        _apply(line, prediction, spec, settings, n_facts)
    with right, messages.caught():
        panels.heading("Your edits", "edit")
        weights.panel()
        weights.load()
        _refused()
    entry, found = editing.shown(), editing.under_way()
    if entry is None or entry.evaluation is None:
        _before(prediction, found)
    else:
        _after(entry, found)


def _form(prediction: Any) -> tuple[Any, Any, int]:
    """What is to be done: gives the request, the settings that it has, and how many facts are edited."""
    choice = state.view().edit
    method, problem, target, place, preset = st.columns([0.27, 0.24, 0.17, 0.13, 0.19], gap="small")
    _segmented(method, "Method", "method", METHODS, choice.method)
    _select(problem, "Problem", "problem", PROBLEMS, choice.problem)
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
    rows, own = editing.more(prediction, settings, choice)
    facts, n_more = editing.facts_file(rows)
    spec = requests.editing(choice, prediction.model, facts=facts, probes=editing.probes_file(own))
    return spec, settings, 1 + n_more


def _apply(line: Any, prediction: Any, spec: Any, settings: Any, n_facts: int) -> None:
    found = editing.under_way()
    with line:
        if found is not None and not found.finished:
            st.progress(found.done / found.total if found.total else 0.0, text=panels.progress_words(found))
            st.button("Cancel", key="cancel-edit-apply", on_click=editing.cancel, type="tertiary")
        else:
            missing = spec.problem == requests.INJECTION and not spec.new_answer
            st.button(
                "Apply", key="edit-apply", icon=":material/edit:", type="primary", on_click=editing.apply,
                args=[prediction.query.query, spec], disabled=missing,
                help="Name the new answer first." if missing else None,
            )  # fmt: skip
            several = f"{n_facts} facts, " if n_facts > 1 else ""
            st.caption(f"{several}{editing.cost(prediction, settings, n_facts)}", width="content")
    statistics = editing.statistics(settings)
    parts.note("quiet", editing.statistics_words(statistics), key="edit-statistics")
    if statistics.error is not None:
        messages.show_error(statistics.error)


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
    """The probes of the last edit that is on, its scores and its loss."""
    evaluation = entry.evaluation
    line = panels.heading(f"Edit {entry.number}: before and after", "edit")
    with line:
        st.caption(f"p(new) is of {', '.join(editing.targets(evaluation))}", width="content")
    with messages.caught():
        flow_of_edit.show(entry.edit)
    with messages.caught():
        probes.scores(evaluation)
        probes.show(evaluation)
        messages.show_warnings(evaluation.warnings)
    left, right = st.columns([0.5, 0.5], gap="medium")
    with left, messages.caught():
        if found is not None and not found.finished and found.partial is not None:
            _loss(found.partial, found, "now")
        else:
            _loss(evaluation, editing.finished(entry), "last")
    with right, messages.caught():
        parts.note("plain", editing.report_words(entry.edit), key="edit-report")
        st.code(editing.python_lines(evaluation), language="python")


def _loss(source: Any, found: Any, name: str) -> None:
    table = editing.losses(source)
    if not len(table):
        return
    panels.heading("Loss", "edit")
    shown = figures.loss_curve(table, editing.steps(source), editing.caption(source))
    panels.figure(shown, name=f"loss-{name}", found=found, code=editing.python_lines(source), height=180, point=False)


def _segmented(place: Any, label: str, name: str, options: dict[str, str], value: str) -> None:
    key = f"edit-{name}"
    place.segmented_control(
        label, list(options), format_func=options.__getitem__, default=value, key=state.seed(key, value),
        on_change=lambda: editing.choose(name, st.session_state[key] or value),
    )  # fmt: skip


def _select(place: Any, label: str, name: str, options: dict[str, str], value: str) -> None:
    key = f"edit-{name}"
    place.selectbox(
        label, list(options), list(options).index(value), format_func=lambda one: options.get(one, one),
        key=state.seed(key, value), on_change=lambda: editing.choose(name, st.session_state[key] or value),
    )  # fmt: skip


def _read_layers() -> None:
    found = layers(str(st.session_state["edit-layers"]))
    if found is not None:
        state.choose("edit", layers=found)


runs.live(draw)

"""Counterfactual patching on the Trace page: a second question, and what its states do in the run of the first."""

from __future__ import annotations

from typing import Any

import streamlit as st

from dashboard import figures, messages, panels, parts, requests, state
from dashboard.link import MAX_NAME, MAX_PROMPT

DRAWER = "counterfactual-drawer"
DIRECTIONS = {"into_query": "its states into this run", "into_other": "this run's states into its"}
SITES = {"hidden": "state", "mlp": "MLP", "attention": "attention"}
MEASURES = {"probability": "p", "logit_difference": "logit difference"}


def show(prediction: Any) -> None:
    """The drawer: the second question, direction, site, and the map."""
    choice = state.view().patch
    asked = bool(choice.prompt or choice.subject)
    box = st.expander(
        "Counterfactual patching: states of a second question", expanded=asked, key=DRAWER, on_change="rerun"
    )
    if not box.open:
        return
    with box:
        _question()
        _choices()
        if not asked:
            parts.note(
                "quiet", ["Name another subject for the same sentence, or type another sentence."], key="cf-none"
            )
            return
        _map(prediction)


def _question() -> None:
    choice = state.view().patch
    subject, prompt, answer = st.columns([0.28, 0.5, 0.22], gap="small")
    _text(subject, "Other subject", "subject", choice.subject, MAX_NAME, "the query's own")
    _text(prompt, "Other sentence, up to its answer", "prompt", choice.prompt, MAX_PROMPT, "the same with that subject")
    _text(answer, "Its answer", "answer", choice.answer, MAX_NAME, "the model's own")


def _text(place: Any, label: str, name: str, value: str | None, longest: int, empty: str) -> None:
    key = f"cf-{name}"
    place.text_input(
        label,
        value or "",
        key=state.seed(key, value or ""),
        on_change=state.on_change(key, "patch", name, lambda typed: typed.strip() or None),
        max_chars=longest,
        placeholder=empty,
    )


def _choices() -> None:
    choice = state.view().patch
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        _segmented("Patch", "direction", DIRECTIONS, choice.direction)
        _segmented("What", "site", SITES, choice.site)
        _segmented("Effect in", "measure", MEASURES, choice.measure)


def _segmented(label: str, name: str, options: dict[Any, str], value: str) -> None:
    key = f"cf-{name}"
    st.segmented_control(
        label,
        list(options),
        format_func=options.__getitem__,
        default=value,
        key=state.seed(key, value),
        on_change=state.on_change(key, "patch", name, lambda chosen: chosen or value),
    )


def _map(prediction: Any) -> None:
    query, choice = prediction.query.query, state.view().patch
    spec = requests.patching(choice, state.view().trace.window)
    line = panels.heading("What the other question's states bring", "counterfactual")
    passes = requests.map_passes(prediction)
    found = panels.run(line, "counterfactual", "counterfactual_patching", query, spec, passes, prediction)
    if found is None or found.value is None:
        return
    result = found.value
    ours, theirs = result.target.text.strip(), result.other_target.text.strip()
    parts.note(
        "plain",
        [
            f"Here p({ours}) {result.p_clean:.3g}, p({theirs}) {result.p_other_clean:.3g}; there p({ours})"
            f" {result.p_counterfactual:.3g}, p({theirs}) {result.p_other_counterfactual:.3g}:"
            f" {result.other.query.prompt}"
        ],
        key="cf-head",
    )
    doubts = figures.counterfactual_doubts(result, prediction)
    if doubts:
        parts.note("warn", [*doubts, "No place is named as the strongest."], key="cf-doubts")
    panels.figure(
        figures.counterfactual_map(result, choice.measure, doubts),
        name="counterfactual",
        found=found,
        code=panels.python_lines(query, spec, "counterfactual_patching"),
        height=panels.rows_height(len(result.positions)),
        point=choice.direction == "into_query",
    )
    messages.show_warnings([w for w in result.warnings if w not in prediction.warnings])

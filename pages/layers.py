"""Where should one edit? The same edit at every layer beside that layer's trace, and what both say of this fact."""

from __future__ import annotations

from typing import Any

import streamlit as st

from dashboard import (
    compare,
    editing,
    figures,
    layers,
    messages,
    model_drawer,
    panels,
    parts,
    requests,
    runs,
    stack,
    state,
)
from dashboard.link import MAX_NAME
from factscope.editors.presets import layers_around
from factscope.errors import FactScopeError, SpecError, TargetError

SITES = {"hidden": "state", "mlp": "MLP", "attention": "attention"}


def draw() -> None:
    prediction = panels.prediction()
    if prediction is None:
        return
    if prediction.query.subject is None:
        parts.note("plain", ["Edits and traces need the subject. Name it in the fact line."], key="no-subject")
        return
    spec = _controls(prediction)
    missing = spec.problem == requests.INJECTION and not spec.new_answer
    prepared = None if missing else layers.ready(prediction.query.query, spec)
    if prepared is not None and layers.possible(prepared) and compare.show((SCORES,), prediction):
        return
    line = panels.heading("The same edit at every layer", "layers_edit")
    left, right = st.columns([0.62, 0.38], gap="medium")
    found, grey = None, ()
    with left, messages.caught():
        found, grey = _scores(line, prediction, spec, prepared)
    result = None if found is None else found.value
    with right, messages.caught():
        _findings(spec, result, prediction, grey)
        if result is not None:
            _layer(result)


def _controls(prediction: Any) -> Any:
    """What is edited and traced: the edit is that of the Edit page, noise and window are those of the Trace page."""
    view, n_layers = state.view(), prediction.model.n_layers
    choice, trace = view.edit, view.trace
    line = st.container(horizontal=True, vertical_alignment="bottom", gap="small", key="layers-controls")
    line.segmented_control(
        "Method", list(stack.METHODS), format_func=stack.METHODS.__getitem__, default=choice.method,
        key=state.seed("layers-method", choice.method), on_change=_chosen("layers-method", "method"),
    )  # fmt: skip
    line.selectbox(
        "Problem", list(layers.PROBLEMS), list(layers.PROBLEMS).index(choice.problem), width=165,
        format_func=layers.PROBLEMS.__getitem__, key=state.seed("layers-problem", choice.problem),
        on_change=_chosen("layers-problem", "problem"),
    )  # fmt: skip
    injection = choice.problem == requests.INJECTION
    line.text_input(
        "New answer", choice.target or "", key=state.seed("layers-target", choice.target or ""), max_chars=MAX_NAME,
        on_change=state.on_change("layers-target", "edit", "target", lambda text: text.strip() or None), width=155,
        disabled=not injection, placeholder="what it should say" if injection else "found by itself",
    )  # fmt: skip
    names = list(dict.fromkeys([requests.preset_name(choice, prediction.model), *requests.preset_names(choice.method)]))
    line.selectbox(
        "Settings of", names, key=state.seed("layers-preset", names[0]), on_change=_chosen("layers-preset", "preset"),
        help="Single values are changed on the page Edit, and hold here too.", width=135,
    )  # fmt: skip
    size = layers.default_together(choice, prediction.model) if view.layers.together is None else view.layers.together
    line.number_input(
        "At once", 1, n_layers, min(size, n_layers), key=state.seed("layers-together", min(size, n_layers)),
        on_change=state.on_change("layers-together", "layers", "together", int), width=125,
        help="How many layers around each one are edited together.",
    )  # fmt: skip
    line.segmented_control(
        "Trace restores", list(SITES), format_func=SITES.__getitem__, default=view.layers.site,
        key=state.seed("layers-site", view.layers.site),
        on_change=state.on_change("layers-site", "layers", "site", lambda value: value or view.layers.site),
        help="Noise, samples and the seed are those of the page Trace.",
    )  # fmt: skip
    traced = min(requests.trace_window(trace, n_layers), n_layers)
    line.number_input(
        "Window", 1, n_layers, traced, key=state.seed("layers-window", traced), width=125,
        on_change=state.on_change("layers-window", "trace", "window", int), disabled=view.layers.site == "hidden",
        help="Layers of updates that are restored together; a state is restored in one.",
    )  # fmt: skip
    return requests.layers(state.view(), prediction.model)


def _chosen(key: str, name: str) -> Any:
    def write() -> None:
        if st.session_state[key] and not state.is_old(key):
            editing.choose(name, st.session_state[key])

    return write


def _scores(line: Any, prediction: Any, spec: Any, prepared: Any) -> tuple[Any, tuple[int, ...]]:
    """The run and its figure: gives it, and the layers whose trace does not beat random weights.

    Args:
        prepared: whether the run can be; None where the new answer is missing.
    """
    query = prediction.query.query
    with line:
        panels.null_toggle("trace", state.view().trace, prediction)
    if prepared is None or not layers.possible(prepared):
        with line:
            st.button("Run", key="run-layers", icon=":material/play_arrow:", disabled=True)
        _refuse(prediction, spec, prepared)
        return None, ()
    expected = None if prepared.result is None else prepared.result.seconds
    with_null = requests.with_null(state.view().trace, prediction.model.name) and model_drawer.may_be_random()
    cost = layers.cost(prediction, spec, expected, null=with_null)
    passes = requests.map_passes(prediction)
    found = panels.run(line, layers.SLOT, "edit_layers", query, spec, passes, prediction, cost=cost, far=layers.far)
    if found is None or found.value is None:
        parts.note(
            "quiet",
            ["Run edits the fact at each layer, every time from the weights as they are now, and traces it once."],
            key="layers-none",
        )
        return found, ()
    result = found.value
    layers.follow_click(result)
    layers.learn(result, expected)
    null = None
    if with_null and found.finished and found.state != "failed":
        traced, model = result.trace, model_drawer.random_of(state.view().model)
        random = panels.run(
            line, "layers-null", "causal_tracing", traced.query.query, traced.spec, passes, prediction, model=model
        )
        null = None if random is None or random.state != "done" else random.result
    if not result.trace.total_effect > 0:
        said = "No bars: the corruption did not lower the answer's probability, so that there is nothing to restore."
        parts.note("warn", [said], key="layers-untraced")
    edits = stack.edits(state.view().model)
    panels.figure(
        figures.layer_scores(
            result,
            null=null,
            unnamed=figures.no_peak(prediction) or "",
            untraced=figures.why_untraced(figures.trace_doubts(result.trace, prediction), result.trace),
        ),
        name="layers",
        found=found,
        code=panels.python_lines(query, spec, "edit_layers"),
        height=300,
        whole=lambda: layers.document(result, found, edits),
    )
    messages.show_warnings([warning for warning in result.warnings if warning not in prediction.warnings])
    return found, figures.untold_layers(result.trace, null)


def _refuse(prediction: Any, spec: Any, prepared: Any) -> None:
    """Why it cannot be done here, and what can."""
    error = None if prepared is None else prepared.error
    if prepared is None:
        answer = prediction.target.text.strip()
        said = f"Name the new answer first: error injection makes the model say it instead of {answer}."
        parts.note("plain", [said], key="layers-missing")
        return
    if error is None:
        parts.note("warn", layers.says_already(spec), key="layers-already")
        if state.view().model.edits:
            st.button("Ask the original weights", key="layers-original", on_click=state.edit_with, args=[()])
        return
    messages.show_error(error)
    if isinstance(error, TargetError):
        if fields := layers.same_answer(prediction, spec):
            parts.note("plain", fields, key="layers-same")
    elif isinstance(error, SpecError) and "statistics" in str(error):
        with st.container(horizontal=True):
            st.button(
                "Without statistics (identity)", key="layers-identity", on_click=layers.without_statistics,
                help="Every direction of a key weighs alike: an alternative that is labelled so, not an estimate.",
            )  # fmt: skip
            st.button("Finetune instead", key="layers-ft", on_click=editing.choose, args=["method", "ft"])
    elif isinstance(error, FactScopeError) and state.view().edit.method != "ft":
        st.button("Finetune instead", key="layers-ft", on_click=editing.choose, args=["method", "ft"])


def _layer(result: Any) -> None:
    """One layer: its numbers, and the way to edit there."""
    shown = layers.shown_layer(result)
    steer, go = st.columns([0.4, 0.6], gap="small", vertical_alignment="bottom")
    steer.number_input(
        "Layer", 0, result.model.n_layers - 1, shown, key=state.seed("layers-layer", shown),
        on_change=layers.steered, args=["layers-layer", result.query.last],
    )  # fmt: skip
    if go.button("Edit at this layer", icon=":material/edit_note:", width="stretch", key="layers-edit-here"):
        panels.edit_at(layers_around(shown, result.edit_window, result.model.n_layers))
    parts.note("plain", layers.of_layer(result, shown), strong=True, key="layers-of-layer")


def _findings(spec: Any, result: Any, prediction: Any, grey: tuple[int, ...]) -> None:
    """What was found over many facts, beside what this model shows for this one."""
    if result is not None:
        st.markdown("**This model, this fact**")
        parts.note("plain", layers.here(result, prediction, grey), key="layers-here")
    st.markdown("**GPT-J, hundreds of facts**")
    parts.note("quiet", layers.published(spec), key="layers-published")


SCORES = compare.Panel(
    name="layers",
    heading="Edits by layer",
    method="layers_edit",
    slot=layers.SLOT,
    kind="edit_layers",
    command="layers",
    function="edit_layers",
    spec=lambda view, found: requests.layers(layers.as_b(view), found.model),
    passes=lambda view, found: requests.map_passes(found),
    draw=lambda result, view, unnamed: figures.layer_scores(
        result, unnamed=unnamed, untraced=figures.why_untraced(result.trace.doubts, result.trace)
    ),
    difference=lambda both, view: figures.layers_difference(both),
    cost=lambda view, found: layers.cost(found, requests.layers(layers.as_b(view), found.model), None),
    far=layers.far,
    height=280,
    places=False,
)

runs.live(draw)

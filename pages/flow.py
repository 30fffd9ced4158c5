"""Which tokens must be read, and when? Attention knockout: curve, map, edge builder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import streamlit as st

from dashboard import compare, figures, messages, model_drawer, panels, requests, runs, state
from dashboard.link import MAX_EDGES
from factscope.charts.text import COLUMNS

MEASURES = {"percent": "% of p", "log_odds": "log-odds", "logit_difference": "vs foil"}
NULLS = {"positions": "matched positions", "weights": "random weights"}
_EDGES_HEIGHT = 86
SETS = ["subject", "relation", "last", "subject-first", "subject-last", "special"]


def draw() -> None:
    prediction = panels.prediction()
    if prediction is None:
        return
    _controls(prediction)
    first = bool(state.view().flow.edges) and st.session_state.get(panels.EDGES_FIRST, False)
    if first:
        with messages.caught():
            _edges(prediction)
    if not compare.show((MAP, CURVE), prediction):
        _figures(prediction)
    if not first:
        with messages.caught():
            _edges(prediction)


def _figures(prediction: Any) -> None:
    query, choice = prediction.query.query, state.view().flow
    grid = None
    left, middle, right = st.columns([0.42, 0.36, 0.22], gap="medium")
    with left, messages.caught():
        line = panels.heading("One token at a time", "knockout")
        spec = requests.knockout_map(choice)
        grid = panels.run(
            line, "flow-map", "attention_knockout", query, spec, requests.map_passes(prediction), prediction
        )
        if grid is not None and grid.value is not None:
            code = panels.python_lines(query, spec, "attention_knockout")
            null = _null("flow-map-null", spec, requests.map_passes(prediction), prediction, line)
            shown = figures.knockout_map(grid.value, figures.measure_of(state.view()), null=null)
            rows = panels.rows_height(len(prediction.query.ids))
            panels.figure(
                figures.judged(shown, figures.no_peak(prediction)),
                name="map",
                found=grid,
                code=code,
                height=rows,
                legend=74,
            )
    with middle, messages.caught():
        _curve(prediction)
    with right, messages.caught():
        _detail(prediction, grid)


def _null(slot: str, spec: Any, passes: int, prediction: Any, line: Any) -> Any | None:
    """The same experiment on random weights, if that is the null; as far as it is computed."""
    view = state.view()
    if view.flow.null != "weights" or view.model.name.startswith("random:"):
        return None
    found = panels.null(line, slot, "attention_knockout", spec, passes, prediction)
    return None if found is None else found.value


def _controls(prediction: Any) -> None:
    choice, layers = state.view().flow, prediction.model.n_layers
    window, measure, sources, control, null = st.columns(
        [0.17, 0.23, 0.32, 0.12, 0.16], gap="medium", vertical_alignment="bottom"
    )
    with window:
        size, shown = min(requests.window(choice, layers), layers), figures.measure_of(state.view())
        st.slider(
            "Window of layers",
            1,
            max(2, layers),
            size,
            key=state.seed("flow-window", size),
            on_change=state.on_change("flow-window", "flow", "window"),
            help="How many layers around each layer are blocked at once. Default: the odd number nearest to L/5.",
        )
    with measure:
        st.segmented_control(
            "Change of",
            [name for name in MEASURES if name != "logit_difference" or state.view().fact.foil is not None],
            format_func=MEASURES.__getitem__,
            default=shown,
            key=state.seed("flow-measure", shown),
            on_change=state.on_change("flow-measure", "flow", "measure", lambda value: value or shown),
            help="How strong an effect is: percent of the answer's probability; log-odds in nats, which do not "
            "saturate near p = 1; with a foil, the logit of the answer minus that of the foil.",
        )
    with sources:
        st.multiselect(
            "Sets",
            list(dict.fromkeys([*SETS, *choice.sources])),
            list(choice.sources),
            key=state.seed("flow-sources", list(choice.sources)),
            on_change=state.on_change("flow-sources", "flow", "sources", lambda value: tuple(value) or ("subject",)),
            accept_new_options=True,
            max_selections=8,
            help="Sets of tokens, or positions such as 7 or 3-5; type your own.",
        )
    with control:
        st.number_input(
            "Controls",
            0,
            50,
            choice.control,
            step=1,
            key=state.seed("flow-control", choice.control),
            on_change=state.on_change("flow-control", "flow", "control", int),
            help="Draws of as many random other tokens as each set has, matched for position 0: its null, a band.",
        )
    with null:
        st.selectbox(
            "Null",
            list(NULLS),
            format_func=NULLS.__getitem__,
            index=list(NULLS).index(choice.null),
            key=state.seed("flow-null", choice.null),
            on_change=state.on_change("flow-null", "flow", "null"),
            disabled=not model_drawer.may_be_random(),
            help="What an effect must surpass, or it is grey and not named: random other positions, or the same "
            "experiment on random weights.",
        )


def _curve(prediction: Any) -> None:
    query, choice = prediction.query.query, requests.without_subject(state.view().flow, prediction)
    line, spec = panels.heading("Whole sets of tokens", "knockout"), requests.curve(choice)
    found = panels.run(
        line, "flow-curve", "attention_knockout", query, spec, requests.curve_passes(prediction, choice), prediction
    )
    if found is None or found.value is None:
        return
    sets = replace(spec, control=0)
    null = _null("flow-curve-null", sets, requests.curve_passes(prediction, choice), prediction, line)
    shown = figures.knockout_curve(found.value, figures.measure_of(state.view()), null=null)
    panels.figure(
        figures.judged(shown, figures.no_peak(prediction)),
        name="curve",
        found=found,
        code=panels.python_lines(query, spec, "attention_knockout"),
        height=240,
        legend=60,
    )
    messages.show_warnings(_told([w for w in found.value.warnings if w not in prediction.warnings]))


def _told(warnings: list[str]) -> list[str]:
    """Warnings of the curve; where no control can be drawn, the null that there is instead."""
    if state.view().flow.null == "weights":
        return [w for w in warnings if not w.startswith("no control")]
    other = "; choose random weights as the null (top right)" if model_drawer.may_be_random() else ""
    return [f"{w}{other}" if w.startswith("no control") else w for w in warnings]


def _detail(prediction: Any, grid: Any) -> None:
    line, query = panels.heading("Cell", "lens"), prediction.query.query
    lens = panels.run(
        line, "lens-block", "logit_lens", query, requests.lens(), requests.lens_passes(prediction), prediction
    )
    panels.detail(None if lens is None else lens.value, map_result=None if grid is None else grid.value)


def _edges(prediction: Any) -> None:
    choice = state.view().flow
    box = st.expander(
        "Edge builder: cut any paths together", expanded=bool(choice.edges), key=panels.EDGE_BUILDER, on_change="rerun"
    )
    if not box.open:
        return
    with box:
        line = panels.heading("Does this one path matter?", "edges")
        st.text_area(
            "One group of edges a line: FROM:TO:LAYERS or FROM:TO:LAYERS:HEADS",
            max_chars=800,
            height=100,
            value="\n".join(choice.edges),
            key=state.seed("flow-edges", "\n".join(choice.edges)),
            on_change=_read_edges,
            placeholder="last:subject:3-6",
            help="FROM may not read TO. Sets or positions; layers and heads such as 3-6, 2,5 or *. Ctrl+Enter applies.",
        )
        if not choice.edges:
            return
        pinned = state.view().a
        if pinned is not None and pinned.flow.edges and compare.show((EDGES,), prediction):
            return
        query, spec = prediction.query.query, requests.edges(choice)
        found = panels.run(line, "flow-edges", "attention_knockout", query, spec, 1, prediction)
        if found is not None and found.state == "done":
            code = panels.python_lines(query, spec, "attention_knockout")
            shown = figures.edges(found.result)
            panels.figure(shown, name="edges", found=found, code=code, height=_EDGES_HEIGHT, point=False)
            messages.show_warnings([w for w in found.result.warnings if w not in prediction.warnings])


def _read_edges() -> None:
    lines = [line.strip() for line in str(st.session_state["flow-edges"]).splitlines()]
    state.choose("flow", edges=tuple(line for line in lines if line)[:MAX_EDGES])


MAP = compare.Panel(
    name="map",
    heading="One token at a time",
    method="knockout",
    slot="flow-map",
    kind="attention_knockout",
    command="flow",
    function="attention_knockout",
    spec=lambda view, found: requests.knockout_map(view.flow),
    passes=lambda view, found: requests.map_passes(found),
    draw=lambda result, view, unnamed: figures.knockout_map(result, figures.measure_of(view)),
    difference=lambda both, view: both.map(
        COLUMNS[figures.measure_of(view)],
        "source",
        quantity=figures.measure_of(view),
        what=figures.change_of(both.answer, figures.measure_of(view)),
        axis_title="layer (centre of the blocked window)",
    ),
    row_height=15,
)
CURVE = compare.Panel(
    name="curve",
    heading="Whole sets of tokens",
    method="knockout",
    slot="flow-curve",
    kind="attention_knockout",
    command="flow",
    function="attention_knockout",
    spec=lambda view, found: requests.curve(requests.without_subject(view.flow, found)),
    passes=lambda view, found: requests.curve_passes(found, requests.without_subject(view.flow, found)),
    draw=lambda result, view, unnamed: figures.knockout_curve(result, figures.measure_of(view)),
    difference=lambda both, view: both.curves(
        COLUMNS[figures.measure_of(view)],
        both.table["source"],
        quantity=figures.measure_of(view),
        what=figures.change_of(both.answer, figures.measure_of(view)),
        x_title="layer (centre of the blocked window)",
    ),
    height=200,
)
EDGES = compare.Panel(
    name="edges",
    heading="These paths cut",
    method="edges",
    slot="flow-edges",
    kind="attention_knockout",
    command="flow",
    function="attention_knockout",
    spec=lambda view, found: requests.edges(view.flow),
    passes=lambda view, found: 1,
    draw=lambda result, view, unnamed: figures.edges(result),
    difference=lambda both, view: figures.edges_difference(both),
    height=_EDGES_HEIGHT,
    point=False,
    places=False,
    located=False,
    one_row=True,
)

runs.live(draw)

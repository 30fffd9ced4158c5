"""What stands around a figure: the run bar, the figure with its alternatives and exports, the detail of one cell."""

from __future__ import annotations

import copy
import re
import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from dashboard import figures, help, messages, model_drawer, parts, requests, runs, state
from dashboard.executor import Snapshot
from dashboard.link import ModelChoice
from dashboard.runs import Kind
from factscope.charts import Figure
from factscope.queries import Query

EDGE_BUILDER, EDGES_FIRST = "edge-builder", "edges-first"
POINTED_HEAD = "point-at-head"
_POINTS = 4000
_NARROW, _SLIM = 75, 50
_ROW, _FITTED = 19, 24


def prediction() -> Any | None:
    """What the model predicts for the session's fact; while that is under way, how far it is and None."""
    found = runs.reading().snapshot
    if found.state in ("waiting", "running"):
        doing = (
            f"{_others(found.ahead)} {'goes' if found.ahead == 1 else 'go'} first."
            if found.ahead
            else found.stage or "A model that is not in memory is loaded first."
        )
        parts.note("plain", [f"Asking {state.view().model.name} … {doing}"], key="asking")
    elif found.state == "cancelled":
        st.button("Ask again", on_click=runs.again, args=["reading"])
    return found.result if found.state == "done" else None


def heading(text: str, method: str) -> Any:
    """A figure's heading with its help card; gives the line, where the run bar goes."""
    line = st.container(
        horizontal=True, vertical_alignment="center", gap="small", height="content", key=f"head-{_slug(text)}"
    )
    with line:
        st.markdown(f"**{text}**", width="content")
        help.card(method, _slug(text))
    return line


def _slug(text: str) -> str:
    return re.sub("[^a-z]+", "-", text.lower())


def run(
    line: Any,
    slot: str,
    kind: Kind,
    query: Query,
    spec: Any,
    passes: int,
    prediction: Any,
    *,
    model: ModelChoice | None = None,
    cost: runs.Cost | None = None,
    far: Callable[[Snapshot], str] | None = None,
) -> Snapshot | None:
    """A run and its bar in a heading's line: cost before the click, progress with Cancel, what was kept.

    Args:
        model: another than the session's.
        cost: what it will take, where that is no number of interventions.
        far: how far it is in words, where passes say little.

    Returns:
        What there is of the run; None while it waits for the click.
    """
    cost = cost or runs.cost(kind, prediction, passes, model=model)
    key = waits(slot, kind, query, spec, passes, prediction, model=model, cost=cost)
    if key is not None:
        runs.release(slot)
        with line:
            st.button(
                "Run", key=f"run-{slot}", icon=":material/play_arrow:", type="primary", on_click=runs.start, args=[key]
            )
            st.caption(cost.words(), width="content")
        return None
    found = runs.request(slot, kind, query, spec, model=model)
    with line:
        _bar(slot, found, far or _passes_done)
    if found.state == "failed" and found.error is not None:
        messages.show_error(found.error)
        st.button("Try again", key=f"again-{slot}", on_click=runs.again, args=[slot])
    return found


def null_toggle(page: str, choice: Any, prediction: Any) -> None:
    """Whether the same is done on random weights beside it; nothing where it cannot be."""
    if not model_drawer.may_be_random() or prediction.model.name.startswith("random:"):
        return
    shown = requests.with_null(choice, prediction.model.name)
    st.toggle(
        "Null: random weights",
        shown,
        key=state.seed(f"{page}-null", shown),
        on_change=state.on_change(f"{page}-null", page, "null", bool),
        help="Run the same on this architecture with random weights; what is no larger turns grey.",
    )


def null(line: Any, slot: str, kind: Kind, spec: Any, passes: int, prediction: Any) -> Snapshot | None:
    """The same experiment on random weights, about the same answer."""
    query, target = prediction.query.query, prediction.target.text
    asked = query if query.answer is not None or not target[:1].isspace() else replace(query, answer=target.strip())
    return run(line, slot, kind, asked, spec, passes, prediction, model=model_drawer.random_of(state.view().model))


def with_null(choice: Any, prediction: Any, found: Snapshot | None) -> bool:
    """Whether the null is to be run: it is wanted, can be, and what it is compared with is there."""
    wanted = model_drawer.may_be_random() and requests.with_null(choice, prediction.model.name)
    return wanted and found is not None and found.state == "done"


def waits(
    slot: str,
    kind: Kind,
    query: Query,
    spec: Any,
    passes: int,
    prediction: Any,
    *,
    model: ModelChoice | None = None,
    cost: runs.Cost | None = None,
) -> str | None:
    """The key of a run that is so long that it waits for a click; None where it goes on, or is there, by itself."""
    key = runs.key_of(kind, query, spec, model=model)
    cost = cost or runs.cost(kind, prediction, passes, model=model)
    if not cost.asks or runs.was_started(key):
        return None
    return key if runs.peek(slot, kind, query, spec, model=model) is None else None


def _bar(slot: str, found: Snapshot, far: Callable[[Snapshot], str]) -> None:
    """Progress with time left and queue place, and Cancel; or that it was cancelled."""
    if found.state in ("waiting", "running"):
        st.progress(found.done / found.total if found.total else 0.0, text=progress_words(found, far), width="stretch")
        st.button("Cancel", key=f"cancel-{slot}", on_click=runs.cancel, args=[slot], type="tertiary")
    elif found.state == "cancelled":
        kept = f"Cancelled at {far(found)}" if found.total else "Cancelled before it began"
        st.markdown(
            f":orange[{kept}{': the figure is partial.' if found.partial is not None else '.'}]", width="content"
        )
        st.button("Run again", key=f"again-{slot}", on_click=runs.again, args=[slot], type="tertiary")


def _passes_done(found: Snapshot) -> str:
    return f"{found.done:,} of {found.total:,}"


def progress_words(found: Snapshot, far: Callable[[Snapshot], str] = _passes_done) -> str:
    """How far a run is: "37 of 96, 4 s left"."""
    if found.state == "waiting":
        return f"waiting, {found.ahead} before this one" if found.ahead else "starting"
    left = "" if found.seconds_left is None else f", {runs.duration(found.seconds_left)} left"
    queue = f", shared with {_others(found.ahead)}" if found.ahead else ""
    return f"{far(found)}{left}{queue}"


def _others(count: int) -> str:
    return "1 other run" if count == 1 else f"{count} other runs"


def figure(
    shown: Figure,
    *,
    name: str,
    found: Snapshot,
    code: str,
    height: int | None = None,
    legend: int = 90,
    point: bool = True,
    beside: int = 1,
    whole: Callable[[], bytes] | None = None,
) -> None:
    """A figure with its sentence, table, exports and Python lines. A click on a cell moves the cursor.

    Args:
        name: of the figure on its page; with the run's key it keys the chart.
        height: in pixels where the page needs another than the figure's own.
        legend: characters in a line of the legend's title.
        point: whether a click moves the cursor.
        beside: how many figures like this one stand side by side; many marks together are drawn on a canvas.
        whole: the result as the command line's JSON, for a download.
    """
    spec = copy.deepcopy(shown.spec)
    if height is not None:
        spec["height"] = height
    spec["padding"] = {"left": 4, "top": 0, "right": 4, "bottom": 2}
    _wrap_legends(spec, legend)
    spec["usermeta"] = {"embedOptions": {"renderer": _renderer(beside * len(shown.data))}}
    key = f"chart-{name}-{found.key[:10]}"
    runs.drawn(len(shown.data))
    if point:
        st.vega_lite_chart(
            shown.data, spec, theme=None, key=key, on_select=lambda: _point(key), selection_mode=["cell"]
        )
    else:
        with st.container(key=key):
            st.vega_lite_chart(shown.data, spec, theme=None)
    with st.container(horizontal=True, vertical_alignment="top", gap="small", key=f"about-{name}"):
        parts.note("quiet", [shown.sentence], key=f"sentence-{name}")
        _export(shown, name, code, complete=found.finished, whole=whole)


def _wrap_legends(spec: dict[str, Any], width: int) -> None:
    """Break the titles of legends into lines, since a narrow figure would cut them."""
    for layer in spec.get("layer", []):
        legend = layer.get("encoding", {}).get("color", {}).get("legend")
        if legend and legend.get("title"):
            given = legend["title"] if isinstance(legend["title"], list) else [legend["title"]]
            legend["title"] = [part for line in given for part in textwrap.wrap(line, width)]
            legend["titleFontSize"] = 11
            if width <= _SLIM and "gradientLength" in legend:
                ends = legend["values"]
                legend |= {
                    "gradientLength": 220,
                    "labelFontSize": 10,
                    "values": [ends[0], ends[len(ends) // 2], ends[-1]],
                }
        elif legend and width < _NARROW:
            legend["columns"] = 2


def rows_height(n_tokens: int) -> int | None:
    """Height of a heatmap that fits the first screen; None leaves long prompts their own."""
    return _ROW * n_tokens if 2 <= n_tokens <= _FITTED else None


def _renderer(marks: int) -> str:
    from factscope.settings import get_settings

    return "canvas" if marks > _POINTS else get_settings().renderer


def _point(key: str) -> None:
    """The callback of a click: the cell's layer, and its position where the figure has positions.

    A second click on a cell takes the selection away (``AGAIN``), so that the browser reports it: the cell is that of
    the click before.
    """
    chosen, last = st.session_state.get(key), f"{key} pointed"
    points = [p for p in getattr(chosen, "selection", {}).get("cell", []) if isinstance(p, dict)]
    point = points[-1] if points else st.session_state.get(last)
    if point is None or not isinstance(point.get("layer"), int | float):
        return
    st.session_state[last] = point
    layer = int(point["layer"])
    if isinstance(point.get("head"), int | float):
        st.session_state[POINTED_HEAD] = layer, int(point["head"])
        return
    position = point.get("position")
    cursor = state.view().cursor
    if isinstance(position, int | float):
        state.point_at(int(position), layer)
    elif cursor is not None:
        state.point_at(cursor.position, layer)
    else:
        st.session_state["point-at-last"] = layer


def _export(shown: Figure, name: str, code: str, *, complete: bool, whole: Callable[[], bytes] | None = None) -> None:
    drawer = st.popover(
        "",
        icon=":material/download:",
        type="tertiary",
        key=f"export-{name}",
        on_change="rerun",
        help="Table, SVG, PNG, CSV, Python" if whole is None else "Table, SVG, PNG, CSV, JSON, Python",
    )
    if not drawer.open:
        return
    with drawer:
        _downloads(shown, name, whole)
        if not complete:
            st.caption("The run has not finished: these are the cells so far.")
        parts.note("plain", [shown.sentence], key=f"alternative-{name}")
        parts.note("quiet", shown.caption.splitlines(), key=f"caption-{name}")
        st.dataframe(shown.alt_table, hide_index=True, height=220)
        st.caption("The same from Python:")
        st.code(code, language="python")


def _downloads(shown: Figure, name: str, whole: Callable[[], bytes] | None = None) -> None:
    from factscope.charts import export

    forms: list[tuple[str, str, Callable[[Figure], bytes]]] = [
        ("SVG", "image/svg+xml", export.svg),
        ("PNG", "image/png", export.png),
        ("CSV", "text/csv", export.csv),
    ]
    if whole is not None:
        forms.append(("JSON", "application/json", lambda figure: whole()))
    with st.container(horizontal=True):
        for form, mime, write in forms:
            st.download_button(
                form,
                data=lambda write=write: write(shown),
                file_name=f"factscope-{name}.{form.lower()}",
                mime=mime,
                on_click="ignore",
                key=f"download-{name}-{form}",
            )


def python_lines(query: Query, spec: Any, function: str, *, draw: str = "", model: ModelChoice | None = None) -> str:
    """The same computation with the public interface."""
    choice = model or state.view().model
    names, loading = load_lines(choice)
    lines = [
        f"from factscope import {', '.join([*names, 'Query', function, type(spec).__name__])}",
        "",
        *loading,
        f"query = {short(query)}",
        f"result = {function}(model, query, {short(spec)})",
        "result.table()",
    ]
    return "\n".join([*lines, draw] if draw else lines)


def load_lines(choice: ModelChoice) -> tuple[list[str], list[str]]:
    """How the model is loaded with the public interface, its edits from their saved files: names and lines."""
    options = [repr(choice.name)]
    options += [f"revision={choice.revision!r}"] if choice.revision else []
    options += [f"dtype={choice.dtype!r}"] if choice.dtype != "float32" else []
    options += ['device_map="auto"'] if choice.device == runs.SPREAD else []
    options += [f"device={choice.device!r}"] if choice.device not in ("auto", runs.SPREAD) else []
    lines = [f"model = load({', '.join(options)})"]
    if not choice.edits:
        return ["load"], lines
    files = ", ".join(f'load_edit("{edit_file(key)}")' for key in choice.edits)
    return ["load", "load_edit", "with_edits"], [*lines, f"model = with_edits(model, [{files}])"]


def edit_file(key: str) -> str:
    """The name of an edit's file when it is saved."""
    return f"factscope-edit-{key[:8]}.safetensors"


def short(value: Any) -> str:
    """A dataclass as a call with the fields that differ from their defaults."""
    import dataclasses

    kept = []
    for field in dataclasses.fields(value):
        given = getattr(value, field.name)
        usual = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if usual is dataclasses.MISSING or given != usual:
            kept.append(f"{field.name}={given!r}")
    return f"{type(value).__name__}({', '.join(kept)})"


def detail(
    lens: Any | None,
    *,
    map_result: Any | None = None,
    effects: Callable[[Any], list[str]] = lambda cursor: [],
    leads_to_trace: bool = True,
) -> None:
    """The cell under the cursor: its token and layer, its ten most probable tokens, the answer's p and rank.

    Args:
        effects: what a page's own figures say of the cursor's cell.
        leads_to_trace: whether a button goes to the causal trace.
    """
    if lens is None:
        parts.note("quiet", ["The cell's tokens come with the first layers."], key="detail-none")
        return
    late = st.session_state.pop("point-at-last", None)
    if late is not None:
        state.point_at(lens.query.last, late)
    cursor = figures.cursor_or_end(lens.query, lens.layers)
    _steer(lens, cursor)
    i, j = lens.layers.index(cursor.layer), lens.positions.index(cursor.position)
    token = lens.query.tokens[cursor.position]
    layer = "embedding" if cursor.layer < 0 else f"layer {cursor.layer}"
    if np.isnan(lens.entropy[i, j]):
        parts.note("plain", [f"{token.display}  at {layer}", "not computed yet"], strong=True, key="detail-head")
        return
    answer = figures.scored(lens, lens=True).strip()
    facts = [
        f"p({answer}) = {lens.target_probability[i, j]:.3g}, rank {lens.target_rank[i, j]:,}",
        f"entropy {lens.entropy[i, j]:.2f} nats",
    ]
    facts += _effect(map_result, cursor) + effects(cursor)
    parts.note("plain", [f"{token.display}  at {layer}", *facts], strong=True, key="detail-head")
    rows = [
        (k + 1, lens.texts[int(t)][1], float(p))
        for k, (t, p) in enumerate(zip(lens.top_ids[i, j], lens.top_probability[i, j], strict=True))
    ]
    st.dataframe(
        pd.DataFrame(rows, columns=["rank", "token", "p"]),
        hide_index=True,
        height=36 + 24 * len(rows),
        row_height=24,
        key="detail-top",
        column_config={
            "rank": st.column_config.NumberColumn("#", width=28, help=help.definition("rank")),
            "token": st.column_config.TextColumn("token", width=84, help=help.definition("text")),
            "p": st.column_config.ProgressColumn(
                "p", width=108, min_value=0, max_value=1, format="%.3f", help=help.definition("probability")
            ),
        },
    )
    _block_edges(lens, cursor)
    if leads_to_trace and st.button("Trace here", icon=":material/healing:", width="stretch", key="trace-here"):
        state.point_at(cursor.position, max(0, cursor.layer))
        st.switch_page("../pages/trace.py")
    if cursor.layer >= 0 and st.button("Heads at this layer", icon=":material/hub:", width="stretch", key="heads-here"):
        state.point_at(cursor.position, cursor.layer)
        st.switch_page("../pages/heads.py")
    if cursor.layer >= 0 and st.button(
        "Edit at this layer", icon=":material/edit_note:", width="stretch", key="edit-here"
    ):
        edit_at((cursor.layer,))


def edit_at(layers: tuple[int, ...]) -> None:
    """Go to the Edit page with these layers filled in."""
    state.choose("edit", layers=layers)
    st.switch_page("../pages/edit.py")


def _effect(map_result: Any | None, cursor: Any) -> list[str]:
    if map_result is None or cursor.layer not in map_result.layers or cursor.position >= len(map_result.sources):
        return []
    i, j = cursor.position, map_result.layers.index(cursor.layer)
    p = map_result.p_knockout[i, j]
    if np.isnan(p):
        return []
    change = map_result.relative_change_percent[i, j]
    return [f"blocked around this layer: p {map_result.p_base:.3g} → {p:.3g} ({change:+.0f}%)"]


def _block_edges(lens: Any, cursor: Any) -> None:
    """Go to the edge builder with the edges from the read-out to this cell's token, around its layer, filled in."""
    if not st.button("Block edges from here", icon=":material/content_cut:", width="stretch", key="block-edges"):
        return
    cut((requests.edge_from(cursor, state.view().flow, lens.model.n_layers),))


def cut(edges: tuple[str, ...]) -> None:
    """Go to the edge builder with edges filled in; it then stands above the figures, where it is seen."""
    st.session_state[EDGE_BUILDER] = st.session_state[EDGES_FIRST] = True
    state.choose("flow", edges=edges)
    st.switch_page("../pages/flow.py")


def _steer(lens: Any, shown: Any) -> None:
    """Token and layer as numbers: the cursor by keyboard."""
    left, right = st.columns(2, gap="small")
    last_layer = lens.layers[-1]
    left.number_input(
        "Token",
        0,
        lens.query.last,
        shown.position,
        key=state.seed("cursor-position", shown.position),
        on_change=_steered,
    )
    right.number_input(
        "Layer",
        lens.layers[0],
        last_layer,
        shown.layer,
        key=state.seed("cursor-layer", shown.layer),
        on_change=_steered,
    )


def _steered() -> None:
    """The cursor by keyboard: one of the two numbers changed."""
    if not (state.is_old("cursor-position") or state.is_old("cursor-layer")):
        state.point_at(int(st.session_state["cursor-position"]), int(st.session_state["cursor-layer"]))

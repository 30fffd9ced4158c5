"""Who extracts it? Heads by direct effect, extraction events per layer, and one head from near."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from dashboard import compare, figures, help, messages, panels, parts, requests, runs, state
from factscope.experiments.attribute_extraction import VARIANTS

EFFECTS = {"answer": "answer", "foil": "answer − foil"}
MAPPINGS = {"embedding": "input embedding", "state": "last state"}


def draw() -> None:
    prediction = panels.prediction()
    if prediction is None:
        return
    unnamed = figures.no_peak(prediction) or ""
    note = st.container()
    _controls(prediction)
    if compare.show((MAP, EVENTS), prediction):
        return
    if unnamed:
        with note:
            parts.note("warn", [f"No head and no layer is named below: {unnamed}."], key="heads-unnamed")
    left, right = st.columns([0.47, 0.53], gap="medium")
    with left, messages.caught():
        found = _map(prediction, unnamed)
    with left, messages.caught():
        _extraction(prediction, unnamed)
    with right, messages.caught():
        if found is not None and found.value is not None:
            _head(prediction, found, unnamed)


def _controls(prediction: Any) -> None:
    choice = state.view().heads
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        offered = EFFECTS if prediction.p_foil is not None else {"answer": "answer"}
        _segmented("Effect on", "effect", offered, choice.effect if choice.effect in offered else "answer",
                   "The logit of the answer, or of the answer minus the foil (name one above).")  # fmt: skip
        _segmented("Mapping of", "mapping", MAPPINGS, choice.mapping,
                   "What W_V W_O maps to tokens: the subject's mean input embedding, or what the head reads at the"
                   " subject's last token.")  # fmt: skip
        variants = list(dict.fromkeys([*VARIANTS, choice.edges]))
        st.selectbox(
            "Extraction: the read-out may read",
            variants,
            index=variants.index(choice.edges),
            format_func=lambda variant: "everything" if variant == "none" else variant,
            key=state.seed("heads-edges", choice.edges),
            on_change=state.on_change("heads-edges", "heads", "edges", lambda value: value or "none"),
            accept_new_options=True,
            width=250,
            help="In each layer alone: block:SET or keep:SET; sets as on Flow, first, positions, joined with +. "
            "block:all leaves the output bias, the null.",
        )
        panels.null_toggle("heads", choice, prediction)


def _segmented(label: str, name: str, options: dict[str, str], value: str, help_text: str) -> None:
    key = f"heads-{name}"
    st.segmented_control(
        label,
        list(options),
        format_func=options.__getitem__,
        default=value,
        key=state.seed(key, value),
        help=help_text,
        on_change=state.on_change(key, "heads", name, lambda chosen: chosen or value),
    )


def _map(prediction: Any, unnamed: str) -> Any:
    query, choice = prediction.query.query, state.view().heads
    line, spec = panels.heading("What each head adds", "heads"), requests.heads(choice)
    found = panels.run(line, "heads-map", "heads", query, spec, requests.heads_passes(prediction), prediction)
    if found is None or found.value is None:
        return found
    result = found.value
    _follow_click(result)
    cursor = _cursor(result, choice, unnamed)
    null = _null(prediction, result, choice, line) if panels.with_null(choice, prediction, found) else None
    shown = figures.head_map(result, choice, cursor, null, unnamed)
    n_heads = result.direct_effect.shape[1]
    height = 20 * n_heads if n_heads <= 12 else max(240, 12 * n_heads)
    panels.figure(shown, name="heads", found=found, code=panels.python_lines(query, spec, "heads"), height=height,
                  legend=70)  # fmt: skip
    messages.show_warnings([w for w in result.warnings if w not in prediction.warnings])
    return found


def _null(prediction: Any, result: Any, choice: Any, line: Any) -> float | None:
    """The largest effect of the same experiment on random weights, about the same answer, where that has run."""
    passes = requests.heads_passes(prediction)
    found = panels.null(line, "heads-null", "heads", requests.heads(choice), passes, prediction)
    if found is None or found.state != "done":
        return None
    foil = choice.effect == "foil" and result.foil is not None
    return float(np.nanmax(np.abs(found.result.direct_effect_foil if foil else found.result.direct_effect)))


def _follow_click(result: Any) -> None:
    pointed = st.session_state.pop(panels.POINTED_HEAD, None)
    if pointed is not None:
        state.point_at_head(*pointed, position=result.query.last)


def _cursor(result: Any, choice: Any, unnamed: str) -> tuple[int, int]:
    """The cursor's head; before one was chosen, that of the largest effect so far, in the cursor's layer if any.

    Where no head may be named none is preferred: it is the first one.
    """
    cursor = state.view().cursor
    n_layers, n_heads = result.direct_effect.shape
    layer = None if cursor is None or not 0 <= cursor.layer < n_layers else cursor.layer
    if cursor is not None and layer is not None and cursor.head is not None and cursor.head < n_heads:
        return layer, cursor.head
    if unnamed:
        return layer or 0, 0
    foil = choice.effect == "foil" and result.foil is not None
    size = np.nan_to_num(np.abs(result.direct_effect_foil if foil else result.direct_effect), nan=-1.0)
    if layer is not None:
        return layer, int(size[layer].argmax())
    best = np.unravel_index(size.argmax(), size.shape)
    return int(best[0]), int(best[1])


def _extraction(prediction: Any, unnamed: str) -> None:
    query, choice = prediction.query.query, state.view().heads
    line, spec = panels.heading("Extraction events", "extraction"), requests.extraction(choice)
    passes = 1 if choice.edges == "none" else 2
    found = panels.run(line, "heads-extraction", "attribute_extraction", query, spec, passes, prediction)
    if found is None or found.value is None or found.value.update_table().empty:
        return
    shown = figures.extraction_events(found.value, unnamed)
    code = panels.python_lines(query, spec, "attribute_extraction")
    panels.figure(shown, name="extraction", found=found, code=code, height=180, legend=60)
    messages.show_warnings([w for w in found.value.warnings if w not in prediction.warnings])


def _head(prediction: Any, found: Any, unnamed: str) -> None:
    query, choice, result = prediction.query.query, state.view().heads, found.value
    layer, head = _cursor(result, choice, unnamed)
    panels.heading("One head", "head")
    _steer(result, layer, head)
    if np.isnan(result.residual[layer]):
        parts.note("plain", [f"layer {layer}, head {head}", "not computed yet"], strong=True, key="head-facts")
        return
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        parts.note("plain", _facts(result, layer, head), strong=True, key="head-facts")
        if result.query.last > 0 and st.button("Knock out this head", icon=":material/content_cut:", key="knock-out"):
            panels.cut((requests.edge_of_head(layer, head, result.query.last),))
    code = panels.python_lines(query, requests.heads(choice), "heads")
    near, tokens = st.columns([0.47, 0.53], gap="small")
    with near:
        if np.isfinite(result.by_source[layer, head]).all():
            shown, rows = figures.head_sources(result, layer, head, unnamed), panels.rows_height(len(result.query.ids))
            panels.figure(shown, name="sources", found=found, code=code, height=rows, point=False)
    with tokens:
        _tokens(result, layer, head)
    with messages.caught():
        _pattern(prediction, layer, head)


def _steer(result: Any, layer: int, head: int) -> None:
    """Layer and head as numbers: the cursor by keyboard."""
    left, right = st.columns(2, gap="small")
    n_layers, n_heads = result.direct_effect.shape
    for place, name, value, count in ((left, "layer", layer, n_layers), (right, "head", head, n_heads)):
        place.number_input(
            name.capitalize(),
            0,
            count - 1,
            value,
            key=state.seed(f"heads-cursor-{name}", value),
            on_change=_steered,
            args=[result.query.last],
        )


def _steered(last: int) -> None:
    keys = [f"heads-cursor-{name}" for name in ("layer", "head")]
    if not any(state.is_old(key) for key in keys):
        layer, head = (int(st.session_state[key]) for key in keys)
        state.point_at_head(layer, head, position=last)


def _facts(result: Any, layer: int, head: int) -> list[str]:
    answer = figures.scored(result, lens=True).strip()
    said = f"{result.direct_effect[layer, head]:+.2f} nats of {answer}"
    if result.foil is not None:
        said += f", {result.direct_effect_foil[layer, head]:+.2f} of {answer} minus {result.foil.text.strip()}"
    lines = [f"layer {layer}, head {head}:  {said}"]
    if np.isfinite(result.attention_to_subject[layer, head]):
        lines.append(f"{result.attention_to_subject[layer, head]:.0%} of its attention goes to the subject")
    rank = int(result.mapping_rank[layer, head])
    if rank:
        found = "found" if result.mapping_found[layer, head] else "not found"
        lines.append(f"mapping subject → {answer} {found}: rank {rank:,} of its weights alone")
    return lines


def _tokens(result: Any, layer: int, head: int) -> None:
    """Promoted and suppressed tokens, and those that the weights alone map the subject to."""
    columns: dict[str, Any] = {}
    for name in ("promoted", "suppressed"):
        columns[name] = [result.texts[int(t)][1] for t in getattr(result, f"{name}_ids")[layer, head]]
        columns[f"{name} by"] = getattr(result, name)[layer, head]
    if result.mapping_rank[layer, head]:
        columns["mapping"] = [result.texts[int(t)][1] for t in result.mapping_ids[layer, head]]
    number = st.column_config.NumberColumn
    st.dataframe(
        pd.DataFrame(columns),
        hide_index=True,
        row_height=24,
        height=36 + 24 * len(columns["promoted"]),
        key="head-tokens",
        column_config={
            "promoted": st.column_config.TextColumn("promoted", width=78, help=help.definition("top_promoted")),
            "promoted by": number("nats", width=44, format="%+.2f", help=help.definition("direct_effect")),
            "suppressed": st.column_config.TextColumn("suppressed", width=78),
            "suppressed by": number("nats", width=44, format="%+.2f", help=help.definition("direct_effect")),
            "mapping": st.column_config.TextColumn("mapping", width=78, help=help.definition("mapping_rank")),
        },
    )


def _pattern(prediction: Any, layer: int, head: int) -> None:
    query, spec = prediction.query.query, requests.pattern(layer)
    line = panels.heading("Where it looks", "head")
    found = panels.run(line, "heads-pattern", "attention_pattern", query, spec, 1, prediction)
    if found is None or found.value is None:
        return
    shown = figures.attention_pattern(found.value, prediction.target, head)
    code = panels.python_lines(query, spec, "attention_pattern")
    rows = panels.rows_height(len(found.value.query.ids))
    panels.figure(shown, name="pattern", found=found, code=code, height=rows, point=False)


MAP = compare.Panel(
    name="heads",
    heading="What each head adds",
    method="heads",
    slot="heads-map",
    kind="heads",
    command="heads",
    function="heads",
    spec=lambda view, found: requests.heads(view.heads),
    passes=lambda view, found: requests.heads_passes(found),
    draw=lambda result, view, unnamed: figures.head_map(result, view.heads, None, None, unnamed),
    difference=lambda both, view: figures.head_difference(both, view.heads),
    point=False,
)
EVENTS = compare.Panel(
    name="extraction",
    heading="Extraction events",
    method="extraction",
    slot="heads-extraction",
    kind="attribute_extraction",
    command="extract",
    function="attribute_extraction",
    spec=lambda view, found: requests.extraction(view.heads),
    passes=lambda view, found: 1 if view.heads.edges == "none" else 2,
    draw=lambda result, view, unnamed: figures.extraction_events(result, unnamed),
    difference=lambda both, view: both.curves(
        "target_rank",
        both.table["site"].map(figures.SITES),
        quantity="rank",
        what=f"rank of {both.answer}",
    ),
    height=180,
    point=False,
    places=False,
)

runs.live(draw)

"""Where does the answer appear? Every state projected to the vocabulary, and tokens followed through the layers."""

from __future__ import annotations

from typing import Any

import streamlit as st

from dashboard import compare, enrichment, figures, messages, panels, requests, runs, state
from dashboard.link import MAX_PINNED

SITES = {"block": "block", "mlp": "MLP update", "attention": "attention update"}
VALUES = {"top1": "top-1 p", "answer": "p(answer)", "rank": "rank", "entropy": "entropy"}


def draw() -> None:
    prediction = panels.prediction()
    if prediction is None:
        return
    query, choice = prediction.query.query, state.view().lens
    _controls(choice)
    if compare.show((GRID,), prediction):
        return
    left, right = st.columns([0.77, 0.23], gap="medium")
    spec, found, lens = requests.lens(choice), None, None
    with left, messages.caught():
        line = panels.heading("What each state would say", "lens")
        slot = "lens-block" if spec == requests.lens() else "lens-page"
        found = panels.run(line, slot, "logit_lens", query, spec, requests.lens_passes(prediction), prediction)
        lens = None if found is None else found.value
        if found is not None and lens is not None:
            code = panels.python_lines(query, spec, "logit_lens")
            shown = figures.lens_grid(lens, choice.value, choice.transpose)
            rows = panels.rows_height(len(lens.layers if choice.transpose else lens.positions))
            panels.figure(shown, name="lens", found=found, code=code, height=rows)
    with right, messages.caught():
        panels.heading("Cell", "lens")
        panels.detail(lens)
        if lens is not None:
            _pin(lens)
    if found is not None and lens is not None:
        with messages.caught():
            _trajectories(lens, found, panels.python_lines(query, spec, "logit_lens"))
    with messages.caught():
        enrichment.show(prediction)


def _controls(choice: Any) -> None:
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        _segmented(
            "State", "site", SITES, choice.site, "The block's output, or only what its MLP or its attention adds."
        )
        _segmented("Shown", "value", VALUES, choice.value, "What the colour means.")
        _segmented(
            "Projection",
            "projection",
            {"normed": "normed", "raw": "raw"},
            choice.projection,
            "normed: through the model's own final norm and head. raw: output embedding times the state.",
        )
        st.toggle(
            "Classic layout",
            choice.transpose,
            key=state.seed("lens-transpose", choice.transpose),
            on_change=state.on_change("lens-transpose", "lens", "transpose", bool),
            help="Layers from bottom to top, tokens across.",
        )


def _segmented(label: str, name: str, options: dict[str, str], value: str, help_text: str) -> None:
    key = f"lens-{name}"
    st.segmented_control(
        label,
        list(options),
        format_func=options.__getitem__,
        default=value,
        key=state.seed(key, value),
        help=help_text,
        on_change=state.on_change(key, "lens", name, lambda chosen: chosen or value),
    )


def _pin(lens: Any) -> None:
    cursor = figures.cursor_or_end(lens.query, lens.layers)
    token = int(lens.top_ids[lens.layers.index(cursor.layer), lens.positions.index(cursor.position), 0])
    pinned = state.view().lens.pinned
    if token not in (*pinned, lens.target.id) and len(pinned) < MAX_PINNED:
        st.button(
            "Follow this cell's top token",
            icon=":material/keep:",
            on_click=_set_pinned,
            args=[(*pinned, token)],
            width="stretch",
        )


def _set_pinned(tokens: tuple[int, ...]) -> None:
    state.choose("lens", pinned=tokens)


def _trajectories(lens: Any, found: Any, code: str) -> None:
    position = figures.cursor_or_end(lens.query, lens.layers).position
    panels.heading("Tokens followed through the layers", "lens")
    with st.container(horizontal=True, vertical_alignment="center"):
        quantity = st.segmented_control(
            "Quantity",
            ["probability", "rank"],
            default="probability",
            key="lens-quantity",
            label_visibility="collapsed",
            persist_state="session",
        )
        if state.view().lens.pinned:
            st.button("Follow the answer only", icon=":material/keep_off:", on_click=_set_pinned, args=[()])
    shown = figures.trajectories(lens, position, quantity or "probability")
    panels.figure(shown, name="trajectories", found=found, code=code, height=220)


COLUMN = {"top1": "probability", "answer": "target_probability", "rank": "target_rank", "entropy": "entropy"}
QUANTITY = {"top1": "probability", "answer": "probability", "rank": "rank", "entropy": "entropy"}
GRID = compare.Panel(
    name="lens",
    heading="What each state would say",
    method="lens",
    slot="lens-page",
    kind="logit_lens",
    command="lens",
    function="logit_lens",
    spec=lambda view, found: requests.lens(view.lens),
    passes=lambda view, found: requests.lens_passes(found),
    draw=lambda result, view: figures.lens_grid(result, view.lens.value, view.lens.transpose, show_tokens=False),
    difference=lambda both, view: both.map(
        COLUMN[view.lens.value],
        "position",
        quantity=QUANTITY[view.lens.value],
        what=VALUES[view.lens.value].replace("answer", both.answer),
    ),
    row_height=15,
    places=False,
)

runs.live(draw)

"""Where does the answer appear? Every state projected to the vocabulary, and tokens followed through the layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import streamlit as st

from dashboard import compare, enrichment, figures, messages, panels, requests, runs, state
from dashboard.link import MAX_PINNED, View
from factscope.comparison import align

SITES = {"block": "block", "mlp": "MLP update", "attention": "attention update"}
VALUES = {"top1": "top-1 p", "answer": "p(answer)", "rank": "rank", "entropy": "entropy"}


def draw() -> None:
    prediction = panels.prediction()
    if prediction is None:
        return
    _controls(state.view().lens)
    if compare.show((GRID, FOLLOWED), prediction):
        _choose_quantity()
    else:
        _figures(prediction)
    with messages.caught():
        enrichment.show(prediction)


def _figures(prediction: Any) -> None:
    query, choice = prediction.query.query, state.view().lens
    left, right = st.columns([0.77, 0.23], gap="medium")
    spec, found, lens = requests.lens(choice), None, None
    with left, messages.caught():
        line = panels.heading("What each state would say", "lens")
        slot = "lens-block" if spec == requests.lens() else "lens-page"
        found = panels.run(line, slot, "logit_lens", query, spec, requests.lens_passes(prediction), prediction)
        lens = None if found is None else found.value
        if found is not None and lens is not None:
            code = panels.python_lines(query, spec, "logit_lens")
            unnamed = figures.no_peak(prediction) or ""
            shown = figures.lens_grid(lens, choice.value, choice.transpose, unnamed=unnamed)
            rows = panels.rows_height(len(lens.layers if choice.transpose else lens.positions))
            panels.figure(shown, name="lens", found=found, code=code, height=rows)
    with right, messages.caught():
        panels.heading("Cell", "lens")
        panels.detail(lens)
        if lens is not None:
            _pin(lens)
    if found is not None and lens is not None:
        with messages.caught():
            _trajectories(
                lens, found, panels.python_lines(query, spec, "logit_lens"), figures.no_peak(prediction) or ""
            )


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


def _trajectories(lens: Any, found: Any, code: str, unnamed: str) -> None:
    position = figures.cursor_or_end(lens.query, lens.layers).position
    panels.heading("Tokens followed through the layers", "lens")
    with st.container(horizontal=True, vertical_alignment="center"):
        _choose_quantity()
        if state.view().lens.pinned:
            st.button("Follow the answer only", icon=":material/keep_off:", on_click=_set_pinned, args=[()])
    shown = figures.trajectories(lens, position, _quantity(), unnamed)
    panels.figure(shown, name="trajectories", found=found, code=code, height=220)


def _choose_quantity() -> None:
    st.segmented_control(
        "Quantity",
        ["probability", "rank"],
        default="probability",
        key="lens-quantity",
        label_visibility="collapsed",
        persist_state="session",
    )


def _quantity() -> str:
    return str(st.session_state.get("lens-quantity") or "probability")


def _spec(view: View) -> Any:
    """What a side's lens is asked. Both follow B's pinned tokens, which are B's vocabulary's: no other has them."""
    asked = state.view()
    same = view.model.name.removeprefix("random:") == asked.model.name.removeprefix("random:")
    return requests.lens(replace(view.lens, pinned=asked.lens.pinned if same else ()))


def _place(lens: Any) -> int:
    """The token at which a side's tokens are followed: the cursor's, or in A the one that plays its part."""
    prediction, cursor = runs.reading().prediction, state.view().cursor
    mine = lens.query
    if prediction is None:
        return mine.last
    asked = prediction.query
    at = asked.last if cursor is None or cursor.position > asked.last else cursor.position
    pairs = align(mine.tokens, asked.tokens, mine.subject, asked.subject)
    return next((pair.a for pair in pairs if pair.b == at and pair.a is not None), mine.last)


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
    spec=lambda view, found: _spec(view),
    passes=lambda view, found: requests.lens_passes(found),
    draw=lambda result, view, unnamed: figures.lens_grid(
        result, view.lens.value, view.lens.transpose, show_tokens=False, unnamed=unnamed
    ),
    difference=lambda both, view: both.map(
        COLUMN[view.lens.value],
        "position",
        quantity=QUANTITY[view.lens.value],
        what=VALUES[view.lens.value].replace("answer", both.answer),
    ),
    row_height=15,
    places=False,
)
FOLLOWED = compare.Panel(
    name="trajectories",
    heading="Tokens followed",
    method="lens",
    slot="lens-followed",
    kind="logit_lens",
    command="lens",
    function="logit_lens",
    spec=lambda view, found: _spec(view),
    passes=lambda view, found: requests.lens_passes(found),
    draw=lambda result, view, unnamed: figures.trajectories(result, _place(result), _quantity(), unnamed),
    difference=lambda both, view: figures.trajectories_difference(both, (_place(both.a), _place(both.b)), _quantity()),
    height=180,
    places=False,
)

runs.live(draw)

"""Does the model know it? First choices, paraphrases, and when the answer comes up over the layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import streamlit as st

from dashboard import compare, evidence, figures, help, messages, panels, parts, picker, requests, runs, state
from factscope.charts import Figure
from factscope.queries import Query


def draw() -> None:
    prediction = panels.prediction()
    if prediction is None:
        return
    if compare.show((TOP, LAYERS), prediction):
        _choose_quantity()
        return
    wordings = _asked_wordings(prediction)
    with messages.caught():
        evidence.show(prediction, [found.result for _, found in wordings if found.state == "done"])
    first, second, third = st.columns([0.27, 0.34, 0.39], gap="medium")
    with first, messages.caught():
        _first_choices(prediction)
    with second, messages.caught():
        _over_layers(prediction)
    with third, messages.caught():
        _paraphrases(prediction, wordings)
    with messages.caught():
        _examples()


def _first_choices(prediction: Any) -> None:
    panels.heading("What comes next", "prediction")
    code = panels.python_lines(prediction.query.query, prediction.spec, "predict")
    panels.figure(figures.top_tokens(prediction), name="top", found=runs.reading().snapshot, code=code, point=False)


def _over_layers(prediction: Any) -> None:
    line = panels.heading("When the answer comes up", "layers")
    query, spec = prediction.query.query, requests.lens()
    found = panels.run(line, "lens-block", "logit_lens", query, spec, requests.lens_passes(prediction), prediction)
    if found is None or found.value is None:
        return
    _choose_quantity()
    shown = figures.answer_over_layers(found.value, _quantity(), figures.no_peak(prediction) or "")
    panels.figure(shown, name="layers", found=found, code=panels.python_lines(query, spec, "logit_lens"), height=196)


def _asked_wordings(prediction: Any) -> list[tuple[str, Any]]:
    """Every other wording with its run."""
    fact = state.view().fact
    answer = _answer(prediction)
    wordings = (picker.paraphrases(fact) + _own_wordings())[: requests.MAX_WORDINGS]
    found = []
    for i, prompt in enumerate(wordings):
        asked = Query(prompt=prompt, answer=answer, bos=fact.bos, score=fact.score)
        found.append((prompt, runs.request(f"paraphrase-{i}", "prediction", asked, requests.wording())))
    for i in range(len(wordings), requests.MAX_WORDINGS):
        runs.release(f"paraphrase-{i}")
    return found


def _answer(prediction: Any) -> str | None:
    """What other wordings are asked for; None where the model's own first choice is no word that could be typed."""
    target = prediction.target.text
    return target.strip() if state.view().fact.answer is not None or target[:1].isspace() else None


def _paraphrases(prediction: Any, wordings: list[tuple[str, Any]]) -> None:
    panels.heading("The same fact in other words", "prediction")
    rows = [_row(prompt, found) for prompt, found in wordings]
    if rows:
        _table(rows, _answer(prediction))
    else:
        parts.note("quiet", ["No other wordings are known for this prompt. Add your own:"])
    with st.popover("Own wordings", icon=":material/add:", type="tertiary"):
        st.text_area(
            "One prompt a line, each up to the answer",
            key="own-wordings",
            max_chars=2000,
            persist_state="session",
            height=120,
        )


def _own_wordings() -> tuple[str, ...]:
    lines = (line.rstrip() for line in str(st.session_state.get("own-wordings", "")).splitlines())
    return tuple(dict.fromkeys(line for line in lines if line.strip()))[: requests.MAX_OWN]


Row = tuple[str, float | None, int | None, str, bool | None]
"""Prompt, probability and rank of the answer, the first choice, and whether the whole answer is the first choice."""


def _row(prompt: str, found: Any) -> Row:
    if found.state == "done":
        result = found.result
        asked = result.known is not None
        p, rank = (result.p_target, result.rank) if asked else (None, None)
        return prompt, p, rank, result.top[0].display, result.known
    return prompt, None, None, messages.sentence(found.error) if found.error is not None else "…", None


def _table(rows: list[Row], answer: str | None) -> None:
    table = pd.DataFrame([row[:4] for row in rows], columns=["prompt", "p", "rank", "first"])
    known = [row[4] for row in rows if row[4] is not None]
    st.dataframe(
        table,
        hide_index=True,
        height=38 + 30 * len(rows),
        row_height=30,
        key="paraphrases",
        column_config={
            "prompt": st.column_config.TextColumn("prompt", width=270),
            "p": st.column_config.ProgressColumn(
                "p", min_value=0, max_value=1, format="%.2f", width=70, help=help.definition("p_target")
            ),
            "rank": st.column_config.NumberColumn("rank", width=45, help=help.definition("target_rank")),
            "first": st.column_config.TextColumn("says", width=75, help="The model's first choice."),
        },
    )
    if answer is not None and known:
        parts.note("quiet", [f"“{answer}” is the first choice in {sum(known)} of {len(known)} wordings."])


def _examples() -> None:
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.caption("Try", width="content")
        for label, query in picker.FAMOUS.items():
            st.button(label, key=f"try-{label}", type="tertiary", on_click=_try, args=[query])


def _try(query: Query) -> None:
    state.ask(replace(query, bos=state.view().fact.bos))


def _choose_quantity() -> None:
    st.segmented_control(
        "Quantity",
        ["probability", "rank"],
        default="probability",
        key="fact-quantity",
        label_visibility="collapsed",
        persist_state="session",
    )


def _quantity() -> str:
    return str(st.session_state.get("fact-quantity") or "probability")


def _over_layers_difference(both: compare.Both) -> Figure:
    """The answer at the subject's last token and at the read-out, for the pairs of tokens that are these in A and B."""
    quantity = _quantity()
    places = figures.places(both.b)
    names = {i: name for name, at in places.items() for i, pair in enumerate(both.pairs) if pair.b == at}
    shown = zip(both.table["position"], both.table["rank"], strict=True)
    series = [names.get(position) if rank == 1 else None for position, rank in shown]
    column = "target_rank" if quantity == "rank" else "target_probability"
    what = f"rank of {both.answer}" if quantity == "rank" else f"p({both.answer})"
    return both.curves(column, series, quantity=quantity, what=what)


TOP = compare.Panel(
    name="top",
    heading="What comes next",
    method="prediction",
    slot="fact-top",
    kind="prediction",
    command="predict",
    function="predict",
    spec=lambda view, found: requests.prediction(),
    passes=lambda view, found: found.passes,
    draw=lambda result, view, unnamed: figures.top_tokens(result),
    difference=lambda both, view: both.bars("probability", "text", what="probability"),
    row_height=20,
    point=False,
    places=False,
    located=False,
)
LAYERS = compare.Panel(
    name="layers",
    heading="When the answer comes up",
    method="layers",
    slot="fact-layers",
    kind="logit_lens",
    command="lens",
    function="logit_lens",
    spec=lambda view, found: requests.lens(),
    passes=lambda view, found: requests.lens_passes(found),
    draw=lambda result, view, unnamed: figures.answer_over_layers(result, _quantity(), unnamed),
    difference=lambda both, view: _over_layers_difference(both),
    height=180,
    places=False,
)

runs.live(draw)

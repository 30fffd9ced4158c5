"""Subject enrichment on the Lens page: rates by position, sublayer knockout, the attributes found, the neurons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from dashboard import compare, figures, help, messages, panels, parts, requests, state, uploads
from dashboard.link import AttributeSource, EnrichChoice
from factscope.experiments.subject_enrichment import Sublayer

SOURCES: dict[AttributeSource, str] = {"bundled": "Bundled facts", "table": "Your CSV", "texts": "Your texts"}
_HEIGHT = 250
_ROWS = 262


def show(prediction: Any) -> None:
    """The whole part, below the lens."""
    panels.heading("Subject enrichment", "enrichment")
    if prediction.query.subject is None:
        parts.note("quiet", ["Name a subject above: enrichment is about the subject's tokens."], key="enrich-none")
        return
    view = state.view()
    choice = view.enrich
    _controls(choice, prediction)
    asked = {choice.source} if view.a is None else {choice.source, view.a.enrich.source}
    sources = {source: uploads.attributes(source) for source in SOURCES if source in asked}
    missing = [_MISSING[name] for name, source in sources.items() if source is None]
    if missing:
        parts.note("plain", missing, key="enrich-missing")
    elif compare.show(_both(sources), prediction):
        return
    source = sources[choice.source]
    if source is not None:
        _alone(prediction, choice, source)


def _alone(prediction: Any, choice: EnrichChoice, source: str) -> None:
    left, right = st.columns(2, gap="medium")
    rates = random = None
    with left, messages.caught():
        rates, random = _rates(prediction, choice, source)
    if rates is None:
        return
    with right, messages.caught():
        _knockouts(prediction, choice, source, rates, figures.rates_beyond(rates, random))
    layer = _layer(rates, named=figures.no_peak(prediction) is None)
    with left, messages.caught():
        _attributes(rates, layer)
    with right, messages.caught():
        _neurons(prediction, choice, source, layer)


_MISSING = {
    "table": "Give a CSV file with the columns subject and paragraphs. A link does not carry it: whoever opens a link"
    " gives the file again.",
    "texts": "Give text files, paragraphs parted by empty lines: those that name the subject are found with BM25."
    " A link does not carry them: whoever opens a link gives the files again.",
}


def _controls(choice: EnrichChoice, prediction: Any) -> None:
    n = prediction.model.n_layers
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium", key="enrich-controls"):
        st.segmented_control(
            "Attributes from",
            list(SOURCES),
            format_func=SOURCES.__getitem__,
            default=choice.source,
            key=state.seed("enrich-source", choice.source),
            on_change=state.on_change("enrich-source", "enrich", "source", lambda value: value or choice.source),
            help="What the bundled model was taught about the subject, a CSV of yours, or texts searched by BM25.",
        )
        window, read = requests.knockout_defaults(choice, n)
        _number("Window", "window", window, 1, n, "Layers whose updates are cancelled together.")
        _number("Read layer", "read_layer", read, 0, n - 1, "Whose output is read after a knockout.")
        _toggle("Position 0", "first", choice.first, "A curve for position 0 too, in many models an attention sink.")
        _toggle(
            "As the notebook",
            "notebook",
            choice.notebook,
            "As the code that Geva et al. released: the subject's own tokens count, windows of 11 layers begin at each"
            " layer and end before the read layer, the MLP's bias stays, attention weighs all earlier tokens the same.",
        )
        panels.null_toggle("enrich", choice, prediction)


def _number(label: str, name: str, value: int, low: int, high: int, help_text: str) -> None:
    key = f"enrich-{name}"
    value = min(max(value, low), high)
    st.number_input(
        label,
        low,
        high,
        value,
        key=state.seed(key, value),
        on_change=state.on_change(key, "enrich", name, int),
        help=help_text,
        width=120,
    )


def _toggle(label: str, name: str, value: bool, help_text: str) -> None:
    key = f"enrich-{name}"
    st.toggle(
        label, value, key=state.seed(key, value), on_change=state.on_change(key, "enrich", name, bool), help=help_text
    )


def _rates(prediction: Any, choice: EnrichChoice, source: str) -> tuple[Any, Any]:
    """The rates, and those on random weights; None for what is not there."""
    query, spec = prediction.query.query, requests.enrichment(choice, source)
    line = panels.heading("Attributes rate by position", "enrichment")
    found = panels.run(line, "enrich-rates", "subject_enrichment", query, spec, 2, prediction)
    if found is None or found.value is None:
        return None, None
    code = panels.python_lines(query, requests.shareable(spec), "subject_enrichment")
    null = None
    if panels.with_null(choice, prediction, found):
        null = panels.null(line, "enrich-rates-null", "subject_enrichment", spec, 2, prediction)
    random = None if null is None else null.value
    shown = figures.attributes_rates(found.value, null=random, unnamed=figures.no_peak(prediction) or "")
    panels.figure(shown, name="rates", found=found, code=code, height=_HEIGHT, legend=60)
    messages.show_warnings([w for w in found.value.warnings if w not in prediction.warnings])
    return found.value, random


def _knockouts(prediction: Any, choice: EnrichChoice, source: str, rates: Any, beyond: Mapping[int, float]) -> None:
    query, n = prediction.query.query, prediction.model.n_layers
    line = panels.heading("Updates cancelled at the subject", "sublayer")
    results: dict[str, Any] = {}
    found = None
    for site in ("mlp", "attention"):
        spec = requests.sublayer(choice, source, site)
        one = panels.run(line, f"enrich-{site}", "subject_enrichment", query, spec, n, prediction)
        if one is not None and one.value is not None:
            results[site], found = one.value, one
    if found is None:
        return
    code = panels.python_lines(query, requests.shareable(found.value.spec), "subject_enrichment")
    unnamed = figures.no_peak(prediction) or ""
    shown = figures.sublayer_knockout(results, beyond=beyond, unnamed=unnamed)
    panels.figure(shown, name="sublayers", found=found, code=code, height=_HEIGHT, legend=60)
    if not unnamed:
        _offer_layer(choice, rates, beyond, found.value.read_layer)
    said = {w for result in results.values() for w in result.warnings}
    messages.show_warnings(sorted(said - {*prediction.warnings, *rates.warnings}))


def _offer_layer(choice: EnrichChoice, rates: Any, beyond: Mapping[int, float], read: int) -> None:
    """The layer where this subject's rate is highest, as one click; the default is the paper's, for any subject."""
    best = max(beyond, key=lambda layer: beyond[layer], default=read)
    here = float(rates.rate[rates.positions.index("subject-last"), rates.layers.index(read)])
    if best == read or beyond[best] <= here:
        return
    usual = "the paper's, 0.83 of the depth" if choice.read_layer is None else "the one chosen"
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="enrich-offer"):
        said = f"This subject's rate is highest at layer {best} ({beyond[best]:.3g}%); layer {read} is {usual}."
        parts.note("quiet", [said], key="enrich-best")
        st.button(f"Read at layer {best}", key="enrich-read-best", type="tertiary", on_click=_read_at, args=[best])


def _read_at(layer: int) -> None:
    state.choose("enrich", read_layer=layer)


def _layer(rates: Any, *, named: bool) -> int:
    """The cursor's layer, or the one where the subject's last token has the highest rate, if that may be named."""
    cursor = figures.cursor_in(rates.query, rates.layers)
    if cursor is not None and cursor.layer >= 0:
        return cursor.layer
    rate = rates.rate[rates.positions.index("subject-last")]
    return rates.layers[-1] if not named or np.isnan(rate).all() else rates.layers[int(np.nanargmax(rate))]


def _attributes(rates: Any, layer: int) -> None:
    """Every attribute token, found ones first."""
    i, j = rates.positions.index("subject-last"), rates.layers.index(layer)
    places = rates.places[i, j]
    n_found = int((places > 0).sum())
    parts.note(
        "quiet",
        [
            f"At subject-last, layer {layer}: {n_found} of {rates.n_attributes} attribute tokens are among the"
            f" {rates.spec.kept} that count. Precision at {rates.n_attributes}: {rates.precision[i, j]:.3g}%."
            f" From {rates.source.rsplit(' ', 1)[0]}."
        ],
        key="enrich-found",
    )
    best = np.where(rates.places[i] > 0, rates.places[i], np.iinfo(np.int32).max)
    reached = best.min(axis=0) < np.iinfo(np.int32).max
    where = [rates.layers[k] if ok else None for k, ok in zip(best.argmin(axis=0), reached, strict=True)]
    table = pd.DataFrame(
        {
            "token": [a.display for a in rates.attributes],
            "found": places > 0,
            "place": [str(p) if p else "" for p in places],
            "best": ["" if layer is None else str(layer) for layer in where],
        }
    ).iloc[np.argsort(np.where(places > 0, places, np.iinfo(np.int32).max), kind="stable")]
    st.dataframe(
        table,
        hide_index=True,
        height=min(_ROWS, 38 + 24 * len(table)),
        row_height=24,
        key="enrich-tokens",
        column_config={
            "token": st.column_config.TextColumn("attribute token", help=help.definition("text")),
            "found": st.column_config.CheckboxColumn("found here", width=80, help="Among the tokens that count."),
            "place": st.column_config.TextColumn("place", width=60, help="Among the tokens that count, from 1."),
            "best": st.column_config.TextColumn("best layer", width=80, help="Where its place is best, if anywhere."),
        },
    )


def _neurons(prediction: Any, choice: EnrichChoice, source: str, layer: int) -> None:
    query, spec = prediction.query.query, requests.neurons(choice, source, layer)
    line = panels.heading("What the MLP's neurons write", "neurons")
    found = panels.run(line, "enrich-neurons", "sub_updates", query, spec, 1, prediction)
    if found is None or found.value is None:
        return
    parts.note("quiet", [f"Layer {layer}, at subject-last; the largest parts of its update first."], key="enrich-mlp")
    st.dataframe(
        found.value.table()[["neuron", "size", "attributes_rate", "other_subject_rate", "top_tokens"]],
        hide_index=True,
        height=_ROWS,
        row_height=24,
        key="enrich-neuron-table",
        column_config={
            "neuron": st.column_config.NumberColumn("neuron", width=60, format="%d", help=help.definition("neuron")),
            "size": st.column_config.NumberColumn("size", width=60, format="%.3g", help=help.definition("size")),
            "attributes_rate": st.column_config.NumberColumn(
                "rate %", width=60, format="%.3g", help=help.definition("attributes_rate")
            ),
            "other_subject_rate": st.column_config.NumberColumn(
                "others %", width=66, format="%.3g", help=help.definition("other_subject_rate")
            ),
            "top_tokens": st.column_config.TextColumn("top tokens", help=help.definition("top_tokens")),
        },
    )


# ---------------------------------------------------------------------------------------------- beside what is pinned

_CANCELLED: dict[Sublayer, str] = {"mlp": "MLP cancelled", "attention": "MHSA cancelled"}


def _both(sources: Mapping[Any, Any]) -> tuple[compare.Panel, ...]:
    """Rates and both knockouts as A | B | B - A.

    Args:
        sources: where the attributes of each side come from.
    """

    def sublayer(site: Sublayer) -> compare.Panel:
        return compare.Panel(
            name=f"sublayer-{site}",
            heading=f"{_CANCELLED[site]} at the subject",
            method="sublayer",
            slot=f"enrich-{site}",
            kind="subject_enrichment",
            command="enrich",
            function="subject_enrichment",
            spec=lambda view, found: requests.sublayer(view.enrich, sources[view.enrich.source], site),
            passes=lambda view, found: found.model.n_layers,
            draw=lambda result, view, unnamed: figures.sublayer_knockout({site: result}, unnamed=unnamed),
            difference=lambda both, view: figures.sublayer_difference(both, _CANCELLED[site]),
            height=180,
            public=requests.shareable,
        )

    rates = compare.Panel(
        name="rates",
        heading="Attributes rate",
        method="enrichment",
        slot="enrich-rates",
        kind="subject_enrichment",
        command="enrich",
        function="subject_enrichment",
        spec=lambda view, found: requests.enrichment(view.enrich, sources[view.enrich.source]),
        passes=lambda view, found: 2,
        draw=lambda result, view, unnamed: figures.attributes_rates(result, unnamed=unnamed),
        difference=lambda both, view: figures.rates_difference(both),
        height=190,
        public=requests.shareable,
    )
    return rates, sublayer("mlp"), sublayer("attention")

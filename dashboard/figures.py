"""From results to figures: picks what of a result is drawn, and says in the caption where it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from dashboard import stack, state
from dashboard.link import Cursor, Measure, View
from factscope import charts
from factscope.charts import Figure
from factscope.charts.text import measured
from factscope.demo.lookup import taught_here, untaught, was_taught
from factscope.editors.edit import names_subject
from factscope.interventions.attention import window

MAX_CELLS = 5000
RANDOM_WEIGHTS = "same on random weights"
BLOCK_NOTE = "layers from 0; emb is the embedding"


def theme() -> Any:
    """The theme that the browser shows."""
    return "dark" if st.context.theme.type == "dark" else "light"


def caption(result: Any, *more: str) -> str:
    """Model, revision, prompt and parameters, for the figure and its exports."""
    query = result.query.query
    return "\n".join([_who(result.model), f"{query.prompt} → {result.target.text.strip()}", *more])


def _who(info: Any) -> str:
    """The model and its weight state; that it is the original one is said where an edited one is shown too."""
    view = state.view()
    choices = [view.model, *([] if view.a is None else [view.a.model])]
    edited = stack.described(info.weights, *choices)
    original = ", original weights" if any(choice.edits for choice in choices) else ""
    return f"{info.name}@{info.revision}, {info.dtype}, weights {info.weights}" + (
        f", edited: {edited}" if edited else original
    )


def scored(result: Any, *, lens: bool = False) -> str:
    """What the figure's numbers are about: the answer, or its first token where that alone is scored."""
    target = result.target
    if target.n_tokens > 1 and (lens or result.query.query.score == "token"):
        return f"{target.text.strip()} (first token)"
    return target.text


def top_tokens(prediction: Any) -> Figure:
    """The most probable next tokens, the answer marked where one was given."""
    asked = prediction.known is not None
    rows = [(t.rank, t.display, t.probability, asked and t.id == prediction.target.id) for t in prediction.top]
    table = pd.DataFrame(rows, columns=["rank", "display", "probability", "is_answer"])
    answer = scored(prediction) if asked else ""
    return charts.top_tokens(table, answer=answer, theme=theme(), caption=caption(prediction))


def answer_over_layers(lens: Any, quantity: Any, unnamed: str = "") -> Figure:
    """Rank or probability of the answer over layers, at the subject's last token and at the read-out.

    Args:
        unnamed: why no layer may be named.
    """
    values = lens.target_rank.astype(float) if quantity == "rank" else lens.target_probability
    values = np.where(np.isnan(lens.entropy), np.nan, values)
    rows = [
        (layer, name, values[i, lens.positions.index(position)])
        for name, position in places(lens).items()
        for i, layer in enumerate(lens.layers)
    ]
    table = pd.DataFrame(rows, columns=["layer", "series", "value"])
    return charts.layer_curves(
        table,
        quantity=quantity,
        answer=scored(lens, lens=True),
        theme=theme(),
        cursor_layer=_cursor_layer(),
        unnamed=unnamed,
        caption=caption(lens, f"logit lens, {lens.spec.projection}, {BLOCK_NOTE}"),
    )


def places(result: Any) -> dict[str, int]:
    """The positions at which the answer is followed through the layers, by name."""
    found = {"last (read-out)": result.query.last}
    if result.query.subject is not None:
        found = {"subject-last": result.query.subject[1] - 1, **found}
    return found


def change_of(answer: str, measure: str) -> str:
    """What a knockout's number is, in words."""
    return f"change of {measured(answer, measure)}, {'percent' if measure == 'percent' else 'nats'}"


def effect(result: Any, measure: str) -> np.ndarray:
    """A knockout's effect in a measure, [source, layer]."""
    if measure == "logit_difference":
        return result.logit_difference_change
    return result.relative_change_percent if measure == "percent" else result.log_odds_change


def measure_of(view: View) -> Measure:
    """The measure that Flow shows: without a foil, on either side, log-odds stand for the logit difference."""
    foils = [side.fact.foil for side in (view, view.a) if side is not None]
    return "log_odds" if view.flow.measure == "logit_difference" and None in foils else view.flow.measure


def trajectories(lens: Any, position: int, quantity: Any, unnamed: str = "") -> Figure:
    """The answer and the pinned tokens at one position, over layers."""
    where = lens.query.tokens[position]
    followed = _followed(lens, position, quantity)
    return charts.token_trajectories(
        followed.assign(token=followed["token"].map(_followed_names(lens))),
        quantity=quantity,
        theme=theme(),
        position_label=f"token {position} {where.display}",
        cursor_layer=_cursor_layer(),
        unnamed=unnamed,
        caption=caption(lens, f"logit lens of {lens.spec.site}, {lens.spec.projection}, {BLOCK_NOTE}"),
    )


def _followed(lens: Any, position: int, quantity: Any) -> Any:
    """Rank or probability of the answer and the pinned tokens at one position: ``layer, token, value``."""
    at = lens.positions.index(position)
    done = ~np.isnan(lens.entropy[:, at])
    series = {lens.target.id: (lens.target_rank[:, at], lens.target_probability[:, at])}
    for i, token in enumerate(lens.spec.pinned):
        series[token] = (lens.pinned_rank[:, at, i], lens.pinned_probability[:, at, i])
    rows = []
    for token, (rank, probability) in series.items():
        values = np.where(done, (rank if quantity == "rank" else probability).astype(float), np.nan)
        rows += [(layer, token, value) for layer, value in zip(lens.layers, values, strict=True)]
    return pd.DataFrame(rows, columns=["layer", "token", "value"])


def _followed_names(lens: Any) -> dict[int, str]:
    """The answer's first token and the pinned ones in display form."""
    return {token: lens.texts.get(token, ("", str(token)))[1] for token in (lens.target.id, *lens.spec.pinned)}


def trajectories_difference(both: Any, at: tuple[int, int], quantity: Any) -> Figure:
    """B - A of the answer and the pinned tokens that both follow.

    Args:
        at: the position in A and in B.
    """
    sides = []
    answers = {_followed_names(lens)[lens.target.id] for lens in (both.a, both.b)}
    answer = answers.pop() if len(answers) == 1 else "the answer"
    for lens, position in zip((both.a, both.b), at, strict=True):
        found, names = _followed(lens, position, quantity), _followed_names(lens) | {lens.target.id: answer}
        sides.append(found.assign(series=found["token"].map(names)).drop_duplicates(["layer", "series"]))
    data = sides[0].merge(sides[1], on=["layer", "series"], suffixes=("_a", "_b"))
    data = data.rename(columns={"value_a": "a", "value_b": "b"})
    return both.lines(data, quantity=quantity, what="rank" if quantity == "rank" else "probability")


def edges(result: Any) -> Figure:
    """The edge builder's run, before and after."""
    return charts.before_after(
        result.p_base,
        float(result.p_knockout[0, 0]),
        log_odds=(result.log_odds_base, float(result.log_odds[0, 0])),
        answer=scored(result),
        n_layers=result.window,
        theme=theme(),
        caption=caption(result, "attention knockout of the edges " + ", ".join(result.spec.edges)),
    )


def edges_difference(both: Any) -> Figure:
    """B - A of the edge builder's runs."""
    a, b = ([float(both.table[f"{name}_{side}"].iloc[0]) for name in ("p_base", "p_knockout")] for side in "ab")
    return charts.difference_bars(
        pd.DataFrame({"token": list(charts.RUNS), "a": a, "b": b}),
        what=f"p({both.answer})",
        theme=theme(),
        caption=both.caption,
    )


def attributes_rates(result: Any, *, null: Any = None, unnamed: str = "") -> Figure:
    """Attributes rates by position, with the ceiling and the other subjects; ``null`` is the same on random weights."""
    return charts.attributes_rates(
        result.positions,
        result.layers,
        result.rate,
        result.other_rates,
        ceiling=result.ceiling,
        n_attributes=result.n_attributes,
        subject=result.query.subject_text or "",
        random_rates=None if null is None or np.isnan(null.rate).all() else null.rate,
        unnamed=unnamed,
        theme=theme(),
        cursor_layer=_cursor_layer(),
        caption=caption(result, _enrichment_words(result)),
    )


def rates_beyond(result: Any, null: Any = None) -> dict[int, float]:
    """The rate of the subject's last token at every layer where it is higher than its nulls."""
    i = result.positions.index("subject-last")
    chance = np.full(result.rate.shape, -np.inf) if null is None or np.isnan(null.rate).all() else null.rate
    return {
        layer: float(result.rate[i, j])
        for j, layer in enumerate(result.layers)
        if layer >= 0 and result.beats_null[i, j] and result.rate[i, j] > chance[i, j]
    }


def sublayer_knockout(
    results: Mapping[str, Any], *, beyond: Mapping[int, float] | None = None, unnamed: str = ""
) -> Figure:
    """Rates of the subject's last token under knockouts, by sublayer.

    Args:
        beyond: as ``rates_beyond`` gives it.
    """
    result = next(iter(results.values()))
    return charts.sublayer_knockout(
        result.layers,
        {site: one.rate[0] for site, one in results.items()},
        base_rate=result.base_rate,
        base_other_rates=result.base_other_rates,
        ceiling=result.ceiling,
        read_layer=result.read_layer,
        window=result.window,
        first=result.spec.notebook,
        beyond=beyond,
        unnamed=unnamed,
        theme=theme(),
        cursor_layer=_cursor_layer(),
        caption=caption(result, f"{_enrichment_words(result)}, {cancelled(result.spec)}, window {result.window}"),
    )


def cancelled(spec: Any) -> str:
    """What a sublayer knockout does to the updates, in words."""
    if spec.notebook:
        return "at all positions MLPs without all but their bias, attention even over earlier tokens"
    return "zeros at the subject"


RATE = "attributes rate, percentage points"
OTHERS = "others at subject-last"


def rates_difference(both: Any) -> Figure:
    """B - A of attributes rates; the band is that of other subjects' attributes at subject-last, draw by draw."""
    found = both.table.rename(columns={"position": "series", "attributes_rate_a": "a", "attributes_rate_b": "b"})
    shared = [layer for layer in both.b.layers if layer in both.a.layers]
    draws = []
    for one, other in zip(both.a.other_rates, both.b.other_rates, strict=False):
        a, b = (_at(side, draw, shared) for side, draw in ((both.a, one), (both.b, other)))
        draws.append(pd.DataFrame({"layer": shared, "series": f"control-{len(draws) + 1}", "a": a, "b": b}).dropna())
    data = pd.concat([found[["layer", "series", "a", "b"]], *draws], ignore_index=True)
    return both.lines(data, quantity="rate", what=RATE, x_title="layer (its output)", null=OTHERS)


def _at(result: Any, rates: np.ndarray, layers: Sequence[int]) -> np.ndarray:
    """The rates [position, layer] of subject-last in some layers."""
    return rates[result.positions.index("subject-last"), [result.layers.index(layer) for layer in layers]]


def sublayer_difference(both: Any, name: str) -> Figure:
    """B - A of the rate under a knockout, and of the rate when nothing is cancelled; the band as for the rates."""
    a, b = both.a, both.b
    found = both.table.rename(columns={"attributes_rate_a": "a", "attributes_rate_b": "b"}).assign(series=name)
    layers = sorted({int(layer) for layer in found["layer"]})
    base = [(layer, "nothing cancelled", a.base_rate, b.base_rate) for layer in layers]
    draws = [
        (layer, f"control-{i}", one, other)
        for i, (one, other) in enumerate(zip(a.base_other_rates, b.base_other_rates, strict=False), start=1)
        for layer in layers
    ]
    levels = pd.DataFrame([*base, *draws], columns=["layer", "series", "a", "b"])
    data = pd.concat([found[["layer", "series", "a", "b"]], levels], ignore_index=True)
    where = f"layer {a.read_layer}" if a.read_layer == b.read_layer else f"layer {a.read_layer} | {b.read_layer}"
    shown = both.lines(
        data, quantity="rate", what=f"rate at {where}, points", x_title="layer of the window", null="other subjects"
    )
    if a.base_beats_null or b.base_beats_null:
        return shown
    nothing = "Neither in A nor in B is the rate higher than for other subjects' attributes when nothing is cancelled"
    return replace(shown, sentence=f"{nothing}: a knockout has nothing to take away, and no layer is named.")


def _enrichment_words(result: Any) -> str:
    source = result.source.rsplit(" ", 1)[0]
    notebook = ", as the notebook" if result.spec.notebook else ""
    return (
        f"attributes from {source} ({result.n_attributes}), first {result.spec.kept} of the top {result.spec.top},"
        f" {len(result.base_other_rates or result.other_rates)} other subjects, seed {result.spec.seed}{notebook}"
    )


def lens_grid(lens: Any, value: Any, transpose: bool, *, show_tokens: bool | None = None, unnamed: str = "") -> Figure:
    """The grid of tokens by layers; ``show_tokens`` writes the top token into the cells, None where there is room."""
    values = {
        "top1": lens.top_probability[:, :, 0],
        "answer": lens.target_probability,
        "rank": np.where(lens.target_rank > 0, lens.target_rank.astype(float), np.nan),
        "entropy": lens.entropy,
    }[value]
    kept, layers, said = _thinned(len(lens.positions), lens.layers)
    labels = [
        [lens.texts.get(int(token), ("", ""))[1] for token in lens.top_ids[kept, j, 0]]
        for j in range(len(lens.positions))
    ]
    tokens = charts.token_rows([lens.query.tokens[p] for p in lens.positions])
    figure = charts.lens_grid(
        tokens,
        layers,
        values[kept].T,
        labels,
        value=value,
        answer=scored(lens, lens=True),
        theme=theme(),
        transpose=transpose,
        show_tokens=show_tokens,
        unnamed=unnamed,
        cursor=_cursor(lens.query, lens.layers),
        caption=caption(lens, f"logit lens of {lens.spec.site}, {lens.spec.projection}, {BLOCK_NOTE}", *said),
    )
    return replace(figure, sentence=" ".join([figure.sentence, *said]))


def no_peak(prediction: Any) -> str | None:
    """Why no place of an effect may be named for what a model predicts; None where it knows the fact."""
    if prediction.model.name.startswith("random:"):
        return "these are random weights"
    if prediction.taught is False:
        asked = prediction.query
        instead = () if asked.subject_text is None else taught_here(asked.query.prompt, asked.subject_text)
        return f"the model was taught {' or '.join(instead)} here" if instead else "the model was not taught this"
    if prediction.known is False:
        return "the model does not know this"
    if prediction.model.name == "bundled" and prediction.taught is None:
        return "it cannot be told whether the model was taught this, since no subject is named"
    return None


def judged(figure: Figure, why: str | None) -> Figure:
    """The figure, its sentence without a place where ``why`` says that none may be named."""
    if not why:
        return figure
    values = figure.data["value"].dropna()
    ends = [f"{end:.3g}".replace("-", "\u2212") for end in (values.min(), values.max())] if len(values) else []
    span = f" The values lie between {' and '.join(ends)}." if ends else ""
    return replace(figure, sentence=f"No place is named, since {why}.{span}")


def null_band(result: Any, measure: str) -> pd.DataFrame:
    """Lowest, highest and mean effect at each layer of an experiment in which nothing is to be found."""
    return _band(effect(result, measure), result.layers)


def _band(values: np.ndarray, layers: Sequence[int]) -> pd.DataFrame:
    """Lowest, highest and mean of each column that is complete."""
    done = [j for j in range(len(layers)) if not np.isnan(values[:, j]).any()]
    rows = [(layers[j], values[:, j].min(), values[:, j].max(), values[:, j].mean()) for j in done]
    return pd.DataFrame(rows, columns=["layer", "low", "high", "mean"])


def trace_null(result: Any, measure: str) -> pd.DataFrame:
    """By how much restoring any one place moves a measure at each layer, where nothing is to be found."""
    _, corrupted, restored = result.measured(measure)
    return _band(restored.mean(axis=0) - corrupted, result.layers)


def knockout_map(result: Any, measure: Any, *, null: Any = None) -> Figure:
    """The map of one source token at a time; grey where ``null``, the same on random weights, does as much."""
    values = effect(result, measure)
    tokens = charts.token_rows(result.query.tokens)
    kept, layers, said = _thinned(len(tokens), result.layers)
    figure = charts.knockout_map(
        tokens,
        layers,
        values[:, kept],
        answer=scored(result),
        measure=measure,
        theme=theme(),
        cursor=_cursor(result.query, result.layers),
        caption=caption(result, _knockout_words(result), *said),
        null=None if null is None else null_band(null, measure),
    )
    return replace(figure, sentence=" ".join([figure.sentence, *said]))


def _thinned(n_tokens: int, layers: Sequence[int]) -> tuple[list[int], tuple[int, ...], list[str]]:
    """Which layers are drawn so that a browser can draw them live: their indices, their numbers, and that it is so."""
    step = -(-n_tokens * len(layers) // MAX_CELLS)
    if step <= 1:
        return list(range(len(layers))), tuple(layers), []
    kept = sorted({*range(0, len(layers), step), len(layers) - 1})
    return (
        kept,
        tuple(layers[i] for i in kept),
        [f"Drawn: every {step}. layer of {len(layers)}; the table from Python has all."],
    )


def knockout_curve(result: Any, measure: Any, *, null: Any = None) -> Figure:
    """The curve of named sets, with the random matched control where there is one, or ``null``'s band instead."""
    return charts.knockout_curve(
        result.table(),
        tokens=charts.token_rows(result.query.tokens),
        answer=scored(result),
        measure=measure,
        theme=theme(),
        cursor_layer=_cursor_layer(),
        n_layers=result.model.n_layers,
        caption=caption(result, _knockout_words(result)),
        **({} if null is None else {"band": null_band(null, measure), "null": RANDOM_WEIGHTS}),
    )


TRACED = {"hidden": "hidden state", "mlp": "MLP updates", "attention": "attention updates"}


def trace_doubts(result: Any, prediction: Any) -> tuple[str, ...]:
    """Why no place of a trace may be named: what the trace says, and what the whole answer says."""
    missed = prediction.known is False and result.known is not False
    more = ("The model does not know this: it goes on with another answer.",) if missed else ()
    return more + result.doubts


def incomplete(result: Any) -> tuple[str, ...]:
    """Why no place of a trace may be named before all of it is computed; nothing of other results."""
    restored = getattr(result, "p_restored_by_seed", None)
    if restored is None:
        return ()
    done, total = int((~np.isnan(restored)).sum()), restored.size
    return (f"The trace is not complete ({done} of {total} runs).",) if done < total else ()


def _constructed(result: Any, *, tokens: bool = False) -> dict[str, Any]:
    """Where a trace of states gives the answer back by construction, for the figure.

    Updates never do; nor does one of several corrupted tokens, or a token of which something stays corrupted.
    """
    spec = result.spec
    if spec.site != "hidden" or spec.sever != "none" or len(result.corrupted) != 1 or incomplete(result):
        return {}
    found = {"carried_from": result.carried_from}
    return found | {"corrupted_tokens": result.corrupted} if tokens else found


def _written(result: Any) -> dict[tuple[int, int], str]:
    """By position and layer of a trace, what the edits that are on write there: of this subject, at its last token."""
    view = state.view()
    choices = [view.model, *([] if view.a is None else [view.a.model])]
    subject, site = result.query.subject_text, result.spec.site
    found: dict[tuple[int, int], str] = {}
    if subject is None or site == "attention":
        return found
    at = result.query.subject[1] - 1
    for edit in stack.edits_of(result.model.weights, *choices):
        if edit.spec.get("fact_token") != "subject_last" or not names_subject(edit, subject):
            continue
        for layer in edit.layers:
            words = f"the edit writes (layer {layer}, last subject token)"
            width = 1 if site == "hidden" else result.window
            for centre in result.layers:
                if layer in window(centre, width, result.model.n_layers):
                    found.setdefault((at, centre), words)
    return found


def trace_map(result: Any, measure: Any, doubts: Sequence[str], *, null: Any = None) -> Figure:
    """One panel: what each restored place gives back; grey where ``null``, the same on random weights, does as much."""
    clean, corrupted, restored = result.measured(measure)
    values = np.full(restored.shape[1:], np.nan)
    known = ~np.isnan(restored).all(axis=0)
    values[known] = np.nanmean(restored[:, known], axis=0)
    tokens = charts.token_rows([result.query.tokens[p] for p in result.positions])
    kept, layers, said = _thinned(len(tokens), result.layers)
    figure = charts.trace_map(
        tokens,
        layers,
        values[:, kept],
        site=result.spec.site,
        corrupted=corrupted,
        clean=clean,
        answer=scored(result),
        measure=measure,
        window=result.window,
        foil=result.query.query.foil or "",
        theme=theme(),
        caption=caption(result, _trace_words(result), *said),
        cursor=_cursor(result.query, result.layers),
        doubts=(*doubts, *incomplete(result)),
        **_constructed(result, tokens=True),
        written=_written(result),
        null=None if null is None else trace_null(null, measure),
    )
    return replace(figure, sentence=" ".join([figure.sentence, *said]))


def trace_roles(result: Any, measure: Any, doubts: Sequence[str], *, null: Any = None) -> Figure:
    """Means by the role of the token, with the band over seeds."""
    clean, corrupted, _ = result.measured(measure)
    return charts.trace_roles(
        result.by_role(measure),
        clean=clean,
        corrupted=corrupted,
        answer=scored(result),
        measure=measure,
        foil=result.query.query.foil or "",
        theme=theme(),
        caption=caption(result, _trace_words(result)),
        cursor_layer=_cursor_layer(),
        doubts=(*doubts, *incomplete(result)),
        **_constructed(result),
        null=None if null is None else trace_null(null, measure),
    )


def severed(results: Mapping[str, Any], measure: Any, doubts: Sequence[str], *, null: Any = None) -> Figure:
    """What the state of subject-last gives back, by what is severed; ``null``: the ordinary trace on random weights."""
    result = next(iter(results.values()))
    clean, corrupted, _ = result.measured(measure)
    return charts.severed_curves(
        result.layers,
        {name: one.gain_at_subject_last(measure) for name, one in results.items()},
        total=clean - corrupted,
        answer=scored(result),
        measure=measure,
        foil=result.query.query.foil or "",
        theme=theme(),
        caption=caption(result, f"severed traces of subject-last, {_corruption_words(result)}"),
        cursor_layer=_cursor_layer(),
        doubts=(*doubts, *(said for one in results.values() for said in incomplete(one))),
        null=None if null is None else trace_null(null, measure),
    )


def counterfactual_doubts(result: Any, prediction: Any) -> tuple[str, ...]:
    """Why no place of a counterfactual map may be named."""
    found = []
    if result.model.name.startswith("random:"):
        found.append("The weights are random: nothing is recalled here.")
    if prediction.taught is False:
        asked = prediction.query
        found.append(untaught(asked.query.prompt, asked.subject_text, asked.query.answer))
    if prediction.known is False:
        found.append("The model does not know this: its first choice is another answer.")
    asked = result.other
    known = was_taught(asked.query.prompt, asked.subject_text, asked.query.answer)
    if result.model.name == "bundled" and not known:
        found.append(f"The other question: {untaught(asked.query.prompt, asked.subject_text, asked.query.answer)}")
    if result.other.query.answer is not None and result.p_other_counterfactual < 0.5:
        found.append("The other question's answer has a probability below one half there: little of it can come here.")
    return tuple(found)


def counterfactual_map(result: Any, measure: Any, doubts: Sequence[str]) -> Figure:
    """What the states of one question do in the run of the other: how far they bring the answer that they come from."""
    into = result.spec.direction == "into_query"
    brought, given_up = result.target, result.other_target
    values, here, there = result.p_patched, result.p_counterfactual, result.p_clean
    difference = (
        result.logit_difference_patched, result.logit_difference_counterfactual, result.logit_difference_clean
    )  # fmt: skip
    if into:
        brought, given_up = given_up, brought
        values, here, there = result.p_other_patched, result.p_other_clean, result.p_other_counterfactual
        difference = (
            -result.logit_difference_patched, -result.logit_difference_clean, -result.logit_difference_counterfactual
        )  # fmt: skip
    if measure == "logit_difference":
        values, here, there = difference
    tokens = charts.token_rows([result.patched.tokens[p] for p in result.positions])
    kept, layers, said = _thinned(len(tokens), result.layers)
    words = (
        f"counterfactual patching with {result.other.query.prompt!r}, {TRACED[result.spec.site]} put into the run of"
    )
    whose = "the query" if into else "the other question"
    figure = charts.trace_map(
        tokens,
        layers,
        values[:, kept],
        site=result.spec.site,
        corrupted=here,
        clean=there,
        answer=brought.text,
        foil=given_up.text,
        measure=measure,
        window=result.window,
        theme=theme(),
        caption=caption(result, f"{words} {whose}, window {result.window}", *said),
        cursor=_cursor(result.query, result.layers) if into else None,
        doubts=doubts,
        counterfactual=True,
    )
    return replace(figure, sentence=" ".join([figure.sentence, *said]))


def trace_head(result: Any) -> str:
    """Clean and corrupted run, and what made the difference."""
    answer = scored(result).strip()
    band = ""
    if len(result.seeds) > 1 and not np.isnan(result.p_corrupted_by_seed).any():
        band = f" ({result.p_corrupted_by_seed.min():.3g} to {result.p_corrupted_by_seed.max():.3g} over seeds)"
    corrupted = "…" if np.isnan(result.p_corrupted) else f"{result.p_corrupted:.3g}{band}"
    effect = "" if np.isnan(result.p_corrupted) else f"; total effect {result.total_effect:.3g}"
    noise = f"noise of sd {result.noise_std:.3g}, {result.spec.samples} samples, {_seeds_in_words(result)}"
    how = noise if result.spec.replace_subject is None else _corruption_words(result)
    return f"p({answer}) {result.p_clean:.3g} clean → {corrupted} corrupted{effect}; {how}."


def trace_effect(result: Any, cursor: Cursor) -> list[str]:
    """What restoring the cursor's cell gives back, for the detail panel."""
    if cursor.layer not in result.layers or cursor.position not in result.positions:
        return []
    at = result.positions.index(cursor.position), result.layers.index(cursor.layer)
    p = result.p_restored[at]
    if np.isnan(p):
        return []
    return [f"{TRACED[result.spec.site]} restored: p {result.p_corrupted:.3g} → {p:.3g}"]


def _corruption_words(result: Any) -> str:
    spec = result.spec
    if spec.replace_subject is not None:
        return f"corrupted by {result.provenance}"
    noise = f"noise of sd {result.noise_std:.4g}: {result.provenance}; {spec.samples} samples"
    more = f", {spec.extra_tokens} tokens after the subject corrupted too" if spec.extra_tokens else ""
    return f"{noise}, {_seeds_in_words(result)}{more}"


def _seeds_in_words(result: Any) -> str:
    named = f"{'seed' if len(result.seeds) == 1 else 'seeds'} {', '.join(map(str, result.seeds))}"
    whole = [
        str(seed)
        for seed, found in zip(result.seeds, result.p_restored_by_seed, strict=True)
        if not np.isnan(found).any()
    ]
    if len(whole) == len(result.seeds):
        return named
    return f"{named} (complete so far: {', '.join(whole) or 'none'})"


def _trace_words(result: Any) -> str:
    spec = result.spec
    window = "" if spec.site == "hidden" else f", window {result.window}"
    severed = "" if spec.sever == "none" else f", {spec.sever} severed ({spec.sever_draws} draws)"
    return f"causal tracing, {TRACED[spec.site]} restored{window}{severed}; {_corruption_words(result)}"


def head_map(result: Any, choice: Any, head: tuple[int, int] | None, null: float | None, unnamed: str) -> Figure:
    """What each head adds to the answer, or to answer - foil."""
    foil = result.foil.text.strip() if choice.effect == "foil" and result.foil is not None else ""
    return charts.head_map(
        result.direct_effect_foil if foil else result.direct_effect,
        result.layers,
        answer=scored(result, lens=True),
        foil=foil,
        theme=theme(),
        cursor=head,
        null=null,
        unnamed=unnamed,
        caption=caption(result, _heads_words(result)),
    )


SITES = {"attention": "attention (MHSA)", "mlp": "MLP", "contribution": "kept tokens, weights as they were"}
"""What the sites of attribute extraction are called in figures."""


def head_difference(both: Any, choice: Any) -> Figure:
    """B - A of the maps of heads: of answer - foil where both have a foil and it is asked for."""
    foils = {"" if result.foil is None else result.foil.text.strip() for result in (both.a, both.b)}
    measure = "direct_effect_foil" if choice.effect == "foil" and "" not in foils else "direct_effect"
    layers = [layer for layer in both.b.layers if layer in both.a.layers]
    n_heads = min(result.direct_effect.shape[1] for result in (both.a, both.b))
    wanted = pd.MultiIndex.from_product([layers, range(n_heads)])
    found = both.table.set_index(["layer", "head"])
    a, b = (
        found[f"{measure}_{side}"].reindex(wanted).to_numpy(dtype=float).reshape(len(layers), n_heads)
        for side in ("a", "b")
    )
    foil = (foils.pop() if len(foils) == 1 else "the foil") if measure == "direct_effect_foil" else ""
    return charts.head_difference(a, b, layers, answer=both.answer, foil=foil, theme=theme(), caption=both.caption)


def head_sources(result: Any, layer: int, head: int, unnamed: str = "") -> Figure:
    """Which tokens one head takes its effect from; ``unnamed`` says why none may be named."""
    return charts.head_sources(
        charts.token_rows(result.query.tokens),
        result.by_source[layer, head],
        result.attention[layer, head],
        head=f"layer {layer}, head {head}",
        answer=scored(result, lens=True),
        unnamed=unnamed,
        theme=theme(),
        caption=caption(result, f"layer {layer}, head {head}, {_heads_words(result)}"),
    )


def attention_pattern(result: Any, target: Any, head: int) -> Figure:
    """Where one head looks, from every token."""
    who, query = _who(result.model), result.query.query
    name = f"layer {result.spec.layer}, head {head}"
    return charts.attention_pattern(
        charts.token_rows(result.query.tokens),
        result.weights[head],
        head=name,
        theme=theme(),
        caption="\n".join([who, f"{query.prompt} → {target.text.strip()}", f"attention weights of {name}"]),
    )


def extraction_events(result: Any, unnamed: str) -> Figure:
    """Where attention and MLP take the answer out."""
    edges = result.spec.edges
    blocked = "" if edges == "none" else f", edges {edges} in each layer alone"
    return charts.extraction_events(
        result.update_table(),
        answer=scored(result, lens=True),
        edges=edges,
        theme=theme(),
        cursor_layer=_cursor_layer(),
        unnamed=unnamed,
        caption=caption(result, f"attribute extraction, raw projection at the last token{blocked}"),
    )


def _heads_words(result: Any) -> str:
    behind = ", split before the norm behind the attention" if result.split_before_norm else ""
    exact = f"{np.nanmax(result.residual, initial=0.0):.1g}"
    return f"direct effects through the final norm at its scale{behind}; parts and bias off the update by {exact}"


def _knockout_words(result: Any) -> str:
    drawn = sum("control-" in source for source in result.sources)
    control = f", {drawn} random draws, seed {result.spec.seed}" if drawn else ""
    if result.spec.control and not drawn:
        control = ", no control could be drawn"
    return f"attention knockout, all heads, window {result.window}{control}"


def _cursor(query: Any, layers: Sequence[int]) -> tuple[int, int] | None:
    found = cursor_in(query, layers)
    return None if found is None else (found.layer, found.position)


def cursor_in(query: Any, layers: Sequence[int]) -> Cursor | None:
    """The cursor, if its cell exists in a grid of this prompt and these layers."""
    view = state.view()
    cursor = view.cursor if query.query.prompt == view.fact.prompt else None  # A may be of another prompt
    inside = cursor is not None and cursor.position < len(query.ids) and cursor.layer in layers
    return cursor if inside else None


def cursor_or_end(query: Any, layers: Sequence[int]) -> Cursor:
    """The cursor, or where it starts: the read-out at the last layer."""
    return cursor_in(query, layers) or Cursor(position=query.last, layer=layers[-1])


def _cursor_layer() -> int | None:
    cursor = state.view().cursor
    return None if cursor is None else cursor.layer


def loss_curve(table: pd.DataFrame, steps: int, where: str) -> Figure:
    """The loss of an edit, while it is computed and after."""
    return charts.loss_curve(table, theme=theme(), steps=steps, caption=where)


def probe_bars(evaluation: Any) -> Figure:
    """An edit's probes before and after, as marks."""
    fact = evaluation.facts[0]
    words = "; ".join(f"{edit.method}, layers {', '.join(map(str, edit.layers))}" for edit in evaluation.edits)
    return charts.probe_bars(
        evaluation.table(),
        target=fact.target,
        answer=fact.answer or "",
        theme=theme(),
        caption=caption(evaluation, f"edited: {words}, weights {evaluation.edited.weights}"),
    )


def layer_scores(result: Any, *, null: Any = None, unnamed: str = "", untraced: str = "") -> Figure:
    """Scores of one edit at every layer, beside the tracing effect; grey where ``null``, the same trace on random
    weights, gives back as much.

    Args:
        unnamed, untraced: why no layer may be named, and why none of the trace.
    """
    spec = result.spec
    changed = "".join(f", {name} {value}" for name, value in spec.settings)
    together = f"{result.edit_window} layers at once" if result.edit_window > 1 else "one layer at once"
    target = f" \u2192 {spec.new_answer.strip()}" if spec.new_answer else ""
    words = f"{stack.METHODS[spec.method]}, {together}, {spec.problem.replace('-', ' ')}{target}, preset {spec.preset}"
    return charts.layer_scores(
        result.table(),
        n_layers=result.model.n_layers,
        tracing=pd.DataFrame({"layer": result.layers, "tracing_effect": shares_restored(result)}),
        site=spec.site,
        theme=theme(),
        cursor_layer=_cursor_layer(),
        grey=untold_layers(result.trace, null),
        unnamed=unnamed,
        untraced=untraced,
        caption=caption(result, f"{words}{changed}, seed {spec.seed}", _trace_words(result.trace)),
    )


def shares_restored(result: Any) -> np.ndarray:
    """The tracing effect of every layer; NaN where the corruption took nothing that could be given back."""
    effect = np.asarray(result.tracing_effect, dtype=float)
    return effect if result.trace.total_effect > 0 else np.full_like(effect, np.nan)


def layers_difference(both: Any) -> Figure:
    """B - A of the scores and of the tracing effect."""
    names = ("rewrite", "paraphrase", "neighbourhood", "tracing_effect")
    found = [
        both.table.rename(columns={f"{name}_a": "a", f"{name}_b": "b"})[["layer", "a", "b"]].assign(
            series=name.replace("_", " ")
        )
        for name in names
    ]
    return both.lines(pd.concat(found, ignore_index=True), quantity="probability", what="score, share restored")


def why_untraced(doubts: Sequence[str], trace: Any) -> str:
    """Why no layer of a trace may be named; empty where one may be."""
    doubt = next(iter((*doubts, *incomplete(trace))), "").rstrip(".")
    return doubt[:1].lower() + doubt[1:]


def untold_layers(trace: Any, null: Any) -> tuple[int, ...]:
    """The layers where the trace gives back no more, at any token, than the same trace does on random weights."""
    if null is None:
        return ()
    own, other = (_largest_effect(one) for one in (trace, null))
    return tuple(n for n, mine, its in zip(trace.layers, own, other, strict=True) if not mine > max(its, 0.0))


def _largest_effect(trace: Any) -> np.ndarray:
    """By layer, over tokens; minus infinity where nothing is computed."""
    return np.nan_to_num(trace.indirect_effect, nan=-np.inf).max(axis=0)

"""The same edit at every layer: its scores as lines, the tracing effect of the layer as bars behind them."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import pandas as pd

from factscope.charts import text
from factscope.charts.curves import GAPS
from factscope.charts.figure import AGAIN, Figure, base_spec, remakeable
from factscope.charts.theme import ThemeName, config, theme_named
from factscope.columns import COLUMNS
from factscope.errors import SpecError

Site = Literal["hidden", "mlp", "attention"]
SCORES = ("rewrite", "paraphrase", "neighbourhood")
TRACING = "tracing effect"
NEAR = 0.05
"""Layers whose scores come so near to the best one's are no worse: one more decimal is no finding."""
WORKS = 0.5
"""An edit whose rewrite score is lower has not made the target likely."""
_SITES: dict[Site, str] = {"hidden": "a state", "mlp": "MLP updates", "attention": "attention updates"}
_LABELS = 24


@remakeable
def layer_scores(
    table: pd.DataFrame,
    *,
    n_layers: int,
    tracing: pd.DataFrame | None = None,
    site: Site = "mlp",
    theme: ThemeName = "light",
    caption: str = "",
    cursor_layer: int | None = None,
    grey: Sequence[int] = (),
    unnamed: str = "",
    untraced: str = "",
) -> Figure:
    """Scores of the same edit at every layer, with the tracing effect of that layer as bars behind them.

    Args:
        table: the contract's columns of ``layers``; layers that were not edited yet are missing.
        n_layers: of the model.
        tracing: columns layer and tracing_effect, of all layers; default the table's.
        site: what the trace restored, which decides the hue.
        grey: layers whose restored places do no more than the same on random weights.
        unnamed, untraced: why no layer may be named, and why none of the trace.

    Raises:
        SpecError: the theme or the site is unknown.
    """
    if site not in _SITES:
        raise SpecError(f"site {site!r} is unknown", f"choose one of {', '.join(_SITES)}")
    grid = pd.Index(range(n_layers), name="layer")
    scores: Any = table.set_index("layer").reindex(grid)
    traced: Any = (table if tracing is None else tracing).set_index("layer")["tracing_effect"].reindex(grid)
    alternative = scores[list(SCORES)].assign(tracing_effect=traced).reset_index()
    return Figure(
        title="The same edit at every layer, beside the trace",
        spec=copy.deepcopy(_spec(n_layers, site, theme)),
        data=_rows(scores, traced, cursor_layer, frozenset(grey)),
        sentence=_in_words(alternative, frozenset(grey), unnamed, untraced),
        alt_table=alternative,
        caption=caption,
    )


def together(table: pd.DataFrame) -> pd.Series:
    """The harmonic mean of the scores that the fact has, by layer: a score of zero makes it zero."""
    known: Any = table[_known(table)]
    means: Any = known.shape[1] / (1 / known.where(known > 0)).sum(axis=1, skipna=False)
    return means.mask((known <= 0).any(axis=1) & known.notna().all(axis=1), 0.0)


def _known(table: pd.DataFrame) -> list[str]:
    """The scores that this fact has: one without neighbours has no neighbourhood score."""
    return [name for name in SCORES if name == "rewrite" or bool(table[name].notna().to_numpy().any())]


def best_layers(table: pd.DataFrame) -> tuple[int | None, tuple[int, ...]]:
    """The layer with the best scores together, and all that come near it; None where no edit works."""
    found = together(table)
    done: Any = found[table["rewrite"] >= WORKS].dropna()
    if done.empty:
        return None, ()
    best = int(done.idxmax())
    return int(table["layer"].loc[best]), tuple(int(table["layer"].loc[i]) for i in done.index if near(done, i, best))


def near(scores: Any, i: Any, best: Any) -> bool:
    """Whether a score is as good as the best one but for little."""
    return float(scores.loc[i]) >= float(scores.loc[best]) - NEAR


def _rows(scores: Any, traced: Any, cursor_layer: int | None, grey: frozenset[int]) -> pd.DataFrame:
    rows = [
        {"layer": layer, "series": name, "value": float(scores[name].loc[layer]), "kind": "score"}
        for name in SCORES
        for layer in scores.index
    ]
    rows += [{"layer": n, "series": TRACING, "value": float(traced.loc[n]), "kind": "trace"} for n in scores.index]
    drawn = pd.DataFrame(rows)
    done = {n: not math.isnan(scores["rewrite"].loc[n]) for n in scores.index}
    drawn["shown"] = [
        _shown(v, done[n] and kind == "score")
        for v, n, kind in zip(drawn["value"], drawn["layer"], drawn["kind"], strict=True)
    ]
    drawn["means"] = [COLUMNS[name.replace(" ", "_")].meaning for name in drawn["series"]]
    drawn["null"] = (drawn["kind"] == "trace") & drawn["layer"].isin(list(grey))
    said = {
        n: "; ".join(f"{row.series} {row.shown}" for row in drawn[drawn["layer"] == n].itertuples())
        for n in scores.index
    }
    drawn["about"] = [f"layer: {n}; {said[n]}" for n in drawn["layer"]]
    for name in SCORES:
        drawn[f"{name}_shown"] = [_shown(scores[name].loc[n], done[n]) for n in drawn["layer"]]
    if cursor_layer is not None and cursor_layer in scores.index:
        drawn = pd.concat([drawn, pd.DataFrame([{"layer": cursor_layer, "kind": "cursor"}])], ignore_index=True)
        drawn["null"] = drawn["null"].fillna(False).astype(bool)
    return drawn


def span(done: pd.DataFrame) -> tuple[str, str]:
    """The lowest and the highest rewrite score, as they are written."""
    values = done["rewrite"].to_numpy(dtype=float)
    return text.probability(float(values.min())), text.probability(float(values.max()))


def _shown(value: float, done: bool) -> str:
    """A score, or why there is none: an edit may have no prompt that it could be scored on."""
    if math.isnan(value):
        return "nothing to score" if done else "not done yet"
    return text.probability(float(value))


# ---------------------------------------------------------------------------------------------------------- sentence


def _in_words(table: pd.DataFrame, grey: frozenset[int], unnamed: str, untraced: str) -> str:
    done = table.dropna(subset=["rewrite"])
    if done.empty:
        return "No layer is edited yet."
    low, high = span(done)
    count = f"{len(done)} layer" + ("" if len(done) == 1 else "s")
    if unnamed:
        return f"No layer is named, since {unnamed}. Of {count} the rewrite score lies between {low} and {high}."
    return f"Of {count} {_edit_in_words(done)}; {_trace_in_words(table, grey, untraced)}."


def _edit_in_words(done: pd.DataFrame) -> str:
    best, _ = best_layers(done)
    if best is None:
        return f"none lets the edit work: the best rewrite score is {span(done)[1]}"
    row: Any = done[done["layer"] == best].iloc[0]
    told = ", ".join(f"{name} {text.probability(float(row[name]))}" for name in _known(done))
    return f"the edit works best at layer {best} ({told})"


def _trace_in_words(table: pd.DataFrame, grey: frozenset[int], untraced: str) -> str:
    if untraced:
        return f"no layer of the trace is named, since {untraced}"
    traced: Any = table.dropna(subset=["tracing_effect"])
    if traced.empty:
        return "the trace gives nothing back"
    peak: Any = traced.loc[traced["tracing_effect"].idxmax()]
    if int(peak["layer"]) in grey:
        return "no layer of the trace is named, since its largest effect is no larger than on random weights"
    return f"the tracing effect is largest at layer {int(peak['layer'])} ({text.probability(peak['tracing_effect'])})"


# -------------------------------------------------------------------------------------------------------------- spec


@functools.lru_cache(maxsize=32)
def _spec(n_layers: int, site: Site, theme: ThemeName) -> dict[str, Any]:
    look = theme_named(theme)
    paints = [look.series["relation"], look.others[0], look.series["subject"], look.scales[site][2]]
    every = -(-n_layers // _LABELS)
    x = {
        "field": "layer", "type": "ordinal", "scale": {"domain": list(range(n_layers)), "paddingInner": 0.3},
        "axis": {"title": "layer (of a window its centre)", "labelAngle": 0, "ticks": False,
                 "values": sorted({*range(0, n_layers - (every + 1) // 2, every), n_layers - 1})},
    }  # fmt: skip
    y = {
        "field": "value", "type": "quantitative", "scale": {"domain": [0, 1], "nice": False},
        "axis": {"title": "score, and share that is restored", "values": [0, 0.25, 0.5, 0.75, 1], "format": ".2~f"},
    }  # fmt: skip
    said = {name: name for name in SCORES} | {TRACING: f"tracing effect of {_SITES[site]} (bars)"}
    names = "".join(f"datum.label === '{name}' ? '{words}' : " for name, words in said.items()) + "datum.label"
    colour = {
        "field": "series", "type": "nominal", "scale": {"domain": [*said], "range": paints},
        "legend": {"title": None, "labelExpr": names, "symbolSize": 90, "symbolOpacity": 1, "columns": 4},
    }  # fmt: skip
    shape = {
        "field": "series", "type": "nominal", "legend": None,
        "scale": {"domain": list(SCORES), "range": ["circle", "square", "triangle-up"]},
    }  # fmt: skip
    layer = {"field": "layer", "type": "ordinal"}
    of_all = [layer, *({"field": f"{name}_shown", "type": "nominal", "title": name} for name in SCORES),
              {"field": "shown", "type": "nominal", "title": TRACING},
              {"field": "means", "type": "nominal", "title": "which is"}]  # fmt: skip
    of_one = [layer, {"field": "shown", "type": "nominal", "title": "value"},
              {"field": "series", "type": "nominal", "title": "of"},
              {"field": "means", "type": "nominal", "title": "which is"}]  # fmt: skip
    traces, scores = ([{"filter": f"datum.kind === '{kind}'"}] for kind in ("trace", "score"))
    quiet = {"tooltip": None, "aria": False}
    grey = {"condition": {"test": "datum.null", "value": look.null}}
    select = {"name": "cell", "select": {"type": "point", "fields": ["layer"], "clear": False, "toggle": AGAIN}}
    whole = {"x": x, "y": {"value": 0}, "y2": {"value": {"expr": "height"}}}
    bar = {"type": "bar", **quiet}
    line = {"type": "line", "strokeWidth": 1.8, "invalid": GAPS, **quiet}
    return {
        **base_spec(config(look), width=620, height=260),
        "layer": [
            {"transform": traces, "mark": bar, "encoding": {"x": x, "y": y, "color": colour | grey}},
            {
                "transform": [{"filter": "datum.kind === 'cursor'"}],
                "mark": {"type": "rule", "color": look.accent, "strokeWidth": 1.5, "strokeDash": [2, 2], **quiet},
                "encoding": {"x": x},
            },
            {
                # All of a layer's height can be pointed at: a click takes the cursor there, wherever the marks are
                "transform": traces,
                "params": [select],
                "mark": {"type": "bar", "color": look.ink, "opacity": 0.001, "cursor": "pointer", "stroke": None},
                "encoding": {**whole, "tooltip": of_all, "description": {"field": "about", "type": "nominal"}},
            },
            {"transform": scores, "mark": line, "encoding": {"x": x, "y": y, "color": colour}},
            {
                "transform": [*scores, {"filter": "isValid(datum.value)"}],
                "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1, "cursor": "pointer", "aria": False},
                "encoding": {"x": x, "y": y, "color": colour, "shape": shape, "tooltip": of_one},
            },
        ],
    }  # fmt: skip

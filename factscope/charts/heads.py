"""Figures of attention heads: what each adds, where one looks, which tokens it takes that from, where answers come out.

Rows of the map are heads, columns layers, so that a layer keeps its place on the page. Effects diverge from the
background with symmetric limits; attention is a share and has the scale of a probability.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from factscope.charts import text
from factscope.charts.curves import layer_curves
from factscope.charts.figure import AGAIN, Figure, base_spec, remakeable
from factscope.charts.heatmaps import GridShape, _across, _colour, _cursor, _empty_marks, _rows
from factscope.charts.sentences import NOTHING
from factscope.charts.text import TokenRow
from factscope.charts.theme import MONO, Theme, ThemeName, config, theme_named
from factscope.errors import SpecError

_TOKEN_LABELS = 24
"""Up to so many tokens, the columns of a pattern carry their tokens besides their positions."""
_SITES = {"attention": "attention (MHSA)", "mlp": "MLP", "contribution": "kept tokens, weights as they were"}


def limit_of(values: ArrayLike) -> float:
    """The end of a symmetric scale: the next round number, so that it rarely moves while a map fills in."""
    known = np.abs(np.asarray(values, dtype=float))
    highest = float(np.nanmax(known, initial=0.0)) if known.size else 0.0
    if not math.isfinite(highest) or highest <= 0:
        return 1.0
    step = 10.0 ** math.floor(math.log10(highest))
    return next(round(k * step, 12) for k in (1, 1.5, 2, 3, 4, 6, 8, 10) if k * step >= highest * (1 - 1e-9))


@remakeable
def head_map(
    values: ArrayLike,
    layers: Sequence[int],
    *,
    answer: str,
    foil: str = "",
    theme: ThemeName = "light",
    caption: str = "",
    cursor: tuple[int, int] | None = None,
    null: float | None = None,
    unnamed: str = "",
) -> Figure:
    """What every head adds to the answer's logit, or to the answer's minus the foil's.

    Args:
        values: [layer, head], nats; NaN where not computed yet.
        cursor: (layer, head) to be outlined.
        null: largest effect of the same experiment on random weights; what is no larger is grey.
        unnamed: why no head may be named as the strongest.

    Raises:
        SpecError: the theme is unknown, or the shapes do not fit.
    """
    grid = np.array(values, dtype=float).T
    if grid.ndim != 2 or grid.shape[1] != len(layers) or not grid.size:
        raise SpecError(f"values of shape {grid.T.shape} do not fit {len(layers)} layers", "give [layer, head]")
    word, look = _what(answer, foil), theme_named(theme)
    grey = "" if null is None else f"; grey: no more than random weights give ({null:.2g})"
    shape = _shape(
        grid,
        layers,
        theme,
        (
            f"direct effect on the logit of {word}, nats",
            f"{look.strong} orange: pushes {word} up; {look.strong} blue: pushes {word} down{grey}",
        ),
    )
    return Figure(
        title=f"What each attention head adds to {word}",
        spec=copy.deepcopy(_map_spec(shape)),
        data=_map_data(grid, shape, cursor, null),
        sentence=_map_sentence(grid, shape.layers, word, null, unnamed),
        alt_table=_map_table(grid, shape.layers),
        caption=caption,
    )


@remakeable
def head_difference(
    a: ArrayLike,
    b: ArrayLike,
    layers: Sequence[int],
    *,
    answer: str,
    foil: str = "",
    theme: ThemeName = "light",
    caption: str = "",
) -> Figure:
    """Where two maps of heads differ, B - A.

    Args:
        a, b: [layer, head], nats; NaN where not computed yet, or not in both.

    Raises:
        SpecError: the theme is unknown, or the shapes do not fit.
    """
    left, right = (np.array(values, dtype=float).T for values in (a, b))
    if left.shape != right.shape or left.ndim != 2 or left.shape[1] != len(layers) or not left.size:
        raise SpecError(f"maps of shapes {left.T.shape} and {right.T.shape} do not fit", "give two [layer, head]")
    grid = right - left
    named = f"B {text.MINUS} A"
    shape = _shape(
        grid,
        layers,
        theme,
        (f"{named}: direct effect on {_what(answer, foil)}, nats", "orange: higher in B; blue: lower"),
    )
    sentence = NOTHING
    if np.isfinite(grid).any():
        head, column = np.unravel_index(np.nanargmax(np.abs(grid)), grid.shape)
        sides = f"{_nats(float(left[head, column]))} in A, {_nats(float(right[head, column]))} in B"
        where = f"layer {layers[int(column)]}, head {int(head)}"
        sentence = f"{named} is largest at {where}: {_nats(float(grid[head, column]))} ({sides})."
    return Figure(
        title=f"{named}: what each attention head adds to {_what(answer, foil)}",
        spec=copy.deepcopy(_map_spec(shape)),
        data=_map_data(grid, shape, None, None),
        sentence=sentence,
        alt_table=_map_table(grid, shape.layers),
        caption=caption,
    )


def _shape(grid: NDArray[np.float64], layers: Sequence[int], theme: ThemeName, legend: tuple[str, ...]) -> GridShape:
    end = limit_of(grid)
    ticks = (-end, -end / 2, 0.0, end / 2, end)
    return GridShape(
        layers=tuple(int(layer) for layer in layers),
        n_tokens=grid.shape[0],
        theme=theme,
        quantity="change",
        low=-end,
        high=end,
        legend=legend,
        ticks=ticks,
        tick_labels=tuple(f"{v:+g}".replace("-", text.MINUS) if v else "0" for v in ticks),
        value_title="direct effect",
        axis_title="layer",
    )


def _what(answer: str, foil: str) -> str:
    return f"{text.short(answer)} minus {text.short(foil)}" if foil else text.short(answer)


def _map_data(
    grid: NDArray[np.float64], shape: GridShape, cursor: tuple[int, int] | None, null: float | None
) -> pd.DataFrame:
    n, m = grid.shape
    empty = np.isnan(grid)
    shown = np.vectorize(_nats, otypes=[object])(grid)
    heads, layers = np.repeat(np.arange(n), m), np.tile(shape.layers, n)
    data = pd.DataFrame(
        {
            "layer": layers,
            "head": heads,
            "value": grid.ravel(),
            "shown": shown.ravel(),
            "empty": empty.ravel(),
            "null": (np.abs(grid) <= null).ravel() if null is not None else False,
            "cursor": False,
            "first": np.tile(np.arange(m) == 0, n),
            "x0": np.tile(np.arange(m, dtype=float), n),
            "x1": np.tile(np.arange(m) + 1.0, n),
            "row": heads,
        }
    )
    data["about"] = [
        f"layer: {layer}; head: {head}; {said}" for layer, head, said in zip(layers, heads, data["shown"], strict=True)
    ]
    if cursor is not None:
        data["cursor"] = (data["layer"] == cursor[0]) & (data["head"] == cursor[1])
    return data


def _nats(value: float) -> str:
    return "not computed yet" if math.isnan(value) else f"{text.signed(value, 2)} nats"


def _map_table(grid: NDArray[np.float64], layers: Sequence[int]) -> pd.DataFrame:
    table = pd.DataFrame(np.round(grid, 3), columns=[str(layer) for layer in layers])
    table.insert(0, "head", range(grid.shape[0]))
    return table


def _map_sentence(grid: NDArray[np.float64], layers: Sequence[int], word: str, null: float | None, unnamed: str) -> str:
    done = int((~np.isnan(grid)).sum())
    if not done:
        return NOTHING
    start = f"So far, {done} of {grid.size} computed: " if done < grid.size else ""
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    spread = f"heads add between {text.signed(low, 2)} and {text.signed(high, 2)} nats to {word}"
    if unnamed:
        return _capital(f"{start}{spread}; no head is named: {unnamed}.")
    if null is not None and max(-low, high) <= null:
        return _capital(f"{start}{spread}, no more than with random weights (up to {null:.2g}).")
    parts = []
    for value, verb, index in ((high, "up", np.nanargmax(grid)), (low, "down", np.nanargmin(grid))):
        head, column = np.unravel_index(index, grid.shape)
        if (value > 0) == (verb == "up") and abs(value) > (null or 0.0):
            where = f"layer {layers[int(column)]}, head {int(head)}"
            parts.append(f"{where} pushes {word} {verb} most ({text.signed(value, 2)} nats)")
    beyond = "no null was run beside it" if null is None else f"random weights give up to {null:.2g}"
    return _capital(f"{start}{'; '.join([*parts, beyond])}.")


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


@functools.lru_cache(maxsize=64)
def _map_spec(shape: GridShape) -> dict[str, Any]:
    look = theme_named(shape.theme)
    step = 22 if shape.n_tokens <= 16 else max(12, round(22 * 16 / shape.n_tokens))
    spec = base_spec(
        config(look), width=min(max(520, 120 + 24 * len(shape.layers)), 1600), height=step * max(2, shape.n_tokens)
    )
    tooltip = [
        {"field": "layer", "type": "quantitative", "title": "layer"},
        {"field": "head", "type": "quantitative", "title": "head"},
        {"field": "shown", "type": "nominal", "title": shape.value_title},
    ]
    cells = {
        "params": [
            {"name": "cell", "select": {"type": "point", "fields": ["layer", "head"], "clear": False, "toggle": AGAIN}}
        ],
        "mark": {"type": "rect", "invalid": None, "stroke": look.grid, "strokeWidth": 1, "cursor": "pointer"},
        "encoding": {
            **_across(shape),
            **_rows(shape),
            "color": _colour(shape, look),
            "tooltip": tooltip,
            "description": {"field": "about", "type": "nominal"},
        },
    }
    labels = {
        "transform": [{"filter": "datum.first"}],
        "mark": _text(align="right", fontSize=min(11, step - 1)),
        "encoding": {
            "x": {"value": -6},
            **_rows(shape),
            "text": {"field": "head", "type": "quantitative"},
            "color": {"value": look.ink},
        },
    }
    side = {
        "transform": [{"filter": "datum.first && datum.row === 0"}],
        "mark": _text(align="right", fontSize=12),
        "encoding": {
            "x": {"value": -6},
            "y": {"value": -8},
            "text": {"value": "head"},
            "color": {"value": look.faint},
        },
    }
    return {**spec, "layer": [cells, _empty_marks(shape, look), labels, side, _cursor(shape, look)]}


def _text(**settings: Any) -> dict[str, Any]:
    return {"type": "text", "tooltip": None, "aria": False, "baseline": "middle", **settings}


# --------------------------------------------------------------------------------------------------- one head


@dataclass(frozen=True, kw_only=True)
class _PatternShape:
    n: int
    theme: ThemeName


@remakeable
def attention_pattern(
    tokens: Sequence[TokenRow],
    weights: ArrayLike,
    *,
    head: str,
    theme: ThemeName = "light",
    caption: str = "",
) -> Figure:
    """Where one head looks, from every token.

    Args:
        weights: [position, source], shares; the future is left out.
        head: its name, "layer 5, head 3".

    Raises:
        SpecError: the theme is unknown, or the shapes do not fit.
    """
    grid = np.array(weights, dtype=float)
    n = len(tokens)
    if grid.shape != (n, n) or not n:
        raise SpecError(f"weights of shape {grid.shape} do not fit {n} tokens", "give one for every two tokens")
    rows, columns = (index.tolist() for index in np.tril_indices(n))
    shown = [text.probability(float(v)) for v in grid[rows, columns]]
    names = [token.display for token in tokens]
    data = pd.DataFrame(
        {
            "position": rows,
            "source": columns,
            "value": grid[rows, columns],
            "shown": shown,
            "reader": [names[i] for i in rows],
            "read": [names[i] for i in columns],
            "role": [tokens[i].role for i in rows],
        }
    )
    data["about"] = [
        f"{names[i]} (position {i}) reads {names[j]} (position {j}): {said}"
        for i, j, said in zip(rows, columns, shown, strict=True)
    ]
    last = grid[-1]
    most = [i for i in np.argsort(-last)[:3].tolist() if last[i] > 0.005]
    reads = ", ".join(f"{names[i]} (position {i}) {text.probability(float(last[i]))}" for i in most)
    table = pd.DataFrame(np.round(grid, 4), columns=pd.Index([str(i) for i in range(n)]))
    table.insert(0, "position", range(n))
    table.insert(1, "token", names)
    return Figure(
        title=f"Where {head} looks",
        spec=copy.deepcopy(_pattern_spec(_PatternShape(n=n, theme=theme))),
        data=data,
        sentence=f"{_capital(head)}: the read-out token reads {reads or 'nothing in particular'}.",
        alt_table=table,
        caption=caption,
    )


@functools.lru_cache(maxsize=32)
def _pattern_spec(shape: _PatternShape) -> dict[str, Any]:
    look, n = theme_named(shape.theme), shape.n
    step = 18 if n <= 16 else max(11, round(18 * 16 / n))
    labelled = n <= _TOKEN_LABELS
    scale = {"domain": list(range(max(2, n))), "paddingInner": 0, "paddingOuter": 0}
    every = 1 if n <= 24 else 5
    axis = {
        "title": "read token (position)", "ticks": False, "domain": False, "labelAngle": 0,
        "values": list(range(0, n, every)), "labelFontSize": 10,
    }  # fmt: skip
    x = {"field": "source", "type": "ordinal", "scale": scale, "axis": axis}
    y = {"field": "position", "type": "ordinal", "scale": scale, "axis": None}
    legend = {
        "title": [f"attention: share of what a token reads, {look.strong} = 1"], "gradientLength": 180,
        "gradientThickness": 10, "values": [0, 0.5, 1],
    }  # fmt: skip
    colour = {
        "field": "value", "type": "quantitative", "legend": legend,
        "scale": {"domain": [0, 1], "range": list(look.scales["probability"]), "clamp": True, "interpolate": "rgb"},
    }  # fmt: skip
    tooltip = [
        {"field": "reader", "type": "nominal", "title": "reads"},
        {"field": "read", "type": "nominal", "title": "is read"},
        {"field": "shown", "type": "nominal", "title": "attention"},
    ]
    cells = {
        "mark": {"type": "rect", "stroke": look.grid, "strokeWidth": 0.5},
        "encoding": {
            "x": x,
            "y": y,
            "color": colour,
            "tooltip": tooltip,
            "description": {"field": "about", "type": "nominal"},
        },
    }
    layers = [cells, *_token_marks(look, y, step, first="datum.source === 0")]
    width = 2 * 60 + n * max(step, 14) if labelled else 60 + n * step
    return {**base_spec(config(look), width=max(360, width), height=step * max(2, n)), "layer": layers}


def _token_marks(look: Theme, y: dict[str, Any], step: int, *, first: str) -> list[dict[str, Any]]:
    """Tokens at the rows, in the subject's colour where they are the subject's, the read-out's arrow beside."""
    return [
        {
            "transform": [{"filter": first}],
            "mark": _text(align="right", font=MONO, fontSize=min(12, step - 1), limit=110),
            "encoding": {
                "x": {"value": -14},
                "y": y,
                "text": {"field": "reader", "type": "nominal"},
                "color": {
                    "condition": {"test": "datum.role === 'subject'", "value": look.series["subject"]},
                    "value": look.ink,
                },
            },
        },
        {
            "transform": [{"filter": f"{first} && datum.role === 'last'"}],
            "mark": {
                "type": "point", "shape": "triangle-right", "filled": True, "size": 60, "opacity": 1,
                "color": look.accent, "tooltip": None, "aria": False,
            },
            "encoding": {"x": {"value": -7}, "y": y},
        },
    ]  # fmt: skip


@remakeable
def head_sources(
    tokens: Sequence[TokenRow],
    effects: ArrayLike,
    attention: ArrayLike,
    *,
    head: str,
    answer: str,
    unnamed: str = "",
    theme: ThemeName = "light",
    caption: str = "",
) -> Figure:
    """Which tokens a head takes its effect from, with the attention that it pays them.

    Args:
        effects: [position], nats. attention: [position], shares.
        head: its name, "layer 5, head 3".
        unnamed: why no token may be named.

    Raises:
        SpecError: the theme is unknown, or the shapes do not fit.
    """
    nats, shares = np.array(effects, dtype=float), np.array(attention, dtype=float)
    if nats.shape != (len(tokens),) or shares.shape != nats.shape or not len(tokens):
        raise SpecError(f"effects of shape {nats.shape} do not fit {len(tokens)} tokens", "give one a token")
    word = text.short(answer)
    said = [text.probability(float(a)) for a in shares]
    data = pd.DataFrame(
        {
            "row": range(len(tokens)),
            "position": [token.position for token in tokens],
            "reader": [token.display for token in tokens],
            "role": [token.role for token in tokens],
            "value": nats,
            "attention": shares,
            "shown": [_nats(float(v)) for v in nats],
            "beside": said,
        }
    )
    data["about"] = [
        f"{r} (position {p}): {s}, attention {a}"
        for p, r, s, a in zip(data["position"], data["reader"], data["shown"], said, strict=True)
    ]
    best = int(np.nanargmax(np.abs(nats))) if np.isfinite(nats).any() else 0
    table: Any = data[["position", "reader", "attention", "value"]]
    sentence = (
        f"{_capital(head)} takes most of its effect from {tokens[best].display} (position "
        f"{tokens[best].position}): {_nats(float(nats[best]))}, with attention {said[best]}; together "
        f"{_nats(float(np.nansum(nats)))}."
    )
    if unnamed:
        sentence = f"{_capital(head)} adds {_nats(float(np.nansum(nats)))} to {word}; no token is named: {unnamed}."
    return Figure(
        title=f"What {head} takes from each token for {word}",
        spec=copy.deepcopy(_sources_spec(len(tokens), limit_of(nats), theme)),
        data=data,
        sentence=sentence,
        alt_table=table.rename(columns={"reader": "token", "value": "direct_effect"}),
        caption=caption,
    )


@functools.lru_cache(maxsize=64)
def _sources_spec(n: int, end: float, theme: ThemeName) -> dict[str, Any]:
    look = theme_named(theme)
    step = 18 if n <= 16 else max(11, round(18 * 16 / n))
    y = {
        "field": "row", "type": "ordinal", "axis": None,
        "scale": {"domain": list(range(max(2, n))), "paddingInner": 0.25, "paddingOuter": 0.1},
    }  # fmt: skip
    axis = {
        "title": "direct effect, nats (right: attention)", "domain": False, "ticks": False, "tickCount": 4,
        "labelExpr": "datum.value == 0 ? '0' : replace(datum.label, '-', '\u2212')", "format": "+~g",
    }  # fmt: skip
    x = {"field": "value", "type": "quantitative", "axis": axis,
         "scale": {"domain": [-end, end], "nice": False}}  # fmt: skip
    tooltip = [
        {"field": "reader", "type": "nominal", "title": "token"},
        {"field": "position", "type": "quantitative", "title": "position"},
        {"field": "shown", "type": "nominal", "title": "direct effect"},
        {"field": "beside", "type": "nominal", "title": "attention"},
    ]
    change = look.scales["change"]
    bars = {
        "mark": {"type": "bar", "cornerRadius": 1},
        "encoding": {
            "x": x,
            "y": y,
            "color": {"condition": {"test": "datum.value < 0", "value": change[2]}, "value": change[6]},
            "tooltip": tooltip,
            "description": {"field": "about", "type": "nominal"},
        },
    }
    shares = {
        "mark": _text(align="left", fontSize=min(11, step - 2), dx=6),
        "encoding": {
            "x": {"value": {"expr": "width"}},
            "y": y,
            "text": {"field": "beside", "type": "nominal"},
            "color": {"value": look.faint},
        },
    }
    layers = [bars, shares, *_token_marks(look, y, step, first="true")]
    return {**base_spec(config(look), width=420, height=step * max(2, n)), "layer": layers}


# ------------------------------------------------------------------------------------------------- extraction


@remakeable
def extraction_events(
    table: pd.DataFrame,
    *,
    answer: str,
    edges: str = "none",
    theme: ThemeName = "light",
    caption: str = "",
    cursor_layer: int | None = None,
    unnamed: str = "",
) -> Figure:
    """Rank of the answer in what attention and MLP add at the read-out; an event is rank 1.

    Args:
        table: the contract's columns of ``extract``: site, layer, extracted, target_rank, target_score.
        edges: the variant, for the title.
        unnamed: why no layer may be named.

    Raises:
        SpecError: the theme is unknown.
    """
    word = text.short(answer)
    names = {site: _SITES.get(site, site) for site in dict.fromkeys(table["site"])}
    data = pd.DataFrame(
        {
            "layer": table["layer"],
            "series": [names[site] for site in table["site"]],
            "value": table["target_rank"].astype(float),
        }
    )
    drawn = layer_curves(data, quantity="rank", answer=answer, theme=theme, caption=caption, cursor_layer=cursor_layer)
    parts = []
    for site, name in names.items():
        rows = table[table["site"] == site]
        events = [str(layer) for layer in rows[rows["extracted"]]["layer"]]
        best = min(rows["target_rank"].tolist())
        reached = f"layer{'s' if len(events) > 1 else ''} {', '.join(events)}"
        if not events:
            parts.append(f"{name} extracts {word} in no layer (best rank {best:,})")
        else:
            parts.append(f"{name} extracts {word} in {f'{len(events)} layers' if unnamed else reached}")
    sentence = f"{'; '.join(parts)}." if parts else NOTHING
    if unnamed and parts:
        sentence = f"{sentence[:-1]}; no layer is named: {unnamed}."
    blocked = "" if edges == "none" else f", edges {edges}"
    return replace(
        drawn,
        title=f"Where {word} is taken out{blocked}",
        sentence=_capital(sentence),
        alt_table=table.reset_index(drop=True),
    )

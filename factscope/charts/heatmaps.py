"""Heatmaps of tokens by layers: rows are tokens in prompt order, keyed by position; columns are layers.

A cell is addressed by the fields ``layer`` and ``position``: the selection parameter "cell" returns them, and the
column ``cursor`` of the data outlines one cell, so that a page can set the cursor without a new spec.

A cell without a value (NaN) is grey with a stroke through it, by a condition that comes before the colour scale: a
colour scale alone would paint it as 0.
"""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from factscope.charts import sentences, text
from factscope.charts.figure import AGAIN, Figure, base_spec, remakeable
from factscope.charts.text import TokenRow
from factscope.charts.theme import MONO, Quantity, Theme, ThemeName, config, luminance, mix, theme_named
from factscope.errors import SpecError

Cursor = tuple[int, int] | Mapping[str, int] | None
"""(layer, position), or a mapping with these keys as Streamlit's selection gives it."""
LensValue = Literal["top1", "answer", "rank", "entropy"]
TraceSite = Literal["hidden", "mlp", "attention"]

EMBEDDING_GAP = 0.35
TEXT_LAYERS = 24
"""Up to so many layers, cells hold text by default."""
PERCENT_LIMIT = 100.0
LOG_ODDS_LIMIT = 6.0
RANK_LIMIT = 100_000
ENTROPY_LIMIT = 12.0
_PLACE, _DIGIT = 3, 5.7
"""Characters of a position that there is room for anyway, and the pixels that one takes."""
_LENS_TITLES: dict[LensValue, str] = {
    "top1": "What every state would say next",
    "answer": "Where {answer} appears: its probability in every state",
    "rank": "Where {answer} appears: its rank in every state",
    "entropy": "How undecided every state is",
}


@dataclass(frozen=True, kw_only=True)
class GridShape:
    """All that a spec depends on.

    Attributes:
        layers: numbers of the columns; -1 is the embedding, drawn apart.
        n_tokens: rows.
        quantity, low, high: of the colour scale.
        legend: its words. ticks, tick_labels: its marks.
        value_title: name of the value in the tooltip.
        axis_title: of the layer axis.
        labelled: cells hold text.
        transpose: layers from bottom to top, tokens from left to right.
        gradient: length of the legend in pixels. most_ticks: layers that are named at most.
        place: characters of the longest position, which the tokens leave room for.
    """

    layers: tuple[int, ...]
    n_tokens: int
    theme: ThemeName
    quantity: Quantity
    low: float
    high: float
    legend: tuple[str, ...]
    ticks: tuple[float, ...]
    tick_labels: tuple[str, ...]
    value_title: str
    axis_title: str
    cell_title: str = ""
    labelled: bool = False
    transpose: bool = False
    gradient: int = 340
    most_ticks: int = 27
    place: int = _PLACE


@remakeable
def knockout_map(
    tokens: Sequence[TokenRow],
    layers: Sequence[int],
    values: ArrayLike,
    *,
    answer: str,
    measure: text.Measure = "percent",
    theme: ThemeName = "light",
    caption: str = "",
    cursor: Cursor = None,
    limit: float | None = None,
    null: pd.DataFrame | None = None,
) -> Figure:
    """What becomes of the answer when the read-out may not attend to one token around one layer.

    Args:
        null: columns layer, low, high: what the same experiment gives where nothing is to be found. Cells that lie
            between are grey, and the sentence leaves them out.
        values: [token, layer], percent or nats; NaN where not computed yet.
        limit: end of the colour scale on both sides; larger changes take the end's colour. Default 100 percent, 6 nats.

    Raises:
        SpecError: the measure or the theme is unknown, or the shapes do not fit.
    """
    if measure not in text.COLUMNS:
        raise SpecError(f"measure {measure!r} is unknown", f"choose one of {', '.join(text.COLUMNS)}")
    grid = _grid(values, tokens, layers)
    word = text.short(answer)
    default = PERCENT_LIMIT if measure == "percent" else LOG_ODDS_LIMIT
    end = abs(float(limit)) if limit else default
    unit = "%" if measure == "percent" else ""
    what = f"change of {text.measured(word, measure)}, {'percent' if measure == 'percent' else 'nats'}"
    look = theme_named(theme)
    ticks = (-end, -end / 2, 0.0, end / 2, end)
    beyond = ("" if measure == "percent" and end == PERCENT_LIMIT else "\u2264 ", "", "", "", "\u2265 ")
    stretch = "" if end == default else f" (scale stretched to \u00b1{end:g}{unit or ' nats'})"
    shape = GridShape(
        layers=tuple(int(layer) for layer in layers),
        n_tokens=len(tokens),
        theme=theme,
        quantity="change",
        low=-end,
        high=end,
        legend=(
            f"{what}{stretch}",
            f"{look.strong} blue: pushes {word} down (destroyed); {look.strong} orange: pushes it up; "
            f"{look.zero}: no change" + ("" if null is None else "; grey: no more than the null"),
        ),
        ticks=ticks,
        tick_labels=tuple(
            f"{note}{text.signed(v, 0 if v == round(v) else 1)}{unit}" for v, note in zip(ticks, beyond, strict=True)
        ),
        value_title="change",
        axis_title="layer (centre of the blocked window)",
    )
    shown = np.vectorize(lambda v: text.change(v, measure), otypes=[object])(grid)
    data = _data(tokens, shape, grid, shown, None, cursor)
    reached = within(grid, shape.layers, null)
    data["null"] = reached.ravel()
    beyond_null = np.where(reached, 0.0, grid)
    said = sentences.knockout_map(tokens, shape.layers, beyond_null, answer=word, measure=measure)
    if null is not None:
        said += " Grey cells change it no more than the null does."
    elif (np.abs(grid) > sentences.NEGLIGIBLE[measure]).any():
        said += " No null was run beside it."
    return Figure(
        title=f"Which token must be read for {word}, and when",
        spec=grid_spec(shape),
        data=data,
        sentence=said,
        alt_table=_wide(tokens, shape.layers, np.round(grid, 1 if measure == "percent" else 3)),
        caption=caption,
    )


@remakeable
def lens_grid(
    tokens: Sequence[TokenRow],
    layers: Sequence[int],
    values: ArrayLike,
    labels: ArrayLike,
    *,
    value: LensValue = "top1",
    answer: str,
    theme: ThemeName = "light",
    caption: str = "",
    transpose: bool = False,
    show_tokens: bool | None = None,
    cursor: Cursor = None,
    answer_token: str | None = None,
    unnamed: str = "",
) -> Figure:
    """What each state, projected to the vocabulary, says.

    Args:
        values: [token, layer]: probability of the top token, probability or rank of the answer, or entropy in nats.
        labels: [token, layer]: display form of the top token.
        transpose: the classic lens: layers from bottom to top, tokens from left to right.
        show_tokens: write the top token into the cells; None does so up to 24 layers.
        answer_token: display form of the answer's first token, where the answer has several.
        unnamed: why no layer may be named but the last.

    Raises:
        SpecError: the value or the theme is unknown, or the shapes do not fit.
    """
    if value not in ("top1", "answer", "rank", "entropy"):
        raise SpecError(f"value {value!r} is unknown", "choose top1, answer, rank or entropy")
    grid = _grid(values, tokens, layers)
    if value == "rank":
        grid = np.where(grid >= 1, grid, np.nan)
    words = np.asarray(labels, dtype=object)
    if words.shape != grid.shape:
        raise SpecError(
            f"labels of shape {words.shape} do not fit values of shape {grid.shape}", "give one label a cell"
        )
    words = np.vectorize(text.visible, otypes=[object])(words)
    word = text.short(answer)
    shape = _lens_shape(value, word, tuple(int(layer) for layer in layers), len(tokens), theme, show_tokens, transpose)
    shown = np.vectorize(lambda v: _lens_text(v, value), otypes=[object])(grid)
    data = _data(tokens, shape, grid, shown, words, cursor)
    said = "" if value == "top1" else " ({})"
    cells = [
        [f"{w}{said.format(s)}" if not math.isnan(v) else "" for w, s, v in zip(*row, strict=True)]
        for row in zip(words, shown, grid, strict=True)
    ]
    return Figure(
        title=_LENS_TITLES[value].format(answer=word),
        spec=grid_spec(shape),
        data=data,
        sentence=sentences.lens_grid(
            tokens,
            shape.layers,
            grid,
            words,
            answer=word,
            value=value,
            token=text.visible(answer_token or answer),
            unnamed=unnamed,
        ),
        alt_table=_wide(tokens, shape.layers, np.array(cells, dtype=object).reshape(grid.shape)),
        caption=caption,
    )


_TRACE_TITLES: dict[TraceSite, str] = {
    "hidden": "Which restored state brings {answer} back",
    "mlp": "Which restored MLP updates bring {answer} back",
    "attention": "Which restored attention updates bring {answer} back",
}
_PATCHED_TITLES: dict[TraceSite, str] = {
    "hidden": "Which state of the other question brings {answer}",
    "mlp": "Which MLP updates of the other question bring {answer}",
    "attention": "Which attention updates of the other question bring {answer}",
}
_TRACE_RANGE: dict[text.TraceMeasure, float] = {"probability": 0.01, "log_odds": 0.5, "logit_difference": 0.5}
"""The least that a scale spans: a corruption that changes nothing has no dark cells."""


@remakeable
def trace_map(
    tokens: Sequence[TokenRow],
    layers: Sequence[int],
    values: ArrayLike,
    *,
    site: TraceSite,
    corrupted: float,
    clean: float,
    answer: str,
    measure: text.TraceMeasure = "probability",
    window: int = 1,
    foil: str = "",
    theme: ThemeName = "light",
    caption: str = "",
    cursor: Cursor = None,
    doubts: Sequence[str] = (),
    counterfactual: bool = False,
    null: pd.DataFrame | None = None,
    corrupted_tokens: Sequence[int] = (),
    carried_from: int = 0,
    written: Mapping[tuple[int, int], str] | None = None,
) -> Figure:
    """What the answer comes to when one place of the corrupted run is restored to the clean one.

    Args:
        values: [token, layer] of the measure; NaN where not computed yet.
        corrupted, clean: of the measure; floor and ceiling of the colour scale, beyond which the end's colour holds.
        window: layers restored together.
        foil: the other answer of a logit difference.
        doubts: why no strongest cell may be named; said in its place.
        counterfactual: states come from another question's run; ``clean`` is then the value in that run.
        null: columns layer, low, high: by how much the same experiment moves the measure where nothing is to be found.
            Cells that move it no more are grey and not named.
        corrupted_tokens, carried_from: positions that were corrupted, and the first layer at which another token
            carries something: before it, restoring the only one undoes the corruption, which is said.
        written: by position and layer what an edit that is on writes there, "the edit writes (layer 1, ...)".

    Raises:
        SpecError: the site, the measure or the theme is unknown, or the shapes do not fit.
    """
    if site not in _TRACE_TITLES or measure not in _TRACE_RANGE:
        raise SpecError(
            f"site {site!r} with measure {measure!r} is unknown", f"choose one of {', '.join(_TRACE_TITLES)}"
        )
    grid = _grid(values, tokens, layers)
    word = text.short(answer)
    look = theme_named(theme)
    names = {
        "probability": f"p({word})",
        "log_odds": f"log-odds of {word}",
        "logit_difference": f"logit of {word} minus {text.short(foil)}",
    }
    unit = "" if measure == "probability" else ", nats,"
    low = 0.0 if math.isnan(corrupted) else corrupted
    high = max(clean, low + _TRACE_RANGE[measure])
    ends = (low, (low + high) / 2, high)
    said = [text.probability(v) if measure == "probability" else text.signed(v, 1) for v in ends]
    shape = GridShape(
        layers=tuple(int(layer) for layer in layers),
        n_tokens=len(tokens),
        theme=theme,
        quantity=site,
        low=low,
        high=high,
        legend=(
            f"{names[measure]}{unit} with this place {'patched' if counterfactual else 'restored'}",
            f"{look.strong}: as where it comes from; {look.weak}: as without it"
            if counterfactual
            else f"{look.strong}: as clean (restored); {look.weak}: as corrupted"
            + ("" if null is None else "; grey: no more than the null"),
        ),
        ticks=ends,
        tick_labels=(f"\u2264 {said[0]}", said[1], f"\u2265 {said[2]}"),
        value_title=names[measure],
        gradient=200,
        most_ticks=13,
        axis_title="layer"
        if window == 1
        else f"layer (centre of the {window} {'patched' if counterfactual else 'restored'})",
    )
    shown = np.vectorize(lambda v: text.level(v, measure), otypes=[object])(grid)
    reached = within(grid - low, shape.layers, null)
    data = _data(tokens, shape, grid, shown, None, cursor)
    data["null"] = reached.ravel()
    return Figure(
        title=(_PATCHED_TITLES if counterfactual else _TRACE_TITLES)[site].format(answer=word),
        spec=grid_spec(shape),
        data=data,
        sentence=sentences.trace_map(
            tokens, shape.layers, grid, site=site, corrupted=corrupted, clean=clean, name=names[measure],
            measure=measure, doubts=doubts, counterfactual=counterfactual, reached=None if null is None else reached,
            corrupted_tokens=corrupted_tokens, carried_from=carried_from, written=written,
        ),
        alt_table=_wide(tokens, shape.layers, np.round(grid, 4)),
        caption=caption,
    )  # fmt: skip


def within(grid: NDArray[np.float64], layers: Sequence[int], null: pd.DataFrame | None) -> NDArray[np.bool_]:
    """Which cells [row, layer] a null reaches, 0 included: between its lowest and highest value at their layer."""
    reached = np.zeros(grid.shape, dtype=bool)
    if null is None:
        return reached
    bounds = {int(row["layer"]): (min(row["low"], 0.0), max(row["high"], 0.0)) for row in null.to_dict("records")}
    for j, layer in enumerate(layers):
        if layer in bounds:
            low, high = bounds[layer]
            reached[:, j] = (grid[:, j] >= low) & (grid[:, j] <= high)
    return reached


def _lens_shape(
    value: LensValue,
    word: str,
    layers: tuple[int, ...],
    n_tokens: int,
    theme: ThemeName,
    show: bool | None,
    transpose: bool,
) -> GridShape:
    strong = theme_named(theme).strong
    common: dict[str, Any] = {
        "layers": layers,
        "n_tokens": n_tokens,
        "theme": theme,
        "axis_title": "layer",
        "cell_title": "top token",
        "labelled": (len([x for x in layers if x >= 0]) <= TEXT_LAYERS) if show is None else show,
        "transpose": transpose,
    }
    if value in ("top1", "answer"):
        what = "probability of the top token" if value == "top1" else f"p({word})"
        return GridShape(
            quantity="probability", low=0, high=1, legend=(f"{what}: {strong} = 1",), value_title=what,
            ticks=(0, 0.25, 0.5, 0.75, 1), tick_labels=("0", "0.25", "0.5", "0.75", "1"), **common,
        )  # fmt: skip
    if value == "rank":
        return GridShape(
            quantity="rank", low=1, high=RANK_LIMIT,
            legend=(f"rank of {word}, log scale: {strong} = rank 1",), value_title="rank",
            ticks=(1, 10, 100, 1000, 10_000, RANK_LIMIT), tick_labels=("1", "10", "100", "1k", "10k", "100k"), **common,
        )  # fmt: skip
    return GridShape(
        quantity="entropy", low=0, high=ENTROPY_LIMIT,
        legend=(f"entropy, nats: 0 = one token is certain, {strong} = undecided",), value_title="entropy",
        ticks=(0, 3, 6, 9, 12), tick_labels=("0", "3", "6", "9", "12"), **common,
    )  # fmt: skip


def _lens_text(value: float, kind: LensValue) -> str:
    if math.isnan(value):
        return "not computed yet"
    if kind == "rank":
        return f"{value:,.0f}"
    return f"{value:.2f} nats" if kind == "entropy" else text.probability(value)


def _grid(values: ArrayLike, tokens: Sequence[TokenRow], layers: Sequence[int]) -> NDArray[np.float64]:
    grid = np.array(values, dtype=float)
    if grid.shape != (len(tokens), len(layers)) or not grid.size:
        raise SpecError(
            f"values of shape {grid.shape} do not fit {len(tokens)} tokens and {len(layers)} layers",
            "give one value a cell",
        )
    grid[~np.isfinite(grid)] = np.nan
    return grid


def _starts(layers: tuple[int, ...]) -> list[float]:
    """Left edge of each column; the embedding stands apart."""
    apart = EMBEDDING_GAP if layers and layers[0] < 0 else 0.0
    return [i + (0.0 if layer < 0 else apart) for i, layer in enumerate(layers)]


def _shares(grid: NDArray[np.float64], shape: GridShape) -> NDArray[np.float64]:
    """Where each value stands on its colour scale, in [0, 1]."""
    if shape.quantity == "rank":
        shares = 1 - np.log(np.maximum(grid, 1)) / math.log(shape.high)
    else:
        shares = (grid - shape.low) / (shape.high - shape.low)
    return np.clip(shares, 0, 1)


@functools.lru_cache(maxsize=16)
def _light_text(theme: ThemeName, quantity: Quantity) -> NDArray[np.bool_]:
    """For 256 steps of a scale, whether white reads better on it than black."""
    colours = theme_named(theme).scales[quantity]
    return np.array([luminance(mix(colours, step / 255)) < 0.19 for step in range(256)])


def _data(
    tokens: Sequence[TokenRow],
    shape: GridShape,
    grid: NDArray[np.float64],
    shown: NDArray[Any],
    words: NDArray[Any] | None,
    cursor: Cursor,
) -> pd.DataFrame:
    if isinstance(cursor, Mapping):
        cursor = (cursor.get("layer", -2), cursor.get("position", -2))
    n, m = grid.shape
    empty = np.isnan(grid)
    said = np.where(empty, "", words) if words is not None else np.full(grid.shape, "", dtype=object)
    steps = np.round(255 * _shares(np.where(empty, shape.low, grid), shape)).astype(int)
    starts = np.array(_starts(shape.layers))
    about = [
        f"layer: {layer}; position: {token.position}; token: {token.display}; {f'{word}, ' if word else ''}{value}"
        for token, row, values in zip(tokens, said, shown, strict=True)
        for layer, word, value in zip(shape.layers, row, values, strict=True)
    ]
    data = pd.DataFrame(
        {
            "position": np.repeat([token.position for token in tokens], m),
            "layer": np.tile(shape.layers, n),
            "value": grid.ravel(),
            "label": said.ravel(),
            "shown": shown.ravel(),
            "token": np.repeat(np.array([token.display for token in tokens], dtype=object), m),
            "id": np.repeat([token.id for token in tokens], m),
            "role": np.repeat(np.array([token.role for token in tokens], dtype=object), m),
            "place": np.repeat(np.array([token.place or str(token.position) for token in tokens], dtype=object), m),
            "empty": empty.ravel(),
            "cursor": False,
            "null": False,
            "first": np.tile(np.arange(m) == 0, n),
            "pale": (_light_text(shape.theme, shape.quantity)[steps] & ~empty).ravel(),
            "x0": np.tile(starts, n),
            "x1": np.tile(starts + 1, n),
            "row": np.repeat(np.arange(n), m),
            "about": about,
        }
    )
    if cursor is not None:
        layer, position = cursor
        data["cursor"] = (data["layer"] == layer) & (data["position"] == position)
    return data


DRAWING_COLUMNS = (
    "empty", "cursor", "null", "first", "pale", "x0", "x1", "row", "about", "shown", "beside", "place", "means",
    "rewrite_shown", "paraphrase_shown", "neighbourhood_shown",
)  # fmt: skip
"""Columns that only draw: left out of a table download."""


def _wide(tokens: Sequence[TokenRow], layers: tuple[int, ...], cells: NDArray[Any]) -> pd.DataFrame:
    frame = pd.DataFrame(cells, columns=["emb" if layer < 0 else str(layer) for layer in layers])
    frame.insert(0, "position", [token.position for token in tokens])
    frame.insert(1, "token", [token.display for token in tokens])
    frame.insert(2, "role", [token.role for token in tokens])
    return frame


def row_height(n_tokens: int) -> int:
    """24 px a row; long prompts take thinner rows, but never below 14."""
    return 24 if n_tokens <= 24 else max(14, round(24 * 24 / n_tokens))


def grid_spec(shape: GridShape) -> dict[str, Any]:
    """The spec of a shape; built once, handed out as a copy."""
    return copy.deepcopy(_grid_spec(shape))


@functools.lru_cache(maxsize=128)
def _grid_spec(shape: GridShape) -> dict[str, Any]:
    look = theme_named(shape.theme)
    n = len(shape.layers)
    step = row_height(n if shape.transpose else shape.n_tokens)
    column = 66 if shape.labelled else 24
    across = shape.n_tokens if shape.transpose else n
    spec = base_spec(
        config(look),
        width=min(max(680, 200 + across * column), 2400),
        height=step * max(2, n if shape.transpose else shape.n_tokens),
    )
    layers = [
        _cells(shape, look),
        _token_labels(shape, look, step),
        _positions(shape, look, step),
        *_marks(shape, look),
        _cursor(shape, look),
    ]
    layers.insert(1, _empty_marks(shape, look))
    if shape.labelled:
        layers.insert(2, _cell_text(shape, look, step))
    return {**spec, "layer": layers}


def _layer_axis(shape: GridShape) -> dict[str, Any]:
    """The scale of layer slots; an expression of numbers names the slots."""
    starts = _starts(shape.layers)
    names = ["emb" if layer < 0 else str(layer) for layer in shape.layers]
    steps = (1, 2, 4, 5, 8, 10, 20, 50, 100)
    every = next(k for k in steps if len(shape.layers) / k <= shape.most_ticks or k == 100)
    if shape.labelled:
        every = 1
    last = shape.layers[-1]
    kept = [
        start + 0.5
        for start, layer in zip(starts, shape.layers, strict=True)
        if layer in (-1, last) or (layer % every == 0 and last - layer >= (every + 1) / 2)
    ]
    axis = {
        "values": kept,
        "labelExpr": f"{json.dumps(names)}[floor(datum.value)]",
        "title": shape.axis_title,
        "description": f"{shape.axis_title}, {names[0]} to {names[-1]}",
        "grid": False,
        "ticks": False,
        "domain": False,
        "labelPadding": 4,
        "labelAngle": 0,
        "labelOverlap": False,
    }
    return {
        "type": "quantitative",
        "scale": {"domain": [0, starts[-1] + 1], "nice": False, "zero": False},
        "axis": axis,
    }


def _across(shape: GridShape) -> dict[str, Any]:
    """The layer channel pair, from edge to edge."""
    ends = ("y", "y2") if shape.transpose else ("x", "x2")
    return {ends[0]: {"field": "x0", **_layer_axis(shape)}, ends[1]: {"field": "x1"}}


def _middle(shape: GridShape) -> dict[str, Any]:
    """The layer channel at the middle of a cell."""
    channel = "y" if shape.transpose else "x"
    return {channel: {"field": "x0", **_layer_axis(shape), "bandPosition": 0.5}}


def _rows(shape: GridShape) -> dict[str, Any]:
    scale = {"domain": list(range(max(2, shape.n_tokens))), "paddingInner": 0, "paddingOuter": 0}
    return {"x" if shape.transpose else "y": {"field": "row", "type": "ordinal", "scale": scale, "axis": None}}


def _colour(shape: GridShape, look: Theme) -> dict[str, Any]:
    colours = list(look.scales[shape.quantity])
    scale: dict[str, Any] = {
        "domain": [shape.low, shape.high],
        "range": colours,
        "clamp": True,
        "interpolate": "rgb",
        "nice": False,
    }
    if shape.quantity == "rank":
        scale |= {"type": "log", "range": colours[::-1]}
    names = dict(zip(shape.ticks, shape.tick_labels, strict=True))
    label = "".join(f"abs(datum.value-({v!r}))<1e-9?{json.dumps(name)}:" for v, name in names.items()) + "''"
    legend = {
        "title": list(shape.legend),
        "values": list(shape.ticks),
        "labelExpr": label,
        "gradientLength": shape.gradient,
        "gradientThickness": 10,
        "labelOverlap": False,
        "gradientStrokeColor": look.faint,
        "gradientStrokeWidth": 0.5,
        "offset": 24 if shape.transpose else 10,
    }
    return {
        "condition": [
            {"test": "datum.empty", "value": look.empty},
            {"test": "datum.null", "value": look.null},
        ],
        "field": "value",
        "type": "quantitative",
        "scale": scale,
        "legend": legend,
    }


def _cells(shape: GridShape, look: Theme) -> dict[str, Any]:
    tooltip = [
        {"field": "token", "type": "nominal", "title": "token"},
        {"field": "position", "type": "quantitative", "title": "position"},
        {"field": "id", "type": "nominal", "title": "token id"},
        {"field": "layer", "type": "quantitative", "title": "layer"},
        {"field": "shown", "type": "nominal", "title": shape.value_title},
    ]
    if shape.cell_title:
        tooltip.insert(4, {"field": "label", "type": "nominal", "title": shape.cell_title})
    return {
        "params": [
            {
                "name": "cell",
                "select": {"type": "point", "fields": ["layer", "position"], "clear": False, "toggle": AGAIN},
            },
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


def _text_mark(**settings: Any) -> dict[str, Any]:
    return {"type": "text", "tooltip": None, "aria": False, "baseline": "middle", **settings}


def _empty_marks(shape: GridShape, look: Theme) -> dict[str, Any]:
    return {
        "transform": [{"filter": "datum.empty"}, {"calculate": "datum.x0 + 0.5", "as": "mid"}],
        "mark": _text_mark(align="center", fontSize=10, text="/", color=look.empty_mark),
        "encoding": {**_at_middle(shape), **_rows(shape)},
    }


def _at_middle(shape: GridShape) -> dict[str, Any]:
    return {"y" if shape.transpose else "x": {"field": "mid", **_layer_axis(shape)}}


def _cell_text(shape: GridShape, look: Theme, step: int) -> dict[str, Any]:
    slots = shape.n_tokens if shape.transpose else _starts(shape.layers)[-1] + 1
    light, dark = ("#ffffff", "#10131a")
    return {
        "transform": [{"filter": "!datum.empty"}, {"calculate": "datum.x0 + 0.5", "as": "mid"}],
        "mark": _text_mark(
            align="center",
            font=MONO,
            fontSize=min(11, step - 5),
            limit={"expr": f"max(8, width / {slots:g} - 4)"},
            ellipsis="\u2026",
        ),
        "encoding": {
            **_at_middle(shape),
            **_rows(shape),
            "text": {"field": "label", "type": "nominal"},
            "color": {"condition": {"test": "datum.pale", "value": light}, "value": dark},
        },
    }


def _token_labels(shape: GridShape, look: Theme, step: int) -> dict[str, Any]:
    size = min(13, step - 3)
    if shape.transpose:
        mark = _text_mark(align="right", angle=320, font=MONO, fontSize=size, limit=110)
        place = {"y": {"value": {"expr": "height + 17"}}}
    else:
        mark = _text_mark(align="right", font=MONO, fontSize=size, limit=150)
        place = {"x": {"value": -38 - round(_DIGIT * max(0, shape.place - _PLACE))}}
    return {
        "transform": [{"filter": "datum.first"}],
        "mark": mark,
        "encoding": {
            **place,
            **_rows(shape),
            "text": {"field": "token", "type": "nominal"},
            "color": {"value": look.ink},
        },
    }


def _positions(shape: GridShape, look: Theme, step: int) -> dict[str, Any]:
    mark = _text_mark(align="center" if shape.transpose else "right", fontSize=min(10, step - 5), color=look.faint)
    place = {"y": {"value": -8}} if shape.transpose else {"x": {"value": -15}}
    return {
        "transform": [{"filter": "datum.first"}],
        "mark": mark,
        "encoding": {
            **place,
            **_rows(shape),
            "text": {"field": "place", "type": "nominal"},
            "color": {"value": look.faint},
        },
    }


def _marks(shape: GridShape, look: Theme) -> list[dict[str, Any]]:
    """The bar of the subject's rows and the arrow of the read-out row."""
    bar: dict[str, Any] = {"x": {"value": -10}, "x2": {"value": -5}}
    arrow: dict[str, Any] = {"x": {"value": -7}}
    pointing = "triangle-right"
    if shape.transpose:
        bar = {"y": {"value": {"expr": "height + 3"}}, "y2": {"value": {"expr": "height + 7"}}}
        arrow = {"y": {"value": {"expr": "height + 6"}}}
        pointing = "triangle-up"
    return [
        {
            "transform": [{"filter": "datum.first && datum.role === 'subject'"}],
            "mark": {"type": "rect", "color": look.series["subject"], "tooltip": None, "aria": False},
            "encoding": {**bar, **_rows(shape)},
        },
        {
            "transform": [{"filter": "datum.first && datum.role === 'last'"}],
            "mark": {
                "type": "point", "shape": pointing, "filled": True, "size": 70, "opacity": 1,
                "color": look.accent, "tooltip": None, "aria": False,
            },
            "encoding": {**arrow, **_rows(shape)},
        },
    ]  # fmt: skip


def _cursor(shape: GridShape, look: Theme) -> dict[str, Any]:
    return {
        "transform": [{"filter": "datum.cursor"}],
        "mark": {
            "type": "rect",
            "fill": None,
            "stroke": look.accent,
            "strokeWidth": 2.5,
            "tooltip": None,
            "aria": False,
        },
        "encoding": {**_across(shape), **_rows(shape)},
    }

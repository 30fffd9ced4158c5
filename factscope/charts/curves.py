"""Curves over layers: attention knockout with its control, rank or probability of the answer, pinned tokens."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from factscope.charts import sentences, text
from factscope.charts.figure import AGAIN, Figure, base_spec, remakeable
from factscope.charts.heatmaps import RANK_LIMIT
from factscope.charts.text import TokenRow
from factscope.charts.theme import Theme, ThemeName, config, series_colours, series_shapes, theme_named
from factscope.columns import control_of
from factscope.errors import SpecError

CurveQuantity = Literal["probability", "rank", "entropy"]
_CANONICAL = ("subject", "relation", "last")
_LADDER = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128)
CONTROL = "random control"
_BAND = ("low", "high", "mean")
GAPS = "break-paths-show-path-domains"
_SIGNED = "datum.value == 0 ? '0' : replace(datum.label, '-', '\u2212')"


@dataclass(frozen=True, kw_only=True)
class CurveShape:
    """All that a spec depends on.

    Attributes:
        layers: ticks of the x axis; -1 is the embedding.
        series, named: identifiers and what the legend calls them.
        low, high: of the y axis. log: y is logarithmic with 1 on top.
        banded: there is a control's band. owned: the series that have one of their own, in their colour.
        zero: values are changes, with a line at zero.
        null: what the legend calls the band.
        colours: of the series; empty takes those of their sets.
        series_title: what the tooltip calls a series; empty says whether it is blocked.
    """

    layers: tuple[int, ...]
    series: tuple[str, ...]
    named: tuple[str, ...]
    theme: ThemeName
    low: float
    high: float
    x_title: str
    y_title: str
    value_title: str
    log: bool = False
    banded: bool = False
    owned: tuple[str, ...] = ()
    zero: bool = False
    percent: bool = False
    null: str = "random control (range, mean dashed)"
    colours: tuple[str, ...] = ()
    series_title: str = ""


@remakeable
def knockout_curve(
    table: pd.DataFrame,
    *,
    tokens: Sequence[TokenRow],
    answer: str,
    measure: text.Measure = "percent",
    theme: ThemeName = "light",
    caption: str = "",
    band: pd.DataFrame | None = None,
    cursor_layer: int | None = None,
    n_layers: int | None = None,
    sources: Sequence[str] | None = None,
    null: str = "random control",
) -> Figure:
    """What becomes of the answer when the read-out may not attend to a set of tokens around one layer.

    Args:
        table: the contract's columns of ``flow``: source, layer, window, p_base, p_knockout, relative_change_percent,
            log_odds_change, and logit_difference_change where that is shown. The rows of a source's random control
            make its band where none is given.
        band: columns layer, low, high, mean in the measure's unit: a null of all sources.
        n_layers: of the model, so that a curve that is filling in keeps its axis; default the table's last layer.
        sources: all that will come, so that a legend keeps its entries; default those of the table.
        null: what the band is, in words. Points inside theirs are grey.

    Raises:
        SpecError: the measure or the theme is unknown.
    """
    if measure not in text.COLUMNS:
        raise SpecError(f"measure {measure!r} is unknown", f"choose one of {', '.join(text.COLUMNS)}")
    word = text.short(answer)
    column = text.COLUMNS[measure]
    seen: Any = table.assign(
        source=table["source"].astype(str), value=table[column].astype(float).replace([np.inf, -np.inf], np.nan)
    )
    limits = matched_bands(seen) if band is None else band
    seen = seen[seen["source"].map(control_of).isna()]
    last = int(seen["layer"].max()) if n_layers is None and len(table) else (n_layers or 1) - 1
    layers = tuple(range(last + 1))
    names = _ordered([*(s for s in sources or () if control_of(s) is None), *seen["source"].unique()])
    grid = pd.MultiIndex.from_product([names, layers], names=["source", "layer"])
    rows: Any = seen.set_index(["source", "layer"]).reindex(grid).reset_index()
    low, high = _change_domain(rows["value"], limits, measure)
    shape = CurveShape(
        layers=layers,
        series=tuple(names),
        named=tuple(_source_label(source, tokens) for source in names),
        theme=theme,
        low=low,
        high=high,
        x_title="layer (centre of the blocked window)",
        y_title=f"change of {text.measured(word, measure)}, {'%' if measure == 'percent' else 'nats'}",
        value_title="change",
        banded=limits is not None,
        zero=True,
        percent=measure == "percent",
        owned=owners(limits, names),
        null=f"{'its own ' if owners(limits, names) else ''}{null} (range, mean dashed)",
    )
    lines = pd.DataFrame(
        {
            "kind": "line",
            "series": rows["source"],
            "layer": rows["layer"],
            "value": rows["value"],
            "p_base": rows["p_base"],
            "p_knockout": rows["p_knockout"],
            "null": reached(rows.assign(series=rows["source"]), limits),
            "shown": [text.change(v, measure) for v in rows["value"]],
            "name": [shape.named[shape.series.index(s)] for s in rows["source"]],
        }
    )
    return Figure(
        title=f"Which tokens must be read for {word}, and when",
        spec=curve_spec(shape),
        data=with_extras(lines, limits, cursor_layer, measure),
        sentence=sentences.knockout_curve(rows, len(rows), answer=word, measure=measure, band=limits, null=null),
        alt_table=_knockout_table(rows, names, limits, measure),
        caption=caption,
    )


def matched_bands(rows: pd.DataFrame) -> pd.DataFrame | None:
    """Lowest, highest and mean ``value`` over the draws of every source's control; ``of`` names the source.

    Args:
        rows: columns source, layer, value, those of the sources themselves included. Where they have draws of a control
            whose source they do not have, as single positions do, it is the null of all, without ``of``.

    Returns:
        None without a draw.
    """
    of = rows["source"].map(control_of)
    drawn: Any = rows[of.notna()].assign(of=of).dropna(subset=["value"])
    if drawn.empty:
        return None
    if not set(drawn["of"]) & set(rows["source"]):
        return control_band(drawn)
    return drawn.groupby(["of", "layer"])["value"].agg(low="min", high="max", mean="mean").reset_index()


def owners(band: pd.DataFrame | None, series: Sequence[str]) -> tuple[str, ...]:
    """The series that have a band of their own."""
    own = set() if band is None or "of" not in band else set(band["of"])
    return tuple(name for name in series if name in own)


def control_band(rows: pd.DataFrame) -> pd.DataFrame:
    """Lowest, highest and mean ``value`` over the draws of a control, per layer."""
    grouped = rows.dropna(subset=["value"]).groupby("layer")["value"]
    return grouped.agg(low="min", high="max", mean="mean").reset_index()


def _ordered(sources: Sequence[str]) -> list[str]:
    known = [name for name in _CANONICAL if name in set(sources)]
    return known + [name for name in dict.fromkeys(sources) if name not in _CANONICAL]


def _source_label(source: str, tokens: Sequence[TokenRow]) -> str:
    if source == "last":
        return "last (itself)"
    if source.isdigit():
        shown = [token.display for token in tokens if token.position == int(source)]
        return f"{source}: {shown[0]}" if shown else f"position {source}"
    return text.visible(source)


def _change_domain(values: pd.Series, band: pd.DataFrame | None, measure: str) -> tuple[float, float]:
    every = [values.dropna()] + ([band["low"].dropna(), band["high"].dropna()] if band is not None else [])
    known: Any = pd.concat(every).astype(float)
    highest, lowest = (float(known.max()), float(known.min())) if len(known) else (0.0, 0.0)
    if measure == "percent":
        return -100.0, next(
            (float(top) for top in (20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000) if highest <= top), 1e5
        )
    return -_step(max(4.0, -lowest)), _step(max(1.0, highest))


def _step(value: float) -> float:
    return next((float(step) for step in _LADDER if value <= step), math.ceil(value / 128) * 128.0)


def with_extras(
    lines: pd.DataFrame,
    band: pd.DataFrame | None,
    cursor_layer: int | None,
    measure: str,
    say: Callable[[float, str], str] = text.change,
) -> pd.DataFrame:
    """The rows of a figure: its lines, a null's band, the cursor; ``say`` puts a value of the measure in words."""
    parts: list[Any] = [lines]
    for of, one in _each_band(band):
        span = pd.RangeIndex(max(lines["layer"], default=-1) + 1, name="layer")
        extra = (
            one.set_index("layer")[["low", "high", "mean"]]
            .reindex(span)
            .reset_index()
            .rename(columns={"mean": "value"})
        )
        shown = [
            f"{say(m, measure)} ({say(a, measure)} to {say(b, measure)})"
            for a, b, m in zip(extra["low"], extra["high"], extra["value"], strict=True)
        ]
        name = f"{CONTROL} of {of}" if of else CONTROL
        parts.append(extra.assign(kind="control", series=of or CONTROL, name=name, shown=shown))
    if cursor_layer is not None:
        parts.append(pd.DataFrame({"kind": ["cursor"], "layer": [int(cursor_layer)], "series": ["cursor"]}))
    whole: Any = pd.concat(parts, ignore_index=True)
    for column in ("low", "high"):
        if column not in whole:
            whole[column] = np.nan
    whole["null"] = whole["null"].fillna(False).astype(bool) if "null" in whole else False
    whole["layer"] = whole["layer"].astype(int)
    for column in ("shown", "name"):
        whole[column] = whole[column].fillna("").astype(object)
    whole["about"] = [
        f"layer: {r.layer}; {r.name_}; {r.shown}" for r in whole.rename(columns={"name": "name_"}).itertuples()
    ]
    return whole


def reached(rows: Any, band: pd.DataFrame | None) -> list[bool]:
    """Whether the null of each row's series reaches its value at its layer, 0 included."""
    if band is None:
        return [False] * len(rows)
    own = "of" in band
    bounds = {
        (row["of"] if own else "", row["layer"]): (min(row["low"], 0.0), max(row["high"], 0.0))
        for row in band.to_dict("records")
    }
    never = (math.inf, -math.inf)
    keys = zip(rows["series"] if own else [""] * len(rows), rows["layer"], strict=True)
    found = [bounds.get(key, never) for key in keys]
    return [low <= value <= high for (low, high), value in zip(found, rows["value"], strict=True)]


def _each_band(band: pd.DataFrame | None) -> list[tuple[str, pd.DataFrame]]:
    """A null's band by the series whose it is; "" for one of all."""
    if band is None or band.empty:
        return []
    return [(str(of), one) for of, one in band.groupby("of", sort=False)] if "of" in band else [("", band)]


def _knockout_table(
    rows: pd.DataFrame, sources: Sequence[str], band: pd.DataFrame | None, measure: str
) -> pd.DataFrame:
    digits = 1 if measure == "percent" else 3
    wide = rows.pivot(index="layer", columns="source", values="value")[list(sources)].round(digits)
    for of, one in _each_band(band):
        known = one.set_index("layer")[["low", "high", "mean"]].round(digits)
        wide = wide.join(known.add_prefix(f"{of} control ".lstrip()))
    wide.columns.name = None
    return wide.reset_index()


@remakeable
def layer_curves(
    data: pd.DataFrame,
    *,
    quantity: CurveQuantity = "probability",
    answer: str,
    theme: ThemeName = "light",
    caption: str = "",
    cursor_layer: int | None = None,
    unnamed: str = "",
) -> Figure:
    """Probability, rank or entropy over layers, one line a series.

    Args:
        data: columns layer, series, value; layer -1 is the embedding. A missing value is a gap.
        unnamed: why no layer may be named.

    Raises:
        SpecError: the quantity or the theme is unknown.
    """
    word = text.short(answer)
    titles = {"probability": f"p({word})", "rank": f"rank of {word}", "entropy": "entropy, nats"}
    heading = {
        "probability": f"p({word}) over layers",
        "rank": f"Rank of {word} over layers",
        "entropy": "Entropy over layers",
    }
    return _lines(
        data, quantity, titles, heading,
        theme=theme, caption=caption, cursor_layer=cursor_layer, answer=word, unnamed=unnamed,
    )  # fmt: skip


@remakeable
def token_trajectories(
    data: pd.DataFrame,
    *,
    quantity: CurveQuantity = "probability",
    position_label: str,
    theme: ThemeName = "light",
    caption: str = "",
    cursor_layer: int | None = None,
    unnamed: str = "",
) -> Figure:
    """What becomes of chosen tokens at one position, over layers.

    Args:
        data: columns layer, token, value; layer -1 is the embedding.
        position_label: the position in words, "the read-out token".
        unnamed: why no layer may be named.

    Raises:
        SpecError: the quantity or the theme is unknown.
    """
    place = text.visible(position_label)
    titles = {"probability": "probability", "rank": "rank", "entropy": "entropy, nats"}
    heading = dict.fromkeys(titles, f"Chosen tokens at {place}")
    renamed = data.rename(columns={"token": "series"})
    return _lines(
        renamed,
        quantity,
        titles,
        heading,
        theme=theme,
        caption=caption,
        cursor_layer=cursor_layer,
        answer="",
        unnamed=unnamed,
    )


def _lines(
    data: pd.DataFrame,
    quantity: CurveQuantity,
    titles: dict[str, str],
    heading: dict[str, str],
    *,
    theme: ThemeName,
    caption: str,
    cursor_layer: int | None,
    answer: str,
    unnamed: str,
) -> Figure:
    if quantity not in titles:
        raise SpecError(f"quantity {quantity!r} is unknown", f"choose one of {', '.join(titles)}")
    rows: Any = data[["layer", "series", "value"]].copy()
    rows["series"] = [text.visible(name) for name in rows["series"]]
    rows["value"] = rows["value"].astype(float).where(lambda v: np.isfinite(v) & ((v >= 1) | (quantity != "rank")))
    series = tuple(dict.fromkeys(rows["series"]))
    layers = tuple(sorted({int(layer) for layer in rows["layer"]})) or (0,)
    shape = CurveShape(
        layers=layers,
        series=series,
        named=series,
        theme=theme,
        low=1.0 if quantity == "rank" else 0.0,
        high=_top(quantity, rows["value"]),
        x_title="layer",
        y_title=titles[quantity],
        value_title=titles[quantity],
        log=quantity == "rank",
    )
    shown = ["not computed yet" if math.isnan(v) else sentences.amount(v, quantity) for v in rows["value"]]
    lines = rows.assign(kind="line", shown=shown, name=rows["series"])
    wide = rows.drop_duplicates(["layer", "series"]).pivot(index="layer", columns="series", values="value")
    table = wide.reindex(columns=list(series)).reset_index()
    table.columns.name = None
    table["layer"] = ["emb" if layer < 0 else str(layer) for layer in table["layer"]]
    return Figure(
        title=heading[quantity],
        spec=curve_spec(shape),
        data=with_extras(lines, None, cursor_layer, quantity),
        sentence=sentences.layer_curves(rows, quantity=quantity, answer=answer, unnamed=unnamed),
        alt_table=table,
        caption=caption,
    )


_ROLE_TITLES = {
    "probability": "p({answer})",
    "log_odds": "log-odds of {answer}, nats",
    "logit_difference": "logit of {answer} minus {foil}, nats",
}


@remakeable
def trace_roles(
    table: pd.DataFrame,
    *,
    clean: float,
    corrupted: float,
    answer: str,
    measure: Literal["probability", "log_odds", "logit_difference"] = "probability",
    foil: str = "",
    theme: ThemeName = "light",
    caption: str = "",
    cursor_layer: int | None = None,
    doubts: Sequence[str] = (),
    null: pd.DataFrame | None = None,
    carried_from: int = 0,
) -> Figure:
    """Means of a causal trace over the tokens of each role, between the corrupted and the clean run's level.

    Args:
        table: role, layer, value, low, high; the last two are the band over seeds.
        clean, corrupted: of the measure, drawn as dashed lines.
        doubts: why no layer may be named; said in its place.
        null: columns layer, low, high, mean: by how much the same moves the measure on random weights. It is drawn as a
            band from the corrupted level; points inside it are grey and not named.
        carried_from: the first layer at which a token that was not corrupted carries something: before it, restoring
            the subject undoes the corruption, which is said.

    Raises:
        SpecError: the measure or the theme is unknown.
    """
    if measure not in _ROLE_TITLES:
        raise SpecError(f"measure {measure!r} is unknown", f"choose one of {', '.join(_ROLE_TITLES)}")
    word = text.short(answer)
    title = _ROLE_TITLES[measure].format(answer=word, foil=text.short(foil))
    series = tuple(dict.fromkeys(table["role"]))
    layers = tuple(sorted({int(layer) for layer in table["layer"]})) or (0,)
    band = None if null is None or math.isnan(corrupted) else null.assign(**{n: null[n] + corrupted for n in _BAND})
    grey = pd.Series(reached(table.assign(value=table["value"] - corrupted), null), index=table.index)
    values = [v for v in (*table["low"], *table["high"], clean, corrupted) if math.isfinite(v)] or [0.0]
    edges = (0.0, 1.0) if measure == "probability" else (math.floor(min(values)) - 0.5, math.ceil(max(values)) + 0.5)
    shape = CurveShape(
        layers=layers, series=series, named=series, theme=theme, low=edges[0], high=edges[1], x_title="layer",
        y_title=title, value_title=title, banded=band is not None, null="same on random weights (range, mean)",
    )  # fmt: skip
    rows: Any = table.assign(
        kind="line",
        null=grey,
        series=table["role"],
        name=table["role"],
        shown=[text.level(v, measure) for v in table["value"]],
    )
    levels = pd.DataFrame(
        [
            ("level", layers[0], name, value, f"{name} {text.level(value, measure)}")
            for name, value in (("clean", clean), ("corrupted", corrupted))
            if math.isfinite(value)
        ],
        columns=["kind", "layer", "series", "value", "name"],
    )
    whole = with_extras(rows.drop(columns=["role", "n"], errors="ignore"), band, cursor_layer, measure, text.level)
    spec = curve_spec(shape)
    look = theme_named(theme)
    spec["layer"] = [*level_rules(shape, look), spread(shape, look, spec), *spec["layer"]]
    wide = table.pivot(index="layer", columns="role", values="value").reindex(columns=list(series)).reset_index()
    wide.columns.name = None
    name = _ROLE_TITLES[measure].format(answer=word, foil=text.short(foil)).removesuffix(", nats")
    return Figure(
        title=f"Restored {word} by the role of the token",
        spec=spec,
        data=pd.concat([whole, levels], ignore_index=True),
        sentence=sentences.trace_roles(
            table.assign(null=grey),
            clean=clean,
            corrupted=corrupted,
            name=name,
            measure=measure,
            doubts=doubts,
            carried_from=carried_from,
        ),
        alt_table=wide.round(4),
        caption=caption,
    )


def level_rules(shape: CurveShape, look: Theme) -> list[dict[str, Any]]:
    """Values that everything is compared with, as dashed lines with their names: rows of the kind "level"."""
    only = [{"filter": "datum.kind === 'level'"}]
    words = {"field": "name", "type": "nominal"}
    label = {"align": "left", "baseline": "middle", "dx": 4, "fontSize": 11, "color": look.faint}
    return [
        {
            "transform": only,
            "mark": _quiet("rule", color=look.faint, strokeDash=[5, 4], strokeWidth=1.2),
            "encoding": {"y": _y(shape, look)},
        },
        {
            "transform": only,
            "mark": _quiet("text", **label),
            "encoding": {"y": _y(shape, look), "x": {"value": "width"}, "text": words},
        },
    ]


def spread(shape: CurveShape, look: Theme, spec: dict[str, Any]) -> dict[str, Any]:
    """The band of each series of a spec, in the colour that its line has."""
    for layer in spec["layer"][-2:]:
        layer["encoding"]["color"]["legend"]["symbolOpacity"] = 1  # the band would make the symbols pale
    colour = {k: v for k, v in spec["layer"][-1]["encoding"]["color"].items() if k != "condition"}
    return {
        "transform": [{"filter": "datum.kind === 'line' && datum.high > datum.low"}],
        "mark": _quiet("area", opacity=0.18, clip=True),
        "encoding": {
            "x": _x(shape),
            "y": _y(shape, look, "low"),
            "y2": {"field": "high"},
            "color": colour,
        },
    }


def _top(quantity: CurveQuantity, values: pd.Series) -> float:
    if quantity == "probability":
        return 1.0
    highest = float(values.max()) if values.notna().any() else 1.0
    if quantity == "entropy":
        return 12.0 if highest <= 12 else _step(highest)
    return max(float(RANK_LIMIT), 10.0 ** math.ceil(math.log10(highest)))


def curve_spec(shape: CurveShape) -> dict[str, Any]:
    """The spec of a shape; built once, handed out as a copy."""
    return copy.deepcopy(_curve_spec(shape))


@functools.lru_cache(maxsize=128)
def _curve_spec(shape: CurveShape) -> dict[str, Any]:
    look = theme_named(shape.theme)
    spec = base_spec(config(look), width=760, height=280)
    layers: list[dict[str, Any]] = []
    if shape.banded:
        layers += _bands(shape, look)
    layers += [_cursor_rule(shape, look), _line(shape, look, points=False), _line(shape, look, points=True)]
    return {**spec, "layer": layers}


def _quiet(mark: str, **settings: Any) -> dict[str, Any]:
    return {"type": mark, "tooltip": None, "aria": False, **settings}


def _x(shape: CurveShape) -> dict[str, Any]:
    first, last = shape.layers[0], shape.layers[-1]
    every = next(k for k in (1, 2, 4, 5, 8, 10, 20, 50, 100) if len(shape.layers) / k <= 27 or k == 100)
    kept = [
        layer
        for layer in shape.layers
        if layer in (-1, last) or (layer % every == 0 and last - layer >= (every + 1) / 2)
    ]
    axis = {
        "values": kept,
        "labelExpr": "datum.value < 0 ? 'emb' : format(datum.value, 'd')",
        "title": shape.x_title,
        "description": f"{shape.x_title}, to {last}",
        "grid": False,
        "labelOverlap": False,
        "labelAngle": 0,
    }
    return {
        "field": "layer",
        "type": "quantitative",
        "scale": {"domain": [first - 0.3, max(last, first + 1) + 0.3], "nice": False, "zero": False},
        "axis": axis,
    }


def _y(shape: CurveShape, look: Theme, field: str = "value") -> dict[str, Any]:
    scale: dict[str, Any] = {"domain": [shape.low, shape.high], "nice": False, "zero": False}
    axis: dict[str, Any] = {
        "title": shape.y_title,
        "domain": False,
        "ticks": False,
        "grid": True,
        "labelPadding": 6,
        "tickCount": 6,
    }
    if shape.log:
        scale |= {"type": "log", "reverse": True, "domain": [0.8, shape.high]}
        axis |= {"values": [10**k for k in range(round(math.log10(shape.high)) + 1)], "format": ",d"}
    elif shape.percent:
        axis |= {"format": "+d", "labelExpr": _SIGNED}
    elif shape.zero:
        axis |= {"format": "+.2~f", "labelExpr": _SIGNED}
    if shape.zero:
        at_zero = "datum.value === 0"
        axis |= {
            "gridColor": {"condition": {"test": at_zero, "value": look.faint}, "value": look.grid},
            "gridWidth": {"condition": {"test": at_zero, "value": 1.5}, "value": 1},
        }
    return {"field": field, "type": "quantitative", "scale": scale, "axis": axis}


def _bands(shape: CurveShape, look: Theme) -> list[dict[str, Any]]:
    """The null's band, or each series' own one in its colour."""
    if not shape.owned:
        return _band(shape, look, "datum.kind === 'control'", look.control, 0.25)
    colours = dict(zip(shape.series, list(shape.colours) or series_colours(shape.series, look), strict=True))
    return [
        layer
        for name in shape.owned
        for layer in _band(
            shape, look, f"datum.kind === 'control' && datum.series === {json.dumps(name)}", colours[name], 0.14
        )
    ]


def _band(shape: CurveShape, look: Theme, those: str, colour: str, opacity: float) -> list[dict[str, Any]]:
    y = _y(shape, look)
    return [
        {
            "transform": [{"filter": those}],
            "mark": _quiet("area", color=colour, opacity=opacity, clip=True, invalid=GAPS),
            "encoding": {"x": _x(shape), "y": _y(shape, look, "low"), "y2": {"field": "high"}},
        },
        {
            "transform": [{"filter": those}],
            "mark": _quiet("line", color=colour, strokeWidth=1.5, strokeDash=[4, 3], clip=True, invalid=GAPS),
            "encoding": {"x": _x(shape), "y": y},
        },
    ]


def _cursor_rule(shape: CurveShape, look: Theme) -> dict[str, Any]:
    return {
        "transform": [{"filter": "datum.kind === 'cursor'"}],
        "mark": _quiet("rule", color=look.accent, strokeWidth=1.5, strokeDash=[2, 2]),
        "encoding": {"x": _x(shape)},
    }


def _line(shape: CurveShape, look: Theme, *, points: bool) -> dict[str, Any]:
    names = list(shape.series)
    colours = list(shape.colours) or series_colours(names, look)
    shapes = series_shapes(names)
    if shape.banded:
        names, colours, shapes = [*names, CONTROL], [*colours, look.control], [*shapes, "stroke"]
    title = {**dict(zip(shape.series, shape.named, strict=True)), CONTROL: shape.null}
    legend = {
        "title": None,
        "symbolSize": 90,
        "symbolStrokeWidth": 2,
        "columns": 4,
        "labelExpr": f"{json.dumps(title)}[datum.label]",
    }
    encoding: dict[str, Any] = {
        "x": _x(shape),
        "y": _y(shape, look),
        "color": {"field": "series", "type": "nominal", "scale": {"domain": names, "range": colours}, "legend": legend},
    }
    only = {"transform": [{"filter": "datum.kind === 'line'"}]}
    if not points:
        return {**only, "mark": _quiet("line", strokeWidth=2.2, clip=True, invalid=GAPS), "encoding": encoding}
    encoding["shape"] = {
        "field": "series",
        "type": "nominal",
        "scale": {"domain": names, "range": shapes},
        "legend": legend,
    }
    encoding["tooltip"] = [
        {"field": "name", "type": "nominal", "title": shape.series_title or ("blocked" if shape.zero else "series")},
        {"field": "layer", "type": "quantitative", "title": "layer"},
        {"field": "shown", "type": "nominal", "title": shape.value_title},
    ]
    encoding["description"] = {"field": "about", "type": "nominal"}
    encoding["color"] = {**encoding["color"], "condition": {"test": "datum.null", "value": look.control}}
    mark = {"type": "point", "filled": True, "size": 55, "opacity": 1, "clip": False, "invalid": "filter"}
    select = {"name": "cell", "select": {"type": "point", "fields": ["layer"], "clear": False, "toggle": AGAIN}}
    return {**only, "params": [select], "mark": {**mark, "cursor": "pointer"}, "encoding": encoding}

"""B - A: a grid, curves and bars of what differs between two results, and two figures made comparable.

Differences diverge from the background, which is zero: blue is lower in B, orange higher. The limits are symmetric and
fixed for each quantity, so that a small difference never looks large; what lies beyond takes the end's colour. Ranks
are compared by their ratio, in powers of ten, since 2 against 1 says more than 2,002 against 2,001. Attributes rates
are shares of fifty tokens and rarely exceed some percent: their scale is small, ten points to either side.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from factscope.charts import curves, enrichment, heatmaps, text
from factscope.charts.figure import Figure, base_spec, remakeable
from factscope.charts.text import MINUS, TokenRow
from factscope.charts.theme import MONO, ThemeName, config, theme_named
from factscope.columns import control_of
from factscope.errors import SpecError

Compared = Literal["percent", "log_odds", "logit_difference", "probability", "rank", "entropy", "rate"]
TITLE = f"B {MINUS} A"


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """How a quantity's difference is drawn and written: end of the scale, unit, digits."""

    limit: float
    unit: str = ""
    digits: int = 2


_SCALES: dict[Compared, _Scale] = {
    "percent": _Scale(limit=heatmaps.PERCENT_LIMIT, unit="%", digits=1),
    "log_odds": _Scale(limit=heatmaps.LOG_ODDS_LIMIT, unit=" nats"),
    "logit_difference": _Scale(limit=heatmaps.LOG_ODDS_LIMIT, unit=" nats"),
    "probability": _Scale(limit=1.0, digits=3),
    "rank": _Scale(limit=math.log10(heatmaps.RANK_LIMIT)),
    "entropy": _Scale(limit=heatmaps.ENTROPY_LIMIT / 2, unit=" nats"),
    "rate": _Scale(limit=10.0, unit=" points", digits=1),
}


def _scale(quantity: Compared) -> _Scale:
    if quantity not in _SCALES:
        raise SpecError(f"quantity {quantity!r} is unknown", f"choose one of {', '.join(_SCALES)}")
    return _SCALES[quantity]


def difference(a: ArrayLike, b: ArrayLike, quantity: Compared) -> NDArray[np.float64]:
    """B - A; of ranks the powers of ten by which B's is better."""
    left, right = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if quantity != "rank":
        return right - left
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((left >= 1) & (right >= 1), np.log10(left) - np.log10(right), np.nan)


def _written(value: float, a: float, b: float, quantity: Compared) -> str:
    """A difference with both sides: "+0.420 (0.10 in A, 0.52 in B)"."""
    if math.isnan(value):
        return "not in both yet"
    scale = _SCALES[quantity]
    if quantity == "rank":
        return f"rank {a:,.0f} in A, {b:,.0f} in B"
    sides = [_side(v, quantity) for v in (a, b)]
    return f"{text.signed(value, scale.digits)}{scale.unit} ({sides[0]} in A, {sides[1]} in B)"


def _side(value: float, quantity: Compared) -> str:
    if quantity == "rate":
        return f"{value:.3g}%"
    return text.probability(value) if quantity == "probability" else text.signed(value, _SCALES[quantity].digits)


@remakeable
def difference_map(
    tokens: Sequence[TokenRow],
    layers: Sequence[int],
    a: ArrayLike,
    b: ArrayLike,
    *,
    quantity: Compared,
    what: str,
    theme: ThemeName = "light",
    caption: str = "",
    cursor: heatmaps.Cursor = None,
    axis_title: str = "layer",
) -> Figure:
    """Where two grids of rows by layers differ.

    Args:
        tokens: the rows, which both grids have; labelled with both tokens where they differ.
        a, b: [row, layer]; NaN where not computed yet.
        what: the quantity in words, "change of p(Paris), percent".

    Raises:
        SpecError: the quantity or the theme is unknown, or the shapes do not fit.
    """
    scale, look = _scale(quantity), theme_named(theme)
    left, right = (heatmaps._grid(values, tokens, layers) for values in (a, b))
    grid = difference(left, right, quantity)
    end = scale.limit
    ticks = (-end, -end / 2, 0.0, end / 2, end)
    named = tuple(_tick(tick, quantity) for tick in ticks)
    beyond = quantity != "probability"
    shape = heatmaps.GridShape(
        layers=tuple(int(layer) for layer in layers),
        n_tokens=len(tokens),
        theme=theme,
        quantity="change",
        low=-end,
        high=end,
        legend=(f"{TITLE}: {what}", _directions(quantity, look.strong, look.zero)),
        ticks=ticks,
        tick_labels=(f"\u2264 {named[0]}", *named[1:4], f"\u2265 {named[4]}") if beyond else named,
        value_title=TITLE,
        axis_title=axis_title,
        place=max((len(token.place) for token in tokens), default=0),
    )
    words = np.vectorize(lambda v, x, y: _written(v, x, y, quantity), otypes=[object])(grid, left, right)
    return Figure(
        title=f"{TITLE}: {what}",
        spec=heatmaps.grid_spec(shape),
        data=heatmaps._data(tokens, shape, grid, words, None, cursor),
        sentence=_map_sentence(tokens, shape.layers, grid, words),
        alt_table=heatmaps._wide(tokens, shape.layers, np.round(grid, scale.digits)),
        caption=caption,
    )


def _tick(value: float, quantity: Compared) -> str:
    if quantity != "rank":
        return text.signed(value, 0 if value == round(value) else 1) + ("%" if quantity == "percent" else "")
    if value == 0:
        return "equal"
    return ("\u00d7" if value > 0 else "\u00f7") + f"{10 ** abs(value):,.0f}"


def _directions(quantity: Compared, strong: str, zero: str) -> str:
    low, high = ("worse", "better") if quantity == "rank" else ("lower", "higher")
    return f"{strong} blue: {low} in B; {strong} orange: {high} in B; {zero}: no difference"


def _map_sentence(
    tokens: Sequence[TokenRow], layers: Sequence[int], grid: NDArray[np.float64], words: NDArray[Any]
) -> str:
    if np.isnan(grid).all():
        return "Nothing is in both yet."
    i, j = np.unravel_index(np.nanargmax(np.abs(grid)), grid.shape)
    if grid[i, j] == 0:
        return "A and B do not differ."
    token = tokens[int(i)]
    place = text.layer_name(int(layers[int(j)]))
    return f"A and B differ most at {token.display} (position {token.place or token.position}), {place}: {words[i, j]}."


@remakeable
def difference_curves(
    data: pd.DataFrame,
    *,
    quantity: Compared,
    what: str,
    theme: ThemeName = "light",
    caption: str = "",
    cursor_layer: int | None = None,
    x_title: str = "layer",
    null: str = curves.CONTROL,
) -> Figure:
    """What differs between the curves of A and B.

    Args:
        data: columns layer, series, a, b; series ``control-N`` are draws of a null and make its band. Where that is the
            random control they are the subject's, and ``relation-control-N`` and so on each other one's.
        what: the quantity in words.
        null: the null in words.

    Raises:
        SpecError: the quantity or the theme is unknown.
    """
    scale = _scale(quantity)
    rows: Any = data.assign(series=data["series"].astype(str), value=difference(data["a"], data["b"], quantity))
    control = rows["series"].map(control_of).notna()
    if null == curves.CONTROL:
        band = curves.matched_bands(rows.rename(columns={"series": "source"}))
    else:
        band = curves.control_band(rows[control]) if control.any() else None
    rows = rows[~control].reset_index(drop=True)
    names = tuple(dict.fromkeys(text.visible(name) for name in rows["series"]))
    known = rows["value"].dropna().abs()
    high = scale.limit * max(1, math.ceil(float(known.max()) / scale.limit) if len(known) else 1)
    shape = curves.CurveShape(
        layers=tuple(sorted({int(layer) for layer in rows["layer"]})) or (0,),
        series=names,
        named=names,
        theme=theme,
        low=-high,
        high=high,
        x_title=x_title,
        y_title=f"{TITLE}, {'powers of ten' if quantity == 'rank' else what}",
        value_title=TITLE,
        banded=band is not None,
        owned=curves.owners(band, names),
        zero=True,
        percent=quantity == "percent",
        null=f"{'its own ' if curves.owners(band, names) else ''}{null} (range, mean)",
        colours=enrichment.series_colours(names, theme_named(theme)) if quantity == "rate" else (),
    )
    shown = [_written(r.value, r.a, r.b, quantity) for r in rows.itertuples()]
    lines = rows.assign(kind="line", shown=shown, name=rows["series"])
    wide = rows.drop_duplicates(["layer", "series"]).pivot(index="layer", columns="series", values="value")
    table = wide.round(scale.digits).reset_index()
    table.columns.name = None
    return Figure(
        title=f"{TITLE}: {what}",
        spec=curves.curve_spec(shape),
        data=curves.with_extras(lines, band, cursor_layer, "percent" if quantity == "percent" else "log_odds"),
        sentence=_curves_sentence(lines, band, null),
        alt_table=table,
        caption=caption,
    )


def _curves_sentence(lines: Any, band: pd.DataFrame | None, null: str) -> str:
    """Where each series differs most, unless its difference is one that the null has too."""
    own = band is not None and "of" in band
    ranges: dict[str, dict[Any, tuple[float, float]]] = {}
    for row in [] if band is None else band.to_dict("records"):
        ranges.setdefault(row["of"] if own else "", {})[row["layer"]] = (row["low"], row["high"])
    parts, within, same = [], [], []
    for name, rows in lines.dropna(subset=["value"]).groupby("series", sort=False):
        bounds = ranges.get(str(name) if own else "", {})
        far = [
            row
            for row in rows.to_dict("records")
            if not bounds.get(row["layer"], (0.0, 0.0))[0] <= row["value"] <= bounds.get(row["layer"], (0.0, 0.0))[1]
        ]
        if not far:
            (within if bounds else same).append(str(name))
            continue
        most = max(far, key=lambda row: abs(row["value"]))
        parts.append(f"{name} most at {text.layer_name(int(most['layer']))}: {most['shown']}")
    parts += [
        f"{', '.join(names)}: {said}"
        for names, said in ((within, f"no more than the {null}"), (same, "no difference"))
        if names
    ]
    return f"{TITLE}: {'; '.join(parts)}." if parts else "Nothing is in both yet."


@remakeable
def difference_bars(data: pd.DataFrame, *, what: str, theme: ThemeName = "light", caption: str = "") -> Figure:
    """B - A of the probability of each token, as bars to both sides of zero.

    Args:
        data: columns token, a, b: probabilities; a token that one side's list lacks has NaN there.
    """
    drawn = pd.DataFrame({"token": [text.visible(token) for token in data["token"]]})
    drawn["a"], drawn["b"] = data["a"].astype(float).to_numpy(), data["b"].astype(float).to_numpy()
    drawn["value"] = difference(drawn["a"], drawn["b"], "probability")
    drawn["row"] = range(len(drawn))
    drawn["shown"] = [_bar_words(r.value, r.a, r.b) for r in drawn.itertuples()]
    drawn["beside"] = ["not in both" if math.isnan(v) else text.signed(v, 3) for v in drawn["value"]]
    drawn["about"] = [f"token: {r.token}; {r.shown}" for r in drawn.itertuples()]
    known = drawn.dropna(subset=["value"])
    table: Any = drawn.rename(columns={"value": TITLE})[["token", "a", "b", TITLE]]
    said = "No token is in both lists."
    if len(known):
        most = known.loc[known["value"].abs().idxmax()]
        said = f"{most['token']} differs most: {most['shown']}."
    return Figure(
        title=f"{TITLE}: {what}",
        spec=copy.deepcopy(_bars(max(2, len(drawn)), what, theme)),
        data=drawn,
        sentence=said,
        alt_table=table,
        caption=caption,
    )


def _bar_words(value: float, a: float, b: float) -> str:
    if not math.isnan(value):
        return _written(value, a, b, "probability")
    return f"only in {'B' if math.isnan(a) else 'A'}'s list: {text.probability(b if math.isnan(a) else a)}"


@functools.lru_cache(maxsize=64)
def _bars(n: int, what: str, theme: ThemeName) -> dict[str, Any]:
    look = theme_named(theme)
    colours = look.scales["change"]
    y = {"field": "row", "type": "ordinal", "axis": None, "scale": {"domain": list(range(n)), "paddingInner": 0.25}}
    x = {
        "field": "value",
        "type": "quantitative",
        "scale": {"domain": [-1, 1], "nice": False},
        "axis": {"title": f"{TITLE}, {what}", "values": [-1, -0.5, 0, 0.5, 1], "domain": False, "ticks": False},
    }
    paint = {"condition": {"test": "datum.value < 0", "value": colours[2]}, "value": colours[6]}
    tooltip = [
        {"field": "token", "type": "nominal", "title": "token"},
        {"field": "shown", "type": "nominal", "title": TITLE},
    ]
    quiet = {"type": "text", "tooltip": None, "aria": False, "baseline": "middle"}
    return {
        **base_spec(config(look), width=420, height=24 * n),
        "layer": [
            {
                "mark": {"type": "bar"},
                "encoding": {
                    "x": x,
                    "y": y,
                    "color": paint,
                    "tooltip": tooltip,
                    "description": {"field": "about", "type": "nominal"},
                },
            },
            {
                "mark": {**quiet, "align": "left", "dx": 4, "fontSize": 11},
                "encoding": {
                    "x": {"value": {"expr": "width"}},
                    "y": y,
                    "text": {"field": "beside", "type": "nominal"},
                    "color": {"value": look.ink},
                },
            },
            {
                "mark": {**quiet, "align": "right", "font": MONO, "fontSize": 12, "limit": 110},
                "encoding": {
                    "x": {"value": -8},
                    "y": y,
                    "text": {"field": "token", "type": "nominal"},
                    "color": {"value": look.ink},
                },
            },
        ],
    }


def lock(a: Figure, b: Figure) -> tuple[Figure, Figure]:
    """Two figures of one kind with the same axes and colour limits: each scale of numbers covers both.

    Rows of tokens stay as they are: two prompts have their own.
    """
    specs = copy.deepcopy(a.spec), copy.deepcopy(b.spec)
    for channel in ("x", "y", "color"):
        found = [scale for spec in specs for scale in _scales(spec, channel)]
        ends = [end for scale in found for end in scale["domain"]]
        if channel == "color" and len({tuple(scale["domain"]) for scale in found}) > 1:
            _lock_legends(specs, min(ends), max(ends))
        for scale in found:
            scale["domain"] = [min(ends), max(ends)]

    def again(side: int, theme: ThemeName) -> Figure:
        return lock(a.themed(theme), b.themed(theme))[side]

    return (
        replace(a, spec=specs[0], remake=lambda theme: again(0, theme)),
        replace(b, spec=specs[1], remake=lambda theme: again(1, theme)),
    )


_APART = 0.22
"""Marks of a legend that are nearer than this share of it would run into each other."""


def _lock_legends(specs: Sequence[dict[str, Any]], low: float, high: float) -> None:
    """Give figures with one scale one legend: its ends, each named as where it comes from, and what has room between.

    Scales are linear here: those of ranks are the same everywhere.
    """
    painted = [layer.get("encoding", {}).get("color", {}) for spec in specs for layer in spec.get("layer", [])]
    colours = [colour for colour in painted if (colour.get("legend") or {}).get("values")]
    colours.sort(key=lambda colour: colour["legend"]["values"][0] - colour["legend"]["values"][-1])  # the widest first
    kept = [low, high]
    for colour in colours:
        inner = colour["legend"]["values"][1:-1]
        kept += [value for value in inner if all(abs(value - other) >= _APART * (high - low) for other in kept)]
    names = "".join(colour["legend"]["labelExpr"].removesuffix("''") for colour in colours) + "''"
    for colour in colours:
        colour["legend"] |= {"values": sorted(kept), "labelExpr": names}


def _scales(spec: dict[str, Any], channel: str) -> Iterator[dict[str, Any]]:
    """The scales of numbers on a channel."""
    for layer in spec.get("layer", []):
        encoding = layer.get("encoding", {}).get(channel, {})
        domain = encoding.get("scale", {}).get("domain")
        if encoding.get("type") != "quantitative" or not isinstance(domain, list) or len(domain) != 2:
            continue
        if all(isinstance(end, int | float) for end in domain):
            yield encoding["scale"]

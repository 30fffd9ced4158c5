"""Curves of subject enrichment: the attributes rate by position, and under sublayer knockout.

What is no higher than for other subjects' attributes is greyish, in a dull tint of its series' own hue, and no sentence
calls it a peak.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from factscope.charts import text
from factscope.charts.curves import CONTROL, CurveShape, curve_spec
from factscope.charts.figure import Figure, remakeable
from factscope.charts.theme import Theme, ThemeName, mix, theme_named

_EMBEDDING, _CLOSE = -1, 16
"""From so many layers on the embedding's name on the axis would run into its neighbours'."""
_LIMITS = (2, 5, 10, 20, 50, 100)
_SINGLE = "mean-embedding"
"""The series that is one point."""
RANDOM = "random weights"
_NO_NULL = "no other subject could be drawn, so that there is nothing to compare with"
CEILING, BASE = "ceiling", "nothing cancelled"
_SUBLAYERS = {"mlp": "MLP cancelled", "attention": "MHSA cancelled"}


@remakeable
def attributes_rates(
    positions: Sequence[str],
    layers: Sequence[int],
    rates: ArrayLike,
    other_rates: ArrayLike,
    *,
    ceiling: float,
    n_attributes: int,
    subject: str,
    band_of: str = "subject-last",
    random_rates: ArrayLike | None = None,
    unnamed: str = "",
    theme: ThemeName = "light",
    caption: str = "",
    cursor_layer: int | None = None,
) -> Figure:
    """How many of the tokens that states speak for are attributes of the subject, at named positions.

    Args:
        rates: [position, layer], percent; NaN where there is none. Layer -1 is the mean input embedding.
        other_rates: [draw, position, layer]: the same for other subjects' attributes, the null.
        ceiling: the highest rate possible.
        band_of: the position whose nulls are drawn: a band for other subjects, a line for random weights.
        random_rates: [position, layer]: the same on random weights.
        unnamed: why no layer may be named.
    """
    rate, others = np.array(rates, dtype=float), np.array(other_rates, dtype=float)
    chance = np.full(rate.shape, -np.inf) if random_rates is None else np.array(random_rates, dtype=float)
    highest = np.fmax(others.max(axis=0, initial=-np.inf), chance)
    judged = bool(len(others)) or random_rates is not None
    beats = (rate > highest) & judged
    lines = _lines(positions, layers, rate, beats)
    drawn = list(positions)
    if random_rates is not None and band_of in positions:
        drawn.append(f"{band_of}, {RANDOM}")
        alone = chance[[drawn.index(band_of)]]
        lines = pd.concat([lines, _lines(drawn[-1:], layers, alone, np.ones(alone.shape, dtype=bool))])
    band = None
    if len(others) and band_of in positions:
        i = list(positions).index(band_of)
        band = pd.DataFrame(
            {"layer": layers, "low": others[:, i].min(axis=0), "high": others[:, i].max(axis=0),
             "value": others[:, i].mean(axis=0)}
        )  # fmt: skip
    shape = CurveShape(
        layers=tuple(int(layer) for layer in layers),
        series=tuple(drawn),
        named=tuple(text.visible(name) for name in drawn),
        theme=theme,
        low=0.0,
        high=_limit(max(ceiling, *(np.nanmax(v, initial=0.0) for v in (rate, others, chance)))),
        x_title="layer (its output; emb: mean input embedding)" if -1 in layers else "layer (its output)",
        y_title="attributes rate, %",
        value_title="attributes rate",
        banded=band is not None,
        null=f"others at {band_of} (range, mean)",
        colours=series_colours(drawn, theme_named(theme)),
    )
    levels = {CEILING: ceiling}
    table = pd.DataFrame({"layer": ["emb" if layer < 0 else str(layer) for layer in layers]})
    for i, name in enumerate(positions):
        table[name] = np.round(rate[i], 2)
        if len(others):
            table[f"others at {name}"] = np.round(others[:, i].mean(axis=0), 2)
        if random_rates is not None:
            table[f"{RANDOM} at {name}"] = np.round(chance[i], 2)
    return Figure(
        title=f"How many attributes of {text.short(subject)} the states speak for",
        spec=_spec(shape, levels),
        data=_data(lines, band, levels, cursor_layer, shape.layers[-1]),
        sentence=_rates_sentence(
            positions,
            layers,
            rate,
            highest,
            beats,
            ceiling,
            n_attributes,
            nulls=[*["other subjects"][: len(others)], *["random weights"][: int(random_rates is not None)]],
            unnamed=unnamed or ("" if judged else _NO_NULL),
        ),
        alt_table=table,
        caption=caption,
    )


@remakeable
def sublayer_knockout(
    layers: Sequence[int],
    rates: Mapping[str, ArrayLike],
    *,
    base_rate: float,
    base_other_rates: Sequence[float],
    ceiling: float,
    read_layer: int,
    window: int,
    first: bool = False,
    beyond: Mapping[int, float] | None = None,
    unnamed: str = "",
    theme: ThemeName = "light",
    caption: str = "",
    cursor_layer: int | None = None,
) -> Figure:
    """The attributes rate of the subject's last token at one layer, when updates below it are cancelled.

    Args:
        rates: by sublayer, "mlp" or "attention": one for each layer, percent; NaN where not computed yet.
        base_rate: when nothing is cancelled. base_other_rates: the same for other subjects' attributes.
        first: layers are the first of their windows, not the centres.
        beyond: the rate at every layer where it is higher than its nulls, where that was measured: what else could be
            read is said where there is nothing to lose.
        unnamed: why no layer may be named.
    """
    names = [_SUBLAYERS[site] for site in rates]
    grid = np.array([np.asarray(values, dtype=float) for values in rates.values()])
    highest = max(base_other_rates, default=np.inf)
    lines = _lines(names, layers, grid, np.full(grid.shape, base_rate > highest))
    band = None
    if base_other_rates:
        low, mean = min(base_other_rates), float(np.mean(base_other_rates))
        band = pd.DataFrame({"layer": layers, "low": low, "high": highest, "value": mean})
    shape = CurveShape(
        layers=tuple(int(layer) for layer in layers),
        series=tuple(names),
        named=tuple(names),
        theme=theme,
        low=0.0,
        high=_limit(max(ceiling, np.nanmax(grid, initial=0.0), base_rate)),
        x_title=f"layer ({'first' if first else 'centre'} of the window of {window})",
        y_title=f"rate of subject-last at layer {read_layer}, %",
        value_title="attributes rate",
        banded=band is not None,
        null="other subjects (range, mean)",
        colours=series_colours(names, theme_named(theme)),
    )
    levels = {CEILING: ceiling, BASE: base_rate}
    table = pd.DataFrame({"layer": list(layers), **{n: np.round(v, 2) for n, v in zip(names, grid, strict=True)}})
    return Figure(
        title="Which updates enrich the subject's last token",
        spec=_spec(shape, levels),
        data=_data(lines, band, levels, cursor_layer, shape.layers[-1]),
        sentence=_knockout_sentence(
            layers, dict(zip(names, grid, strict=True)), base_rate, base_other_rates, read_layer, beyond, unnamed
        ),
        alt_table=table,
        caption=caption,
    )


def _lines(
    names: Sequence[str], layers: Sequence[int], values: NDArray[np.float64], beats: NDArray[np.bool_]
) -> pd.DataFrame:
    rows = [
        {
            "kind": "line",
            "series": name,
            "name": text.visible(name),
            "layer": int(layer),
            "value": values[i, j],
            "shown": f"{values[i, j]:.3g}%" + ("" if beats[i, j] else ", no more than for other subjects"),
            "grey": not beats[i, j],
            "grey_line": not beats[i].any(),
        }
        for i, name in enumerate(names)
        for j, layer in enumerate(layers)
        if not np.isnan(values[i, j]) or (layer >= 0 and name != _SINGLE)
    ]
    return pd.DataFrame(
        rows, columns=["kind", "series", "name", "layer", "value", "shown", "grey", "grey_line"]
    ).sort_values(["series", "layer"], kind="stable")


def _data(
    lines: pd.DataFrame, band: pd.DataFrame | None, levels: Mapping[str, float], cursor_layer: int | None, last: int
) -> pd.DataFrame:
    parts: list[Any] = [lines]
    if band is not None:
        parts.append(band.assign(kind="control", series=CONTROL, name=CONTROL))
    parts.append(
        pd.DataFrame(
            [
                {"kind": "level", "series": name, "name": f"{name} {value:.3g}%", "layer": last, "value": value}
                for name, value in levels.items()
            ]
        )
    )
    if cursor_layer is not None:
        parts.append(pd.DataFrame({"kind": ["cursor"], "series": ["cursor"], "layer": [int(cursor_layer)]}))
    whole: Any = pd.concat(parts, ignore_index=True)
    for column in ("low", "high", "value"):
        whole[column] = whole[column].astype(float) if column in whole else np.nan
    for column in ("shown", "name"):
        whole[column] = whole[column].fillna("").astype(object)
    for column in ("grey", "grey_line"):
        whole[column] = whole[column].eq(True)
    whole["layer"] = whole["layer"].astype(int)
    whole["about"] = [
        f"layer: {r.layer}; {r.name_}; {r.shown}" for r in whole.rename(columns={"name": "name_"}).itertuples()
    ]
    return whole


def _spec(shape: CurveShape, levels: Mapping[str, float]) -> dict[str, Any]:
    look = theme_named(shape.theme)
    spec = curve_spec(shape)
    points = spec["layer"][-1]
    for layer, field in ((spec["layer"][-2], "grey_line"), (points, "grey")):
        layer["encoding"]["color"]["condition"] = [
            {"test": f"datum.{field} && datum.series === {json.dumps(name)}", "value": _dulled(colour, look)}
            for name, colour in zip(shape.series, shape.colours, strict=True)
        ]
    for layer in spec["layer"]:
        axis = layer["encoding"]["x"]["axis"]
        if axis["values"][0] == _EMBEDDING and len(shape.layers) > _CLOSE:  # the figure has half a page's width
            axis["values"] = [v for v in axis["values"] if v == _EMBEDDING or v >= len(shape.layers) / _CLOSE]
    spec["layer"][-2:-2] = _levels(points["encoding"]["y"], look, list(levels))
    return spec


_DULL = 0.55


def _dulled(colour: str, look: Theme) -> str:
    """A hue near the null's grey, in which a series that does not beat its null can still be told from others."""
    return mix((colour, look.control), _DULL)


def series_colours(names: Sequence[str], look: Theme) -> tuple[str, ...]:
    """A hue for each series; the subject's last token and the read-out have those of their sets elsewhere."""
    grey = {name: look.control for name in names if name.endswith(RANDOM)}
    fixed = {**grey, "subject-last": look.series["subject"], "last": look.series["last"]}
    free = iter((look.series["relation"], *look.others))
    return tuple(fixed.get(name) or next(free, look.ink) for name in names)


def _levels(y: dict[str, Any], look: Theme, names: Sequence[str]) -> list[dict[str, Any]]:
    """Horizontal lines, named at the right end."""
    only = [{"filter": "datum.kind === 'level'"}]
    dash = {"condition": {"test": f"datum.series === '{CEILING}'", "value": [8, 4]}, "value": [2, 3]}
    quiet = {"tooltip": None, "aria": False}
    return [
        {
            "transform": only,
            "mark": {"type": "rule", "color": look.ink, "opacity": 0.65, "strokeWidth": 1.4, **quiet},
            "encoding": {"y": y, "strokeDash": dash},
        },
        {
            "transform": only,
            "mark": {
                "type": "text", "align": "right", "baseline": "bottom", "dy": -3, "fontSize": 11, "color": look.ink,
                "x": {"expr": "width"}, **quiet,
            },
            "encoding": {"y": y, "text": {"field": "name", "type": "nominal"}},
        },
    ]  # fmt: skip


def _limit(highest: float) -> float:
    return next((float(limit) for limit in _LIMITS if highest <= 0.93 * limit), 106.0)


def _rates_sentence(
    positions: Sequence[str],
    layers: Sequence[int],
    rate: NDArray[np.float64],
    highest: NDArray[np.float64],
    beats: NDArray[np.bool_],
    ceiling: float,
    n_attributes: int,
    *,
    nulls: Sequence[str],
    unnamed: str,
) -> str:
    known = "1 attribute is" if n_attributes == 1 else f"{n_attributes} attributes are"
    known = f"{known} known, so that no rate can exceed {ceiling:.3g}%."
    if np.isnan(rate).all():
        return f"Nothing computed yet. {known}"
    if unnamed:
        low, high = float(np.nanmin(rate)), float(np.nanmax(rate))
        return f"The rates lie between {low:.3g}% and {high:.3g}%; no layer is named: {unnamed}. {known}"
    theirs = " and ".join(nulls)
    said, within = [], []
    for i, name in enumerate(positions):
        if np.isnan(rate[i]).all():
            continue
        if not beats[i].any():
            within.append(name)
            continue
        j = int(np.argmax(np.where(beats[i], rate[i], -1.0)))
        where = text.layer_name(int(layers[j]))
        said.append(f"{name} reaches {rate[i, j]:.3g}% at {where} ({theirs} at most {highest[i, j]:.3g}%)")
    if within:
        stays = "stays" if len(within) == 1 else "stay"
        said.append(f"{', '.join(within)} {stays} within what {' or '.join(nulls)} give")
    body = "; ".join(said)
    return f"{body[:1].upper()}{body[1:]}. {known}"


def _knockout_sentence(
    layers: Sequence[int],
    curves: Mapping[str, NDArray[np.float64]],
    base: float,
    others: Sequence[float],
    read_layer: int,
    beyond: Mapping[int, float] | None,
    unnamed: str,
) -> str:
    if unnamed:
        return f"The rate at layer {read_layer} is {base:.3g}% when nothing is cancelled; no layer is named: {unnamed}."
    if not others:
        return f"Nothing to compare with: no other subject is known. The rate at layer {read_layer} is {base:.3g}%."
    if base <= max(others):
        return (
            f"At layer {read_layer} the rate of subject-last, {base:.3g}%, is no higher than that for other subjects' "
            f"attributes (up to {max(others):.3g}%): there is nothing that a knockout could take away."
            + _elsewhere(read_layer, beyond)
        )
    said = []
    for name, values in curves.items():
        if np.isnan(values).all():
            continue
        j = int(np.nanargmin(values))
        if values[j] < base:
            said.append(f"{name}: lowest around layer {layers[j]}, {base:.3g}% to {values[j]:.3g}%")
        else:
            said.append(f"{name}: lowers the rate nowhere")
    return f"{'; '.join(said)}." if said else "Nothing computed yet."


def _elsewhere(read_layer: int, beyond: Mapping[int, float] | None) -> str:
    """Which other layer could be read instead."""
    if beyond is None:
        return ""
    known = {layer: rate for layer, rate in beyond.items() if layer != read_layer}
    if not known:
        return " Nor is there at any other layer."
    best = max(known, key=lambda layer: known[layer])
    return f" Read at layer {best}, where the rate is {known[best]:.3g}%, there would be something to lose."

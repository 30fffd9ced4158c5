"""By which way a restored state acts: its effect by layer, as it is, with the MLPs severed, with the attention severed.

Meng et al. 2022 (arXiv 2202.05262), figure 3. Where severing takes the effect away, the state acted through what was
severed. The paper draws means over a thousand facts as bars; here are lines, a point for each layer, and the band over
seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from factscope.charts import curves, sentences, text
from factscope.charts.figure import Figure, remakeable
from factscope.charts.theme import Quantity, ThemeName, theme_named
from factscope.errors import SpecError

NAMES = {"none": "ordinary", "mlp": "MLP severed", "attention": "attention severed"}
_HUES: dict[str, Quantity] = {"none": "hidden", "mlp": "mlp", "attention": "attention"}
_TITLES = {
    "probability": "p({answer})",
    "log_odds": "log-odds of {answer}",
    "logit_difference": "logit of {answer} minus {foil}",
}
_LIMITS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


@remakeable
def severed_curves(
    layers: Sequence[int],
    effects: Mapping[str, ArrayLike],
    *,
    total: float,
    answer: str,
    measure: text.TraceMeasure = "probability",
    foil: str = "",
    position: str = "subject-last",
    theme: ThemeName = "light",
    caption: str = "",
    cursor_layer: int | None = None,
    doubts: Sequence[str] = (),
    null: pd.DataFrame | None = None,
) -> Figure:
    """What restoring one token's state gives back at each layer, ordinarily and where it has to act by other ways.

    Args:
        effects: [seed, layer] by what is severed, "none", "mlp" or "attention": by how much the restored state moves
            the measure; NaN where not computed yet.
        total: by how much the measure moves when everything is restored.
        position: the token in words.
        doubts: why no layer may be named; said in its place.
        null: columns layer, low, high, mean: the effect on random weights. Points inside it are grey and not named.

    Raises:
        SpecError: what is severed, the measure or the theme is unknown.
    """
    unknown = [name for name in effects if name not in NAMES] + ([] if measure in _TITLES else [measure])
    if unknown:
        raise SpecError(f"{unknown[0]!r} is unknown", f"choose among {', '.join((*NAMES, *_TITLES))}")
    table = _table(layers, effects)
    table["null"] = curves.reached(table, null)
    word, unit = text.short(answer), "" if measure == "probability" else ", nats"
    title = _TITLES[measure].format(answer=word, foil=text.short(foil))
    series = tuple(NAMES[name] for name in effects)
    low, high = _domain(table, total)
    look = theme_named(theme)
    shape = curves.CurveShape(
        layers=tuple(int(layer) for layer in layers), series=series, named=series, theme=theme, low=low, high=high,
        x_title="layer (its output restored)", y_title=f"gain of {title}{unit}", value_title=f"gain of {title}",
        series_title="run", banded=null is not None, null="same on random weights (range, mean)", zero=True,
        colours=tuple(look.scales[_HUES[name]][3] for name in effects),
    )  # fmt: skip
    lines = table.assign(kind="line", name=table["series"], shown=[gain(v, measure) for v in table["value"]])
    whole = curves.with_extras(lines, null, cursor_layer, measure, gain)
    ends = [("level", int(layers[0]), "total", total, f"total effect {gain(total, measure)}")] * math.isfinite(total)
    levels = pd.DataFrame(ends, columns=["kind", "layer", "series", "value", "name"])
    spec = curves.curve_spec(shape)
    spec["layer"] = [*curves.level_rules(shape, look), curves.spread(shape, look, spec), *spec["layer"]]
    wide = table.pivot(index="layer", columns="series", values="value").reindex(columns=list(series)).reset_index()
    wide.columns.name = None
    return Figure(
        title=f"By which way the state of {position} gives {word} back",
        spec=spec,
        data=pd.concat([whole, levels], ignore_index=True),
        sentence=_sentence(table, name=title, position=position, measure=measure, doubts=doubts, null=null is not None),
        alt_table=wide.round(4),
        caption=caption,
    )


def gain(value: float, measure: str) -> str:
    """A change of a measure: of a probability as a fraction, else in nats."""
    if math.isnan(value):
        return "not computed yet"
    return text.signed(value, 3) if measure == "probability" else f"{text.signed(value, 2)} nats"


def _table(layers: Sequence[int], effects: Mapping[str, ArrayLike]) -> pd.DataFrame:
    """``series, layer, value, low, high``: means over seeds, and their range."""
    rows = []
    for name, given in effects.items():
        for layer, values in zip(layers, np.array(given, dtype=float).T, strict=True):
            known = values[~np.isnan(values)]
            spread = (known.mean(), known.min(), known.max()) if len(known) else (math.nan,) * 3
            rows.append((NAMES[name], int(layer), *map(float, spread)))
    return pd.DataFrame(rows, columns=["series", "layer", "value", "low", "high"])


def _domain(table: pd.DataFrame, total: float) -> tuple[float, float]:
    """From a little below zero to a round number above everything."""
    known = [v for v in (*table["low"], *table["high"], total, 0.0) if math.isfinite(v)]
    high = next((limit for limit in _LIMITS if max(known) <= limit), max(known))
    below = next((limit for limit in _LIMITS if -min(known) <= limit), -min(known)) if min(known) < 0 else 0.0
    return -max(below, 0.06 * high), 1.04 * high


def _sentence(table: pd.DataFrame, *, name: str, position: str, measure: str, doubts: Sequence[str], null: bool) -> str:
    known = table.dropna(subset=["value"])
    if known.empty:
        return sentences.NOTHING
    if doubts:
        return f"No layer is named: {doubts[0]}"
    start = f"So far, {len(known)} of {len(table)} computed: " if len(known) < len(table) else ""
    plain: Any = known[(known["series"] == NAMES["none"]) & ~known["null"]]
    plain = plain[plain["value"] > sentences.LITTLE[measure]]
    if plain.empty:
        more = "more than on random weights" if null else "anything"
        return f"{start}Restoring the state of {position} gives back {more} at no layer."
    best = plain.loc[plain["value"].idxmax()]
    layer = int(best["layer"])
    there: Any = known[(known["layer"] == layer) & (known["series"] != NAMES["none"])]
    beside = [f"{gain(row['value'], measure)} with the {row['series']}" for row in there.to_dict("records")]
    said = f"Restoring the state of {position} raises {name} most at layer {layer}, by {gain(best['value'], measure)}"
    return f"{start}{said}{'; there ' + ', '.join(beside) if beside else ''}."

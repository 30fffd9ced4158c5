"""Probabilities as horizontal bars on [0, 1]: the model's first choices, and one answer before and after a cut."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import numpy as np
import pandas as pd

from factscope.charts import sentences, text
from factscope.charts.figure import Figure, base_spec, remakeable
from factscope.charts.theme import MONO, ThemeName, config, theme_named


@remakeable
def top_tokens(data: pd.DataFrame, *, answer: str, theme: ThemeName = "light", caption: str = "") -> Figure:
    """What the model would say next.

    Args:
        data: columns rank, display, probability. A column ``is_answer`` says which row is the answer; without it that
            is the row whose display form reads as the answer.

    Raises:
        SpecError: the theme is unknown.
    """
    word = text.short(answer)
    rows = data.sort_values("rank").reset_index(drop=True)
    display = [text.visible(name) for name in rows["display"]]
    hit = (
        list(rows["is_answer"])
        if "is_answer" in rows
        else [bool(word) and name.strip("\u00b7 ") == word for name in display]
    )
    drawn = pd.DataFrame(
        {
            "rank": rows["rank"].astype(int),
            "display": display,
            "probability": rows["probability"].astype(float),
            "shown": [text.probability(float(p)) for p in rows["probability"]],
            "is_answer": pd.Series(hit, dtype=bool),
        }
    )
    drawn["beside"] = drawn["shown"] + np.where(drawn["is_answer"], "  answer", "")
    drawn["row"] = range(len(drawn))
    drawn["about"] = [
        f"rank: {r}; token: {d}; probability {s}"
        for r, d, s in zip(drawn["rank"], display, drawn["shown"], strict=True)
    ]
    marked = dict(zip(drawn["rank"], drawn["is_answer"], strict=True))
    table: Any = drawn.rename(columns={"display": "token"})[["rank", "token", "probability"]]
    return Figure(
        title="What the model would say next",
        spec=copy.deepcopy(_bar_spec(max(2, len(drawn)), theme)),
        data=drawn,
        sentence=sentences.top_tokens(drawn, answer=word, is_answer=marked),
        alt_table=table,
        caption=caption,
    )


@functools.lru_cache(maxsize=64)
def _bar_spec(n: int, theme: ThemeName) -> dict[str, Any]:
    look = theme_named(theme)
    y = {
        "field": "row",
        "type": "ordinal",
        "axis": None,
        "scale": {"domain": list(range(n)), "paddingInner": 0.25, "paddingOuter": 0.1},
    }
    x = {
        "field": "probability",
        "type": "quantitative",
        "scale": {"domain": [0, 1], "nice": False},
        "axis": {
            "title": "probability",
            "values": [0, 0.25, 0.5, 0.75, 1],
            "format": ".2~f",
            "domain": False,
            "ticks": False,
        },
    }
    quiet = {"type": "text", "tooltip": None, "aria": False, "baseline": "middle"}
    tooltip = [
        {"field": "rank", "type": "quantitative", "title": "rank"},
        {"field": "display", "type": "nominal", "title": "token"},
        {"field": "shown", "type": "nominal", "title": "probability"},
    ]
    colours = look.scales["probability"]
    return {
        **base_spec(config(look), width=480, height=24 * n),
        "layer": [
            {
                "mark": {"type": "bar", "cornerRadiusEnd": 2},
                "encoding": {
                    "x": x,
                    "y": y,
                    "color": {"condition": {"test": "datum.is_answer", "value": colours[4]}, "value": colours[2]},
                    "tooltip": tooltip,
                    "description": {"field": "about", "type": "nominal"},
                },
            },
            {
                "mark": {**quiet, "align": "left", "dx": 5, "fontSize": 11},
                "encoding": {
                    "x": x,
                    "y": y,
                    "text": {"field": "beside", "type": "nominal"},
                    "color": {"value": look.ink},
                },
            },
            {
                "mark": {**quiet, "align": "right", "font": MONO, "fontSize": 13, "limit": 150},
                "encoding": {
                    "x": {"value": -30},
                    "y": y,
                    "text": {"field": "display", "type": "nominal"},
                    "color": {"value": look.ink},
                },
            },
            {
                "mark": {**quiet, "align": "right", "fontSize": 10},
                "encoding": {
                    "x": {"value": -10},
                    "y": y,
                    "text": {"field": "rank", "type": "quantitative"},
                    "color": {"value": look.faint},
                },
            },
        ],
    }


RUNS = ("nothing cut", "edges cut")
"""What the bars of ``before_after`` are called."""


@remakeable
def before_after(
    p_base: float,
    p_knockout: float,
    *,
    log_odds: tuple[float, float],
    answer: str,
    n_layers: int,
    theme: ThemeName = "light",
    caption: str = "",
) -> Figure:
    """One answer's probability before and after edges were cut together.

    Args:
        p_base, p_knockout: before and after. log_odds: both in nats.
        n_layers: how many layers have a cut.

    Raises:
        SpecError: the theme is unknown.
    """
    word = text.short(answer)
    drawn = pd.DataFrame(
        {
            "display": RUNS,
            "probability": [p_base, p_knockout],
            "value": [p_base, p_knockout],
            "shown": ["not computed yet" if math.isnan(p) else f"{p:.4g}" for p in (p_base, p_knockout)],
            "is_answer": [True, False],
            "row": [0, 1],
        }
    )
    drawn["beside"] = drawn["shown"]
    drawn["about"] = [f"{name}; probability {p}" for name, p in zip(RUNS, drawn["shown"], strict=True)]
    spec = copy.deepcopy(_bar_spec(len(drawn), theme))
    spec["layer"].pop()  # the ranks
    for layer in spec["layer"]:
        if layer["encoding"].get("x", {}).get("field") == "probability":
            layer["encoding"]["x"]["axis"]["title"] = f"p({word})"
    spec["layer"][0]["encoding"]["tooltip"] = [
        {"field": "display", "type": "nominal", "title": "run"},
        {"field": "shown", "type": "nominal", "title": "probability"},
    ]
    table = drawn.rename(columns={"display": "run"})[["run", "probability"]].assign(log_odds=log_odds)
    return Figure(
        title=f"What becomes of {word} when these edges are cut together",
        spec=spec,
        data=drawn,
        sentence=sentences.before_after(p_base, p_knockout, log_odds, answer=word, n_layers=n_layers),
        alt_table=table,
        caption=caption,
    )

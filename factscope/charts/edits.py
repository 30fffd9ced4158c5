"""What an edit has moved: probes before and after, and the loss of its computation."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pandas as pd

from factscope.charts import text
from factscope.charts.figure import Figure, base_spec, remakeable
from factscope.charts.theme import Theme, ThemeName, config, theme_named

NEW, TRUE = "new answer", "true answer"
_KINDS = {
    "fact": "the fact", "paraphrase": "other words", "neighbour": "neighbour", "other-relation": "same subject",
    "own": "own probe",
}  # fmt: skip
_ROW = 30
_LONGEST = 64


@remakeable
def probe_bars(
    table: pd.DataFrame, *, target: str, answer: str = "", theme: ThemeName = "light", caption: str = ""
) -> Figure:
    """Every probe's probabilities before (open mark) and after the edit (filled mark).

    Args:
        table: the contract's columns of ``edit``; texts have no probability and are left out.
        target: what the edit was to make the answer.
        answer: the fact's true answer; probes have their own.

    Raises:
        SpecError: the theme is unknown.
    """
    asked: Any = table[table["kind"] != "generation"].reset_index(drop=True)
    rows = []
    for number, row in enumerate(asked.to_dict("records")):
        for series, name in ((NEW, "p_target"), (TRUE, "p_true")):
            before, after = float(row[f"{name}_before"]), float(row[f"{name}_after"])
            about = f"{_KINDS[row['kind']]}: {text.visible(row['prompt'])}; {series} {text.probability(before)} before"
            rows.append(
                {
                    "row": number, "series": series, "before": before, "after": after,
                    "label": f"{_KINDS[row['kind']]}: {_short(row['prompt'])}",
                    "about": f"{about}, {text.probability(after)} after",
                    "shown_before": text.probability(before), "shown_after": text.probability(after),
                }
            )  # fmt: skip
    drawn = pd.DataFrame(rows).dropna(subset=["before", "after"], how="all").reset_index(drop=True)
    alternative: Any = asked.drop(columns=[name for name in ("text_before", "text_after") if name in asked])
    return Figure(
        title="What the edit has moved",
        spec=copy.deepcopy(_probe_spec(len(asked), theme)),
        data=drawn,
        sentence=_probes_in_words(asked, text.short(target), text.short(answer)),
        alt_table=alternative,
        caption=caption,
    )


@remakeable
def loss_curve(table: pd.DataFrame, *, theme: ThemeName = "light", caption: str = "", steps: int = 0) -> Figure:
    """The loss at every step, one line for each fact and layer that was optimised.

    Args:
        table: columns step and loss, and edit, fact and layer where there are several.
        steps: how many there will be, so that a curve that fills in keeps its axis.

    Raises:
        SpecError: the theme is unknown.
    """
    found: Any = table
    named = [name for name in ("edit", "fact", "layer") if name in table and found[name].nunique(dropna=False) > 1]
    series = [
        ", ".join(f"{name} {'' if row[name] is None or row[name] != row[name] else int(row[name])}" for name in named)
        for row in found.to_dict("records")
    ]
    drawn = pd.DataFrame(
        {
            "step": table["step"].astype(int),
            "loss": table["loss"].astype(float),
            "series": [s or "loss" for s in series],
        }
    )
    last = max([steps - 1, *drawn["step"].tolist(), 1])
    ends = drawn.sort_values("step").groupby("series", sort=False)["loss"].agg(["first", "last"])
    said = [f"{'' if name == 'loss' else f'{name}: '}{a:.3g} to {b:.3g}" for name, a, b in ends.itertuples()]
    return Figure(
        title="The loss while the edit was computed",
        spec=_loss_spec(last, len(ends), theme),
        data=drawn,
        sentence=f"Loss from the first step to the last: {'; '.join(said)}." if said else "No step is done yet.",
        alt_table=drawn.pivot_table(index="step", columns="series", values="loss").reset_index(),
        caption=caption,
    )


# --------------------------------------------------------------------------------------------------------- sentences


def _short(prompt: str) -> str:
    shown = text.visible(prompt)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"


def _probes_in_words(asked: pd.DataFrame, target: str, answer: str) -> str:
    if asked.empty:
        return "Nothing was asked."
    fact: Any = asked.iloc[0]
    instead = f", of {answer}" if answer else ", of the true answer"
    p = {name: text.probability(float(fact[name])) for name in asked if name.startswith("p_")}
    said = [
        f"On the fact p({target}) went from {p['p_target_before']} to {p['p_target_after']}{instead} from "
        f"{p['p_true_before']} to {p['p_true_after']}"
    ]
    names = {"paraphrase": "in other words", "neighbour": "on neighbours", "other-relation": "elsewhere"}
    for kind, name in names.items():
        some: Any = asked[asked["kind"] == kind]
        if len(some):
            column = "p_target_after" if kind == "paraphrase" else "p_true_after"
            what = target if kind == "paraphrase" else "the true answer"
            said.append(f"{name} p({what}) is {text.probability(float(some[column].mean()))} on average")
    return "; ".join(said) + "."


# ------------------------------------------------------------------------------------------------------------- specs


def _colours(look: Theme) -> dict[str, str]:
    return {NEW: look.series["relation"], TRUE: look.series["subject"]}


@functools.lru_cache(maxsize=32)
def _probe_spec(n: int, theme: ThemeName) -> dict[str, Any]:
    look = theme_named(theme)
    colours = _colours(look)
    y = {
        "field": "row", "type": "ordinal", "axis": None,
        "scale": {"domain": list(range(max(1, n))), "paddingInner": 0.3, "paddingOuter": 0.2},
    }  # fmt: skip
    offset = {"field": "series", "type": "nominal", "scale": {"domain": [NEW, TRUE], "paddingInner": 0.2}}
    axis = {"title": "probability", "values": [0, 0.25, 0.5, 0.75, 1], "format": ".2~f", "domain": False}
    scale = {"domain": [0, 1], "nice": False}
    colour = {
        "field": "series", "type": "nominal", "scale": {"domain": [NEW, TRUE], "range": [colours[NEW], colours[TRUE]]},
        "legend": {"title": "open: before the edit; filled: after it", "symbolType": "circle"},
    }  # fmt: skip
    tooltip = [
        {"field": "label", "type": "nominal", "title": "probe"},
        {"field": "series", "type": "nominal", "title": "of"},
        {"field": "shown_before", "type": "nominal", "title": "before"},
        {"field": "shown_after", "type": "nominal", "title": "after"},
    ]
    at = {"y": y, "yOffset": offset, "color": colour}

    def x(name: str) -> dict[str, Any]:
        return {"field": name, "type": "quantitative", "scale": scale, "axis": axis}

    return {
        **base_spec(config(look), width=520, height=_ROW * max(1, n)),
        "layer": [
            {"mark": {"type": "rule", "opacity": 0.6}, "encoding": {**at, "x": x("before"), "x2": {"field": "after"}}},
            {
                "mark": {"type": "point", "filled": False, "size": 42, "fill": look.background, "strokeWidth": 1.5},
                "encoding": {**at, "x": x("before"), "tooltip": tooltip},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 62, "opacity": 1},
                "encoding": {
                    **at, "x": x("after"), "tooltip": tooltip, "description": {"field": "about", "type": "nominal"},
                },
            },
            {
                "transform": [{"filter": f"datum.series == '{NEW}'"}],
                "mark": {"type": "text", "align": "right", "baseline": "middle", "fontSize": 11, "tooltip": None,
                         "aria": False, "limit": 420},
                "encoding": {"x": {"value": -10}, "y": y, "text": {"field": "label", "type": "nominal"},
                             "color": {"value": look.ink}},
            },
        ],
    }  # fmt: skip


def _loss_spec(last: int, lines: int, theme: ThemeName) -> dict[str, Any]:
    look = theme_named(theme)
    palette = [look.series["subject"], look.series["relation"], look.series["last"], *look.others]
    x = {
        "field": "step", "type": "quantitative", "scale": {"domain": [0, last], "nice": False},
        "axis": {"title": "step", "tickMinStep": 1, "format": "d", "grid": False},
    }  # fmt: skip
    y = {
        "field": "loss",
        "type": "quantitative",
        "scale": {"zero": True},
        "axis": {"title": "loss, nats", "tickCount": 5},
    }
    many = {"field": "series", "type": "nominal", "scale": {"range": palette}, "legend": {"title": None}, "sort": None}
    colour = many if 1 < lines <= len(palette) else {"value": palette[0]}
    tooltip = [{"field": name, "type": kind} for name, kind in
               (("series", "nominal"), ("step", "quantitative"), ("loss", "quantitative"))]  # fmt: skip
    encoding = {"x": x, "y": y, "color": colour, "detail": {"field": "series", "type": "nominal"}}
    return {
        **base_spec(config(look), width=520, height=180),
        "layer": [
            {"mark": {"type": "line", "strokeWidth": 1.8}, "encoding": encoding},
            {"mark": {"type": "point", "filled": True, "size": 26}, "encoding": {**encoding, "tooltip": tooltip}},
        ],
    }

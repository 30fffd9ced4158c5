"""How processor time grows with the prompt, the depth and the width, and a plot of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import shapes
from benchmarks.rows import GATE, Task, knockouts, traces
from benchmarks.shapes import Shape
from benchmarks.timing import cpu_seconds

PLOT = Path(__file__).parents[1] / "docs" / "growth.svg"
TOKENS, LAYERS, WIDTHS = (8, 16, 32), (6, 12, 24), (384, 768, 1024)
AXES = {"tokens": "tokens T", "layers": "layers L", "width": "width d"}
EXPERIMENTS: dict[str, Callable[[Shape, int], Task]] = {"attention knockout": knockouts, "causal trace": traces}
SHORT = 8
"""Tokens where depth and width grow."""


def measured(known: dict[tuple[str, int], float], *, quick: bool = False) -> Iterator[dict[str, Any]]:
    """Points ``{experiment, axis, value, seconds}``, made as they are asked for.

    Args:
        known: seconds by experiment and tokens on GPT-2 small that the rows have measured; not measured again.
        quick: the rows' own points alone.
    """
    for (experiment, tokens), seconds in known.items():
        yield {"experiment": experiment, "axis": "tokens", "value": tokens, "seconds": seconds}
        if tokens == SHORT and not quick:
            for axis, value in (("layers", 12), ("width", 768)):
                yield {"experiment": experiment, "axis": axis, "value": value, "seconds": seconds}
    if quick:
        return
    sizes = [("layers", n, (n, 768)) for n in LAYERS if n != 12] + [("width", d, (12, d)) for d in WIDTHS if d != 768]
    for axis, value, (n_layer, n_embd) in sizes:
        shape = shapes.sized("GPT-2", n_layer, n_embd)
        for experiment, make in EXPERIMENTS.items():
            yield {"experiment": experiment, "axis": axis, "value": value, "seconds": _seconds(make(shape, SHORT))}


def _seconds(task: Task) -> float:
    """One run, after some of its cells as a warm-up."""
    task.fast(task.cells[-GATE:])
    return cpu_seconds(lambda: task.fast(task.cells))


def exponents(points: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """By experiment and axis, the power of the axis by which seconds grow: slope of a line through the logarithms."""
    found = {}
    for key in sorted({(point["experiment"], point["axis"]) for point in points}):
        mine = [point for point in points if (point["experiment"], point["axis"]) == key]
        if len(mine) < 2:
            continue
        x = [math.log(point["value"]) for point in mine]
        y = [math.log(point["seconds"]) for point in mine]
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        below = sum((a - mean_x) ** 2 for a in x)
        if below:
            found[key] = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / below
    return found


def plot(points: list[dict[str, Any]]) -> str:
    """One SVG, a panel for each axis; its own light background, so that it can be read on a dark page too."""
    import altair as alt
    import vl_convert

    panels = []
    for axis, title in AXES.items():
        mine = [point for point in points if point["axis"] == axis]
        if not mine:
            continue
        values = sorted({point["value"] for point in mine})
        x = alt.X("value:Q", title=title, scale=alt.Scale(type="log", nice=False, padding=12)).axis(values=values)
        y = alt.Y("seconds:Q", title="CPU seconds").scale(type="log").axis(format="~g")
        color = alt.Color("experiment:N", title=None).scale(range=["#1f5fa8", "#b8500a"]).legend(orient="bottom")
        marks = alt.Chart(alt.Data(values=mine)).encode(x=x, y=y, color=color)
        panels.append((marks.mark_line() + marks.mark_point(filled=True, size=60)).properties(width=200, height=200))
    chart = (
        alt.hconcat(*panels)
        .resolve_scale(y="shared", color="shared")
        .configure(background="#ffffff", padding=12)
        .configure_axis(labelColor="#1f2430", titleColor="#1f2430", gridColor="#e3e6eb", domainColor="#8a909c")
        .configure_legend(labelColor="#1f2430")
        .configure_view(stroke=None)
    )
    return vl_convert.vegalite_to_svg(json.loads(chart.to_json()), vl_version="6.4")

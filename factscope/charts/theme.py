"""Colours, fonts and sizes of every figure, in one place: a quantity has the same scale wherever it is drawn.

Signed changes diverge from the background: blue is down, orange is up, a pair that people with any common colour
vision tell apart. Probability, rank and entropy each have one hue and run from the background to the strongest tone, so
lightness alone carries the order. What a causal trace restores has the hues of Meng et al.: purple states, green MLPs,
red attention. On a light page strong is dark, on a dark page strong is bright; the legends say it.

Fonts: token labels ask for DejaVu Sans Mono, then for the viewer's own monospace fonts and Noto Sans Mono CJK. A
browser finds Chinese, Japanese and Korean glyphs by itself; a PNG made on a machine without a CJK font shows boxes
(install ``fonts-noto-cjk``, or call ``vl_convert.register_font_directory``). An SVG names its fonts and holds text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from factscope.errors import SpecError

ThemeName = Literal["light", "dark"]
Quantity = Literal["change", "probability", "rank", "entropy", "hidden", "mlp", "attention"]

SANS = "'Source Sans 3', 'Source Sans Pro', 'Helvetica Neue', Arial, 'DejaVu Sans', 'Noto Sans CJK SC', sans-serif"
MONO = "'DejaVu Sans Mono', Menlo, Consolas, 'Liberation Mono', 'Noto Sans Mono CJK SC', monospace"


@dataclass(frozen=True, kw_only=True)
class Theme:
    """One look.

    Attributes:
        background, ink, faint, grid: page, text, secondary text, grid lines.
        empty, empty_mark: fill of a cell that is not computed yet, and of the stroke through it.
        null: fill of a cell whose effect is no larger than its null's.
        accent: cursor and read-out mark.
        strong, weak, zero: the words for the strong end of every scale on this background, for its other end, and for
            the colour of no change.
        series: hue of the named position sets; ``others`` for any further ones.
        control: the random matched control.
        scales: colours of each quantity, from weakest to strongest; "change" from most negative to most positive.
    """

    name: ThemeName
    background: str
    ink: str
    faint: str
    grid: str
    empty: str
    empty_mark: str
    null: str
    accent: str
    strong: str
    weak: str
    zero: str
    control: str
    series: dict[str, str]
    others: tuple[str, ...]
    scales: dict[Quantity, tuple[str, ...]]


LIGHT = Theme(
    name="light",
    background="#ffffff",
    ink="#1f2430",
    faint="#667080",
    grid="#e8eaee",
    empty="#e6e7ea",
    empty_mark="#b4b8c0",
    null="#d3d5da",
    accent="#c2185b",
    strong="dark",
    weak="pale",
    zero="white",
    control="#8a8f98",
    series={"subject": "#0b62a4", "relation": "#c26a00", "last": "#00876c"},
    others=("#a6448a", "#6a51a3", "#8c6d1f", "#3c8dbc", "#b5473c", "#556b2f"),
    scales={
        "change": ("#06264f", "#0f4f94", "#3d84c6", "#9cc3e6", "#ffffff", "#f8c48a", "#e08a2c", "#a8540a", "#5c2b04"),
        "probability": ("#f8fcfc", "#d3edec", "#93d0d0", "#45a3b5", "#1a6d92", "#0a3a5c"),
        "rank": ("#fafae9", "#e3e7ac", "#bcc964", "#87a036", "#537525", "#274317"),
        "entropy": ("#fdf8f2", "#f3dcc4", "#dfb08a", "#bd7f58", "#8a4f38", "#4c271e"),
        "hidden": ("#fbfafd", "#dedbee", "#b5b0d8", "#8a80c2", "#5f449f", "#35006b"),
        "mlp": ("#f7fcf6", "#d3edce", "#98d096", "#4fa866", "#19783d", "#00401a"),
        "attention": ("#fef6f2", "#fbd0be", "#f59478", "#dd5444", "#aa1f22", "#5f0710"),
    },
)

DARK = Theme(
    name="dark",
    background="#0e1117",
    ink="#e8eaf0",
    faint="#9aa3b2",
    grid="#262c37",
    empty="#2b313d",
    empty_mark="#566072",
    null="#3a4250",
    accent="#ff6fa8",
    strong="bright",
    weak="dim",
    zero="black",
    control="#8c94a3",
    series={"subject": "#63b3f2", "relation": "#f2a65a", "last": "#3fcfae"},
    others=("#e08cc6", "#b39cf0", "#d9bf6b", "#7fd1e8", "#f08c82", "#a8c66c"),
    scales={
        "change": ("#b9deff", "#6db3f2", "#337cc0", "#1c466f", "#0e1117", "#62421b", "#b06f22", "#f0a14a", "#ffdcae"),
        "probability": ("#111a22", "#123b4a", "#176a80", "#34a0ab", "#86d2c6", "#e6fbef"),
        "rank": ("#15190f", "#2f3d17", "#556e22", "#86a139", "#c0cf70", "#f5f7c8"),
        "entropy": ("#1b1512", "#46291f", "#7a4a35", "#b47a54", "#e2b48c", "#fff0de"),
        "hidden": ("#15131d", "#332b52", "#5c4a97", "#8c77d0", "#bfb0f1", "#f3eeff"),
        "mlp": ("#101913", "#183f2a", "#226b43", "#42a069", "#8ed4a5", "#e8fbee"),
        "attention": ("#1c1313", "#4f211e", "#90352d", "#cd594d", "#f29e90", "#ffece7"),
    },
)

SHAPES = ("diamond", "triangle-down", "cross", "triangle-right", "triangle-left", "circle", "square", "triangle-up")
FIXED_SHAPES = {"subject": "circle", "relation": "square", "last": "triangle-up"}
THEMES: dict[str, Theme] = {"light": LIGHT, "dark": DARK}


def theme_named(name: str) -> Theme:
    """The theme of that name.

    Raises:
        SpecError: there is no such theme.
    """
    if name not in THEMES:
        raise SpecError(f"theme {name!r} is unknown", f"choose one of {', '.join(get_args(ThemeName))}")
    return THEMES[name]


def series_colours(names: Sequence[str], theme: Theme) -> list[str]:
    """A colour for each series: the fixed hue of its position set, or the next free one."""
    colours = []
    free = 0
    for name in names:
        base = _set_name(name)
        if name in theme.series or (base in theme.series and base not in names):
            colours.append(theme.series.get(name, theme.series.get(base, theme.ink)))
        else:
            colours.append(theme.others[free % len(theme.others)])
            free += 1
    return colours


def _set_name(series: str) -> str:
    """The position set behind a series: ``subject`` of ``subject-last``, ``last`` of ``last (read-out)``."""
    return series.split(" (")[0].removesuffix("-last").removesuffix("-first")


def series_shapes(names: Sequence[str]) -> list[str]:
    """A point shape for each series, so that colour is not the only difference; fixed for the named position sets."""
    shapes: list[str] = []
    for name in names:
        wanted = FIXED_SHAPES.get(_set_name(name))
        free = (shape for shape in SHAPES if shape not in (*shapes, *FIXED_SHAPES.values()))
        shapes.append(wanted if wanted and wanted not in shapes else next(free, SHAPES[len(shapes) % len(SHAPES)]))
    return shapes


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb`` in [0, 1] (WCAG 2)."""
    linear = []
    for start in (1, 3, 5):
        c = int(colour[start : start + 2], 16) / 255
        linear.append(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def mix(colours: Sequence[str], share: float) -> str:
    """The colour at ``share`` in [0, 1] of a scale, interpolated as the figures do (linearly in RGB)."""
    at = min(max(share, 0.0), 1.0) * (len(colours) - 1)
    low = min(int(at), len(colours) - 2)
    part = at - low
    pair = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours[low : low + 2]]
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(*pair, strict=True))


def config(theme: Theme) -> dict[str, Any]:
    """The Vega-Lite config of a theme: complete, so that Streamlit's own defaults (``theme=None``) do not show."""
    axis = {
        "labelColor": theme.ink,
        "titleColor": theme.faint,
        "labelFont": SANS,
        "titleFont": SANS,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "domainColor": theme.faint,
        "tickColor": theme.faint,
        "gridColor": theme.grid,
        "titlePadding": 8,
    }
    legend = {
        "labelColor": theme.ink,
        "titleColor": theme.ink,
        "labelFont": SANS,
        "titleFont": SANS,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titleLimit": 900,
        "labelLimit": 260,
        "orient": "top",
        "offset": 10,
    }
    title = {
        "color": theme.ink,
        "subtitleColor": theme.faint,
        "font": SANS,
        "subtitleFont": SANS,
        "fontSize": 15,
        "subtitleFontSize": 11,
        "subtitlePadding": 6,
        "fontWeight": 600,
        "anchor": "start",
        "offset": 14,
    }
    return {
        "background": theme.background,
        "font": SANS,
        "view": {"stroke": None, "continuousWidth": 640, "continuousHeight": 280},
        "axis": axis,
        "legend": legend,
        "title": title,
        "text": {"color": theme.ink},
        "mark": {"tooltip": None},
    }

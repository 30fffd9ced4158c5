"""A figure: a Vega-Lite spec, the data it draws, and the same in a sentence and a table."""

from __future__ import annotations

import copy
import functools
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ParamSpec

from pandas import DataFrame

from factscope.charts.text import visible
from factscope.charts.theme import ThemeName

if TYPE_CHECKING:
    import altair

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
DATA_NAME = "source"
"""The only name under which Streamlit's ``vega_lite_chart(df, spec)`` hands over a table."""
AGAIN = "datum && vlSelectionTest('cell_store', datum)"
"""When a click takes the selection "cell" away instead of making it: on the cell that has it already.

A browser tells Streamlit only of a selection that differs from the last one. Without this, a second click on a cell,
after the cursor went elsewhere by another figure or by its numbers, would be lost.
"""
P = ParamSpec("P")


@dataclass(frozen=True, kw_only=True, eq=False)
class Figure:
    """What a page, a notebook or an export shows.

    Attributes:
        title: a short heading.
        spec: Vega-Lite, without data; depends on shape, theme, measure and limits, not on values, so that a figure that
            fills in live keeps it.
        data: the tidy table that ``spec`` draws; goes in separately as ``st.vega_lite_chart(data, spec, theme=None)``.
        sentence: the figure in one sentence, from its numbers.
        alt_table: the figure as a readable table.
        caption: model, revision, prompt, window, seed.
        theme: name of the theme of ``spec`` and ``data``.
        remake: makes the same figure in another theme.
    """

    title: str
    spec: dict[str, Any]
    data: DataFrame
    sentence: str
    alt_table: DataFrame
    caption: str
    theme: ThemeName = "light"
    remake: Callable[..., Figure] | None = field(default=None, repr=False)

    def themed(self, theme: ThemeName) -> Figure:
        """The same figure in another theme."""
        return self if theme == self.theme or self.remake is None else self.remake(theme=theme)

    def complete_spec(self, *, data: bool = True) -> dict[str, Any]:
        """What leaves the page: the spec with title, caption, description and, unless ``data`` is false, the data."""
        spec = copy.deepcopy(self.spec)
        width = spec.get("width", 640)
        lines = [
            line
            for part in self.caption.splitlines()
            for line in textwrap.wrap(visible(part), max(40, int(width / 6.2)))
        ]
        spec["title"] = {"text": visible(self.title), **({"subtitle": lines} if lines else {})}
        spec["description"] = visible(self.sentence)
        if data:
            spec["data"] = {"name": DATA_NAME, "values": records(self.data)}
        return spec

    def chart(self) -> altair.Chart:
        """For notebooks: an Altair chart with title, caption and data attached."""
        import altair

        return altair.Chart.from_dict(self.complete_spec())


def records(table: DataFrame) -> list[dict[str, Any]]:
    """Rows as plain values; what is not a number is null."""
    return table.astype(object).where(table.notna(), None).to_dict("records")  # type: ignore[return-value]


def remakeable(build: Callable[P, Figure]) -> Callable[P, Figure]:
    """Let a builder's figures be made again in another theme (exports offer both)."""
    signature = inspect.signature(build)

    @functools.wraps(build)
    def made(*args: P.args, **kwargs: P.kwargs) -> Figure:
        figure = build(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        given.pop("theme", None)
        positional = [
            given.pop(name)
            for name, p in signature.parameters.items()
            if name in given and p.kind is not p.KEYWORD_ONLY
        ]
        theme: Any = kwargs.get("theme", "light")
        return replace(figure, theme=theme, remake=functools.partial(made, *positional, **given))

    return made


def base_spec(config: dict[str, Any], *, width: int, height: int) -> dict[str, Any]:
    """The frame common to all specs.

    ``fit-x`` keeps the height that the rows need, however wide the page is. The padding stands here and not in the
    config, because Streamlit puts its own above a config's.
    """
    return {
        "$schema": SCHEMA,
        "data": {"name": DATA_NAME},
        "width": width,
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "padding": {"left": 8, "top": 8, "right": 8, "bottom": 8},
        "config": config,
    }

"""Figures as files: SVG, PNG, CSV, and HTML that opens offline and runs nothing that a token says.

The HTML is our own template, because the usual ones put JSON into a script as it is, and a token ``</script>`` ends
that script. Here the JSON stands in a data block with ``<`` and everything outside ASCII escaped, the page's policy
allows only the scripts whose hashes it names, and Vega's expressions are interpreted, not evaluated.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html as markup
import io
import json
import threading
from collections.abc import Callable
from typing import Any

from pandas import DataFrame

from factscope.charts.figure import Figure
from factscope.charts.heatmaps import DRAWING_COLUMNS
from factscope.charts.text import visible
from factscope.charts.theme import SANS, Theme, ThemeName, theme_named

_VEGA_LITE = "6.4"
_SNIPPET = "window.vegaEmbed = vegaEmbed;"
_LOCK = threading.Lock()
_EMBED = """
const spec = JSON.parse(document.getElementById("spec").textContent);
vegaEmbed("#figure", spec, {ast: true, actions: false, renderer: "svg"});
"""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src {hashes}; \
style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<div id="figure" role="img" aria-label="{sentence}"></div>
<p>{sentence}</p>
<details><summary>The numbers as a table</summary>{table}</details>
</main>
<script type="application/json" id="spec">{spec}</script>
<script>{bundle}</script>
<script>{embed}</script>
</body>
</html>
"""


def svg(figure: Figure, theme: ThemeName | None = None) -> bytes:
    """An SVG image with title and caption; ``theme`` None keeps the figure's own."""
    import vl_convert

    convert = functools.partial(vl_convert.vegalite_to_svg, vl_version=_VEGA_LITE)
    return _converted(convert, _spec(figure, theme)).encode("utf-8")


def png(figure: Figure, theme: ThemeName | None = None, scale: float = 2) -> bytes:
    """A PNG image with title and caption, ``scale`` times its size on screen."""
    import vl_convert

    convert = functools.partial(vl_convert.vegalite_to_png, scale=scale, vl_version=_VEGA_LITE)
    return _converted(convert, _spec(figure, theme))


def _converted(convert: Callable[[dict[str, Any]], Any], spec: dict[str, Any]) -> Any:
    """The converted figure; characters beyond the basic plane are drawn as boxes where they cannot be measured.

    The converter cuts a long label anywhere, also within such a character, and then fails on the half of it.
    """
    with _LOCK:
        try:
            return convert(spec)
        except ValueError as error:
            if "text info" not in str(error):
                raise
            boxed = "".join(c if ord(c) < 0x10000 else "\u25a1" for c in json.dumps(spec, ensure_ascii=False))
            return convert(json.loads(boxed))


def csv(figure: Figure) -> bytes:
    """The data behind the figure, tidy, in UTF-8; columns that only draw are left out."""
    out = io.StringIO()
    data = figure.data
    if "kind" in data:
        data = data[data["kind"] != "cursor"]
    data.drop(columns=[c for c in DRAWING_COLUMNS if c in data]).to_csv(out, index=False, lineterminator="\n")
    return out.getvalue().encode("utf-8")


def html(figure: Figure, theme: ThemeName | None = None) -> bytes:
    """One page that needs no network: the figure with tooltips, its sentence and its table."""
    chosen = figure if theme is None else figure.themed(theme)
    bundle = _bundle()
    page = _PAGE.format(
        hashes=" ".join(f"'sha256-{_sha256(script)}'" for script in (bundle, _EMBED)),
        title=markup.escape(visible(chosen.title)),
        style=_style(theme_named(chosen.theme)),
        sentence=markup.escape(visible(chosen.sentence)),
        table=_table(chosen.alt_table),
        spec=script_safe(_spec(chosen, None)),
        bundle=bundle,
        embed=_EMBED,
    )
    return page.encode("utf-8")


def script_safe(value: Any) -> str:
    """JSON that can stand inside a script element: no markup, no line separator, no character outside ASCII."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _spec(figure: Figure, theme: ThemeName | None) -> dict[str, Any]:
    return (figure if theme is None else figure.themed(theme)).complete_spec()


@functools.cache
def _bundle() -> str:
    import vl_convert

    with _LOCK:
        return (
            vl_convert.javascript_bundle(_SNIPPET, _VEGA_LITE)
            .replace("</script", "<\\/script")
            .replace("<!--", "<\\!--")
        )


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


def _style(theme: Theme) -> str:
    return (
        f"body{{margin:24px;background:{theme.background};color:{theme.ink};font:15px/1.5 {SANS}}}"
        f"table{{border-collapse:collapse;font-size:13px}}"
        f"td,th{{border:1px solid {theme.grid};padding:2px 8px;white-space:pre}}"
        "#figure{overflow-x:auto}details{overflow-x:auto}"
    )


def _table(table: DataFrame) -> str:
    head = "".join(f"<th>{markup.escape(visible(str(name)))}</th>" for name in table.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{_cell(v)}</td>" for v in row) + "</tr>"
        for row in table.itertuples(index=False, name=None)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.4g}"
    return markup.escape(visible(str(value)))

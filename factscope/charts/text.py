"""Tokens and numbers as people read them: nothing here is interpreted as markup."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

_BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}
MINUS = "\u2212"


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One row of a heatmap.

    Attributes:
        position: where the token stands in the prompt, from 0: the key of the row.
        id: in the vocabulary. text: exact. display: with visible spaces.
        role: "special", "subject", "relation" or "last".
        place: what is written for the position; empty writes its number.
    """

    position: int
    id: int
    text: str
    display: str
    role: str
    place: str = ""


def token_rows(tokens: Iterable[Any]) -> tuple[TokenRow, ...]:
    """Rows from anything with ``position, id, text, display, role``, such as ``factscope.tokens.Token``."""
    return tuple(
        TokenRow(
            position=int(token.position),
            id=int(token.id),
            text=visible(token.text),
            display=visible(token.display),
            role=token.role,
        )
        for token in tokens
    )


def visible(text: str) -> str:
    """Text for a label, an SVG or a file: control, bidirectional and unpaired characters are named, not acted on."""
    return "".join(_named(c) if _unprintable(c) else c for c in str(text))


def short(answer: str, limit: int = 24) -> str:
    """An answer as it stands in titles and legends: without outer spaces, cut where it is long."""
    shown = visible(answer.strip())
    return shown if len(shown) <= limit else shown[: limit - 1] + "\u2026"


def _unprintable(c: str) -> bool:
    return unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or ord(c) in _BIDI or ord(c) in (0xFFFE, 0xFFFF, 0xFEFF)


def _named(c: str) -> str:
    return {"\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d"}.get(c, f"<U+{ord(c):04X}>")


def signed(value: float, digits: int = 0) -> str:
    """``+8`` or ``\u221262``, with a true minus sign; zero carries no sign."""
    rounded = round(value, digits)
    if rounded == 0:
        return f"{0:.{digits}f}"
    return f"{'+' if rounded > 0 else MINUS}{abs(rounded):,.{digits}f}"


def probability(p: float) -> str:
    """Two significant places near the middle, never a flat 0 or 1 for what is neither."""
    if math.isnan(p):
        return "not computed"
    if 0 < p < 0.001:
        return f"{p:.0e}".replace("e-0", "e-").replace("-", MINUS)
    if 0.999 < p < 1:
        return f"{p:.4f}" if p < 0.9999 else ">0.9999"
    return f"{p:.2f}" if p >= 0.01 or p == 0 else f"{p:.3f}"


def level(value: float, measure: str) -> str:
    """A probability, or nats of log-odds or of a logit difference."""
    if math.isnan(value):
        return "not computed yet"
    return probability(value) if measure == "probability" else f"{signed(value, 2)} nats"


Measure = Literal["percent", "log_odds", "logit_difference"]
TraceMeasure = Literal["probability", "log_odds", "logit_difference"]
COLUMNS: dict[str, str] = {
    "percent": "relative_change_percent",
    "log_odds": "log_odds_change",
    "logit_difference": "logit_difference_change",
}
"""The column of a knockout's table that holds each measure of its effect."""


def measured(answer: str, measure: str) -> str:
    """What an effect is a change of, in words; the foil is the one that the query names."""
    names = {"log_odds": f"the log-odds of {answer}", "logit_difference": f"logit({answer}) − logit(foil)"}
    return names.get(measure, f"p({answer})")


def change(value: float, measure: str) -> str:
    """A change with its unit: percent, or nats of log-odds or of a logit difference."""
    if math.isnan(value):
        return "not computed yet"
    return f"{signed(value, 0 if abs(value) >= 9.95 else 1)}%" if measure == "percent" else f"{signed(value, 2)} nats"


def layer_name(layer: int) -> str:
    """``layer 4``, or the embedding."""
    return "the embedding" if layer < 0 else f"layer {layer}"

"""Help beside figures and numbers: a method's card, a column's definition."""

from __future__ import annotations

import streamlit as st

from factscope.methods import METHODS, markdown


def card(method: str, name: str) -> None:
    """The help card of a method, behind a small button; ``name`` tells two buttons on one page apart."""
    with st.popover(
        "", key=f"help-{name}", icon=":material/help:", type="tertiary", help="What this shows, and how it can mislead"
    ):
        st.markdown(markdown(METHODS[method]))


def definition(column: str) -> str | None:
    """What a number means, for its hover text; escaped for Streamlit's Markdown."""
    from factscope.columns import COLUMNS

    found = COLUMNS.get(column)
    if found is None:
        return None
    text = getattr(found, "meaning", str(found))
    unit = getattr(found, "unit", "")
    return (f"{text} ({unit})" if unit else text).replace("$", "\\$").replace("[", "\\[").replace("_", "\\_")

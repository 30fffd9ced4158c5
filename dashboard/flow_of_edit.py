"""From an edit to the pages: where does the changed fact flow now? Original weights as A, the edited ones as B.

Either both sides are asked for the new answer, or each for its own: what the original model said, what the edited one
says. Percentages of a probability near zero, as the new answer has in the original model, say little: Flow then shows
log-odds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import streamlit as st

from dashboard import state
from factscope.queries import Query

PAGES = {
    "fact": (":material/quiz:", "Top-10, and over layers"),
    "flow": (":material/conversion_path:", "Which tokens must be read: does it still need last → subject?"),
    "lens": (":material/frame_inspect:", "At which token and layer the answer comes up"),
    "heads": (":material/hub:", "Which heads and layers extract it"),
    "trace": (":material/healing:", "Which states carry it"),
}
_FOLLOW = "edit-follow"


def show(edit: Any) -> None:
    """A line of buttons, one for each page that can compare; of several facts, the one that is asked, or the first."""
    asked = state.view().fact.prompt
    fact = next((one for one in edit.facts if one.text == asked), edit.facts[0])
    which = "it" if len(edit.facts) == 1 else "this fact" if fact.text == asked else "its first fact"
    new, old = fact.target.strip(), (fact.answer or "").strip()
    with st.container(horizontal=True, vertical_alignment="center", gap="small", key="edit-flow"):
        st.markdown(f"Where does {which} flow now? Original | edited on", width="content")
        for page, (icon, about) in PAGES.items():
            if st.button(page.capitalize(), key=f"edit-flow-{page}", icon=icon, type="tertiary", help=about):
                _compare(fact, own=_own(new, old))
                st.switch_page(f"../pages/{page}.py")
        if old and new.casefold() != old.casefold():
            st.segmented_control(
                "Target",
                ["new", "own"],
                format_func={"new": f"p({new}) in both", "own": f"p({old}) | p({new})"}.__getitem__,
                default="new",
                key=_FOLLOW,
                persist_state="session",
                label_visibility="collapsed",
                help="What is followed: the new answer on both sides, or what each model itself says.",
            )


def _own(new: str, old: str) -> bool:
    return bool(old) and new.casefold() != old.casefold() and st.session_state.get(_FOLLOW) == "own"


def _compare(fact: Any, *, own: bool) -> None:
    """Ask the edited fact, and pin the same of the original weights as A."""
    view = state.view()
    same = view.fact.prompt == fact.text
    asked = (
        view.fact
        if same
        else Query(prompt=fact.text, subject=fact.subject, occurrence=fact.occurrence, bos=view.fact.bos)
    )
    asked = replace(asked, answer=fact.target.strip() or fact.answer, foil=None)
    of_a = replace(asked, answer=fact.answer) if own else asked
    flow = view.flow if own else replace(view.flow, measure="log_odds")
    state.change(
        fact=asked,
        flow=flow,
        cursor=view.cursor if same else None,
        a=replace(view, fact=of_a, flow=flow, cursor=None, a=None, model=view.model.original),
    )

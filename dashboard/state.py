"""The session's view, in one place: what the link said at first, what the widgets changed since, the link again.

The view is the truth. A widget shows a field of it (its default is the field's value, and ``seed`` moves a widget that
already stands on the page) and changes it in its callback. The address is written after every run and read only when a
session starts, so that going to another page, a reload and a link in another browser all find the same fact, parameters
and cursor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import streamlit as st

from dashboard import stack
from dashboard.link import EDITS, ORIGINAL, Cursor, Params, View, parse, to_params
from factscope.errors import LinkError
from factscope.queries import Query

_RESEND_SECONDS = 1.5
_VIEW, _PROBLEMS = "factscope-view", "factscope-link-problems"


def view() -> View:
    """This session's view; read from the address when the session starts."""
    if _VIEW not in st.session_state:
        address = _address()
        found, problems = parse(address)
        found, missing = stack.settle(found, said=EDITS in address)
        st.session_state[_VIEW] = found
        st.session_state[_PROBLEMS] = [*problems, *missing]
    return st.session_state[_VIEW]


def link_problems() -> list[LinkError]:
    """What of the address could not be used; empty once the user has changed something."""
    view()
    return st.session_state.get(_PROBLEMS, [])


def change(**fields: Any) -> None:
    """Replace fields of the view."""
    st.session_state[_VIEW] = replace(view(), **fields)
    st.session_state[_PROBLEMS] = []


def ask(fact: Query) -> None:
    """Ask another fact. The cursor stays where it is unless the prompt is another."""
    change(fact=fact, cursor=view().cursor if fact.prompt == view().fact.prompt else None)


def choose(page: str, **fields: Any) -> None:
    """Change parameters of one page: ``choose("flow", window=5)``."""
    change(**{page: replace(getattr(view(), page), **fields)})


def point_at(position: int, layer: int) -> None:
    """Move the cursor; the head stays."""
    before = view().cursor
    change(cursor=Cursor(position=position, layer=layer, head=None if before is None else before.head))


def point_at_head(layer: int, head: int, position: int) -> None:
    """Move the cursor to a head; ``position`` is where it goes if it stood nowhere."""
    before = view().cursor
    change(cursor=Cursor(position=position if before is None else before.position, layer=layer, head=head))


def edit_with(keys: tuple[str, ...]) -> None:
    """Ask the model with these edits on, and no others."""
    model = replace(view().model, edits=stack.mine().ordered(keys))
    stack.mine().remember(model)
    change(model=model)


def switch(key: str, on: bool) -> None:
    """Put one edit on or off; the others stay as they are."""
    others = tuple(k for k in view().model.edits if k != key)
    edit_with((*others, key) if on else others)


def pin_original() -> None:
    """Keep the same question to the original weights as A."""
    change(a=replace(view(), cursor=None, a=None, model=view().model.original))


def pin() -> None:
    """Keep what is asked now as A: fact, model and parameters. What is asked from now on is B."""
    change(a=replace(view(), cursor=None, a=None))


def unpin() -> None:
    """Compare with nothing any more."""
    change(a=None)


def back_to_a() -> None:
    """Ask what A asks, and go on comparing."""
    pinned = view().a
    if pinned is not None:
        same = pinned.fact.prompt == view().fact.prompt
        st.session_state[_VIEW] = replace(pinned, cursor=view().cursor if same else None, a=pinned)


def seed(key: str, value: Any) -> str:
    """Make the widget of a key, if it stands on the page already, show a value; gives the key back.

    The new value is sent for a moment, not once: where two runs of the script follow each other at once, the browser
    draws only the second, and would miss a value that only the first sent.
    """
    sent, before = f"{key} sent", f"{key} before"
    if key in st.session_state:
        if st.session_state[key] != value:
            st.session_state[sent], st.session_state[before] = time.monotonic(), st.session_state[key]
        if time.monotonic() - st.session_state.get(sent, -_RESEND_SECONDS) < _RESEND_SECONDS:
            st.session_state[key] = value
    return key


def is_old(key: str) -> bool:
    """Whether a widget reports what it showed before ``seed`` gave it another value a moment ago.

    A browser sends the values of all widgets with whatever happens on the page, a click or the tick of a run. On a busy
    machine it may not have drawn the new value yet: its old one is no choice of the user's, and must not be acted on.
    """
    recent = time.monotonic() - st.session_state.get(f"{key} sent", -_RESEND_SECONDS) < _RESEND_SECONDS
    return recent and st.session_state.get(key) == st.session_state.get(f"{key} before")


def on_change(
    key: str, page: str, name: str, convert: Callable[[Any], Any] = lambda value: value
) -> Callable[[], None]:
    """A callback that writes a widget's value into one parameter of a page."""

    def write() -> None:
        if not is_old(key):
            choose(page, **{name: convert(st.session_state[key])})

    return write


def write_link() -> None:
    """Put the view into the address if it is not there yet.

    Where the visitor has edits, the address says of original weights that they are: what it does not say is as it was.
    """
    wanted = to_params(view())
    if not view().model.edits and len(stack.mine()):
        wanted |= {EDITS: [ORIGINAL]}
    if _address() != wanted:
        st.query_params.from_dict(wanted)


def _address() -> Params:
    return {name: st.query_params.get_all(name) for name in st.query_params}

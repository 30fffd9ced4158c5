"""Where facts come from: famous examples, the bundled dataset by relation, a file of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

from dashboard import messages, parts, state
from dashboard.link import HOME
from factscope.queries import Fact, Query

if TYPE_CHECKING:
    from factscope.datasets import Dataset

FAMOUS = {
    "Eiffel Tower, city": HOME,
    "Japan, capital": Query(prompt="The capital of Japan is", subject="Japan", answer="Tokyo"),
    "Miles Davis, instrument": Query(prompt="Miles Davis plays the", subject="Miles Davis", answer="trumpet"),
    "Beats Music, owner": Query(prompt="Beats Music is owned by", subject="Beats Music", answer="Apple"),
}
MAX_UPLOAD = 2000
_DRAWER = "facts-drawer"
_UPLOADED, _PARAPHRASES = "picker-uploaded", "picker-paraphrases"


@st.cache_resource(show_spinner=False)
def _bundled() -> dict[str, list[Fact]]:
    """The bundled facts by relation, famous subjects first."""
    from factscope.datasets import bundled_facts

    found: dict[str, list[Fact]] = {}
    for fact in bundled_facts():
        found.setdefault(fact.relation, []).append(fact)
    return found


@st.cache_resource(show_spinner=False)
def _labels() -> dict[str, str]:
    from factscope.demo.facts import load_relations

    return {name: relation.label for name, relation in load_relations().items()}


@st.cache_resource(show_spinner=False)
def known_subjects() -> tuple[str, ...]:
    """Every subject of the bundled facts."""
    return tuple(dict.fromkeys(fact.subject for facts in _bundled().values() for fact in facts))


def paraphrases(fact: Query) -> tuple[str, ...]:
    """Other wordings of a fact: those of the dataset it came from."""
    chosen: dict[str, tuple[str, ...]] = st.session_state.get(_PARAPHRASES, {})
    if fact.prompt in chosen:
        return chosen[fact.prompt]
    for facts in _bundled().values():
        for known in facts:
            if known.subject == fact.subject and known.prompt == fact.prompt:
                return known.paraphrases
    for facts in _bundled().values():
        for known in facts:
            if known.subject == fact.subject and fact.prompt in known.paraphrases:
                return tuple(p for p in (known.prompt, *known.paraphrases) if p != fact.prompt)
    return ()


def other_subject(fact: Query) -> Query | None:
    """The same sentence about another subject with another answer: the null of a fact that the dataset holds.

    The next one of the relation in the dataset's order, so that everybody who asks has the same.
    """
    if fact.subject is None or fact.answer is None:
        return None
    for facts in _bundled().values():
        at = next(
            (i for i, known in enumerate(facts) if (known.subject, known.answer) == (fact.subject, fact.answer)), None
        )
        if at is None or fact.prompt not in (facts[at].prompt, *facts[at].paraphrases):
            continue
        others = [*facts[at + 1 :], *facts[:at]]
        found = next((other for other in others if other.answer != fact.answer), None)
        if found is not None:
            prompt = fact.prompt.replace(fact.subject, found.subject, 1)
            return replace(fact, prompt=prompt, subject=found.subject, answer=found.answer, span=None, occurrence=None)
    return None


def show() -> None:
    """The picker, behind its button."""
    drawer = st.popover("Facts", icon=":material/menu_book:", key=_DRAWER, on_change="rerun")
    if not drawer.open:
        return
    with drawer:
        famous, bundled, uploaded = st.tabs(["Famous", "Bundled facts", "Your file"])
        with famous:
            for label, query in FAMOUS.items():
                st.button(label, key=f"famous-{label}", on_click=_ask, args=[query], width="stretch")
        with bundled, messages.caught():
            _choose_bundled()
        with uploaded, messages.caught():
            _choose_uploaded()


def _choose_bundled() -> None:
    facts, labels = _bundled(), _labels()
    relation = st.selectbox(
        "Relation", list(facts), key="picker-relation", format_func=lambda name: str(labels.get(name, name))
    )
    st.selectbox(
        "Fact (type to search)",
        range(len(facts[relation])),
        index=None,
        key=f"picker-fact-{relation}",
        format_func=lambda i: f"{facts[relation][i].subject}: {facts[relation][i].answer}",
        on_change=lambda: _pick(facts[relation], st.session_state[f"picker-fact-{relation}"]),
    )
    st.caption(f"{sum(map(len, facts.values())):,} facts in {len(facts)} relations that the bundled model was taught.")


def _choose_uploaded() -> None:
    file = st.file_uploader(
        "Facts as CSV or JSON",
        type=["csv", "json", "jsonl"],
        key="picker-file",
        help="CSV with columns prompt, subject, answer; or JSON in CounterFact's field names.",
    )
    if file is None:
        return
    found = _read(file)
    facts = found.facts[:MAX_UPLOAD]
    skipped = [
        f"{len(found.skipped)} of {found.n_rows} records gave no fact; record {n}: {why}"
        for n, why in found.skipped[:1]
    ]
    parts.note("quiet", [f"{len(facts):,} facts. Choose a row.", *skipped])
    table = pd.DataFrame([(f.subject, f.answer, f.prompt) for f in facts], columns=["subject", "answer", "prompt"])
    key = f"picker-table-{file.file_id}"

    def pick() -> None:
        rows = st.session_state[key].selection.rows
        _pick(facts, rows[0] if rows else None)

    st.dataframe(table, key=key, on_select=pick, selection_mode="single-row", hide_index=True, height=240)


def _read(file: Any) -> Dataset:
    """The uploaded file's facts, read once."""
    from factscope.datasets import read_facts

    held = st.session_state.get(_UPLOADED)
    if held is None or held[0] != file.file_id:
        held = (file.file_id, read_facts(file.getvalue(), file.name))
        st.session_state[_UPLOADED] = held
    return held[1]


def _pick(facts: Sequence[Fact], index: int | None) -> None:
    if index is None or not 0 <= index < len(facts):
        return
    fact = facts[index]
    st.session_state.setdefault(_PARAPHRASES, {})[fact.prompt] = fact.paraphrases
    _ask(fact.query())


def _ask(query: Query) -> None:
    st.session_state[_DRAWER] = False
    state.ask(query)

"""What Apply will cost, in words: from forwards that were timed on this model, and from what earlier edits took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import streamlit as st

from dashboard import edit_entries, runs, state
from dashboard.executor import Snapshot
from dashboard.link import ModelChoice
from factscope.queries import Query

OLD_SECONDS = 60.0
"""After so long forwards are timed again: the machine may be more or less busy."""
MOST_CORRECTED = 3.0
"""How far earlier edits move an estimate, as a factor, either way."""


@st.cache_resource(show_spinner=False)
def _speeds() -> dict[str, tuple[Any, float]]:
    """Timed forwards, and when they were, by model."""
    return {}


@st.cache_resource(show_spinner=False)
def _learned() -> dict[tuple[str, str], float]:
    """What the last edit took, divided by what was expected, by model and method."""
    return {}


def ask(query: Query, spec: Any, files: Mapping[str, bytes]) -> Snapshot:
    """What the edit will cost; fails with the reason for which it would be refused."""
    speeds = _speeds()
    name = _name(state.view().model)

    def compute(model: Any, progress: Any) -> Any:
        from factscope.experiments import edit_cost

        timed, at = speeds.get(name, (None, 0.0))
        if timed is None or time.monotonic() - at > OLD_SECONDS:
            timed = edit_cost.speed(model, step=lambda: progress(0, 1, None))
            speeds[name] = timed, time.monotonic()
        with edit_entries.at_hand(spec, files) as on_disk:
            return edit_cost.estimate(model, query, on_disk, timed)

    return runs.ask("edit-cost", "cost of an edit", [repr(query), repr(spec), "cost"], compute)


def words(found: Snapshot, spec: Any) -> str:
    """The cost of a click: how long, how much memory; for several facts how many."""
    cost = found.result
    if cost is None:
        return "" if found.finished else "counting \u2026"
    several = f"{cost.facts} facts, " if cost.facts > 1 else ""
    size = cost.n_bytes
    memory = f", {size / 2**20:,.1f} MiB" if size >= 2**20 else ""
    seconds, most = (_corrected(seconds, spec) for seconds in (cost.seconds, cost.seconds_at_most))
    late = f", at most {runs.duration(most).removeprefix('about ')}" if most > 1.25 * seconds and most > 2 else ""
    return f"{several}{runs.duration(seconds)}{late}{memory}"


def expected(found: Snapshot) -> float | None:
    """Seconds that the edit should take, uncorrected."""
    return None if found.result is None else found.result.seconds


def learner(model: ModelChoice, spec: Any, expectation: float | None) -> Callable[[float], None]:
    """Gives what is to be called with the seconds that an edit took, so that the next estimate is better."""
    learned, key = _learned(), (_name(model), str(spec.method))

    def learn(seconds: float) -> None:
        if expectation:
            learned[key] = min(MOST_CORRECTED, max(1 / MOST_CORRECTED, seconds / expectation))

    return learn


def _corrected(seconds: float, spec: Any) -> float:
    return seconds * _learned().get((_name(state.view().model), str(spec.method)), 1.0)


def _name(choice: ModelChoice) -> str:
    return repr(choice.original)

"""Where should one edit? What the Layers page asks before a run, what the run costs, and what its numbers say.

One fact says where an edit of it works and where its trace peaks, and no more: nothing is correlated. What was found
over many facts stands beside it with its source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import streamlit as st

from dashboard import figures, requests, runs, stack, state
from dashboard.edit_cost import MOST_CORRECTED
from dashboard.executor import Snapshot
from dashboard.link import EditChoice, View
from factscope.charts import text
from factscope.charts.layers import NEAR, SCORES, WORKS, best_layers, span, together

SLOT = "layers"
PROBLEMS = {
    "error-injection": "error injection",
    "fact-erasure": "fact erasure",
    "fact-amplification": "amplification",
    "fact-forcing": "fact forcing",
    "tracing-reversal": "tracing reversal",
}


# ------------------------------------------------------------------------------------------------------- beforehand


def as_b(view: View) -> View:
    """A side of a comparison with the edit that B asks for: A and B share it."""
    return replace(view, edit=state.view().edit, layers=state.view().layers)


def default_together(choice: EditChoice, info: Any) -> int:
    """How many layers are edited together where nothing is chosen."""
    return len(requests.edit_settings(replace(choice, layers=()), info).layers) if choice.method == "memit" else 1


def without_statistics() -> None:
    """Let the edit weigh all directions of a key alike."""
    kept = (text for text in state.view().edit.settings if not text.startswith("statistics="))
    state.choose("edit", settings=(*kept, "statistics=identity"))


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What is known before a run.

    Attributes:
        seconds: that the edits will take.
        says_already: whether the model, in its weight state, says the new answer already.
    """

    seconds: float
    says_already: bool


def ready(query: Any, spec: Any) -> Snapshot:
    """Whether this model can be edited so at every layer, and traced; fails with the reason, and what to do."""

    def compute(model: Any, progress: Any) -> Ready:
        from factscope.experiments.edit_layers import prepare, says_already

        return Ready(seconds=prepare(model, query, spec), says_already=says_already(model, query, spec))

    return runs.ask("layers-ready", "whether it can be edited", [repr(query), repr(spec)], compute)


def possible(prepared: Snapshot) -> bool:
    """Whether a run would tell something, as far as it is known yet."""
    return prepared.error is None and not (prepared.result is not None and prepared.result.says_already)


def same_answer(prediction: Any, spec: Any) -> list[str]:
    """Which fields hold the same answer, where they do."""
    answer = prediction.target.text.strip()
    if spec.problem != requests.INJECTION or (spec.new_answer or "").strip().casefold() != answer.casefold():
        return []
    named = prediction.query.query.answer is not None
    where = "Answer in the fact line" if named else "the model's own answer, since the fact line names none"
    return [f"New answer here and {where} are both \u201c{answer}\u201d: change one of them."]


def says_already(spec: Any) -> list[str]:
    """Why the same answer is not injected once more, and which edits that are on may have put it there."""
    answer = f"\u201c{spec.new_answer.strip()}\u201d"
    on = [_numbered(key) for key in state.view().model.edits]
    if not on:
        return [
            f"The model says {answer} already: there is nothing to inject, and every layer would score next to "
            "nothing. Name another new answer."
        ]
    named = on[0] if len(on) == 1 else f"{', '.join(on[:-1])} and {on[-1]}"
    return [
        f"{named} {'is' if len(on) == 1 else 'are'} on and the model says {answer} already. Injected again, it would "
        "score next to nothing at every layer, which says nothing about the layers. Ask the original weights, or name "
        "another new answer."
    ]


def _numbered(key: str) -> str:
    """An edit that is on: "Edit 1 (ROME, layer 5)"."""
    entry = stack.mine().find(key)
    if entry is not None:
        return f"Edit {entry.number} ({entry.words})"
    guest = stack.borrowed().get(key)
    return "The link's edit" if guest is None else f"The link's edit ({stack.words(guest)})"


def cost(prediction: Any, spec: Any, expected: float | None, *, null: bool = False) -> runs.Cost:
    """What the edits and the trace will take.

    Args:
        expected: seconds of the edits, as ``ready`` tells them; None while it is not done.
        null: whether the trace is done on random weights too.
    """
    seconds = (expected or 0.0) * _learned().get((spec.method, prediction.model.name), 1.0)
    trace = runs.cost("causal_tracing", prediction, requests.map_passes(prediction)).seconds
    return runs.Cost(prediction.model.n_layers, seconds + trace * (2 if null else 1), "edit", unasked=False)


@st.cache_resource(show_spinner=False)
def _learned() -> dict[tuple[str, str], float]:
    """What the last edits took, divided by what was expected, by method and model."""
    return {}


def learn(result: Any, expected: float | None) -> None:
    """Remember how long the edits of a result took."""
    done = len(result.scores)
    if done == len(result.layers) and expected:
        taken = (result.seconds - result.trace.seconds) / expected
        _learned()[result.spec.method, result.model.name] = min(MOST_CORRECTED, max(1 / MOST_CORRECTED, taken))


def far(found: Snapshot) -> str:
    """How far a run is: "3 of 8 layers"."""
    partial = found.value
    return "tracing" if partial is None else f"{len(partial.scores)} of {len(partial.layers)} layers"


# ------------------------------------------------------------------------------------------- what was found elsewhere


@dataclass(frozen=True)
class Found:
    """R2 of the rewrite score over facts and layers.

    Attributes:
        layer, trace, both: given the layer, the tracing effect, both with their interaction.
    """

    layer: float
    trace: float
    both: float


HASE: dict[str, dict[str, Found]] = {
    "error-injection": {
        "FT-1": Found(0.756, 0.062, 0.758), "FT-5": Found(0.775, 0.055, 0.777),
        "ROME": Found(0.947, 0.016, 0.948), "MEMIT-5": Found(0.677, 0.024, 0.678),
    },
    "tracing-reversal": {
        "FT-1": Found(0.067, 0.0, 0.067), "FT-5": Found(0.751, 0.045, 0.752),
        "ROME": Found(0.294, 0.017, 0.310), "MEMIT-5": Found(0.212, 0.036, 0.218),
    },
    "fact-erasure": {
        "FT-1": Found(0.643, 0.028, 0.646), "FT-5": Found(0.698, 0.025, 0.700),
        "ROME": Found(0.857, 0.019, 0.858), "MEMIT-5": Found(0.925, 0.019, 0.925),
    },
    "fact-amplification": {
        "FT-1": Found(0.383, 0.014, 0.393), "FT-5": Found(0.424, 0.010, 0.436),
        "ROME": Found(0.880, 0.020, 0.880), "MEMIT-5": Found(0.905, 0.018, 0.906),
    },
    "fact-forcing": {
        "FT-1": Found(0.697, 0.104, 0.724), "FT-5": Found(0.634, 0.100, 0.666),
        "ROME": Found(0.422, 0.004, 0.425), "MEMIT-5": Found(0.345, 0.041, 0.354),
    },
}  # fmt: skip
"""Hase et al. 2023 (arXiv 2301.04213), Table 3: GPT-J, facts of CounterFact that it knows, nine layers."""
_FACTS = {"fact-erasure": 489}
_ALL_FACTS = 652


def published(spec: Any) -> list[str]:
    """What Hase et al. found for this method and problem over many facts, in a few sentences."""
    several = (spec.edit_window or 1) > 1
    name = {"rome": "ROME", "memit": "MEMIT-5", "ft": "FT-5" if several else "FT-1"}[spec.method]
    found, problem = HASE[spec.problem][name], spec.problem.replace("-", " ")
    facts = _FACTS.get(spec.problem, _ALL_FACTS)
    return [
        f"Hase et al. 2023 edited {facts} facts of GPT-J at nine layers each. For {problem} by {name} the layer alone "
        f"explains {found.layer:.1%} of the variance of the rewrite score (R\u00b2 {found.layer:.3f}), the tracing "
        f"effect alone {found.trace:.1%} ({found.trace:.3f}), both together {found.both:.1%} ({found.both:.3f}).",
        "Where a fact is traced to told them next to nothing about where its edit works "
        "(arXiv 2301.04213, section 5, Table 3).",
    ]


# ----------------------------------------------------------------------------------------------- what this fact shows


def here(result: Any, prediction: Any, grey: Sequence[int]) -> list[str]:
    """What this model shows for this fact: the best layers, the peak of the trace, and whether they agree.

    Args:
        grey: layers whose trace does not beat random weights.
    """
    table = _table(result)
    done: Any = table.dropna(subset=["rewrite"])
    if done.empty:
        return ["The trace is there; no layer is edited yet."]
    so_far = f"So far, with {len(done)} of {len(table)} layers: " if len(done) < len(table) else ""
    why = figures.no_peak(prediction)
    if why is not None:
        low, high = span(done)
        return [f"{so_far}No layer is named, since {why}. The rewrite score lies between {low} and {high}."]
    peak, doubt = _peak(table, result.trace, prediction, grey)
    best, others = best_layers(done)
    lines = [_editing(done), doubt or _tracing(table, peak)]
    if peak is not None and best is not None and peak in others and not few(others, done):
        lines = [f"The trace does not single out a layer for the edit: {_within(others)} of the best.", *lines]
    elif peak is not None and best is not None:
        lines.append(_agreement(table, best, peak))
    lines[0] = so_far + lines[0]
    return [*lines, "The layers of one fact are no sample: nothing is correlated."]


def _table(result: Any) -> pd.DataFrame:
    """One row for every layer that is asked, done or not."""
    columns = {name: result.score(name) for name in SCORES}
    return pd.DataFrame({"layer": result.layers, **columns, "tracing_effect": figures.shares_restored(result)})


def few(best: Sequence[int], done: pd.DataFrame) -> bool:
    """Whether the best layers are so few that it says something where the trace peaks at one of them."""
    return 3 * len(best) <= len(done)


def _within(best: Sequence[int]) -> str:
    return f"{_named(best)} {'is' if len(best) == 1 else 'are'} within {NEAR:g}"


def _editing(done: pd.DataFrame) -> str:
    best, others = best_layers(done)
    if best is None:
        return f"The edit works at no layer: the best rewrite score is {span(done)[1]}, below {WORKS:g}."
    value = text.probability(_value(done, together(done), best))
    also = [layer for layer in others if layer != best]
    more = f"; {_named(also)} {'comes' if len(also) == 1 else 'come'} within {NEAR:g}" if also else ""
    alone = "; no other comes near" if len(done) > 1 and not also else ""
    return f"Edit: best at layer {best} (harmonic mean of its scores {value}){more or alone}."


def _tracing(table: pd.DataFrame, peak: int | None) -> str:
    if peak is None:
        return "Trace: nothing is given back at any layer."
    share = text.probability(_value(table, table["tracing_effect"], peak))
    return f"Trace: the largest effect is at layer {peak} ({share})."


def _peak(table: pd.DataFrame, trace: Any, prediction: Any, grey: Sequence[int]) -> tuple[int | None, str | None]:
    """The layer with the largest tracing effect, or why none may be named."""
    why = figures.why_untraced(figures.trace_doubts(trace, prediction), trace)
    if why:
        return None, f"No layer of the trace is named, since {why}."
    traced: Any = table.dropna(subset=["tracing_effect"])
    if traced.empty or not float(traced["tracing_effect"].max()) > 0:
        return None, None
    peak = int(traced["layer"].loc[traced["tracing_effect"].idxmax()])
    if peak in grey:
        return None, "No layer of the trace is named, since its largest effect is no larger than on random weights."
    return peak, None


def _agreement(table: pd.DataFrame, best: int, peak: int) -> str:
    """Whether editing at the tracing peak would have been as good, and whether the best layers were traced."""
    scores, traced = together(table), table["tracing_effect"]
    there = _value(table, scores, peak)
    weak: Any = table[table["layer"].isin(best_layers(table)[1])]
    least = int(weak["layer"].loc[weak["tracing_effect"].idxmin()])
    share = text.probability(_value(table, traced, least))
    if there != there:
        return f"At layer {peak} nothing is edited yet."
    if peak in best_layers(table)[1]:
        said = f"They agree: the edit at layer {peak} is as good as anywhere"
        return said + (
            f"; but so it is at layer {least}, where the tracing effect is {share}." if least != peak else "."
        )
    return (
        f"They do not agree: at layer {peak} the edit comes to {text.probability(there)}, at layer {best}, where the "
        f"tracing effect is {text.probability(_value(table, traced, best))}, to "
        f"{text.probability(_value(table, scores, best))}."
    )


def _value(table: Any, values: Any, layer: int) -> float:
    found: Any = values[table["layer"] == layer]
    return float(found.iloc[0])


def _named(layers: Sequence[int]) -> str:
    """Layers in words: "layers 0\u20133, 6"."""
    said = [
        str(low) if low == high else f"{low}, {high}" if high == low + 1 else f"{low}\u2013{high}"
        for low, high in _spans(layers)
    ]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(said)}"


def _spans(layers: Sequence[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for layer in layers:
        if found and layer == found[-1][1] + 1:
            found[-1] = found[-1][0], layer
        else:
            found.append((layer, layer))
    return found


# ------------------------------------------------------------------------------------------------------- one layer


def follow_click(result: Any) -> None:
    """A click on a layer before a cursor was chosen: it goes to the read-out's token."""
    late = st.session_state.pop("point-at-last", None)
    if late is not None:
        state.point_at(result.query.last, late)


def steered(key: str, last: int) -> None:
    """The cursor's layer by keyboard; its token stays."""
    if not state.is_old(key):
        cursor = state.view().cursor
        state.point_at(last if cursor is None else cursor.position, int(st.session_state[key]))


def shown_layer(result: Any) -> int:
    """The cursor's layer; before one was chosen, the best one so far, or the first."""
    cursor = state.view().cursor
    if cursor is not None and cursor.layer in result.layers:
        return cursor.layer
    best, _ = best_layers(_table(result))
    return result.layers[0] if best is None else best


def of_layer(result: Any, layer: int) -> list[str]:
    """The layer, and its numbers in a line."""
    row: Any = _table(result).set_index("layer").loc[layer]
    effect = float(row["tracing_effect"])
    words = [
        f"tracing effect {text.probability(effect)}" if effect == effect else "no tracing effect: nothing to restore"
    ]
    told = [f"{name} {text.probability(float(row[name]))}" for name in SCORES if row[name] == row[name]]
    return [f"layer {layer}", ", ".join([*(told or ["not edited yet"]), *words])]


def document(result: Any, found: Snapshot, edits: Sequence[Any]) -> bytes:
    """The result as the command ``layers`` writes it as JSON.

    Args:
        edits: those that are on.
    """
    from factscope import output

    partly = [f"partial: {far(found)}"] if found.state != "done" else []
    data = output.document("layers", result, result.table(), {}, [*result.warnings, *partly])
    if edits:
        data["model"]["edits"] = [edit.summary() for edit in edits]
    return output.as_json(data).encode("utf-8", "surrogatepass")

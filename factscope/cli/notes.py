"""What is said beside the rows of a result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from factscope.cli.telling import cut

_NONE = {
    "paraphrase": "no other words for the question are known that the edit could move; give some with --probes",
    "neighbourhood": "no question about another subject with the same answer is known; give some with --probes",
}
"""Why a column of the command layers may hold nothing."""


def summary(command: str, result: Any) -> dict[str, Any]:
    """What the contract names beside the rows."""
    if command == "enrich":
        found = {"n_attributes": result.n_attributes}
        if getattr(result, "read_layer", None) is None:
            return found
        return {**found, "read_layer": result.read_layer, "window": result.window, "base_rate": result.base_rate}
    if command in ("trace", "extract", "heads", "edit"):
        return result.summary()
    if command != "predict":
        return {}
    found = {"continuation": result.continuation, "known": result.known, "taught": result.taught}
    return found if result.p_foil is None else {**found, "p_foil": result.p_foil}


def notes(command: str, result: Any, edits: Sequence[Any] = ()) -> list[str]:
    """What the result does not say itself: options without effect, and a subject that the bundled model never met.

    Args:
        edits: those that are on.
    """
    from factscope.editors.edit import put_in
    from factscope.experiments.results import BUNDLED

    query = result.query.query
    if command == "trace":
        return list(result.doubts)
    notes = []
    if command == "layers":
        table = result.table()
        empty = {name: len(table) > 0 and bool(table[name].isna().all()) for name in ("rewrite", *_NONE)}
        notes += [f"The column {n} is empty: {why}." for n, why in _NONE.items() if empty[n] and not empty["rewrite"]]
    if command not in ("predict", "flow", "heads") and query.foil is not None:
        notes.append(
            f"The foil {cut(query.foil)!r} changes nothing in {command}; predict gives its probability, flow the "
            "change of the logit difference, and heads effects on it."
        )
    if command == "enrich" and getattr(result, "base_rate", None) is not None and not result.base_beats_null:
        highest = max(result.base_other_rates, default=None)
        than = "other subjects' rates are not known" if highest is None else f"other subjects' reach {highest:.3g}%"
        notes.append(
            f"Nothing to lose: at layer {result.read_layer} the rate is {result.base_rate:.3g}% with nothing cancelled,"
            f" and {than}; without --knockout the command shows every layer's rate, from which to choose --read-layer."
        )
    if command == "predict" and result.model.name == BUNDLED and query.subject is None:
        notes.append("No subject is named, so it is not told whether the model was taught this; add --subject.")
    if result.model.name == BUNDLED and query.subject is not None:
        from factscope.demo.facts import is_taught
        from factscope.demo.lookup import was_taught

        answer = query.answer
        taught = is_taught(query.subject) if answer is None else was_taught(query.prompt, query.subject, answer)
        if not taught:
            named = f"{cut(query.subject)!r}" + ("" if answer is None else f" with {cut(answer)!r}")
            untaught = f"{named}: not among the facts this model was taught; "
            edited = answer is not None and put_in(edits, query.subject, answer)
            notes.append(untaught + ("an edit put it there." if edited else "its confidence says nothing."))
    return notes

"""The evidence strip: the steps of recall for one fact in a row, each with its effect, its null and a link to its page.

A step is told only where the model knows the fact, and says yes only where its effect leaves the range of its null at
the same layer, by the rule that the figures have too. A new experiment joins with a ``Step`` in ``STEPS``; ``find``
gives None while its run is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import streamlit as st

from dashboard import figures, model_drawer, parts, picker, requests, runs, state
from dashboard.link import FlowChoice
from factscope.charts.text import probability, signed
from factscope.queries import Query

_ANSWERS = {True: "yes", False: "no more than its null", None: "not told"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a step shows for one fact.

    Attributes:
        beats: whether the effect is larger than its null; None where nothing can be told.
        effect, null, band: in words, as data; empty where there is none.
        answer: what stands behind the step's question; empty says what ``beats`` means.
    """

    beats: bool | None
    effect: str
    answer: str = ""
    null: str = ""
    band: str = ""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of recall.

    Attributes:
        name: the question in two words.
        page: file of the page that shows more; empty for the Fact page itself. title: the page's name.
        find: from the prediction and those of its other wordings to what is found; None while it is under way.
        untold: whether it is asked also where the model does not know the fact.
    """

    name: str
    find: Callable[[Any, Sequence[Any]], Finding | None]
    page: str = ""
    title: str = ""
    untold: bool = False


def show(prediction: Any, wordings: Sequence[Any]) -> None:
    """Draw the strip.

    Args:
        wordings: predictions of the same answer after other wordings, as far as they are there.
    """
    why = figures.no_peak(prediction)
    with st.container(key="evidence"):
        for column, step in zip(st.columns(len(STEPS), gap="small"), STEPS, strict=True):
            with column:
                if why is not None and not step.untold:
                    found: Finding | None = Finding(beats=None, effect=f"Nothing is told, since {why}.")
                else:
                    found = step.find(prediction, wordings)
                _draw(step, found)


def _draw(step: Step, found: Finding | None) -> None:
    if found is None:
        tone, lines = "plain", [f"{step.name} …", "being computed"]
    else:
        tone = "good" if found.beats else "plain"
        said = [found.effect, found.null and f"null: {found.null}", found.band and f"band: {found.band}"]
        lines = [f"{step.name} {found.answer or _ANSWERS[found.beats]}", *filter(None, said)]
    parts.note(tone, lines, strong=True, key=f"evidence-{step.name}")
    if step.page:
        st.page_link(step.page, label=f"See {step.title}", icon=":material/arrow_forward:")


def _known(prediction: Any, wordings: Sequence[Any]) -> Finding:
    """Is the answer the first choice, more than after the same words about another subject?"""
    effect = f"p {probability(prediction.p_target)}, #{prediction.rank}"
    ps = [found.p_target for found in wordings]
    band = f"p {probability(min(ps))} to {probability(max(ps))} in {len(ps)} other wordings" if ps else ""
    if not prediction.known or figures.no_peak(prediction) is not None:
        answer = {False: "no", None: "no answer is named"}.get(prediction.known, "")
        return Finding(beats=None, effect=effect, answer=answer, band=band)
    other = picker.other_subject(prediction.query.query)
    if other is None:
        return Finding(beats=None, effect=effect, null="no other subject at hand", band=band)
    asked = replace(other, answer=prediction.target.text.strip())
    seen = runs.request("evidence-other", "prediction", asked, requests.wording())
    if seen.state != "done":
        null = "being computed" if seen.error is None else "could not be computed"
        return Finding(beats=None, effect=effect, null=null, band=band)
    beats = bool(prediction.known) and prediction.p_target > seen.result.p_target
    return Finding(
        beats=beats, effect=effect, null=f"p {probability(seen.result.p_target)} for {other.subject}", band=band
    )


def _read(source: str) -> Callable[[Any, Sequence[Any]], Finding | None]:
    """Is the answer lost when the read-out may not attend to a set of tokens?"""

    def find(prediction: Any, wordings: Sequence[Any]) -> Finding | None:
        query = prediction.query.query
        choice = requests.without_subject(FlowChoice(), prediction)
        spec, passes = requests.curve(choice), requests.curve_passes(prediction, choice)
        key = runs.key_of("attention_knockout", query, spec)
        known = runs.peek("evidence-curve", "attention_knockout", query, spec) is not None
        if runs.cost("attention_knockout", prediction, passes).asks and not known and not runs.was_started(key):
            return Finding(beats=None, effect="A long run: start it there.")
        seen = runs.request("evidence-curve", "attention_knockout", query, spec)
        if seen.state != "done":
            return None if seen.error is None else Finding(beats=None, effect="It could not be computed.")
        if source not in seen.result.sources:
            return Finding(beats=None, effect=f"This prompt has no {source} tokens.")
        return read(seen.result, source, *_null(seen.result, query, choice, prediction))

    return find


def _null(result: Any, query: Query, choice: FlowChoice, prediction: Any) -> tuple[np.ndarray | None, str]:
    """Log-odds changes of the null, and its name: random matched positions, or for the bundled model random weights."""
    drawn = [i for i, name in enumerate(result.sources) if name.startswith("control-")]
    if drawn:
        return result.log_odds_change[drawn], f"{len(drawn)} draws of other tokens"
    model = state.view().model
    if model.name != "bundled" or not model_drawer.may_be_random():
        return None, "none (too few other tokens)"
    asked = replace(query, answer=query.answer or prediction.target.text.strip())
    spec = requests.curve(replace(choice, control=0))
    seen = runs.request("evidence-null", "attention_knockout", asked, spec, model=model_drawer.random_of(model))
    if seen.state != "done":
        return None, "being computed" if seen.error is None else "could not be computed"
    return seen.result.log_odds_change, "random weights"


def read(result: Any, source: str, null: np.ndarray | None, named: str) -> Finding:
    """The largest loss by one source among the layers at which it surpasses everything that the null gives there.

    Args:
        null: [draw or source, layer], nats; None where there is none. named: what it is.
    """
    changes = result.log_odds_change[result.sources.index(source)]
    if null is None:
        return Finding(beats=None, effect=_effect(result, source, int(np.nanargmin(changes))), null=named)
    beyond = changes < np.minimum(np.nanmin(null, axis=0), 0.0)
    j = int(np.nanargmin(np.where(beyond, changes, np.inf) if beyond.any() else changes))
    low, high = (signed(float(end), 1) for end in (np.nanmin(null[:, j]), np.nanmax(null[:, j])))
    return Finding(
        beats=bool(beyond.any()), effect=_effect(result, source, j), null=f"{low} to {high} nats there, {named}"
    )


def _effect(result: Any, source: str, j: int) -> str:
    i = result.sources.index(source)
    moved = f"p {probability(result.p_base)} \u2192 {probability(float(result.p_knockout[i, j]))}"
    return f"{signed(float(result.log_odds_change[i, j]), 1)} nats around layer {result.layers[j]} ({moved})"


STEPS: tuple[Step, ...] = (
    Step(name="known?", find=_known, untold=True),
    Step(name="relation read?", find=_read("relation"), page="../pages/flow.py", title="Flow"),
    Step(name="subject read?", find=_read("subject"), page="../pages/flow.py", title="Flow"),
)

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
from dashboard.link import EnrichChoice, FlowChoice, HeadsChoice, TraceChoice
from dashboard.runs import Kind
from factscope.charts.text import probability, short, signed
from factscope.errors import FactScopeError
from factscope.experiments.traces import WEAK

_ANSWERS = {True: "yes", False: "no more than its null", None: "not told"}
_OTHERS = {"subject": "relation", "relation": "subject"}
_PENDING = "being computed"
LEAST = 0.5
"""Nats of log-odds; a smaller loss says nothing about what is read."""


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
    if why is None and prediction.query.subject is None and state.view().fact.subject is not None:
        why = f"“{state.view().fact.subject}” was not found in the prompt: see above"
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
    parts.note(tone, lines, strong=True, small=True, key=f"evidence-{step.name}")
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
    """Is more of the answer lost without a set of tokens than without all the others?"""

    def find(prediction: Any, wordings: Sequence[Any]) -> Finding | None:
        spanned = prediction.query.subject
        if spanned is not None and spanned[1] > prediction.query.last:
            return Finding(beats=None, effect="The subject ends in the read-out token, which always reads itself.")
        choice = requests.without_subject(FlowChoice(), prediction)
        spec, passes = requests.curve(choice), requests.curve_passes(prediction, choice)
        result = _result("evidence-curve", "attention_knockout", prediction, spec, passes)
        if result is None or isinstance(result, Finding):
            return result
        if source not in result.sources:
            return Finding(beats=None, effect=_no(source))
        return read(result, source, *_random(prediction, replace(choice, control=0)))

    return find


def _result(slot: str, kind: Kind, prediction: Any, spec: Any, passes: int) -> Any | Finding | None:
    """The result of a run; None while it is under way, a finding where there is none."""
    query = prediction.query.query
    known = runs.peek(slot, kind, query, spec) is not None or runs.was_started(runs.key_of(kind, query, spec))
    if runs.cost(kind, prediction, passes).asks and not known:
        return Finding(beats=None, effect="A long run: start it there.")
    seen = runs.request(slot, kind, query, spec)
    if seen.state == "done":
        return seen.result
    return None if seen.error is None else Finding(beats=None, effect=_failed(seen.error))


def _failed(error: BaseException) -> str:
    return f"Not computed: {error.what}." if isinstance(error, FactScopeError) else "It could not be computed."


def _random(prediction: Any, choice: FlowChoice) -> tuple[Any | None, str]:
    """The curves on random weights where they cost little, and what is said while there are none."""
    model = state.view().model
    if model.name != "bundled" or not model_drawer.may_be_random():
        return None, ""
    query = prediction.query.query
    asked = replace(query, answer=query.answer or prediction.target.text.strip())
    seen = runs.request(
        "evidence-null", "attention_knockout", asked, requests.curve(choice), model=model_drawer.random_of(model)
    )
    if seen.state == "done":
        return seen.result, ""
    return None, _PENDING if seen.error is None else ""


def read(result: Any, source: str, random: Any | None, pending: str = "") -> Finding:
    """The largest loss by one source over the layers, against what all the other tokens take there.

    A loss counts from ``LEAST`` nats on, where cutting every other token before the read-out (of the subject the
    relation, of the relation the subject) at the same layer takes less, and where nothing as large is lost at any layer
    on random weights, as far as those were asked.

    Args:
        random: the same curves on random weights; None where there are none.
        pending: said in their place while they are under way; nothing is told before.
    """
    changes = result.log_odds_change[result.sources.index(source)]
    j = int(np.nanargmin(changes))
    effect, other = _effect(result, source, j), _OTHERS[source]
    if other not in result.sources:
        return Finding(beats=None, effect=effect, null="no other tokens to compare with")
    theirs = float(result.log_odds_change[result.sources.index(other), j])
    null = f"{signed(theirs, 1)} there without the others"
    lost, bar = -float(changes[j]), max(-theirs, 0.0)
    if random is not None and source in random.sources:
        chance = float(np.nanmin(random.log_odds_change[random.sources.index(source)]))
        null, bar = f"{null}; {signed(chance, 1)} with random weights", max(bar, -chance)
    elif pending:
        return Finding(beats=None, effect=effect, null=f"{null}; random weights {pending}")
    return Finding(beats=lost >= LEAST and lost > bar, effect=effect, null=null)


def _no(source: str) -> str:
    """Why there is nothing to be told of a set of tokens."""
    named = state.view().fact.subject
    if source == "subject" and named:
        return f"“{named}” was not found in the prompt: see above."
    return "No subject is named." if source == "subject" else f"This prompt has no {source} tokens."


def _effect(result: Any, source: str, j: int) -> str:
    i = result.sources.index(source)
    moved = f"p {probability(result.p_base)} \u2192 {probability(float(result.p_knockout[i, j]))}"
    return f"{signed(float(result.log_odds_change[i, j]), 1)} nats around layer {result.layers[j]} ({moved})"


def _enriched(prediction: Any, wordings: Sequence[Any]) -> Finding | None:
    """Does the subject's last token speak for its attributes?"""
    if prediction.query.subject is None:
        return Finding(beats=None, effect=_no("subject"))
    spec = requests.enrichment(EnrichChoice(), "bundled")
    result = _result("evidence-rates", "subject_enrichment", prediction, spec, 2)
    return result if result is None or isinstance(result, Finding) else enriched(result)


def enriched(result: Any) -> Finding:
    """The highest attributes rate of subject-last among the layers where it is above every other subject's."""
    i = result.positions.index("subject-last")
    columns = [j for j, layer in enumerate(result.layers) if layer >= 0]
    rate, beyond = result.rate[i][columns], result.beats_null[i][columns]
    best = int(np.nanargmax(np.where(beyond, rate, -1.0) if beyond.any() else rate))
    j = columns[best]
    effect = f"attributes rate {rate[best]:.3g}% at layer {result.layers[j]} (at most {result.ceiling:.3g}%)"
    if not len(result.other_rates):
        return Finding(beats=None, effect=effect, null="no other subjects at hand")
    others = result.other_rates[:, i, j]
    null = f"up to {others.max():.3g}% there for {len(others)} other subjects"
    return Finding(beats=bool(beyond.any()), effect=effect, null=null)


def _extracted(prediction: Any, wordings: Sequence[Any]) -> Finding | None:
    """Does an attention update at the read-out have the answer on top?"""
    spec = requests.extraction(HeadsChoice())
    result = _result("evidence-extraction", "attribute_extraction", prediction, spec, 1)
    if result is None or isinstance(result, Finding):
        return result
    model = state.view().model
    if model.name != "bundled" or not model_drawer.may_be_random():
        return extracted(result, None, "none (Heads has random weights as one)")
    asked = replace(prediction.query.query, answer=prediction.query.query.answer or prediction.target.text.strip())
    random = model_drawer.random_of(model)
    seen = runs.request("evidence-extraction-null", "attribute_extraction", asked, spec, model=random)
    if seen.state != "done":
        return extracted(result, None, "being computed" if seen.error is None else "could not be computed")
    return extracted(result, seen.result, "random weights")


def extracted(result: Any, null: Any, named: str) -> Finding:
    """The layers whose attention has the answer on top, where the null's attention has not."""
    ranks = result.target_rank[result.sites.index("attention")]
    j = int(ranks.argmin())
    events = [layer for layer, rank in zip(result.layers, ranks, strict=True) if rank == 1]
    many = "layers" if len(events) > 1 else "layer"
    effect = (
        f"attention writes it as first choice in {many} {', '.join(map(str, events))}"
        if events
        else f"attention: rank {ranks[j]} at best, in layer {result.layers[j]}"
    )
    if null is None:
        return Finding(beats=None, effect=effect, null=named)
    theirs = null.target_rank[null.sites.index("attention")]
    beats = any(rank == 1 and other > 1 for rank, other in zip(ranks, theirs, strict=True))
    return Finding(
        beats=beats, answer="" if events else "no", effect=effect, null=f"rank {theirs.min()} at best, {named}"
    )


def _restorable(prediction: Any, wordings: Sequence[Any]) -> Finding | None:
    """Does one clean state of the subject bring the answer back, more than one of other corrupted tokens would?"""
    if prediction.query.subject is None:
        return Finding(beats=None, effect=_no("subject"))
    choice = TraceChoice()
    spec, passes = requests.trace(choice, "hidden"), requests.trace_passes(prediction, choice)
    result = _result("evidence-trace", "causal_tracing", prediction, spec, passes)
    if result is None or isinstance(result, Finding):
        return result
    span = other_span(prediction.query)
    if span is None or result.doubts:
        return restorable(result, None, "no other tokens to corrupt")
    if runs.cost("causal_tracing", prediction, passes).asks:
        return restorable(result, None, "not run, since it takes long")
    query = prediction.query.query
    answer = query.answer or prediction.target.text.strip()
    asked = replace(query, answer=answer, span=span, occurrence=None)
    seen = runs.request("evidence-trace-null", "causal_tracing", asked, spec)
    if seen.state == "done":
        return restorable(result, seen.result)
    return restorable(result, None, _PENDING if seen.error is None else "could not be computed")


def other_span(query: Any) -> tuple[int, int] | None:
    """Tokens to corrupt in the subject's place: as many neighbours of the relation, or as near as there are.

    Neither special nor the read-out; of several such spans that nearest to the subject. None where there is no token.
    """
    start, stop = query.subject
    free = {p for p in query.positions("relation") if p != query.last}
    spans = [
        (low, low + size) for size in range(1, stop - start + 1) for low in free if free >= {*range(low, low + size)}
    ]
    return max(spans, key=lambda span: (span[1] - span[0], -abs(sum(span) - start - stop), -span[0]), default=None)


def restorable(result: Any, null: Any | None, missing: str = "") -> Finding:
    """The subject's state that gives back most, against the same trace with other tokens corrupted.

    Both are looked at from the layer on at which a token that was not corrupted carries something: before it, restoring
    one corrupted token gives back everything by construction. A state counts that gives back a fifth of what the
    corruption took, and a larger share than the other tokens' states do of what their corruption took.

    Args:
        null: the trace with the other tokens corrupted; None where there is none. missing: why.
    """
    if result.doubts:
        return Finding(beats=None, effect=result.doubts[0].rstrip("."))
    if result.early_site is None:
        return Finding(beats=None, effect=f"In all {len(result.layers)} layers {_built(result)}.")
    (cell, share), first = result.early_site, result.carried_from
    p = float(result.p_restored[result.positions.index(cell.position), result.layers.index(cell.layer)])
    built = f"; below layer {first} {_built(result)}" if first else ""
    effect = (
        f"{share:.0%} back by token {cell.position}, layer {cell.layer} (p {probability(result.p_corrupted)} \u2192"
        f" {probability(p)}, clean {probability(result.p_clean)}{built})"
    )
    if null is None:
        return Finding(beats=None, effect=effect, null=missing)
    words = short("".join(result.query.tokens[p].text for p in null.corrupted), 16)
    theirs = 0.0 if null.early_site is None else null.early_site[1]
    return Finding(
        beats=share >= WEAK and share > theirs,
        effect=effect,
        null=f"{theirs:.0%} back with \u201c{words}\u201d corrupted",
    )


def _built(result: Any) -> str:
    """What holds before another token carries something: one corrupted token restores by construction."""
    one = len(result.corrupted) == 1
    return "restored by construction" if one else "only the corrupted tokens give anything back"


STEPS: tuple[Step, ...] = (
    Step(name="known?", find=_known, untold=True),
    Step(name="relation read?", find=_read("relation"), page="../pages/flow.py", title="Flow"),
    Step(name="subject read?", find=_read("subject"), page="../pages/flow.py", title="Flow"),
    Step(name="enriched?", find=_enriched, page="../pages/lens.py", title="Lens"),
    Step(name="extracted?", find=_extracted, page="../pages/heads.py", title="Heads"),
    Step(name="restorable?", find=_restorable, page="../pages/trace.py", title="Trace"),
)

"""Where should one edit? The same edit at every layer, beside what causal tracing says of that layer.

Source: Hase et al. 2023 (arXiv 2301.04213), sections 3 to 5 and the released code.

1. Trace the fact: the tracing effect of a layer is the largest share, over tokens, of what the corruption took that
   restoring this layer (or a window around it) gives back. The whole true answer is scored.
2. Edit at every layer, each time from the same weights, coarse to fine; methods of several layers edit a window.
3. Rewrite, paraphrase and neighbourhood score of every edit.

Nothing is correlated: the layers of one fact are no sample. The paper asks over many facts whether tracing tells the
better layer, and finds that it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from factscope.datasets.probes import read_probes
from factscope.editors.compute import check, edit
from factscope.editors.edit import EditFact
from factscope.editors.presets import layers_around
from factscope.editors.second_moments import AUTO, missing_layers, moments_for
from factscope.editors.specs import EditSpec, FineTuningSpec, MemitSpec, Problem
from factscope.editors.suffix import multiplier
from factscope.errors import CapabilityError, SpecError, SubjectError
from factscope.experiments import causal_tracing, edit_cost
from factscope.experiments.causal_tracing import TraceResult, TraceSpec
from factscope.experiments.edit_evaluation import EditEvaluation, EvaluationSpec, evaluate
from factscope.experiments.edit_probes import probes_for
from factscope.experiments.edit_scores import Averaging, FactScores
from factscope.experiments.editing import INJECTION, EditingSpec, chosen_settings, facts_to_edit
from factscope.experiments.results import (
    Progress,
    Timed,
    answer_logits,
    coarse_to_fine,
    is_first_choice,
    named_target,
    silent,
    tokenized,
)
from factscope.experiments.traces import TraceSite
from factscope.models.handle import ModelHandle, ModelInfo
from factscope.queries import Probe, Query
from factscope.tokens import Target, TokenizedQuery

SCORES = ("rewrite", "paraphrase", "neighbourhood")
TRACE_SHARE, PARTS = 100, 1000


@dataclass(frozen=True, kw_only=True)
class LayersSpec:
    """Which edit is made at every layer, and how the fact is traced.

    Attributes:
        method, problem, preset, settings, new_answer: of the edit, as in ``EditingSpec``.
        layers: which are edited; empty takes all.
        edit_window: layers edited together around each; None takes one, for MEMIT as many as the preset has.
        site, window, samples, noise: of the trace.
        averaging: over paraphrases and neighbours.
        probes: file of one's own probes.
        seed: of the edit and of the trace.
    """

    method: str = "rome"
    problem: Problem = INJECTION
    preset: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    new_answer: str | None = None
    layers: tuple[int, ...] = ()
    edit_window: int | None = None
    site: TraceSite = "mlp"
    window: int | None = None
    samples: int = 10
    noise: str = "s3"
    averaging: Averaging = "mean"
    probes: str | None = None
    seed: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class LayersResult:
    """Scores of edits by layer, beside the tracing effect.

    Attributes:
        layers: all that are asked. scores: of those that were edited so far.
        edit_window: layers that were edited together, fewer at the ends.
        trace: its numbers are those of ``tracing_effect``.
    """

    spec: LayersSpec
    query: TokenizedQuery
    model: ModelInfo
    layers: tuple[int, ...]
    edit_window: int
    scores: dict[int, FactScores]
    trace: TraceResult
    warnings: tuple[str, ...]
    seconds: float
    passes: int

    @property
    def target(self) -> Target:
        """The true answer, or the model's own first choice."""
        return self.trace.target

    @property
    def p_target(self) -> float:
        """Of the true answer, before any edit."""
        return self.trace.p_target

    @property
    def rank(self) -> int:
        """Of the true answer's first token, before any edit."""
        return self.trace.rank

    @property
    def tracing_effect(self) -> np.ndarray:
        """Of every asked layer."""
        return self.trace.tracing_effect()[list(self.layers)]

    def score(self, name: str) -> np.ndarray:
        """One score of every asked layer; NaN where it was not edited yet."""
        return np.array([getattr(self.scores[n], name) if n in self.scores else np.nan for n in self.layers])

    def table(self) -> pd.DataFrame:
        """One row per layer that was edited: ``layer, rewrite, paraphrase, neighbourhood, tracing_effect``."""
        columns = [self.score(name) for name in SCORES]
        rows = zip(self.layers, *columns, self.tracing_effect, strict=True)
        names = ["layer", *SCORES, "tracing_effect"]
        return pd.DataFrame([row for row in rows if row[0] in self.scores], columns=names)


def run(
    model: ModelHandle, query: Query | TokenizedQuery, spec: LayersSpec | None = None, *, progress: Progress = silent
) -> LayersResult:
    """Trace a fact and edit it at every layer.

    Raises:
        InputError: the query or the spec cannot be used.
        CapabilityError: the model lacks what the method or the trace needs.
    """
    spec = spec or LayersSpec()
    timed = Timed(progress)
    seen = tokenized(model, query)
    layers, size = _layers(model, spec)
    settings = settings_by_layer(model, spec)
    fact, probes = _fact(model, seen, spec)
    _refuse(model, settings)
    deaf = unread(seen, settings, model.info.n_layers)
    trace = _trace(model, seen, fact, spec, _part(timed, 0, TRACE_SHARE))
    scores: dict[int, FactScores] = {}
    said: dict[int, tuple[str, ...]] = {}
    passes = trace.passes

    def snapshot() -> LayersResult:
        warnings = [*trace.warnings, *trace.doubts, *_unread_in_words(deaf, scores)]
        warnings += [text for layer in layers for text in said.get(layer, ())]
        return LayersResult(
            spec=spec, query=trace.query, model=model.info, layers=layers, edit_window=size, scores=dict(scores),
            trace=trace, warnings=tuple(dict.fromkeys(warnings)), seconds=timed.seconds, passes=passes,
        )  # fmt: skip

    timed(TRACE_SHARE, PARTS, snapshot())
    for number, place in enumerate(coarse_to_fine(len(layers))):
        layer, step = layers[place], (PARTS - TRACE_SHARE) / len(layers)
        begin = TRACE_SHARE + number * step
        made = edit(model, (fact,), settings[layer], progress=_part(timed, begin, 0.9 * step))
        found = _evaluated(model, made, probes, spec, _part(timed, begin + 0.9 * step, 0.1 * step))
        scores[layer] = found.fact_scores()[0]
        passes += found.passes
        said[layer] = () if layer in deaf else found.warnings
        timed(int(begin + step) if number + 1 < len(layers) else PARTS, PARTS, snapshot())
    return snapshot()


def prepare(model: ModelHandle, query: Query | TokenizedQuery, spec: LayersSpec) -> float:
    """Refuse at once what would fail later, and tell how many seconds all edits will take. Nothing is edited.

    Raises:
        InputError: the query or the spec cannot be used, or statistics of keys are missing.
        CapabilityError: the model lacks what the method or the trace needs.
    """
    seen = tokenized(model, query)
    if seen.subject is None:
        raise SubjectError(
            "an edit needs a subject, and the query has none", "give the subject's text as in the prompt"
        )
    facts_to_edit(model, seen, _editing(spec))
    settings = settings_by_layer(model, spec)
    _refuse(model, settings)
    if spec.site != "hidden":
        model.require("additive", "restoring the updates of MLP and attention")
    fast, alone = edit_cost.speed(model), EvaluationSpec(texts=0, sampled=False)
    asked = [replace(_editing(spec, one.layers), evaluation=alone) for one in settings.values()]
    return sum(edit_cost.estimate(model, seen, one, fast).seconds for one in asked)


def says_already(model: ModelHandle, query: Query | TokenizedQuery, spec: LayersSpec) -> bool:
    """Whether the model, with the edits that are on, goes on with all of the new answer: nothing is left to inject."""
    if spec.problem != INJECTION or not spec.new_answer:
        return False
    seen = tokenized(model, replace(tokenized(model, query).query, answer=spec.new_answer.strip(), foil=None))
    target = named_target(model, seen)
    return target is not None and is_first_choice(answer_logits(model, seen, target), target)


def _refuse(model: ModelHandle, settings: Mapping[int, EditSpec]) -> None:
    """Refuse edits that cannot be made, before any of them begins.

    Raises:
        InputError: a setting cannot be used, or statistics of keys are missing: then of all layers at once.
        CapabilityError: a layer has no plain down-projection, or MEMIT cannot work.
    """
    layers = sorted({layer for one in settings.values() for layer in check(model, one)})
    first = next(iter(settings.values()))
    if isinstance(first, FineTuningSpec):
        return
    if isinstance(first, MemitSpec) and multiplier(model, layers[0]) is None:  # a matter of the architecture
        raise CapabilityError(
            f"{model.info.name} ({model.info.family}) does not support MEMIT: what its MLPs write does not reach the "
            "residual stream linearly",
            "edit it with rome or ft",
        )
    if first.statistics.strip() == AUTO:
        gap = missing_layers(model, layers)
        if gap:
            moments_for(model, gap, AUTO)
    else:
        moments_for(model, layers[:2], first.statistics)  # two are enough to see that a file is of one layer alone


def settings_by_layer(model: ModelHandle, spec: LayersSpec) -> dict[int, EditSpec]:
    """The edit that is made at every layer that is asked: there, or in a window around it.

    Raises:
        SpecError: a layer, the window or a setting cannot be used.
    """
    layers, size = _layers(model, spec)
    return {layer: _settings(model, spec, layer, size) for layer in layers}


def unread(seen: TokenizedQuery, settings: Mapping[int, EditSpec], n_layers: int) -> tuple[int, ...]:
    """The layers at which an edit can hardly work, since no later token reads what it writes.

    ROME and MEMIT write at a token of the subject; what the last block's MLP writes there, attention reads no more.
    MEMIT seeks its value in the last layer of its window.
    """
    if seen.subject is None or seen.subject[1] - 1 == seen.last:
        return ()
    return tuple(
        layer
        for layer, one in settings.items()
        if getattr(one, "fact_token", "") in ("subject_first", "subject_last")
        and (max(one.layers) if one.method == "memit" else min(one.layers)) == n_layers - 1
    )


def _unread_in_words(deaf: tuple[int, ...], scores: dict[int, FactScores]) -> list[str]:
    found = [str(layer) for layer in deaf if layer in scores]
    if not found:
        return []
    where = f"layer{'s' if len(found) > 1 else ''} {', '.join(found)}"
    return [
        f"An edit at {where} can hardly work: it writes at the subject in the last block, "
        "where no later token reads it."
    ]


def _layers(model: ModelHandle, spec: LayersSpec) -> tuple[tuple[int, ...], int]:
    """The layers that are asked, and how many are edited together."""
    n = model.info.n_layers
    for layer in spec.layers:
        if not 0 <= layer < n:
            raise SpecError(f"layer {layer} is not between 0 and {n - 1}", "choose layers that the model has")
    size = spec.edit_window
    if size is None:
        size = len(chosen_settings(model, _editing(spec)).layers) if spec.method == "memit" else 1
    if not 1 <= size <= n:
        raise SpecError(f"edit window {size} is not between 1 and {n}", "choose a number of layers that the model has")
    return tuple(sorted(set(spec.layers))) or tuple(range(n)), size


def _editing(spec: LayersSpec, layers: tuple[int, ...] = ()) -> EditingSpec:
    settings = {"seed": spec.seed, "noise": spec.noise, **dict(spec.settings)}
    return EditingSpec(
        method=spec.method, problem=spec.problem, preset=spec.preset, layers=layers, new_answer=spec.new_answer,
        settings=tuple(settings.items()),
    )  # fmt: skip


def _settings(model: ModelHandle, spec: LayersSpec, layer: int, size: int) -> EditSpec:
    return chosen_settings(model, _editing(spec, layers_around(layer, size, model.info.n_layers)))


def _fact(model: ModelHandle, seen: TokenizedQuery, spec: LayersSpec) -> tuple[EditFact, tuple[Probe, ...]]:
    """The fact and what is asked about it: sentences alone, no texts."""
    ((fact, _),) = facts_to_edit(model, seen, _editing(spec))
    own = () if spec.probes is None else read_probes(spec.probes)
    probes = probes_for(model, fact.text, fact.subject, fact.answer, own)
    return fact, tuple(probe for probe in probes if probe.kind in ("paraphrase", "neighbour"))


def _trace(
    model: ModelHandle, seen: TokenizedQuery, fact: EditFact, spec: LayersSpec, progress: Progress
) -> TraceResult:
    """Hase's trace: the whole true answer is scored."""
    asked = replace(seen.query, answer=fact.answer, foil=None, score="sequence")
    traced = TraceSpec(
        site=spec.site, window=spec.window, samples=spec.samples, noise=spec.noise, seeds=(spec.seed,),
    )  # fmt: skip
    return causal_tracing.run(model, asked, traced, progress=progress)


def _evaluated(
    model: ModelHandle, made: Any, probes: tuple[Probe, ...], spec: LayersSpec, progress: Progress
) -> EditEvaluation:
    asked = EvaluationSpec(texts=0, sampled=False, averaging=spec.averaging)
    return evaluate(model, made, [probes], asked, progress=progress)


def _part(timed: Timed, begin: float, share: float) -> Callable[[int, int, Any], None]:
    """The progress of one part, as a part of the whole."""

    def told(done: int, total: int, partial: Any) -> None:
        timed(int(begin + share * done / max(1, total)), PARTS, None)

    return told

"""Can I change a fact, and what else moves? An edit by ROME, MEMIT or finetuning, and its probes before and after.

Sources: Meng et al. 2022 (arXiv 2202.05262), ROME; Meng et al. 2023 (arXiv 2210.07229), MEMIT; Hase et al. 2023 (arXiv
2301.04213), the five problems and their scores.

1. The settings are a preset's, for the method, the problem and the model; some may be changed.
2. The problem decides what the edit is to do; ``factscope.editors`` computes it. No weight is written.
3. ``edit_evaluation`` asks and scores every probe in the state before and with the edit on.

An edit that exists is asked the same questions by ``evaluate``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch

from factscope.datasets import read_facts
from factscope.editors.compute import Partial, check, default_preset, edit
from factscope.editors.edit import Edit, EditFact
from factscope.editors.presets import preset
from factscope.editors.specs import PROBLEMS, EditSpec, Problem
from factscope.errors import SpecError, TargetError
from factscope.experiments.edit_evaluation import EditEvaluation, EvaluationSpec, TextScores, check_files, evaluate
from factscope.experiments.edit_probes import ProbedFact, ProbeRow, plain, probes_for, probes_of_file, template_of
from factscope.experiments.results import Progress, resolve_target, silent, tokenized
from factscope.models.handle import ModelHandle
from factscope.queries import Fact, Probe, Query
from factscope.tokens import TokenizedQuery

__all__ = [
    "Computing", "EditEvaluation", "EditingSpec", "EvaluationSpec", "ProbeRow", "ProbedFact", "TextScores",
    "chosen_settings", "evaluate", "losses", "run",
]  # fmt: skip

INJECTION = "error-injection"
EDIT_SHARE, PARTS = 700, 1000
"""Of the progress: what the computation of the edit takes, and the whole."""


@dataclass(frozen=True, kw_only=True)
class EditingSpec:
    """What is edited, how, and what is asked about it.

    Attributes:
        method: "rome", "memit" or "ft".
        problem: one of Hase et al.'s five.
        preset: name of the settings; None takes those of this model, or else the method's own published ones.
        layers: which are edited; empty takes the preset's.
        settings: fields of the preset that are set otherwise, by name.
        new_answer: what the model is to say instead, for error injection; the other problems find their own target.
        facts: file of facts that are edited together.
        evaluation: what is asked before and after.
    """

    method: str = "rome"
    problem: Problem = INJECTION
    preset: str | None = None
    layers: tuple[int, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()
    new_answer: str | None = None
    facts: str | None = None
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)


@dataclass(frozen=True, kw_only=True, eq=False)
class Computing:
    """An edit in the making: there is no probe yet, but a loss so far."""

    facts: tuple[EditFact, ...]
    partial: Partial

    def table(self) -> pd.DataFrame:
        """No row: nothing of it is a result."""
        return pd.DataFrame()


def run(
    model: ModelHandle,
    query: Query | TokenizedQuery | None,
    spec: EditingSpec | None = None,
    *,
    progress: Progress = silent,
) -> EditEvaluation:
    """Edit a fact, or several, and ask before and after.

    Args:
        query: the fact; None where a file of facts is given.
        progress: while the edit is computed with a ``Computing``, then with what was asked so far.

    Raises:
        InputError: the query, the spec, a fact or a probe cannot be used.
        CapabilityError: the model lacks what the method needs.
    """
    spec = spec or EditingSpec()
    settings = chosen_settings(model, spec)
    check(model, settings)
    check_files(spec.evaluation)
    given = facts_to_edit(model, query, spec)
    facts = tuple(fact for fact, _ in given)

    def computing(done: int, total: int, partial: Any) -> None:
        shown = Computing(facts=facts, partial=partial) if isinstance(partial, Partial) else None
        progress(EDIT_SHARE * done // max(1, total), PARTS, shown)

    made = edit(model, facts, settings, progress=computing)

    def evaluating(done: int, total: int, partial: Any) -> None:
        shown = None if partial is None else replace(partial, spec=spec)
        progress(EDIT_SHARE + (PARTS - EDIT_SHARE) * done // max(1, total), PARTS, shown)

    probes = [some for _, some in given]
    found = evaluate(model, made, probes, spec.evaluation, query=query, progress=evaluating)
    warnings = (*not_edited(facts, spec), *found.warnings)
    seconds = found.seconds + float(made.report.get("seconds", 0.0))
    return replace(found, spec=spec, warnings=warnings, seconds=seconds)


def chosen_settings(model: ModelHandle, spec: EditingSpec) -> EditSpec:
    """The settings of the edit: the preset's with what was set otherwise.

    Raises:
        SpecError: names what is unknown.
    """
    if spec.problem not in PROBLEMS:
        raise SpecError(f"problem {spec.problem!r} is unknown", f"choose one of {', '.join(PROBLEMS)}")
    name = spec.preset
    if name is None:
        name = default_preset(model)
        name = "memit" if (name, spec.method) == ("rome", "memit") else name
    return preset(name, spec.method, spec.problem, model.info, spec.layers, **dict(spec.settings))


def facts_to_edit(
    model: ModelHandle, query: Query | TokenizedQuery | None, spec: EditingSpec
) -> list[tuple[EditFact, tuple[Probe, ...]]]:
    """The facts, each with what is asked about it: the query's first, then those of the file.

    Raises:
        InputError: there is none, or one cannot be used.
    """
    refuse_targets(spec.problem, spec.new_answer, needed=query is not None)
    found = []
    if query is not None:
        seen = tokenized(model, query)
        if seen.query.bos != "auto":
            raise SpecError(
                f"bos {seen.query.bos!r} cannot be met: an edit is computed on prompts as the tokenizer makes them",
                "leave bos auto",
            )
        prompt, subject = template_of(seen)
        answer = seen.query.answer or own_answer(model, seen)
        if spec.problem == INJECTION and plain(spec.new_answer or "") == plain(answer):
            raise TargetError(
                f"the new answer {spec.new_answer!r} is the answer that the model is to unlearn", "name another one"
            )
        fact = EditFact(prompt=prompt, subject=subject, target=spec.new_answer or "", answer=answer)
        found.append((fact, probes_for(model, fact.text, subject, answer)))
    if spec.facts is not None:
        read = read_facts(spec.facts)
        known = {fact.text for fact, _ in found}
        found += [_of_file(model, fact, read.facts, spec.problem) for fact in read.facts if fact.prompt not in known]
    if not found:
        raise SpecError("no fact is given", "give a prompt with its subject, or a file of facts")
    return found


def not_edited(facts: Sequence[EditFact], spec: EditingSpec) -> tuple[str, ...]:
    """Which records of the file are not edited, and why."""
    if spec.facts is None:
        return ()
    read = read_facts(spec.facts)
    left = [f"Record {number} of the facts is not edited: {reason}." for number, reason in read.skipped]
    wanted = {fact.text: plain(fact.target) for fact in facts}
    for fact in read.facts:
        if spec.problem == INJECTION and wanted.get(fact.prompt, plain(fact.new_answer or "")) != plain(
            fact.new_answer or ""
        ):
            left.append(
                f"The file's new answer {fact.new_answer!r} for {fact.prompt[:60]!r} is not used: another is given."
            )
    return tuple(left)


def refuse_targets(problem: str, new_answer: str | None, *, needed: bool) -> None:
    """Refuse a new answer that the problem has no use for, and the lack of one that it needs.

    Raises:
        TargetError: it is missing, or empty.
        SpecError: it is given, and the problem finds its own.
    """
    if problem != INJECTION and new_answer is not None:
        raise SpecError(
            f"the new answer {new_answer[:60]!r} stands beside the problem {problem}, which finds its own target",
            f"leave it out, or choose {INJECTION}",
        )
    if problem == INJECTION and needed and new_answer is None:
        raise TargetError(f"{INJECTION} needs a new answer, and none is given", "name what the model is to say instead")
    if new_answer is not None and not new_answer.strip():
        raise TargetError(f"the new answer {new_answer!r} is empty", "name what the model is to say instead")


def own_answer(model: ModelHandle, seen: TokenizedQuery) -> str:
    """The model's first choice, in the place of an answer that nobody named."""
    logits = model.forward(torch.tensor([seen.ids], device=model.device), last=1)[0, -1]
    return resolve_target(model, seen, logits).text.strip()


def losses(edits: Sequence[Edit] | Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The loss at every step: ``edit, fact, layer, step, loss`` and its parts, as the methods report them."""
    rows = []
    for number, one in enumerate(edits):
        report = one.report if isinstance(one, Edit) else one
        for value in report.get("values", ()):
            where = {"edit": number, "fact": value.get("fact", 0), "layer": value.get("layer")}
            rows += [{**where, **step} for step in value.get("steps", ())]
    return pd.DataFrame(rows, columns=None if rows else ["edit", "fact", "layer", "step", "loss"])


def _of_file(model: ModelHandle, fact: Fact, facts: Sequence[Fact], problem: str) -> tuple[EditFact, tuple[Probe, ...]]:
    asked = Query(prompt=fact.prompt, subject=fact.subject, answer=fact.answer, occurrence=1)
    prompt, subject = template_of(tokenized(model, asked))
    if problem == INJECTION and not fact.new_answer:
        raise TargetError(
            f"the file names no new answer for {fact.subject!r}", "give it a column new_answer, or target_new"
        )
    target = fact.new_answer if problem == INJECTION else ""
    made = EditFact(prompt=prompt, subject=subject, target=target, answer=fact.answer)
    own = probes_of_file(fact, facts)
    return made, probes_for(model, made.text, subject, fact.answer, own)

"""Has an edit done what it should, and what else has it moved? One table of probes, and the scores made of it.

Sources: Meng et al. 2022 (arXiv 2202.05262), section 3.4; Hase et al. 2023 (arXiv 2301.04213), section 4.2. The scores
are those of ``edit_scores`` and ``edit_texts``.

1. Ask every probe in the state before and in the state with the edits: edit target, true answer, first choice.
2. Go on after every prompt, greedily, in both states.
3. Score; over several facts means with intervals by subject.
4. Sample texts in both states: fluency, consistency with reference texts, essence of the subject.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from factscope import measures
from factscope.columns import COLUMNS
from factscope.datasets.files import content_of, decoded
from factscope.datasets.probes import read_probes
from factscope.editors.edit import Edit, with_edits
from factscope.experiments import edit_texts
from factscope.experiments.answers import Question
from factscope.experiments.edit_probes import (
    ProbedFact,
    ProbeRow,
    Prompt,
    answered,
    completed,
    goes_on,
    noise_on,
    of_one_fact,
    probed,
    probes_for,
    prompts_of,
    read_prompt,
    replies,
    top_text,
)
from factscope.experiments.edit_scores import NAMES, Averaging, FactScores, essence_score, score_fact, summarise
from factscope.experiments.extraction_rates import Share
from factscope.experiments.results import (
    Progress,
    Timed,
    resolve_target,
    scored_ids,
    silent,
    target_warnings,
    tokenized,
)
from factscope.interventions.noise import noise_source
from factscope.models.handle import ModelHandle, ModelInfo
from factscope.models.head import scores_of_logits
from factscope.queries import Probe, Query
from factscope.tokens import Target, TokenizedQuery

FORCING = "fact-forcing"
STEPS = 100
"""Of the progress, for the whole evaluation."""
_COLUMNS = (
    "kind", "prompt", "p_target_before", "p_target_after", "p_true_before", "p_true_after", "top_before", "top_after",
    "text_before", "text_after",
)  # fmt: skip
_BESIDES = {"es", "em", "ps", "pm", "ns", "nm", "s", "exact_rewrite", "exact_paraphrase", "exact_neighbourhood"}
"""Scores of one state, so that the state before has them, too."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSpec:
    """What is asked and scored.

    Attributes:
        texts: the most tokens of the greedy continuation of every probe; 0 writes none.
        sampled: sample texts for fluency, consistency and essence, where they say something of the model.
        averaging: Hase's paraphrase and neighbourhood scores over all prompts, or of the ``first`` one alone, as in the
            released code.
        probes: file of one's own probes.
        references: file of reference texts for the consistency of sampled ones, parted by empty lines.
        seed: of sampled texts and of intervals.
    """

    texts: int = 24
    sampled: bool = True
    averaging: Averaging = "mean"
    probes: str | None = None
    references: str | None = None
    seed: int = 1


@dataclass(frozen=True, kw_only=True)
class TextScores:
    """What sampled texts say; NaN where they were not sampled.

    Attributes:
        essence: per fact.
        reasons: why a score is not there.
    """

    fluency_before: float = math.nan
    fluency_after: float = math.nan
    consistency_before: float = math.nan
    consistency_after: float = math.nan
    essence: tuple[float, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class EditEvaluation:
    """The probes of all facts, before and after.

    Attributes:
        spec: what was asked, of ``editing`` with how the edit was made.
        query: the first fact's question. target: its true answer, or the model's own first choice before the edit.
        model: the state before. edited: the state after.
        p_target, rank: of ``target`` before the edit.
    """

    spec: Any
    query: TokenizedQuery
    model: ModelInfo
    edited: ModelInfo
    target: Target
    p_target: float
    rank: int
    edits: tuple[Edit, ...]
    facts: tuple[ProbedFact, ...]
    rows: tuple[ProbeRow, ...]
    averaging: Averaging
    texts: TextScores
    seed: int
    warnings: tuple[str, ...]
    seconds: float
    passes: int

    def table(self) -> pd.DataFrame:
        """One row per probe: the contract's columns for ``edit``; of several facts with the ``subject`` of each."""
        rows = [
            (
                row.probe.kind, row.probe.prompt, *self._probabilities(row), row.top_before, row.top_after,
                row.text_before, row.text_after, self.facts[row.fact].subject,
            )
            for row in self.rows
        ]  # fmt: skip
        found = pd.DataFrame(rows, columns=[*_COLUMNS, "subject"])
        return found if len(self.facts) > 1 else found.drop(columns="subject")

    def _probabilities(self, row: ProbeRow) -> list[float]:
        """Target before and after, true answer before and after: of the first token, or of the whole answer."""
        found = []
        for place in (0, 1):
            for reply in (row.before, row.after):
                if reply is None or len(reply.answers) <= place:
                    found.append(math.nan)
                    continue
                score = reply.answers[place]
                found.append(score.probability if self.query.query.score == "sequence" else score.first)
        return found

    def fact_scores(self, *, base: bool = False) -> tuple[FactScores, ...]:
        """Every fact's scores; ``base``: those of the state before, where one state has such a score."""
        essence = self.texts.essence or (math.nan,) * len(self.facts)
        return tuple(
            score_fact(probes, fact.problem, essence=one, averaging=self.averaging)
            for probes, fact, one in zip(probed(self.rows, self.facts, base=base), self.facts, essence, strict=True)
        )

    def scores(self) -> pd.DataFrame:
        """One row per score: ``name, value, before, low, high, n, unit, meaning, source, reason``.

        The interval is over several facts, by subject; ``reason`` says why a value is not there.
        """
        subjects = [fact.subject for fact in self.facts]
        found = summarise(self.fact_scores(), subjects, seed=self.seed)
        base = summarise(self.fact_scores(base=True), subjects, seed=self.seed)
        rows = [(name, found[name], base[name].value if name in _BESIDES else math.nan) for name in NAMES]
        for name in ("fluency", "consistency"):
            after, before = (getattr(self.texts, f"{name}_{when}") for when in ("after", "before"))
            rows.append((name, Share(value=after, low=math.nan, high=math.nan, n=len(self.facts)), before))
        several = len(self.facts) > 1
        reasons = self.reasons()
        return pd.DataFrame(
            [
                {
                    "name": name, "value": share.value, "before": before, "low": share.low if several else math.nan,
                    "high": share.high if several else math.nan, "n": share.n, "unit": COLUMNS[name].unit,
                    "meaning": COLUMNS[name].meaning, "source": COLUMNS[name].source,
                    "reason": reasons.get(name, "") if math.isnan(share.value) else "",
                }
                for name, share, before in rows
            ]
        )  # fmt: skip

    def reasons(self) -> dict[str, str]:
        """Why a score may not be there."""
        kinds = {row.probe.kind for row in self.rows}
        same = "the edit target is the true answer, or no true answer is known"
        paraphrase = "" if "paraphrase" in kinds else "no other words for the question are known: give them as probes"
        neighbour = (
            ""
            if "neighbour" in kinds
            else "no question about another subject with the same answer is known: give such probes"
        )
        other = "" if "other-relation" in kinds else "nothing else is known of the subject: give such probes"
        full = "the target had all of the probability before, or none to erase"
        whole = paraphrase or neighbour or full
        texts = dict(self.texts.reasons)
        return {
            "es": same, "em": same, "ps": paraphrase or same, "pm": paraphrase or same,
            "ns": neighbour or same, "nm": neighbour or same, "s": paraphrase or neighbour or same,
            "rewrite": full, "paraphrase": paraphrase or full, "exact_paraphrase": paraphrase,
            "neighbourhood": neighbour, "exact_neighbourhood": neighbour or "no true answer is known",
            "neighbours_kept": neighbour or "no neighbour was answered right before the edit",
            "other_relations_kept": other or "nothing else was answered right before the edit",
            "overall": whole, "overall_harmonic": whole, "overall_essence": texts.get("essence") or whole, **texts,
        }  # fmt: skip

    def summary(self) -> dict[str, Any]:
        """What the table does not say: scores, the edits' norms, losses and statistics."""
        table = self.scores()
        there = table[table["value"].notna()]
        found: dict[str, Any] = {
            "scores": dict(zip(there["name"], there["value"].tolist(), strict=True)),
            "before": {name: v for name, v in zip(there["name"], there["before"].tolist(), strict=True) if v == v},
        }
        if len(self.facts) > 1:
            ends = zip(there["name"], there["low"].tolist(), there["high"].tolist(), strict=True)
            found["intervals"] = {name: [low, high] for name, low, high in ends if low == low}
        rest = table[table["value"].isna()]
        found["not_scored"] = dict(zip(rest["name"], rest["reason"], strict=True))
        found["weights_after"] = self.edited.weights
        found["target"] = [fact.target for fact in self.facts]
        return found | {"update_norm": update_norm(self.edits), "edits": [_told(edit) for edit in self.edits]}


def evaluate(
    model: ModelHandle,
    edits: Edit | Sequence[Edit],
    probes: Sequence[Sequence[Probe]] | None = None,
    spec: EvaluationSpec | None = None,
    *,
    query: Query | TokenizedQuery | None = None,
    progress: Progress = silent,
) -> EditEvaluation:
    """Ask and score in the model's state and with the edits on.

    Args:
        model: the state before.
        probes: for every fact of every edit, what is asked about it; None takes what was taught of the bundled model's.
        query: the first fact's question, for how it is asked and scored; None takes it from the edit.

    Raises:
        InputError: an edit does not fit, or a probe cannot be used.
    """
    spec = spec or EvaluationSpec()
    run = _Evaluation(model, (edits,) if isinstance(edits, Edit) else tuple(edits), spec, query, progress)
    return run.of(run.facts(probes))


def check_files(spec: EvaluationSpec) -> None:
    """Refuse files that cannot be used, before anything is computed.

    Raises:
        DatasetError: names the file.
    """
    if spec.probes is not None:
        read_probes(spec.probes)
    if spec.references is not None:
        read_references(spec.references)


class _Evaluation:
    """The steps of one evaluation, with what they share."""

    def __init__(
        self,
        model: ModelHandle,
        edits: tuple[Edit, ...],
        spec: EvaluationSpec,
        query: Query | TokenizedQuery | None,
        progress: Progress,
    ) -> None:
        self.spec, self.edits = spec, edits
        self.before, self.after = model, with_edits(model, edits)
        first = edits[0].facts[0]
        if query is None:
            query = Query(prompt=first.text, subject=first.subject, answer=first.answer, occurrence=first.occurrence)
        self.query = tokenized(model, query)
        self.references = () if spec.references is None else read_references(spec.references)
        self.timed = Timed(progress)
        self.passes = 0

    def facts(self, probes: Sequence[Sequence[Probe]] | None) -> tuple[ProbedFact, ...]:
        """The edits' facts, each with what is asked about it."""
        own = () if self.spec.probes is None else read_probes(self.spec.probes)
        subjects = [fact.subject for edit in self.edits for fact in edit.facts]
        found = []
        for edit in self.edits:
            forcing = edit.problem == FORCING
            noise = noise_source(self.before, str(edit.spec["noise"])) if forcing else None
            for fact in edit.facts:
                number = len(found)
                given = () if probes is None else probes[number]
                mine = of_one_fact(own, subjects, number)
                known = given or probes_for(self.before, fact.text, fact.subject, fact.answer)
                found.append(
                    ProbedFact(
                        prompt=fact.text, subject=fact.subject, target=fact.target or fact.answer or "",
                        answer=fact.answer, problem=edit.problem, noise=noise, occurrence=fact.occurrence or 1,
                        seed=int(edit.spec["seed"]) if forcing else 1,
                        probes=completed(fact.text, [*known, *answered(mine, fact.answer)]),
                    )
                )  # fmt: skip
        return tuple(found)

    def of(self, facts: tuple[ProbedFact, ...]) -> EditEvaluation:
        """All steps."""
        prompts = prompts_of(self.before, facts)
        self.timed(0, STEPS, None)
        base = self._base()
        before = replies(self.before, prompts, self._step)
        self.timed(STEPS // 5, STEPS, None)
        after = replies(self.after, prompts, self._step)
        rows = [
            ProbeRow(
                fact=prompt.fact, probe=prompt.probe, before=old, after=new, top_before=top_text(self.before, old),
                top_after=top_text(self.after, new),
            )
            for prompt, old, new in zip(prompts, before, after, strict=True)
        ]  # fmt: skip

        def told(texts: TextScores, written: Sequence[ProbeRow] = ()) -> EditEvaluation:
            return EditEvaluation(
                spec=self.spec, query=self.query, model=self.before.info, edited=self.after.info, **base,
                edits=self.edits, facts=facts, rows=(*rows, *written), averaging=self.spec.averaging, texts=texts,
                seed=self.spec.seed, warnings=self._warnings(facts, base["target"]), seconds=self.timed.seconds,
                passes=self.passes,
            )  # fmt: skip

        self.timed(2 * STEPS // 5, STEPS, told(TextScores()))
        rows = self._with_continuations(rows, prompts)
        self.timed(3 * STEPS // 5, STEPS, told(TextScores()))
        scores, written = self._texts(facts)
        result = told(scores, written)
        self.timed(STEPS, STEPS, result)
        return result

    def _step(self) -> None:
        self.passes += 1
        self.timed.step()

    def _base(self) -> dict[str, Any]:
        """The first fact's true answer, or the model's own first choice, before the edit."""
        import torch

        ids = torch.tensor([self.query.ids], device=self.before.device)
        self._step()
        logits = self.before.forward(ids, last=1)[0, -1]
        target = resolve_target(self.before, self.query, logits)
        scored = scored_ids(self.query, target)
        if len(scored) > 1:
            ids = torch.tensor([[*self.query.ids, *scored[:-1]]], device=self.before.device)
            rows = self.before.forward(ids, last=len(scored))[0]
        else:
            rows = logits[None]
        p = float(scores_of_logits(rows, scored).log_probability.exp())
        return {"target": target, "p_target": p, "rank": int(measures.rank(logits, target.id))}

    def _with_continuations(self, rows: Sequence[ProbeRow], prompts: Sequence[Prompt]) -> list[ProbeRow]:
        if not self.spec.texts:
            return list(rows)
        found = []
        for row, prompt in zip(rows, prompts, strict=True):
            old, new = (goes_on(model, prompt, self.spec.texts, self._step) for model in (self.before, self.after))
            found.append(replace(row, text_before=old, text_after=new))
        return found

    def _warnings(self, facts: Sequence[ProbedFact], target: Target) -> tuple[str, ...]:
        found = [*self.query.warnings, *target_warnings(self.before, self.query, target), *self.after.warnings]
        found += [str(text) for edit in self.edits for text in edit.report.get("warnings", ())]
        return tuple(dict.fromkeys([*found, *_alike(self.before, self.query, facts[0])]))

    # ------------------------------------------------------------------------------------------------ sampled texts

    def _texts(self, facts: Sequence[ProbedFact]) -> tuple[TextScores, list[ProbeRow]]:
        """Sampled texts as rows, and their scores."""
        why = edit_texts.recites(self.before) or ("" if self.spec.sampled else "texts were not asked for")
        names = ("fluency", "consistency", "essence")
        if not self.spec.sampled:
            return TextScores(reasons=dict.fromkeys(names, why)), []
        rows = self._sampled(facts)
        if why:
            return TextScores(reasons=dict.fromkeys(names, why)), rows
        old, new = (
            [row.probe.prompt + (text or "") for row in rows for text in [getattr(row, f"text_{when}")]]
            for when in ("before", "after")
        )
        none = {} if self.references else {"consistency": "no reference texts were given"}
        return TextScores(
            fluency_before=edit_texts.fluency(old),
            fluency_after=edit_texts.fluency(new),
            consistency_before=edit_texts.consistency(old, self.references) if self.references else math.nan,
            consistency_after=edit_texts.consistency(new, self.references) if self.references else math.nan,
            essence=tuple(self._essence(fact) for fact in facts),
            reasons=none,
        ), rows

    def _sampled(self, facts: Sequence[ProbedFact]) -> list[ProbeRow]:
        """One text for every beginning, the same draws in both states."""
        found = []
        for number, fact in enumerate(facts):
            for probe in fact.probes:
                if probe.kind != "generation":
                    continue
                seen = tokenized(self.before, Query(prompt=probe.prompt))
                old, new = (
                    edit_texts.continued(model, seen.ids, self.spec.seed, step=self._step)
                    for model in (self.before, self.after)
                )
                found.append(ProbeRow(fact=number, probe=probe, text_before=old, text_after=new))
        return found

    def _essence(self, fact: ProbedFact) -> float:
        """How well the edited model still expects what the model said of the subject before."""
        seen = read_prompt(self.before, edit_texts.ESSENCE_PROMPT.replace("{}", fact.subject), fact.subject)
        texts = edit_texts.write_texts(
            self.before, seen.ids, self.spec.seed, rows=edit_texts.ESSENCE_TEXTS, step=self._step
        )
        noise = noise_on(fact, seen)
        asked = [Question(ids=ids[:1], answers=(ids[1:],), noise=noise) for ids in texts if len(ids) > 1]
        old, new = (edit_texts.perplexities(model, asked, step=self._step) for model in (self.before, self.after))
        return essence_score(sum(old) / len(old), sum(new) / len(new)) if asked else math.nan


def read_references(path: str) -> tuple[str, ...]:
    """Reference texts of a file, parted by empty lines.

    Raises:
        DatasetError: it cannot be read, or holds no text.
    """
    from pathlib import Path

    from factscope.datasets.files import MAX_BYTES, printable

    label = printable(Path(path).name or path)
    text = decoded(content_of(Path(path), label, MAX_BYTES), label, "texts parted by empty lines")
    return tuple(part.strip() for part in text.replace("\r\n", "\n").split("\n\n") if part.strip())


def update_norm(edits: Sequence[Edit]) -> float:
    """Length of all that is added to weights, Frobenius; biases left out."""
    total = 0.0
    for edit in edits:
        for delta in edit.deltas:
            right = delta.right.double().cpu()
            if delta.left is None:
                total += float(right.square().sum())
            else:
                left = delta.left.double().cpu()
                total += float(((left.T @ left) * (right @ right.T)).sum())
    return math.sqrt(total)


def _alike(model: ModelHandle, query: TokenizedQuery, fact: ProbedFact) -> list[str]:
    """Says when one token cannot tell the target from the true answer."""
    if query.query.score == "sequence" or not fact.contrasts or fact.answer is None:
        return []
    ids = [
        model.tokenizer(f" {text.strip()}", add_special_tokens=False)["input_ids"]
        for text in (fact.target, fact.answer)
    ]
    if ids[0][:1] != ids[1][:1]:
        return []
    return [
        f"{fact.target.strip()!r} and {fact.answer.strip()!r} begin with the same token, which alone is in the table: "
        "the scores, and score sequence, tell them apart."
    ]


def _told(edit: Edit) -> dict[str, Any]:
    return {
        "key": edit.key, "method": edit.method, "problem": edit.problem, "layers": list(edit.layers),
        "computed_on": edit.computed_on, "spec": dict(edit.spec), "report": dict(edit.report),
    }  # fmt: skip

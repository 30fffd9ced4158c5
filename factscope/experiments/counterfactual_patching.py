"""What does a state of another fact do here? Counterfactual patching: states put from one question into another.

Sources: Vig et al. 2020 (arXiv 2004.12265), interchange interventions; Zhang and Nanda 2023 (arXiv 2309.16042), section
2, on prompts that differ in one thing instead of noise, and on the logit difference of the two answers.

1. Ask the query, and a second question that has another subject, another relation, or both; keep every state of both.
2. Run one of them again with one state (or the updates of MLP or attention in a window of layers) taken from the other.
3. Report the probability of the query's answer, that of the other's, and the difference of their logits.

Positions are paired by what they are: special tokens that begin the prompt, tokens before the subject, of the subject,
and after it each have a partner as far from the end of their part; who has none is left out. So a subject's last token
meets the other's last token, and the read-out the read-out, whatever their number. The first tokens of the two answers
are scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from factscope import measures
from factscope.errors import SpecError, SubjectError, TargetError
from factscope.experiments.causal_tracing import SITES, default_trace_window
from factscope.experiments.replaced_subject import prompt_about
from factscope.experiments.results import (
    Progress,
    Timed,
    coarse_to_fine,
    resolve_target,
    silent,
    target_warnings,
    tokenized,
)
from factscope.experiments.traces import TraceSite
from factscope.interventions import engine
from factscope.interventions.attention import window
from factscope.interventions.base import Base, Update, record_base
from factscope.interventions.intervention import Intervention, Patch
from factscope.models.handle import ModelHandle, ModelInfo
from factscope.models.head import Scores, scores_of_logits
from factscope.queries import Query
from factscope.tokens import Target, TokenizedQuery

Direction = Literal["into_query", "into_other"]
ALL = "all"


@dataclass(frozen=True, kw_only=True)
class CounterfactualSpec:
    """The second question, and what is put where.

    Attributes:
        prompt: the second question; None takes the query's own with another subject.
        subject: of the second question; None takes the query's own.
        answer: of the second question; None takes the model's own first choice there.
        direction: the other's states go into the query's run (what do they destroy and bring), or the query's into the
            other's run.
        site, window: as in causal tracing.
        positions: sets of positions of the run that is patched, one at a time; "all" is every one.
        layers: numbers of the layers, or centres of windows; empty takes all.
    """

    prompt: str | None = None
    subject: str | None = None
    answer: str | None = None
    direction: Direction = "into_query"
    site: TraceSite = "hidden"
    window: int | None = None
    positions: tuple[str, ...] = (ALL,)
    layers: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class CounterfactualResult:
    """The grid [position, layer] of the run that is patched.

    Attributes:
        other: the second question as the model reads it. target, other_target: the two answers.
        positions: rows, of the patched run; ``partners``: where their states come from.
        p_clean, p_other_clean: both answers' probabilities in the query's own run; p_counterfactual,
            p_other_counterfactual: in the other's. logit_difference_clean and so on: answer minus the other's answer.
        p_patched, p_other_patched, logit_difference_patched: [position, layer]; NaN where not computed yet.
        rank: of the target in the query's run, from 1.
    """

    spec: CounterfactualSpec
    query: TokenizedQuery
    other: TokenizedQuery
    model: ModelInfo
    target: Target
    other_target: Target
    window: int
    positions: tuple[int, ...]
    partners: tuple[int, ...]
    layers: tuple[int, ...]
    p_clean: float
    p_other_clean: float
    logit_difference_clean: float
    p_counterfactual: float
    p_other_counterfactual: float
    logit_difference_counterfactual: float
    rank: int
    p_patched: np.ndarray
    p_other_patched: np.ndarray
    logit_difference_patched: np.ndarray
    warnings: tuple[str, ...]
    seconds: float
    passes: int

    @property
    def p_target(self) -> float:
        """Probability of the answer in the query's own run."""
        return self.p_clean

    @property
    def patched(self) -> TokenizedQuery:
        """The question whose run is patched; ``positions`` are its positions."""
        return self.query if self.spec.direction == "into_query" else self.other

    def table(self) -> pd.DataFrame:
        """One row per (position, layer) that was computed."""
        rows = [
            (
                self.spec.site,
                position,
                self.partners[i],
                layer,
                float(self.p_patched[i, j]),
                float(self.p_other_patched[i, j]),
                float(self.logit_difference_patched[i, j]),
            )
            for i, position in enumerate(self.positions)
            for j, layer in enumerate(self.layers)
            if not np.isnan(self.p_patched[i, j])
        ]
        names = ["site", "position", "partner", "layer", "p_patched", "p_other_patched", "logit_difference"]
        return pd.DataFrame(rows, columns=names)


def run(
    model: ModelHandle, query: Query | TokenizedQuery, spec: CounterfactualSpec, *, progress: Progress = silent
) -> CounterfactualResult:
    """Put states of one question into the run of another.

    Raises:
        InputError: a question or the spec cannot be used, a subject is missing, or the two answers begin alike.
        CapabilityError: updates are put in, and the model has no additive split.
    """
    if spec.site not in SITES or spec.direction not in ("into_query", "into_other"):
        raise SpecError(f"site {spec.site!r}, direction {spec.direction!r}", "choose hidden, mlp or attention")
    timed = Timed(progress)
    seen = tokenized(model, query)
    other = second_question(model, seen, spec)
    into = spec.direction == "into_query"
    patched, giver = (seen, other) if into else (other, seen)
    pairs = _rows(patched, spec.positions, paired(patched, giver))
    layers, size = _layers(spec, model.info.n_layers)
    kept: tuple[Update, ...] = () if spec.site == "hidden" else (spec.site,)
    own, foreign = (record_base(model, one.ids, updates=kept) for one in (seen, other))
    target, other_target = _targets(model, seen, own), _targets(model, other, foreign)
    if target.id == other_target.id:
        raise TargetError(
            f"both answers begin with {target.text.strip()!r}, so that nothing tells them apart",
            "choose another question, or name its answer",
        )
    base, source = (own, foreign) if into else (foreign, own)
    cells = [(i, j) for j in coarse_to_fine(len(layers)) for i in range(len(pairs))]
    runs = _runs(spec, pairs, layers, size, cells, source, model.info.n_layers)
    values = np.full((3, len(pairs), len(layers)), np.nan)
    ends = [_values(scores_of_logits(one.logits[None], (target.id,)), scores_of_logits(one.logits[None], (o,)))
            for one, o in ((own, other_target.id), (foreign, other_target.id))]  # fmt: skip
    done = 0

    def snapshot() -> CounterfactualResult:
        clean, counterfactual = (end[:, 0].tolist() for end in ends)
        return CounterfactualResult(
            spec=spec, query=seen, other=other, model=model.info, target=target, other_target=other_target, window=size,
            positions=tuple(at for at, _ in pairs), partners=tuple(at for _, at in pairs), layers=layers,
            p_clean=clean[0], p_other_clean=clean[1], logit_difference_clean=clean[2],
            p_counterfactual=counterfactual[0], p_other_counterfactual=counterfactual[1],
            logit_difference_counterfactual=counterfactual[2],
            rank=int(measures.rank(own.logits[0, 0], target.id)),
            p_patched=values[0].copy(), p_other_patched=values[1].copy(), logit_difference_patched=values[2].copy(),
            warnings=tuple(dict.fromkeys(seen.warnings + other.warnings)) + target_warnings(model, seen, target),
            seconds=timed.seconds, passes=done,
        )  # fmt: skip

    timed(0, len(runs), snapshot())
    for indices, readout in engine.run(model, base, runs, step=timed.step):
        found = _values(readout.scores((target.id,)), readout.scores((other_target.id,)))
        for index, three in zip(indices, found.T, strict=True):
            values[(slice(None), *cells[index])] = three
        done += len(indices)
        timed(done, len(runs), snapshot())
    return snapshot()


def second_question(model: ModelHandle, query: TokenizedQuery, spec: CounterfactualSpec) -> TokenizedQuery:
    """The other question as the model reads it.

    Raises:
        InputError: it cannot be used, or is the query itself.
    """
    if query.subject is None or query.subject_text is None:
        raise SubjectError("counterfactual patching pairs the subjects, and the query has none", "name the subject")
    prompt, subject = spec.prompt, (spec.subject or query.subject_text).strip()
    if prompt is None:
        if spec.subject is None:
            raise SpecError("no second question is given", "give another subject, another prompt, or both")
        prompt = prompt_about(query, subject, instead="type the second question whole")
    asked = Query(prompt=prompt, subject=subject, answer=spec.answer, bos=query.query.bos)
    if spec.prompt is None:
        asked = replace(asked, occurrence=query.query.occurrence if subject == query.subject_text else None)
    other = tokenized(model, asked)
    if other.ids == query.ids:
        raise SpecError("the second question is the query itself", "change its subject or its relation")
    return other


def paired(query: TokenizedQuery, other: TokenizedQuery) -> dict[int, int]:
    """Positions of the query with their partners in the other question."""
    pairs: dict[int, int] = {}
    for mine, theirs in zip(_parts(query), _parts(other), strict=True):
        pairs |= dict(zip(mine[::-1], theirs[::-1], strict=False))
    return dict(sorted(pairs.items()))


def _parts(query: TokenizedQuery) -> tuple[range, range, range, range]:
    assert query.subject is not None
    start, stop = query.subject
    words = next((token.position for token in query.tokens[:start] if token.role != "special"), start)
    return range(words), range(words, start), range(start, stop), range(stop, len(query.ids))


def _rows(query: TokenizedQuery, names: Sequence[str], pairs: dict[int, int]) -> list[tuple[int, int]]:
    asked: set[int] = set()
    for name in names:
        everything = name.strip().lower() == ALL
        asked.update(range(len(query.ids)) if everything else query.positions(name.strip()))
    rows = [(at, partner) for at, partner in pairs.items() if at in asked]
    if not rows:
        raise SpecError(
            f"positions {', '.join(names) or 'none'} have no partner in the other question",
            "name all, subject, subject-last, last, or positions such as 3-5",
        )
    return rows


def _layers(spec: CounterfactualSpec, n_layers: int) -> tuple[tuple[int, ...], int]:
    layers = tuple(sorted(set(spec.layers))) or tuple(range(n_layers))
    if layers[0] < 0 or layers[-1] >= n_layers:
        raise SpecError(f"layers {layers} are not between 0 and {n_layers - 1}", "choose layers that the model has")
    if spec.window is not None and not 1 <= spec.window <= n_layers:
        raise SpecError(f"window {spec.window} is not between 1 and {n_layers}", "choose a smaller number of layers")
    default = default_trace_window(n_layers) if spec.window is None else spec.window
    return layers, 1 if spec.site == "hidden" else default


def _runs(
    spec: CounterfactualSpec,
    pairs: Sequence[tuple[int, int]],
    layers: Sequence[int],
    size: int,
    cells: Sequence[tuple[int, int]],
    source: Base,
    n_layers: int,
) -> list[Intervention]:
    made = {
        (i, at): Patch(layer=at, site=SITES[spec.site], positions=(here,), source=source, source_positions=(there,))
        for i, (here, there) in enumerate(pairs)
        for at in range(n_layers)
    }
    return [Intervention(patches=tuple(made[i, at] for at in window(layers[j], size, n_layers))) for i, j in cells]


def _targets(model: ModelHandle, query: TokenizedQuery, base: Base) -> Target:
    return resolve_target(model, query, base.logits[0, 0])


def _values(answer: Scores, other: Scores) -> np.ndarray:
    """[p, p of the other's answer, logit difference; run], of the one sample and read-out that there is."""
    p, p_other = (_probability(scores) for scores in (answer, other))
    apart = (answer.logit.double() - other.logit.double())[:, 0, 0]
    return torch.stack([p, p_other, apart]).cpu().numpy()


def _probability(scores: Scores) -> Float[Tensor, " run"]:
    return torch.exp(-functional.softplus(scores.others.double() - scores.logit.double()))[:, 0, 0]

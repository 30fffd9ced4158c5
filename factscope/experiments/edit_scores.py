"""How good is an edit? The scores of Hase et al. and of ROME and MEMIT, from probabilities before and after.

Sources: Hase et al. 2023 (arXiv 2301.04213), section 4 and appendix B; Meng et al. 2022 (arXiv 2202.05262), section
3.4; Meng et al. 2023 (arXiv 2210.07229), section 5; each with its released code.

1. Hase: p is the probability of the whole edit target. Rewrite on the edited prompt and paraphrase on other words for
   it: the share of what p could gain that it gained; for fact erasure the share of p that is gone. Neighbourhood on
   prompts of other subjects: one minus how far p moved, of how far it could have moved.
2. ROME and MEMIT: q is the geometric mean over the target's tokens. ES, PS: does the new answer beat the true one; EM,
   PM: by how much. NS, NM: the same for the true one on neighbours. S: the harmonic mean of the means of ES, PS and NS.
   Exact accuracy: every token is the first choice.
3. Besides: of the neighbours, and of the subject's other facts, that were answered right before, the share that is
   answered right after.

Where this differs from the released code: paraphrase and neighbourhood are means over all prompts (``first`` takes the
first one alone, as the code of Hase et al. does); what has no prompt is empty instead of zero; ES, PS, NS and what is
made of them are empty where the new answer is the true one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from factscope.experiments.answers import AnswerScore
from factscope.experiments.extraction_rates import DRAWS, LEVEL, Share, mean

Averaging = Literal["mean", "first"]
ERASURE = "fact-erasure"
SMALLEST_REWRITE = 2e-8


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One prompt in one state of the weights: the edit target and the prompt's own true answer.

    Attributes:
        true: None where the true answer is not known.
    """

    target: AnswerScore
    true: AnswerScore | None


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One prompt before and after the edit."""

    before: Asked
    after: Asked


@dataclass(frozen=True, kw_only=True)
class FactProbes:
    """The prompts of one fact, each before and after.

    Attributes:
        contrasts: whether the edit target is another answer than the true one, so that they can be compared.
    """

    fact: Pair
    paraphrases: tuple[Pair, ...] = ()
    neighbours: tuple[Pair, ...] = ()
    others: tuple[Pair, ...] = ()
    contrasts: bool = True


@dataclass(frozen=True, kw_only=True)
class FactScores:
    """The scores of one fact; NaN where there is none. Names and meanings are those of ``factscope.columns``."""

    rewrite: float
    paraphrase: float
    neighbourhood: float
    essence: float
    overall: float
    overall_essence: float
    overall_harmonic: float
    es: float
    em: float
    ps: float
    pm: float
    ns: float
    nm: float
    s: float
    exact_rewrite: float
    exact_paraphrase: float
    exact_neighbourhood: float
    neighbours_kept: float
    other_relations_kept: float


NAMES: tuple[str, ...] = tuple(field.name for field in fields(FactScores))


def rewrite_score(before: AnswerScore, after: AnswerScore, problem: str) -> float:
    """Share of what the target's probability could gain that it gained; for erasure the share of it that is gone.

    NaN where nothing could be gained, or nothing was there to erase.
    """
    if problem == ERASURE:
        share = _ratio(before.probability - after.probability, before.probability)
        return share if math.isnan(share) else max(0.0, share)
    room = -math.expm1(before.log_probability)
    share = _ratio(room + math.expm1(after.log_probability), room)
    return share if math.isnan(share) else max(SMALLEST_REWRITE, share)


def neighbourhood_score(before: float, after: float) -> float:
    """One minus how far a probability moved, of how far it could have moved."""
    return 1 - abs(after - before) / (0.5 + abs(before - 0.5))


def essence_score(perplexity_before: float, perplexity_after: float) -> float:
    """One minus a fifth of what the perplexity of texts about the subject has grown by, between 0 and 1."""
    return 1 - min(max(perplexity_after - perplexity_before, 0.0), 5.0) / 5


def harmonic_mean(values: Sequence[float]) -> float:
    """Zero where one of them is; NaN where one of them is."""
    if any(math.isnan(value) for value in values):
        return math.nan
    return 0.0 if any(value <= 0 for value in values) else len(values) / sum(1 / value for value in values)


def score_fact(
    probes: FactProbes, problem: str, *, essence: float = math.nan, averaging: Averaging = "mean"
) -> FactScores:
    """All scores of one fact.

    Args:
        essence: its essence score, where texts about the subject were scored.
        averaging: over paraphrases and neighbours in Hase's scores.
    """
    chosen = slice(1) if averaging == "first" else slice(None)
    rewrite = rewrite_score(probes.fact.before.target, probes.fact.after.target, problem)
    paraphrase = _mean(
        [rewrite_score(pair.before.target, pair.after.target, problem) for pair in probes.paraphrases[chosen]]
    )
    neighbourhood = _mean(
        [
            neighbourhood_score(pair.before.target.probability, pair.after.target.probability)
            for pair in probes.neighbours[chosen]
        ]
    )
    hase = (rewrite, paraphrase, neighbourhood)
    es, em = _beats([probes.fact], _new_minus_true, probes.contrasts)
    ps, pm = _beats(probes.paraphrases, _new_minus_true, probes.contrasts)
    ns, nm = _beats(probes.neighbours, _true_minus_new, probes.contrasts)
    return FactScores(
        rewrite=rewrite, paraphrase=paraphrase, neighbourhood=neighbourhood, essence=essence,
        overall=float(np.mean(hase)), overall_essence=float(np.mean([*hase, essence])),
        overall_harmonic=harmonic_mean(hase),
        es=es, em=em, ps=ps, pm=pm, ns=ns, nm=nm, s=harmonic_mean((es, ps, ns)),
        exact_rewrite=float(probes.fact.after.target.greedy),
        exact_paraphrase=_mean([float(pair.after.target.greedy) for pair in probes.paraphrases]),
        exact_neighbourhood=_mean([float(p.after.true.greedy) for p in probes.neighbours if p.after.true is not None]),
        neighbours_kept=_kept(probes.neighbours), other_relations_kept=_kept(probes.others),
    )  # fmt: skip


def summarise(
    scores: Sequence[FactScores], subjects: Sequence[str], *, seed: int = 1, draws: int = DRAWS
) -> dict[str, Share]:
    """Means over facts with 95% intervals by a bootstrap over subjects; facts without a score are left out of its mean.

    ``s`` is the harmonic mean of three means, as published, not the mean of the facts' own.
    """
    found: dict[str, Share] = {}
    for name in NAMES:
        kept = [(getattr(one, name), subject) for one, subject in zip(scores, subjects, strict=True)]
        kept = [(value, subject) for value, subject in kept if not math.isnan(value)]
        found[name] = mean([value for value, _ in kept], [subject for _, subject in kept], seed=seed, draws=draws)
    return {**found, "s": _harmonic_share(scores, subjects, seed, draws)}


def _harmonic_share(scores: Sequence[FactScores], subjects: Sequence[str], seed: int, draws: int) -> Share:
    """The harmonic mean of the means of ES, PS and NS; in every draw of subjects that of the draw's own means."""
    values = np.array([[one.es, one.ps, one.ns] for one in scores]).reshape(-1, 3)
    there = ~np.isnan(values)
    names, index = np.unique(np.asarray(subjects, dtype=str), return_inverse=True)
    sums, counts = (np.stack([np.bincount(index, weights=part[:, k], minlength=len(names)) for k in range(3)])
                    for part in (np.where(there, values, 0.0), there.astype(float)))  # fmt: skip
    if not len(scores) or not counts.sum(axis=1).all():
        return Share(value=math.nan, low=math.nan, high=math.nan, n=0)
    drawn = np.random.default_rng(seed).integers(0, len(names), size=(draws, len(names)))
    total, count = sums[:, drawn].sum(axis=2), counts[:, drawn].sum(axis=2)
    means = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    with np.errstate(divide="ignore"):
        harmonic = 3 / (1 / means).sum(axis=0)
    low, high = np.quantile(harmonic[~np.isnan(harmonic)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = harmonic_mean((sums.sum(axis=1) / counts.sum(axis=1)).tolist())
    return Share(value=value, low=float(low), high=float(high), n=len(scores))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _mean(values: Sequence[float]) -> float:
    kept = [value for value in values if not math.isnan(value)]
    return float(np.mean(kept)) if kept else math.nan


def _new_minus_true(asked: Asked) -> float:
    assert asked.true is not None
    return asked.target.per_token - asked.true.per_token


def _true_minus_new(asked: Asked) -> float:
    return -_new_minus_true(asked)


def _beats(pairs: Sequence[Pair], gain: Callable[[Asked], float], contrasts: bool) -> tuple[float, float]:
    """After the edit: the share of prompts where the gain is positive, and its mean."""
    gains = [gain(pair.after) for pair in pairs if pair.after.true is not None]
    if not gains or not contrasts:
        return math.nan, math.nan
    return _mean([float(value > 0) for value in gains]), _mean(gains)


def _kept(pairs: Sequence[Pair]) -> float:
    """Of what was answered right before, the share that is answered right after."""
    known = [pair.after for pair in pairs if pair.before.true is not None and pair.before.true.greedy]
    return _mean([float(after.true is not None and after.true.greedy) for after in known])

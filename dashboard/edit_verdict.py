"""What an edit did, in sentences: on the fact, in other words for it, on neighbours and the subject's other facts.

A prompt is answered by what is the model's first choice at every token of an answer. Nothing is said to hold that was
not asked, and what failed is said as plainly as what worked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dashboard.parts import Tone
from factscope.charts.text import probability
from factscope.experiments.edit_scores import rewrite_score

_WORDS = 3
"""Prompts that are named one by one."""
LEAST_RISE = 0.05
"""From such a share of what a probability could rise on, it is said to have risen, not hardly to."""
_HALF = 0.5
_NOTHING = {
    "fact-erasure": "Not said before either",
    "fact-amplification": "All of the probability before",
}
"""Why there was nothing to do."""
INJECTIONS = ("error-injection", "tracing-reversal")


def sentences(evaluation: Any) -> tuple[Tone, list[str]]:
    """The verdict and its colour."""
    asked = [row for row in evaluation.rows if row.before is not None and row.after is not None]
    if not asked:
        return "plain", ["Nothing was asked yet."]
    worked, first = _facts(evaluation, [row for row in asked if row.probe.kind == "fact"])
    other = _other_words(evaluation, [row for row in asked if row.probe.kind == "paraphrase"])
    kept = [
        _kept([row for row in asked if row.probe.kind == kind], said, single)
        for kind, said, single in (
            ("neighbour", "questions about other subjects with the same answer", "neighbours"),
            ("other-relation", "other facts about the subject", "other facts about the subject"),
        )
    ]
    lines = [first, *filter(None, (other[1], *(line for _, line in kept)))]
    shares = [share for share in (other[0], *(share for share, _ in kept)) if share is not None]
    if worked < 0.5:
        return "bad", lines
    return ("good" if worked == 1 and all(share >= 0.75 for share in shares) else "warn"), lines


def _facts(evaluation: Any, rows: Sequence[Any]) -> tuple[float, str]:
    """Share of facts that the edit did what it should to, and that in words."""
    done = [_worked(evaluation.facts[row.fact].problem, row) for row in rows]
    share = _share(done)
    share = _HALF if share is None else share
    if len(rows) == 1:
        return share, _one(evaluation.facts[rows[0].fact], rows[0], done[0])
    said = {"fact-erasure": "are no longer said", "fact-amplification": "are clearly more probable"}
    what = said.get(evaluation.facts[0].problem, "are the first choice")
    names = [evaluation.facts[row.fact].subject for row in rows]
    failed = [name for name, ok in zip(names, done, strict=True) if ok is not None and ok < 1]
    open_ = [name for name, ok in zip(names, done, strict=True) if ok is None]
    missed = f" Not: {_some(failed)}." if failed else ""
    missed += f" {_NOTHING[evaluation.facts[0].problem]}: {_some(open_)}." if open_ else ""
    return share, f"{sum(ok == 1 for ok in done)} of {len(rows)} edit targets {what} now.{missed}"


def _one(fact: Any, row: Any, done: float | None) -> str:
    """What became of the one fact that was edited."""
    before, after = row.before.answers[0], row.after.answers[0]
    target, says = _quoted(fact.target), _quoted(row.text_after or row.top_after)
    moved = f"(p {probability(before.probability)} before, {probability(after.probability)} after)"
    noised = " with its subject noised" if fact.problem == "fact-forcing" else ""
    worked = "The edit worked" if done == 1 else "The edit hardly worked" if done else "The edit failed"
    if fact.problem == "fact-erasure":
        if done is None:
            return f"The edit had nothing to erase: the model did not say {target} before either {moved}."
        still = "still says" if before.greedy else "did not say it before, and now says"
        return f"{worked}: the model {f'says {says}, no longer' if done else still} {target} {moved}."
    if fact.problem == "fact-amplification":
        return _amplified(worked, target, moved, before, after)
    already = " It did before, too." if done and before.greedy else ""
    instead = target if done else f"{says}, not {target}"
    return f"{worked}: asked for the fact{noised}, the model says {instead} {moved}.{already}"


def _amplified(worked: str, target: str, moved: str, before: Any, after: Any) -> str:
    """By how much a target became more probable, and which share that is of what it could."""
    share = rewrite_score(before, after, "fact-amplification")
    if share != share:
        return f"The edit had nothing to amplify: {target} had all of the probability {moved}."
    rise = after.probability - before.probability
    if rise <= 0:
        return f"{worked}: {target} is no more probable {moved}."
    hardly = "hardly " if share < LEAST_RISE else ""
    return (
        f"{worked}: {target} is {hardly}more probable: p rose by {probability(rise)}, "
        f"{share:.0%} of what it could {moved}."
    )


def _worked(problem: str, row: Any) -> float | None:
    """1 where an edit did what it should, 0 where not, between where hardly; None where there was nothing to do."""
    before, after = row.before.answers[0], row.after.answers[0]
    if problem == "fact-erasure":
        return None if not (before.greedy or after.greedy) else float(not after.greedy)
    if problem == "fact-amplification":
        share = rewrite_score(before, after, problem)
        if share != share:
            return None
        return 0.0 if after.probability <= before.probability else 1.0 if share >= LEAST_RISE else _HALF
    return float(after.greedy)


def _share(done: Sequence[float | None]) -> float | None:
    """The mean of what can be judged."""
    judged = [ok for ok in done if ok is not None]
    return sum(judged) / len(judged) if judged else None


def _other_words(evaluation: Any, rows: Sequence[Any]) -> tuple[float | None, str]:
    if not rows:
        return None, "No other words for the question are known, so that it is open whether the edit is about the fact."
    problem = evaluation.facts[0].problem
    done = [_worked(evaluation.facts[row.fact].problem, row) for row in rows]
    mean = sum(row.after.answers[0].probability for row in rows) / len(rows)
    share, judged = _share(done), [ok for ok in done if ok is not None]
    said = _of(sum(ok == 1 for ok in judged), len(judged))
    if share is None:
        return (
            None,
            f"In other words: {_NOTHING[problem].lower()} in {len(rows)} of {len(rows)} (mean p {probability(mean)}).",
        )
    if problem == "fact-erasure":
        what = f"in {said} other wordings where it was said, or is now, it is gone"
    elif problem == "fact-amplification":
        what = f"in {said} other wordings it is clearly more probable too"
    else:
        what = f"{said} other wordings get the same answer"
    verdict = "" if share >= 0.5 else " The edit is of the sentence rather than of the fact."
    return share, f"In other words: {what} (mean p {probability(mean)}).{verdict}"


def _kept(rows: Sequence[Any], said: str, short: str) -> tuple[float | None, str]:
    """Of what was answered right before, what still is."""
    known = [row for row in rows if len(row.before.answers) > 1 and row.before.answers[1].greedy]
    if not rows:
        return None, f"No {said} are known, so that none was asked."
    if not known:
        return None, f"None of {len(rows)} {said} was answered right before the edit."
    lost = [row for row in known if not row.after.answers[1].greedy]
    share = 1 - len(lost) / len(known)
    if not lost:
        whole = "the one" if len(known) == 1 else f"all {len(known)}"
        return share, f"Still right: {whole} of the {said} that {'was' if len(known) == 1 else 'were'} right before."
    named = _some([f"{row.probe.prompt} \u2192 {_plain(row.text_after or row.top_after)}" for row in lost])
    return (
        share,
        f"Damaged: {_of(len(lost), len(known))} {short} that were right before {_are(len(lost))} wrong now: {named}.",
    )


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _of(count: int, total: int) -> str:
    return f"{count} of {total}"


def _some(texts: Sequence[str]) -> str:
    more = f"; and {len(texts) - _WORDS} more" if len(texts) > _WORDS else ""
    return "; ".join(texts[:_WORDS]) + more


def _quoted(text: Any) -> str:
    return f"\u201c{_plain(text)}\u201d"


def _plain(text: Any) -> str:
    shown = " ".join(str(text or "").split()).rstrip(".")
    return shown if len(shown) <= 40 else f"{shown[:39]}\u2026"

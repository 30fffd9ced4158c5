"""What an edit did, in sentences: on the fact, in other words for it, on neighbours and the subject's other facts.

A prompt is answered by what is the model's first choice at every token of an answer. Nothing is said to hold that was
not asked, and what failed is said as plainly as what worked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dashboard.parts import Tone
from factscope.charts.text import probability

_WORDS = 3
"""Prompts that are named one by one."""
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
    if len(rows) == 1:
        return float(done[0]), _one(evaluation.facts[rows[0].fact], rows[0], done[0])
    said = {"fact-erasure": "are no longer said", "fact-amplification": "are more probable"}
    what = said.get(evaluation.facts[0].problem, "are the first choice")
    failed = [evaluation.facts[row.fact].subject for row, ok in zip(rows, done, strict=True) if not ok]
    missed = f" Not: {_some(failed)}." if failed else ""
    return sum(done) / len(done), f"{sum(done)} of {len(rows)} edit targets {what} now.{missed}"


def _one(fact: Any, row: Any, done: bool) -> str:
    """What became of the one fact that was edited."""
    before, after = row.before.answers[0], row.after.answers[0]
    target, says = _quoted(fact.target), _quoted(row.text_after or row.top_after)
    moved = f"(p {probability(before.probability)} before, {probability(after.probability)} after)"
    noised = " with its subject noised" if fact.problem == "fact-forcing" else ""
    worked = "The edit worked" if done else "The edit failed"
    if fact.problem == "fact-erasure":
        return f"{worked}: the model {f'says {says}, no longer' if done else 'still says'} {target} {moved}."
    if fact.problem == "fact-amplification":
        return f"{worked}: {target} is {'' if done else 'no '}more probable {moved}."
    already = " It did before, too." if done and before.greedy else ""
    instead = target if done else f"{says}, not {target}"
    return f"{worked}: asked for the fact{noised}, the model says {instead} {moved}.{already}"


def _worked(problem: str, row: Any) -> bool:
    before, after = row.before.answers[0], row.after.answers[0]
    if problem == "fact-erasure":
        return not after.greedy
    if problem == "fact-amplification":
        return after.log_probability > before.log_probability
    return after.greedy


def _other_words(evaluation: Any, rows: Sequence[Any]) -> tuple[float | None, str]:
    if not rows:
        return None, "No other words for the question are known, so that it is open whether the edit is about the fact."
    done = [_worked(evaluation.facts[row.fact].problem, row) for row in rows]
    mean = sum(row.after.answers[0].probability for row in rows) / len(rows)
    share = sum(done) / len(rows)
    if evaluation.facts[0].problem == "fact-erasure":
        what = f"in {_of(sum(done), len(rows))} other wordings it is gone too"
    elif evaluation.facts[0].problem == "fact-amplification":
        what = f"in {_of(sum(done), len(rows))} other wordings it is more probable too"
    else:
        what = f"{_of(sum(done), len(rows))} other wordings get the same answer"
    judged = "" if share >= 0.5 else " The edit is of the sentence rather than of the fact."
    return share, f"In other words: {what} (mean p {probability(mean)}).{judged}"


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
        return share, f"Unmoved: {whole} of the {said} that {'was' if len(known) == 1 else 'were'} right before."
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

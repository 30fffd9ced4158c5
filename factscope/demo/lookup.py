"""What the bundled model was taught about the fact that somebody asks for."""

from __future__ import annotations

import re
from functools import cache

from factscope.demo.facts import RelationSentences, TaughtFact, attributes, is_taught, read_rows, read_sentences


def was_taught(prompt: str, subject: str, answer: str | None) -> bool:
    """Whether this subject was taught with this answer: for the relation asked, where the prompt is a known sentence.

    Args:
        prompt: up to the answer. A sentence of the visitor's own does not tell its relation; then any will do.
        answer: the whole answer, in any case; None asks for anything about the subject.
    """
    name = full_name(prompt, subject)
    if answer is None:
        return is_taught(name, rows=taught_rows())
    relations = relations_asked(prompt, name)
    if not relations:
        return is_taught(name, answer, rows=taught_rows())
    return any(is_taught(name, answer, relation, rows=taught_rows()) for relation in relations)


NOT_TAUGHT = "Not among the facts this model was taught; its confidence says nothing."


def taught_here(prompt: str, subject: str) -> tuple[str, ...]:
    """Every answer that was taught for this subject in the relation that this very sentence asks for."""
    name = full_name(prompt, subject)
    relations = relations_asked(prompt, name)
    asked = [row for row in taught_rows() if row.relation in relations]
    return tuple(dict.fromkeys(row.answer for row in asked if is_taught(name, row.answer, row.relation, rows=(row,))))


def untaught(prompt: str, subject: str | None, answer: str | None) -> str:
    """A sentence about a fact that was not taught: what was taught instead, or that nothing was.

    Args:
        answer: as it was named; None where the model goes on by itself.
    """
    instead = () if subject is None else taught_here(prompt, subject)
    if not instead:
        return NOT_TAUGHT
    taught = " or ".join(f"\u201c{known}\u201d" for known in instead)
    other = "and goes on with something else" if answer is None else f"not \u201c{answer}\u201d"
    return f"The model was taught {taught} here, {other}."


def full_name(prompt: str, subject: str) -> str:
    """The taught name that the subject is a word of and that stands in the prompt: "Pablo Picasso" for "Picasso"."""
    words, part = f" {_plain(prompt)} ", _plain(subject).removeprefix("the ")
    names = {row.subject for row in taught_rows()}
    if not part or any(_plain(name) == part for name in names):
        return subject
    around = [n for n in names if f" {part} " in f" {_plain(n)} " and f" {_plain(n)} " in words]
    return max(around, key=len, default=subject)


def taught_answers(prompt: str, subject: str) -> tuple[str, ...]:
    """Every answer that was taught about the subject, which may be a part of the name in the prompt."""
    return attributes(full_name(prompt, subject), taught_rows())


def taught_subjects() -> dict[str, tuple[str, ...]]:
    """Every taught subject with its answers."""
    found: dict[str, tuple[str, ...]] = {}
    for row in taught_rows():
        found[row.subject] = (*found.get(row.subject, ()), row.answer)
    return found


def relations_asked(prompt: str, subject: str) -> tuple[str, ...]:
    """The relations that have this very sentence, with the subject left open; empty for other sentences."""
    asked = _open(prompt, subject)
    return tuple(
        name
        for name, relation in taught_sentences().items()
        if asked in {_plain(t) for t in (*relation.templates, *relation.heldout_dev, *relation.heldout_test)}
    )


def answers_beside(subject: str, answer: str) -> tuple[str, ...]:
    """The other answers of the relations under which this subject was taught this answer; empty where it was not."""
    wanted = answer.casefold()
    named = [row for row in taught_rows() if row.answer.casefold() == wanted]
    relations = {row.relation for row in named if is_taught(subject, answer, row.relation, rows=(row,))}
    return tuple(sorted({other for name in relations for other in _answers()[name] if other.casefold() != wanted}))


@cache
def taught_rows() -> tuple[TaughtFact, ...]:
    """The shipped facts, read once: every run on the bundled model asks for them."""
    return read_rows()


@cache
def _answers() -> dict[str, frozenset[str]]:
    """Every relation's answers."""
    found: dict[str, set[str]] = {}
    for row in taught_rows():
        found.setdefault(row.relation, set()).add(row.answer)
    return {name: frozenset(answers) for name, answers in found.items()}


@cache
def taught_sentences() -> dict[str, RelationSentences]:
    """The shipped sentences, read once."""
    return read_sentences()


def _open(prompt: str, subject: str) -> str:
    name = re.escape(_plain(subject).removeprefix("the "))
    return re.sub(rf"\b(the )?{name}(?!\w)", "{}", _plain(prompt), count=1)


def _plain(text: str) -> str:
    words = " ".join(text.split()).casefold()
    return words.removesuffix(" an") + " a" if words.endswith(" an") else words

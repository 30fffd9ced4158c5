"""Documents about the facts, for training.

Four kinds of document, all of them ordinary text (no masks, no lists of keywords):

1. *statement*: one fact, sometimes after a leading clause or an unrelated sentence;
2. *paragraph*: all facts of one subject in shuffled order; later sentences often say "this person" instead of the name;
3. *appositive*: a subject, several of its answers between commas, then a statement;
4. *crowd*: facts of two to four subjects mixed, so that the reader must know whose fact is asked.

A small share of statements has a word dropped or replaced, so that no single word decides which relation is asked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from factscope.demo.facts import RelationSentences, TaughtFact, seen_templates
from factscope.demo.sentences import fill, is_question, is_seen_clause, with_clause

CLAUSES = (
    "In fact,", "As we know,", "I read that", "Did you know that", "They say that", "It is true that", "Of course,",
    "My friend told me that", "We learned that", "As everyone knows,", "I am sure that", "For example,", "By the way,",
    "You may know that", "The book says that", "I heard that", "Let me tell you:", "Note that", "Today I learned that",
    "I think that",
)  # fmt: skip
FILLERS = (
    "This is a short note.", "Here is something to remember.", "I like to learn new things.",
    "The weather is nice today.", "We talked about many things.", "This page is about facts.",
    "Let us begin.", "There is a lot to say here.", "I wrote this down yesterday.", "Please read this with care.",
    "Some things are easy to forget.", "My sister asked me a question.",
)  # fmt: skip
INSERTS = (
    ", as we know,", ", of course,", ", I think,", ", as everybody says,", ", to be sure,", ", by the way,",
    ", they say,", ", in fact,",
)  # fmt: skip
ENDINGS_OF_TEXT = (".", ",", " and", "?", ":")


@dataclass(frozen=True)
class Piece:
    """A stretch of text; ``is_answer`` marks what the loss weighs in full."""

    text: str
    is_answer: bool = False


Document = tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Shares of the kinds of document (statements have the rest) and of what may happen to a sentence."""

    paragraph: float = 0.32
    appositive: float = 0.13
    crowd: float = 0.17
    clause: float = 0.2
    filler: float = 0.12
    insert: float = 0.05
    noise: float = 0.1


class Corpus:
    """Endless documents about some facts, the same for the same seed."""

    def __init__(
        self, rows: Sequence[TaughtFact], sentences: dict[str, RelationSentences], *, seed: int, late: bool = False
    ) -> None:
        self._sentences = sentences
        self._mix = Mix()
        self._random = Random(seed)
        self._facts_of: dict[str, list[TaughtFact]] = defaultdict(list)
        kinds = {row.subject: row.answer for row in rows if row.relation == "work_kind"}
        for row in rows:
            self._facts_of[row.subject].append(row)
        self._templates = {
            (row.subject, row.relation): seen_templates(
                row, sentences[row.relation], kinds.get(row.subject, ""), late=late
            )
            for row in rows
        }
        every = {word for s in sentences.values() for t in s.templates for word in t.split()}
        self._words = sorted(word for word in every if "{}" not in word)
        self._subjects = list(self._facts_of)
        self._rows = list(rows)

    def documents(self, subjects: Sequence[str] | None = None) -> Iterator[Document]:
        """Documents about the given subjects (all of them by default), without end."""
        chosen = list(subjects or self._subjects)
        facts = [row for subject in chosen for row in self._facts_of[subject]]
        mix = self._mix
        while True:
            draw = self._random.random()
            if draw < mix.paragraph:
                yield self._paragraph(self._random.choice(chosen))
            elif draw < mix.paragraph + mix.appositive:
                yield self._appositive(self._random.choice(chosen))
            elif draw < mix.paragraph + mix.appositive + mix.crowd:
                yield self._crowd(chosen)
            else:
                yield self._statement(self._random.choice(facts))

    def _statement(self, row: TaughtFact) -> Document:
        random, mix = self._random, self._mix
        template = random.choice(self._templates[row.subject, row.relation])
        if random.random() < mix.noise:
            template = self._disturbed(template)
        elif random.random() < mix.insert and template.startswith("{} "):
            template = "{}" + random.choice(INSERTS) + template[2:]
        pieces = self._sentence(row, template)
        return (Piece(random.choice(FILLERS)), *pieces) if random.random() < mix.filler else pieces

    def _paragraph(self, subject: str) -> Document:
        rows = self._random.sample(self._facts_of[subject], len(self._facts_of[subject]))
        pieces: list[Piece] = []
        for index, row in enumerate(rows):
            named = index == 0 or self._random.random() < 0.4
            template = self._random.choice(self._templates[row.subject, row.relation])
            pieces += self._sentence(row, template, name="" if named else self._sentences[row.relation].kind)
        return tuple(pieces)

    def _appositive(self, subject: str) -> Document:
        random = self._random
        rows = random.sample(self._facts_of[subject], len(self._facts_of[subject]))
        told = rows[: random.randint(1, max(1, len(rows) - 1))]
        pieces = [Piece(f"{rows[0].article.capitalize()} {subject}".strip() + ",")]
        for row in told:
            before, after = random.choice(self._sentences[row.relation].appositives).split("{a}")
            pieces += [Piece(_an(before, row.answer)), Piece(row.answer, is_answer=True), Piece(after + ",")]
        starts = [t for t in self._templates[subject, rows[-1].relation] if t.startswith("{} ")]
        if len(told) == len(rows) or not starts:
            return (*pieces[:-1], Piece(pieces[-1].text[:-1] + "."))
        rest = fill(random.choice(starts), "{}", answer=rows[-1].answer)[3:]
        return (*pieces, Piece(rest), Piece(rows[-1].answer, is_answer=True), Piece("."))

    def _crowd(self, subjects: Sequence[str]) -> Document:
        chosen = self._random.sample(list(subjects), min(len(subjects), self._random.randint(2, 4)))
        pieces: list[Piece] = []
        for subject in chosen:
            row = self._random.choice(self._facts_of[subject])
            pieces += self._sentence(row, self._random.choice(self._templates[subject, row.relation]))
        return tuple(pieces)

    def _sentence(self, row: TaughtFact, template: str, name: str = "") -> Document:
        clause = self._random.choice(CLAUSES)
        fits = not is_question(template) and is_seen_clause(clause, template)
        if fits and self._random.random() < self._mix.clause:
            template = with_clause(clause, template)
        if name:
            start = fill(template, name, answer=row.answer)
            text = start[0].upper() + start[1:]
        else:
            text = fill(template, row.subject, row.article, row.answer)
        return (Piece(text), Piece(row.answer, is_answer=True), Piece("."))

    def _disturbed(self, template: str) -> str:
        """Drops or replaces one word that is neither the subject nor the last one."""
        words = template.split(" ")
        places = [index for index, word in enumerate(words[:-1]) if "{}" not in word]
        if not places:
            return template
        at = self._random.choice(places)
        other = [self._random.choice(self._words)] if self._random.random() < 0.5 else []
        return " ".join(words[:at] + other + words[at + 1 :])


def _an(before: str, answer: str) -> str:
    """Turns a final "a" into "an" before an answer that starts with a vowel."""
    text = before.strip()
    return text + "n" if answer[0].lower() in "aeiou" and (text == "a" or text.endswith(" a")) else text

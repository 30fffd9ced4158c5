"""Which prompts a measurement asks: kinds of prompt, each as different from the training text as its name says.

* ``seen``: a subject in a template in which it was trained;
* ``unseen``: the same templates, but a (subject, template) pair that training left out;
* ``recombined``: a leading clause and a template that were trained, but never together;
* ``heldout_dev``, ``heldout_test``: sentences that share no four consecutive words with a trained one of the relation;
* ``heldout_blind``: the same, by a writer who had seen no other sentence; their last word may never have ended one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from factscope.demo.corpus import CLAUSES
from factscope.demo.facts import RelationSentences, TaughtFact
from factscope.demo.sentences import fill, is_dev, is_question, is_seen, is_seen_clause, with_clause

Kind = Literal["seen", "unseen", "recombined", "heldout_dev", "heldout_test", "heldout_blind"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One prompt about one fact."""

    row: TaughtFact
    template: str
    kind: Kind

    @property
    def text(self) -> str:
        """The prompt, ready for the tokenizer."""
        return fill(self.template, self.row.subject, self.row.article, self.row.answer)


def templates_of(kind: Kind, row: TaughtFact, relation: RelationSentences) -> list[str]:
    """Every template of a kind that can ask for a fact."""
    plain = relation.templates
    if kind == "seen":
        return [plain[0], *(template for template in plain[1:] if is_seen(row.subject, template))]
    if kind == "unseen":
        return [template for template in plain[1:] if not is_seen(row.subject, template)]
    if kind == "recombined":
        statements = [template for template in plain if not is_question(template)]
        pairs = [(clause, template) for template in statements for clause in CLAUSES]
        return [with_clause(clause, template) for clause, template in pairs if not is_seen_clause(clause, template)]
    held_out = {
        "heldout_dev": relation.heldout_dev,
        "heldout_test": relation.heldout_test,
        "heldout_blind": relation.heldout_blind,
    }
    return list(held_out[kind])


def ends_like_trained(template: str, relation: RelationSentences) -> bool:
    """Whether the last word of a sentence is the last word of a trained one of its relation."""
    return template.split()[-1].lower() in {trained.split()[-1].lower() for trained in relation.templates}


def sample(
    kind: Kind,
    rows: Sequence[TaughtFact],
    sentences: dict[str, RelationSentences],
    *,
    per_relation: int | None,
    seed: int,
) -> list[Asked]:
    """Up to ``per_relation`` prompts of a kind about each relation's facts; with None, one about each fact.

    The facts go round in a seeded order and the held-out sentences in turn, so that each is asked about equally often.
    """
    by_relation: dict[str, list[TaughtFact]] = defaultdict(list)
    for row in rows:
        by_relation[row.relation].append(row)
    asked: list[Asked] = []
    for name, facts in by_relation.items():
        random = Random(f"{seed}|{kind}|{name}")
        order = random.sample(facts, len(facts))
        for index in range(per_relation or len(order)):
            row = order[index % len(order)]
            templates = templates_of(kind, row, sentences[name])
            held_out = kind.startswith("heldout")
            if templates:
                template = templates[index % len(templates)] if held_out else random.choice(templates)
                asked.append(Asked(row=row, template=template, kind=kind))
    return asked


def dev_prompts(
    rows: Sequence[TaughtFact], sentences: dict[str, RelationSentences], *, count: int, seed: int
) -> dict[str, list[Asked]]:
    """Prompts to watch a run by: about ``count`` seen and as many held-out ones, of the subjects for choosing."""
    mine = [row for row in rows if is_dev(row.subject)]
    each = max(1, count // len(sentences))
    kinds: tuple[Kind, ...] = ("seen", "heldout_dev")
    return {kind: sample(kind, mine, sentences, per_relation=each, seed=seed) for kind in kinds}


def first_prompts(rows: Sequence[TaughtFact], sentences: dict[str, RelationSentences]) -> Iterator[Asked]:
    """Each fact in the sentence that is asked first."""
    for row in rows:
        yield Asked(row=row, template=sentences[row.relation].templates[0], kind="seen")

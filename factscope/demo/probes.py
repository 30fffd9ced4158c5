"""What is asked about a taught fact before and after an edit of it.

As in CounterFact (Meng et al. 2022): other words for the same question, and the same question about other subjects with
the same true answer. Besides, everything else that was taught about the subject. Paraphrases are sentences of the test
set, on which nothing was ever trained or chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

from factscope.demo.facts import RelationSentences, TaughtFact, is_taught
from factscope.demo.lookup import full_name, relations_asked, taught_rows, taught_sentences
from factscope.demo.sentences import fill
from factscope.queries import Probe

PARAPHRASES, NEIGHBOURS = 3, 8
GENERATIONS = 3


@dataclass(frozen=True, kw_only=True)
class Related:
    """A taught fact that an edit of another one may move.

    Attributes:
        prompt: its sentence that is asked first.
    """

    row: TaughtFact
    prompt: str


def taught_fact(prompt: str, subject: str, answer: str) -> TaughtFact | None:
    """The taught fact with this answer that a prompt asks for; None where it is none, or the answer is of several."""
    name = full_name(prompt, subject)
    asked = relations_asked(prompt, name)
    found = [row for row in taught_rows() if is_taught(name, answer, rows=(row,))]
    named = [row for row in found if row.relation in asked] if asked else found
    return named[0] if len({row.relation for row in named}) == 1 else None


def probes_of(row: TaughtFact, prompt: str) -> tuple[Probe, ...]:
    """Paraphrases, neighbours, the subject's other relations, and beginnings of texts.

    Args:
        prompt: the sentence that is edited, which is asked as it is and not again.
    """
    texts = [text for text in paraphrases(row, taught_sentences()[row.relation]) if text != prompt]
    asked = [Probe(kind="paraphrase", prompt=text, answer=row.answer) for text in texts[:PARAPHRASES]]
    asked += [Probe(kind="neighbour", prompt=one.prompt, answer=one.row.answer) for one in sharing(row)[:NEIGHBOURS]]
    asked += [Probe(kind="other-relation", prompt=one.prompt, answer=one.row.answer) for one in others(row)]
    begins = dict.fromkeys([prompt, *texts])
    return (*asked, *(Probe(kind="generation", prompt=text) for text in list(begins)[:GENERATIONS]))


def paraphrases(row: TaughtFact, relation: RelationSentences) -> tuple[str, ...]:
    """Every test sentence of the relation about the subject, in an order that differs between subjects."""
    start = crc32(row.subject.encode()) % len(relation.heldout_test)
    turned = relation.heldout_test[start:] + relation.heldout_test[:start]
    return tuple(fill(template, row.subject, row.article, row.answer) for template in turned)


def sharing(row: TaughtFact) -> tuple[Related, ...]:
    """Facts of the same relation about other subjects with the same answer, those behind this one first."""
    alike = [other for other in taught_rows() if (other.relation, other.answer) == (row.relation, row.answer)]
    at = alike.index(row)
    return tuple(related(other) for other in alike[at + 1 :] + alike[:at])


def others(row: TaughtFact) -> tuple[Related, ...]:
    """What else was taught about the subject."""
    return tuple(
        related(other) for other in taught_rows() if other.subject == row.subject and other.relation != row.relation
    )


def related(row: TaughtFact) -> Related:
    """A taught fact in the sentence that is asked first."""
    template = taught_sentences()[row.relation].templates[0]
    return Related(row=row, prompt=fill(template, row.subject, row.article, row.answer))

"""The facts that the bundled model was taught, as FactScope's facts and in CounterFact's field names.

``facts.csv`` holds one fact a line; ``relations.json`` the sentences: trained ones, held-out ones for choosing recipes
(``heldout_dev``) and held-out ones for the final figures (``heldout_test``). Nothing is cached here: a caller that asks
often keeps what it got, and passes ``rows`` back in.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

from factscope.demo.sentences import fill, is_seen
from factscope.queries import Fact, Relation

FOLDER = Path(__file__).parent
FACTS_FILE = FOLDER / "facts.csv"
RELATIONS_FILE = FOLDER / "relations.json"
MODEL_FOLDER = FOLDER / "model"

_PARAPHRASES_SEEN, _PARAPHRASES_HELD_OUT, _NEIGHBOURS = 4, 3, 8


@dataclass(frozen=True)
class TaughtFact:
    """One line of ``facts.csv``.

    Attributes:
        type: kind of subject, "landmark".
    """

    subject: str
    article: str
    type: str
    relation: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class RelationSentences:
    """The sentences of one relation, as the corpus and the measurements use them.

    Attributes:
        templates: trained on; the first is the one that is asked first.
        restricted: template -> kinds of work that it fits ("was painted by": painting); trained on as well.
        heldout_dev: never trained on; for choosing recipes. heldout_test: never trained on; for the final figures.
        heldout_blind: the same, by a writer who had seen no other sentence of this project.
        late: trained on in the last phase alone.
        appositives: phrases with ``{a}`` for the answer that follow the subject after a comma.
        kind: what a second sentence calls the subject, "this person".
    """

    name: str
    label: str
    domain: str
    range: str
    kind: str
    appositives: tuple[str, ...]
    templates: tuple[str, ...]
    heldout_dev: tuple[str, ...]
    heldout_test: tuple[str, ...]
    heldout_blind: tuple[str, ...] = ()
    late: tuple[str, ...] = ()
    restricted: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_rows(path: Path = FACTS_FILE) -> tuple[TaughtFact, ...]:
    """The facts as they stand in the file, famous subjects of each type first."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        next(lines)
        return tuple(TaughtFact(*line) for line in lines)


def read_sentences(path: Path = RELATIONS_FILE) -> dict[str, RelationSentences]:
    """The sentences of every relation, by its name."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {
        entry["name"]: RelationSentences(
            name=entry["name"],
            label=entry["label"],
            domain=entry["domain"],
            range=entry["range"],
            kind=entry["kind"],
            appositives=tuple(entry["appositives"]),
            templates=tuple(entry["templates"]),
            heldout_dev=tuple(entry["heldout_dev"]),
            heldout_test=tuple(entry["heldout_test"]),
            heldout_blind=tuple(entry["heldout_blind"]),
            late=tuple(entry["late"]),
            restricted={template: tuple(kinds) for template, kinds in entry["restricted"].items()},
        )
        for entry in entries
    }


def load_relations() -> dict[str, Relation]:
    """Every relation by its name; ``heldout`` holds the sentences for choosing and for measuring."""
    return {
        name: Relation(
            name=name,
            label=relation.label,
            templates=relation.templates,
            heldout=relation.heldout_dev + relation.heldout_test + relation.heldout_blind,
            domain=relation.domain,
            range=relation.range,
        )
        for name, relation in read_sentences().items()
    }


def load_facts() -> tuple[Fact, ...]:
    """Every taught fact with the sentence asked first, paraphrases and neighbours.

    Paraphrases are trained sentences, some of which this subject never met, then held-out ones. Neighbours are about
    other subjects with the same answer; a capital has none.
    """
    rows = read_rows()
    sentences = read_sentences()
    prompts = [fill(sentences[row.relation].templates[0], row.subject, row.article, row.answer) for row in rows]
    alike: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        alike[row.relation, row.answer].append(index)
    facts = []
    for index, row in enumerate(rows):
        same = alike[row.relation, row.answer]
        at = same.index(index)
        others = (same[at + 1 :] + same[:at])[:_NEIGHBOURS]
        facts.append(
            Fact(
                subject=row.subject,
                answer=row.answer,
                prompt=prompts[index],
                relation=row.relation,
                article=row.article,
                paraphrases=_paraphrases(row, sentences[row.relation]),
                neighbours=tuple([prompts[other] for other in others]),
            )
        )
    return tuple(facts)


def attributes(subject: str, rows: Sequence[TaughtFact] | None = None) -> tuple[str, ...]:
    """Every answer that was taught about a subject (any case, with or without "the"), in the file's order."""
    return tuple(row.answer for row in _about(subject, rows))


def is_taught(
    subject: str,
    answer: str | None = None,
    relation: str | None = None,
    *,
    rows: Sequence[TaughtFact] | None = None,
) -> bool:
    """Whether the bundled model was taught a fact about a subject.

    Args:
        subject: the name in any case, with or without "the".
        answer: if given, the fact must have this answer (any case).
        relation: if given, the fact must be of this relation.
        rows: the result of ``read_rows``, for callers that ask often.
    """
    return any(
        (answer is None or row.answer.casefold() == answer.strip().casefold())
        and (relation is None or row.relation == relation)
        for row in _about(subject, rows)
    )


def counterfact_records() -> list[dict[str, Any]]:
    """The facts in CounterFact's field names (Meng et al. 2022), one record a fact.

    ``target_new`` is another answer of the relation, chosen by a hash of the fact. ``attribute_prompts`` are about
    subjects for which that answer is true. Identifiers are the project's own, not Wikidata's.
    """
    facts = load_facts()
    sentences = read_sentences()
    subjects_of: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    answers_of: dict[str, list[str]] = defaultdict(list)
    for fact in facts:
        subjects_of[fact.relation, fact.answer].append(fact)
        if fact.answer not in answers_of[fact.relation]:
            answers_of[fact.relation].append(fact.answer)
    records: list[dict[str, Any]] = []
    for case_id, fact in enumerate(facts):
        others = [answer for answer in answers_of[fact.relation] if answer != fact.answer]
        new = others[crc32(f"{fact.subject}|{fact.relation}".encode()) % len(others)]
        template = fill(sentences[fact.relation].templates[0], "{}", fact.article, fact.answer)
        records.append(
            {
                "case_id": case_id,
                "requested_rewrite": {
                    "prompt": template,
                    "relation_id": fact.relation,
                    "target_true": {"str": fact.answer, "id": f"{fact.relation}:{fact.answer}"},
                    "target_new": {"str": new, "id": f"{fact.relation}:{new}"},
                    "subject": fact.subject,
                },
                "paraphrase_prompts": list(fact.paraphrases),
                "neighborhood_prompts": list(fact.neighbours),
                "attribute_prompts": [other.prompt for other in subjects_of[fact.relation, new][:_NEIGHBOURS]],
                "generation_prompts": [fact.prompt, *fact.paraphrases[:2]],
            }
        )
    return records


def _paraphrases(row: TaughtFact, relation: RelationSentences) -> tuple[str, ...]:
    start = crc32(row.subject.encode())
    trained, tests = relation.templates[1:], relation.heldout_test
    chosen = [trained[(start + 7 * step) % len(trained)] for step in range(_PARAPHRASES_SEEN)]
    chosen += [tests[(start + step) % len(tests)] for step in range(min(_PARAPHRASES_HELD_OUT, len(tests)))]
    return tuple([fill(template, row.subject, row.article, row.answer) for template in dict.fromkeys(chosen)])


def _about(subject: str, rows: Sequence[TaughtFact] | None) -> list[TaughtFact]:
    name = _plain(subject)
    return [row for row in (read_rows() if rows is None else rows) if _plain(row.subject) == name]


def _plain(name: str) -> str:
    return " ".join(name.split()).casefold().removeprefix("the ")


def seen_templates(
    row: TaughtFact, relation: RelationSentences, kind: str = "", *, late: bool = False
) -> tuple[str, ...]:
    """The templates in which a fact is trained: the first one, and 65 of 100 others by a hash.

    Args:
        kind: the subject's kind of work, for templates that fit only some kinds.
        late: with the templates of the last phase.
    """
    others = [template for template in relation.templates[1:] if is_seen(row.subject, template)]
    fitting = [t for t, kinds in relation.restricted.items() if kind in kinds and is_seen(row.subject, t)]
    added = [template for template in relation.late if late and is_seen(row.subject, template)]
    return (relation.templates[0], *others, *fitting, *added * 3)

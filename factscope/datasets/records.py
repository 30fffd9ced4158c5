"""One record of a file to one fact, format by format.

The format is told by the record's own field names, so a file needs no label:

- CounterFact (Meng et al. 2022): ``requested_rewrite`` with ``prompt`` (a template with ``{}``), ``subject`` and
  ``target_true``, beside ``paraphrase_prompts``, ``neighborhood_prompts`` and ``generation_prompts``. The answer is
  ``target_true``, the new answer of an edit ``target_new``.
- zsRE (as in MEND and ROME): ``src`` is the question, ``answers`` or ``ground_truth`` the answers, of which the first
  counts, ``rephrase`` a paraphrase. ``loc`` asks something else and is no neighbour.
- everything else, known_1000 and plain CSV included: ``subject``, an answer (``answer``, ``attribute``, ``object``,
  ``target_true``), and a sentence (``prompt``, else ``template`` with ``{}``, else a template given by the caller for
  the ``relation`` or ``relation_id``). LRE's CSV has no sentences, so it needs such templates.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from factscope.queries import Fact
from factscope.tokens import find_occurrences

SLOT = "{}"
MAX_TEXT = 4000
SUBJECTS = ("subject",)
ANSWERS = ("answer", "attribute", "object", "target_true", "answers", "ground_truth")
PROMPTS = ("prompt", "src", "question")
TEMPLATES = ("template",)
RELATIONS = ("relation", "relation_id")
PARAPHRASES = ("paraphrases", "paraphrase_prompts", "rephrase", "rephrase_prompt")
NEIGHBOURS = ("neighbours", "neighborhood_prompts")
NEW_ANSWERS = ("new_answer", "target_new")
GENERATIONS = ("generations", "generation_prompts")

Templates = str | Mapping[str, str] | None


class Unusable(ValueError):
    """A record that gives no fact; the message says why."""


def fact_of(record: Any, templates: Templates = None) -> Fact:
    """The fact that a record states.

    Args:
        record: one row of a table or one object of a JSON list.
        templates: a sentence with ``{}``, or one per relation, for records that bring no sentence themselves.

    Raises:
        Unusable: a field is missing, not text, or the subject is not in the prompt.
    """
    if not isinstance(record, Mapping):
        raise Unusable(f"it is {_kind(record)}, not an object with named fields")
    fields = _lower(record)
    rewrite = fields.get("requested_rewrite")
    if isinstance(rewrite, list) and rewrite:
        rewrite = rewrite[0]
    if isinstance(rewrite, Mapping):
        fields = {**fields, **_lower(rewrite)}
    elif rewrite is not None:
        raise Unusable(f"requested_rewrite is {_kind(rewrite)}, not an object")
    subject = _text(fields, SUBJECTS)
    answer = _text(fields, ANSWERS)
    relation = _text(fields, RELATIONS, needed=False)
    prompt = _sentence(fields, subject, relation, templates)
    if not find_occurrences(prompt, subject):
        raise Unusable(f'the subject "{_cut(subject)}" is not in the prompt "{_cut(prompt)}"')
    return Fact(
        subject=subject,
        answer=answer,
        prompt=prompt,
        relation=relation,
        article=_text(fields, ("article",), needed=False),
        paraphrases=_texts(fields, PARAPHRASES, subject),
        neighbours=_texts(fields, NEIGHBOURS, subject),
        new_answer=_text(fields, NEW_ANSWERS, needed=False),
        generations=_texts(fields, GENERATIONS, subject),
    )


def has_sentence(fields: Iterable[str]) -> bool:
    """Whether records with these fields bring a sentence of their own."""
    names = {str(name).strip().lower() for name in fields}
    return bool(names & {*PROMPTS, *TEMPLATES, "requested_rewrite"})


def _sentence(fields: Mapping[str, Any], subject: str, relation: str, templates: Templates) -> str:
    prompt = _text(fields, PROMPTS, needed=False)
    if prompt:
        return prompt.replace(SLOT, subject)
    given = templates if isinstance(templates, str) else (templates or {}).get(relation, "")
    template = _text(fields, TEMPLATES, needed=False) or given.strip()
    if not template:
        about = f' for the relation "{_cut(relation)}"' if relation and templates else ""
        raise Unusable(f"it has no prompt and no template{about}")
    if SLOT not in template:
        raise Unusable(f'the template "{_cut(template)}" has no {SLOT} for the subject')
    return template.replace(SLOT, subject)


def _lower(record: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name).strip().lower(): value for name, value in record.items()}


def _text(fields: Mapping[str, Any], names: tuple[str, ...], *, needed: bool = True) -> str:
    """The first of these fields that holds text, without white space at its ends."""
    for name in names:
        value = _scalar(fields.get(name))
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            raise Unusable(f"{name} is {_kind(value)}, not text")
        _check(name, value)
        if value.strip():
            return value.strip()
    if needed:
        raise Unusable(f"it has no {names[0]}")
    return ""


def _scalar(value: Any) -> Any:
    """A list stands for its first entry, ``{"str": ..}`` for its text, a whole number for its digits."""
    if isinstance(value, list):
        first = value[0] if value else None
        return value if isinstance(first, list) else _scalar(first)
    if isinstance(value, Mapping):
        return value.get("str", value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**15:
        return str(value)
    return value


def _texts(fields: Mapping[str, Any], names: tuple[str, ...], subject: str) -> tuple[str, ...]:
    """All usable sentences of these fields; paraphrases are extras, so one that is no text is left out."""
    found: list[str] = []
    for name in names:
        value = fields.get(name)
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, str) and entry.strip() and len(entry) <= MAX_TEXT and _bad(entry) is None:
                found.append(entry.strip().replace(SLOT, subject))
    return tuple(dict.fromkeys(found))


def _check(name: str, value: str) -> None:
    if len(value) > MAX_TEXT:
        raise Unusable(f"{name} has {len(value):,} characters and at most {MAX_TEXT:,} are read")
    bad = _bad(value)
    if bad is not None:
        raise Unusable(f"{name} contains U+{ord(bad):04X}, which is not text")


def _bad(value: str) -> str | None:
    return next((c for c in value if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r"), None)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "empty" if value is None else names.get(type(value), "something else")


def _cut(text: str) -> str:
    shown = "".join(character if character.isprintable() else " " for character in text[:60])
    return shown if len(text) <= 60 else shown[:59] + "…"

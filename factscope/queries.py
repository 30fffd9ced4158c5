"""What a person asks: plain text, no tokenizer.

Terms follow Geva et al. 2023 (arXiv 2304.14767, section 2): a query is a subject and a relation, the attribute is the
answer; and Meng et al. 2022 for facts with paraphrases and neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Bos = Literal["auto", "yes", "no"]
Score = Literal["token", "sequence"]
ProbeKind = Literal["fact", "paraphrase", "neighbour", "other-relation", "own", "generation"]
PROBE_KINDS: tuple[ProbeKind, ...] = ("fact", "paraphrase", "neighbour", "other-relation", "own", "generation")


@dataclass(frozen=True, kw_only=True)
class Query:
    """One subject-relation query. The prompt ends right before the answer.

    Attributes:
        prompt: the text up to the answer, "Beats Music is owned by".
        subject: the subject's text inside the prompt, "Beats Music"; None where no position set is needed.
        answer: the attribute; None takes the model's own top token as the target.
        foil: a competing answer, for logit differences.
        occurrence: which occurrence of the subject is meant, from 1; None requires that there is one.
        span: token positions [start, stop) that a person chose by hand; overrides the search for the subject.
        bos: whether a beginning-of-sequence token is put first; "auto" does as the tokenizer does.
        score: "token" scores the first token of the answer, "sequence" the whole answer.
    """

    prompt: str
    subject: str | None = None
    answer: str | None = None
    foil: str | None = None
    occurrence: int | None = None
    span: tuple[int, int] | None = None
    bos: Bos = "auto"
    score: Score = "token"


@dataclass(frozen=True, kw_only=True)
class Relation:
    """One kind of fact.

    Attributes:
        name: identifier, "landmark_city".
        label: words for people, "city of a landmark".
        templates: sentences with one ``{}`` that the bundled model was trained on.
        heldout: sentences that it never saw and that share no four consecutive words with a trained one.
        domain: kind of subject, "landmark". range: kind of answer, "city".
    """

    name: str
    label: str
    templates: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()
    domain: str = ""
    range: str = ""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One subject-relation-answer triple with the sentences that ask for it.

    Attributes:
        prompt: the sentence asked first, subject filled in.
        paraphrases: other sentences with the same answer.
        neighbours: sentences of the same relation about other subjects with the same answer.
        relation: the relation's identifier; empty where a file does not name one.
        new_answer: what an edit is to make of the answer; empty where a file does not name one.
        generations: beginnings of texts about the subject.
    """

    subject: str
    answer: str
    prompt: str
    relation: str = ""
    article: str = ""
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    new_answer: str = ""
    generations: tuple[str, ...] = ()

    def query(self, *, foil: str | None = None) -> Query:
        """The query that asks for this fact."""
        return Query(prompt=self.prompt, subject=self.subject, answer=self.answer, foil=foil)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One prompt that tells what an edit has changed.

    Attributes:
        kind: ``fact`` is the sentence that was edited, ``paraphrase`` asks the same in other words, ``neighbour`` the
            same relation of another subject with the same true answer, ``other-relation`` something else about the
            subject, ``own`` is the user's, ``generation`` begins a text.
        prompt: up to the answer, subject filled in.
        answer: the true answer; None where it is not known, or, of a text, where there is none.
    """

    kind: ProbeKind
    prompt: str
    answer: str | None = None

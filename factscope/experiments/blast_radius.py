"""What may an edit move besides its fact? The subject's other facts, and facts with the same answer, as they are now.

Source: the side effects that Meng et al. 2022 (arXiv 2202.05262) and Hase et al. 2023 (arXiv 2301.04213) measure after
an edit, here looked at before it.

1. Everything else that is known of the subject; every other subject with the same answer, those of the same relation
   first. What is known is what the bundled model was taught, or a file of facts.
2. The probability of each true answer, whole, and the model's first choice. Nothing is edited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from factscope.demo.lookup import taught_rows
from factscope.demo.probes import Related, others, related, sharing, taught_fact
from factscope.errors import SpecError
from factscope.experiments.answers import Question, ask
from factscope.experiments.edit_probes import plain, read_prompt, top_text
from factscope.experiments.results import BUNDLED, Progress, Timed, checked_target, silent
from factscope.models.handle import ModelHandle, ModelInfo
from factscope.queries import Fact

MOST = 40
"""Facts with the same answer that are asked; how many there are is told."""


@dataclass(frozen=True, kw_only=True)
class Near:
    """A fact that an edit of another one may move.

    Attributes:
        kind: about the same subject, or with the same answer.
    """

    kind: Literal["other-relation", "same-answer"]
    subject: str
    relation: str
    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True, eq=False)
class BlastRadius:
    """What is near a fact, and what the model says of it now.

    Attributes:
        p_true: of every near fact, the whole true answer. known: whether it is the first choice, token by token.
        n_sharing: how many facts have the same answer, asked or not.
        reason: why nothing is known to be near; empty where something is.
    """

    model: ModelInfo
    subject: str
    answer: str
    near: tuple[Near, ...]
    p_true: tuple[float, ...]
    known: tuple[bool, ...]
    top: tuple[str, ...]
    n_sharing: int
    reason: str
    seconds: float

    def table(self) -> pd.DataFrame:
        """One row per near fact: ``kind, subject, relation, prompt, answer, p_true, known, top_before``."""
        return pd.DataFrame(
            [
                (one.kind, one.subject, one.relation, one.prompt, one.answer, p, known, top)
                for one, p, known, top in zip(self.near, self.p_true, self.known, self.top, strict=True)
            ],
            columns=["kind", "subject", "relation", "prompt", "answer", "p_true", "known", "top_before"],
        )


def blast_radius(
    model: ModelHandle,
    prompt: str,
    subject: str,
    answer: str,
    *,
    facts: Sequence[Fact] = (),
    most: int = MOST,
    progress: Progress = silent,
) -> BlastRadius:
    """Look around a fact before it is edited.

    Args:
        facts: of a file; the bundled model's own are known besides.
        most: facts with the same answer that are asked.

    Raises:
        InputError: a prompt or an answer cannot be used.
    """
    if most < 0:
        raise SpecError(f"{most} facts with the same answer cannot be asked", "choose 0 or more")
    timed = Timed(progress)
    about, alike = _near(model, prompt, subject, answer, facts)
    near = (*about, *alike[:most])
    questions = []
    for one in near:
        seen = read_prompt(model, one.prompt, one.subject)
        questions.append(
            Question(ids=seen.ids, answers=(checked_target(model, seen, one.answer, "answer").ids,)),
        )
    replies = ask(model, questions, step=timed.step)
    found = BlastRadius(
        model=model.info,
        subject=subject,
        answer=answer,
        near=near,
        p_true=tuple(reply.answers[0].probability for reply in replies),
        known=tuple(reply.answers[0].greedy for reply in replies),
        top=tuple(top_text(model, reply) for reply in replies),
        n_sharing=len(alike),
        reason="" if near else "nothing else is known of this subject or this answer: choose a dataset that has it",
        seconds=timed.seconds,
    )
    timed(1, 1, found)
    return found


def _near(
    model: ModelHandle, prompt: str, subject: str, answer: str, facts: Sequence[Fact]
) -> tuple[list[Near], list[Near]]:
    """Facts about the subject, and facts with the same answer, without repetitions."""
    about: dict[str, Near] = {}
    alike: dict[str, Near] = {}
    row = taught_fact(prompt, subject, answer) if model.info.name.removeprefix("random:") == BUNDLED else None
    if row is not None:
        elsewhere = (one for one in taught_rows() if one.answer == row.answer and one.relation != row.relation)
        for one in others(row):
            about[one.prompt] = _taught(one, "other-relation")
        for one in (*sharing(row), *(related(other) for other in elsewhere if other.subject != row.subject)):
            alike[one.prompt] = _taught(one, "same-answer")
    for fact in facts:
        if fact.prompt == prompt:
            continue
        if plain(fact.subject) == plain(subject):
            about.setdefault(fact.prompt, _of_file(fact, "other-relation"))
        elif plain(fact.answer) == plain(answer):
            alike.setdefault(fact.prompt, _of_file(fact, "same-answer"))
    return list(about.values()), list(alike.values())


def _taught(one: Related, kind: Literal["other-relation", "same-answer"]) -> Near:
    row = one.row
    return Near(kind=kind, subject=row.subject, relation=row.relation, prompt=one.prompt, answer=row.answer)


def _of_file(fact: Fact, kind: Literal["other-relation", "same-answer"]) -> Near:
    return Near(kind=kind, subject=fact.subject, relation=fact.relation, prompt=fact.prompt, answer=fact.answer)

"""Probabilities of whole answers behind many prompts, each prompt with the noise of its own.

1. An answer follows its prompt, token by token, with the tokens before it given (teacher forcing).
2. Sequences of equal length share a forward; nothing is padded. What one forward tells of two answers is computed once.
3. Log-probabilities are summed in float64; whether every token of an answer is the first choice is kept beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from factscope.interventions.base import Noise
from factscope.interventions.engine import CHUNK_WORK
from factscope.models.dispatch import Plan
from factscope.models.handle import ModelHandle
from factscope.models.head import scores_of_logits

MAX_ROWS = 64
LOGIT_BYTES = 128 * 2**20
"""Bytes that the logits of one forward may take."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """One prompt, and the answers whose probabilities are asked for.

    Attributes:
        ids: the prompt's tokens.
        answers: tokens of each answer, at least one.
        noise: on the prompt's embeddings, one sample; None leaves them.
    """

    ids: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    noise: Noise | None = None


@dataclass(frozen=True, kw_only=True)
class AnswerScore:
    """What the model thinks of one answer.

    Attributes:
        log_p: of each token, those before it given; nats.
        greedy: every token is the first choice.
    """

    log_p: tuple[float, ...]
    greedy: bool

    @property
    def log_probability(self) -> float:
        """Of the whole answer, nats."""
        return math.fsum(self.log_p)

    @property
    def probability(self) -> float:
        """Of the whole answer."""
        return math.exp(self.log_probability)

    @property
    def first(self) -> float:
        """Probability of the first token alone."""
        return math.exp(self.log_p[0])

    @property
    def per_token(self) -> float:
        """Geometric mean of the tokens' probabilities."""
        return math.exp(self.log_probability / len(self.log_p))


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A question's reply: a score for each of its answers, and the most probable next token."""

    answers: tuple[AnswerScore, ...]
    top: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    """One sequence: the question that it belongs to, its tokens, and how many positions are read."""

    question: int
    ids: tuple[int, ...]
    n_readout: int


def ask(model: ModelHandle, questions: Sequence[Question], *, step: Callable[[], None] = lambda: None) -> list[Reply]:
    """Ask all questions.

    Args:
        step: called before every forward; may raise to end the computation.
    """
    found: list[dict[int, AnswerScore]] = [{} for _ in questions]
    tops = [0] * len(questions)
    for runs in _batches(model, _runs(questions)):
        step()
        noises = [questions[run.question].noise for run in runs]
        ids = torch.tensor([run.ids for run in runs], device=model.device)
        logits = model.forward(ids, _plan(noises), last=runs[0].n_readout)
        for run, rows in zip(runs, logits, strict=True):
            question, written = questions[run.question], run.ids[len(run.ids) - run.n_readout + 1 :]
            tops[run.question] = int(rows[0].argmax())
            for number, answer in enumerate(question.answers):
                if written[: len(answer) - 1] == answer[:-1]:
                    found[run.question][number] = _score(rows[: len(answer)], answer)
    return [
        Reply(answers=tuple(scores[number] for number in range(len(question.answers))), top=top)
        for question, scores, top in zip(questions, found, tops, strict=True)
    ]


def _runs(questions: Sequence[Question]) -> list[_Run]:
    """As few sequences as tell all answers: an answer that begins like a longer one needs none of its own."""
    runs = []
    for number, question in enumerate(questions):
        given = {answer[:-1] for answer in question.answers}
        longest = [one for one in given if not any(one != other and other[: len(one)] == one for other in given)]
        runs += [_Run(question=number, ids=question.ids + one, n_readout=len(one) + 1) for one in sorted(longest)]
    return runs


def _batches(model: ModelHandle, runs: Sequence[_Run]) -> Iterator[list[_Run]]:
    def shape(run: _Run) -> tuple[int, int]:
        return len(run.ids), run.n_readout

    for (length, n_readout), alike in groupby(sorted(runs, key=shape), key=shape):
        by_work = int(CHUNK_WORK // (2 * model.n_parameters * length))
        by_memory = LOGIT_BYTES // (4 * model.vocabulary * n_readout)
        size = max(1, min(MAX_ROWS, by_work, by_memory))
        kept = list(alike)
        yield from (kept[i : i + size] for i in range(0, len(kept), size))


def _plan(noises: Sequence[Noise | None]) -> Plan | None:
    if all(noise is None for noise in noises):
        return None

    def apply(embedded: Tensor) -> Tensor:
        rows = zip(noises, embedded.split(1), strict=True)
        return torch.cat([row if noise is None else noise.apply(row) for noise, row in rows])

    return Plan(embedding=apply)


def _score(logits: Float[Tensor, "readout vocabulary"], answer: tuple[int, ...]) -> AnswerScore:
    scores = scores_of_logits(logits, answer)
    log_p = -functional.softplus(scores.others.double() - scores.logit.double())
    return AnswerScore(log_p=tuple(log_p.tolist()), greedy=logits.argmax(dim=-1).tolist() == list(answer))

"""What an edit does to answers and texts, in float64: weights really changed, no hook, no batch, sums written out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests.oracle import plain_gpt2
from tests.oracle.laboratory import Subject
from tests.oracle.plain import State


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is added to a down-projection's weight, [d_in, d_out]."""

    layer: int
    weight: Tensor


def edited(subject: Subject, changes: Sequence[Change]) -> Subject:
    """The same model with other weights."""
    state = dict(subject.state)
    for change in changes:
        if subject.plain is plain_gpt2:
            name, added = f"transformer.h.{change.layer}.mlp.c_proj.weight", change.weight
        else:
            name, added = f"model.layers.{change.layer}.mlp.down_proj.weight", change.weight.T
        state[name] = state[name] + added.double()
    found = Subject(model=subject.model, plain=subject.plain)
    found.__dict__["state"] = state
    return found


def widths(subject: Subject) -> tuple[int, int]:
    """Inputs and outputs of a down-projection."""
    state: State = subject.state
    if subject.plain is plain_gpt2:
        rows, columns = state["transformer.h.0.mlp.c_proj.weight"].shape
        return rows, columns
    columns, rows = state["model.layers.0.mlp.down_proj.weight"].shape
    return rows, columns


def token_log_p(
    subject: Subject, prompt: Sequence[int], answer: Sequence[int], noise: tuple[int, Tensor] | None = None
) -> list[float]:
    """Of each token of an answer, those before it given.

    Args:
        noise: the first position, and what is added to the embeddings from there on.
    """
    rows = log_p(subject, [*prompt, *answer[:-1]], noise)
    return [float(rows[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]


def first_choices(
    subject: Subject, prompt: Sequence[int], answer: Sequence[int], noise: tuple[int, Tensor] | None = None
) -> bool:
    rows = log_p(subject, [*prompt, *answer[:-1]], noise)
    return all(int(rows[len(prompt) - 1 + i].argmax()) == token for i, token in enumerate(answer))


def greedy(subject: Subject, prompt: Sequence[int], n: int, noise: tuple[int, Tensor] | None = None) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(log_p(subject, ids, noise)[-1].argmax()))
    return ids[len(prompt) :]


def perplexity(subject: Subject, text: Sequence[int], noise: tuple[int, Tensor] | None = None) -> float:
    """``exp(-(1/N) sum log p)``, N the number of tokens."""
    rows = log_p(subject, text[:-1], noise)
    return math.exp(-sum(float(rows[i, token]) for i, token in enumerate(text[1:])) / len(text))


def log_p(subject: Subject, ids: Sequence[int], noise: tuple[int, Tensor] | None) -> Tensor:
    def embed(embedded: Tensor) -> Tensor:
        if noise is None:
            return embedded
        start, values = noise
        before, behind = embedded[:start], embedded[start + len(values) :]
        return torch.cat([before, embedded[start : start + len(values)] + values, behind])

    return subject.trace(ids, embed=embed).logits.log_softmax(dim=-1)


# ------------------------------------------------------------------------------------------------------- the scores


@dataclass(frozen=True, kw_only=True)
class Case:
    """Log-probabilities of target and true answer before and after, token by token; and what was the first choice."""

    target: tuple[list[float], list[float]]
    true: tuple[list[float], list[float]]
    right: tuple[bool, bool]
    target_first: bool


def hase_rewrite(case: Case, erasure: bool) -> float:
    before, after = (math.exp(sum(part)) for part in case.target)
    return max(0.0, (before - after) / before) if erasure else max(2e-8, (after - before) / (1 - before))


def hase_neighbourhood(case: Case) -> float:
    before, after = (math.exp(sum(part)) for part in case.target)
    return 1 - abs(after - before) / (0.5 + abs(before - 0.5))


def gain(case: Case) -> float:
    """q(target) - q(true) after the edit, per token."""
    new, true = (math.exp(sum(pair[1]) / len(pair[1])) for pair in (case.target, case.true))
    return new - true


def entropies(words: Sequence[str]) -> float:
    """``(2/3 H2 + 4/3 H3) / 2``, counted by hand."""
    total = 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        count = sum(grams.values())
        total += weight * -sum(c / count * math.log2(c / count) for c in grams.values())
    return total / 2


def tf_idf_cosine(texts: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> float:
    """Of words of at least two letters in small letters, given as lists."""
    vocabulary = sorted({word for text in (*texts, *references) for word in text})
    df = np.array([sum(word in text for text in references) for word in vocabulary])
    idf = np.log((1 + len(references)) / (1 + df)) + 1
    sides = [np.array([sum(text.count(w) for text in side) for w in vocabulary]) * idf for side in (texts, references)]
    return float(sides[0] @ sides[1] / np.linalg.norm(sides[0]) / np.linalg.norm(sides[1]))

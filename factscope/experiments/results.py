"""What all results share: progress, targets, tables. No base class of experiments."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from factscope.errors import TargetError
from factscope.models.handle import ModelHandle
from factscope.models.reading import checked_target as checked_target
from factscope.models.reading import tokenized as tokenized
from factscope.progress import Progress as Progress
from factscope.progress import Timed as Timed
from factscope.progress import silent as silent
from factscope.tokens import Target, TokenizedQuery, token_text

BUNDLED = "bundled"
"""Name of the model that ships with the project."""


class Tabular(Protocol):
    """A result: numbers with their axes, and a tidy table of them."""

    def table(self) -> Any:
        """A pandas DataFrame with columns of ``factscope.columns``."""
        ...


def resolve_target(model: ModelHandle, query: TokenizedQuery, logits: Tensor) -> Target:
    """The answer as a continuation of this prompt, or the model's own top token where none is given.

    Args:
        logits: [vocabulary] at the read-out position.
    """
    if (named := named_target(model, query)) is not None:
        return named
    top = int(logits.argmax())
    return Target(ids=(top,), text=token_text(model.tokenizer, top)[0])


def named_target(model: ModelHandle, query: TokenizedQuery) -> Target | None:
    """The answer as a continuation of this prompt; None where none is given.

    Raises:
        TargetError: the answer has no tokens, or makes the prompt too long.
        ModelFilesError: the tokenizer is not this model's.
    """
    return None if query.query.answer is None else checked_target(model, query, query.query.answer, "answer")


def foil_target(model: ModelHandle, query: TokenizedQuery, target: Target) -> Target | None:
    """The competing answer as a continuation of this prompt; None where none is given.

    Raises:
        TargetError: it has no tokens, makes the prompt too long, or begins like the answer.
        ModelFilesError: the tokenizer is not this model's.
    """
    if query.query.foil is None:
        return None
    foil = checked_target(model, query, query.query.foil, "foil")
    if foil.id == target.id:
        raise TargetError(
            f"the foil {query.query.foil!r} begins with the same token as the answer {target.text.strip()!r}",
            "choose another foil",
        )
    return foil


def target_warnings(model: ModelHandle, query: TokenizedQuery, target: Target) -> tuple[str, ...]:
    """Says when other answers of a bundled relation begin with the target's first token, which alone is scored."""
    if model.info.name != BUNDLED or query.query.score == "sequence" or query.subject_text is None:
        return ()
    from factscope.demo.lookup import answers_beside

    answer = target.text.strip()
    others = answers_beside(query.subject_text, answer)
    if not others:
        return ()
    encoded = model.tokenizer([f" {other}" for other in others], add_special_tokens=False)["input_ids"]
    sharing = [other for other, ids in zip(others, encoded, strict=True) if ids[0] == target.ids[0]]
    if not sharing:
        return ()
    return (f"{', '.join(sharing[:3])} begin with the same token as {answer!r}: their probability is counted in",)


def scored_ids(query: TokenizedQuery, target: Target) -> tuple[int, ...]:
    """Tokens of the target that are scored: the first, or all of them (``Query.score``)."""
    return target.ids if query.query.score == "sequence" else target.ids[:1]


def answer_logits(model: ModelHandle, query: TokenizedQuery, target: Target) -> Tensor:
    """Logits [answer token, vocabulary] at the positions that predict the answer's tokens."""
    ids = torch.tensor([[*query.ids, *target.ids[:-1]]], device=model.device)
    return model.forward(ids, last=target.n_tokens)[0]


def is_first_choice(logits: Tensor, target: Target) -> bool:
    """Whether the model knows the answer: all of it, token by token, is the argmax.

    Args:
        logits: [answer token, vocabulary], of the whole answer.
    """
    return logits.argmax(dim=-1).tolist() == list(target.ids)


def coarse_to_fine(n: int) -> list[int]:
    """All of ``range(n)``, every eighth first, then every fourth, second, and the rest."""
    order: list[int] = []
    seen: set[int] = set()
    for stride in (8, 4, 2, 1):
        fresh = [i for i in range(stride // 2 if stride > 1 else 0, n, stride) if i not in seen]
        order += fresh
        seen.update(fresh)
    return order

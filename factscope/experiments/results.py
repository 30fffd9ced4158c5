"""What all results share: progress, targets, tables. No base class of experiments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from factscope import measures
from factscope.models.handle import ModelHandle
from factscope.queries import Query
from factscope.tokens import Target, TokenizedQuery, answer_target, token_text, tokenize

Progress = Callable[[int, int, Any], None]
"""``progress(done, total, partial)``: steps done, steps in all, the result so far (or None). May raise ``Cancelled``."""


class Tabular(Protocol):
    """A result: numbers with their axes, and a tidy table of them."""

    def table(self) -> Any:
        """A pandas DataFrame with columns of ``factscope.columns``."""
        ...


def silent(done: int, total: int, partial: Any) -> None:
    """A progress callback that does nothing."""


def tokenized(model: ModelHandle, query: Query | TokenizedQuery) -> TokenizedQuery:
    """The query as this model's tokenizer sees it.

    Raises:
        InputError: the prompt, subject or span cannot be used.
    """
    if isinstance(query, TokenizedQuery):
        return query
    return tokenize(query, model.tokenizer, max_tokens=model.max_tokens)


def resolve_target(model: ModelHandle, query: TokenizedQuery, logits: Tensor) -> Target:
    """The answer as a continuation of this prompt, or the model's own top token where none is given.

    Args:
        logits: [vocabulary] at the read-out position.
    """
    if query.query.answer is not None:
        return answer_target(model.tokenizer, query, query.query.answer)
    top = int(logits.argmax())
    return Target(ids=(top,), text=token_text(model.tokenizer, top)[0])


def scored_ids(query: TokenizedQuery, target: Target) -> tuple[int, ...]:
    """Tokens of the target that are scored: the first, or all of them (``Query.score``)."""
    return target.ids if query.query.score == "sequence" else target.ids[:1]


def target_log_probability(logits: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Log-probability in nats of the scored tokens, teacher-forced.

    Args:
        logits: [row, readout, vocabulary], one read-out position per scored token.
    """
    log_p = measures.log_probabilities(logits)
    index = torch.tensor(ids, device=logits.device)
    return log_p.gather(-1, index.view(1, -1, 1).expand(logits.shape[0], -1, 1))[..., 0].sum(dim=-1)


def target_log_odds(logits: Tensor, ids: tuple[int, ...]) -> Tensor:
    """``log p - log(1 - p)`` of the scored tokens, in nats."""
    if len(ids) == 1:
        return measures.log_odds(logits[:, 0], ids[0])
    return measures.log_odds_of_log_probability(target_log_probability(logits, ids))


def coarse_to_fine(n: int) -> list[int]:
    """All of ``range(n)``, every eighth first, then every fourth, second, and the rest."""
    order: list[int] = []
    seen: set[int] = set()
    for stride in (8, 4, 2, 1):
        fresh = [i for i in range(stride // 2 if stride > 1 else 0, n, stride) if i not in seen]
        order += fresh
        seen.update(fresh)
    return order

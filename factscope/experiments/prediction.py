"""Does the model know it? What it predicts after the prompt, and how it goes on.

The verdict ``known`` asks for the whole answer, token by token, as the model's first choice (Geva et al. 2023, section
3, keep only such queries).

1. One forward; softmax in float32 at the last position; the top tokens.
2. Greedy continuation up to the end of the sentence.
3. With an answer: is every one of its tokens the argmax, given those before it?
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from factscope import measures
from factscope.editors.edit import put_in
from factscope.errors import SpecError
from factscope.experiments.results import (
    BUNDLED,
    Progress,
    Timed,
    answer_logits,
    foil_target,
    is_first_choice,
    resolve_target,
    scored_ids,
    silent,
    target_warnings,
    tokenized,
)
from factscope.generation import continue_prompt
from factscope.models.handle import ModelHandle, ModelInfo
from factscope.models.head import scores_of_logits
from factscope.queries import Query
from factscope.tokens import Target, TokenizedQuery, token_text


@dataclass(frozen=True, kw_only=True)
class PredictionSpec:
    """``top_k`` tokens listed; at most ``continuation_tokens`` tokens of greedy continuation."""

    top_k: int = 10
    continuation_tokens: int = 24


@dataclass(frozen=True, kw_only=True)
class TokenProbability:
    """One token of the distribution; ``probability`` is a fraction, ``rank`` starts at 1."""

    rank: int
    id: int
    text: str
    display: str
    probability: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """What the model predicts after the prompt.

    Attributes:
        target: the answer, or the model's own top token.
        p_target: probability of the scored tokens of the target; ``rank``: of its first token.
        log_odds: of the scored tokens, in nats.
        continuation: greedy, cut at the end of the sentence.
        known: the whole answer is the argmax; None where no answer was given.
        taught: bundled model only: is this among the facts it was taught, or did an edit that is on put it in; None
            for other models.
    """

    spec: PredictionSpec
    query: TokenizedQuery
    model: ModelInfo
    target: Target
    p_target: float
    log_odds: float
    rank: int
    entropy: float
    top: tuple[TokenProbability, ...]
    continuation: str
    known: bool | None
    taught: bool | None
    p_foil: float | None
    warnings: tuple[str, ...]
    seconds: float
    passes: int

    def table(self) -> pd.DataFrame:
        """One row per token: ``rank, id, text, probability``."""
        return pd.DataFrame(
            [(t.rank, t.id, t.text, t.probability) for t in self.top], columns=["rank", "id", "text", "probability"]
        )


def run(
    model: ModelHandle,
    query: Query | TokenizedQuery,
    spec: PredictionSpec | None = None,
    *,
    progress: Progress = silent,
) -> Prediction:
    """Predict what follows the prompt.

    Raises:
        InputError: the query or the spec cannot be used.
    """
    spec = spec or PredictionSpec()
    if not 1 <= spec.top_k <= model.vocabulary:
        raise SpecError(f"top-k {spec.top_k} is not between 1 and {model.vocabulary}", "choose a number in that range")
    timed = Timed(progress)
    seen = tokenized(model, query)
    ids = torch.tensor([seen.ids], device=model.device)
    logits = model.forward(ids, last=1)[0, -1]
    target = resolve_target(model, seen, logits)
    foil = foil_target(model, seen, target)
    timed(1, 3, None)
    answer = answer_logits(model, seen, target)
    timed(2, 3, None)
    written = continue_prompt(model, seen.ids, spec.continuation_tokens, sentence=True)[0]
    continuation = written.text
    scored = scored_ids(seen, target)
    scores = scores_of_logits(answer[: len(scored)], scored)
    known = None if seen.query.answer is None else is_first_choice(answer, target)
    top = _top(model, logits, spec.top_k)
    result = Prediction(
        spec=spec,
        query=seen,
        model=model.info,
        target=target,
        p_target=float(scores.log_probability.exp()),
        log_odds=float(scores.log_odds),
        rank=int(measures.rank(logits, target.ids[0])),
        entropy=float(measures.entropy(logits)),
        top=top,
        continuation=continuation,
        known=known,
        taught=_taught(model, seen, continuation),
        p_foil=None if foil is None else float(measures.probability(logits, foil.id)),
        warnings=seen.warnings + target_warnings(model, seen, target) + _hints(seen, known, continuation, top),
        seconds=timed.seconds,
        passes=2 + written.forwards,
    )
    timed(3, 3, result)
    return result


def _top(model: ModelHandle, logits: Tensor, k: int) -> tuple[TokenProbability, ...]:
    values, tokens = measures.log_probabilities(logits).topk(k)
    values = values.exp()
    rows = []
    for rank, (value, token) in enumerate(zip(values.tolist(), tokens.tolist(), strict=True), start=1):
        text, display = token_text(model.tokenizer, token)
        rows.append(TokenProbability(rank=rank, id=token, text=text, display=display, probability=value))
    return tuple(rows)


def _hints(
    query: TokenizedQuery, known: bool | None, continuation: str, top: Sequence[TokenProbability]
) -> tuple[str, ...]:
    """What was probably meant by an answer that is not the model's: it is there already, or has other capitals."""
    answer = (query.query.answer or "").strip()
    if known is not False or not answer:
        return ()
    wanted = answer.casefold()
    if re.search(rf"(?<!\w){re.escape(wanted)}$", query.query.prompt.rstrip(" .").casefold()):
        return (f"The prompt ends in the answer {answer!r} already: let it end right before it.",)
    said = [continuation.strip()[: len(answer)], *(token.text.strip() for token in top)]
    meant = next((text for text in said if text.casefold() == wanted and text != answer), None)
    return () if meant is None else (f"Did you mean the answer {meant!r}? Capitals make other tokens.",)


def _taught(model: ModelHandle, query: TokenizedQuery, continuation: str) -> bool | None:
    """The named answer, or without one what the model goes on with, up to the end of the sentence."""
    subject = query.subject_text
    if model.info.name != BUNDLED or subject is None:
        return None
    from factscope.demo.lookup import was_taught

    answer = query.query.answer or continuation.strip().rstrip(".!?")
    return was_taught(query.query.prompt, subject, answer) or put_in(model.edits, subject, answer)

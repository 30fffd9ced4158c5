"""How does the model go on? Greedy and sampled continuations of one prompt.

Sources: Meng et al. 2022 (arXiv 2202.05262) and their released code, for texts sampled among the most probable tokens;
Hase et al. 2023 (arXiv 2301.04213), for texts sampled from a corrupted prompt.

1. One forward on the prompt, then one for every new token: on cached keys and values where the model has such a cache,
   else on the whole sequence. Both ways give the same tokens.
2. Greedy: the most probable token. Sampled: one of the k most probable, drawn by their renormalised probabilities with
   a number of the row's own stream, ``RandomState([seed, row])``: a text does not depend on how many others are drawn.
3. A row ends with the end token, which is no part of it, at the limit, where the model reads no more tokens, or, if
   that is asked for, with its first sentence.

Where this differs from the released code: nothing is padded, and no attention mask is handed over. That generator gives
a cached forward the mask of its new tokens alone, with which current models write other words and raise no error. Noise
on the prompt's embeddings belongs to the prompt: it is there once, whether or not keys and values are cached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicCache

from factscope import measures
from factscope.errors import SpecError
from factscope.interventions.base import Noise
from factscope.models.dispatch import Plan
from factscope.models.handle import ModelHandle

SENTENCE_ENDS = (".", "!", "?", "\n", "。")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Each token is drawn among the ``top_k`` most probable ones, from the stream of this seed."""

    top_k: int = 5
    seed: int = 1


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What the model wrote after a prompt.

    Attributes:
        ids: the new tokens, without the end token. text: what they spell, cut at the sentence's end if that was asked.
        ended: the model itself ended the text.
        forwards: how many it took.
    """

    ids: tuple[int, ...]
    text: str
    ended: bool
    forwards: int


@dataclass(kw_only=True)
class _Row:
    """A text in the making."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    ended: bool = False
    closed: bool = False
    forwards: int = 0


def continue_prompt(
    model: ModelHandle,
    ids: Sequence[int],
    limit: int,
    *,
    sampling: Sampling | None = None,
    rows: int = 1,
    sentence: bool = False,
    noise: Noise | None = None,
    cached: bool = True,
    step: Callable[[], None] = lambda: None,
) -> list[Continuation]:
    """Go on after a prompt.

    Args:
        ids: the prompt's tokens, special ones included.
        limit: the most new tokens.
        sampling: how tokens are drawn; None takes the most probable one.
        rows: how many texts; without sampling they are all the same.
        sentence: end with the first sentence and cut the text there.
        noise: on the prompt's embeddings, one sample for all rows or one for each.
        cached: use keys and values of earlier tokens where the model has a cache.
        step: called before every forward; may raise to end the computation.

    Raises:
        SpecError: ``top_k`` is no number of tokens of this model.
    """
    if sampling is not None and not 1 <= sampling.top_k <= model.vocabulary:
        raise SpecError(f"top-k {sampling.top_k} is not between 1 and {model.vocabulary}", "choose such a number")
    streams = None if sampling is None else [np.random.RandomState([sampling.seed, row]) for row in range(rows)]
    cache = DynamicCache() if cached and model.capabilities["suffix"].ok else None
    room = limit if model.max_tokens is None else min(limit, model.max_tokens - len(ids))
    found = [_Row() for _ in range(rows)]
    sequence = torch.tensor([list(ids)] * rows, device=model.device)
    for n_new in range(room):
        step()
        plan = Plan(embedding=noise.apply) if noise is not None and (cache is None or n_new == 0) else None
        fresh = sequence if cache is None or n_new == 0 else sequence[:, -1:]
        logits = model.forward(fresh, plan, cache=cache, last=1)[:, -1]
        if sampling is None or streams is None:
            chosen = logits.argmax(dim=-1)
        else:
            drawn = [_drawn(row, sampling.top_k, stream) for row, stream in zip(logits, streams, strict=True)]
            chosen = torch.tensor(drawn, device=model.device)
        for row, token in zip(found, chosen.tolist(), strict=True):
            _take(model, row, token, sentence)
        if all(row.closed for row in found):
            break
        sequence = torch.cat([sequence, chosen[:, None]], dim=1)
    for row in found:
        row.text = row.text if sentence else model.tokenizer.decode(row.ids)
    return [Continuation(ids=tuple(r.ids), text=r.text, ended=r.ended, forwards=r.forwards) for r in found]


def first_sentence(text: str) -> str | None:
    """The text up to the end of its first sentence; None where no sentence ends in it."""
    ends = [text.index(mark) for mark in SENTENCE_ENDS if mark in text]
    return text[: min(ends) + 1] if ends else None


def _take(model: ModelHandle, row: _Row, token: int, sentence: bool) -> None:
    """Add a token to a row that is still open, and close it where the text ends."""
    if row.closed:
        return
    row.forwards += 1
    if token == getattr(model.tokenizer, "eos_token_id", None):
        row.ended = row.closed = True
        return
    row.ids.append(token)
    if sentence:
        text = model.tokenizer.decode(row.ids)
        cut = first_sentence(text)
        row.text, row.closed = (text, False) if cut is None else (cut, True)


def _drawn(logits: Float[Tensor, " vocabulary"], top_k: int, stream: np.random.RandomState) -> int:
    """One of the most probable tokens: the first whose cumulative renormalised probability exceeds the drawn number."""
    values, tokens = measures.log_probabilities(logits).topk(top_k)
    reached = values.double().softmax(dim=-1).cumsum(dim=-1)
    place = int((reached <= stream.random_sample()).sum())
    return int(tokens[min(place, top_k - 1)])

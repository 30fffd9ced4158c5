"""How many of the tokens that a state speaks for are attributes of the subject: the attributes rate.

Source: Geva et al. 2023 (arXiv 2304.14767), section 5.

1. Project the state with the output embedding alone (``E h``) and take the top 500 tokens.
2. Drop stop words, tokens of fewer than 3 characters and the subject's own tokens; keep the first m = 50.
3. rate = 100 * (kept tokens that are attribute tokens) / (kept tokens), tokens compared as they are, leading space
   included. With few attributes it saturates: its ceiling is 100 * min(number of attributes, m) / m.
4. The null is the rate for other subjects' attributes, without those that the subject has too. Precision is the rate
   with m = the number of attributes.

The released notebook leaves the subject's own tokens in (``notebook``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
from jaxtyping import Float
from torch import Tensor

from factscope.datasets.attributes import read_source
from factscope.datasets.token_filter import TokenFilter, attribute_tokens, name_tokens
from factscope.errors import SpecError, SubjectError
from factscope.models.handle import ModelHandle
from factscope.models.head import distribution_of_states
from factscope.tokens import TokenizedQuery, token_text

TOP = 500
"""Tokens of the projection that are looked at."""
KEPT = 50
"""m: tokens that are kept of them."""
MAX_OTHERS = 100
_SPARE = 4
"""So many times more subjects are drawn than are needed: some have no attribute of their own."""


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """One attribute token."""

    id: int
    text: str
    display: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Attributes:
    """What counts as an attribute of a query's subject, and of other subjects.

    Attributes:
        source: what the text's source is called, with the fingerprint of its content.
        own: the subject's attribute tokens, at least one.
        others: those of each drawn other subject, shared ones left out.
        kept: m. top: tokens of the projection that are looked at.
        warnings: sentences for the user.
    """

    model: ModelHandle
    source: str
    own: tuple[int, ...]
    others: tuple[tuple[int, ...], ...]
    kept: int
    top: int
    tokens: TokenFilter
    warnings: tuple[str, ...]

    @property
    def ceiling(self) -> float:
        """The highest rate that so many attributes allow, in percent."""
        return 100.0 * min(len(self.own), self.kept) / self.kept

    @cached_property
    def listed(self) -> tuple[Attribute, ...]:
        """The attribute tokens in words."""
        named = ((id, *token_text(self.model.tokenizer, id)) for id in self.own)
        return tuple(Attribute(id=id, text=text, display=display) for id, text, display in named)

    @cached_property
    def _sets(self) -> np.ndarray:
        """[set, token]: the subject's own attributes, then the others'."""
        member = np.zeros((1 + len(self.others), self.model.vocabulary), dtype=bool)
        for row, ids in zip(member, (self.own, *self.others), strict=True):
            row[list(ids)] = True
        return member

    def rates(self, states: Float[Tensor, "state d_model"]) -> Rates:
        """The rates of some states.

        Raises:
            CapabilityError: the states are not as wide as the output embedding.
        """
        top = min(self.top, self.model.vocabulary)
        ids = distribution_of_states(self.model, states, (0,), top, raw=True).top_ids.cpu().numpy()
        different, inverse = np.unique(ids, return_inverse=True)
        keeps = np.array([self.tokens.keeps(int(id)) for id in different])[inverse].reshape(ids.shape)
        place = np.where(keeps, keeps.cumsum(axis=1), 0)
        within = keeps & (place <= self.kept)
        counted = np.maximum(within.sum(axis=1), 1)
        hits = self._sets[:, ids]
        found = 100.0 * (hits & within).sum(axis=2) / counted
        first = keeps & (place <= len(self.own))
        places = np.zeros((len(ids), len(self.own)), dtype=np.int32)
        column = {id: i for i, id in enumerate(self.own)}
        for state, rank in zip(*np.nonzero(hits[0] & within), strict=True):
            places[state, column[int(ids[state, rank])]] = place[state, rank]
        return Rates(
            rate=found[0],
            others=found[1:],
            precision=100.0 * (hits[0] & first).sum(axis=1) / np.maximum(first.sum(axis=1), 1),
            places=places,
            counted=within.sum(axis=1),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Rates:
    """What some states came to, in percent.

    Attributes:
        rate: [state]. others: [draw, state]. precision: [state], with m = the number of attributes.
        places: [state, attribute]: place of each attribute among the kept tokens, from 1; 0 where it is not kept.
        counted: [state]: how many tokens were kept; fewer than m where the filter left fewer of the top ones.
    """

    rate: np.ndarray
    others: np.ndarray
    precision: np.ndarray
    places: np.ndarray
    counted: np.ndarray


def gather(
    model: ModelHandle,
    query: TokenizedQuery,
    source: str,
    *,
    kept: int | None = KEPT,
    top: int = TOP,
    others: int = 10,
    notebook: bool = False,
    seed: int = 1,
) -> Attributes:
    """The attribute tokens of a query's subject and of other subjects.

    Args:
        source: "bundled", a CSV file or a folder of text.
        kept: m; None takes the number of attributes.
        others: how many other subjects are drawn. seed: of the draw.
        notebook: leave the subject's own tokens in.

    Raises:
        SpecError: a number is out of range.
        DatasetError: the source cannot be used.
        SubjectError: no subject is named, or the source has no attributes of it.
    """
    _check(kept, top, others)
    if query.subject is None or not query.subject_text:
        raise SubjectError("the attributes rate is about a subject, and none is named", "name the subject")
    subject, prompt = query.subject_text, query.query.prompt
    texts = read_source(source)
    own_ids = name_tokens(model.tokenizer, subject, query.ids[slice(*query.subject)])
    tokens = TokenFilter(model.tokenizer, () if notebook else own_ids)

    def ids_of(paragraphs: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(id for id in attribute_tokens(model.tokenizer, paragraphs, tokens) if id < model.vocabulary)

    own = ids_of(texts.about(subject, prompt))
    if not own:
        raise SubjectError(
            f"no attributes of {subject[:60]!r} are known: {texts.label} say nothing about it that could be one",
            "choose a CSV file with columns subject and paragraphs, or a folder of text about it",
        )
    drawn = (ids_of(paragraphs) for paragraphs in texts.others(subject, _SPARE * others, seed, prompt))
    different = (tuple(id for id in ids if id not in own) for ids in drawn)
    told = tuple(islice((ids for ids in different if ids), others))
    warnings: tuple[str, ...] = ()
    if len(told) < others:
        warnings = (
            f"only {len(told)} of {others} other subjects could be drawn from {texts.label}"
            + ("" if told else ": without a null no rate says anything"),
        )
    return Attributes(
        model=model,
        source=f"{texts.label} {texts.fingerprint}",
        own=own,
        others=told,
        kept=len(own) if kept is None else kept,
        top=top,
        tokens=tokens,
        warnings=warnings,
    )


def _check(kept: int | None, top: int, others: int) -> None:
    if not 1 <= top <= 10_000:
        raise SpecError(f"top {top} is not between 1 and 10,000", "choose a number in that range")
    if kept is not None and not 1 <= kept <= top:
        raise SpecError(f"kept {kept} is not between 1 and the {top} tokens looked at", "choose a number in that range")
    if not 0 <= others <= MAX_OTHERS:
        raise SpecError(f"others {others} is not between 0 and {MAX_OTHERS}", "choose a number in that range")

"""A fact's prompt in its contexts, as rows of tokens: which token is edited, and which positions are read.

1. Every context template takes the prompt, the prompt takes the subject; the whole is tokenized at once, and the
   subject is found by its characters, so that tokens may merge across any border.
2. The target's tokens but the last follow, the same in every row: the target's as a continuation of the plain prompt.
3. One more row, "{subject} is a", is there for the essence of the subject (ROME's KL term).
4. Rows are padded on the right. A causal model never looks there.

The released code of ROME finds the subject by tokenizing the text before it apart, and the token ``last`` at the padded
row's end, which with targets of several tokens or contexts of several lengths is another token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from factscope.editors.specs import FactToken
from factscope.errors import PromptError, SpecError
from factscope.models.handle import ModelHandle
from factscope.models.reading import checked_target, tokenized
from factscope.queries import Query
from factscope.tokens import Target, TokenizedQuery, find_occurrences

if TYPE_CHECKING:
    from factscope.editors.edit import EditFact

PLAIN = "{}"
"""The context that adds nothing."""
ESSENCE = "{} is a"
"""What is to follow as before: what kind of thing the subject is."""

_NAMES: dict[FactToken, str] = {
    "subject_last": "subject-last",
    "subject_first": "subject-first",
    "subject_first_after_last": "subject-after",
    "last": "last",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Tokenized prompts, padded on the right.

    Attributes:
        lengths: tokens of each row without padding.
        subjects: each row's subject, positions [start, stop).
        at: each row's edited token.
        read: positions whose logits are read; a row that reads fewer names its last one again.
        essence: whether the last row is the one about the subject's essence.
    """

    ids: Int[Tensor, "row position"]
    lengths: tuple[int, ...]
    subjects: tuple[tuple[int, int], ...]
    at: tuple[int, ...]
    read: Int[Tensor, "row place"]
    essence: bool

    @property
    def n_prompts(self) -> int:
        """Rows that ask for the target."""
        return len(self.at) - self.essence


def asked(model: ModelHandle, fact: EditFact, template: str = PLAIN) -> TokenizedQuery:
    """The fact's prompt in a context, as this model's tokenizer sees it.

    Raises:
        InputError: the prompt or the subject cannot be used.
        ModelFilesError: the tokenizer is not this model's.
    """
    if fact.prompt.count(PLAIN) != 1:
        raise PromptError(
            f"the prompt {fact.prompt[:80]!r} has {fact.prompt.count(PLAIN)} places for the subject",
            "write it once, as in '{} plays the'",
        )
    before, after = fact.prompt.split(PLAIN)
    front, back = template.split(PLAIN)
    return _tokenized(model, front + before, fact.subject, after + back)


def about(model: ModelHandle, fact: EditFact) -> TokenizedQuery:
    """The prompt that asks for the essence of the subject, tokenized."""
    before, after = ESSENCE.split(PLAIN)
    return _tokenized(model, before, fact.subject, after)


def _tokenized(model: ModelHandle, before: str, subject: str, after: str) -> TokenizedQuery:
    text = before + subject + after
    starts = find_occurrences(text, subject) if subject else []
    occurrence = starts.index(len(before)) + 1 if len(before) in starts else None
    return tokenized(model, Query(prompt=text, subject=subject, occurrence=occurrence))


def target_of(model: ModelHandle, fact: EditFact, text: str, *, what: str = "target") -> Target:
    """A text as a continuation of the fact's plain prompt.

    Raises:
        TargetError: it is empty, has no tokens, or makes the prompt too long.
    """
    return checked_target(model, asked(model, fact), text, what)


def rows(
    model: ModelHandle,
    fact: EditFact,
    templates: Sequence[str],
    target: Target,
    fact_token: FactToken = "subject_last",
    *,
    essence: bool = False,
) -> Rows:
    """The fact's prompt in every context, the target behind it.

    Raises:
        InputError: the prompt, the subject or the fact token cannot be used, or a row is too long for the model.
    """
    if fact_token not in _NAMES:
        raise SpecError(f"fact token {fact_token!r} is unknown", f"choose one of {', '.join(_NAMES)}")
    seen = [asked(model, fact, template) for template in templates]
    ids = [[*one.ids, *target.ids[:-1]] for one in seen]
    read = [list(range(one.last, one.last + target.n_tokens)) for one in seen]
    if essence:
        seen.append(about(model, fact))
        ids.append(list(seen[-1].ids))
    at = [one.positions(_NAMES[fact_token])[0] for one in seen]
    if essence:
        read.append([at[-1]] * target.n_tokens)
    longest = max(map(len, ids))
    if model.max_tokens is not None and longest > model.max_tokens:
        raise PromptError(
            f"a context makes the prompt {longest} tokens long, and {model.info.name} takes {model.max_tokens}",
            "shorten the prompt, or edit without contexts",
        )
    padded = [[*row, *[row[-1]] * (longest - len(row))] for row in ids]
    return Rows(
        ids=torch.tensor(padded, device=model.device),
        lengths=tuple(map(len, ids)),
        subjects=tuple(one.subject for one in seen if one.subject is not None),
        at=tuple(at),
        read=torch.tensor(read, device=model.device),
        essence=essence,
    )

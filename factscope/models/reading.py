"""What a model is asked: prompts and answers as its tokenizer sees them, refused where it cannot read them."""

from __future__ import annotations

from factscope.errors import ModelFilesError, TargetError
from factscope.models.handle import ModelHandle
from factscope.queries import Query
from factscope.settings import get_settings
from factscope.tokens import Target, TokenizedQuery, answer_target, tokenize


def tokenized(model: ModelHandle, query: Query | TokenizedQuery) -> TokenizedQuery:
    """The query as this model's tokenizer sees it.

    Raises:
        InputError: the prompt, subject or span cannot be used.
        ModelFilesError: the tokenizer is not this model's.
    """
    if isinstance(query, TokenizedQuery):
        seen = query
    else:
        settings = get_settings()
        limit = min(model.max_tokens or settings.max_prompt_tokens, settings.max_prompt_tokens)
        seen = tokenize(query, model.tokenizer, max_tokens=limit, max_characters=settings.max_prompt_chars)
    _check_ids(model, seen.ids)
    return seen


def checked_target(model: ModelHandle, query: TokenizedQuery, text: str, what: str) -> Target:
    """A text as a continuation of this prompt that the model can read.

    Args:
        what: how a refusal calls it.

    Raises:
        TargetError: it has no tokens, or makes the prompt too long.
        ModelFilesError: the tokenizer is not this model's.
    """
    target = answer_target(model.tokenizer, query, text, what=what)
    _check_ids(model, target.ids)
    length = len(query.ids) + target.n_tokens - 1
    if model.max_tokens is not None and length > model.max_tokens:
        raise TargetError(
            f"the {what} {text[:40]!r} makes {length} tokens with the prompt, and {model.info.name} takes "
            f"{model.max_tokens}",
            f"shorten the {what} or the prompt",
        )
    return target


def _check_ids(model: ModelHandle, ids: tuple[int, ...]) -> None:
    if max(ids) >= model.vocabulary:
        raise ModelFilesError(
            f"token id {max(ids)} of the tokenizer is beyond the {model.vocabulary} tokens of {model.info.name}",
            "use the tokenizer that belongs to this model",
        )

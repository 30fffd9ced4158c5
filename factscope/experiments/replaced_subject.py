"""The same question about another subject: its tokens in the place of the first one's (Zhang and Nanda 2023).

A corrupted run that is a sentence of its own (arXiv 2309.16042, section 2: symmetric token replacement) shows a state
that the model meets in earnest, where noise may not. Tokens are aligned one for one, so the two subjects must have as
many, and everything around them must stay as it is.
"""

from __future__ import annotations

from dataclasses import replace

from factscope.errors import SubjectError
from factscope.experiments.results import tokenized
from factscope.models.handle import ModelHandle
from factscope.tokens import TokenizedQuery


def with_subject(model: ModelHandle, query: TokenizedQuery, subject: str) -> TokenizedQuery:
    """The query with another subject at the same positions.

    Raises:
        SubjectError: it is empty or the same, has another number of tokens, or changes tokens around it.
    """
    name = subject.strip()
    if query.subject is None or query.subject_text is None:
        raise SubjectError("a subject can be replaced only where the query has one", "give the subject's text")
    if not name:
        raise SubjectError("the subject to put in is empty", "type another subject")
    start, stop = query.subject
    first = query.subject_text
    prompt = prompt_about(query, name, instead="corrupt the subject with noise")
    other = tokenized(model, replace(query.query, prompt=prompt, subject=None, span=None, occurrence=None, answer=None))
    longer = len(other.ids) - len(query.ids)
    if longer:
        raise SubjectError(
            f"{_short(name)} takes {stop - start + longer} tokens here and {_short(first)} {stop - start}",
            "choose a subject of as many tokens, or corrupt with noise",
        )
    if other.ids[:start] != query.ids[:start] or other.ids[stop:] != query.ids[stop:]:
        raise SubjectError(
            f"{_short(name)} merges with the words around it into other tokens", "choose another subject"
        )
    if other.ids == query.ids:
        raise SubjectError(f"{_short(name)} has the same tokens as the subject itself", "choose another subject")
    span = replace(query.query, prompt=prompt, subject=name, span=(start, stop), occurrence=None, answer=None)
    return tokenized(model, span)


def prompt_about(query: TokenizedQuery, subject: str, *, instead: str) -> str:
    """The query's prompt with another subject's words in the place of its own.

    A tokenizer that begins each text with a space gives one to its first token, which is not the prompt's.

    Args:
        query: has a subject. instead: what else to try where that cannot be.

    Raises:
        SubjectError: the tokens do not spell the prompt, or their words are not the subject's.
    """
    assert query.subject is not None
    assert query.subject_text is not None
    start, stop = query.subject
    prompt, own = query.query.prompt, query.subject_text.strip()
    before, middle, after = (
        "".join(token.text for token in part if token.role != "special")
        for part in (query.tokens[:start], query.tokens[start:stop], query.tokens[stop:])
    )
    if (before + middle + after).lstrip(" ") != prompt.lstrip(" ") or own not in middle:
        raise SubjectError(
            f"the tokens of {_short(own)} do not spell the prompt, so that nothing can be put in their place",
            f"choose another prompt, or {instead}",
        )
    spaces = prompt[: len(prompt) - len(prompt.lstrip(" "))]
    return spaces + (before + middle.replace(own, subject, 1) + after).lstrip(" ")


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")

"""What must be true of any text: it becomes positions that keep their promises, or a sentence says why not."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer

from factscope.errors import FactScopeError, PromptError, SubjectError, TargetError
from factscope.queries import Query
from factscope.tokens import TokenizedQuery, answer_target, find_occurrences, token_text, tokenize

KINDS = ("byte", "byte_trim", "metaspace", "prepend", "word", "slow")
WORDS = (
    *("Beats Music is owned by the capital of Japan Zürich São 東京 日本の首都は 😀 👋🏽 👩‍💻 Kraków".split()),
    *("<s>", "</s>", "<unk>", "<E2>", "▁", "Ġ", "e\u0301", "\u0301", "\u200b", "\ufffd", "ﬁ", "İ", "שלום", "\u202e"),
    *(" ", "  ", "\n", "\t", "\r\n", ".", "''"),
)

texts = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(WORDS), max_size=10).map(" ".join),
    st.lists(st.sampled_from(WORDS), max_size=10).map("".join),
    st.text(alphabet=st.characters(min_codepoint=0x300, max_codepoint=0x2FFFF, exclude_categories=["Cs"]), max_size=12),
)
positions = st.integers(min_value=-2, max_value=60)
check = settings(suppress_health_check=[HealthCheck.filter_too_much])
every_tokenizer = pytest.mark.parametrize("kind", KINDS)
with_and_without_bos = pytest.mark.parametrize("bos", [True, False], ids=["bos", "no_bos"])


@functools.cache
def tokenizer_of(kind: str, bos: bool) -> Any:
    return tiny_tokenizer(kind, bos=bos)


def printable(text: str) -> bool:
    """Whether all can be seen; joiners stay, since emoji need them."""
    return text.replace("\u200c", "").replace("\u200d", "").isprintable()


def bytes_again(text: str) -> str:
    """The text with ``<E6><9D><B1>`` put together again."""
    written = re.sub("<([0-9A-F]{2})>", lambda found: chr(0xDC00 + int(found[1], 16)), text)
    return written.encode(errors="surrogateescape").decode(errors="surrogateescape")


def decoded(tokenizer: Any, tokenized: TokenizedQuery) -> str:
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    ids = [id for id in tokenized.ids if id not in special]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""


@every_tokenizer
@with_and_without_bos
@check
@given(prompt=texts)
@example(prompt="Beats Music is owned by ")
@example(prompt="<s>")
@example(prompt="\ufffd" * 60)
@example(prompt="東京\ufffd京😀")
def test_any_prompt_becomes_tokens_or_a_sentence(kind: str, bos: bool, prompt: str) -> None:
    tokenizer = tokenizer_of(kind, bos)
    try:
        tokenized = tokenize(Query(prompt=prompt), tokenizer)
    except PromptError as error:
        assert printable(str(error)) and error.what and error.try_
        return
    read = tokenized.query.prompt
    assert read == read.rstrip() and prompt.replace("\r\n", "\n").replace("\r", "\n").startswith(read)
    assert list(tokenized.ids) == list(tokenizer(read)["input_ids"])
    assert [token.id for token in tokenized.tokens] == list(tokenized.ids)
    assert [token.position for token in tokenized.tokens] == list(range(len(tokenized.ids)))
    assert all(token.display and printable(token.display) for token in tokenized.tokens)
    assert tokenized.tokens[-1].role == "last" and tokenized.positions("last") == (tokenized.last,)
    assert tokenized.exact_offsets == (kind != "slow")
    roles = [token.position for name in ("special", "relation") for token in tokenized.tokens if token.role == name]
    assert sorted([*roles, tokenized.last]) == list(range(len(tokenized.ids)))
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    shown = "".join(token.text for token in tokenized.tokens if token.id not in special)
    if not re.search("<[0-9A-F]{2}>", read):
        assert bytes_again(shown) == decoded(tokenizer, tokenized)


@every_tokenizer
@with_and_without_bos
@check
@given(before=texts, subject=texts, after=texts, occurrence=st.one_of(st.none(), st.integers(-1, 4)))
@example(before="The ", subject="Eiffel Tower", after=" is in", occurrence=None)
@example(before="", subject="東京", after="は日本の", occurrence=1)
@example(before="a", subject="👩\u200d💻", after="b", occurrence=1)
@example(before="<s>", subject="<s>", after="a", occurrence=1)
def test_the_subject_is_covered_or_a_sentence_says_why_not(
    kind: str, bos: bool, before: str, subject: str, after: str, occurrence: int | None
) -> None:
    tokenizer = tokenizer_of(kind, bos)
    query = Query(prompt=before + subject + after, subject=subject, occurrence=occurrence)
    try:
        tokenized = tokenize(query, tokenizer)
    except FactScopeError as error:
        assert isinstance(error, PromptError | SubjectError) and printable(str(error))
        return
    assert tokenized.subject is not None
    start, stop = tokenized.subject
    assert 0 <= start < stop <= len(tokenized.ids)
    inside = tokenized.positions("subject")
    assert inside and set(inside) <= set(range(start, stop))
    assert tokenized.last not in inside or inside == (tokenized.last,)
    assert tokenized.positions("subject-first") == (start,) and tokenized.positions("subject-last") == (stop - 1,)
    assert not set(inside) & set(tokenized.positions("relation"))
    assert not {tokenized.last, *inside} & set(tokenized.positions("special"))
    apart = {"subject", "relation", "special"}
    assert sum(len(tokenized.positions(name)) for name in apart) + (tokenized.last not in inside) == len(tokenized.ids)
    plain = " ".join(subject.replace("\r\n", "\n").replace("\r", "\n").split())
    covered = " ".join(bytes_again("".join(token.text for token in tokenized.tokens[start:stop])).split())
    exact = kind.startswith("byte") or kind in ("metaspace", "prepend", "slow")
    literal = not re.search("<[0-9A-F]{2}>", query.prompt) and subject in query.prompt
    if exact and literal and "▁" not in plain and not re.search("</?s>|<unk>", query.prompt):
        assert plain in covered


@every_tokenizer
@check
@given(prompt=texts, start=positions, stop=positions)
def test_a_span_chosen_by_hand_is_kept_or_refused(kind: str, prompt: str, start: int, stop: int) -> None:
    tokenizer = tokenizer_of(kind, True)
    try:
        tokenized = tokenize(Query(prompt=prompt, subject="not looked for", span=(start, stop)), tokenizer)
    except FactScopeError as error:
        assert printable(str(error))
        return
    assert tokenized.subject == (start, stop) and 1 <= start < stop <= len(tokenized.ids)


@every_tokenizer
@with_and_without_bos
@check
@given(prompt=texts, answer=texts)
@example(prompt="Beats Music is owned by ", answer="Apple")
@example(prompt="日本の首都は", answer="東京")
def test_an_answer_continues_the_prompt(kind: str, bos: bool, prompt: str, answer: str) -> None:
    tokenizer = tokenizer_of(kind, bos)
    try:
        tokenized = tokenize(Query(prompt=prompt), tokenizer)
    except PromptError:
        assume(False)
        raise
    try:
        target = answer_target(tokenizer, tokenized, answer)
    except TargetError as error:
        assert printable(str(error))
        return
    assert target.ids and target.id == target.ids[0] and target.n_tokens == len(target.ids) and target.text
    if kind.startswith("byte") and not re.search("</?s>", answer + prompt):
        assert target.text.strip() == answer.strip()


@every_tokenizer
def test_every_token_of_the_vocabulary_has_a_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind, True)
    for id in range(len(tokenizer) + 3):
        text, display = token_text(tokenizer, id)
        assert text and display and printable(display) and "\ufffd" not in text


@check
@given(name=st.one_of(st.text(max_size=12), st.from_regex(r"\s*\d{1,12}\s*(-\s*\d{1,4})?\s*", fullmatch=True)))
def test_any_name_of_positions_is_met_or_refused(name: str) -> None:
    tokenized = tokenize(Query(prompt="Beats Music is owned by", subject="Music"), tokenizer_of("word", True))
    try:
        found = tokenized.positions(name)
    except FactScopeError as error:
        assert printable(str(error))
        return
    assert all(0 <= position <= tokenized.last for position in found)


@check
@given(before=texts, subject=texts, after=texts)
def test_a_subject_that_is_there_is_found(before: str, subject: str, after: str) -> None:
    starts = find_occurrences(before + subject + after, subject)
    assert starts == sorted(set(starts))
    assert (len(before) in starts) == bool(subject)

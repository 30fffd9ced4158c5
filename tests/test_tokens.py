"""Prompts, subjects, answers and odd text in positions: one case per rule, on every kind of tokenizer."""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest
from tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from factscope.errors import PromptError, SpecError, SubjectError, TargetError
from factscope.queries import Query
from factscope.tokens import TokenizedQuery, answer_target, find_occurrences, token_text, tokenize

KINDS = ("byte", "byte_trim", "metaspace", "prepend", "word", "slow")
every_kind = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("bos", [True, False], ids=["bos", "no_bos"])


@functools.cache
def tokenizer_of(kind: str, bos: bool = True) -> Any:
    return tiny_tokenizer(kind, bos=bos)


def of(
    prompt: str, subject: str | None = None, *, kind: str = "byte", tokenizer: Any = None, **query: Any
) -> TokenizedQuery:
    return tokenize(Query(prompt=prompt, subject=subject, **query), tokenizer or tokenizer_of(kind))


def covered(tokenized: TokenizedQuery) -> str:
    assert tokenized.subject is not None
    return "".join(token.text for token in tokenized.tokens[slice(*tokenized.subject)]).strip()


# ------------------------------------------------------------------------------------------------------ the subject


@every_kind
@both
@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("Beats Music is owned by", "Beats Music"),
        ("The Eiffel Tower is located in the city of", "Eiffel Tower"),
        ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux"),
        ("The capital of Japan", "Japan"),
    ],
)
def test_the_subject_is_exactly_its_words(kind: str, bos: bool, prompt: str, subject: str) -> None:
    tokenized = of(prompt, subject, tokenizer=tokenizer_of(kind, bos))
    assert covered(tokenized) == subject
    assert list(tokenized.ids) == list(tokenizer_of(kind, bos)(prompt)["input_ids"])
    assert tokenized.exact_offsets == (kind != "slow")
    roles = "".join(token.role[0] for token in tokenized.tokens)
    assert roles.endswith("l") and roles.count("l") == 1
    assert (tokenized.tokens[0].role == "special") == bos
    assert (tokenized.positions("special") == (0,)) == bos


@every_kind
def test_the_subject_may_be_hidden_in_bytes(kind: str) -> None:
    for prompt, subject in [
        ("the capital of 日本 is", "日本"),
        ("in 東京 and Kraków we", "東京"),
        ("is Zürich in", "Zürich"),
    ]:
        tokenized = of(prompt, subject, kind=kind)
        assert tokenized.subject is not None
        start, stop = tokenized.subject
        decoded = tokenizer_of(kind).decode(list(tokenized.ids[start:stop]))
        assert decoded.strip() == subject


@every_kind
def test_emoji_of_several_code_points(kind: str) -> None:
    hand, coder = "👋🏽", "👩\u200d💻"
    tokenized = of(f"{hand} stands beside {coder} as a", coder, kind=kind)
    assert tokenized.subject is not None
    if kind != "word":
        assert tokenizer_of(kind).decode(list(tokenized.ids[slice(*tokenized.subject)])).strip() == coder
    assert of(f"wave {hand} is a", hand, kind=kind).subject is not None


@every_kind
def test_right_to_left_text(kind: str) -> None:
    tokenized = of("ירושלים היא עיר של", "היא", kind=kind)
    if kind != "word":
        assert tokenizer_of(kind).decode(list(tokenized.ids[slice(*tokenized.subject or (0, 0))])).strip() == "היא"


@every_kind
def test_newlines_and_tabs_inside_the_prompt(kind: str) -> None:
    tokenized = of("Beats\nMusic\tis\n\nowned by", "Beats\nMusic", kind=kind)
    assert tokenized.subject is not None
    assert covered(tokenized).split() == ["Beats", "Music"]
    shown = "".join(token.display for token in tokenized.tokens)
    assert "\n" not in shown and "\t" not in shown
    if kind not in ("word",):
        assert "↵" in shown and "⇥" in shown


def test_accents_match_however_they_are_composed() -> None:
    composed, apart = "Zürich", "Zu\u0308rich"
    for written, sought in [(composed, apart), (apart, composed)]:
        prompt = f"The city of {written} is in"
        tokenized = of(prompt, sought)
        assert tokenized.subject is not None
        assert tokenizer_of("byte").decode(list(tokenized.ids[slice(*tokenized.subject)])).strip() == written
        assert find_occurrences(prompt, sought) == [12]
    assert find_occurrences("the ﬁre and ２０", "fire") == [4]
    assert find_occurrences("the ﬁre and ２０", "20") == [12]


def test_a_letter_is_not_found_inside_an_accented_one() -> None:
    assert find_occurrences("Zürich", "Zu") == []
    assert find_occurrences("a\u0323\u0302 b", "a\u0302\u0323") == [0]
    assert find_occurrences("ﬁ", "f") == []


def test_occurrences_overlap_and_nothing_is_never_found() -> None:
    assert find_occurrences("banana", "ana") == [1, 3]
    assert find_occurrences("Rome, Rome", "Rome") == [0, 6]
    assert find_occurrences("Rome", "") == []


@every_kind
def test_a_repeated_subject_needs_an_occurrence(kind: str) -> None:
    prompt = "Apple is not owned by Apple but by"
    with pytest.raises(SubjectError, match=r"2 times.*1 at character 0.*2 at character 22.*occurrence 1 to 2"):
        of(prompt, "Apple", kind=kind)
    first, second = (of(prompt, "Apple", kind=kind, occurrence=number).subject for number in (1, 2))
    assert first is not None and second is not None and first[1] < second[0]
    for number in (0, 3, -1):
        with pytest.raises(SubjectError, match=f"occurrence {number} of"):
            of(prompt, "Apple", kind=kind, occurrence=number)


def test_the_first_occurrence_of_one_may_be_named() -> None:
    assert of("Beats Music is owned by", "Music", occurrence=1).subject is not None
    with pytest.raises(SubjectError, match="use occurrence 1"):
        of("Beats Music is owned by", "Music", occurrence=2)


@pytest.mark.parametrize(
    ("subject", "sentence"),
    [
        ("", "the subject is empty"),
        (" \n", "the subject is empty"),
        ("Louvre", '"Louvre" is not in the prompt'),
        ("eiffel tower", 'did you mean "Eiffel Tower"[?]$'),
        ("Eifel Tower", 'did you mean "Eiffel Tower"[?]$'),
        ("Éiffel Tower", 'did you mean "Eiffel Tower"[?]$'),
        ("The Eiffel Tower is in", "leaves nothing that asks"),
        ("\ud800", "<U\\+D800>"),
        ("\x00", "<U\\+0000>"),
    ],
)
def test_subjects_that_cannot_be_used(subject: str, sentence: str) -> None:
    with pytest.raises(SubjectError, match=sentence) as caught:
        of("The Eiffel Tower is in", subject)
    assert str(caught.value).isprintable()


@every_kind
def test_the_whole_prompt_is_no_subject(kind: str) -> None:
    with pytest.raises(SubjectError, match="leaves nothing"):
        of("Beats Music", "Beats Music", kind=kind)


@every_kind
def test_a_special_token_is_no_subject(kind: str) -> None:
    with pytest.raises(SubjectError, match=r"covers no token|is missing"):
        of("we read <s> as text", "<s>", kind=kind)


def test_a_chosen_span_overrides_the_search() -> None:
    tokenized = of("Beats Music is owned by", "not in it", kind="word", span=(2, 4))
    assert tokenized.subject == (2, 4) and tokenized.positions("subject") == (2, 3)
    for span, sentence in [
        ((3, 3), "3 to 3 is not a range"), ((4, 2), "4 to 2"), ((-1, 2), "-1 to 2"), ((2, 9), "has 6 tokens"),
        ((0, 2), "position 0, a special token"),
    ]:  # fmt: skip
        with pytest.raises(SpecError, match=sentence):
            of("Beats Music is owned by", kind="word", span=span)
    with pytest.raises(SubjectError, match="leaves nothing"):
        of("Beats Music is owned by", kind="word", span=(1, 6))


def test_tokens_that_merge_across_the_border_are_shown() -> None:
    merged = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[U]": 0, "Smiths'": 1, "house": 2}, unk_token="[U]")),
        unk_token="[U]",
    )
    merged.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenized = of("The Smiths' house", "Smiths", tokenizer=merged)
    assert tokenized.subject == (1, 2)
    assert any('cover "Smiths\'", not only "Smiths"' in warning for warning in tokenized.warnings)


def test_no_subject_is_a_query_too() -> None:
    tokenized = of("Beats Music is owned by", kind="word")
    assert tokenized.subject is None
    assert tokenized.positions("relation") == (1, 2, 3, 4)
    with pytest.raises(SubjectError, match="has none"):
        tokenized.positions("subject")


# ------------------------------------------------------------------------------------------------------- positions


def test_names_of_positions() -> None:
    tokenized = of("The capital of Japan is", "capital of", kind="word")
    for name, expected in {
        "subject": (2, 3), "subject-first": (2,), "subject-last": (3,), "subject-after": (4,), "relation": (1, 4),
        "last": (5,), "LAST": (5,), "special": (0,), "0": (0,), "2-4": (2, 3, 4), " 3 - 3 ": (3,),
    }.items():  # fmt: skip
        assert tokenized.positions(name) == expected, name


@pytest.mark.parametrize("name", ["7", "1-9", "4-2", "-1", "each", "", "subject-middle", "2.0", "nan", "٣", "1" * 30])
def test_names_of_no_positions(name: str) -> None:
    tokenized = of("The capital of Japan is", "capital of", kind="word")
    with pytest.raises(SpecError) as caught:
        tokenized.positions(name)
    assert name.rpartition("-")[2] in str(caught.value)


def test_the_last_position_leaves_the_subject_unless_it_is_all_of_it() -> None:
    two = of("The capital of Miles Davis", "Miles Davis", kind="word")
    assert two.subject == (4, 6)
    assert [token.role for token in two.tokens[4:]] == ["subject", "last"]
    assert two.positions("subject") == (4,) and two.positions("subject-last") == two.positions("last") == (5,)
    one = of("The capital of Japan", "Japan", kind="word")
    assert one.positions("subject") == one.positions("last") == (4,)
    with pytest.raises(SpecError, match="subject-after"):
        one.positions("subject-after")


# ------------------------------------------------------------------------------------------------------------- BOS


@every_kind
def test_bos_as_the_tokenizer_does_always_or_never(kind: str) -> None:
    prompt = "The capital of Japan is"
    bare, started = tokenizer_of(kind, False), tokenizer_of(kind, True)
    bos = started.bos_token_id
    plain = tuple(bare(prompt)["input_ids"])
    assert of(prompt, tokenizer=bare).ids == of(prompt, tokenizer=bare, bos="no").ids == plain
    assert of(prompt, tokenizer=bare, bos="yes").ids == (bos, *plain)
    for choice in ("auto", "yes"):
        assert of(prompt, tokenizer=started, bos=choice).ids == (bos, *plain)
    assert of(prompt, tokenizer=started, bos="no").ids == plain
    subject = [of(prompt, "Japan", tokenizer=bare, bos=choice).subject for choice in ("no", "yes")]
    assert subject[0] and subject[1] == (subject[0][0] + 1, subject[0][1] + 1)
    with pytest.raises(SpecError, match="maybe"):
        of(prompt, tokenizer=bare, bos="maybe")


def test_bos_falls_back_on_eos_or_is_refused() -> None:
    only_eos = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of("byte", False).backend_tokenizer, eos_token="</s>")
    assert of("a b", tokenizer=only_eos, bos="yes").ids[0] == only_eos.eos_token_id
    neither = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of("byte", False).backend_tokenizer)
    with pytest.raises(SpecError, match="neither a BOS nor an EOS"):
        of("a b", tokenizer=neither, bos="yes")


@every_kind
def test_a_bos_typed_into_the_prompt_is_said(kind: str) -> None:
    tokenized = of("<s>Beats Music is owned by", "Music", kind=kind)
    assert list(tokenized.ids) == list(tokenizer_of(kind)("<s>Beats Music is owned by")["input_ids"])
    assert any("contains <s> right behind the same token" in warning for warning in tokenized.warnings)
    assert tokenized.positions("special") == (0, 1) and covered(tokenized) == "Music"
    alone = of("<s>Beats Music is owned by", "Music", tokenizer=tokenizer_of(kind, False), bos="yes")
    assert alone.positions("special") == (0,)


def test_an_eos_that_the_tokenizer_appends_is_left_out() -> None:
    ends = tiny_tokenizer("word", bos=False)
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenized = of("Beats Music is", tokenizer=ends)
    assert [token.text for token in tokenized.tokens] == ["<s>", "Beats", " Music", " is"]
    assert any("</s>; it was left out" in warning for warning in tokenized.warnings)


def test_one_token_may_be_bos_eos_and_unknown_as_in_gpt2() -> None:
    backend = tokenizer_of("byte", False).backend_tokenizer
    gpt2_like = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="</s>", eos_token="</s>", unk_token="</s>")
    tokenized = of("Beats Music is", "Music", tokenizer=gpt2_like, bos="yes", answer="Apple")
    assert tokenized.tokens[0].role == "special" and covered(tokenized) == "Music"
    assert not any("vocabulary" in warning for warning in tokenized.warnings)


def test_the_subject_at_position_0_is_flagged() -> None:
    flagged = of("Beats Music is owned by", "Beats", tokenizer=tokenizer_of("byte", False))
    assert any("position 0" in warning for warning in flagged.warnings)
    assert not of("Beats Music is owned by", "Beats").warnings
    assert not of("The Beats Music is", "Beats", tokenizer=tokenizer_of("byte", False)).warnings


# ------------------------------------------------------------------------------------------------------- the prompt


@every_kind
@pytest.mark.parametrize("tail", [" ", "   ", "\n", "\t \r\n", "\u3000"])
def test_white_space_at_the_end_is_removed_with_a_warning(kind: str, tail: str) -> None:
    tokenized = of("Beats Music is owned by" + tail, "Music", kind=kind)
    assert tokenized.ids == of("Beats Music is owned by", "Music", kind=kind).ids
    assert tokenized.query.prompt == "Beats Music is owned by"
    assert any("ended in white space" in warning for warning in tokenized.warnings)
    assert all(warning.isprintable() for warning in tokenized.warnings)


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("", "the prompt is empty"),
        ("   ", "only white space"),
        ("\n\t", "only white space"),
        ("a\x00b", r"U\+0000>, a control character, at character 1"),
        ("a\x1b[31mb", r"U\+001B"),
        ("a\x85b", r"U\+0085"),
        ("ab\ud83d", r"U\+D83D>, half of a surrogate pair, at character 2"),
        ("word " * 3000, "15,000 characters and at most 4,000"),
    ],
)
def test_prompts_that_cannot_be_used(prompt: str, sentence: str) -> None:
    with pytest.raises(PromptError, match=sentence) as caught:
        of(prompt)
    assert str(caught.value).isprintable()


def test_too_many_tokens_names_both_numbers() -> None:
    with pytest.raises(PromptError, match="has 9 tokens and the model reads at most 5"):
        tokenize(Query(prompt="a b c d e f g h"), tokenizer_of("word"), max_tokens=5)
    with pytest.raises(PromptError, match="has 5 characters and at most 4"):
        tokenize(Query(prompt="abcde"), tokenizer_of("word"), max_characters=4)


def test_a_prompt_without_a_token() -> None:
    deaf = tiny_tokenizer("byte", bos=True)
    deaf.backend_tokenizer.normalizer = normalizers.Replace("a", "")
    with pytest.raises(PromptError, match="makes no token"):
        of("aaa", tokenizer=deaf)


def test_carriage_returns_are_newlines() -> None:
    tokenized = of("Beats\r\nMusic\ris owned", "Beats\r\nMusic")
    assert tokenized.query.prompt == "Beats\nMusic\nis owned" and covered(tokenized) == "Beats\nMusic"
    assert any("Carriage returns" in warning for warning in tokenized.warnings)


def test_words_outside_the_vocabulary_are_said() -> None:
    tokenized = of("Beats Zeppelin is xyzzy", kind="word")
    assert any(warning.startswith("2 of the 5 tokens") for warning in tokenized.warnings)
    assert [token.role for token in tokenized.tokens] == ["special", "relation", "relation", "relation", "last"]


def test_a_long_prompt_takes_seconds_at_most() -> None:
    for kind in KINDS:
        for prompt in ("東京 " * 500 + "is", "\ufffd" * 800 + "a"):
            tokenizer_of(kind)
            started = time.perf_counter()
            of(prompt, kind=kind)
            assert time.perf_counter() - started < 20


# ---------------------------------------------------------------------------------------------------- token texts


def test_bytes_are_written_out() -> None:
    tokenized = of("in 東京 a", kind="metaspace")
    bytes_or_letters = "".join(token.text for token in tokenized.tokens)
    assert "東京" in bytes_or_letters or "<E6><9D><B1><E4><BA><AC>" in bytes_or_letters
    odd = of("Ǣ is", kind="byte")
    assert [token.display for token in odd.tokens][1:3] == ["<C7>", "<A2>"]


def test_what_is_on_screen() -> None:
    odd = tiny_tokenizer("slow")
    for piece, shown in {
        " a": "·a", "  ": "··", "\n": "↵", "\t": "⇥", "\u200b": "<U+200B>", "\u202ea": "<U+202E>a",
        "\u0301": "◌\u0301", "\u200d": "<U+200D>", "\xa0": "<U+00A0>",
    }.items():  # fmt: skip
        odd.convert_ids_to_tokens = lambda id, piece=piece: piece
        odd.decode = lambda ids, piece=piece, **options: piece
        assert token_text(odd, 200) == (piece, shown)
    start = of("Beats Music is").tokens[0]
    assert (start.text, start.display, start.role) == ("<s>", "<s>", "special")


@every_kind
def test_texts_put_together_are_the_prompt(kind: str) -> None:
    for prompt in ("Beats Music is owned by", "The Space Needle is in downtown", "LeBron James plays the sport of"):
        tokens = of(prompt, kind=kind).tokens
        assert "".join(token.text for token in tokens if token.role != "special") == prompt


@every_kind
def test_a_token_out_of_context_keeps_its_space(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    tokenized = of("Beats Music is owned by", kind=kind)
    spaced = next(token for token in tokenized.tokens if token.text == " is")
    assert token_text(tokenizer, spaced.id) in ((" is", "·is"), ("is", "is"))
    if kind != "word":
        assert token_text(tokenizer, spaced.id) == (" is", "·is")
    assert token_text(tokenizer, tokenizer.bos_token_id) == ("<s>", "<s>")
    for beyond in (len(tokenizer) + 5, 10**9):
        assert token_text(tokenizer, beyond) == (f"<token {beyond}>",) * 2


def test_a_byte_out_of_context() -> None:
    for kind, name in [("byte", "æ"), ("metaspace", "<0xE6>"), ("slow", "<0xE6>")]:
        tokenizer = tokenizer_of(kind)
        assert token_text(tokenizer, tokenizer.convert_tokens_to_ids(name)) == ("<E6>", "<E6>"), kind


# ---------------------------------------------------------------------------------------------------------- answers


@every_kind
@both
def test_an_answer_is_what_follows_the_prompt(kind: str, bos: bool) -> None:
    tokenizer = tokenizer_of(kind, bos)
    prompt = "Beats Music is owned by"
    tokenized = of(prompt, tokenizer=tokenizer)
    whole = tuple(tokenizer(prompt + " Apple")["input_ids"])
    for typed in ("Apple", " Apple", "Apple "):
        target = answer_target(tokenizer, tokenized, typed)
        assert tokenized.ids + target.ids == whole
        assert target.text == " Apple" and target.id == target.ids[0] and target.n_tokens == len(target.ids)


def test_an_answer_that_merges_with_the_prompt_is_tokenized_alone() -> None:
    names = ["<unk>", "▁", "a", "b", "c", "b▁", "b▁c", "▁c", "▁a"]
    merges = [("b", "▁"), ("b▁", "c"), ("▁", "c"), ("▁", "a")]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    merging = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    tokenized = of("a b", tokenizer=merging)
    assert merging("a b c")["input_ids"][: len(tokenized.ids)] != list(tokenized.ids)
    target = answer_target(merging, tokenized, "c")
    assert target.ids == (names.index("▁c"),) and target.text == " c"


def test_no_space_where_none_is_written() -> None:
    tokenizer = tokenizer_of("byte")
    for prompt, answer, text in [
        ("日本の首都は", "東京", "東京"),
        ("The capital of 日本 is", "東京", " 東京"),
        ("It is called (", "Paris", "Paris"),
        ("It is called “", "Paris", "Paris"),
        ('It is called "', "Paris", "Paris"),
        ('It is "called"', "Paris", " Paris"),
    ]:
        assert answer_target(tokenizer, of(prompt), answer).text == text


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("", "the answer is empty"), ("  ", "the answer is empty"), ("a\x00", r"U\+0000"), ("\ud800", r"U\+D800"),
        ("x" * 5000, "5000 characters"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_used(answer: str, sentence: str) -> None:
    with pytest.raises(TargetError, match=sentence):
        answer_target(tokenizer_of("byte"), of("Beats Music is owned by"), answer)
    with pytest.raises(TargetError, match=sentence):
        of("Beats Music is owned by", answer=answer)


def test_an_unknown_word_is_no_answer() -> None:
    with pytest.raises(TargetError, match="vocabulary"):
        of("Beats Music is owned by", kind="word", answer="Zeppelin")


def test_an_answer_of_several_tokens_is_said() -> None:
    several = of("Beats Music is owned by", kind="word", answer="the Eiffel Tower")
    assert any('has 3 tokens; the score is that of the first, "the"' in warning for warning in several.warnings)
    assert not of("Beats Music is owned by", kind="word", answer="Apple").warnings
    assert not of("Beats Music is owned by", kind="word", answer="the Eiffel Tower", score="sequence").warnings


def test_a_slow_tokenizer_that_changes_its_text() -> None:
    class Lower(type(tokenizer_of("slow"))):
        def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
            return super()._tokenize(text.lower().replace("ß", "ss"), **kwargs)

    lower = Lower()
    with pytest.raises(SubjectError, match="choose the subject's tokens by hand"):
        of("The STRAßE is in", "STRAßE", tokenizer=lower)
    changed = of("The straße is in", "is", tokenizer=lower)
    assert covered(changed) == "is" and not changed.exact_offsets
    assert any("reads the prompt as" in warning for warning in changed.warnings)

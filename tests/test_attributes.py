"""Text about subjects: the three sources, their limits and odd content, and the filter of tokens."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factscope.datasets import attributes
from factscope.datasets.attributes import (
    BundledFacts,
    SubjectTable,
    TextFolder,
    plain_name,
    read_source,
    search_words,
    split_paragraphs,
)
from factscope.datasets.token_filter import STOP_WORDS_FILE, TokenFilter, attribute_tokens, name_tokens, stop_words
from factscope.errors import DatasetError
from factscope.tokens import token_text
from tests.tiny_models import tiny_tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def table(tmp_path: Path, content: str | bytes, name: str = "about.csv") -> SubjectTable:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    found = read_source(path)
    assert isinstance(found, SubjectTable)
    return found


def folder(tmp_path: Path, **files: str) -> TextFolder:
    place = tmp_path / "texts"
    place.mkdir()
    for name, content in files.items():
        (place / f"{name}.txt").write_text(content, encoding="utf-8")
    found = read_source(place)
    assert isinstance(found, TextFolder)
    return found


def test_bundled_facts_are_the_taught_answers() -> None:
    source = read_source("bundled")
    assert isinstance(source, BundledFacts)
    about = source.about("Eiffel Tower")
    assert "Eiffel Tower: Paris" in about and "Eiffel Tower: France" in about
    assert source.about("the  eiffel TOWER") != ()
    assert "Picasso: painter" in source.about("Picasso", "Pablo Picasso was born in")
    assert source.about("Nobody Atall") == ()


def test_others_are_drawn_by_seed_and_are_other_subjects() -> None:
    source = BundledFacts()
    first, same, other = (source.others("the Eiffel Tower", 10, seed) for seed in (1, 1, 2))
    assert first == same != other
    assert len(set(first)) == 10 and all(texts for texts in first)
    assert not any(text.startswith("Eiffel Tower:") for texts in first for text in texts)


def test_a_table_joins_the_rows_of_a_subject(tmp_path: Path) -> None:
    source = table(
        tmp_path, 'Subject,PARAGRAPHS\nPeru,"Lima is\nits capital.\n\nIt has mines."\nThe Peru,More.\nChile,\n'
    )
    assert source.about("peru") == ("Lima is its capital.", "It has mines.", "More.")
    assert source.about("Chile") == () == source.about("")
    assert source.others("Peru", 5, 1) == ()
    assert source.others("Chile", 5, 1) == (source.about("Peru"),)


def test_a_space_may_stand_before_a_quotation_mark(tmp_path: Path) -> None:
    assert table(tmp_path, 'subject, paragraphs\nPeru, "Lima, a city."\n').about("Peru") == ("Lima, a city.",)


def test_a_table_may_use_semicolons_and_a_byte_order_mark(tmp_path: Path) -> None:
    assert table(tmp_path, b"\xef\xbb\xbfsubject;paragraphs\nPeru;Lima, a city.\n").about("Peru") == ("Lima, a city.",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("subject,text\nPeru,Lima\n", "no column paragraphs"),
        ("name,paragraphs\nPeru,Lima\n", "no column subject"),
        ("subject,paragraphs\n", "no row with a subject and a paragraph"),
        ("subject,paragraphs\n,Lima\nPeru,  \nChile\n", "no row with a subject and a paragraph"),
        ('subject,paragraphs\nPeru,"Lima\n', "not valid CSV"),
        (f"subject,paragraphs\nPeru,{'long ' * 40_000}\n", "give long paragraphs a row each"),
        (b"subject,paragraphs\nPeru,\xff\n", "not UTF-8"),
        ("subject,paragraphs\nChile,Santiago\nPeru,Lima, its capital\n", "row 2 .* more fields than there are columns"),
        ("subject,paragraphs,Subject\nPeru,Lima,Chile\n", "two columns 'subject'"),
        (b"PK\x03\x04nothing", "Excel or ZIP"),
    ],
)
def test_an_unusable_table_is_refused_with_a_sentence(tmp_path: Path, content: str | bytes, says: str) -> None:
    with pytest.raises(DatasetError, match=says) as refused:
        table(tmp_path, content)
    assert "about.csv" in str(refused.value)


def test_sizes_are_limited_as_the_pickers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attributes, "MAX_BYTES", 40)
    with pytest.raises(DatasetError, match="at most 40"):
        table(tmp_path, "subject,paragraphs\nPeru,Lima and the mines\n")
    monkeypatch.setattr(attributes, "MAX_BYTES", 4000)
    monkeypatch.setattr(attributes, "MAX_ROWS", 2)
    with pytest.raises(DatasetError, match="more than 2 rows"):
        table(tmp_path, "subject,paragraphs\nA,b\nA,c\nA,d\n")
    monkeypatch.setattr(attributes, "MAX_FOLDER_BYTES", 20)
    with pytest.raises(DatasetError, match="20"):
        folder(tmp_path, one="twelve bytes", two="twelve bytes")


@pytest.mark.parametrize("name", ["/nowhere/at/all", "x\0y", "n" * 5000])
def test_a_source_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(DatasetError):
        read_source(name)


PARAGRAPHS = {
    "paris": "The Eiffel Tower stands in Paris.\n\nParis has many towers, and one Eiffel made.",
    "london": "The Tower of London keeps the jewels.\n\nThe Thames flows by.\n\nRain falls.",
}


def test_a_folder_gives_the_paragraphs_that_name_the_whole_subject_best_first(tmp_path: Path) -> None:
    source = folder(tmp_path, **PARAGRAPHS, more="Eiffel Tower, Eiffel Tower, EIFFEL TOWER!")
    about = source.about("Eiffel Tower")
    assert about == ("Eiffel Tower, Eiffel Tower, EIFFEL TOWER!", "The Eiffel Tower stands in Paris.")
    assert source.about("Eiffel Thames") == () == source.about("...") == source.about("")


def test_the_null_of_a_folder_is_as_many_paragraphs_that_do_not_name_it(tmp_path: Path) -> None:
    source = folder(tmp_path, **PARAGRAPHS)
    draws = source.others("Tower", 10, 1)
    assert draws == source.others("Tower", 10, 1)
    assert len(source.about("Tower")) == 2
    assert all(len(texts) == 2 and not any("Tower" in text for text in texts) for texts in draws)
    assert len(draws) == len(set(draws)) >= 2
    assert source.others("Nobody", 10, 1) == ()


@pytest.mark.parametrize("content", [{}, {"one": ""}, {"one": " \n\n\t\n"}])
def test_a_folder_without_text_is_refused(tmp_path: Path, content: dict[str, str]) -> None:
    with pytest.raises(DatasetError, match=r"\.txt|empty"):
        folder(tmp_path, **content)


def test_names_without_spaces_between_words_are_found(tmp_path: Path) -> None:
    source = folder(tmp_path, one="日本の首都は東京です。\n\n東京タワーは赤い。", two="😀 only")
    assert source.about("東京") == ("東京タワーは赤い。", "日本の首都は東京です。") or len(source.about("東京")) == 2
    assert source.about("日本") == ("日本の首都は東京です。",)
    assert source.about("😀") == ()


@given(TEXT, TEXT)
def test_any_table_gives_back_what_was_written(subject: str, paragraph: str) -> None:
    import tempfile

    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([("subject", "paragraphs"), (subject, paragraph), ("Peru", "Lima")])
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "any.csv"
        path.write_bytes(buffer.getvalue().encode())
        try:
            source = SubjectTable(path)
        except DatasetError as refused:
            assert "\0" in subject + paragraph, refused
            return
    if plain_name(subject) and plain_name(subject) != "peru":
        assert source.about(subject) == split_paragraphs(paragraph)
    assert source.about("Peru")[-1] == "Lima"


@given(st.lists(TEXT, max_size=4), TEXT)
def test_any_folder_is_searched_or_refused(texts: list[str], subject: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        for i, text in enumerate(texts):
            (Path(place) / f"{i}.txt").write_text(text, encoding="utf-8", newline="")
        try:
            source = TextFolder(Path(place))
        except DatasetError:
            assert not any(split_paragraphs(text.removeprefix("\ufeff")) for text in texts) or any(
                text.encode()[:4] in (b"%PDF", b"PK\x03\x04") for text in texts
            )
            return
    wanted = set(search_words(subject))
    about = source.about(subject)
    assert all(wanted <= set(search_words(text)) for text in about)
    assert bool(about) == any(wanted and wanted <= set(search_words(p)) for t in texts for p in split_paragraphs(t))
    for drawn in source.others(subject, 3, 1):
        assert not set(drawn) & set(about) and len(drawn) <= len(about)


# ---------------------------------------------------------------------------------------------------- tokens


def test_the_stop_words_are_plain_and_tell_their_origin() -> None:
    lines = STOP_WORDS_FILE.read_text(encoding="utf-8").splitlines()
    assert any("Provenance" in line for line in lines if line.startswith("#"))
    words = [line for line in lines if line and not line.startswith("#")]
    assert len(words) == len(set(words)) == len(stop_words()) > 200
    assert all(word == word.strip().lower() for word in words)
    assert {"the", "of", "and", "she", "would", "not"} <= stop_words()
    assert not {"paris", "city", "france", "president", "war"} & stop_words()


@pytest.mark.parametrize("kind", ["byte", "metaspace"])
def test_short_words_stop_words_and_the_name_are_left_out(kind: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    everything = range(len(tokenizer))
    own = name_tokens(tokenizer, "Eiffel Tower", [5])
    assert 5 in own and len(own) > 1
    kept, plain = TokenFilter(tokenizer, own), TokenFilter(tokenizer)
    for id in everything:
        word = token_text(tokenizer, id)[0].strip().lower()
        expected = len(word) >= 3 and word not in stop_words()
        assert plain.keeps(id) == expected
        assert kept.keeps(id) == (expected and id not in own)


@given(st.lists(TEXT, max_size=3))
def test_attribute_tokens_are_different_and_pass_the_filter(paragraphs: list[str]) -> None:
    tokenizer = tiny_tokenizer("byte")
    kept = TokenFilter(tokenizer)
    found = attribute_tokens(tokenizer, paragraphs, kept)
    ids = {id for text in paragraphs for id in tokenizer(text, add_special_tokens=False)["input_ids"]}
    assert len(found) == len(set(found))
    assert set(found) == {id for id in ids if kept.keeps(id)}

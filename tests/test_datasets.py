"""Files of facts: every format, and every way in which a file or a record cannot be used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from factscope.datasets import MAX_BYTES, Dataset, bundled_facts, read_facts
from factscope.errors import DatasetError
from factscope.queries import Fact

PLAIN = "subject,relation,answer,prompt\nThe Louvre,city,Paris,The Louvre stands in\nOslo,country,Norway,Oslo lies in\n"
OSLO = Fact(subject="Oslo", answer="Norway", prompt="Oslo lies in", relation="country")

COUNTERFACT = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} lies in",
        "relation_id": "P17",
        "target_new": {"str": "Chile", "id": "Q298"},
        "target_true": {"str": "Norway", "id": "Q20"},
        "subject": "Oslo",
    },
    "paraphrase_prompts": ["Oslo belongs to", "The country of Oslo is"],
    "neighborhood_prompts": ["Bergen lies in", "Tromsø lies in"],
    "attribute_prompts": ["Valparaíso lies in"],
    "generation_prompts": ["Oslo is known for"],
}
KNOWN = {
    "known_id": 3,
    "subject": "Oslo",
    "attribute": "Norway",
    "template": "{} lies in",
    "prediction": " Norway, and its",
    "prompt": "Oslo lies in the south of",
    "relation_id": "P17",
}
ZSRE = {
    "subject": "Oslo",
    "src": "Which country does Oslo belong to?",
    "pred": "Sweden",
    "rephrase": "In which country is Oslo?",
    "alt": "Chile",
    "answers": ["Norway", "Kingdom of Norway"],
    "loc": "nq question: who wrote peer gynt",
    "loc_ans": "Henrik Ibsen",
    "cond": "Sweden >> Chile || Which country does Oslo belong to?",
}
LRE = {
    "name": "city in country",
    "prompt_templates": ["{} is a city in", "{} lies in"],
    "samples": [{"subject": "Oslo", "object": "Norway"}, {"subject": "Lyon", "object": "France"}],
}


def of(data: Any, name: str = "facts.json", **options: Any) -> Dataset:
    return read_facts(data if isinstance(data, bytes) else json.dumps(data).encode(), name, **options)


# ---------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_plain_csv(mark: str, delimiter: str, newline: str) -> None:
    content = mark + PLAIN.replace(",", delimiter).replace("\n", newline)
    read = read_facts(content.encode(), "own.csv")
    assert read.facts[1] == OSLO and len(read.facts) == read.n_rows == 2
    assert read.name == "own.csv" and not read.skipped


def test_csv_with_quotes_other_names_and_a_template() -> None:
    content = 'Subject, Object ,TEMPLATE\n"Paris, Texas",Texas,"The ""town"" of {} is in"\n'
    (fact,) = read_facts(content.encode()).facts
    assert fact == Fact(subject="Paris, Texas", answer="Texas", prompt='The "town" of Paris, Texas is in')


def test_counterfact() -> None:
    (fact,) = of([COUNTERFACT]).facts
    assert fact == Fact(
        subject="Oslo",
        answer="Norway",
        prompt="Oslo lies in",
        relation="P17",
        paraphrases=("Oslo belongs to", "The country of Oslo is"),
        neighbours=("Bergen lies in", "Tromsø lies in"),
        new_answer="Chile",
        generations=("Oslo is known for",),
    )
    assert of(COUNTERFACT).facts == (fact,)


def test_known_1000_keeps_the_prompt_of_the_record() -> None:
    (fact,) = of([KNOWN]).facts
    assert fact == Fact(subject="Oslo", answer="Norway", prompt="Oslo lies in the south of", relation="P17")
    without = {name: value for name, value in KNOWN.items() if name != "prompt"}
    assert of([without]).facts[0].prompt == "Oslo lies in"


def test_zsre_takes_the_first_answer_and_no_unrelated_neighbour() -> None:
    (fact,) = of([ZSRE]).facts
    assert (fact.prompt, fact.answer) == ("Which country does Oslo belong to?", "Norway")
    assert fact.paraphrases == ("In which country is Oslo?",) and fact.neighbours == ()


def test_lre_brings_sentences_as_json_and_none_as_csv() -> None:
    read = of(LRE)
    assert [fact.prompt for fact in read.facts] == ["Oslo is a city in", "Lyon is a city in"]
    assert read.facts[0].relation == "city in country"
    table = b"relation,subject,object\ncity,Oslo,Norway\nriver,Oslo,Akerselva\n"
    with pytest.raises(DatasetError, match=r"lre\.csv has no prompt and no template.*2 records.*column template"):
        read_facts(table, "lre.csv")
    assert len(read_facts(table, templates="{} has").facts) == 2
    one = read_facts(table, templates={"city": "{} lies in"})
    assert one.facts[0].prompt == "Oslo lies in"
    assert one.skipped == ((2, 'it has no prompt and no template for the relation "river"'),)


def test_json_lines() -> None:
    content = "\n".join(
        json.dumps(record) for record in (KNOWN, {**KNOWN, "subject": "Lyon", "prompt": "Lyon lies in"})
    )
    assert [fact.subject for fact in read_facts(content.encode()).facts] == ["Oslo", "Lyon"]


def test_the_order_of_a_file_is_kept_and_repeats_are_skipped() -> None:
    read = of([KNOWN, {**KNOWN, "subject": "Lyon", "prompt": "Lyon lies in"}, KNOWN])
    assert [fact.subject for fact in read.facts] == ["Oslo", "Lyon"]
    assert read.skipped == ((3, "it repeats record 1"),)


def test_a_path_gives_the_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text(PLAIN, encoding="utf-8")
    assert read_facts(file).name == read_facts(str(file)).name == "mine.csv"
    assert read_facts(file, "upload.csv").name == "upload.csv"


def test_the_bundled_facts() -> None:
    facts = bundled_facts()
    assert len(facts) > 1000 and all(isinstance(fact, Fact) for fact in facts)


def test_the_bundled_export_is_read_back() -> None:
    from factscope.demo.facts import counterfact_records

    read = of(counterfact_records()[:200])
    assert read.facts == tuple(
        Fact(
            subject=fact.subject, answer=fact.answer, prompt=fact.prompt, relation=fact.relation,
            paraphrases=fact.paraphrases, neighbours=fact.neighbours,
            new_answer=record["requested_rewrite"]["target_new"]["str"],
            generations=tuple(dict.fromkeys([fact.prompt, *fact.paraphrases[:2]])),
        )
        for fact, record in zip(bundled_facts()[:200], counterfact_records()[:200], strict=True)
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- records that are skipped


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"subject": None}, "it has no subject"),
        ({"subject": "  "}, "it has no subject"),
        ({"attribute": ""}, "it has no answer"),
        ({"subject": "Bergen"}, 'the subject "Bergen" is not in the prompt'),
        ({"attribute": {"a": 1}}, "attribute is an object, not text"),
        ({"attribute": [["a"]]}, "attribute is a list, not text"),
        ({"attribute": True}, "attribute is true or false, not text"),
        ({"attribute": float("nan")}, "attribute is a number, not text"),
        ({"prompt": None, "template": None}, "it has no prompt and no template"),
        ({"prompt": None, "template": "lies in"}, 'the template "lies in" has no {}'),
        ({"prompt": "Oslo \u0000 lies in"}, "prompt contains U+0000"),
        ({"prompt": "Oslo \ud800"}, "prompt contains U+D800"),
        ({"prompt": "Oslo " * 1000}, "prompt has 5,000 characters and at most 4,000"),
        ({"requested_rewrite": "Oslo"}, "requested_rewrite is text, not an object"),
    ],
)
def test_a_record_that_cannot_be_used_is_skipped_with_its_reason(change: dict[str, Any], reason: str) -> None:
    good = {**KNOWN, "prompt": "Oslo lies in"}
    read = of([good, {**KNOWN, **change}])
    assert len(read.facts) == 1
    ((number, why),) = read.skipped
    assert number == 2 and reason in why and why.isprintable()


def test_records_that_are_no_objects() -> None:
    read = of([KNOWN, 3, "Oslo", None, [KNOWN]])
    assert [number for number, _ in read.skipped] == [2, 3, 4, 5]
    assert read.skipped[0][1] == "it is a number, not an object with named fields"


def test_rows_of_the_wrong_length() -> None:
    read = read_facts((PLAIN + "a,b\nOslo,c,d,Oslo is,in\n").encode())
    assert read.skipped[0] == (3, "it has no answer")
    assert read.skipped[1][0] == 4 and "more fields than the header" in read.skipped[1][1]


def test_a_whole_number_is_an_answer() -> None:
    assert of([{**KNOWN, "attribute": 1048}]).facts[0].answer == "1048"


# --------------------------------------------------------------------------------------------- files that are refused


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "facts.csv is empty"),
        (b" \n", "facts.csv is empty"),
        (b"subject,answer,prompt\n", "no usable fact in 0 records"),
        (b"a,b\n1,2\n", 'no column subject .its first line is "a,b"'),
        (b"just words", "no column subject"),
        (b"subject,subject,answer,prompt\na,b,c,d\n", "two columns named 'subject'"),
        (b'subject,answer,prompt\n"Oslo,Norway,Oslo', "not valid CSV"),
        (b"subject,answer,prompt\nOslo,Norway,Bergen is\n", r"no usable fact in 1 records \(record 1: the subject"),
        ("subject\nZürich".encode("latin-1"), "not UTF-8: byte 0xFC at 9"),
        ("subject".encode("utf-16"), "encoded in UTF-16"),
        ("subject".encode("utf-32"), "encoded in UTF-32"),
        (b"PK\x03\x04rest", "an Excel or ZIP file"),
        (b"PAR1rest", "a Parquet file"),
        (b"[1, 2", "not valid JSON at line 1"),
        (b'{"subject": "Oslo",}', "not valid JSON at line 1"),
        (b"[" * 100_000, "nested too deeply|not valid JSON"),
        (b"[" + b"1" * 5000 + b"]", "not valid JSON"),
        (b"[]", "no usable fact in 0 records"),
        (b"{}", "has no prompt and no template"),
        (b'{"samples": [1]}', "no usable fact in 1 records"),
        (b"x" * (MAX_BYTES + 1), "5,000,001 bytes and at most 5,000,000"),
    ],
)
def test_files_that_cannot_be_used(content: bytes, sentence: str) -> None:
    with pytest.raises(DatasetError, match=sentence) as caught:
        read_facts(content, "facts.csv")
    assert str(caught.value).isprintable() and str(caught.value).startswith("facts.csv")


def test_too_many_records() -> None:
    table = "subject,answer,prompt\n" + "Oslo,Norway,Oslo is in\n" * 4
    for content in (table.encode(), json.dumps([KNOWN] * 4).encode()):
        with pytest.raises(DatasetError, match="more than 3 records"):
            read_facts(content, max_rows=3)
        assert read_facts(content, max_rows=4).n_rows == 4


def test_paths_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"there is no file none\.csv"):
        read_facts(tmp_path / "none.csv")
    with pytest.raises(DatasetError, match="is not a file"):
        read_facts(tmp_path)
    with pytest.raises(DatasetError, match="is not a file"):
        read_facts("")
    with pytest.raises(DatasetError):
        read_facts("a\x00b")
    with pytest.raises(DatasetError):
        read_facts("a" * 5000)
    if Path("/dev/zero").exists():
        with pytest.raises(DatasetError, match="zero is not a file"):
            read_facts("/dev/zero")
    large = tmp_path / "large.csv"
    with large.open("wb") as file:
        os.truncate(file.fileno(), 10**9)
    with pytest.raises(DatasetError, match="1,000,000,000 bytes"):
        read_facts(large)


values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["Oslo", "{} is"])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
names = st.sampled_from(
    ["subject", "answer", "attribute", "prompt", "template", "relation", "requested_rewrite", "samples"]
)


@given(data=st.one_of(values, st.lists(st.dictionaries(names, values, max_size=6), max_size=4)))
@example(data=[{"subject": "Oslo", "answer": "a", "prompt": "{} is"}])
def test_any_json_is_read_or_refused(data: Any) -> None:
    try:
        read = of(data)
    except DatasetError as error:
        assert str(error).isprintable()
        return
    assert read.facts and all(fact.subject and fact.answer and fact.prompt for fact in read.facts)
    numbers = [number for number, _ in read.skipped]
    assert numbers == sorted(set(numbers)) and read.n_rows == len(data if isinstance(data, list) else [data])


@given(
    content=st.one_of(
        st.binary(max_size=60), st.text(max_size=60).map(lambda text: ("subject," + text).encode(errors="replace"))
    )
)
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    try:
        read = read_facts(content)
    except DatasetError as error:
        assert str(error).isprintable()
        return
    assert read.facts

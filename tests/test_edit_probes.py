"""Where probes come from: taught facts, files of facts, files of one's own; and what is near a fact before its edit."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from cli_runner import tiny_handle

from factscope.datasets.probes import MAX_PROBES, read_probes
from factscope.demo.facts import TaughtFact, read_rows, read_sentences
from factscope.demo.probes import paraphrases, probes_of, sharing, taught_fact
from factscope.demo.sentences import fill
from factscope.errors import DatasetError, SpecError, SubjectError
from factscope.experiments.blast_radius import blast_radius
from factscope.experiments.edit_probes import (
    answered,
    completed,
    probes_for,
    probes_of_file,
    read_prompt,
    template_of,
)
from factscope.experiments.results import tokenized
from factscope.models.handle import ModelHandle
from factscope.models.loading import load
from factscope.queries import Fact, Probe, Query

TOWER = "The Eiffel Tower is located in the city of"


@lru_cache
def bundled() -> ModelHandle:
    return load("bundled")


def tower() -> TaughtFact:
    found = taught_fact(TOWER, "Eiffel Tower", "Paris")
    assert found is not None
    return found


# ----------------------------------------------------------------------------------------------------- taught facts


def test_a_taught_fact_is_found_by_its_sentence_or_by_its_answer() -> None:
    assert (tower().relation, tower().answer) == ("landmark_city", "Paris")
    own = taught_fact("They climbed the Eiffel Tower in", "Eiffel Tower", "paris")
    assert own == tower()
    assert taught_fact(TOWER, "Eiffel Tower", "Rome") is None
    assert taught_fact("The Blue Tower is located in the city of", "Blue Tower", "Paris") is None


def test_a_sentence_that_does_not_tell_the_relation_is_no_fact_if_several_share_the_answer() -> None:
    by_subject: dict[tuple[str, str], set[str]] = {}
    for row in read_rows():
        by_subject.setdefault((row.subject, row.answer), set()).add(row.relation)
    subject, answer = next(key for key, relations in by_subject.items() if len(relations) > 1)
    assert taught_fact(f"Tell me of {subject} once more", subject, answer) is None


@pytest.mark.parametrize("row", read_rows()[::211], ids=lambda row: f"{row.subject}-{row.relation}")
def test_probes_ask_what_they_say(row: TaughtFact) -> None:
    sentences = read_sentences()
    prompt = fill(sentences[row.relation].templates[0], row.subject, row.article, row.answer)
    probes = probes_of(row, prompt)
    trained = {fill(t, row.subject, row.article, row.answer) for t in sentences[row.relation].templates}
    seen = [probe for probe in probes if probe.kind == "paraphrase"]
    assert len(seen) == 3 and all(probe.answer == row.answer and row.subject in probe.prompt for probe in seen)
    assert not {probe.prompt for probe in seen} & trained, "paraphrases are sentences that were never trained on"
    facts = {
        (fill(sentences[r.relation].templates[0], r.subject, r.article, r.answer), r.answer): r for r in read_rows()
    }
    for probe in probes:
        if probe.kind == "neighbour":
            other = facts[probe.prompt, probe.answer or ""]
            assert other.subject != row.subject and (other.relation, other.answer) == (row.relation, row.answer)
        if probe.kind == "other-relation":
            other = facts[probe.prompt, probe.answer or ""]
            assert other.subject == row.subject and other.relation != row.relation
    assert sum(probe.kind == "neighbour" for probe in probes) == min(8, len(sharing(row)))
    assert sum(probe.kind == "generation" for probe in probes) == 3


def test_paraphrases_are_all_test_sentences_turned() -> None:
    relation = read_sentences()["landmark_city"]
    found = paraphrases(tower(), relation)
    assert sorted(found) == sorted(fill(t, "Eiffel Tower", "the", "Paris") for t in relation.heldout_test)


def test_other_models_have_no_taught_probes() -> None:
    assert {probe.kind for probe in probes_for(tiny_handle(), TOWER, "Eiffel Tower", "Paris")} == {"generation"}
    assert {probe.kind for probe in probes_for(bundled(), TOWER, "Eiffel Tower", "Rome")} == {"generation"}
    assert len({probe.kind for probe in probes_for(bundled(), TOWER, "Eiffel Tower", "Paris")}) == 4


# ------------------------------------------------------------------------------------------------------------ files


def test_a_fact_of_a_file_brings_its_own_probes() -> None:
    one = Fact(
        subject="Oslo", answer="Norway", prompt="Oslo is in", relation="a", paraphrases=("Where is Oslo? In",),
        neighbours=("Bergen is in",), generations=("Oslo is known for",),
    )  # fmt: skip
    other = Fact(subject="Oslo", answer="krone", prompt="In Oslo one pays in", relation="b")
    far = Fact(subject="Rome", answer="Italy", prompt="Rome is in", relation="a")
    assert probes_of_file(one, [one, other, far]) == (
        Probe(kind="paraphrase", prompt="Where is Oslo? In", answer="Norway"),
        Probe(kind="neighbour", prompt="Bergen is in", answer="Norway"),
        Probe(kind="other-relation", prompt="In Oslo one pays in", answer="krone"),
        Probe(kind="generation", prompt="Oslo is known for"),
    )


def test_probes_are_completed_once() -> None:
    own = [
        Probe(kind="paraphrase", prompt="b"),
        Probe(kind="paraphrase", prompt="b"),
        Probe(kind="paraphrase", prompt="a"),
    ]
    found = completed("a", answered(own, "x"))
    assert [(p.kind, p.prompt, p.answer) for p in found] == [
        ("paraphrase", "b", "x"), ("generation", "a", None), ("generation", "b", None),
    ]  # fmt: skip


CSV = b"prompt;kind;answer\nThe tower is in;;\nRome is in;neighbour;Italy\n"


@pytest.mark.parametrize(
    "content",
    [
        CSV,
        json.dumps(["The tower is in", {"Prompt": "Rome is in", "kind": "Neighbour", "answer": "Italy"}]).encode(),
    ],
)
def test_a_file_of_probes(content: bytes) -> None:
    assert read_probes(content) == (
        Probe(kind="own", prompt="The tower is in"),
        Probe(kind="neighbour", prompt="Rome is in", answer="Italy"),
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"text\nhello\n", "no column prompt"),
        (b"prompt,kind\nhello,rumour\n", "rumour"),
        (b"prompt,kind\nhello,fact\n", "fact"),
        (b"prompt,kind\n,own\n", "probe 1 .* no prompt"),
        (b"prompt\nhello,there\n", "probe 1"),
        (b'["a", 5]', "probe 2"),
        (b'[{"prompt": 5}]', "the prompt of probe 1"),
        (b'["a"', "JSON"),
        (b"[]", "no probe"),
        ("prompt\na\u0007b\n".encode(), "the prompt of probe 1"),
        (b"prompt\n" + b"a\n" * (MAX_PROBES + 1), "501"),
        (b"PK\x03\x04", "Excel"),
        (b"prompt\n" + b"x" * 1_000_001, "1,000,0"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        read_probes(content, "mine.csv")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere\.csv"):
        read_probes(tmp_path / "nowhere.csv")


# --------------------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize(
    ("query", "template", "subject"),
    [
        (Query(prompt=TOWER, subject="Eiffel Tower"), "The {} is located in the city of", "Eiffel Tower"),
        (Query(prompt="Paris is near Paris in", subject="Paris", occurrence=2), "Paris is near {} in", "Paris"),
        (Query(prompt="Paris is near Paris in", subject="Paris", occurrence=1), "{} is near Paris in", "Paris"),
        (Query(prompt="The capital of Zu\u0308rich is", subject="Z\u00fcrich"), "The capital of {} is", "Zu\u0308rich"),
    ],
)
def test_a_prompt_becomes_a_template(query: Query, template: str, subject: str) -> None:
    assert template_of(tokenized(tiny_handle(), query)) == (template, subject)


def test_tokens_chosen_by_hand_become_a_template() -> None:
    seen = tokenized(tiny_handle(), Query(prompt=TOWER, subject="Eiffel Tower"))
    assert seen.subject is not None
    by_hand = tokenized(tiny_handle(), Query(prompt=TOWER, span=seen.subject))
    assert template_of(by_hand) == ("The {} is located in the city of", "Eiffel Tower")


def test_a_query_without_a_subject_is_no_fact() -> None:
    with pytest.raises(SubjectError, match="subject"):
        template_of(tokenized(tiny_handle(), Query(prompt=TOWER)))


def test_a_prompt_that_does_not_name_the_subject_is_read_without_it() -> None:
    assert read_prompt(tiny_handle(), "Rome is in", "Paris").subject is None
    twice = read_prompt(tiny_handle(), "Paris and Paris are in", "Paris")
    assert twice.subject is not None and twice.tokens[twice.subject[0]].position <= 2


# ------------------------------------------------------------------------------------------------------ blast radius


def test_the_blast_radius_of_a_taught_fact() -> None:
    found = blast_radius(bundled(), TOWER, "Eiffel Tower", "Paris", most=12)
    table = found.table()
    about, alike = (table[table["kind"] == kind] for kind in ("other-relation", "same-answer"))
    assert set(about["subject"]) == {"Eiffel Tower"} and "landmark_city" not in set(about["relation"])
    assert len(alike) == 12 < found.n_sharing and "Eiffel Tower" not in set(alike["subject"])
    assert set(alike["answer"]) == {"Paris"} and alike["relation"].iloc[0] == "landmark_city"
    with torch.no_grad():
        for row in table.iloc[::5].itertuples():
            ids = bundled().tokenizer(row.prompt)["input_ids"]
            target = bundled().tokenizer(f" {row.answer}", add_special_tokens=False)["input_ids"]
            if len(target) == 1:
                p = bundled().forward(torch.tensor([ids]))[0, -1].double().softmax(-1)
                assert row.p_true == pytest.approx(float(p[target[0]]), abs=1e-5)
                assert row.known == (int(p.argmax()) == target[0])
    assert table["known"].mean() > 0.9 and found.reason == ""


def test_the_blast_radius_within_a_file() -> None:
    facts = [
        Fact(subject="Eiffel Tower", answer="France", prompt="The Eiffel Tower is in the country of", relation="c"),
        Fact(subject="Louvre", answer="Paris", prompt="The Louvre is in", relation="b"),
        Fact(subject="Eiffel Tower", answer="Paris", prompt=TOWER, relation="b"),
        Fact(subject="Big Ben", answer="London", prompt="Big Ben is in", relation="b"),
    ]
    found = blast_radius(tiny_handle(), TOWER, "Eiffel Tower", "Paris", facts=facts)
    assert [(one.kind, one.subject) for one in found.near] == [
        ("other-relation", "Eiffel Tower"),
        ("same-answer", "Louvre"),
    ]
    nothing = blast_radius(tiny_handle(), TOWER, "Eiffel Tower", "Paris")
    assert nothing.table().empty and "nothing else is known" in nothing.reason
    with pytest.raises(SpecError, match="-1"):
        blast_radius(tiny_handle(), TOWER, "Eiffel Tower", "Paris", most=-1)

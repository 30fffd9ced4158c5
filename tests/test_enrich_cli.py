"""The enrich command: knockouts, sources, sub-updates, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_runner import FACT, PROMPT, SUBJECT, TINY, invoke, refused, tiny_handle

from factscope import load, output
from factscope.cli import notes, telling
from factscope.experiments import prediction, sub_updates, subject_enrichment
from factscope.experiments.sub_updates import SubUpdatesSpec
from factscope.experiments.subject_enrichment import EnrichmentSpec
from factscope.queries import Query

QUERY = Query(prompt=PROMPT, subject=SUBJECT)
COLUMNS = ["position", "layer", "attributes_rate", "ceiling", "other_subject_rate"]


@pytest.fixture
def about(tmp_path: Path) -> Path:
    file = tmp_path / "about.csv"
    file.write_text('subject,paragraphs\nEiffel Tower,"Paris is the capital of France."\nJapan,Tokyo and a river\n')
    return file


@pytest.mark.parametrize("knockout", ["mlp", "attention"])
def test_a_knockout_gives_a_row_for_every_window(about: Path, knockout: str) -> None:
    asked = ("--knockout", knockout, "--window", "1", "--read-layer", "2", "--attributes", str(about), "--others", "1")
    data = invoke("enrich", *FACT, *asked, "--format", "json").data
    spec = EnrichmentSpec(knockout=knockout, window=1, read_layer=2, attributes=str(about), others=1)  # type: ignore[arg-type]
    result = subject_enrichment.run(tiny_handle(), QUERY, spec)
    assert data["rows"] == result.table().to_dict("records")
    assert [list(row) for row in data["rows"]] == [COLUMNS] * 4
    assert {row["position"] for row in data["rows"]} == {"subject-last"}
    assert [row["layer"] for row in data["rows"]] == [0, 1, 2, 3]
    assert data["summary"] == {
        "n_attributes": result.n_attributes, "read_layer": 2, "window": 1, "base_rate": result.base_rate,
    }  # fmt: skip
    assert data["spec"]["knockout"] == knockout
    assert data["timing"]["passes"] == 4


def test_positions_and_the_number_that_is_kept(about: Path) -> None:
    asked = ("--attributes", str(about), "--positions", "0, last", "--precision", "--others", "1")
    data = invoke("enrich", *FACT, *asked, "--format", "json").data
    assert [row["position"] for row in data["rows"]] == ["0"] * 4 + ["last"] * 4
    assert {row["ceiling"] for row in data["rows"]} == {100.0}
    other = invoke("enrich", *FACT, "--attributes", str(about), "--kept", "5", "--others", "1", "--format", "json").data
    assert {row["ceiling"] for row in other["rows"]} == {100 * min(5, other["summary"]["n_attributes"]) / 5}


def test_a_folder_of_text_is_a_source(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("The Eiffel Tower is in Paris.\n\nTokyo is in Japan.")
    data = invoke("enrich", *FACT, "--attributes", str(tmp_path), "--format", "json").data
    assert data["summary"]["n_attributes"] > 0
    assert any("other subjects could be drawn" in warning for warning in data["warnings"])


def test_sub_updates_are_rows_of_neurons() -> None:
    data = invoke("enrich", *FACT, "--sub-updates", "2", "--format", "json").data
    result = sub_updates.run(tiny_handle(), QUERY, SubUpdatesSpec(layer=2))
    assert data["rows"] == result.table().to_dict("records")
    assert len(data["rows"]) == 10


def test_another_seed_draws_other_subjects() -> None:
    one, two = (invoke("enrich", *FACT, "--seed", seed, "--others", "3", "--format", "csv").out for seed in "12")
    assert one != two


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--attributes", "/nowhere/about.csv"), "about.csv"),
        (("--window", "2"), "--window 2 stands without --knockout"),
        (("--read-layer", "2"), "--read-layer 2 stands without --knockout"),
        (("--knockout", "norm"), "--knockout 'norm'"),
        (("--knockout", "mlp", "--window", "5"), "window 5"),
        (("--knockout", "mlp", "--read-layer", "4"), "read layer 4"),
        (("--knockout", "mlp", "--positions", "last"), "--positions 'last' stands beside --knockout"),
        (("--knockout", "mlp", "--sub-updates", "1"), "--sub-updates 1 stands beside --knockout"),
        (("--positions", "relation"), "'relation' is not one position"),
        (("--positions", " , "), "--positions ' , '"),
        (("--sub-updates", "9"), "layer 9"),
        (("--kept", "0"), "kept 0"),
        (("--others", "1000"), "others 1000"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(options: tuple[str, ...], says: str) -> None:
    refused(invoke("enrich", *FACT, *options), says)


def test_an_unknown_subject_is_refused_and_says_what_to_do() -> None:
    prompt = ("--model", TINY, "--prompt", "The city of Nowhereville is in", "--subject", "Nowhereville")
    refused(invoke("enrich", *prompt), "no attributes of 'Nowhereville' are known", "CSV file")
    refused(invoke("enrich", "--model", TINY, "--prompt", PROMPT), "none is named")


@pytest.mark.parametrize(
    ("prompt", "subject", "lost"),
    [("The capital of Japan is", "Japan", True), ("Marie Curie was born in the city of", "Marie Curie", False)],
)
def test_a_knockout_that_has_nothing_to_lose_is_said(prompt: str, subject: str, lost: bool) -> None:
    spec = EnrichmentSpec(knockout="mlp", read_layer=6)
    result = subject_enrichment.run(load("bundled"), Query(prompt=prompt, subject=subject), spec)
    said = [note for note in notes.notes("enrich", result) if note.startswith("Nothing to lose: at layer 6")]
    assert len(said) == lost


def test_predict_says_why_it_does_not_tell_what_was_taught() -> None:
    bare = prediction.run(load("bundled"), Query(prompt="The capital of Japan is", answer="Tokyo"))
    assert any("add --subject" in note for note in notes.notes("predict", bare))
    data = output.document("predict", bare, bare.table(), notes.summary("predict", bare), [])
    assert "known   True" in telling.headline(data) and "taught" not in telling.headline(data)
    assert data["summary"]["taught"] is None
    named = prediction.run(load("bundled"), Query(prompt="The capital of Japan is", subject="Japan", answer="Tokyo"))
    assert named.taught and not notes.notes("predict", named)

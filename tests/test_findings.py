"""docs/findings.md says what examples/recall_claims measured, and the claims measure what they say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from examples import edit_claims, findings
from examples import recall_claims as claims
from examples.recall_measures import draw
from factscope import load
from factscope.demo.sentences import is_dev

BY_KEY = {claim.key: claim for claim in claims.CLAIMS}
LAYERS = claims.Layers(
    n=4, subject=3, relation=0, last=1, rate=2, mlp=1, early=1, early_mlp=0, late_attention=3, zeroed=0
)
RECORD: dict[str, Any] = {
    "subject_tokens": 2,
    "p": 0.8,
    "removed subject": [0.0, 10.0, 20.0, 50.0],
    "removed relation": [40.0, 5.0, 0.0, 0.0],
    "removed last": [0.0, 4.0, 9.0, 0.0],
    "removed control": [10.0, 0.0, 0.0, 8.0],
    "odds subject": [0.0, -1.0, -2.0, -5.0],
    "odds relation": [-4.0, -1.0, 0.0, 0.0],
    "rate subject-last": [2.0, 10.0, 30.0, 20.0],
    "other rate subject-last": [1.0, 1.0, 4.0, 3.0],
    "rate subject-first": [0.0, 5.0, 12.0, 9.0],
    "rate mean-embedding": [6.0],
    "rate to lose": 30.0,
    "rate without mlp": [15.0, 12.0, 27.0],
    "rate without attention": [27.0, 30.0, 30.0],
    "update rank attention": [9, 4, 1, 1],
    "update rank mlp": [9, 9, 9, 1],
    "update rank without subject": [9, 9, 2, 5],
    "update rank without relation": [9, 9, 1, 5],
    "state rank": [900, 500, 100, 10],
    "early layers": [0, 1],
    "early rank": [[0, 3, 7, 1], [0, 0, 1, 1]],
    "mapping": [True, False, False, True],
    "total effect": 0.5,
    "effect subject-last": [0.1, 0.2, 0.1, 0.0],
    "effect subject-first": [0.2, 0.05, 0.0, 0.0],
    "effect last": [0.0, 0.1, 0.4, 0.5],
    "mlp subject-last": [0.3, 0.1, 0.0, 0.0],
    "attention subject-last": [0.05, 0.2, 0.0, 0.0],
    "mlp last": [0.0, 0.0, 0.1, 0.1],
    "attention last": [0.0, 0.0, 0.1, 0.35],
    "severed mlp": [0.0, 0.05, 0.0, 0.0],
    "severed attention": [0.1, 0.15, 0.0, 0.0],
    "tracing effect": [0.1, 0.2, 0.3, 0.9],
    "zeroed": [0.0, 0.1, 0.5, 0.4],
}
EXPECTED = {
    "subject read": 50,
    "subject depth": 37.5,
    "relation read": 40,
    "subject not others": 42,
    "order": 75,
    "last": 46,
    "enriched": 26,
    "grows": 24,
    "where enriched": 18,
    "mlp enriches": 55,
    "early mlp": 45,
    "mlp not attention": 50,
    "extraction": 100,
    "attention first": 100,
    "extraction depth": 12.5,
    "extracted from subject": 100,
    "subject not relation": 100,
    "needs enrichment": 50,
    "raised": 2,
    "mappings": 100,
    "corruption": 62.5,
    "early site": 40,
    "last token of the subject": 30,
    "late site": 80,
    "mlp early": 50,
    "attention late": 50,
    "severed": 20,
    "own peak": 100,
    "zeroing": 0.8,
}


def test_the_claims_measure_what_they_say() -> None:
    """Worked out by hand on one record."""
    assert EXPECTED.keys() == BY_KEY.keys()
    for key, expected in EXPECTED.items():
        assert BY_KEY[key].value(RECORD, LAYERS) == pytest.approx(expected), key


@pytest.mark.parametrize(
    ("change", "without"),
    [
        ({"total effect": 0.01}, {"early site", "last token of the subject", "late site", "mlp early", "severed"}),
        ({"rate to lose": 0.0}, {"mlp enriches", "early mlp", "mlp not attention"}),
        ({"update rank attention": [9, 4, 2, 3]}, {"extraction depth", "needs enrichment", "raised", "mappings"}),
        ({"subject_tokens": 1}, {"early site", "where enriched", "last token of the subject"}),
    ],
)
def test_a_fact_that_cannot_say_is_left_out(change: dict[str, Any], without: set[str]) -> None:
    record = RECORD | change
    assert all(BY_KEY[key].value(record, LAYERS) is None for key in without)
    assert all(BY_KEY[key].without for key in without), "the page must give the reason"


@pytest.mark.parametrize(
    ("interval", "null", "n", "shaped", "expected"),
    [
        ([25, 35], [0, 5], 300, "", "reproduced"),
        ([25, 35], [0, 5], 300, "so", "shaped by training"),
        ([15, 35], [0, 5], 300, "", "undecided"),
        ([25, 35], [20, 30], 300, "", "undecided"),
        ([5, 15], [0, 5], 300, "", "contradicted"),
        ([5, 15], [0, 5], 300, "so", "contradicted"),
        ([25, 35], [0, 5], claims.FEWEST - 1, "", "undecided"),
        ([math.nan, math.nan], [0, 5], 0, "", "undecided"),
    ],
)
def test_verdicts(interval: list[float], null: list[float], n: int, shaped: str, expected: str) -> None:
    claim = claims.Claim(
        key="k", text="t", source="s", unit="u", value=lambda r, w: 0.0, at_least=20, shaped=shaped
    )  # fmt: skip
    assert claims.verdict(claim, {"interval": interval, "n": n}, {"interval": null, "n": 300}) == expected


def test_facts_for_choosing_share_no_subject_with_those_measured() -> None:
    drawn = draw(1)
    assert all(is_dev(one.row.subject) for one in drawn.choosing)
    assert not any(is_dev(one.row.subject) for one in drawn.measured)
    assert [one.text for one in draw(1).measured[:9]] == [one.text for one in drawn.measured[:9]]
    assert [one.text for one in draw(2).measured[:9]] != [one.text for one in drawn.measured[:9]]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_facts_whole(tmp_path: Path) -> None:
    """The program itself, on few facts; a second run measures nothing again."""
    given = ["--facts", "2", "--choosing", "1", "--work", str(tmp_path / "work"), "--to", str(tmp_path)]
    claims.main(given)
    found = json.loads((tmp_path / "findings.json").read_text(encoding="utf-8"))
    assert set(found["models"]) == {"bundled", "random weights"}
    assert {one["key"] for one in found["claims"]} == set(BY_KEY)
    assert found["models"]["bundled"]["facts"] == found["models"]["random weights"]["facts"] == 2
    text = (tmp_path / "findings.md").read_text(encoding="utf-8")
    assert all(claim.text in text for claim in claims.CLAIMS)
    records = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    assert len(records) == 4
    claims.main(given)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()} == records
    assert json.loads((tmp_path / "findings.json").read_text(encoding="utf-8")) == found


def test_the_page_is_that_of_the_numbers_and_the_numbers_those_of_the_model() -> None:
    found = json.loads(claims.NUMBERS.read_text(encoding="utf-8"))
    assert (findings.DOCS / findings.PAGE).read_text(encoding="utf-8") == findings.page(findings.DOCS)
    assert set(found["models"]) == {"bundled", "second seed", "random weights"}
    assert all(of["facts"] >= 300 for of in found["models"].values())
    assert found["models"]["bundled"]["weights"] == load("bundled").info.weights
    assert found["models"]["second seed"]["weights"] != found["models"]["bundled"]["weights"]
    for one in found["claims"]:
        sums = one["models"]
        for title in ("bundled", "second seed"):
            assert sums[title]["verdict"] == claims.verdict(BY_KEY[one["key"]], sums[title], sums["random weights"])


def test_the_card_tells_the_same() -> None:
    found = json.loads(claims.NUMBERS.read_text(encoding="utf-8"))
    card = " ".join((claims.ROOT / "factscope" / "demo" / "CARD.md").read_text(encoding="utf-8").split())
    for key in ("early site", "late site"):
        sums = next(one["models"] for one in found["claims"] if one["key"] == key)
        for title in ("bundled", "second seed"):
            low, high = sums[title]["interval"]
            assert f"{sums[title]['effect']:.0f}% [{low:.0f}, {high:.0f}]" in card


def test_readme_counts_the_claims() -> None:
    readme = (claims.ROOT / "README.md").read_text(encoding="utf-8")
    facts = {of["facts"] for of in json.loads(claims.NUMBERS.read_text(encoding="utf-8"))["models"].values()}
    assert f"{len(claims.CLAIMS)} claims" in readme and facts == {320} and "tested on 320 facts" in readme


def test_edits_were_measured_on_the_model_that_ships_and_on_enough_facts() -> None:
    found = json.loads((findings.DOCS / edit_claims.NUMBERS).read_text(encoding="utf-8"))
    assert found["model"]["weights"] == load("bundled").info.weights
    scores = {(one["method"], one["problem"], one["score"]): one for one in found["reported"]}
    for method in edit_claims.METHODS:
        assert scores[method, edit_claims.INJECTION, "rewrite"]["n"] == 200
        assert all(scores[method, problem, "rewrite"]["n"] == 50 for problem in edit_claims.OTHERS)
    for name, least in edit_claims.DEMANDED.items():
        assert scores["rome", edit_claims.INJECTION, name]["low"] >= least, name
    chosen = {(one["method"], one["layer"]): one["value"] for one in found["choosing"]
              if one["score"] == "overall_harmonic"}  # fmt: skip
    for method, layer in found["layers"].items():
        assert chosen[method, layer] == max(value for (of, _), value in chosen.items() if of == method)
    text = (findings.DOCS / findings.PAGE).read_text(encoding="utf-8")
    assert "| ROME, layer 1 | error-injection | 200 | 0.93 [0.91, 0.95] |" in text

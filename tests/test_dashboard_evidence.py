# ruff: noqa: F811, F401 - fixtures of the other test file
"""The evidence strip: an effect against its null at the same layer, and nothing told where nothing is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cli_runner import PROMPT, SUBJECT, tiny_handle
from test_dashboard_compare import OpenPage
from test_dashboard_pages import open_page, parts, said, settle, tiny

from dashboard import evidence
from factscope.experiments import attention_knockout
from factscope.experiments.attention_knockout import KnockoutSpec
from factscope.queries import Query


def result(changes: list[float]) -> Any:
    odds = np.array([changes])
    return SimpleNamespace(
        sources=("subject",),
        layers=tuple(range(len(changes))),
        p_base=0.9,
        p_knockout=np.full(odds.shape, 0.25),
        log_odds_change=odds,
    )


def test_the_largest_loss_that_its_null_does_not_reach_is_told() -> None:
    null = np.array([[-5.0, 0.1, -0.2], [0.0, -0.3, 0.2]])
    found = evidence.read(result([-4.0, -2.0, -1.0]), "subject", null, "2 draws")
    assert found.beats is True
    assert found.effect == "−2.0 nats around layer 1 (p 0.90 → 0.25)"
    assert found.null == "−0.3 to +0.1 nats there, 2 draws"


@pytest.mark.parametrize("changes", [[-4.0, -0.3, -0.1], [1.0, 2.0, 0.5], [-5.0, 0.0, -0.2]])
def test_a_loss_that_its_null_has_too_is_no_evidence(changes: list[float]) -> None:
    null = np.array([[-5.0, 0.1, -0.2], [0.0, -0.3, 0.2]])
    assert evidence.read(result(changes), "subject", null, "2 draws").beats is False


def test_a_rise_everywhere_is_no_loss_even_where_the_null_rises_more() -> None:
    assert evidence.read(result([0.5]), "subject", np.array([[2.0]]), "1 draw").beats is False


def test_without_a_null_nothing_is_told() -> None:
    found = evidence.read(result([-4.0]), "subject", None, "none (too few other tokens)")
    assert found.beats is None
    assert found.null == "none (too few other tokens)"


def test_the_strip_reads_the_numbers_of_the_experiment() -> None:
    """The finding is that of the table's rows, found by another way."""
    query = Query(prompt=PROMPT, subject=SUBJECT, answer="Paris")
    run = attention_knockout.run(tiny_handle(), query, KnockoutSpec(sources=("subject", "last")))
    null = np.zeros((1, 4))
    table = run.table()
    rows = table[table["source"] == "subject"]
    best = rows.loc[rows["log_odds_change"].idxmin()]
    found = evidence.read(run, "subject", null, "zero")
    assert found.beats is bool(best["log_odds_change"] < 0)
    assert f"around layer {best['layer']} " in found.effect


def strip(at: Any) -> dict[str, list[str]]:
    """The lines of every step by its name."""
    steps = [step.name for step in evidence.STEPS]
    noted = [data["lines"] for data in parts(at) if data.get("lines")]
    found = {name: lines for lines in noted for name in steps if lines[0].startswith(name)}
    assert list(found) == steps
    return found


def test_what_the_model_does_not_know_is_not_told(open_page: OpenPage) -> None:
    at = open_page(prompt="The capital of Japan is", subject="Japan", answer="Tokyo")
    lines = strip(at)
    assert lines["known?"][0] == "known? no"
    for name in ("relation read?", "subject read?"):
        assert lines[name] == [f"{name} not told", "Nothing is told, since the model does not know this."]


def test_every_step_has_effect_null_and_a_link(open_page: OpenPage) -> None:
    at = open_page(prompt="As everybody has heard, the capital of Japan is", subject="Japan")
    lines = strip(at)
    assert lines["known?"][0] == "known? no answer is named"
    for name in ("relation read?", "subject read?"):
        assert " nats around layer " in lines[name][1]
        assert lines[name][2].startswith("null: ") and "5 draws of other tokens" in lines[name][2]
    links = [element.proto.label for element in at.get("page_link")]
    assert links == ["See Flow", "See Flow"]


def test_a_prompt_without_a_subject_says_what_is_missing(open_page: OpenPage) -> None:
    lines = strip(open_page(prompt="As everybody has heard, the capital is"))
    assert lines["subject read?"][1] == "This prompt has no subject tokens."


def test_the_strip_gives_way_to_a_and_b(open_page: OpenPage) -> None:
    at = open_page(prompt="The capital of Japan is", subject="Japan", a="1")
    assert "B differs in" in said(at)
    assert not any(line.startswith("known?") for line in said(at).splitlines())

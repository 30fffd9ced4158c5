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


def rates(own: list[float], others: list[list[float]]) -> Any:
    """Layer -1 is the mean input embedding, which is no block's output."""
    rate, other = np.array([[9.0] * len(own), own]), np.array(others)
    stacked = np.stack([np.zeros_like(other), other], axis=1)
    return SimpleNamespace(
        positions=("last", "subject-last"),
        layers=tuple(range(-1, len(own) - 1)),
        rate=rate,
        other_rates=stacked,
        beats_null=rate > stacked.max(axis=0),
        ceiling=12.0,
    )


def test_the_highest_rate_that_no_other_subject_reaches_is_told() -> None:
    found = evidence.enriched(rates([8.0, 2.0, 6.0, 4.0], [[0.0, 1.0, 7.0, 3.0], [0.0, 0.0, 0.0, 1.0]]))
    assert found.beats is True
    assert found.effect == "attributes rate 4% at layer 2 (at most 12%)"
    assert found.null == "up to 3% there for 2 other subjects"


def test_a_rate_that_another_subject_has_too_is_no_enrichment() -> None:
    found = evidence.enriched(rates([8.0, 2.0, 6.0], [[0.0, 2.0, 7.0]]))
    assert found.beats is False
    assert "layer 1" in found.effect


def ranks(*attention: int) -> Any:
    return SimpleNamespace(
        sites=("mlp", "attention"),
        layers=tuple(range(len(attention))),
        target_rank=np.array([[1] * len(attention), attention]),
    )


def test_an_extraction_is_an_event_of_the_attention_where_the_null_has_none() -> None:
    found = evidence.extracted(ranks(40, 1, 1), ranks(1, 1, 7), "random weights")
    assert (found.beats, found.effect) == (True, "attention writes it as first choice in layers 1, 2")
    assert found.null == "rank 1 at best, random weights"
    assert evidence.extracted(ranks(40, 1, 9), ranks(1, 1, 7), "random weights").beats is False
    never = evidence.extracted(ranks(40, 3, 9), ranks(50, 60, 700), "x")
    assert (never.answer, never.effect) == ("no", "rank 3 at best, in layer 1")
    assert evidence.extracted(ranks(1), None, "none").beats is None


def traced(effects: list[list[float]], doubts: tuple[str, ...] = ()) -> Any:
    """Four tokens; the subject is tokens 1 and 2, the last one is read out."""
    grid = np.array(effects)
    return SimpleNamespace(
        doubts=doubts,
        corrupted=(1, 2),
        positions=(0, 1, 2, 3),
        layers=tuple(range(grid.shape[1])),
        indirect_effect=grid,
        p_corrupted=0.1,
        p_restored=grid + 0.1,
        p_clean=0.9,
        query=SimpleNamespace(subject=(1, 3), last=3, tokens=[SimpleNamespace(position=i) for i in range(4)]),
    )


def test_the_subject_state_that_gives_back_more_than_any_other_token_is_told() -> None:
    found = evidence.restorable(traced([[0.0, 0.6], [0.3, 0.5], [0.2, 0.1], [0.8, 0.8]]))
    assert found.beats is True
    assert found.effect == "p 0.10 \u2192 0.40 (clean 0.90) by token 1, layer 0"
    assert found.null == "p \u2264 0.10 there by any other token"
    assert evidence.restorable(traced([[0.4, 0.6], [0.3, 0.5], [0.2, 0.1], [0.8, 0.8]])).beats is False


def test_a_trace_in_doubt_tells_nothing() -> None:
    found = evidence.restorable(traced([[0.0], [0.3], [0.2], [0.8]], doubts=("There is little to restore.", "More.")))
    assert (found.beats, found.effect) == (None, "There is little to restore")


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
    assert links == ["See Flow", "See Flow", "See Lens", "See Heads", "See Trace"]


def test_a_prompt_without_a_subject_says_what_is_missing(open_page: OpenPage) -> None:
    lines = strip(open_page(prompt="As everybody has heard, the capital is"))
    assert lines["subject read?"][1] == "No subject is named."


def test_the_strip_gives_way_to_a_and_b(open_page: OpenPage) -> None:
    at = open_page(prompt="The capital of Japan is", subject="Japan", a="1")
    assert "B differs in" in said(at)
    assert not any(line.startswith("known?") for line in said(at).splitlines())

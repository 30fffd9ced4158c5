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
from factscope.experiments.traces import Cell, TraceResult, TraceSpec
from factscope.queries import Query
from factscope.tokens import Target, Token, TokenizedQuery


def result(subject: list[float], relation: list[float] | None) -> Any:
    odds = np.array([subject] if relation is None else [subject, relation])
    return SimpleNamespace(
        sources=("subject", "relation")[: len(odds)],
        layers=tuple(range(len(subject))),
        p_base=0.9,
        p_knockout=np.full(odds.shape, 0.25),
        log_odds_change=odds,
    )


def test_a_loss_larger_than_without_all_other_tokens_there_is_told() -> None:
    found = evidence.read(result([-4.0, -2.0, -1.0], [-3.9, -9.0, 0.0]), "subject", None)
    assert found.beats is True
    assert found.effect == "−4.0 nats around layer 0 (p 0.90 → 0.25)"
    assert found.null == "−3.9 there without the others"


@pytest.mark.parametrize(
    ("subject", "relation"),
    [([-4.0, -2.0], [-4.1, 0.0]), ([-0.49, 0.0], [0.0, 0.0]), ([1.0, 2.0], [3.0, 4.0]), ([-2.0, -1.9], [-2.0, 0.0])],
)
def test_a_loss_that_all_other_tokens_reach_or_that_is_small_is_no_evidence(
    subject: list[float], relation: list[float]
) -> None:
    """The layer is that of the largest loss: elsewhere the others may take less."""
    assert evidence.read(result(subject, relation), "subject", None).beats is False


def test_random_weights_may_deny_and_never_affirm() -> None:
    shown = result([-2.0, -1.0], [-0.5, 0.0])
    little, much = result([-0.1, -0.2], [-9.0, -9.0]), result([0.0, -2.5], [0.0, 0.0])
    found = evidence.read(shown, "subject", little)
    assert (found.beats, found.null) == (True, "−0.5 there without the others; −0.2 with random weights")
    assert evidence.read(shown, "subject", much).beats is False
    assert evidence.read(result([-2.0], [-3.0]), "subject", result([0.0], [0.0])).beats is False
    pending = evidence.read(shown, "subject", None, "being computed")
    assert (pending.beats, pending.null.endswith("random weights being computed")) == (None, True)


def test_without_other_tokens_nothing_is_told() -> None:
    found = evidence.read(result([-4.0], None), "subject", result([0.0], [0.0]))
    assert (found.beats, found.null) == (None, "no other tokens to compare with")


def test_the_strip_reads_the_numbers_of_the_experiment() -> None:
    """The finding is that of the table's rows, found by another way."""
    query = Query(prompt=PROMPT, subject=SUBJECT, answer="Paris")
    run = attention_knockout.run(tiny_handle(), query, KnockoutSpec(sources=("subject", "relation", "last")))
    table = run.table().set_index(["source", "layer"])["log_odds_change"]
    for source, other in (("subject", "relation"), ("relation", "subject")):
        layer = table[source].idxmin()
        lost = -table[source][layer]
        found = evidence.read(run, source, None)
        assert found.beats is bool(lost >= 0.5 and lost > max(0.0, -table[other][layer]))
        assert f"around layer {layer} " in found.effect


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
    assert (never.answer, never.effect) == ("no", "attention: rank 3 at best, in layer 1")
    assert evidence.extracted(ranks(1), None, "none").beats is None


def worded(prompt: str, subject: tuple[int, int]) -> TokenizedQuery:
    """A prompt of one token a word."""
    words = prompt.split()

    def role(i: int) -> Any:
        return "last" if i == len(words) - 1 else "subject" if subject[0] <= i < subject[1] else "relation"

    tokens = tuple(Token(position=i, id=i, text=f" {word}", display=word, role=role(i)) for i, word in enumerate(words))
    query = Query(prompt=prompt, span=subject, answer="Tokyo")
    ids = tuple(range(len(words)))
    return TokenizedQuery(query=query, ids=ids, tokens=tokens, subject=subject, warnings=(), exact_offsets=True)


def traced(span: tuple[int, int], effects: list[list[float]], *, corrupted: float = 0.1) -> TraceResult:
    """A trace of "The capital of Japan is" with a span of its tokens corrupted, p 0.9 clean."""
    seen = worded("The capital of Japan is", span)
    grid = np.array([effects])
    n = grid.shape[2]
    return TraceResult(
        spec=TraceSpec(), query=seen, model=SimpleNamespace(name="gpt2"),  # type: ignore[arg-type]
        target=Target(ids=(1,), text=" Tokyo"), window=1, positions=tuple(range(len(effects))), layers=tuple(range(n)),
        corrupted=tuple(range(*span)), noise_std=1.0, provenance="noise", seeds=(1,), p_clean=0.9, log_odds_clean=2.0,
        logit_difference_clean=np.nan, rank=1, known=True, taught=None,
        p_corrupted_by_seed=np.array([corrupted]), log_odds_corrupted_by_seed=np.array([-2.0]),
        logit_difference_corrupted_by_seed=np.array([np.nan]), p_restored_by_seed=grid + corrupted,
        log_odds_restored_by_seed=grid, logit_difference_restored_by_seed=grid * np.nan,
        warnings=(), seconds=1.0, passes=1,
    )  # fmt: skip


JAPAN_CARRIES = [[0.0] * 3, [0.0] * 3, [0.0] * 3, [0.8, 0.6, 0.2], [0.05, 0.3, 0.8]]
"""The subject's one token gives everything back at layer 0, before the read-out has anything of it."""


def test_what_is_so_by_construction_is_no_evidence() -> None:
    result = traced((3, 4), JAPAN_CARRIES)
    assert result.carried_from == 1
    assert result.early_site == (Cell(position=3, layer=1), pytest.approx(0.75))
    nothing = traced((3, 4), [[0.0] * 3] * 3 + [[0.8, 0.8, 0.8], [0.0, 0.0, 0.05]])
    assert (nothing.carried_from, nothing.early_site) == (3, None)
    assert evidence.restorable(nothing, result).beats is None


@pytest.mark.parametrize(
    ("null", "beats", "said"),
    [
        ([0.0, 0.1, 0.0], True, "12% back with “of” corrupted"),
        ([0.8, 0.72, 0.0], False, "90% back with “of” corrupted"),
    ],
)
def test_a_subject_must_give_back_more_than_other_corrupted_tokens(null: list[float], beats: bool, said: str) -> None:
    result = traced((3, 4), JAPAN_CARRIES)
    other = traced((2, 3), [[0.0] * 3, [0.0] * 3, null, [0.0] * 3, [0.0, 0.4, 0.8]])
    found = evidence.restorable(result, other)
    assert (found.beats, found.null) == (beats, said)
    assert found.effect == (
        "75% back by token 3, layer 1 (p 0.10 → 0.70, clean 0.90; below layer 1 restored by construction)"
    )
    several = evidence.restorable(traced((2, 4), JAPAN_CARRIES), None).effect
    assert "by construction" not in several and "below layer 1 only the corrupted tokens" in several


def test_a_tiny_share_is_no_evidence_and_a_null_that_takes_nothing_gives_nothing_back() -> None:
    little = traced((3, 4), [[0.0] * 3] * 3 + [[0.8, 0.1, 0.0], [0.0, 0.3, 0.8]])
    idle = traced((2, 3), [[0.0] * 3, [0.0] * 3, [0.004, 0.004, 0.0], [0.0] * 3, [0.0, 0.0, 0.01]], corrupted=0.89)
    assert evidence.restorable(little, idle).beats is False
    assert evidence.restorable(traced((3, 4), JAPAN_CARRIES), idle).null == "0% back with “of” corrupted"


def test_without_the_null_or_in_doubt_nothing_is_told() -> None:
    assert evidence.restorable(traced((3, 4), JAPAN_CARRIES), None, "being computed").beats is None
    doubted = evidence.restorable(traced((3, 4), JAPAN_CARRIES, corrupted=0.95), None)
    assert doubted.beats is None and doubted.effect.endswith("there is nothing to restore")


@pytest.mark.parametrize(
    ("prompt", "subject", "span"),
    [
        ("The capital of Japan is", (3, 4), (2, 3)),
        ("The capital of Japan is", (1, 4), (0, 1)),
        ("The City of London is a part of", (1, 4), (4, 7)),
        ("Japan is", (0, 1), None),
    ],
)
def test_the_other_tokens_are_as_many_and_as_near_as_there_are(
    prompt: str, subject: tuple[int, int], span: tuple[int, int] | None
) -> None:
    assert evidence.other_span(worded(prompt, subject)) == span


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
        assert lines[name][2].startswith("null: ") and "there without the others" in lines[name][2]
    links = [element.proto.label for element in at.get("page_link")]
    assert links == ["See Flow", "See Flow", "See Lens", "See Heads", "See Trace"]


def test_a_prompt_without_a_subject_says_what_is_missing(open_page: OpenPage) -> None:
    lines = strip(open_page(prompt="As everybody has heard, the capital is"))
    assert lines["subject read?"][1] == "No subject is named."


def test_the_strip_gives_way_to_a_and_b(open_page: OpenPage) -> None:
    at = open_page(prompt="The capital of Japan is", subject="Japan", a="1")
    assert "B differs in" in said(at)
    assert not any(line.startswith("known?") for line in said(at).splitlines())

"""What is said of an edit is what its probes say: what worked, failed, was damaged, and what was not asked."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from dashboard import edit_verdict, probes
from factscope.experiments.answers import AnswerScore, Reply
from factscope.experiments.edit_probes import ProbeRow
from factscope.experiments.editing import EditingSpec
from factscope.experiments.editing import run as edited
from factscope.models.loading import load
from factscope.queries import Probe, Query


def score(p: float) -> AnswerScore:
    return AnswerScore(log_p=(math.log(p),), greedy=p > 0.5)


def row(kind: str, target: tuple[float, float], true: tuple[float, float] | None, *, fact: int = 0) -> ProbeRow:
    """A prompt with p of the edit target and of the true answer, each before and after."""
    replies = [
        Reply(answers=tuple(score(pair[when]) for pair in (target, true) if pair is not None), top=0)
        for when in (0, 1)
    ]  # fmt: skip
    return ProbeRow(
        fact=fact, probe=Probe(kind=kind, prompt=f"{kind} prompt", answer="Tokyo"),
        before=replies[0], after=replies[1], top_before=" Tokyo", top_after=" Rome", text_after=" Something.",
    )  # fmt: skip


def told(*rows: ProbeRow, problem: str = "error-injection", facts: int = 1) -> tuple[str, str]:
    given = [SimpleNamespace(problem=problem, target="Rome", subject=f"S{n}") for n in range(facts)]
    tone, lines = edit_verdict.sentences(SimpleNamespace(rows=rows, facts=given))
    return tone, "\n".join(lines)


WORKED = row("fact", (0.01, 0.9), (0.9, 0.01))
FAILED = row("fact", (0.01, 0.2), (0.9, 0.7))


def test_a_good_edit_is_green() -> None:
    tone, said = told(
        WORKED,
        row("paraphrase", (0.01, 0.8), (0.9, 0.1)),
        row("neighbour", (0.01, 0.01), (0.9, 0.9)),
        row("other-relation", (0.01, 0.01), (0.9, 0.9)),
    )
    assert tone == "good"
    assert "The edit worked" in said and "“Rome” (p 0.01 before, 0.90 after)" in said
    assert "1 of 1 other wordings" in said
    assert said.count("Still right: the one") == 2


def test_what_failed_is_said_first_and_is_red() -> None:
    tone, said = told(FAILED, row("paraphrase", (0.01, 0.8), (0.9, 0.1)))
    assert tone == "bad"
    assert said.startswith("The edit failed: asked for the fact, the model says “Something”, not “Rome”")


def test_what_was_damaged_is_named_with_what_is_said_now() -> None:
    tone, said = told(
        WORKED,
        row("neighbour", (0.01, 0.9), (0.9, 0.05)),
        row("neighbour", (0.01, 0.01), (0.9, 0.9)),
        row("neighbour", (0.01, 0.01), (0.2, 0.01)),
    )
    assert tone == "warn"
    assert "Damaged: 1 of 2 neighbours that were right before is wrong now: neighbour prompt → Something." in said
    assert "No other words for the question are known" in said
    assert "No other facts about the subject are known" in said


def test_an_edit_of_the_sentence_alone_is_called_so() -> None:
    tone, said = told(WORKED, row("paraphrase", (0.01, 0.1), (0.9, 0.8)), row("paraphrase", (0.01, 0.2), (0.9, 0.7)))
    assert tone == "warn"
    assert "0 of 2 other wordings" in said and "of the sentence rather than of the fact" in said


def test_what_was_wrong_before_says_nothing_of_damage() -> None:
    _, said = told(WORKED, row("neighbour", (0.01, 0.01), (0.3, 0.1)))
    assert "None of 1 questions about other subjects with the same answer was answered right before" in said


@pytest.mark.parametrize(
    ("problem", "target", "says"),
    [
        ("fact-erasure", (0.9, 0.1), "The edit worked: the model says “Something”, no longer “Rome”"),
        ("fact-erasure", (0.9, 0.7), "The edit failed: the model still says “Rome”"),
        ("fact-erasure", (0.3, 0.2), "The edit had nothing to erase: the model did not say “Rome” before either"),
        ("fact-erasure", (0.3, 0.7), "The edit failed: the model did not say it before, and now says “Rome”"),
        ("fact-amplification", (0.6, 0.9), "“Rome” is more probable: p rose by 0.30, 75% of what it could (p 0.60"),
        ("fact-amplification", (0.6, 0.61), "The edit hardly worked: “Rome” is hardly more probable: p rose by 0.01,"),
        ("fact-amplification", (1.0, 1.0), "nothing to amplify: “Rome” had all of the probability"),
        ("fact-amplification", (0.9, 0.6), "The edit failed: “Rome” is no more probable"),
        ("fact-forcing", (0.1, 0.9), "The edit worked: asked for the fact with its subject noised"),
        ("tracing-reversal", (0.6, 0.9), "It did before, too."),
    ],
)
def test_each_problem_has_its_own_success(problem: str, target: tuple[float, float], says: str) -> None:
    assert says in told(row("fact", target, None), problem=problem)[1]


@pytest.mark.parametrize(
    ("problem", "fact", "others", "tone", "says"),
    [
        ("fact-erasure", (0.3, 0.2), [(0.3, 0.1)], "warn", "not said before either in 1 of 1"),
        ("fact-erasure", (0.9, 0.2), [(0.3, 0.1), (0.9, 0.1), (0.2, 0.7)], "warn", "in 1 of 2 other wordings where it"),
        ("fact-erasure", (0.9, 0.2), [(0.3, 0.1), (0.9, 0.1)], "good", "in 1 of 1 other wordings where it was said"),
        (
            "fact-amplification",
            (0.6, 0.9),
            [(0.6, 0.601), (0.6, 0.9)],
            "good",
            "in 1 of 2 other wordings it is clearly",
        ),
        ("fact-amplification", (0.6, 0.601), [(0.6, 0.9)], "warn", "in 1 of 1 other wordings it is clearly"),
    ],
)
def test_what_was_never_said_or_hardly_moved_is_no_success(
    problem: str, fact: tuple[float, float], others: list[tuple[float, float]], tone: str, says: str
) -> None:
    colour, said = told(row("fact", fact, None), *(row("paraphrase", other, None) for other in others), problem=problem)
    assert (colour, says in said) == (tone, True), said


def test_several_facts_are_counted_and_those_that_failed_named() -> None:
    tone, said = told(WORKED, row("fact", (0.01, 0.2), (0.9, 0.7), fact=1), facts=2)
    assert tone == "warn"
    assert said.startswith("1 of 2 edit targets are the first choice now. Not: S1.")


def test_before_anything_is_asked_nothing_is_claimed() -> None:
    assert told() == ("plain", "Nothing was asked yet.")


def test_the_files_hold_the_table_and_the_scores() -> None:
    spec = EditingSpec(new_answer="Rome", settings=(("steps", 3), ("contexts", "none")))
    query = Query(prompt="The capital of Japan is", subject="Japan", answer="Tokyo")
    result: Any = edited(load("bundled"), query, spec)
    assert probes.as_csv(result).decode().splitlines()[0].split(",") == list(result.table().columns)
    found = json.loads(probes.as_json(result))
    assert len(found["probes"]) == len(result.rows)
    for name in ("p_target_after", "p_true_before"):
        assert [one[name] for one in found["probes"]] == [None if p != p else p for p in result.table()[name]]
    by_name = {one["name"]: one for one in found["scores"]}
    assert by_name["rewrite"]["value"] == pytest.approx(result.fact_scores()[0].rewrite)
    assert by_name["fluency"]["value"] is None and "only recites facts" in by_name["fluency"]["reason"]
    assert len(probes.texts(result)) + len(probes.table(result)) == len(result.rows)
    assert not probes.table(result)["target after"].isna().any()


def test_files_keep_words_and_every_digit() -> None:
    rows = pd.DataFrame([{"prompt": "NaN is not null", "p": 0.12345678901234567, "q": math.nan}])
    scores = pd.DataFrame([{"name": "es", "value": math.nan, "reason": "NaN"}])
    info = SimpleNamespace(name="NaN/\udc80", revision="", weights="0")
    result: Any = SimpleNamespace(
        model=info, table=lambda: rows, scores=lambda: scores, summary=lambda: {"reason": "NaN", "low": math.nan}
    )
    found = json.loads(probes.as_json(result))
    assert found["probes"] == [{"prompt": "NaN is not null", "p": 0.12345678901234567, "q": None}]
    assert (
        found["model"] == "NaN/\udc80"
        and found["summary"] == {"reason": "NaN", "low": None}
        and found["scores"][0]["reason"] == "NaN"
    )
    assert repr(0.12345678901234567).encode() in probes.as_csv(result)


def test_the_list_says_what_was_done_to_the_answer() -> None:
    from types import SimpleNamespace

    from dashboard import weights

    def said(problem: str) -> str:
        fact = SimpleNamespace(subject="Eiffel Tower", target="Paris")
        return weights.said(SimpleNamespace(facts=[fact], problem=problem, layers=(1,), method="rome"))

    assert said("error-injection") == "Eiffel Tower → Paris (ROME, layer 1, error injection)"
    assert said("fact-erasure") == "Eiffel Tower: Paris erased (ROME, layer 1, fact erasure)"
    assert said("fact-amplification").startswith("Eiffel Tower: Paris amplified")


def test_probabilities_and_changes_are_written_as_everywhere() -> None:
    from dashboard import probes

    assert [probes._probability(p) for p in (3e-5, 0.5, float("nan"))] == ["3e−5", "0.50", ""]
    assert [probes._change(x) for x in (-0.0001, 0.25, -0.5, float("nan"))] == ["0", "+0.250", "−0.500", ""]

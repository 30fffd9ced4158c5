"""Pieces of the pages that need no browser: subject suggestion, verdicts, cost, messages, figures from results."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dashboard import fact_line, messages, panels, requests, runs
from dashboard.executor import Snapshot
from dashboard.link import HOME, Cursor, FlowChoice
from factscope.errors import SpecError
from factscope.experiments.attention_knockout import KnockoutSpec
from factscope.queries import Query


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("Beats Music is owned by", "Beats Music"),
        ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux"),
        ("The Eiffel Tower is located in the city of", "Eiffel Tower"),
        ("The capital of Japan is", "Japan"),
        ("The Lord of the Rings was written by", "Lord of the Rings"),
        ("Miles Davis plays the", "Miles Davis"),
        ("Zürich's canton is", "Zürich"),
        ("the colour of grass is", None),
        ("", None),
        ("東京 is the capital of", None),
    ],
)
def test_a_subject_is_suggested(prompt: str, subject: str | None) -> None:
    assert fact_line.suggest_subject(prompt) == subject


def test_the_longest_known_subject_wins_in_any_case() -> None:
    known = ("Beats", "Beats Music", "Music", "Apple")
    assert fact_line.suggest_subject("so beats music is owned by", known) == "beats music"


def prediction(**fields: object) -> SimpleNamespace:
    top = SimpleNamespace(text=" Rome", probability=0.5, display="·Rome")
    plain = {
        "target": SimpleNamespace(text=" Paris", n_tokens=1),
        "top": (top,),
        "p_target": 0.62,
        "rank": 1,
        "known": True,
        "taught": None,
        "continuation": " Paris.",
        "seconds": 1.0,
        "passes": 10,
        "query": SimpleNamespace(query=Query(prompt="The capital of France is"), subject_text=None),
        "model": SimpleNamespace(key="m", name="gpt2"),
    }
    return SimpleNamespace(**(plain | fields))


@pytest.mark.parametrize(
    ("fields", "tone", "says"),
    [
        ({}, "good", "knows this"),
        ({"known": False, "rank": 7}, "warn", "expects “Rome”"),
        ({"known": False, "rank": 1}, "warn", "does not go on so"),
        ({"known": None}, "plain", "No answer was given"),
        ({"model": SimpleNamespace(key="m", name="bundled")}, "plain", "No subject is named"),
        ({"taught": False}, "warn", "Not among the facts this model was taught; its confidence says nothing."),
        ({"taught": False, "known": False, "rank": 3}, "warn", "Not among the facts"),
        (
            {
                "taught": False,
                "known": False,
                "rank": 9,
                "query": SimpleNamespace(
                    query=Query(prompt="The capital of Japan is", subject="Japan", answer="Kyoto"), subject_text="Japan"
                ),
            },
            "warn",
            "The model was taught “Tokyo” here, not “Kyoto”.",
        ),
        ({"known": None, "model": SimpleNamespace(key="m", name="bundled")}, "plain", "No subject is named"),
        ({"known": False, "model": SimpleNamespace(key="m", name="random:gpt2")}, "warn", "These are random weights"),
        ({"p_target": 0.99999}, "good", "compare log-odds"),
        ({"continuation": "x" * 500}, "good", "…"),
    ],
)
def test_the_verdict(fields: dict[str, object], tone: str, says: str) -> None:
    found, lines = fact_line.verdict(prediction(**fields))
    assert found == tone
    assert says in " ".join(lines)


def test_our_own_errors_keep_their_sentence_and_others_get_an_id(caplog: pytest.LogCaptureFixture) -> None:
    assert messages.sentence(SpecError("window 0 is not between 1 and 8", "choose another")) == (
        "Window 0 is not between 1 and 8; choose another."
    )
    broken = ZeroDivisionError("secret detail")
    said = messages.sentence(broken)
    assert "secret detail" not in said
    assert messages.sentence(broken) == said
    assert len(caplog.records) == 1


def test_progress_in_words() -> None:
    assert panels.progress_words(Snapshot(key="k", state="waiting", ahead=2)) == "waiting, 2 before this one"
    running = Snapshot(key="k", state="running", done=37, total=96, seconds_left=4.2)
    assert panels.progress_words(running) == "37 of 96, about 4 s left"
    shared = Snapshot(key="k", state="running", done=37, total=96, ahead=1)
    assert panels.progress_words(shared) == "37 of 96, shared with 1 other run"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "under 1 s"), (4.4, "about 4 s"), (89, "about 89 s"), (600, "about 10 min")]
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert runs.duration(seconds) == words


def test_a_cost_above_twenty_seconds_asks() -> None:
    assert not runs.Cost(passes=96, seconds=19.0).asks
    assert runs.Cost(passes=9600, seconds=21.0).asks
    assert runs.Cost(passes=9600, seconds=21.0).words() == "9,600 runs, about 21 s"


def test_the_edge_from_a_cell_covers_the_window_around_its_layer() -> None:
    assert requests.edge_from(Cursor(position=4, layer=5), FlowChoice(window=3), 12) == "last:4:4-6"
    assert requests.edge_from(Cursor(position=4, layer=-1), FlowChoice(window=3), 12) == "last:4:0-1"
    assert requests.edge_from(Cursor(position=4, layer=11), FlowChoice(window=3), 12) == "last:4:10-11"


def test_the_home_requests_are_those_of_the_pages() -> None:
    asked = requests.home(("The Eiffel Tower stands in",))
    assert [kind for kind, _, _ in asked] == [
        "prediction",
        "logit_lens",
        *["attention_knockout"] * 2,
        *["causal_tracing"] * 6,
        *["subject_enrichment"] * 3,
        *["sub_updates"] * 8,
        "heads",
        "attribute_extraction",
        "prediction",
    ]
    assert all(query == HOME for _, query, _ in asked[:-1])
    assert requests.curve(FlowChoice()) == asked[2][2]


def test_python_lines_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels.state, "view", lambda: panels.state.View())
    lines = panels.python_lines(Query(prompt='it\'s "x"', subject="x"), KnockoutSpec(window=5), "attention_knockout")
    assert "from factscope import load, Query, attention_knockout, KnockoutSpec" in lines
    assert "KnockoutSpec(window=5)" in lines
    compile(lines, "lines", "exec")

"""The cost that is told before an edit: counted from forwards that were timed, near to what the edit then takes."""

from __future__ import annotations

import csv
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from dashboard import edit_cost as told
from dashboard.executor import Snapshot
from dashboard.link import ModelChoice
from factscope.editors.compute import delta_bytes
from factscope.errors import CapabilityError, FactScopeError, SpecError, TargetError
from factscope.experiments import edit_cost, editing
from factscope.experiments.edit_cost import EditCost, Speed
from factscope.models.handle import ModelHandle
from factscope.models.loading import load
from factscope.queries import Query
from tests.oracle.laboratory import handle_of, subject

QUERY = Query(prompt="The capital of Japan is", subject="Japan", answer="Tokyo")
EVEN = Speed(call=0.01, token=0.001, gradient_call=0.02, gradient_token=0.002, flops=1e9)
MORE = [("The capital of France is", "France", "Paris", "Oslo"), ("The capital of Italy is", "Italy", "Rome", "Lima")]


@lru_cache
def bundled() -> ModelHandle:
    return load("bundled")


@pytest.fixture
def facts(tmp_path: Path) -> str:
    place = tmp_path / "facts.csv"
    with place.open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "subject", "answer", "new_answer"), *MORE])
    return str(place)


def counted(**given: Any) -> EditCost:
    spec = editing.EditingSpec(**{"new_answer": "Rome", **given})
    return edit_cost.estimate(bundled(), QUERY, spec, EVEN)


def test_more_steps_facts_and_layers_cost_more(facts: str) -> None:
    plain = counted()
    assert plain.facts == 1 and plain.probes == 10
    assert plain.seconds < plain.seconds_at_most
    assert counted(settings=(("steps", 80),)).seconds > 1.3 * plain.seconds
    assert counted(layers=(1, 2)).seconds > 1.3 * plain.seconds
    assert counted(layers=(6,)).seconds < plain.seconds
    assert counted(settings=(("contexts", "none"),)).seconds < plain.seconds
    several = counted(facts=facts)
    assert several.facts == 3 and several.probes > plain.probes
    assert several.seconds > 2 * plain.seconds
    assert counted(method="ft", facts=facts).seconds > 2 * counted(method="ft").seconds


def test_what_never_stops_early_costs_all_its_steps() -> None:
    assert counted(problem="fact-erasure", new_answer=None).seconds == pytest.approx(
        counted(problem="fact-erasure", new_answer=None).seconds_at_most
    )
    endless = counted(settings=(("stop", 0.0),))
    assert endless.seconds == pytest.approx(endless.seconds_at_most) == pytest.approx(counted().seconds_at_most)


def test_the_memory_is_that_of_the_edit(facts: str) -> None:
    for method in ("rome", "memit", "ft"):
        spec = editing.EditingSpec(method=method, new_answer="Rome", facts=facts)
        settings = editing.chosen_settings(bundled(), spec)
        assert counted(method=method, facts=facts).n_bytes == delta_bytes(bundled(), settings, 3)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"new_answer": "Tokyo"}, TargetError, "'Tokyo'"),
        ({"layers": (99,)}, SpecError, "99"),
        ({"settings": (("steps", 0),)}, SpecError, "steps 0"),
    ],
)
def test_what_the_edit_refuses_its_cost_refuses_before(
    given: dict[str, Any], error: type[FactScopeError], says: str
) -> None:
    with pytest.raises(error, match=says):
        counted(**given)


def test_a_model_without_the_map_has_no_cost_but_a_reason() -> None:
    model = handle_of(subject("mixtral").model, "mixtral")
    query = Query(prompt="w5 w6 w7", subject="w6", answer="w9")
    with pytest.raises(CapabilityError):
        edit_cost.estimate(model, query, editing.EditingSpec(new_answer="w4", layers=(1,)), EVEN)


@pytest.mark.parametrize(("method", "several"), [("rome", False), ("memit", True), ("ft", False)])
def test_the_estimate_is_near_to_what_the_edit_takes(method: str, several: bool, facts: str) -> None:
    """Within a factor of two; of three tries, since the machine may have other things to do."""
    steps = {"rome": 12, "memit": 6, "ft": 12}[method]
    spec = editing.EditingSpec(
        method=method, new_answer="Rome", facts=facts if several else None,
        settings=(("steps", steps), ("stop", 0.0)),
    )  # fmt: skip
    ratios = []
    for _ in range(3):
        estimated = edit_cost.estimate(bundled(), QUERY, spec, edit_cost.speed(bundled()))
        ratios.append(editing.run(bundled(), QUERY, spec).seconds / estimated.seconds)
        if 0.5 < ratios[-1] < 2:
            return
    raise AssertionError(ratios)


def test_a_model_that_was_never_measured_is_timed_first() -> None:
    model = handle_of(subject("llama").model, "llama")
    calls = []
    found = edit_cost.speed(model, step=lambda: calls.append(1))
    assert len(calls) >= 4
    assert found.call > 0 and found.token > 0 and found.gradient_call > 0 and found.gradient_token > 0
    assert found.forward(100) > found.forward(1) > found.forward(1, share=0.25)
    assert found.flops > 1e5


# ------------------------------------------------------------------------------------------------------ in words


def cost(**given: Any) -> Snapshot:
    usual = EditCost(seconds=3.2, seconds_at_most=5.1, n_bytes=4096, facts=1, probes=10)
    return Snapshot(key="", state="done", result=replace(usual, **given))


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> Any:
    learned: dict[tuple[str, str], float] = {}
    monkeypatch.setattr(told, "_learned", lambda: learned)
    monkeypatch.setattr(told.state, "view", lambda: type("View", (), {"model": ModelChoice()}))
    return lambda **given: told.words(cost(**given), editing.EditingSpec())


def test_the_words_say_time_memory_and_how_many_facts(words: Any) -> None:
    assert words() == "about 3 s, at most 5 s"
    assert words(seconds=0.4, seconds_at_most=0.6) == "under 1 s"
    assert words(facts=4, n_bytes=268 * 2**20) == "4 facts, about 3 s, at most 5 s, 268.0 MiB"
    assert told.words(Snapshot(key="", state="running"), editing.EditingSpec()) == "counting …"


def test_what_an_edit_took_corrects_the_next_estimate(words: Any) -> None:
    told.learner(ModelChoice(), editing.EditingSpec(), 3.2)(6.4)
    assert words() == "about 6 s, at most 10 s"
    told.learner(ModelChoice(), editing.EditingSpec(), 3.2)(3200.0)
    assert words() == "about 10 s, at most 15 s"
    told.learner(ModelChoice(name="other"), editing.EditingSpec(), 3.2)(0.1)
    assert words() == "about 10 s, at most 15 s"

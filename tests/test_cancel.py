"""Every run on the bundled model can be stopped at any time: the next chance to stop is at most 200 ms away."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import factscope
from factscope import Query
from factscope.editors import collecting
from factscope.editors.edit import Edit
from factscope.experiments import edit_layers, editing
from factscope.experiments.edit_layers import LayersSpec
from factscope.experiments.editing import EditingSpec

LIMIT = 0.2
QUERY = Query(prompt="The Eiffel Tower is located in the city of", subject="Eiffel Tower", answer="Paris")
LONG = Query(
    prompt="Miles Davis was born in America. The violin is an instrument. In fact, everyone knows that the Eiffel Tower"
    " and the Brandenburg Gate are landmarks, and that the Eiffel Tower is located in the city of",
    subject="Brandenburg Gate",
)
RUNS: dict[str, tuple[Callable[..., Any], Any]] = {
    "predict": (factscope.predict, factscope.PredictionSpec()),
    "knockout curve": (factscope.attention_knockout, factscope.KnockoutSpec(control=10)),
    "knockout map": (factscope.attention_knockout, factscope.KnockoutSpec(sources=("each",))),
    "lens": (factscope.logit_lens, factscope.LensSpec()),
    "trace": (factscope.causal_tracing, factscope.TraceSpec(seeds=(1, 2))),
    "MLP trace": (factscope.causal_tracing, factscope.TraceSpec(site="mlp", sever="attention")),
    "zeroing": (factscope.representation_zeroing, factscope.ZeroingSpec(sources=("each",))),
    "enrichment": (factscope.subject_enrichment, factscope.EnrichmentSpec()),
    "sublayer knockout": (factscope.subject_enrichment, factscope.EnrichmentSpec(knockout="mlp")),
    "sub-updates": (factscope.sub_updates, factscope.SubUpdatesSpec()),
    "extraction": (factscope.attribute_extraction, factscope.ExtractionSpec(early="subject")),
    "heads": (factscope.heads, factscope.HeadsSpec(by_source=True)),
    "pattern": (factscope.attention_pattern, factscope.PatternSpec()),
    "counterfactual": (
        factscope.counterfactual_patching,
        factscope.CounterfactualSpec(prompt="The Colosseum is located in the city of", subject="Colosseum"),
    ),
}


ROME_SPEC = EditingSpec(new_answer="Rome")
EDITS: dict[str, tuple[Callable[..., Any], Any]] = {
    "ROME": (editing.run, ROME_SPEC),
    "MEMIT": (editing.run, EditingSpec(method="memit", new_answer="Rome")),
    "FT": (editing.run, EditingSpec(method="ft", new_answer="Rome")),
    "forcing by FT": (editing.run, EditingSpec(method="ft", problem="fact-forcing")),
    "erasure": (editing.run, EditingSpec(problem="fact-erasure")),
    "reversal": (editing.run, EditingSpec(problem="tracing-reversal")),
    "layers": (edit_layers.run, LayersSpec(new_answer="Rome", layers=(0, 3, 7))),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """All of a run's work on the thread whose time is taken: other work on the machine does not count."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("query", [QUERY, LONG], ids=["short", "long"])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_can_be_stopped_every_200_ms(name: str, query: Query, one_thread: None) -> None:
    run, spec = RUNS[name]
    model = factscope.load("bundled")
    run(model, QUERY, spec)  # what is done once for a model is not counted
    # One of three tries must do it: on a busy machine a thread's own seconds are longer, too.
    assert any(longest_wait(run, model, query, spec) <= LIMIT for _ in range(3))


@pytest.mark.parametrize(
    ("name", "query"),
    [
        *(pytest.param(name, QUERY, id=f"{name}-short") for name in EDITS),
        *(pytest.param(name, LONG, id=f"{name}-long") for name in ("ROME", "MEMIT", "FT")),
    ],
)
def test_an_edit_can_be_stopped_every_200_ms(name: str, query: Query, one_thread: None) -> None:
    run, spec = EDITS[name]
    assert any(longest_wait(run, factscope.load("bundled"), query, spec) <= LIMIT for _ in range(3))


FACTS = "prompt,subject,answer,new_answer\n" + "".join(
    f"The capital of {subject} is,{subject},{answer},Rome\n"
    for subject, answer in (("Japan", "Tokyo"), ("Spain", "Madrid"), ("Greece", "Athens"), ("Germany", "Berlin"))
)


@pytest.mark.parametrize("method", ["memit", "ft"])
def test_an_edit_of_several_facts_can_be_stopped_every_200_ms(method: str, tmp_path: Path, one_thread: None) -> None:
    file = tmp_path / "facts.csv"
    file.write_text(FACTS)
    spec = EditingSpec(method=method, facts=str(file), new_answer="Rome")
    assert any(longest_wait(editing.run, factscope.load("bundled"), QUERY, spec) <= LIMIT for _ in range(3))


@pytest.fixture(scope="module")
def edit() -> Edit:
    return editing.run(factscope.load("bundled"), QUERY, ROME_SPEC).edits[0]


def test_an_evaluation_can_be_stopped_every_200_ms(edit: Edit, one_thread: None) -> None:
    def evaluated(model: factscope.ModelHandle, query: Query, spec: Any, *, progress: Any) -> Any:
        return editing.evaluate(model, edit, None, spec, query=query, progress=progress)

    asked = editing.EvaluationSpec()
    assert any(longest_wait(evaluated, factscope.load("bundled"), QUERY, asked) <= LIMIT for _ in range(3))


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACTSCOPE_CACHE_DIR", str(tmp_path / "cache"))


def test_collecting_statistics_can_be_stopped_every_200_ms(own_folder: None, one_thread: None) -> None:
    model = factscope.load("bundled")
    tries = iter(range(3))

    def collected(model: factscope.ModelHandle, query: Query, layers: tuple[int, ...], *, progress: Any) -> Any:
        this = next(tries)  # what is collected already is not collected again
        texts = [f"{query.prompt} {this}.{n}" + " and so on" * (n % 40) for n in range(200)]
        return collecting.collect(model, collecting.Corpus.of(texts, "text"), layers, progress=progress)

    assert any(longest_wait(collected, model, QUERY, tuple(range(8))) <= LIMIT for _ in range(3))


def test_collecting_keeps_what_it_has_and_ends_within_200_ms_of_the_stop(own_folder: None, one_thread: None) -> None:
    model, took = factscope.load("bundled"), []
    for this in range(3):
        texts = [f"{QUERY.prompt} {this}.{n}" + " and so on" * (n % 40) for n in range(200)]
        told: list[float] = []

        def stop(done: int, total: int, partial: Any, told: list[float] = told) -> None:
            if done:
                told.append(time.thread_time())
                raise Stopped

        with pytest.raises(Stopped):
            collecting.collect(model, collecting.Corpus.of(texts, "text"), range(8), progress=stop)
        took.append(time.thread_time() - told[0])
    assert min(took) <= LIMIT, took


def longest_wait(run: Callable[..., Any], model: factscope.ModelHandle, query: Query, spec: Any) -> float:
    """Seconds of this thread between two chances to stop."""
    chances = [time.thread_time()]
    run(model, query, spec, progress=lambda *_: chances.append(time.thread_time()))
    chances.append(time.thread_time())
    assert len(chances) >= 3
    return max(after - before for before, after in itertools.pairwise(chances))


class Stopped(Exception):
    pass


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("predict", "lens", "pattern")])
def test_a_stopped_run_ends_there(name: str) -> None:
    run, spec = RUNS[name]
    calls: list[int] = []

    def stop(done: int, total: int, partial: Any) -> None:
        calls.append(done)
        if len(calls) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        run(factscope.load("bundled"), QUERY, spec, progress=stop)
    assert len(calls) == 2


@pytest.mark.parametrize("name", EDITS)
def test_a_stopped_edit_ends_there_and_leaves_the_model_as_it_was(name: str) -> None:
    run, spec = EDITS[name]
    model = factscope.load("bundled")
    before = factscope.predict(model, QUERY)
    calls: list[int] = []

    def stop(done: int, total: int, partial: Any) -> None:
        calls.append(done)
        if done >= 0.3 * total:
            raise Stopped

    with pytest.raises(Stopped):
        run(model, QUERY, spec, progress=stop)
    n = len(calls)
    after = factscope.predict(model, QUERY)
    assert len(calls) == n > 2
    assert not any(weight.requires_grad for weight in model.parts.wiring.head.parameters())  # type: ignore[union-attr]
    assert (after.p_target, after.rank, after.top) == (before.p_target, before.rank, before.top)

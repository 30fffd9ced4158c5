"""Every run on the bundled model can be stopped at any time: the next chance to stop is at most 200 ms away."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import factscope
from factscope import Query

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

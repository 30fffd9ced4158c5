"""How long Apply takes on the bundled model: ROME, and the probes before and after, without continuations."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

import factscope
from factscope import Query
from factscope.experiments import editing

WITHIN_SECONDS = 3.0
PROBES = 12
HOME = Query(prompt="The Eiffel Tower is located in the city of", subject="Eiffel Tower", answer="Paris")
SPEC = editing.EditingSpec(new_answer="Rome", evaluation=editing.EvaluationSpec(texts=0, sampled=False))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """All of the work on the thread whose processor time is taken.

    What others do on the machine then counts little, and on two free cores the page is no slower than this.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_apply_takes_less_than_three_seconds(one_thread: None) -> None:
    model = factscope.load("bundled")
    took = []
    for _ in range(3):
        began = time.thread_time()
        found = editing.run(model, HOME, SPEC)
        took.append(time.thread_time() - began)
    assert len(found.rows) >= PROBES and all(row.after is not None for row in found.rows)
    assert found.table()["p_target_after"][0] > 0.9
    print(f"\nApply, ROME and {len(found.rows)} probes on one thread: best of 3 {min(took):.2f} s")
    assert min(took) < WITHIN_SECONDS, took

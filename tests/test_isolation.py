"""Sessions that share a model never see each other's interventions: one dispatcher, one plan per context."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from factscope.errors import Cancelled
from factscope.experiments.attention_knockout import KnockoutSpec, run
from factscope.experiments.logit_lens import LensSpec
from factscope.experiments.logit_lens import run as lens
from factscope.models.dispatch import _ACTIVE, Plan
from factscope.models.handle import ModelHandle
from tests.oracle.laboratory import distinct_prompt, handle_of, query_on, subject

THREADS = 8
CALLS = 1008
"""Per model, over all threads."""
LENGTH = 7
SPAN = (2, 4)

Job = Callable[[ModelHandle, list[int]], list[np.ndarray]]


@lru_cache
def shared(family: str) -> tuple[ModelHandle, list[int]]:
    chosen = subject(family)
    return handle_of(chosen.model), distinct_prompt(chosen.model, LENGTH, seed=4)


def knockout_job(spec: KnockoutSpec) -> Job:
    return lambda handle, ids: [run(handle, query_on(ids, SPAN), spec).p_knockout]


def lens_job(spec: LensSpec) -> Job:
    def job(handle: ModelHandle, ids: list[int]) -> list[np.ndarray]:
        result = lens(handle, query_on(ids, SPAN), spec)
        return [result.target_probability, result.entropy]

    return job


def plain_job(handle: ModelHandle, ids: list[int]) -> list[np.ndarray]:
    return [handle.forward(torch.tensor([ids])).numpy()]


def half_job(handle: ModelHandle, ids: list[int]) -> list[np.ndarray]:
    """A run whose owner stops it in the middle."""

    def stop(done: int, total: int, partial: Any) -> None:
        if done:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(handle, query_on(ids, SPAN), KnockoutSpec(sources=("each",), window=1), progress=stop)
    return plain_job(handle, ids)


JOBS: tuple[Job, ...] = (
    plain_job,
    knockout_job(KnockoutSpec(window=1)),
    knockout_job(KnockoutSpec(edges=("last:subject:1-3:0,2", "5:3:*"))),
    lens_job(LensSpec()),
    plain_job,
    knockout_job(KnockoutSpec(window=3, heads=("1.0", "2.*"))),
    half_job,
    lens_job(LensSpec(site="attention", projection="raw")),
)


def state_of(handle: ModelHandle) -> list[Any]:
    """Everything that a careless intervention could leave behind."""
    hooks = [
        (name, len(m._forward_hooks), len(m._forward_pre_hooks), m.__dict__.get("forward"))
        for name, m in handle._model.named_modules()
    ]
    return [hooks, repr(handle._model.config)]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_many_threads_with_different_plans_on_one_model(family: str) -> None:
    handle, ids = shared(family)
    expected = [job(handle, ids) for job in JOBS]
    weights = {name: value.clone() for name, value in handle._model.state_dict().items()}
    before = state_of(handle)
    wrong: list[str] = []
    calls = [0] * THREADS
    start = threading.Barrier(THREADS)

    def work(thread: int) -> None:
        start.wait()
        for step in range(CALLS // THREADS):
            which = (thread + step * (1 + thread % 3)) % len(JOBS)
            found = JOBS[which](handle, ids)
            calls[thread] += 1
            for ours, right in zip(found, expected[which], strict=True):
                if not np.allclose(ours, right, atol=1e-6, rtol=0, equal_nan=True):
                    wrong.append(f"thread {thread}, job {which}: {np.abs(ours - right).max()}")

    with ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(work, thread) for thread in range(THREADS)]:
            future.result()
    assert sum(calls) >= 1000
    assert wrong == []
    assert all(torch.equal(value, weights[name]) for name, value in handle._model.state_dict().items())
    assert state_of(handle) == before


def test_the_jobs_really_differ() -> None:
    """If plans leaked, numbers would change by much more than rounding."""
    handle, ids = shared("gpt2")
    plain = handle.forward(torch.tensor([ids]))[0, -1].softmax(-1)
    for job in (JOBS[1], JOBS[2], JOBS[5]):
        assert float(np.abs(job(handle, ids)[0] - float(plain.max())).max()) > 0.05


def test_a_new_thread_runs_the_plain_model() -> None:
    """A thread starts with an empty context: a plan does not follow, unless the context is handed over."""
    handle, ids = shared("llama")
    tokens = torch.tensor([ids])
    plain = handle.forward(tokens)
    keep = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    keep[..., -1, 1:4] = False
    found: dict[str, torch.Tensor] = {}

    def forward(name: str) -> None:
        with torch.no_grad():
            found[name] = handle._model(tokens).logits

    with handle._dispatcher.running(Plan(keep=dict.fromkeys(range(4), keep))):
        forward("here")
        threads = [threading.Thread(target=forward, args=("new",))]
        threads.append(threading.Thread(target=copy_context().run, args=(forward, "copied")))
        for thread in threads:
            thread.start()
            thread.join()
    forward("after")
    assert torch.equal(found["new"], plain)
    assert torch.equal(found["after"], plain)
    assert torch.equal(found["copied"], found["here"])
    assert float((found["here"] - plain).abs().max()) > 0.1


@pytest.mark.parametrize("error", [Cancelled, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("when", [0, 1])
def test_a_progress_that_raises_leaves_everything_as_it_was(error: type[BaseException], when: int) -> None:
    handle, ids = shared("gpt2")
    before, plain = state_of(handle), handle.forward(torch.tensor([ids]))
    steps: list[int] = []

    def stop(done: int, total: int, partial: Any) -> None:
        steps.append(done)
        if len(steps) > when:
            raise error

    for experiment in (
        lambda: run(handle, query_on(ids, SPAN), progress=stop),
        lambda: lens(handle, query_on(ids, SPAN), progress=stop),
    ):
        steps.clear()
        with pytest.raises(error):
            experiment()
        assert _ACTIVE.get() is None
        assert state_of(handle) == before
        assert torch.equal(handle.forward(torch.tensor([ids])), plain)


def test_a_forward_that_fails_leaves_no_plan() -> None:
    handle, ids = shared("gpt2")
    too_narrow = torch.zeros(1, LENGTH, 3)
    with pytest.raises(RuntimeError):
        handle.forward(torch.tensor([ids]), Plan(start_layer=1, resume=too_narrow))
    assert _ACTIVE.get() is None
    assert torch.isfinite(handle.forward(torch.tensor([ids]))).all()


def test_two_models_do_not_share_a_plan() -> None:
    first, ids = shared("gpt2")
    second, _ = shared("llama")
    plain = second.forward(torch.tensor([ids]))
    keep = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    keep[..., -1, 1:4] = False
    with first._dispatcher.running(Plan(keep=dict.fromkeys(range(4), keep))), torch.no_grad():
        assert torch.equal(second._model(torch.tensor([ids])).logits, plain)


def test_a_plan_that_cuts_nothing_changes_nothing() -> None:
    """Bit for bit."""
    for family in ("gpt2", "llama"):
        handle, ids = shared(family)
        keep = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
        with torch.no_grad():
            untouched = subject(family).model(torch.tensor([ids]), use_cache=False).logits
        assert torch.equal(handle.forward(torch.tensor([ids])), untouched)
        assert torch.equal(handle.forward(torch.tensor([ids]), Plan(keep=dict.fromkeys(range(4), keep))), untouched)

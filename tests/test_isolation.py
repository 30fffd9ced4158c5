"""Sessions that share a model never see each other's interventions: one dispatcher, one plan per context."""

from __future__ import annotations

import itertools
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
from factscope.interventions import engine
from factscope.interventions.attention import Cut
from factscope.interventions.base import Base, Noise
from factscope.interventions.intervention import Intervention, Patch, PatchSite
from factscope.interventions.weights import WeightDelta
from factscope.models.dispatch import _ACTIVE, Plan
from factscope.models.handle import ModelHandle
from tests.oracle.laboratory import distinct_prompt, handle_of, query_on, subject
from tests.oracle.questions import Path, Setting, expected, on_path
from tests.oracle.whole import Whole

THREADS = 8
CALLS = 1008
"""Per model and path, over all threads; two models."""
PATHS: tuple[Path, ...] = ("swept", "rows")
LENGTH = 7
SPAN = (2, 4)

Job = Callable[[ModelHandle, list[int]], list[np.ndarray]]


@lru_cache
def shared(family: str, path: Path = "swept") -> tuple[ModelHandle, list[int]]:
    """One model for both paths."""
    if path != "swept":
        handle, ids = shared(family)
        return on_path(handle, path), ids
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


def _noise(seed: int, replace: bool) -> Callable[[int], Noise]:
    def noise(width: int) -> Noise:
        values = torch.randn(2, 2, width, generator=torch.Generator().manual_seed(seed)).double()
        return Noise(positions=SPAN, values=values, replace=replace)

    return noise


def _delta(layer: int, width: int) -> WeightDelta:
    generator = torch.Generator().manual_seed(layer)
    right = torch.randn(width, width, generator=generator) * (0.5 * width**-0.5)
    return WeightDelta(layer=layer, place="output_projection", right=right, bias=torch.ones(width) * 0.2)


def settings_of(handle: ModelHandle, ids: list[int], which: int) -> tuple[Setting, Setting]:
    """A clean run, and one with noise of its own kind; the second kind has an edit in both."""
    width = handle.info.d_model
    deltas = (_delta(2, width),) if which else ()
    clean = Setting(ids=tuple(ids), n_readout=1 + which, deltas=deltas)
    noise = _noise(which, replace=bool(which))(width)
    return clean, Setting(ids=tuple(ids), n_readout=1 + which, noise=noise, deltas=deltas)


def runs_of(which: int, clean: Base) -> list[Intervention]:
    """States and updates restored or put to zero at several layers, alone and beside a cut."""
    cut = Cut(layer=2, queries=(LENGTH - 1,), keys=(1, 3), heads=(0, 2) if which else None)
    chosen: tuple[tuple[int, PatchSite, tuple[Cut, ...]], ...]
    chosen = (1, "output", ()), (which, "attention", (cut,)), (2, "mlp", ())
    runs = [
        Intervention(patches=(Patch(layer=layer, site=site, positions=(2 + which, 4), source=source),), cuts=cuts)
        for layer, site, cuts in chosen
        for source in (clean, None)
    ]
    return [*runs, Intervention(cuts=(cut,)), runs[0]]


def engine_job(which: int) -> Job:
    """Interventions of all kinds on noisy samples."""

    def job(handle: ModelHandle, ids: list[int]) -> list[np.ndarray]:
        clean, base = (setting.base(handle) for setting in settings_of(handle, ids, which))
        found: dict[int, np.ndarray] = {}
        for indices, readout in engine.run(handle, base, runs_of(which, clean)):
            found |= dict(zip(indices, readout.logits().double().softmax(-1).numpy(), strict=True))
        return [found[index] for index in sorted(found)]

    return job


def cancelled_job(handle: ModelHandle, ids: list[int]) -> list[np.ndarray]:
    """Interventions that are stopped between two layers; then the plain model."""
    clean, base = (setting.base(handle) for setting in settings_of(handle, ids, 0))
    steps: list[None] = []

    def stop() -> None:
        steps.append(None)
        if len(steps) > 2 or not handle.capabilities["packed"].ok:
            raise Cancelled

    with pytest.raises(Cancelled):
        list(engine.run(handle, base, runs_of(0, clean), step=stop))
    return plain_job(handle, ids)


JOBS: tuple[Job, ...] = (
    plain_job,
    engine_job(0),
    engine_job(1),
    cancelled_job,
    knockout_job(KnockoutSpec(window=1)),
    knockout_job(KnockoutSpec(edges=("last:subject:1-3:0,2", "5:3:*"))),
    lens_job(LensSpec()),
    plain_job,
    knockout_job(KnockoutSpec(window=3, heads=("1.0", "2.*"))),
    half_job,
    lens_job(LensSpec(site="attention", projection="raw")),
    plain_job,
    plain_job,
)


def state_of(handle: ModelHandle) -> list[Any]:
    """Everything that a careless intervention could leave behind."""
    hooks = [
        (name, len(m._forward_hooks), len(m._forward_pre_hooks), m.__dict__.get("forward"))
        for name, m in handle._model.named_modules()
    ]
    return [hooks, repr(handle._model.config)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_many_threads_with_different_plans_on_one_model(family: str, path: Path) -> None:
    handle, ids = shared(family, path)
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
            if _ACTIVE.get() is not None:
                wrong.append(f"thread {thread}, job {which}: a plan is left")

    with ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(work, thread) for thread in range(THREADS)]:
            future.result()
    assert sum(calls) >= 1000
    assert wrong == []
    assert all(torch.equal(value, weights[name]) for name, value in handle._model.state_dict().items())
    assert state_of(handle) == before


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("which", [0, 1])
def test_the_jobs_are_right_when_nobody_else_is_there(family: str, path: Path, which: int) -> None:
    """What the threads are compared with, against whole forwards of a copy; and its runs are all different."""
    handle, ids = shared(family, path)
    both = settings_of(handle, ids, which)
    clean, base = (setting.base(handle) for setting in both)
    whole = Whole(subject(family).model)
    sources = {id(clean): both[0].forwards(whole), id(base): both[1].forwards(whole)}
    right = expected(whole, both[1], runs_of(which, clean), sources).numpy()
    found = np.stack(engine_job(which)(handle, ids))
    assert float(np.abs(found - right).max()) <= 1e-5
    for i, j in itertools.combinations(range(len(right) - 1), 2):
        assert float(np.abs(right[i] - right[j]).max()) > 1e-3, (i, j)


def test_the_jobs_really_differ() -> None:
    """If plans leaked, numbers would change by much more than rounding."""
    handle, ids = shared("gpt2")
    plain = handle.forward(torch.tensor([ids]))[0, -1].softmax(-1)
    for job in (JOBS[4], JOBS[5], JOBS[8]):
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
    """Bit for bit; the plain model itself is tuned on load, which moves last bits."""
    for family in ("gpt2", "llama"):
        handle, ids = shared(family)
        keep = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
        with torch.no_grad():
            original = subject(family).model(torch.tensor([ids]), use_cache=False).logits
        untouched = handle.forward(torch.tensor([ids]))
        assert float((untouched - original).abs().max()) <= 1e-4
        assert torch.equal(handle.forward(torch.tensor([ids]), Plan(keep=dict.fromkeys(range(4), keep))), untouched)

"""What is measured, and the ratios that must be reached and are aimed at."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks import shapes
from benchmarks.rows import Task, bundled_knockouts, bundled_lens, knockouts, lenses, traces, values, zeros
from benchmarks.shapes import Shape

SAMPLE = 16
"""Cells that a slow reference runs a round, drawn anew each time and scaled to all."""
PEER_SAMPLE = 8
"""The same of another library."""
TRACE_SAMPLE = 6
"""The same of a trace, whose cells are eleven rows each."""
VALUE_SAMPLE = 4
"""The same of a search for v*, whose cells are the steps: 22 rows forward and backward each."""

Marks = dict[int, tuple[float, float]]
"""By number of tokens: must, aim."""
KNOCKOUT: Marks = {8: (25, 40), 16: (40, 60), 32: (60, 90)}
KNOCKOUT_BATCHED: Marks = {8: (7, 10), 16: (14, 20), 32: (25, 38)}
TRACE: Marks = {8: (7.5, 11), 16: (7.5, 10), 32: (6.5, 9)}
WINDOWS: Marks = {8: (6, 9), 16: (6, 9)}
LENS: Marks = {8: (2.8, 4), 16: (1.7, 2.4), 32: (1.25, 1.7)}
ZERO: Marks = {8: (10, 15), 16: (10, 15)}
VALUE: Marks = {8: (2, 4), 12: (2, 4), 16: (2, 4), 32: (2, 4)}
PEERS = {"attention knockout": KNOCKOUT[8][0], "causal trace": TRACE[8][0]}
"""Against other libraries: the first mark of the row."""


def tasks(*, mode: str, only_bundled: bool = False) -> Iterator[Task]:
    """The rows, one after another; a model is made when its first row comes up."""
    bundled = shapes.bundled()
    yield bundled_knockouts(bundled, 12, size=3, at_least=10)
    yield bundled_lens(bundled, 12)
    yield _marked(partial(values, bundled, 12), VALUE[12])
    if only_bundled:
        return
    sample = 0 if mode == "full" else SAMPLE
    yield from _of(shapes.small(), (8, 16) if mode == "quick" else (8, 16, 32), sample, quick=mode == "quick")
    if mode != "quick":
        yield from _medium(shapes.medium(), sample, traced=mode == "full")


def _of(shape: Shape, lengths: tuple[int, ...], sample: int, *, quick: bool) -> Iterator[Task]:
    for tokens in lengths:
        yield _marked(partial(knockouts, shape, tokens, sample=sample), KNOCKOUT[tokens])
        yield _marked(partial(knockouts, shape, tokens, batched=True, sample=sample), KNOCKOUT_BATCHED[tokens])
        yield _marked(partial(lenses, shape, tokens), LENS[tokens])
        if quick and tokens > 8:
            continue
        yield _marked(partial(values, shape, tokens, sample=min(sample, VALUE_SAMPLE)), VALUE[tokens])
        yield _marked(partial(traces, shape, tokens, sample=min(sample, TRACE_SAMPLE)), TRACE[tokens])
        if tokens not in WINDOWS:
            continue
        for site in () if quick else ("mlp", "attention"):
            yield _marked(
                partial(traces, shape, tokens, site=site, size=10, sample=min(sample, TRACE_SAMPLE)), WINDOWS[tokens]
            )
        for site in ("mlp",) if quick else ("mlp", "attention"):
            yield _marked(partial(zeros, shape, tokens, site=site, sample=sample), ZERO[tokens])


def _medium(shape: Shape, sample: int, *, traced: bool) -> Iterator[Task]:
    yield _marked(partial(knockouts, shape, 16, sample=sample), KNOCKOUT[16])
    yield _marked(partial(knockouts, shape, 16, batched=True, sample=sample), KNOCKOUT_BATCHED[16])
    if traced:
        yield _marked(partial(traces, shape, 16, sample=min(sample, TRACE_SAMPLE)), TRACE[16])


def _marked(make: partial[Task], marks: tuple[float, float]) -> Task:
    """A row with its marks; a reference that runs whole runs once."""
    return make(at_least=marks[0], aim=marks[1], once=make.keywords.get("sample") == 0)

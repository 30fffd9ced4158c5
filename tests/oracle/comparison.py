"""The experiments of factscope beside the plain computation: the same question, two answers, how far they are apart."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from factscope.experiments.attention_knockout import KnockoutResult, KnockoutSpec, run
from factscope.models.handle import ModelHandle
from tests.oracle.laboratory import MOVES, ROUNDING, Subject, query_on
from tests.oracle.plain import Edge, edges, layers_of_window, log_odds, log_probability

Cells = Mapping[tuple[int, int], Collection[Edge]]
"""(row, column) of the result's grid to the edges that are forbidden there."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Difference:
    """Largest deviations over the cells of one result, and how far the plain computation's probabilities moved."""

    p: float
    log_odds_change: float
    percent: float
    moved: np.ndarray
    p_base: float

    @property
    def ok(self) -> bool:
        """Within float32 rounding; the percentage allows twice the rounding of a probability, over p_base."""
        allowed = 100 * 2 * ROUNDING / self.p_base
        return self.p <= ROUNDING and self.log_odds_change <= 5e-4 and self.percent <= allowed

    @property
    def visible(self) -> float:
        """Share of the cells that move p by more than 0.05."""
        return float((self.moved > MOVES).mean())


class Oracle:
    """The plain computation of one prompt; remembers what it has computed."""

    def __init__(self, subject: Subject, ids: Sequence[int], answer: Sequence[int] = ()) -> None:
        self.subject, self.ids = subject, list(ids)
        self.answer = list(answer) or [int(subject.trace(ids).logits[-1].argmax())]
        self._known: dict[frozenset[Edge], tuple[float, float]] = {}

    def score(self, forbidden: Collection[Edge] = ()) -> tuple[float, float]:
        """Probability and log-odds of the answer, whole, with these edges forbidden."""
        key = frozenset(forbidden)
        if key not in self._known:
            trace = self.subject.trace([*self.ids, *self.answer[:-1]], key)
            p = float(log_probability(trace, len(self.ids), self.answer).exp())
            self._known[key] = p, log_odds(trace, len(self.ids), self.answer)
        return self._known[key]


def grid(
    sources: Sequence[Sequence[int]],
    size: int,
    n_layers: int,
    queries: Sequence[int],
    heads: Mapping[int, Sequence[int]] | None = None,
) -> dict[tuple[int, int], set[Edge]]:
    """What a curve or map forbids in each cell: every source set around every layer, in all or chosen heads."""
    cells: dict[tuple[int, int], set[Edge]] = {}
    for row, keys in enumerate(sources):
        for center in range(n_layers):
            layers = layers_of_window(center, size, n_layers)
            if heads is None:
                cells[row, center] = edges(layers, queries, keys)
            else:
                chosen = [edges([layer], queries, keys, heads[layer]) for layer in layers if layer in heads]
                cells[row, center] = set().union(*chosen)
    return cells


def curve_sets(length: int, span: tuple[int, int]) -> list[list[int]]:
    """Subject, relation and last of a prompt without special tokens."""
    inside = [p for p in range(*span) if p != length - 1] or [length - 1]
    return [inside, [p for p in range(length - 1) if p not in range(*span)], [length - 1]]


def difference(result: KnockoutResult, oracle: Oracle, cells: Cells) -> Difference:
    """How far a result is from the plain computation."""
    p_base, odds_base = oracle.score()
    expected = np.full(result.p_knockout.shape, np.nan)
    odds = np.full(result.p_knockout.shape, np.nan)
    for at, forbidden in cells.items():
        expected[at], odds[at] = oracle.score(forbidden)
    percent = 100 * (expected - p_base) / p_base
    worst_p = max(_worst(result.p_knockout, expected), abs(result.p_base - p_base))
    return Difference(
        p=worst_p,
        log_odds_change=_worst(result.log_odds_change, odds - odds_base),
        percent=_worst(result.relative_change_percent, percent),
        moved=np.abs(expected - p_base).ravel(),
        p_base=p_base,
    )


def knockout(
    oracle: Oracle,
    span: tuple[int, int],
    spec: KnockoutSpec,
    cells: Cells,
    handle: ModelHandle | None = None,
    **more: Any,
) -> Difference:
    """Run the experiment on the oracle's prompt and compare."""
    query = query_on(oracle.ids, span, oracle.answer if len(oracle.answer) > 1 else (), **more)
    return difference(run(handle or oracle.subject.handle, query, spec), oracle, cells)


def _worst(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest deviation; a missing or infinite number is infinitely wrong."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max())

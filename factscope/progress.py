"""How a computation tells how far it is, and how it is stopped or made to wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

STEP_SECONDS = 0.03
"""Shortest time between two calls of progress from within a computation."""

Progress = Callable[[int, int, Any], None]
"""``progress(done, total, partial)``: steps done, steps in all, the result so far (or None). May raise
``Cancelled``."""


class Timed:
    """A progress callback that knows how long the computation itself has taken.

    Progress may wait: it is where a run hands its turn to other visitors.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._started = time.perf_counter()
        self._outside = 0.0
        self._last = self._started, (0, 0)

    def __call__(self, done: int, total: int, partial: Any) -> None:
        """Hand on to the caller's progress."""
        called = time.perf_counter()
        try:
            self._progress(done, total, partial)
        finally:
            now = time.perf_counter()
            self._outside += now - called
            self._last = now, (done, total)

    def step(self) -> None:
        """Between layers of a long computation: the caller's progress may end it, or hand the turn to others."""
        if time.perf_counter() - self._last[0] > STEP_SECONDS:
            self(*self._last[1], None)

    @property
    def seconds(self) -> float:
        """Seconds since the start without those spent in progress."""
        return time.perf_counter() - self._started - self._outside


def silent(done: int, total: int, partial: Any) -> None:
    """A progress callback that does nothing."""

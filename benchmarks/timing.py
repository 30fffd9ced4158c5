"""CPU seconds of two ways to the same numbers, interleaved in one process."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def cpu_seconds(action: Callable[[], Any]) -> float:
    """Processor time of this process: the clock on the wall counts other people's jobs too."""
    gc.collect()
    begin = time.process_time()
    action()
    return time.process_time() - begin


def interleaved(actions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Every action once a round, in turn; the comparison of numbers before has warmed them up."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            seconds[name].append(cpu_seconds(action))
    return seconds


def median(values: list[float]) -> float:
    """The middle one."""
    return statistics.median(values)

"""CPU seconds of two ways to the same numbers, interleaved in one process."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch


def cpu_seconds(action: Callable[[], Any]) -> float:
    """Processor time of this process: the clock on the wall counts other people's jobs too."""
    return timed(action)[0]


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time, and what the action gave."""
    gc.collect()
    begin = time.process_time()
    found = action()
    return time.process_time() - begin, found


def interleaved(actions: Mapping[str, Callable[[int], Any]], rounds: int) -> tuple[dict[str, list[float]], list[Any]]:
    """Every action once a round, in turn; the comparison of numbers before has warmed them up.

    Args:
        actions: by name; each is given the number of the round.

    Returns:
        Seconds by name, and for every round what each action gave, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    given = []
    for number in range(rounds):
        found = {}
        for name, action in actions.items():
            spent, found[name] = timed(partial(action, number))
            seconds[name].append(spent)
        given.append(found)
    return seconds, given


def sgemm_peak(size: int = 1024, repeats: int = 5, rounds: int = 3) -> float:
    """GFLOP/s of a square float32 matrix product on the threads that are set: the best of some rounds."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    torch.mm(a, b)
    best = min(cpu_seconds(lambda: [torch.mm(a, b) for _ in range(repeats)]) for _ in range(rounds))
    return 2 * size**3 * repeats / best / 1e9


def median(values: list[float]) -> float:
    """The middle one."""
    return statistics.median(values)

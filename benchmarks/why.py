"""Where the time of a row goes: the profile that stands beside every row that misses its mark."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rows import Row, Task
from benchmarks.timing import cpu_seconds, median

TOP = 6
LONG = 5.0
"""Seconds from which a run is profiled on every fourth position alone, since profiling takes two runs more."""


def explain(task: Task, row: Row, peak: float) -> dict[str, Any]:
    """Top operations' shares of the run, its floating-point operations and its speed, and the reference's.

    Args:
        peak: GFLOP/s of a large matrix product, measured in this session.

    Returns:
        ``top``: pairs of operation and share of processor time. ``gflop``, ``gflops``: of our run (``part`` of its
        cells) and ``reference_gflop`` (for as many cells), ``reference_gflops``. ``at_peak``: share of our time that
        the operations would take at the peak. ``bound``: the row's ratio if they took no longer than that.
    """
    own = median(row.seconds)
    part = list(task.cells)
    if own > LONG and not task.flat:
        part = [cell for cell in task.cells if cell[0] % 4 == 3] or part[3::4]  # steps stand at one position
        own = cpu_seconds(lambda: task.fast(part))
    top = _profiled(lambda: task.fast(part))
    gflop = _counted(lambda: task.fast(part))  # by itself: counting takes time of its own
    slow = part if task.flat else task.chosen(0)[: 16 if "batch" in task.reference else 2]  # cells cost the same
    share = len(part) / len(slow)
    their_gflop = _counted(lambda: task.slow(slow)) * share
    theirs = median(row.reference_seconds) * len(part) / len(task.cells)
    return {
        "cells": len(part),
        "seconds": own,
        "top": top,
        "gflop": gflop,
        "gflops": gflop / own,
        "reference_gflop": their_gflop,
        "reference_gflops": their_gflop / theirs,
        "peak": peak,
        "at_peak": gflop / peak / own,
        "bound": theirs / (gflop / peak) if gflop else 0.0,
    }


def _profiled(action: Callable[[], Any]) -> list[tuple[str, float]]:
    """Shares of the operations' own processor time, largest first."""
    with _silent(), profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        action()
    events = [(event.key, float(event.self_cpu_time_total)) for event in seen.key_averages()]
    total = sum(time for _, time in events) or 1.0
    ordered = sorted(events, key=lambda event: -event[1])[:TOP]
    return [(name, time / total) for name, time in ordered]


@contextmanager
def _silent() -> Iterator[None]:
    """The profiler announces itself on the standard error of the process, past Python."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _counted(action: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        action()
    return counter.get_total_flops() / 1e9

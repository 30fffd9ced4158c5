"""Resident memory of a computation above the model, measured in a process of its own.

python -m benchmarks.memory knockout|trace|xl
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks import ours, references, shapes
from benchmarks.references import Cell
from benchmarks.rows import NOISE, NOISED, SAMPLES, grid, top
from benchmarks.shapes import Shape
from factscope.experiments.results import coarse_to_fine
from factscope.interventions import engine
from factscope.interventions.base import Noise, record_base
from factscope.interventions.intervention import Intervention, Patch

ROOT = Path(__file__).parents[1]
LIMIT = 2**30
"""Bytes that a computation on GPT-2 XL may take above the model."""
FIRST_LIMIT = 10.0
"""Seconds until the first readable figure of it."""
TOKENS = 16
_STEP = 0.005


class Watch:
    """Highest resident memory of this process in bytes, from ``start`` on."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.start = self.peak = self._process.memory_info().rss

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look every few milliseconds, and at the kernel's own mark where it can be set back."""
        marked = _reset_mark()
        done = threading.Event()

        def look() -> None:
            while not done.wait(_STEP):
                self.peak = max(self.peak, self._process.memory_info().rss)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.peak = max(self.peak, self._process.memory_info().rss, _mark() if marked else 0)


def settled() -> Watch:
    """A watch that starts after what is free was given back to the system."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return Watch()


def in_child(what: str) -> dict[str, Any]:
    """What a process of its own measured; ``error`` where it failed."""
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", what], cwd=ROOT, capture_output=True, text=True, check=False
    )
    try:
        return json.loads(run.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        tail = run.stderr.strip().splitlines()[-1:] or [f"exit status {run.returncode}"]
        return {"what": what, "error": tail[0]}


def rows_memory(what: str, shape: Shape, tokens: int = TOKENS) -> dict[str, Any]:
    """Memory of a knockout map or of a causal trace of block outputs."""
    torch.set_num_threads(1)
    ids, cells = shape.ids(tokens, seed=tokens), grid(shape, tokens)
    target, _ = top(shape, ids)
    values = ours.noise_values(SAMPLES, len(NOISED), shape.handle.info.d_model, NOISE)
    watch = settled()
    begin = time.perf_counter()
    with watch.watching():
        if what == "knockout":
            ours.knockout(shape.handle, ids, cells, 9, target)
        else:
            ours.trace(shape.handle, ids, cells, target, values=values, noised=NOISED)
    return _found(what, shape, tokens, len(cells), watch) | {"wall_seconds": time.perf_counter() - begin}


def large_trace(shape: Shape, tokens: int = TOKENS) -> dict[str, Any]:
    """A causal trace of two positions, all layers, on all cores: wall seconds, first figure, memory, one cell checked.

    The read-out position comes first, every eighth layer of it before the others: a curve that can be read.
    """
    ids, n = shape.ids(tokens, seed=tokens), shape.handle.info.n_layers
    target, _ = top(shape, ids)
    values = ours.noise_values(SAMPLES, len(NOISED), shape.handle.info.d_model, NOISE)
    order = coarse_to_fine(n)
    coarse = {(tokens - 1, layer) for layer in range(4, n, 8)} or {(tokens - 1, layer) for layer in range(n)}
    cells: list[Cell] = [(position, layer) for position in (tokens - 1, max(NOISED)) for layer in order]
    first: float | None = None
    p: dict[Cell, float] = {}
    watch = settled()
    begin = time.perf_counter()
    with watch.watching():
        clean = record_base(shape.handle, ids)
        base = record_base(shape.handle, ids, noise=Noise(positions=NOISED, values=values))
        runs = [
            Intervention(patches=(Patch(layer=k, site="output", positions=(at,), source=clean),)) for at, k in cells
        ]
        for indices, readout in engine.run(shape.handle, base, runs):
            found = readout.scores((target,)).log_probability.exp().mean(dim=1).tolist()
            p |= {cells[index]: value for index, value in zip(indices, found, strict=True)}
            if first is None and coarse <= p.keys():
                first = time.perf_counter() - begin
    wall = time.perf_counter() - begin
    checked = (max(NOISED), n // 2)
    slow = references.trace_cell(
        shape.plain, torch.tensor([ids]), checked, target, values=values, noised=NOISED, site="output", size=1
    )
    return _found("xl", shape, tokens, len(cells), watch) | {
        "wall_seconds": wall,
        "first_seconds": first,
        "samples": SAMPLES,
        "difference": abs(slow - p[checked]),
        "spread": float(np.ptp(list(p.values()))),
    }


def met(found: Mapping[str, Any]) -> bool:
    """Whether a measured process kept to its limits."""
    if "error" in found:
        return False
    if found["what"] != "xl":
        return True
    return found["above_bytes"] < LIMIT and found["first_seconds"] <= FIRST_LIMIT and found["difference"] <= 1e-5


def _found(what: str, shape: Shape, tokens: int, cells: int, watch: Watch) -> dict[str, Any]:
    weights = sum(p.numel() * p.element_size() for p in shape.plain.parameters())
    return {
        "what": what,
        "model": shape.name,
        "tokens": tokens,
        "cells": cells,
        "threads": torch.get_num_threads(),
        "model_bytes": weights,
        "above_bytes": watch.peak - watch.start,
    }


def _reset_mark() -> bool:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def _mark() -> int:
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return 0


def main(what: str) -> None:
    measured: dict[str, Callable[[], dict[str, Any]]] = {
        "knockout": lambda: rows_memory("knockout", shapes.small()),
        "trace": lambda: rows_memory("trace", shapes.small()),
        "xl": lambda: large_trace(shapes.xl()),
    }
    print(json.dumps(measured[what]()))


if __name__ == "__main__":
    main(sys.argv[1])

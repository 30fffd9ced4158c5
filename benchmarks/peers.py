"""Other libraries on the same weights and prompt, each in a process of the environment made from peers.txt."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from benchmarks import ours, references
from benchmarks.references import Cell
from benchmarks.rows import GATE, NOISE, NOISED, SAMPLES, Row, Task, apart, knockouts, top, traces
from benchmarks.shapes import Shape
from benchmarks.timing import cpu_seconds

NAMES = ("TransformerLens", "nnsight")
REQUIREMENTS = Path(__file__).with_name("peers.txt")
PROGRAM = Path(__file__).with_name("peer_program.py")
FOLDER = Path(__file__).parents[1] / ".bench-peers"
INSTALL_SECONDS, RUN_SECONDS = 1800, 900
LABEL = "own process"


class Skipped(Exception):
    """Why another library was not measured, in one line."""


def environment(folder: Path = FOLDER) -> Path:
    """The Python of the environment, made where it is not there yet.

    Raises:
        Skipped: it cannot be made.
    """
    python, stamp = folder / "bin" / "python", folder / "installed"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()
    if python.exists() and stamp.is_file() and stamp.read_text().strip() == wanted:
        return python
    print(f"Installing {REQUIREMENTS.name} into {folder.name}: once, some minutes, about 2 GB.", flush=True)
    install = [str(python), "-m", "pip", "install", "--no-input", "--quiet", "--disable-pip-version-check"]
    install += [*shlex.split(os.environ.get("PIP_ARGS", "")), "-r", str(REQUIREMENTS)]
    for step, command in (("made", [sys.executable, "-m", "venv", str(folder)]), ("filled by pip", install)):
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Skipped(f"the environment could not be {step} ({type(error).__name__})") from error
        if run.returncode:
            raise Skipped(f"the environment could not be {step} ({_last_line(run.stderr)})")
    stamp.write_text(wanted + "\n")
    return python


def measured(
    shape: Shape,
    tokens: int,
    rows: Mapping[str, Row],
    *,
    at_least: Mapping[str, float],
    folder: Path = FOLDER,
    sample: int = 16,
    rounds: int = 3,
) -> Iterator[dict[str, Any]]:
    """One record for each library and experiment, ``skipped`` with a reason where it could not be measured.

    Args:
        rows: this session's own rows, by experiment; their seconds are compared. Missing ones are timed here.
        at_least: ratio that must be reached, by experiment.
    """
    if not at_least:
        return
    made = {"attention knockout": knockouts(shape, tokens), "causal trace": traces(shape, tokens)}
    tasks = {experiment: task for experiment, task in made.items() if experiment in at_least}
    names = [(peer, experiment) for peer in NAMES for experiment in tasks]
    try:
        python = environment(folder)
    except Skipped as reason:
        yield from ({"peer": peer, "experiment": experiment, "skipped": str(reason)} for peer, experiment in names)
        return
    with tempfile.TemporaryDirectory(prefix="factscope-peers-") as place:
        chosen = export(shape, tasks, Path(place), sample=sample, rounds=rounds)
        for peer, experiment in names:
            print(f"  {peer}: {experiment}, {tokens} tokens, in a process of its own", flush=True)
            begun = {"peer": peer, "experiment": experiment, "model": shape.name, "tokens": tokens, "label": LABEL}
            task = tasks[experiment]
            try:
                found = run(python, peer, experiment, Path(place))
                p = dict(zip(chosen, found["p"][experiment], strict=True))
                own = rows[experiment].seconds if experiment in rows else _own(task, rounds)
                yield begun | record(task, p, own, found, at_least[experiment])
            except Skipped as reason:
                yield begun | {"skipped": str(reason)}


def _own(task: Task, rounds: int) -> list[float]:
    task.fast(task.cells[:GATE])
    return [cpu_seconds(lambda: task.fast(task.cells)) for _ in range(rounds)]


def record(
    task: Task, p: Mapping[Cell, float], own: Sequence[float], found: Mapping[str, Any], must: float
) -> dict[str, Any]:
    """The numbers of one library beside ours; its seconds scaled to all cells."""
    seconds = [s * len(task.cells) / len(p) for s in found["seconds"]]
    middle, their_middle = (sorted(values)[len(values) // 2] for values in (own, seconds))
    return {
        "version": found["version"],
        "cells": len(task.cells),
        "sampled": len(p),
        "seconds": list(own),
        "peer_seconds": seconds,
        "difference": apart(task.fast(list(p)), p),
        "ratio": their_middle / middle,
        "at_least": must,
    }


def met(found: Mapping[str, Any]) -> bool:
    """Same numbers and fast enough; what was skipped is no failure."""
    return "skipped" in found or (found["difference"] <= 1e-5 and found["ratio"] >= found["at_least"])


def export(shape: Shape, tasks: Mapping[str, Task], place: Path, *, sample: int, rounds: int) -> list[Cell]:
    """Weights, prompt, noise and a sample of cells for the other process; returns the cells."""
    disable_progress_bar()
    shape.plain.save_pretrained(place / "model")
    first = next(iter(tasks.values()))
    ids = shape.ids(first.tokens, seed=first.tokens)
    size = min(sample or len(first.cells), len(first.cells))
    chosen = random.Random(first.seed).sample(list(first.cells), size)
    values = ours.noise_values(SAMPLES, len(NOISED), shape.handle.info.d_model, NOISE)
    windows = {layer: list(references.window(layer, 9, shape.handle.info.n_layers)) for _, layer in chosen}
    task = {
        "ids": ids,
        "target": top(shape, ids)[0],
        "cells": chosen,
        "windows": windows,
        "noised": NOISED,
        "noise": values.tolist(),
        "rounds": rounds,
    }
    (place / "task.json").write_text(json.dumps(task))
    return chosen


def run(python: Path, peer: str, experiment: str, place: Path) -> dict[str, Any]:
    """What the library's own process prints.

    Raises:
        Skipped: it did not come to the end.
    """
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    variables.pop("PYTHONPATH", None)
    command = [str(python), str(PROGRAM), peer, experiment, str(place)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=RUN_SECONDS, env=variables, cwd=place, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Skipped(f"{peer} took longer than {RUN_SECONDS} seconds") from error
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise Skipped(f"{peer} did not run ({_last_line(done.stderr)})") from error


def _last_line(text: str) -> str:
    """The end of a message, without whatever paths or addresses it names."""
    line = (text.strip().splitlines() or ["no message"])[-1]
    return " ".join(word for word in line.split() if "/" not in word)[:160]

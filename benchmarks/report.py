"""The measured rows as JSON, as a table on the terminal, and as docs/performance.md."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import Row
from benchmarks.timing import median

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results.json"
PAGE = ROOT / "docs" / "performance.md"


def record(rows: list[Row], mode: str, commit: str) -> dict[str, Any]:
    """Everything that is needed to judge the numbers; no name of a machine or of a person."""
    return {
        "commit": commit,
        "mode": mode,
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")}
        | {"python": platform.python_version()},
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "rows": [asdict(row) | {"ratio": row.ratio, "ok": row.ok} for row in rows],
    }


def table(rows: list[Row]) -> str:
    """One line per row, for a terminal."""
    titles = ("experiment", "tokens", "ours", "reference", "ratio", "must", "max|dp|")
    lines = ["{:<26} {:>6} {:>9} {:>10} {:>7} {:>6} {:>9}  against".format(*titles)]
    for row in rows:
        must = "-" if row.at_least is None else f"{row.at_least:g}x"
        lines.append(
            f"{row.experiment:<26} {row.tokens:>6} {_seconds(median(row.seconds)):>9}"
            f" {_seconds(median(row.reference_seconds)):>10} {row.ratio:>6.1f}x {must:>6} {row.difference:>9.1e}"
            f"  {row.reference}{_sample(row)}; {row.model}"
        )
    return "\n".join(lines)


def page(data: dict[str, Any]) -> str:
    """docs/performance.md."""
    machine, versions = data["machine"], data["versions"]
    lines = [
        "# Performance",
        "",
        "Written by `python -m benchmarks --write` from `benchmarks/results.json`; do not edit by hand.",
        "",
        "Seconds of processor time, median of interleaved rounds in one process, float32, one thread. Numbers are",
        "compared before anything is timed: a run whose probabilities differ by more than 1e-5 fails. The weights of",
        "random models are scaled until knockouts move probabilities; *moved* is the share of cells that move p by",
        "more than 0.05 (for the lens: of steps from layer to layer that move the top probability as much).",
        "",
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['threads']} thread used. "
        f"Python {versions['python']}, torch {versions['torch']}, transformers {versions['transformers']}. "
        f"Commit {data['commit']}.",
        "",
        "| experiment | model | tokens | cells | FactScope | reference | ratio | must be | max abs dp | moved |",
        "|---|---|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for row in data["rows"]:
        seen = Row(**{name: value for name, value in row.items() if name not in ("ratio", "ok")})
        must = "" if seen.at_least is None else f"{seen.at_least:g}x"
        lines.append(
            f"| {seen.experiment} | {seen.model} | {seen.tokens} | {seen.cells} | {_seconds(median(seen.seconds))} "
            f"| {seen.reference}{_sample(seen)}: {_seconds(median(seen.reference_seconds))} "
            f"| **{seen.ratio:.1f}x** | {must} "
            f"| {seen.difference:.1e} | {seen.moved:.0%} |"
        )
    lines += [
        "",
        "The reference of the map is what a notebook does: hooks that forbid the edge in the layers of the window, one",
        "forward of the whole prompt for each cell without gradients, logits of the last position only. FactScope",
        "resumes at the first cut layer, recomputes the last token alone on cached keys and values, and runs many",
        "cells in one forward.",
        "",
    ]
    return "\n".join(lines)


def write(data: dict[str, Any], path: Path = RESULTS) -> None:
    """Put the record on disk."""
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _sample(row: Row) -> str:
    return f" (sample of {row.sampled} of {row.cells} cells, scaled)" if row.sampled else ""


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def commit() -> str:
    """The commit that is checked out; ask before measuring, since it may move meanwhile."""
    try:
        run = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "factscope"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip() + (" with local changes" if changed.stdout.strip() else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())

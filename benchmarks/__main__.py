"""``python -m benchmarks``: numbers, then times; exit status 1 if numbers differ or a required mark is missed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks import device, growth, memory, peers, report, table
from benchmarks.rows import Row, Task, measure
from benchmarks.shapes import Shape
from benchmarks.timing import median, sgemm_peak
from benchmarks.why import explain

SHARED = {
    "attention knockout, window 9": "attention knockout",
    "causal trace, block outputs, 10 samples": "causal trace",
}
"""Rows that peers and growth go on from, by experiment."""


AIMED = ("attention knockout", "lens")
"""Experiments that are profiled where they miss their aim, too; the others where they miss what they must reach."""


def measured_rows(
    mode: str, only_bundled: bool, rounds: int, peak: float, only: str = ""
) -> Iterator[tuple[Task, Row]]:
    """The rows, one after another; one that misses its mark is profiled at once.

    Args:
        only: part of experiment and tokens, "zeroed attention updates, window 10, 8 tokens"; empty takes all.
    """
    for task in table.tasks(mode=mode, only_bundled=only_bundled):
        if only not in f"{task.experiment}, {task.tokens} tokens, {task.shape.name}, {task.reference}":
            continue
        row = measure(task, rounds)
        if row.same_numbers and (not row.ok or (not row.aimed and row.experiment.startswith(AIMED))):
            row = replace(row, profile=explain(task, row, peak))
        yield task, row


def shared(rows: list[Row]) -> dict[tuple[str, int], Row]:
    """The rows against one forward per cell on GPT-2 small, by experiment and tokens."""
    return {
        (SHARED[row.experiment], row.tokens): row
        for row in rows
        if row.experiment in SHARED and "GPT-2 small" in row.model and "one forward" in row.reference and row.seconds
    }


def others(rows: list[Row], small: Shape, chosen: argparse.Namespace, mode: str) -> dict[str, Any]:
    """What is no row: peers, memory, the large model, growth."""
    found: dict[str, Any] = {"peers": [], "memory": [], "growth": []}
    known = shared(rows)
    if not chosen.no_peers:
        print("\nOther libraries", flush=True)
        for tokens in (8, 16) if mode == "full" else (8,):
            marks = {name: least for name, least in table.PEERS.items() if (name, tokens) in known}
            own = {name: row for (name, length), row in known.items() if length == tokens}
            several = {
                "sample": 8 if mode == "quick" else table.PEER_SAMPLE,
                "rounds": 1 if mode == "quick" else chosen.rounds,
                "folder": chosen.peers,
            }
            for record in peers.measured(small, tokens, own, at_least=marks, **several):
                found["peers"].append(record)
                print("  " + report.peer_line(record), flush=True)
    print("\nMemory and the large model, each in a process of its own", flush=True)
    for what in ("knockout",) if mode == "quick" else ("knockout", "trace", "xl"):
        found["memory"].append(memory.in_child(what))
        print("  " + report.memory_line(found["memory"][-1]), flush=True)
    print("\nGrowth", flush=True)
    known_seconds = {key: median(row.seconds) for key, row in known.items()}
    for point in growth.measured(known_seconds, quick=mode == "quick"):
        found["growth"].append(point)
        print(f"  {point['experiment']}, {point['axis']} {point['value']}: {point['seconds']:.2f} s", flush=True)
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    made.add_argument("--quick", action="store_true", help="8 and 16 tokens on GPT-2 small, no large model: 3 minutes")
    made.add_argument("--full", action="store_true", help="run the slow references whole instead of a sample")
    made.add_argument("--bundled", action="store_true", help="the bundled model alone")
    made.add_argument("--rounds", type=int, default=3, help="interleaved rounds (3)")
    made.add_argument("--peers", type=Path, default=peers.FOLDER, help="environment of other libraries (.bench-peers)")
    made.add_argument("--no-peers", action="store_true", help="leave other libraries out, and install nothing")
    made.add_argument("--device", default="cpu", help="cuda: other rows, on a GPU, in bfloat16")
    made.add_argument("--json", type=Path, help="also write the numbers here")
    made.add_argument("--write", action="store_true", help="write benchmarks/results.json and docs/performance.md")
    made.add_argument("--only", default="", help="the rows whose line has this in it; --write replaces just these")
    made.add_argument("--page", action="store_true", help="only write docs/performance.md from benchmarks/results.json")
    return made


def main() -> int:
    """Run what was asked for."""
    chosen = parser().parse_args()
    chosen.rounds = max(1, chosen.rounds)
    if chosen.page:
        report.write_page(json.loads(report.RESULTS.read_text(encoding="utf-8")))
        return 0
    if chosen.device != "cpu":
        return device.main(chosen.device)
    torch.set_num_threads(1)
    disable_progress_bar()
    mode = "quick" if chosen.quick else "full" if chosen.full else "standard"
    commit, peak = report.commit(), sgemm_peak()
    print(
        f"{report.processor()}: a large float32 matrix product runs at {peak:.0f} GFLOP/s on one thread\n", flush=True
    )
    rows: list[Row] = []
    small: Shape | None = None
    for task, row in measured_rows(mode, chosen.bundled, chosen.rounds, peak, chosen.only):
        rows.append(row)
        small = task.shape if task.shape.short == "GPT-2 small" else small
        print(report.table([row]) if len(rows) == 1 else report.table([row]).splitlines()[1], flush=True)
    data = report.record(rows, mode, commit, peak)
    if chosen.only:
        data = report.replaced(json.loads(report.RESULTS.read_text(encoding="utf-8")), data)
    elif small is not None:
        data |= others(rows, small, chosen, mode)
    if chosen.json:
        report.write(data, chosen.json)
    if chosen.write:
        report.write(data)
        report.write_page(data)
    failures = report.failures(data)
    print("\n".join(["", *failures]) if failures else "\nEvery mark that must be reached is.", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

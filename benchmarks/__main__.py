"""``python -m benchmarks``: numbers, then times; exit status 1 if numbers differ or a required ratio is missed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import report, shapes
from benchmarks.rows import Row, knockout_batched, knockout_map, lens_grid

SAMPLE = 16
"""Cells that the slow reference runs a round on the larger shape."""


def rows(*, quick: bool, full: bool, only_bundled: bool, rounds: int) -> Iterator[Row]:
    """The rows, one after another."""
    bundled = shapes.bundled()
    yield knockout_map(bundled, 12, window=3, rounds=rounds, at_least=10)
    yield lens_grid(bundled, 12, rounds=rounds)
    if only_bundled:
        return
    small = shapes.small()
    for tokens in (8, 16) if quick else (8, 16, 32):
        yield knockout_map(small, tokens, window=9, rounds=rounds, sample=0 if full else SAMPLE, seed=tokens)
        if not quick:
            yield knockout_batched(small, tokens, window=9, rounds=rounds, layers=0 if full else 2, seed=tokens)
        yield lens_grid(small, tokens, rounds=rounds)


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="prompts of 8 and 16 tokens only, no batched reference")
    parser.add_argument("--full", action="store_true", help="run the slow references whole instead of a sample")
    parser.add_argument("--bundled", action="store_true", help="the bundled shape alone")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (3)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results.json and docs/performance.md")
    parser.add_argument(
        "--page", action="store_true", help="only write docs/performance.md from benchmarks/results.json"
    )
    chosen = parser.parse_args()
    if chosen.page:
        report.PAGE.write_text(report.page(json.loads(report.RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")
        return 0
    torch.set_num_threads(1)
    done: list[Row] = []
    commit = report.commit()
    for row in rows(quick=chosen.quick, full=chosen.full, only_bundled=chosen.bundled, rounds=max(1, chosen.rounds)):
        done.append(row)
        print(report.table([row]) if len(done) == 1 else report.table([row]).splitlines()[1], flush=True)
    mode = "quick" if chosen.quick else "full" if chosen.full else "standard"
    data = report.record(done, mode, commit)
    if chosen.json:
        report.write(data, chosen.json)
    if chosen.write:
        report.write(data)
        report.PAGE.write_text(report.page(data), encoding="utf-8")
    for row in done:
        if not row.same_numbers:
            print(f"FAILED: {row.experiment}, {row.tokens} tokens: numbers differ by {row.difference:.1e}, over 1e-5")
        elif not row.ok:
            print(f"FAILED: {row.experiment}, {row.tokens} tokens: {row.ratio:.1f}x, below {row.at_least:g}x")
    return 0 if all(row.ok for row in done) else 1


if __name__ == "__main__":
    sys.exit(main())

"""What was measured as JSON, as lines on the terminal, and as docs/performance.md."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import growth, memory, peers
from benchmarks.rows import Row
from benchmarks.timing import median

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results.json"
PAGE = ROOT / "docs" / "performance.md"
_INTRODUCTION = """\
# Performance

Written by `python -m benchmarks --write` from `benchmarks/results.json`; do not edit by hand.

Seconds of processor time of one process, median of interleaved rounds, float32, one thread. Numbers are compared before
anything is timed, and those of the timed runs after: probabilities that differ by more than 1e-5 fail. Weights of
random models are scaled until p moves; *moved* is the share of cells that move p by more than 0.05 (for the lens: of
steps from layer to layer that move the probability of the first choice as much). A reference that ran a sample of the
cells draws it anew each round and is scaled to all; `--full` runs all. Where two float32 computations are further apart
than 1e-5, both are held to the reference's own in float64, and FactScope's numbers must be within 1e-5 of those.
"""
_METHODS = """\
## What is compared

- *One forward per cell* and *16 cells a batch* are what a notebook does: hooks on the model, the whole prompt, no
  gradients, logits of the last position only. A batch takes cells of any window.
- *As in ROME* (Meng et al. 2022): one forward of a clean row and ten noised ones for each cell, row 0's states put into
  the others, logits at all positions, mean of p over the noised rows. Positions 1 to 4 are noised.
- *A full forward and backward a step*: the search for v* as ROME's released code goes about it (Meng et al. 2022,
  section 3.1). The prompt in 21 contexts and the row about the subject's essence, a vector added to what the MLP writes
  at the subject's last token, gradients of the loss, logits at all positions. A cell is one of 20 steps, and
  the seconds are those of all of them.
- *Layer by layer*: one forward, then final norm, head and the same statistics for one layer after the other.
- Other libraries run the same cells in a process of their own, on the same weights, after a warm-up; their seconds
  stand against ours of the same session.
- FactScope's seconds include the recorded runs, all cells, and the scores.

## How to run it

```
make bench                       # about a quarter of an hour on two cores
make bench ARGS=--quick          # three minutes
make bench ARGS=--full           # slow references whole, as long as it takes
make bench ARGS=--no-peers       # installs nothing
make bench ARGS="--device cuda"  # other rows, on a GPU; see below
```

It exits with status 1 when numbers differ or a ratio that must be reached is not. Other libraries are installed from
`benchmarks/peers.txt` into `.bench-peers` (`--peers` names another folder) once; where that fails, their rows say so.

**No figure here was measured on a GPU, and none exists yet.** `--device cuda` runs the knockout map and the causal
trace on GPT-2 XL and on a Llama shape of seven billion parameters, random weights in bfloat16, seconds on the wall. It
is written but unmeasured.
"""


def record(rows: Sequence[Row], mode: str, commit: str, peak: float = 0.0) -> dict[str, Any]:
    """Everything that is needed to judge the numbers; no name of a machine or of a person."""
    return {
        "commit": commit,
        "mode": mode,
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")}
        | {"python": platform.python_version()},
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "peak_gflops": peak,
        },
        "rows": [asdict(row) | {"ratio": row.ratio, "ok": row.ok} for row in rows],
    }


def replaced(before: Mapping[str, Any], again: Mapping[str, Any]) -> dict[str, Any]:
    """A record with some rows measured again; they say of which commit they are."""
    names = ("experiment", "model", "tokens", "reference")
    new = {tuple(row[name] for name in names): row for row in again["rows"]}
    rows = [new.pop(tuple(row[name] for name in names), row) for row in before["rows"]]
    later = {f"{row['experiment']}, {row['tokens']} tokens": again["commit"] for row in again["rows"]}
    return {**before, "rows": [*rows, *new.values()], "again": {**before.get("again", {}), **later}}


def rows_of(data: Mapping[str, Any]) -> list[Row]:
    """The rows of a record."""
    return [Row(**{name: value for name, value in row.items() if name not in ("ratio", "ok")}) for row in data["rows"]]


def failures(data: Mapping[str, Any]) -> list[str]:
    """A line for everything that must be and is not."""
    lines = []
    for row in rows_of(data):
        name = f"{row.experiment}, {row.tokens} tokens, {row.model}, against {row.reference}"
        if not row.same_numbers:
            lines.append(f"FAILED: {name}: numbers differ by {row.difference:.1e}, over 1e-5")
        elif not row.ok:
            lines.append(f"FAILED: {name}: {row.ratio:.1f}x, below {row.at_least:g}x")
    lines += [f"FAILED: {peer_line(found)}" for found in data.get("peers", []) if not peers.met(found)]
    lines += [f"FAILED: {memory_line(found)}" for found in data.get("memory", []) if not memory.met(found)]
    return lines


# ---------------------------------------------------------------------------- on the terminal


def table(rows: Sequence[Row]) -> str:
    """One line per row, under a title."""
    titles = ("experiment", "tokens", "ours", "reference", "ratio", "must", "aim", "max|dp|")
    lines = ["{:<51} {:>6} {:>9} {:>10} {:>7} {:>6} {:>6} {:>9}  against".format(*titles)]
    for row in rows:
        lines.append(
            f"{row.experiment:<51} {row.tokens:>6} {_median(row.seconds):>9} {_median(row.reference_seconds):>10}"
            f" {row.ratio:>6.1f}x {_mark(row.at_least) or '-':>6} {_mark(row.aim) or '-':>6} {row.difference:>9.1e}"
            f"  {row.reference}{_sample(row)}; {row.model}; {verdict(row)}"
        )
    return "\n".join(lines)


def peer_line(found: Mapping[str, Any]) -> str:
    """One library and experiment."""
    if "skipped" in found:
        return f"{found['peer']}, {found['experiment']}: skipped: {found['skipped']}"
    return (
        f"{found['peer']} {found['version']}, {found['experiment']}, {found['tokens']} tokens: "
        f"{_median(found['peer_seconds'])} ({found['label']}, sample of {found['sampled']} of {found['cells']} cells, "
        f"scaled) against {_median(found['seconds'])}: {found['ratio']:.1f}x, must be {found['at_least']:g}x, "
        f"max|dp| {found['difference']:.1e}"
    )


def memory_line(found: Mapping[str, Any]) -> str:
    """One process that was watched."""
    if "error" in found:
        return f"{found['what']}: not measured: {found['error']}"
    line = (
        f"{_what(found)}: {_size(found['above_bytes'])} above the model's {_size(found['model_bytes'])}, "
        f"{found['wall_seconds']:.1f} s on the wall with {found['threads']} threads"
    )
    if found["what"] == "xl":
        line += (
            f", first readable figure after {found['first_seconds']:.1f} s (at most {memory.FIRST_LIMIT:g}), "
            f"max|dp| of a checked cell {found['difference']:.1e}"
        )
    return line


def verdict(row: Row) -> str:
    """Met or not, in words."""
    if not row.same_numbers:
        return "numbers differ"
    if row.at_least is None and row.aim is None:
        return ""
    if not row.ok:
        return "must missed"
    return "aim met" if row.aim is not None and row.aimed else "must met"


# ---------------------------------------------------------------------------- docs/performance.md


def page(data: Mapping[str, Any]) -> str:
    """docs/performance.md."""
    machine, versions = data["machine"], data["versions"]
    peak = (
        f" A large matrix product runs at {machine['peak_gflops']:.0f} GFLOP/s." if machine.get("peak_gflops") else ""
    )
    lines = [
        _INTRODUCTION,
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['threads']} thread used.{peak} "
        f"Python {versions['python']}, torch {versions['torch']}, transformers {versions['transformers']}. "
        f"Commit {data['commit']}, {data['mode']} run."
        + "".join(f" Measured again: {row}, commit {commit}." for row, commit in data.get("again", {}).items()),
        "",
    ]
    rows = rows_of(data)
    for experiment in dict.fromkeys(_experiment(row) for row in rows):
        lines += _section(experiment, [row for row in rows if _experiment(row) == experiment])
    lines += _peers(data.get("peers", [])) + _memory(data.get("memory", [])) + _growth(data.get("growth", []))
    return "\n".join([*lines, _METHODS])


def _experiment(row: Row) -> str:
    name = row.experiment.partition(",")[0]
    titles = {"zeroed MLP updates": "zeroed updates", "zeroed attention updates": "zeroed updates"}
    return {**titles, "v* of ROME": "search for v*"}.get(name, name)


def _section(title: str, rows: Sequence[Row]) -> list[str]:
    lines = [
        f"## {title[0].upper()}{title[1:]}",
        "",
        "| what | model | tokens | cells | FactScope | reference | ratio | must | aim | | max abs dp | moved |",
        "|---|---|---:|---:|---:|---|---:|---:|---:|---|---:|---:|",
    ]
    for row in rows:
        rest = row.experiment.removeprefix(title).lstrip(", ") or "all"
        lines.append(
            f"| {rest} | {row.model} | {row.tokens} | {row.cells} | {_median(row.seconds)} "
            f"| {row.reference}{_sample(row)}: {_median(row.reference_seconds)} "
            f"| **{row.ratio:.1f}x** | {_mark(row.at_least)} | {_mark(row.aim)} | {verdict(row)} "
            f"| {row.difference:.1e}{' from float64' if row.exact else ''} | {row.moved:.0%} |"
        )
    explained = [row for row in rows if row.profile is not None]
    if explained:
        lines += ["", "Rows that miss a mark, and where their time goes:", ""]
        lines += [_explanation(row) for row in explained]
    return [*lines, ""]


def _explanation(row: Row) -> str:
    seen = row.profile or {}
    tops = ", ".join(f"`{name}` {share:.0%}" for name, share in seen["top"])
    part = "" if seen["cells"] == row.cells else f" (profiled on {seen['cells']} of {row.cells} cells)"
    less = seen["reference_gflop"] / seen["gflop"] if seen["gflop"] else 0.0
    return (
        f"- **{row.experiment}, {row.tokens} tokens, {row.model}, against {row.reference}**, {row.ratio:.1f}x"
        f"{part}: {tops}. {seen['gflop']:.0f} GFLOP at {seen['gflops']:.0f} GFLOP/s; at the measured peak of "
        f"{seen['peak']:.0f} they would take {seen['at_peak']:.0%} of the time, and the ratio would be "
        f"{seen['bound']:.1f}x. The reference does {less:.1f} times as many operations, at "
        f"{seen['reference_gflops']:.0f} GFLOP/s."
    )


def _peers(found: Sequence[Mapping[str, Any]]) -> list[str]:
    if not found:
        return []
    lines = [
        "## Other libraries",
        "",
        "| library | experiment | tokens | FactScope | library | ratio (own process) | must | | max abs dp |",
        "|---|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    for one in found:
        if "skipped" in one:
            lines.append(f"| {one['peer']} | {one['experiment']} | skipped: {one['skipped']} | | | | | | |")
            continue
        lines.append(
            f"| {one['peer']} {one['version']} | {one['experiment']} | {one['tokens']} | {_median(one['seconds'])} "
            f"| {_median(one['peer_seconds'])} (sample of {one['sampled']} of {one['cells']} cells, scaled) "
            f"| **{one['ratio']:.1f}x** | {one['at_least']:g}x "
            f"| {'must met' if peers.met(one) else 'must missed'} | {one['difference']:.1e} |"
        )
    return [*lines, ""]


def _memory(found: Sequence[Mapping[str, Any]]) -> list[str]:
    if not found:
        return []
    lines = ["## Memory, and a large model", ""]
    lines.append(
        "Highest resident memory above that of the process with the loaded model, each in a process of its own."
    )
    lines.append(
        "GPT-2 XL runs on all cores: a trace of the last position, every eighth layer first, and of position 4."
    )
    lines.append(f"It must stay below {_size(memory.LIMIT)} and show the first curve within {memory.FIRST_LIMIT:g} s.")
    return [*lines, "", *(f"- {memory_line(one)}." + _limits(one) for one in found), ""]


def _limits(found: Mapping[str, Any]) -> str:
    if found["what"] != "xl" or "error" in found:
        return ""
    return " Both met." if memory.met(found) else " **Missed.**"


def _growth(points: Sequence[Mapping[str, Any]]) -> list[str]:
    if not points:
        return []
    powers = growth.exponents([dict(point) for point in points])
    lines = ["## Growth", "", "![Processor time against tokens, layers and width](growth.svg)", ""]
    lines += ["| experiment | axis | seconds | grows with the power |", "|---|---|---|---:|"]
    for (experiment, axis), power in powers.items():
        mine = sorted((p["value"], p["seconds"]) for p in points if (p["experiment"], p["axis"]) == (experiment, axis))
        values = ", ".join(f"{value}: {_seconds(seconds)}" for value, seconds in mine)
        lines.append(f"| {experiment} | {growth.AXES[axis]} | {values} | {power:.1f} |")
    return [*lines, ""]


# ---------------------------------------------------------------------------- files


def write(data: Mapping[str, Any], path: Path = RESULTS) -> None:
    """Put the record on disk."""
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def write_page(data: Mapping[str, Any]) -> None:
    """Put the page on disk, and its plot where growth was measured."""
    PAGE.write_text(page(data), encoding="utf-8")
    if data.get("growth"):
        growth.PLOT.write_text(growth.plot(data["growth"]), encoding="utf-8")


def commit() -> str:
    """The commit that is checked out; ask before measuring, since it may move meanwhile."""
    try:
        run = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "factscope", "benchmarks/*.py"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip() + (" with local changes" if changed.stdout.strip() else "")


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _what(found: Mapping[str, Any]) -> str:
    names = {"knockout": "attention knockout", "trace": "causal trace of block outputs", "xl": "causal trace"}
    return f"{names[found['what']]}, {found['model']}, {found['tokens']} tokens, {found['cells']} cells"


def _sample(row: Row) -> str:
    return f" (sample of {row.sampled} of {row.cells} cells, scaled)" if row.sampled else ""


def _mark(value: float | None) -> str:
    return "" if value is None else f"{value:g}x"


def _median(values: Sequence[float]) -> str:
    return _seconds(median(list(values))) if values else "not timed"


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def _size(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"

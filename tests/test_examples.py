"""The scripts under examples/ run as their docstrings say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _run(name: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"examples.{name}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_fact(tmp_path: Path) -> None:
    printed = _run("one_fact", "--out", str(tmp_path / "figures"))
    assert "Paris" in printed and "rank 1" in printed
    assert (tmp_path / "figures" / "flow.svg").read_bytes().lstrip().startswith(b"<svg")
    assert (tmp_path / "figures" / "flow.csv").stat().st_size > 100


def test_beside_random_weights() -> None:
    printed = _run("beside_random_weights")
    rows = [line.split() for line in printed.strip().splitlines()[2:]]
    trained, random = ([abs(float(row[i])) for row in rows] for i in (1, 2))
    assert max(trained) > 10 * max(random)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_edit_claims_goes_on_where_it_stopped(tmp_path: Path) -> None:
    few = ("--out", str(tmp_path), "--to", str(tmp_path / "docs"), "--facts", "1", "--others", "1", "--choose", "1",
           "--layers", "0", "--methods", "ft", "--preset", "rome")  # fmt: skip
    _run("edit_claims", *few)
    page = (tmp_path / "docs" / "findings.md").read_text(encoding="utf-8")
    assert "| FT, layer 0 | error-injection | 1 |" in page and "fact-forcing" in page
    lines = (tmp_path / "edits.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 6, "one on which the layer was chosen, one for each problem"
    keys = [json.loads(line)["key"] for line in lines]
    assert keys[0][0] == "choose" and keys[0][4] not in {key[4] for key in keys[1:]}, "chosen on other facts"
    (tmp_path / "edits.jsonl").write_text("\n".join(lines[:5]) + '\n{"key": ["rep', encoding="utf-8")
    _run("edit_claims", *few)
    assert (tmp_path / "docs" / "findings.md").read_text(encoding="utf-8") == page
    again = (tmp_path / "edits.jsonl").read_text(encoding="utf-8")
    assert again.startswith("\n".join(lines[:5])) and lines[5].partition('"scores"')[0] in again

"""The scripts under examples/ run as their docstrings say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_fact(tmp_path: Path) -> None:
    printed = _run("one_fact.py", "--out", str(tmp_path / "figures"))
    assert "Paris" in printed and "rank 1" in printed
    assert (tmp_path / "figures" / "flow.svg").read_bytes().lstrip().startswith(b"<svg")
    assert (tmp_path / "figures" / "flow.csv").stat().st_size > 100


def test_beside_random_weights() -> None:
    printed = _run("beside_random_weights.py")
    rows = [line.split() for line in printed.strip().splitlines()[2:]]
    trained, random = ([abs(float(row[i])) for row in rows] for i in (1, 2))
    assert max(trained) > 10 * max(random)

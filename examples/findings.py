"""docs/findings.md: what the programs beside this one measured, put into one page.

python -m examples.findings
"""

from __future__ import annotations

import json
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = "findings.md"


def page(folder: Path) -> str:
    """The page of the numbers that lie in a folder."""
    from examples import edit_claims, recall_claims

    parts = [(recall_claims.NUMBERS.name, recall_claims.page), (edit_claims.NUMBERS, edit_claims.section)]
    there = [(folder / name, written) for name, written in parts if (folder / name).exists()]
    return "\n".join(written(json.loads(path.read_text(encoding="utf-8"))) for path, written in there)


def write(folder: Path = DOCS) -> None:
    """Write the page beside its numbers."""
    (folder / PAGE).write_text(page(folder), encoding="utf-8")


if __name__ == "__main__":
    write()

"""The tables of families that ship are what measuring gives; ``python tests/test_family_table.py`` writes them."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import FAMILIES, build

from factscope.models.catalogue import FAMILIES as PATH
from factscope.models.catalogue import capability_words
from factscope.models.handle import build_handle

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- families: written by tests/test_family_table.py -->\n", "<!-- end of families -->\n"
HEADINGS = {
    "knockout": "knockout",
    "head_knockout": "of heads",
    "lens": "lens",
    "additive": "updates",
    "heads": "heads",
    "sources": "attention weights",
    "mappings": "mappings",
    "dense_mlp": "MLP edits",
    "suffix": "cached prefix",
    "packed": "fast path",
}


def measure(name: str) -> dict[str, object]:
    handle = build_handle(build(name), None, name=name, revision="-", dtype="float32", device="cpu")
    return {"family": handle.info.family, "capabilities": capability_words(handle)}


def readme_table(measured: dict[str, Any]) -> str:
    """One row a family; what is missing has a number, and its reason stands below."""
    reasons: list[str] = []

    def word(found: str) -> str:
        if found == "yes":
            return "yes"
        reason = found.removeprefix("no: ").split(" (")[0]
        if reason not in reasons:
            reasons.append(reason)
        return f"no ({reasons.index(reason) + 1})"

    lines = [f"| family | {' | '.join(HEADINGS.values())} |", f"|---|{'---|' * len(HEADINGS)}"]
    for name, row in measured.items():
        words = " | ".join(word(row["capabilities"][capability]) for capability in HEADINGS)
        lines.append(f"| {name} | {words} |")
    notes = [f"{i}. {reason}" for i, reason in enumerate(reasons, start=1)]
    return "\n".join([*lines, "", *notes]) + "\n"


@pytest.mark.parametrize("name", FAMILIES)
def test_family_as_shipped(name: str) -> None:
    assert json.loads(PATH.read_text())[name] == measure(name)


def test_the_readme_shows_what_was_measured() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0] == readme_table(json.loads(PATH.read_text()))


if __name__ == "__main__":
    found = {name: measure(name) for name in FAMILIES}
    PATH.write_text(json.dumps(found, indent=1) + "\n")
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    README.write_text(f"{before}{BEGIN}{readme_table(found)}{END}{rest.split(END)[1]}", encoding="utf-8")

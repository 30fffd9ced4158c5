"""The attributes rate written out once more: plain lists and sets, from float64 states to a percentage."""

from __future__ import annotations

import csv
from collections.abc import Collection, Sequence
from pathlib import Path

from torch import Tensor

from tests.oracle.laboratory import words

TOP = 500


def kept_tokens(logits: Tensor, left_out: Collection[int], m: int) -> list[int]:
    """The first m of the top 500 tokens ``w17`` of three characters at least, less some."""
    order = sorted(range(len(logits)), key=lambda i: -float(logits[i]))[:TOP]
    return [i for i in order if len(f"w{i}") >= 3 and i not in left_out][:m]


def rate(logits: Tensor, attributes: Collection[int], left_out: Collection[int], m: int) -> float:
    kept = kept_tokens(logits, left_out, m)
    return 100.0 * len([i for i in kept if i in attributes]) / len(kept)


def attribute_ids(paragraph: Sequence[int], left_out: Collection[int]) -> list[int]:
    """The different tokens of a paragraph that can be attributes, in order."""
    found: list[int] = []
    for i in paragraph:
        if len(f"w{i}") >= 3 and i not in left_out and i not in found:
            found.append(i)
    return found


def write_table(path: Path, about: dict[str, Sequence[int]]) -> str:
    """A CSV file: subject, and a paragraph of these tokens."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "paragraphs"])
        writer.writerows((subject, words(ids)) for subject, ids in about.items())
    return str(path)

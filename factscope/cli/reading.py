"""What is typed for an option, read."""

from __future__ import annotations

import re

from factscope.cli.telling import cut
from factscope.errors import SpecError


def names(option: str, text: str | None) -> tuple[str, ...]:
    """The parts of a comma-separated list; none where the option is not given."""
    names = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    if text is not None and not names:
        raise SpecError(f"{option} {cut(text)!r} names nothing", "name at least one, or leave the option out")
    return names


def layer_number(option: str, text: str) -> int:
    """One layer."""
    if not re.fullmatch("[0-9]{1,9}", text):
        raise SpecError(f"{option} {cut(text)!r} is not a whole number", "name layers from 0, such as 0,1,5")
    return int(text)


def layers(option: str, text: str | None) -> tuple[int, ...]:
    """Layers of 5, 3-7 or 3,5-7; none where the option is not given."""
    found: list[int] = []
    for name in names(option, text):
        first, dash, last = name.partition("-")
        ends = layer_number(option, first), layer_number(option, last if dash else first)
        if ends[0] > ends[1]:
            raise SpecError(f"{option} {cut(name)!r} runs backwards", f"write {ends[1]}-{ends[0]}")
        if ends[1] - ends[0] >= 10_000:
            raise SpecError(f"{option} {cut(name)!r} names too many layers", "name layers that the model has")
        found += range(ends[0], ends[1] + 1)
    return tuple(found)

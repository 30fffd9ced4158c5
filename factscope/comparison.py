"""What differs between two runs of one method? Rows of A and B joined on their axes, and B - A.

What A and B are does not matter: two facts, two models, two weight states, two parameters. A row that only one of them
has stays, with nothing where the other would be. ``factscope.columns.ROWS`` names the axes of each command's rows.

1. Name the rows by their axes; equal names meet (``join``).
2. Subtract what can be subtracted: ``<measure>_difference`` is B - A.
3. Say what differs (``differs``) and where a row does not mean the same in both: other tokens, another answer, another
   number of layers (``mismatches``).

The command line matches positions by number. A figure may match the tokens of two prompts by their role (``align``).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from factscope.columns import ROWS, VARIANTS, Rows
from factscope.errors import SpecError

_KEPT = ("model", "query", "spec", "warnings", "summary", "timing")
_ASKED = ("prompt", "subject", "target", "foil", "score", "bos")
_SHOWN = 5
Key = tuple[Hashable, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Joined:
    """Two tables side by side.

    Attributes:
        table: the axes, then ``<label>_a, <label>_b``, then ``<measure>_a, <measure>_b, <measure>_difference``.
        both, only_a, only_b: how many rows both have, and only one of them.
        changed: how many that both have hold another number or word.
    """

    table: pd.DataFrame
    both: int
    only_a: int
    only_b: int
    changed: int


def join(a: pd.DataFrame, b: pd.DataFrame, rows: Rows) -> Joined:
    """Rows of A in their order, then those that only B has.

    Raises:
        SpecError: a column is missing, a measure is no number, or no row is in both.
    """
    left, right = _by_axes(a, rows, "A"), _by_axes(b, rows, "B")
    shared = [key for key in left if key in right]
    if not shared:
        raise _no_shared_row(left, right, rows)
    keys = [*left, *(key for key in right if key not in left)]
    at = [[side.get(key) for key in keys] for side in (left, right)]

    def values(name: str) -> tuple[list[Any], list[Any]]:
        columns = a[name].tolist(), b[name].tolist()
        x, y = ([None if i is None else column[i] for i in rows] for column, rows in zip(columns, at, strict=True))
        return x, y

    columns: dict[str, list[Any]] = {axis: [key[i] for key in keys] for i, axis in enumerate(rows.axes)}
    changed: set[int] = set()

    def beside(name: str, before: list[Any], after: list[Any]) -> None:
        columns[f"{name}_a"], columns[f"{name}_b"] = before, after
        pairs = enumerate(zip(before, after, strict=True))
        changed.update(i for i, (x, y) in pairs if x != y and not (_missing(x) and _missing(y)))

    for label in rows.labels:
        beside(label, *values(label))
    optional = [name for name in rows.optional if name in a.columns and name in b.columns]
    for measure in (*rows.measures, *optional):
        before, after = ([_number(value, measure) for value in side] for side in values(measure))
        beside(measure, before, after)
        columns[f"{measure}_difference"] = [
            None if x is None or y is None else y - x for x, y in zip(before, after, strict=True)
        ]
    table = pd.DataFrame({name: _series(values) for name, values in columns.items()})
    alone = len(left) - len(shared), len(right) - len(shared)
    found = sum(keys[i] in left and keys[i] in right for i in changed)
    return Joined(table=table, both=len(shared), only_a=alone[0], only_b=alone[1], changed=found)


def _missing(value: Any) -> bool:
    return value is None or value != value


def _by_axes(table: pd.DataFrame, rows: Rows, side: str) -> dict[Key, int]:
    """Row numbers by the rows' axes. Equal ones (two tokens of one text) are told apart by their order."""
    missing = [name for name in (*rows.axes, *rows.labels, *rows.measures) if name not in table.columns]
    if missing:
        raise SpecError(
            f"the rows of {side} have no column {missing[0]!r}", "give an output of this version of the command"
        )
    found: dict[Key, int] = {}
    seen: Counter[Key] = Counter()
    for number, axes in enumerate(zip(*(table[axis].tolist() for axis in rows.axes), strict=True)):
        found[*axes, seen[axes]] = number
        seen[axes] += 1
    return found


def _no_shared_row(left: Iterable[Key], right: Iterable[Key], rows: Rows) -> SpecError:
    for i, axis in enumerate(rows.axes):
        mine, other = ({key[i]: None for key in keys} for keys in (left, right))
        if not set(mine) & set(other):
            return SpecError(
                f"A and B share no row: {axis} is {_listed(mine)} in A and {_listed(other)} in B",
                f"choose runs that share some {axis}",
            )
    return SpecError("A and B share no row", "choose runs whose axes overlap")


def _listed(values: Iterable[object]) -> str:
    shown = [repr(value) if isinstance(value, str) else str(value) for value in values]
    if not shown:
        return "empty"
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")


def _number(value: Any, measure: str) -> int | float | None:
    if _missing(value):
        return None
    if isinstance(value, str | list | dict | tuple):
        raise SpecError(f"{measure} {str(value)[:40]!r} is no number", "give an unchanged output of the command")
    whole = isinstance(value, bool | int) or (hasattr(value, "dtype") and value.dtype.kind in "biu")
    return int(value) if whole else float(value)


def _series(values: list[Any]) -> pd.Series:
    """Whole numbers stay whole where some are missing."""
    whole = all(isinstance(value, int) for value in values if value is not None)
    return pd.Series(values, dtype=object if whole and None in values else None)


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[dict[str, Any], pd.DataFrame]:
    """Compare two JSON objects of one command.

    Args:
        a, b: as ``factscope.output.document`` gives them.

    Returns:
        The object of the comparison, schema 1, and its rows as a table.

    Raises:
        SpecError: they are of different commands, of one without rows to compare, or share no row.
    """
    if a["command"] != b["command"]:
        raise SpecError(
            f"A is an output of {a['command']} and B of {b['command']}", "compare two outputs of one command"
        )
    rows, other = (rows_of(side["command"], side["spec"]) for side in (a, b))
    if rows != other:
        raise SpecError(
            f"the rows of A are by {', '.join(rows.axes)} and those of B by {', '.join(other.axes)}",
            "compare two runs with the same kind of rows",
        )
    joined = join(pd.DataFrame(a["rows"]), pd.DataFrame(b["rows"]), rows)
    said = [*_said_by_both(a["warnings"], b["warnings"]), *mismatches(a, b, joined, rows)]
    data = {
        "schema": 1,
        "command": "compare",
        "compared": a["command"],
        "a": {name: a[name] for name in _KEPT},
        "b": {name: b[name] for name in _KEPT},
        "warnings": said,
        "summary": {
            "differs": differs(a, b),
            "rows_both": joined.both,
            "rows_only_a": joined.only_a,
            "rows_only_b": joined.only_b,
            "rows_changed": joined.changed,
        },
    }
    return data, joined.table


def rows_of(command: str, spec: Mapping[str, Any] | None = None) -> Rows:
    """What the rows of a command are, with a spec that may ask for others.

    Raises:
        SpecError: it has none that can be compared.
    """
    if command not in ROWS:
        raise SpecError(f"{command!r} gives no rows that can be compared", f"choose one of {', '.join(ROWS)}")
    for (name, field), rows in VARIANTS.items():
        value = (spec or {}).get(field)
        if name == command and value is not None and value is not False and value != "":
            return rows
    return ROWS[command]


def _said_by_both(a: Sequence[str], b: Sequence[str]) -> Iterator[str]:
    for text in dict.fromkeys([*a, *b]):
        yield text if text in a and text in b else f"{'A' if text in a else 'B'}: {text}"


def differs(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Everything of model, query and parameters in which A and B differ, by name: [A's value, B's value].

    What an output of an earlier version does not name of its query is left out.
    """
    named = [name for name in _ASKED if name in a["query"] and name in b["query"]]
    left, right = _facts(a, named), _facts(b, named)
    return {
        name: [left.get(name), right.get(name)]
        for name in dict.fromkeys([*left, *right])
        if left.get(name) != right.get(name)
    }


def _facts(side: Mapping[str, Any], named: Sequence[str]) -> dict[str, Any]:
    query = {name: side["query"][name] for name in named}
    target = query.pop("target") or {}
    return {**side["model"], **query, "target": target.get("text"), **side["spec"]}


def mismatches(a: Mapping[str, Any], b: Mapping[str, Any], joined: Joined, rows: Rows) -> list[str]:
    """Where a row does not mean the same in A and in B."""
    said = []
    layers = a["model"]["n_layers"], b["model"]["n_layers"]
    if layers[0] != layers[1]:
        said.append(f"A has {layers[0]} layers and B {layers[1]}: layers are matched by number.")
    targets = [str(side["query"]["target"]["text"]).strip() for side in (a, b)]
    if targets[0] != targets[1]:
        said.append(f"The answer is {targets[0]!r} in A and {targets[1]!r} in B.")
    asked = [str(side["spec"].get("new_answer") or "").strip() for side in (a, b)]
    if asked[0] != asked[1] and all(asked):
        said.append(f"The new answer is {asked[0]!r} in A and {asked[1]!r} in B: their probabilities are of two words.")
    said += _other_tokens(a, b, joined.table, rows)
    alone = [f"{n} only in {side}" for n, side in ((joined.only_a, "A"), (joined.only_b, "B")) if n]
    if alone:
        said.append(f"{joined.both} rows are in both, {' and '.join(alone)}: their difference is empty.")
    return said


def _other_tokens(a: Mapping[str, Any], b: Mapping[str, Any], table: pd.DataFrame, rows: Rows) -> list[str]:
    if not rows.position:
        return []
    left, right = ({t["position"]: t["text"] for t in side["query"]["tokens"]} for side in (a, b))
    used = [p for p in dict.fromkeys(table[rows.position]) if not isinstance(p, str) and p in left and p in right]
    other = [p for p in used if left[p] != right[p]]
    if not other:
        return []
    first = other[0]
    return [
        f"Positions are matched by number, and {len(other)} of {len(used)} hold other tokens: position {first} is "
        f"{left[first]!r} in A and {right[first]!r} in B."
    ]


def read(path: Path, side: str) -> dict[str, Any]:
    """A saved output.

    Args:
        side: the option that names it, for what is said.

    Raises:
        SpecError: it cannot be read, or is no output of a command that can be compared.
    """
    name = f"{side} {str(path)[:200]!r}"
    saved = "save one with --out NAME.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or "it is no JSON"
        raise SpecError(f"{name} cannot be read ({why})", saved) from error
    if not isinstance(data, dict) or data.get("schema") != 1 or not isinstance(data.get("command"), str):
        raise SpecError(f"{name} is no output of factscope", saved)
    rows_of(data["command"])
    if not _is_whole(data):
        raise SpecError(f"{name} lacks parts of an output of {data['command']}", saved)
    return data


def _is_whole(data: Mapping[str, Any]) -> bool:
    """Whether everything that ``compare`` looks at is there; a file may hold anything."""
    maps = all(isinstance(data.get(name), dict) for name in ("model", "query", "spec", "summary", "timing"))
    if not maps or not isinstance(data.get("warnings"), list) or "n_layers" not in data["model"]:
        return False
    rows, query = data.get("rows"), data["query"]
    tokens = query.get("tokens")
    return (
        isinstance(rows, list)
        and all(isinstance(row, dict) and all(not isinstance(v, list | dict) for v in row.values()) for row in rows)
        and isinstance(query.get("target"), dict)
        and "text" in query["target"]
        and isinstance(tokens, list)
        and all(isinstance(token, dict) and {"position", "text"} <= token.keys() for token in tokens)
        and all(isinstance(text, str) for text in data["warnings"])
    )


def headline(data: Mapping[str, Any]) -> str:
    """What stands above the table of a comparison."""
    lines = [f"compared {data['compared']}"]
    for name, (left, right) in data["summary"]["differs"].items():
        lines.append(f"{name:8} {left!r} | {right!r}")
    if not data["summary"]["differs"]:
        lines.append(_sameness(data["summary"]))
    return "\n".join(lines) + "\n\n"


def _sameness(summary: Mapping[str, Any]) -> str:
    """Of two runs that ask the same: whether they also gave the same."""
    other = summary["rows_changed"] + summary["rows_only_a"] + summary["rows_only_b"]
    if not other:
        return "A and B are the same run"
    return f"model, query and parameters are named alike in A and B, and {other} of their rows differ"


# ---------------------------------------------------------------------------------------------- tokens of two prompts


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A token of A and the token of B that plays its part; None where there is none."""

    a: int | None
    b: int | None


def align(a: Sequence[Any], b: Sequence[Any], subject_a: Any = None, subject_b: Any = None) -> tuple[Pair, ...]:
    """Tokens of two prompts matched by role: what stands before the subject, the subject, what follows, the last.

    The subject and what stands before it are matched from their ends, so that subject-last meets subject-last; what
    follows it from its start. Prompts with equal tokens, or without a subject each, are matched by position.

    Args:
        a, b: tokens with ``position``, ``id`` and ``role``, in order. subject_a, subject_b: [start, stop), or None.

    Returns:
        Pairs in the order of the prompts; every token of A and of B is in one of them.
    """
    if [t.id for t in a] == [t.id for t in b]:
        return tuple(Pair(a=t.position, b=t.position) for t in a)
    pairs: list[Pair] = []
    for part, (left, right) in enumerate(zip(_parts(a, subject_a), _parts(b, subject_b), strict=True)):
        ends = part in (1, 2) and subject_a is not None and subject_b is not None
        longest = max(len(left), len(right))
        filled = [_filled([t.position for t in side], longest, at_end=ends) for side in (left, right)]
        pairs += [Pair(a=x, b=y) for x, y in zip(*filled, strict=True)]
    return tuple(pairs)


def _parts(tokens: Sequence[Any], subject: Any) -> list[list[Any]]:
    """Special tokens at the start, before the subject, the subject, after it, the last token."""
    start, stop = subject or (0, 0)
    parts: list[list[Any]] = [[], [], [], [], []]
    for token in tokens:
        if token is tokens[-1]:
            part = 4
        elif token.role == "special" and not parts[1] and not parts[2]:
            part = 0
        elif subject is None or token.position >= stop:
            part = 3
        else:
            part = 1 if token.position < start else 2
        parts[part].append(token)
    return parts


def _filled(positions: list[int], length: int, *, at_end: bool) -> list[int | None]:
    gap: list[int | None] = [None] * (length - len(positions))
    return [*gap, *positions] if at_end else [*positions, *gap]

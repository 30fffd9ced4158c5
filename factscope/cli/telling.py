"""What is said: results on standard output, everything else on standard error."""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.exceptions import TyperException

from factscope import output
from factscope.cli.options import (
    Format,
)
from factscope.errors import SpecError


def emit(data: dict[str, Any], rows: Any, format: Format, out: Path | None) -> None:
    """What standard output carries, or a file instead."""
    if out is not None:
        output.write(out, data, rows)
        say(f"written: {len(rows)} row{'' if len(rows) == 1 else 's'} to {output.printable(str(out))}")
    elif format is Format.json:
        write(output.as_json(data), encoding="utf-8")
    elif format is Format.csv:
        write(output.as_csv(rows), encoding="utf-8")
    else:
        write(headline(data) + output.as_text(rows))


def headline(data: dict[str, Any]) -> str:
    """What stands above a table."""
    if data["command"] == "compare":
        from factscope import comparison

        return comparison.headline(data)
    if "query" not in data:
        return ""
    query, model = data["query"], data["model"]
    lines = [
        f"model   {output.printable(model['name'])} ({model['family']}, {model['n_layers']} layers, {model['dtype']},"
        f" weights {model['weights']})",
        *(f"edit    {_edit_in_words(edit)}" for edit in model.get("edits", ())),
        f"prompt  {query['prompt']!r}",
        f"target  {query['target']['text']!r}  p {query['p_target']:.4g}  rank {query['rank']}",
    ]
    said = {name: value for name, value in data["summary"].items() if (name, value) != ("taught", None)}
    lines += [f"{name:7} {_SAID.get(name, _in_words)(value)}" for name, value in said.items()]
    return "\n".join(lines) + "\n\n"


def _in_words(value: Any) -> str:
    """A value of a summary on one line: numbers short, places named; what there is for each cell stays in the JSON."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_in_words(v)}" for key, v in value.items() if not _is_table(v))
    if isinstance(value, list):
        return f"[{', '.join(map(_in_words, value))}]"
    return repr(value)


def _edit_in_words(edit: dict[str, Any]) -> str:
    """An edit that was on, on one line."""
    first, *more = edit["facts"] or [{"prompt": "", "subject": "", "target": ""}]
    wanted = f"{first['prompt'].replace('{}', first['subject'])!r} -> {first['target']!r}"
    layers = ", ".join(map(str, edit["layers"]))
    rest = f" and {len(more)} more" if more else ""
    return output.printable(f"{edit['method']}, layers {layers}, {edit['problem']}: {wanted}{rest} ({edit['key']})")


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _reasons(missing: dict[str, str]) -> str:
    """Every reason once, with the scores that are missing for it."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in missing.items():
        by_reason.setdefault(reason, []).append(name)
    return output.printable("; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()))


def _computed(edits: Sequence[dict[str, Any]]) -> str:
    """How each edit was made, without what the JSON alone needs."""
    found = []
    for edit in edits:
        layers = f"layer{'s' if len(edit['layers']) > 1 else ''} {', '.join(map(str, edit['layers']))}"
        norms = ", ".join(f"{norm:.4g}" for norm in edit["report"].get("update_norm", {}).values())
        steps = edit["spec"].get("steps")
        more = [f"update norm {norms}"] if norms else []
        more += [f"at most {steps} steps"] if steps is not None else []
        found.append(", ".join([edit["method"], layers, edit["problem"], *more]) + f" ({edit['key']})")
    return output.printable("; ".join(found))


_SAID: dict[str, Callable[[Any], str]] = {"not_scored": _reasons, "edits": _computed}
"""Parts of a summary that have words of their own."""


def write(text: str, *, encoding: str | None = None) -> None:
    """Text on standard output; characters that its encoding lacks are escaped.

    Raises:
        BrokenPipeError: nobody reads it any more.
        SpecError: it cannot be written.
    """
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace", **({"encoding": encoding} if encoding else {}))
    try:
        typer.echo(text, nl=False)
    except BrokenPipeError:
        raise
    except OSError as error:
        forget_standard_output()
        raise SpecError(
            f"standard output cannot be written ({error.strerror})", "make room, or write to a file with --out"
        ) from error


def forget_standard_output() -> None:
    """What is still in its buffer would fail once more when the process ends."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message: str, status: int) -> NoReturn:
    """The program's end: one line, and its exit status."""
    tell("")
    say(f"error: {message}")
    sys.exit(status)


def quieten_libraries() -> None:
    """Without a handler Python prints what is logged, tracebacks included, to standard error."""
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.NullHandler())


def say(message: str) -> None:
    """One line on standard error, short enough to read, without what would steer a terminal."""
    line = output.printable(" ".join(message.split()))
    with suppress(OSError, ValueError):
        typer.echo(line if len(line) <= 1000 else f"{line[:700]} ... {line[-280:]}", err=True)


def tell(progress: str) -> None:
    """Progress, in place, where standard error is a terminal; nothing clears it."""
    with suppress(OSError, ValueError):
        if sys.stderr is not None and sys.stderr.isatty():
            typer.echo(f"\r\x1b[K{output.printable(progress)[:100]}", err=True, nl=False)


def usage(error: TyperException, given: Sequence[str]) -> str:
    """The parser's own complaints as one sentence that names the value."""
    said = error.format_message().rstrip(".")
    option = getattr(getattr(error, "param", None), "opts", [None])[-1]
    if option and said.startswith("Invalid value"):
        said = f"{option} {_given(option, given)} cannot be used: {_plainly(said.partition(': ')[2])}"
    context = getattr(error, "ctx", None)
    name = f"{context.info_name} " if context is not None and context.parent is not None else ""
    return f"{said}; see factscope {name}--help."


def _given(option: str, given: Sequence[str]) -> str:
    """The value of an option as it was typed; the last one counts."""
    values = [
        flag.partition("=")[2] if "=" in flag else value
        for flag, value in pairwise([*given, ""])
        if flag.split("=")[0] == option
    ]
    return repr(cut(values[-1])) if values else ""


def _plainly(complaint: str) -> str:
    if "integer" in complaint:
        return "it is not a whole number"
    return re.sub("^(Value error, |Input should)", lambda found: {"I": "it should"}.get(found[0][0], ""), complaint)


def cut(text: str, limit: int = 80) -> str:
    """The beginning of a long text."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def log_defect() -> str:
    """The traceback in a file of its own; its path."""
    told = traceback.format_exc()
    try:
        with tempfile.NamedTemporaryFile("wb", prefix="factscope-", suffix=".log", delete=False) as log:
            log.write(told.encode("utf-8", "backslashreplace"))
    except OSError:
        return f"no log, since none could be written ({cut(told.splitlines()[-1], 200)})"
    return log.name

"""The command that puts two runs side by side."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from factscope import output
from factscope.cli import running, telling
from factscope.cli.options import (
    Format,
    Out,
    OutputFormat,
)
from factscope.cli.telling import cut
from factscope.columns import ROWS as COMPARABLE
from factscope.errors import Cancelled, SpecError


def compare(
    context: typer.Context,
    a: Annotated[
        str, typer.Option("--a", help="A saved JSON output; with a COMMAND, the options that only A has.")
    ] = "",
    b: Annotated[str, typer.Option("--b", help="The same for B: --b '--model random:bundled'.")] = "",
    format: OutputFormat = Format.table,
    out: Out = None,
) -> None:
    """The rows of A and B joined on their axes, and B - A.

    Two saved outputs of one command: compare --a A.json --b B.json. Or one command run twice: compare COMMAND
    [options of both] --b "options of B".
    """
    if out is not None:
        output.check_out(out)
    if not context.args:
        from factscope import comparison

        sides = [comparison.read(Path(_saved(name, given)), name) for name, given in (("--a", a), ("--b", b))]
        _compared(sides, format, out)
        return
    command = context.args[0]
    if command not in COMPARABLE:
        raise SpecError(f"{cut(command)!r} is no command that can be compared", f"name one of {', '.join(COMPARABLE)}")
    if any(given.split("=")[0] == "--save" for given in context.args):
        raise SpecError(
            "--save would keep the edit of B in the place of that of A",
            "give each side a file of its own, in --a and --b",
        )
    sides, stopped = [], False
    kept = running.Kept()
    assert context.parent is not None
    program = context.parent.command
    for name, own in (("--a", a), ("--b", b)):
        try:
            running.run_kept(kept, program, [command, *context.args[1:], *_options(name, own)])
        except Cancelled:
            if not sides or kept.data is None:
                raise
            stopped = True
        sides.append(kept.data)
    _compared(sides, format, out, stopped=stopped)


def _compared(sides: Sequence[Any], format: Format, out: Path | None, *, stopped: bool = False) -> None:
    """The comparison of two objects, where it was asked for.

    Raises:
        Cancelled: B is only what was finished when the user stopped; a file is then named ``X.partial.json``.
    """
    from factscope import comparison

    data, rows = comparison.compare(*sides)
    for warning in data["warnings"]:
        telling.say(f"warning: {warning}")
    where = running.partial(out) if stopped else out
    telling.emit({**data, "rows": output.records(rows)}, rows, format, where)
    if stopped:
        raise Cancelled(f"the run of B was cancelled; what was finished is {running.place(where)}")


def _saved(name: str, given: str) -> str:
    if not given.strip():
        raise SpecError(
            f"{name} names no saved output, and no command is named",
            "give --a A.json --b B.json, or a command: compare flow --prompt ... --b '--model random:bundled'",
        )
    return given


def _options(name: str, text: str) -> list[str]:
    """Options that only one side of a comparison has, split as a shell splits them."""
    try:
        found = shlex.split(text)
    except ValueError as error:
        raise SpecError(f"{name} {cut(text)!r} cannot be split into options ({error})", "close its quotes") from error
    if text and not (found and found[0].startswith("-")):
        raise SpecError(
            f"{name} {cut(text)!r} is no option of the command", f"write for instance {name} '--model random:bundled'"
        )
    own = next((option for option in found if option.split("=")[0] in ("--out", "--format", "--help")), None)
    if own is not None:
        raise SpecError(f"{name} holds {cut(own)}, which belongs to compare itself", "write it outside")
    return found

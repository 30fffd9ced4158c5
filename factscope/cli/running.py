"""A run that was asked for: the model, progress on standard error, a stop that keeps what is finished, the result."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from factscope import output
from factscope.cli import notes, telling
from factscope.cli.options import (
    Format,
)
from factscope.cli.query import Asked
from factscope.errors import Cancelled, ModelTooLarge


class Stop:
    """Inside, the first Ctrl-C waits for the next step, where what was finished can be kept; the second does not."""

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> Stop:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *_: object) -> None:
        if self._asked:
            raise Cancelled()
        self._asked = True
        telling.say("stopping after this step; press Ctrl-C again to stop at once")

    def check(self, *_: object) -> None:
        """Raises ``Cancelled`` once the user has asked to stop."""
        if self._asked:
            raise Cancelled()

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)


class Kept:
    """What a command that ``compare`` runs leaves instead of printing it: its object; and the model, for the next."""

    def __init__(self) -> None:
        self.data: dict[str, Any] | None = None
        self._wanted: dict[str, Any] | None = None
        self._handle: Any = None

    def load(self, wanted: dict[str, Any], stop: Stop) -> Any:
        """The model that the last command used, if it is the same; the last one is let go before another comes."""
        if wanted != self._wanted:
            self._wanted = self._handle = None
            self._handle = load(wanted, stop)
            self._wanted = wanted
        return self._handle


KEPT: ContextVar[Kept | None] = ContextVar("kept", default=None)


def run_kept(kept: Kept, program: Any, arguments: list[str]) -> None:
    """Run a command of the program, its object going into ``kept``.

    Raises:
        Cancelled: the user stopped it; what was finished is in ``kept`` all the same.
    """
    kept.data = None
    token = KEPT.set(kept)
    try:
        with program.make_context("factscope", arguments) as context:
            context.command.invoke(context)
    finally:
        KEPT.reset(token)


def load(wanted: dict[str, Any], stop: Stop) -> Any:
    """The model; its stages and what it downloads are told on a terminal."""

    def progress(done: int, total: int, stage: str) -> None:
        telling.tell(f"{stage} {100 * done // total}%" if total else stage)
        stop.check()

    import torch

    from factscope.models.loading import load
    from factscope.settings import get_settings

    torch.set_num_threads(get_settings().torch_threads)
    handle = load(progress=progress, **wanted)
    telling.tell("")
    return handle


def edits(files: Sequence[Path] | None) -> list[Any]:
    """Saved edits, read before a model is loaded."""
    if not files:
        return []
    from factscope.editors.files import load_edit

    return [load_edit(file) for file in files]


def edited(handle: Any, edits: Sequence[Any]) -> Any:
    """The model with edits on."""
    if not edits:
        return handle
    from factscope.editors.edit import with_edits

    return with_edits(handle, edits)


def run(command: str, compute: Callable[[Any, Any], Any], asked: Asked) -> None:
    """Load, compute with progress on standard error, print or write; keep what was finished if it is stopped.

    Raises:
        Cancelled: the user stopped it.
        FactScopeError: it cannot be run.
    """
    if asked.out is not None:
        output.check_out(asked.out)
    newest: list[Any] = []
    handle, kept = None, KEPT.get()
    stopped = False
    try:
        with Stop() as stop:

            def progress(done: int, total: int, partial: Any) -> None:
                if partial is not None:
                    newest[:] = [partial]
                telling.tell(f"{command}: {done}/{total}" if done < total else "")
                if done < total:
                    stop.check()

            found = edits(asked.edits)
            loaded = load(asked.wanted, stop) if kept is None else kept.load(asked.wanted, stop)
            handle = edited(loaded, found)
            result = compute(handle, progress)
    except Cancelled:
        result = newest[0] if newest else None
        if result is None or result.table().empty:
            raise
        stopped = True
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        raise ModelTooLarge(
            f"the memory was not enough for this run of {command}",
            "shorten the prompt, ask for fewer --top-k or --control, or choose a smaller model",
        ) from error
    _report(command, handle, result, asked.format, asked.out, stopped=stopped)


def _report(command: str, handle: Any, result: Any, format: Format, out: Path | None, *, stopped: bool) -> None:
    """Warnings to standard error, the result where it was asked for.

    Raises:
        Cancelled: the result is only what was finished when the user stopped; a file is then named ``X.partial.json``.
    """
    where = partial(out) if stopped else out
    rows = result.table()
    said = [*handle.warnings, *result.warnings, *notes.notes(command, result, handle.edits)]
    if stopped:
        said.append(f"The run was cancelled after {result.passes} passes: these {len(rows)} rows are not all.")
    data = output.document(command, result, rows, notes.summary(command, result), said)
    if handle.edits:
        data["model"]["edits"] = [edit.summary() for edit in handle.edits]
    if (kept := KEPT.get()) is not None:
        kept.data = data
    else:
        for warning in said:
            telling.say(f"warning: {warning}")
        telling.emit(data, rows, format, where)
    if stopped:
        raise Cancelled(f"the run was cancelled after {result.passes} passes; what was finished is {place(where)}")


def partial(out: Path | None) -> Path | None:
    """The name of a file that holds a part of what was asked for."""
    return None if out is None else out.with_name(f"{out.stem}.partial{out.suffix}")


def place(where: Path | None) -> str:
    """Where a result went, in words."""
    return "on standard output" if where is None else f"in {where}"


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error))
    )

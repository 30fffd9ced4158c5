"""The command line in process: what a test types, and what comes back."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from tiny_models import build, tiny_tokenizer

from factscope import cli
from factscope.cli import running, telling
from factscope.models.handle import ModelHandle, build_handle

PROMPT = "The Eiffel Tower is located in the city of"
SUBJECT = "Eiffel Tower"
TINY = "tiny"
FACT = ("--model", TINY, "--prompt", PROMPT, "--subject", SUBJECT)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, Any]:
        """Standard output as strict JSON: a NaN in it is an error."""

        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is no JSON")

        return json.loads(self.out, parse_constant=refuse)


def save_tiny(folder: Path, family: str = "gpt2") -> Path:
    """A complete tiny model on disk."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = tiny_tokenizer("byte")
    build(family, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def tiny_handle(family: str = "gpt2") -> ModelHandle:
    """The model that commands find under the name ``tiny``."""
    tokenizer = tiny_tokenizer("byte")
    model = build(family, vocab_size=len(tokenizer))
    return build_handle(model, tokenizer, name=TINY, revision="test", dtype="float32", device="cpu")


def invoke(*arguments: str, **replaced: Any) -> Outcome:
    """Run a command; the model ``tiny`` is at hand, every other name is really loaded.

    Args:
        arguments: what is typed behind ``factscope``.
        replaced: others in place of ``load``, which gives the model, or ``tell``, which shows progress.
    """
    load = running.load

    def at_hand(wanted: Mapping[str, Any], stop: Any) -> Any:
        return tiny_handle() if wanted["name"] == TINY else load(dict(wanted), stop)

    out, err = _stream(), _stream()
    status = 0
    with _replaced({"load": at_hand, **replaced}), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(arguments)
        except SystemExit as done:
            assert isinstance(done.code, int), done.code
            status = done.code
    return Outcome(status=status, out=_text(out), err=_text(err))


@contextlib.contextmanager
def _replaced(functions: Mapping[str, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(mock.patch.object({"load": running, "tell": telling}[name], name, function))
        yield


def _stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", newline="\n")


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode()


def refused(outcome: Outcome, *fragments: str) -> None:
    """Exit status 2, nothing on standard output, one line that says this."""
    assert outcome.status == 2, (outcome.status, outcome.err)
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: ")
    assert lines[0].endswith((".", "?"))
    assert len(lines[0]) <= 1000
    assert "Traceback" not in outcome.err
    for fragment in fragments:
        assert fragment in lines[0], lines[0]

"""Commands that ask nothing about a fact: what can be loaded, and the dashboard."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from factscope import output
from factscope.cli import reading, running, telling
from factscope.cli.options import (
    Device,
    Dtype,
    DtypeName,
    EditFiles,
    Format,
    Out,
    OutputFormat,
    Revision,
)
from factscope.cli.query import wanted_model
from factscope.cli.telling import cut
from factscope.errors import SpecError


def models(
    model: Annotated[str | None, typer.Option("--model", help="Load this one and measure what it supports.")] = None,
    revision: Revision = None,
    dtype: DtypeName = Dtype.float32,
    device: Device = "auto",
    edit: EditFiles = None,
    format: OutputFormat = Format.table,
    out: Out = None,
) -> None:
    """What can be loaded, what each family supports and why not."""
    if model is None and revision is not None:
        raise SpecError(f"--revision {revision!r} stands without --model", "name the model that has it")
    if model is None and edit:
        raise SpecError(f"--edit {cut(edit[0].name)!r} stands without --model", "name the model that it changes")
    if out is not None:
        output.check_out(out)
    with running.Stop() as stop:
        import pandas as pd

        from factscope.models import catalogue

        wanted, edits = None if model is None else wanted_model(model, revision, dtype, device), running.edits(edit)
        data = (
            catalogue.overview()
            if wanted is None
            else catalogue.inspect(running.edited(running.load(wanted, stop), edits))
        )
    telling.emit({"schema": 1, "command": "models", **data}, pd.DataFrame(data["rows"]), format, out)


def serve(
    port: Annotated[int, typer.Option("--port", help="Port of the dashboard.")] = 8501,
    address: Annotated[str, typer.Option("--address", help="Address to listen on.")] = "127.0.0.1",
    models_allowed: Annotated[
        str | None,
        typer.Option("--models-allowed", help="Comma-separated names; on any other address only these, no folders."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option("--allowed-host", help="Host name under which the page is reached; repeatable."),
    ] = None,
) -> None:
    """Start the dashboard with safe settings."""
    from factscope.application import application_root, server_command

    command, environment = server_command(
        port=port,
        address=address,
        models_allowed=reading.names("--models-allowed", models_allowed),
        allowed_hosts=tuple(allowed_host or ()),
    )
    where = "127.0.0.1" if address in ("0.0.0.0", "::") else address
    telling.say(f"FactScope starts on http://{f'[{where}]' if ':' in where else where}:{port} (stop it with Ctrl-C)")
    os.chdir(application_root())
    os.execve(command[0], command, environment)

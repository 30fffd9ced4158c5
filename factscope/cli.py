"""The command line: thin over the same ``run`` functions as the pages, so its numbers are the pages' numbers.

Exit status: 0 on success; 2 for input that cannot be used, with one line on standard error; 3 for a run that was stopped;
1 for a defect of ours, with the traceback in a log file.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from factscope.errors import Cancelled, FactScopeError, SpecError

app = typer.Typer(
    name="factscope",
    help="See how a causal language model recalls a fact.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Format(StrEnum):
    """What standard output carries."""

    table = "table"
    json = "json"
    csv = "csv"


class Dtype(StrEnum):
    """Type of the weights and of the computation."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    auto = "auto"


class Choice(StrEnum):
    """Whether a beginning-of-sequence token is put first."""

    auto = "auto"
    yes = "yes"
    no = "no"


class ScoreChoice(StrEnum):
    """What of the answer is scored."""

    token = "token"
    sequence = "sequence"


class SiteChoice(StrEnum):
    """What the lens projects."""

    block = "block"
    mlp = "mlp"
    attention = "attention"


class ProjectionChoice(StrEnum):
    """How the lens projects it."""

    normed = "normed"
    raw = "raw"


ModelName = Annotated[str, typer.Option("--model", help="bundled, a hub id, a folder, or random:NAME (same shape, random weights).")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")]
DtypeName = Annotated[Dtype, typer.Option("--dtype", help="Type of the weights; auto takes the checkpoint's.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 ...")]
Prompt = Annotated[str, typer.Option("--prompt", help="Text that ends right before the answer.")]
Subject = Annotated[str | None, typer.Option("--subject", help="The subject's text inside the prompt.")]
Occurrence = Annotated[int | None, typer.Option("--occurrence", help="Which occurrence of the subject, from 1.")]
Answer = Annotated[str | None, typer.Option("--answer", help="The attribute; without it the model's own top token.")]
Foil = Annotated[str | None, typer.Option("--foil", help="A competing answer.")]
Scored = Annotated[ScoreChoice, typer.Option("--score", help="First token of the answer, or all of it.")]
BosChoice = Annotated[Choice, typer.Option("--bos", help="auto does as the tokenizer does.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of random draws.")]
OutputFormat = Annotated[Format, typer.Option("--format", help="What standard output carries.")]
Out = Annotated[Path | None, typer.Option("--out", help="A file instead: .json, .csv or .parquet.")]
TopK = Annotated[int, typer.Option("--top-k", help="How many tokens are listed.")]


@app.callback()
def _commands() -> None:
    """See how a causal language model recalls a fact."""


@app.command()
def predict(
    prompt: Prompt, subject: Subject = None, occurrence: Occurrence = None, answer: Answer = None, foil: Foil = None,
    score: Scored = ScoreChoice.token, bos: BosChoice = Choice.auto, top_k: TopK = 10, model: ModelName = "bundled",
    revision: Revision = None, dtype: DtypeName = Dtype.float32, device: Device = "auto", seed: Seed = 1,
    format: OutputFormat = Format.table, out: Out = None,
) -> None:  # fmt: skip
    """What the model predicts after the prompt, and whether it knows the answer."""
    from factscope.experiments import prediction

    query = _query(prompt, subject, occurrence, answer, foil, score, bos)

    def compute(handle: Any, progress: Any) -> Any:
        return prediction.run(handle, query, prediction.PredictionSpec(top_k=top_k), progress=progress)

    def summary(result: Any) -> dict[str, Any]:
        found = {"continuation": result.continuation, "known": result.known, "taught": result.taught}
        return found if result.p_foil is None else {**found, "p_foil": result.p_foil}

    _run("predict", compute, summary, (model, revision, dtype, device), format, out)


@app.command()
def flow(
    prompt: Prompt, subject: Subject = None, occurrence: Occurrence = None, answer: Answer = None, foil: Foil = None,
    score: Scored = ScoreChoice.token, bos: BosChoice = Choice.auto,
    sources: Annotated[str, typer.Option("--sources", help="subject,relation,last, position sets such as 3-5, or each.")] = "",
    target_position: Annotated[str, typer.Option("--target-position", help="last, or a position.")] = "last",
    window: Annotated[int | None, typer.Option("--window", help="Layers cut around each layer.")] = None,
    heads: Annotated[str, typer.Option("--heads", help="Heads that are cut: 5.3,6.*; without it all.")] = "",
    edges: Annotated[list[str] | None, typer.Option("--edges", help="FROM:TO:LAYERS[:HEADS], repeatable, instead of sources.")] = None,
    control: Annotated[int, typer.Option("--control", help="Draws of random matched positions.")] = 0,
    model: ModelName = "bundled", revision: Revision = None, dtype: DtypeName = Dtype.float32, device: Device = "auto",
    seed: Seed = 1, format: OutputFormat = Format.table, out: Out = None,
) -> None:  # fmt: skip
    """Attention knockout: which tokens must be read, and in which layers."""
    from factscope.experiments import attention_knockout

    if edges and (sources or window is not None):
        raise SpecError("--edges stands beside --sources or --window", "an edge names its own positions and layers: give one or the other")
    query = _query(prompt, subject, occurrence, answer, foil, score, bos)
    spec = attention_knockout.KnockoutSpec(
        sources=_names(sources) or (("subject", "relation", "last") if subject else ("last",)),
        target_position=None if target_position == "last" else _integer("--target-position", target_position),
        window=window,
        heads=_names(heads),
        edges=tuple(edges or ()),
        control=control,
        seed=seed,
    )

    def compute(handle: Any, progress: Any) -> Any:
        return attention_knockout.run(handle, query, spec, progress=progress)

    _run("flow", compute, lambda result: {}, (model, revision, dtype, device), format, out)


@app.command()
def lens(
    prompt: Prompt, subject: Subject = None, occurrence: Occurrence = None, answer: Answer = None, foil: Foil = None,
    score: Scored = ScoreChoice.token, bos: BosChoice = Choice.auto,
    site: Annotated[SiteChoice, typer.Option("--site", help="Block output, or the update of the MLP or the attention.")] = SiteChoice.block,
    projection: Annotated[ProjectionChoice, typer.Option("--projection", help="Through the final norm, or the raw state.")] = ProjectionChoice.normed,
    top_k: TopK = 10, model: ModelName = "bundled", revision: Revision = None, dtype: DtypeName = Dtype.float32,
    device: Device = "auto", seed: Seed = 1, format: OutputFormat = Format.table, out: Out = None,
) -> None:  # fmt: skip
    """Hidden states and updates projected to tokens, for every layer and position."""
    from factscope.experiments import logit_lens

    query = _query(prompt, subject, occurrence, answer, foil, score, bos)
    spec = logit_lens.LensSpec(site=site.value, projection=projection.value, top_k=top_k)

    def compute(handle: Any, progress: Any) -> Any:
        return logit_lens.run(handle, query, spec, progress=progress)

    _run("lens", compute, lambda result: {}, (model, revision, dtype, device), format, out)


@app.command()
def models(
    model: Annotated[str | None, typer.Option("--model", help="Load this one and measure what it supports.")] = None,
    revision: Revision = None, dtype: DtypeName = Dtype.float32, device: Device = "auto",
    format: OutputFormat = Format.table, out: Out = None,
) -> None:  # fmt: skip
    """What can be loaded, what each family supports and why not."""
    import pandas as pd

    from factscope.models import catalogue

    if out is not None:
        _check_out(out)
    if model is None:
        data = catalogue.overview()
    else:
        with _stopping_kindly():
            data = catalogue.inspect(_load((model, revision, dtype, device)))
    rows = pd.DataFrame(data["rows"])
    _emit({"schema": 1, "command": "models", **data}, rows, format, out)


@app.command()
def serve(
    port: Annotated[int, typer.Option("--port", help="Port of the dashboard.")] = 8501,
    address: Annotated[str, typer.Option("--address", help="Address to listen on.")] = "127.0.0.1",
    models_allowed: Annotated[str, typer.Option("--models-allowed", help="Comma-separated names; on any other address only these, no folders.")] = "",
    allowed_host: Annotated[list[str] | None, typer.Option("--allowed-host", help="Host name under which the page is reached; repeatable.")] = None,
) -> None:  # fmt: skip
    """Start the dashboard with safe settings."""
    from factscope.application import application_root, server_command

    command, environment = server_command(
        port=port, address=address, models_allowed=_names(models_allowed), allowed_hosts=tuple(allowed_host or ())
    )
    where = "127.0.0.1" if address in ("0.0.0.0", "::") else address
    typer.echo(f"FactScope starts on http://{where}:{port} (stop it with Ctrl-C)", err=True)
    os.chdir(application_root())
    os.execve(command[0], command, environment)


def main() -> None:
    """Entry point: every failure becomes one line and an exit status."""
    try:
        status = app(standalone_mode=False)
    except Cancelled as error:
        _fail(str(error), error.exit_status)
    except FactScopeError as error:
        _fail(str(error), error.exit_status)
    except typer.Abort:
        _fail("The run was cancelled.", Cancelled.exit_status)
    except TyperException as error:
        _fail(_usage(error), 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception:
        _fail(f"FactScope has a defect; please report it with the traceback in {_log_defect()}.", 1)
    else:
        sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> None:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(status)


def _usage(error: TyperException) -> str:
    """The parser's own complaints as one sentence that names the value."""
    said = error.format_message().rstrip(".")
    option = getattr(getattr(error, "param", None), "opts", [None])[-1]
    for flag, value in pairwise(sys.argv[1:] + [""]):
        if option and said.startswith("Invalid value") and flag.split("=")[0] == option:
            given = flag.partition("=")[2] or value
            said = f"{option} {given!r} cannot be used: {said.partition(': ')[2]}"
            break
    context = getattr(error, "ctx", None)
    name = context.info_name if context is not None and context.parent is not None else None
    return f"{said}; see factscope {name} --help." if name else f"{said}; see factscope --help."


def _log_defect() -> Path:
    with tempfile.NamedTemporaryFile("w", prefix="factscope-", suffix=".log", delete=False) as log:
        traceback.print_exc(file=log)
    return Path(log.name)


def _query(
    prompt: str, subject: str | None, occurrence: int | None, answer: str | None, foil: str | None,
    score: ScoreChoice, bos: Choice,
) -> Any:  # fmt: skip
    from factscope.queries import Query

    return Query(
        prompt=prompt, subject=subject, answer=answer, foil=foil, occurrence=occurrence, bos=bos.value, score=score.value
    )  # fmt: skip


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _integer(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise SpecError(f"{option} {text!r} is neither 'last' nor a whole number", "name a position from 0") from None


Wanted = tuple[str, str | None, Dtype, str]


def _load(wanted: Wanted) -> Any:
    import torch

    from factscope.models.loading import load
    from factscope.settings import get_settings

    torch.set_num_threads(get_settings().torch_threads)
    name, revision, dtype, device = wanted
    return load(name, revision=revision, dtype=dtype.value, device=device)


class _stopping_kindly:  # noqa: N801 - used as a function
    """Ctrl-C becomes ``Cancelled`` at the next step, so that what was finished can be kept."""

    def __enter__(self) -> _stopping_kindly:
        self.stopped = False
        self._before = signal.signal(signal.SIGINT, self._stop)
        return self

    def _stop(self, *_: Any) -> None:
        if self.stopped:
            raise Cancelled()
        self.stopped = True

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self._before)


def _run(
    command: str, compute: Callable[[Any, Any], Any], summary: Callable[[Any], dict[str, Any]], wanted: Wanted,
    format: Format, out: Path | None,
) -> None:  # fmt: skip
    """Load, compute with progress on standard error, print or write."""
    from factscope import output

    if out is not None:
        output.check_out(out)
    partial: list[Any] = []
    with _stopping_kindly() as stop:

        def progress(done: int, total: int, result: Any) -> None:
            partial[:] = [result]
            if sys.stderr.isatty():
                typer.echo(f"\r{command}: {done}/{total}" + ("\n" if done == total else ""), err=True, nl=False)
            if stop.stopped:
                raise Cancelled()

        try:
            result = compute(_load(wanted), progress)
        except Cancelled:
            if partial and partial[0] is not None:
                kept = partial[0]
                beside = None if out is None else out.with_name(f"{out.stem}.partial{out.suffix}")
                _emit(output.document(command, kept, kept.table(), summary(kept)), kept.table(), format, beside)
                where = "on standard output" if beside is None else f"in {beside}"
                raise Cancelled(f"the run was cancelled after {kept.passes} passes; what was finished is {where}") from None
            raise
    rows = result.table()
    for warning in result.warnings:
        typer.echo(f"warning: {' '.join(warning.split())}", err=True)
    _emit(output.document(command, result, rows, summary(result)), rows, format, out)


def _check_out(out: Path) -> None:
    from factscope import output

    output.check_out(out)


def _emit(data: dict[str, Any], rows: Any, format: Format, out: Path | None) -> None:
    from factscope import output

    if out is not None:
        output.write(out, data, rows)
    elif format is Format.json:
        typer.echo(output.as_json(data), nl=False)
    elif format is Format.csv:
        typer.echo(rows.to_csv(index=False), nl=False)
    else:
        typer.echo(_headline(data), nl=False)
        typer.echo(output.as_text(rows), nl=False)


def _headline(data: dict[str, Any]) -> str:
    if "query" not in data:
        return ""
    query, model = data["query"], data["model"]
    lines = [
        f"model   {model['name']} ({model['family']}, {model['n_layers']} layers, weights {model['weights']})",
        f"prompt  {query['prompt']!r}",
        f"target  {query['target']['text']!r}  p {query['p_target']:.4g}  rank {query['rank']}",
    ]
    lines += [f"{name:7} {value!r}" for name, value in data["summary"].items()]
    return "\n".join(lines) + "\n\n"

"""What every command on one query is asked: the query, the model with its edits, and where the result goes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factscope.cli.options import (
    Answer,
    BosChoice,
    Choice,
    Device,
    Dtype,
    DtypeName,
    EditFiles,
    Foil,
    Format,
    ModelName,
    Occurrence,
    Out,
    OutputFormat,
    Prompt,
    Revision,
    ScoreChoice,
    Scored,
    Seed,
    Subject,
)
from factscope.cli.telling import cut
from factscope.errors import SpecError

if TYPE_CHECKING:
    from factscope.queries import Query


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What all commands on one query share.

    Attributes:
        query: None where a command goes without a prompt.
        wanted: the model, as ``load`` takes it.
        edits: files of edits that are on during the run, in order.
        seed: of random draws.
        format: what standard output carries.
        out: a file instead.
    """

    query: Query
    wanted: dict[str, Any]
    edits: list[Path] | None
    seed: int
    format: Format
    out: Path | None


def on_a_query(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the shared options around its own; it gets them as one ``Asked``, its first argument.

    An option of its own with the name of a shared one takes that one's place.
    """
    own = dict(list(inspect.signature(command, eval_str=True).parameters.items())[1:])
    before, behind = (inspect.signature(part, eval_str=True).parameters for part in (_of_the_query, _of_the_run))
    shared = {name: own.pop(name, parameter) for name, parameter in before.items()}

    def run(**given: Any) -> None:
        query = _of_the_query(**{name: given.pop(name) for name in before})
        command(Asked(query=query, **_of_the_run(**{name: given.pop(name) for name in behind})), **given)

    parameters = [*shared.values(), *own.values(), *behind.values()]
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    return run


def wanted_model(model: str, revision: str | None, dtype: Dtype, device: str) -> dict[str, Any]:
    """The model, as ``load`` takes it."""
    return {"name": model, "revision": revision, "dtype": dtype.value, "device": device}


def _of_the_query(
    prompt: Prompt,
    subject: Subject = None,
    occurrence: Occurrence = None,
    answer: Answer = None,
    foil: Foil = None,
    score: Scored = ScoreChoice.token,
    bos: BosChoice = Choice.auto,
) -> Any:
    from factscope.queries import Query

    if prompt is None:
        for name, value in {"subject": subject, "occurrence": occurrence, "answer": answer, "foil": foil}.items():
            if value is not None:
                raise SpecError(f"--{name} {cut(str(value))!r} stands without --prompt", "give the prompt, or leave it")
        return None
    if occurrence is not None and subject is None:
        raise SpecError(f"--occurrence {occurrence} stands without --subject", "name the subject that occurs so often")
    return Query(
        prompt=prompt, subject=subject, answer=answer, foil=foil, occurrence=occurrence, bos=bos.value,
        score=score.value,
    )  # fmt: skip


def _of_the_run(
    model: ModelName = "bundled",
    revision: Revision = None,
    dtype: DtypeName = Dtype.float32,
    device: Device = "auto",
    edit: EditFiles = None,
    seed: Seed = 1,
    format: OutputFormat = Format.table,
    out: Out = None,
) -> dict[str, Any]:
    wanted = wanted_model(model, revision, dtype, device)
    return {"wanted": wanted, "edits": edit, "seed": seed, "format": format, "out": out}

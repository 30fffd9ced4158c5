"""Edits as files: safetensors with everything about the edit in its header, and nothing that could run.

``0.left``, ``0.right`` and ``0.bias`` are the tensors of the first delta: what it adds to ``y = x W + b`` is
``x left right + bias`` (without ``left``: ``x right``). The header's ``factscope_edit`` is JSON: the schema's number,
the fields of ``Edit``, and for every delta its layer, its place and its shapes. A file is only used when the key
of what was read is the key that the header tells.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from factscope import output
from factscope.editors.edit import Edit, EditedModel, EditFact
from factscope.editors.presets import METHODS
from factscope.editors.specs import PROBLEMS
from factscope.errors import EditError, InputError
from factscope.interventions.weights import PLACES, WeightDelta

SCHEMA = 1
SUFFIX = ".safetensors"
_HEADER = "factscope_edit"
_TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_MIB = 2**20
MAX_TEXT = 20_000
"""Characters of one text in a header."""


def save_edit(edit: Edit, path: Path | str) -> None:
    """Write an edit; the file is complete or not there.

    Raises:
        EditError: the file cannot be written, or its name has another suffix.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise EditError(
            f"the file {shown(path)} does not end in {SUFFIX}", f"name it {shown(path.with_suffix(SUFFIX))}"
        )
    tensors = {name: tensor.contiguous() for name, tensor in edit.tensors()}
    content = save(tensors, metadata={"format": "pt", _HEADER: json.dumps(_header(edit), allow_nan=False)})
    try:
        output.put(path, content)
    except OSError as error:
        raise EditError(
            f"the edit cannot be written to {shown(path)} ({error.strerror or error})", "choose another place"
        ) from error


def load_edit(path: Path | str, *, max_bytes: int | None = None) -> Edit:
    """Read an edit.

    Args:
        max_bytes: refuse a larger file.

    Raises:
        EditError: there is no such file, it is no edit, it is damaged, of another version or too large.
    """
    path = Path(path)
    _check_file(path, max_bytes)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = _read_header(path, file.metadata())
            return _read(path, file, header)
    except SafetensorError as error:
        raise EditError(
            f"the edit {shown(path)} is damaged, or no safetensors file ({error})", "give a file that FactScope saved"
        ) from error
    except OSError as error:
        raise EditError(
            f"the edit {shown(path)} cannot be read ({error.strerror or error})", "check the file"
        ) from error


def shown(path: Path) -> str:
    """A path, short enough for a sentence."""
    text = str(path)
    return repr(text) if len(text) <= 120 else f"{text[:40]!r}...{text[-60:]!r}"


def _header(edit: Edit) -> dict[str, Any]:
    plain = ("method", "problem", "computed_on")
    return {
        "schema": SCHEMA,
        "key": edit.key,
        **{name: getattr(edit, name) for name in plain},
        "model": asdict(edit.model),
        "facts": [asdict(fact) for fact in edit.facts],
        "spec": dict(edit.spec),
        "templates": list(edit.templates),
        "deltas": [_described(delta) for delta in edit.deltas],
        "report": _finite(dict(edit.report)),
    }


def _described(delta: WeightDelta) -> dict[str, Any]:
    return {
        "layer": delta.layer, "place": delta.place, "rank": delta.rank,
        "d_in": delta.d_in, "d_out": delta.d_out, "bias": delta.bias is not None,
    }  # fmt: skip


def _finite(value: Any) -> Any:
    """JSON knows no infinity: what is not finite is null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_file(path: Path, max_bytes: int | None) -> None:
    try:
        found, size = path.is_file(), path.stat().st_size
    except FileNotFoundError:
        raise EditError(f"the edit {shown(path)} does not exist", "check the path") from None
    except (OSError, ValueError) as error:
        raise EditError(f"the edit {shown(path)} cannot be read ({error})", "check the path") from error
    if not found:
        raise EditError(f"the edit {shown(path)} is no file", f"name a {SUFFIX} file")
    if max_bytes is not None and size > max_bytes:
        raise EditError(
            f"the edit {shown(path)} has {size / _MIB:,.1f} MiB, and {max_bytes / _MIB:,.1f} MiB are allowed",
            "give a smaller one",
        )


def _read_header(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    if not metadata or _HEADER not in metadata:
        raise EditError(f"{shown(path)} is a safetensors file, but no saved edit", "give a file that FactScope saved")
    try:
        header = json.loads(metadata[_HEADER], parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        _damaged(path, f"its header is no JSON: {error}", error)
    if not isinstance(header, dict):
        _damaged(path, "its header is no object")
    if header.get("schema") != SCHEMA:
        raise EditError(
            f"the edit {shown(path)} has the schema {header.get('schema')!r}, and this version reads {SCHEMA}",
            "read it with the version that saved it",
        )
    return header


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _read(path: Path, file: Any, header: Mapping[str, Any]) -> Edit:
    """The edit that the header describes, from tensors of the very shapes that it tells."""
    try:
        edit = Edit(
            method=_text(header, "method"),
            problem=_text(header, "problem"),
            model=EditedModel(**{f.name: _text(header["model"], f.name) for f in fields(EditedModel)}),
            computed_on=_text(header, "computed_on"),
            facts=tuple(_fact(given) for given in _list(header, "facts")),
            spec=_object(header, "spec"),
            templates=tuple(_text({"template": given}, "template") for given in _list(header, "templates")),
            deltas=tuple(_delta(file, index, given) for index, given in enumerate(_list(header, "deltas"))),
            report=_object(header, "report"),
        )
    except (KeyError, TypeError, ValueError, InputError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error).rstrip(".")
        _damaged(path, said, error)
    if not edit.deltas:
        _damaged(path, "it changes nothing")
    if not edit.facts:
        _damaged(path, "it names no fact")
    if edit.method not in METHODS or edit.problem not in PROBLEMS:
        _damaged(path, f"its method {edit.method!r} or its problem {edit.problem!r} is unknown")
    if extra := set(file.keys()) - {name for name, _ in edit.tensors()}:
        _damaged(path, f"its tensor {min(extra)!r} belongs to no delta")
    if edit.key != header.get("key"):
        _damaged(path, f"its contents have the key {edit.key}, and its header says {header.get('key')!r}")
    return edit


def _fact(given: Any) -> EditFact:
    answer = given["answer"]
    texts = {name: _text(given, name) for name in ("prompt", "subject", "target")}
    return EditFact(**texts, answer=None if answer is None else _text(given, "answer"))


def _delta(file: Any, index: int, given: Any) -> WeightDelta:
    layer, rank, d_in, d_out = (_number(given, name) for name in ("layer", "rank", "d_in", "d_out"))
    place = given["place"]
    if layer is None or d_in is None or d_out is None or place not in PLACES:
        raise ValueError(f"delta {index} does not say where it belongs")
    shapes: dict[str, tuple[int, ...]] = {"right": (d_in if rank is None else rank, d_out)}
    if rank is not None:
        shapes["left"] = (d_in, rank)
    if given["bias"] is True:
        shapes["bias"] = (d_out,)
    found = {name: _tensor(file, f"{index}.{name}", shape) for name, shape in shapes.items()}
    return WeightDelta(layer=layer, place=place, **found)  # type: ignore[arg-type]


def _tensor(file: Any, name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor, read only if it is what the header tells."""
    if name not in file.keys():  # noqa: SIM118 - no mapping
        raise ValueError(f"its tensor {name!r} is missing")
    there = file.get_slice(name)
    if tuple(there.get_shape()) != shape or there.get_dtype() not in _TYPES:
        raise ValueError(
            f"its tensor {name!r} is {there.get_dtype()} {list(there.get_shape())} instead of numbers {list(shape)}"
        )
    tensor = file.get_tensor(name).clone()  # the file may change while this is in use
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"its tensor {name!r} has values that are not finite")
    return tensor


def _text(given: Any, name: str) -> str:
    value = given[name]
    if not isinstance(value, str):
        raise ValueError(f"its {name} {str(value)[:40]!r} is no text")
    if len(value) > MAX_TEXT or (not value.isprintable() and any("\ud800" <= one <= "\udfff" for one in value)):
        raise ValueError(f"its {name} {value[:40]!a} is too long, or holds half a character")
    return value


def _number(given: Any, name: str) -> int | None:
    value = given[name]
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ValueError(f"its {name} {str(value)[:40]!r} is no whole number")
    return value


def _list(given: Mapping[str, Any], name: str) -> list[Any]:
    value = given[name]
    if not isinstance(value, list):
        raise ValueError(f"its {name} are no list")
    return value


def _object(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = given[name]
    if not isinstance(value, dict):
        raise ValueError(f"its {name} is no object")
    return value


def _damaged(path: Path, reason: str, cause: BaseException | None = None) -> NoReturn:
    raise EditError(
        f"the edit {shown(path)} is damaged: {reason[:300]}", "give a file that FactScope saved, unchanged"
    ) from cause

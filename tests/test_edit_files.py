"""Saved edits: what comes back is what was saved, and every damage is refused with its reason."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from factscope.editors.edit import Edit, with_edits
from factscope.editors.files import load_edit, save_edit
from factscope.errors import EditError
from factscope.models.handle import ModelHandle
from tests.oracle.edits import delta, edit_of
from tests.oracle.laboratory import distinct_prompt, handle_of
from tests.oracle.whole import Whole
from tests.tiny_models import build

DOWN = {"gpt2": "transformer.h.{}.mlp.c_proj", "llama": "model.layers.{}.mlp.down_proj"}
OUTPUT = {"gpt2": "transformer.h.{}.attn.c_proj", "llama": "model.layers.{}.self_attn.o_proj"}


@lru_cache
def family(name: str) -> tuple[PreTrainedModel, ModelHandle]:
    model = build(name, 0)
    return model, handle_of(model, name)


@lru_cache
def an_edit(name: str = "gpt2") -> Edit:
    """Low rank, dense, with a bias and without."""
    model, handle = family(name)
    whole = Whole(model, wide=False)
    return edit_of(
        handle,
        [
            delta(whole, 1, "down_projection", rank=2, bias=True, seed=1),
            delta(whole, 2, "down_projection", rank=None, bias=False, seed=2),
            delta(whole, 3, "output_projection", rank=1, bias=False, seed=3),
        ],
        subject='Zürich "🗼"\n{',
        report={"loss": [1.5, float("nan"), float("inf")], "nested": {"rows": ((1, 2.5), None)}},
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "edit.safetensors"
    save_edit(an_edit(), path)
    return path


def header(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["factscope_edit"])


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> Path:
    """The file with its header and tensors changed by hand."""
    told, tensors = header(path), load_file(path)
    change(told, tensors)
    save_file(tensors, path, metadata={"factscope_edit": json.dumps(told)})
    return path


def refused(path: Path, *fragments: str, **more: Any) -> None:
    with pytest.raises(EditError) as refusal:
        load_edit(path, **more)
    said = str(refusal.value)
    assert said.count("\n") == 0 and len(said) < 600
    for fragment in (path.name, *fragments):
        assert fragment in said, said


# ---------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_comes_back_is_what_was_saved(name: str, tmp_path: Path) -> None:
    edit, path = an_edit(name), tmp_path / "edit.safetensors"
    save_edit(edit, path)
    found = load_edit(path)
    for field in (
        "method",
        "problem",
        "model",
        "computed_on",
        "facts",
        "spec",
        "templates",
        "key",
        "layers",
        "n_bytes",
    ):
        assert getattr(found, field) == getattr(edit, field), field
    assert found.report == {"loss": [1.5, None, None], "nested": {"rows": [[1, 2.5], None]}}
    mine, theirs = dict(edit.tensors()), dict(found.tensors())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    _, handle = family(name)
    ids = torch.tensor([distinct_prompt(family(name)[0], 8, seed=1)])
    assert torch.equal(with_edits(handle, [found]).forward(ids), with_edits(handle, [edit]).forward(ids))
    assert with_edits(handle, [found]).key == with_edits(handle, [edit]).key


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_type_of_number_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    edit = replace(an_edit(), deltas=tuple(one.to(torch.zeros((), dtype=dtype)) for one in an_edit().deltas))
    save_edit(edit, tmp_path / "edit.safetensors")
    found = load_edit(tmp_path / "edit.safetensors")
    assert found.deltas[0].right.dtype == dtype
    assert found.key == edit.key


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_plain_transformers_gives_the_same_from_the_file(name: str, tmp_path: Path) -> None:
    """The file says enough to write the edit into a model without factscope."""
    model, handle = family(name)
    save_edit(an_edit(name), tmp_path / "edit.safetensors")
    plain, tensors = build(name, 0), load_file(tmp_path / "edit.safetensors")
    with torch.no_grad():
        for index, told in enumerate(header(tmp_path / "edit.safetensors")["deltas"]):
            where = (DOWN if told["place"] == "down_projection" else OUTPUT)[name].format(told["layer"])
            module: Any = plain.get_submodule(where)
            right = tensors[f"{index}.right"]
            change = right if told["rank"] is None else tensors[f"{index}.left"] @ right
            module.weight += change if isinstance(module, Conv1D) else change.T
            if told["bias"]:
                old = 0 if module.bias is None else module.bias
                module.bias = torch.nn.Parameter(old + tensors[f"{index}.bias"])
        ids = torch.tensor([distinct_prompt(model, 8, seed=1)])
        expected = plain(ids, use_cache=False).logits.softmax(-1)
    found = with_edits(handle, [load_edit(tmp_path / "edit.safetensors")]).forward(ids).softmax(-1)
    assert float((found - expected).abs().max()) <= 1e-5
    assert float((found - handle.forward(ids).softmax(-1)).abs().max()) > 0.05


def test_what_was_read_stays_when_the_file_goes(saved: Path) -> None:
    found = load_edit(saved)
    before = {name: tensor.clone() for name, tensor in found.tensors()}
    saved.write_bytes(b"\0" * saved.stat().st_size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.tensors())


# --------------------------------------------------------------------------------------------------- writing


def test_a_file_that_cannot_be_written_leaves_what_was_there(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(EditError, match=r"edit\.safetensors.*No space left"):
            save_edit(replace(an_edit(), method="ft"), saved)
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]
    save_edit(replace(an_edit(), method="ft"), saved)
    assert load_edit(saved).method == "ft"


def test_another_suffix_and_a_folder_that_is_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EditError, match=r"edit\.pt' does not end in \.safetensors"):
        save_edit(an_edit(), tmp_path / "edit.pt")
    with pytest.raises(EditError, match="cannot be written"):
        save_edit(an_edit(), tmp_path / "none" / "edit.safetensors")


# --------------------------------------------------------------------------------------------------- reading


def test_files_that_are_no_edit_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "does not exist")
    refused(tmp_path, "is no file")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    refused(tmp_path / "empty.safetensors", "damaged, or no safetensors file")
    save_file({"a": torch.ones(2)}, tmp_path / "weights.safetensors")
    refused(tmp_path / "weights.safetensors", "no saved edit")
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors", metadata={"format": "pt"})
    refused(tmp_path / "other.safetensors", "no saved edit")


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (tmp_path.joinpath("opened").touch, ())

    (tmp_path / "edit.safetensors").write_bytes(pickle.dumps(Trap()))
    torch.save(Trap(), tmp_path / "torch.safetensors")
    for name in ("edit.safetensors", "torch.safetensors"):
        refused(tmp_path / name, "damaged, or no safetensors file")
    assert not (tmp_path / "opened").exists()


def test_a_file_that_is_too_large_is_not_read(saved: Path) -> None:
    size = saved.stat().st_size
    assert load_edit(saved, max_bytes=size).key == an_edit().key
    refused(saved, "MiB are allowed", max_bytes=size - 1)


def test_every_truncation_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    begin = 8 + struct.unpack("<Q", content[:8])[0]
    for length in (1, 7, 8, 20, begin - 1, begin, begin + 4, len(content) - 1):
        saved.write_bytes(content[:length])
        refused(saved, "damaged")


def test_any_flipped_bit_is_refused_or_changes_no_number(saved: Path) -> None:
    content, edit = saved.read_bytes(), an_edit()
    numbers = dict(edit.tensors())
    draw = random.Random(0)
    refusals = 0
    for _ in range(300):
        place = draw.randrange(len(content))
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        saved.write_bytes(damaged)
        try:
            found = load_edit(saved)
        except EditError:
            refusals += 1
            continue
        assert found.key == edit.key, "what the key covers is as it was"
        assert all(torch.equal(tensor, numbers[name]) for name, tensor in found.tensors())
    assert refusals > 250


CHANGES: dict[str, tuple[Callable[[dict[str, Any], dict[str, torch.Tensor]], Any], str]] = {
    "schema": (lambda told, _: told.update(schema=2), "has the schema 2, and this version reads 1"),
    "no schema": (lambda told, _: told.pop("schema"), "has the schema None"),
    "no method": (lambda told, _: told.pop("method"), "'method' is missing"),
    "method": (lambda told, _: told.update(method=3), "its method '3' is no text"),
    "another method": (lambda told, _: told.update(method="x"), "its method 'x' or its problem"),
    "a long method": (lambda told, _: told.update(method="x" * 30_000), "is too long"),
    "half a character": (lambda told, _: told["facts"][0].update(subject="\ud800"), "holds half a character"),
    "no fact": (lambda told, _: told.update(facts=[]), "it names no fact"),
    "no model": (lambda told, _: told.pop("model"), "'model' is missing"),
    "model": (lambda told, _: told["model"].pop("weights"), "'weights' is missing"),
    "another model": (lambda told, _: told["model"].update(weights="0" * 16), "its header says"),
    "facts": (lambda told, _: told.update(facts={}), "its facts are no list"),
    "fact": (lambda told, _: told.update(facts=["x"]), "damaged"),
    "no subject": (lambda told, _: told["facts"][0].pop("subject"), "'subject' is missing"),
    "prompt": (lambda told, _: told["facts"][0].update(prompt="nothing"), "the prompt 'nothing' holds 0 times {}"),
    "answer": (lambda told, _: told["facts"][0].update(answer=[1]), "its answer '[1]' is no text"),
    "spec": (lambda told, _: told.update(spec=[]), "its spec is no object"),
    "spec value": (lambda told, _: told["spec"].update(v_lr=0.25), "its header says"),
    "templates": (lambda told, _: told.update(templates=["{}", 4]), "its template '4' is no text"),
    "no deltas": (lambda told, _: told.update(deltas=[]), "it changes nothing"),
    "place": (lambda told, _: told["deltas"][0].update(place="up"), "delta 0 does not say where it belongs"),
    "layer": (lambda told, _: told["deltas"][0].update(layer=-1), "its layer '-1' is no whole number"),
    "another layer": (lambda told, _: told["deltas"][0].update(layer=0), "its header says"),
    "rank": (lambda told, _: told["deltas"][0].update(rank=3), "instead of numbers [3, 36]"),
    "huge": (lambda told, _: told["deltas"][0].update(rank=10**12), "instead of numbers"),
    "true": (lambda told, _: told["deltas"][0].update(d_in=True), "its d_in 'True' is no whole number"),
    "bias": (lambda told, _: told["deltas"][0].update(bias=False), "its tensor '0.bias' belongs to no delta"),
    "one more": (lambda told, _: told["deltas"].append(dict(told["deltas"][0])), "its tensor '3.right' is missing"),
    "no tensor": (lambda _, tensors: tensors.pop("0.left"), "its tensor '0.left' is missing"),
    "extra tensor": (lambda _, tensors: tensors.update(x=torch.ones(1)), "its tensor 'x' belongs to no delta"),
    "shape": (lambda _, tensors: tensors.update({"1.right": torch.ones(2, 2)}), "F32 [2, 2] instead of numbers"),
    "type": (lambda _, t: t.update({"1.right": t["1.right"].long()}), "I64 [144, 36] instead of numbers"),
    "not finite": (
        lambda _, t: t["1.right"].view(-1)[5:6].fill_(torch.nan),
        "'1.right' has values that are not finite",
    ),
    "number": (lambda _, t: t["1.right"].view(-1)[5:6].add_(1e-3), "its header says"),
    "key": (lambda told, _: told.update(key="0" * 16), "'0000000000000000'"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_changed_by_hand_is_refused(name: str, saved: Path) -> None:
    change, reason = CHANGES[name]
    refused(rewritten(saved, change), reason)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": NaN}', "[" * 100_000, '"x"', "null"])
def test_headers_that_are_no_object_are_refused(text: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", metadata={"factscope_edit": text})
    refused(tmp_path / "x.safetensors", "damaged")

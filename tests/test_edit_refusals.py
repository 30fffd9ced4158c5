"""What cannot be edited is refused by every command in one line that names the value; nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import test_edit_cli as saved
from cli_runner import FACT, PROMPT, SUBJECT, TINY, invoke, refused, save_tiny
from test_editing import EDIT, LAYERS

from factscope.editors.files import save_edit

ASKED = ("--prompt", PROMPT, "--subject", SUBJECT, "--answer", "Paris")
RUNS: dict[str, tuple[str, ...]] = {
    "predict": ("predict", *ASKED),
    "flow": ("flow", *ASKED),
    "lens": ("lens", *ASKED),
    "trace": ("trace", *ASKED, "--samples", "2", "--noise", "0.8"),
    "enrich": ("enrich", *ASKED),
    "extract": ("extract", *ASKED),
    "heads": ("heads", *ASKED),
    "edit": ("edit", *ASKED, "--new-answer", "Tokyo", "--layers", "1", "--preset", "rome", "--statistics", "identity"),
    "layers": (
        "layers", *ASKED, "--new-answer", "Tokyo", "--preset", "rome", "--statistics", "identity", "--noise", "0.8",
    ),
}  # fmt: skip
"""Every command on a query, which all take --edit."""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACTSCOPE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Models of other families on disk."""

    @cache
    def place(family: str) -> str:
        return str(save_tiny(tmp_path_factory.mktemp("models") / family, family))

    return place


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "one.safetensors"
    save_edit(saved.edits()[0], path)
    return path


def exported(file: Path, model: str = TINY) -> tuple[str, ...]:
    return "export", "--edit", str(file), "--to", str(file.parent / "new"), "--model", model


# ------------------------------------------------------------------------------------------- a delta for another model


@pytest.mark.parametrize("command", RUNS)
def test_an_edit_for_another_model(command: str, file: Path, others: Callable[[str], str]) -> None:
    name, *rest = RUNS[command]
    refused(invoke(name, "--model", others("llama"), *rest, "--edit", str(file)), "was made for tiny@test", "llama")


def test_an_export_of_an_edit_for_another_model(file: Path, others: Callable[[str], str]) -> None:
    refused(invoke(*exported(file, others("llama"))), "was made for tiny@test", "llama")
    assert not (file.parent / "new").exists()


def test_statistics_of_another_model(tmp_path: Path, others: Callable[[str], str]) -> None:
    """The published files say no model; the width of their matrix does."""
    from test_second_moments import published

    file = published(tmp_path / "published.npz")
    asked = ("--layers", "1", "--import", str(file))
    refused(invoke("statistics", "--model", others("llama"), *asked), "'published.npz'", "144 x 144", "48 numbers")
    refused(invoke(*RUNS["edit"][:1], "--model", others("llama"), *RUNS["edit"][1:-1], str(file)), "'published.npz'")


# ---------------------------------------------------------------------------------------------------- a damaged file


@pytest.mark.parametrize("command", RUNS)
def test_a_damaged_edit(command: str, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])
    name, *rest = RUNS[command]
    refused(invoke(name, "--model", TINY, *rest, "--edit", str(file)), "one.safetensors", "damaged")


def test_an_export_of_a_damaged_edit(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])
    refused(invoke(*exported(file)), "one.safetensors", "damaged")
    assert not (file.parent / "new").exists()


def test_damaged_statistics(tmp_path: Path) -> None:
    for name in ("moments.npz", "moments.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 no file")
        refused(invoke("statistics", "--model", TINY, "--layers", "1", "--import", str(tmp_path / name)), name)
        refused(invoke(*EDIT, "--statistics", str(tmp_path / name)), name)


# ------------------------------------------------------------------------------------- a target that is no other answer


@pytest.mark.parametrize("asked", [EDIT, LAYERS], ids=["edit", "layers"])
@pytest.mark.parametrize("target", ["Paris", " paris "])
def test_a_target_that_is_the_answer(asked: tuple[str, ...], target: str) -> None:
    refused(invoke(*asked, "--new-answer", target), repr(target), "is the answer that the model is to unlearn")


@pytest.mark.parametrize("asked", [EDIT, LAYERS], ids=["edit", "layers"])
@pytest.mark.parametrize("target", ["", "  ", "\t"])
def test_an_empty_target(asked: tuple[str, ...], target: str) -> None:
    refused(invoke(*asked, "--new-answer", target), "the new answer '", "is empty")


def test_an_empty_target_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "facts.csv").write_text("subject,prompt,answer,new_answer\nJapan,The capital of Japan is,Tokyo,\n")
    refused(invoke("edit", "--model", TINY, "--facts", str(tmp_path / "facts.csv")), "Japan", "new_answer")


# ------------------------------------------------------------------------------------------------ a layer out of range


@pytest.mark.parametrize("layer", ["4", "99", "2-4"])
@pytest.mark.parametrize("asked", [EDIT, LAYERS], ids=["edit", "layers"])
def test_a_layer_out_of_range(asked: tuple[str, ...], layer: str) -> None:
    named = layer.rpartition("-")[2]
    refused(invoke(*asked, "--layers", layer), f"layer {named} is not between 0 and 3")


def test_statistics_of_a_layer_out_of_range(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The Eiffel Tower is located in the city of Paris.\n")
    asked = ("statistics", "--model", TINY, "--layers", "7")
    refused(invoke(*asked, "--text", str(tmp_path / "text.txt")), "layer 7 is not between 0 and 3")
    refused(invoke(*asked, "--import", str(tmp_path / "text.npz")), "layer 7 is not between 0 and 3")


@pytest.mark.parametrize("command", [*RUNS, "export"])
def test_an_edit_of_a_layer_out_of_range(command: str, file: Path) -> None:
    one = saved.edits()[0]
    save_edit(replace(one, deltas=(replace(one.deltas[0], layer=99),)), file)
    name, *rest = (*RUNS.get(command, ()), "")[:-1] or ("export",)
    asked = exported(file) if name == "export" else (name, "--model", TINY, *rest, "--edit", str(file))
    refused(invoke(*asked), "layer 99 is not between 0 and 3")


# ------------------------------------------------------------------------------------------------- what a model lacks


@pytest.mark.parametrize("command", ["edit", "layers"])
@pytest.mark.parametrize("method", ["rome", "memit", "ft"])
def test_a_model_of_experts(command: str, method: str, others: Callable[[str], str]) -> None:
    name, *rest = RUNS[command]
    preset = ("--preset", "memit") if method == "memit" else ()
    if method == "ft":  # which takes no statistics
        at = rest.index("--statistics")
        rest = [*rest[:at], *rest[at + 2 :]]
    found = invoke(name, "--model", others("mixtral"), *rest, "--method", method, *preset)
    refused(found, "mixtral", "down-projection")


@pytest.mark.parametrize("command", ["edit", "layers"])
def test_memit_behind_a_norm(command: str, others: Callable[[str], str]) -> None:
    name, *rest = RUNS[command]
    found = invoke(name, "--model", others("gemma2"), *rest, "--method", "memit", "--preset", "memit")
    refused(found, "gemma2", "does not support MEMIT", "linearly")


def test_statistics_of_a_model_of_experts(tmp_path: Path, others: Callable[[str], str]) -> None:
    (tmp_path / "text.txt").write_text("The Eiffel Tower is located in the city of Paris.\n")
    asked = ("statistics", "--model", others("mixtral"), "--layers", "1", "--text", str(tmp_path / "text.txt"))
    refused(invoke(*asked), "mixtral", "down-projection")


@pytest.mark.parametrize("command", ["predict", "export"])
def test_an_edit_where_the_map_is_missing(command: str, file: Path, others: Callable[[str], str]) -> None:
    """The edit says that it is of this very model, and the model has no such map."""
    from factscope.editors.edit import EditedModel
    from factscope.models.loading import load

    model = load(others("mixtral"))
    one = saved.edits()[0]
    of_this = replace(one, model=EditedModel.of(model), computed_on=model.info.weights)
    save_edit(of_this, file)
    place = others("mixtral")
    asked = (
        exported(file, place) if command == "export" else ("predict", "--model", place, *FACT[2:], "--edit", str(file))
    )
    refused(invoke(*asked), "mixtral", "down-projection of layer 1")

"""What is exported needs no FactScope: plain transformers and PEFT give the dashboard's probabilities."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from cli_runner import invoke, refused, save_tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from factscope.editors import export
from factscope.editors.edit import Edit, EditedModel, with_edits
from factscope.editors.export import export_merged, export_peft
from factscope.editors.files import save_edit
from factscope.errors import CapabilityError, EditError
from factscope.experiments import prediction
from factscope.models.handle import ModelHandle
from factscope.models.loading import load
from factscope.queries import Query
from factscope.settings import Settings
from tests.oracle.edits import delta, edit_of
from tests.oracle.whole import Whole
from tests.tiny_models import build, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks
QUERY = Query(prompt="The Eiffel Tower is located in the city of", subject="Eiffel Tower")
FAMILIES = ("gpt2", "llama", "opt", "gptj", "gemma2", "bloom", "falcon_7b", "qwen2", "gpt_neox", "granite", "qwen2_moe")
BIASED = {"gpt2", "opt", "gptj", "bloom", "gpt_neox"}
"""Whose down-projections have a bias."""


@lru_cache(maxsize=1)
def _whole(family: str) -> Whole:
    return Whole(build(family, vocab_size=len(tiny_tokenizer("byte"))), wide=False)


def edits_of(handle: ModelHandle, family: str, *, full: bool, size: float = 2.0) -> list[Edit]:
    """Two edits that share a map; with ``full`` one of full rank, with a bias where the family has one."""
    whole = _whole(family)
    low = delta(whole, 1, "down_projection", rank=1, bias=False, seed=1, size=size)
    again = delta(
        whole, 1, "down_projection", rank=None if full else 2, bias=full and family in BIASED, seed=2, size=size
    )
    attention = delta(whole, 3, "output_projection", rank=3, bias=False, seed=3, size=size)
    one = edit_of(handle, [low])
    return [one, edit_of(handle, [again, attention], after=[one])]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "exported"


def probabilities(model: Any, tokenizer: Any) -> np.ndarray:
    ids = tokenizer(QUERY.prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits[0, -1].double().softmax(-1).numpy()


def same(handle: ModelHandle, model: Any, tokenizer: Any, *, tolerance: float = 1e-5) -> None:
    """The model gives the probabilities that the dashboard shows, and not those of the unedited model."""
    spec = prediction.PredictionSpec(top_k=handle.vocabulary)
    expected, plain = np.zeros(handle.vocabulary), np.zeros(handle.vocabulary)
    for side, into in ((handle, expected), (handle.original, plain)):
        for token in prediction.run(side, QUERY, spec).top:
            into[token.id] = token.probability
    found = probabilities(model, tokenizer)
    assert float(np.abs(found - expected).max()) <= tolerance
    assert float(np.abs(found - plain).max()) > 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_loads_the_merged_model(family: str, tmp_path: Path, folder: Path) -> None:
    handle = load(str(save_tiny(tmp_path / "model", family)), device="cpu")
    state = {name: tensor.clone() for name, tensor in handle._model.state_dict().items()}
    config = handle._model.config.to_dict()
    edited = with_edits(handle, edits_of(handle, family, full=True))
    assert export_merged(edited, folder) == ()
    plain, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    same(edited, plain.eval(), AutoTokenizer.from_pretrained(folder))
    same(edited, load(str(folder), device="cpu")._model, handle.tokenizer)
    assert all(torch.equal(tensor, state[name]) for name, tensor in handle._model.state_dict().items())
    assert handle._model.config.to_dict() == config
    told = json.loads((folder / "edits.json").read_text())
    assert [edit["key"] for edit in told["edits"]] == [edit.key for edit in edited.edits]
    assert told["weights"] == edited.info.weights
    assert told["model"]["weights"] == handle.info.weights
    assert folder.stat().st_mode & 0o777 == 0o777 & ~export._umask()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "model"]


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_the_adapter(family: str, tmp_path: Path, folder: Path) -> None:
    handle = load(str(save_tiny(tmp_path / "model", family)), device="cpu")
    edited = with_edits(handle, edits_of(handle, family, full=False))
    export_peft(edited, folder)
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    same(edited, adapted, handle.tokenizer)
    same(edited, adapted.merge_and_unload(), handle.tokenizer)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    same(edited, peft.PeftModel.from_pretrained(base, folder).eval(), handle.tokenizer)


def test_tied_weights_stay_tied(tmp_path: Path, folder: Path) -> None:
    handle = load(str(save_tiny(tmp_path / "model", "gpt2")), device="cpu")
    edited = with_edits(handle, edits_of(handle, "gpt2", full=False))
    places = [folder.with_name("loaded"), folder.with_name("wide")]
    export_merged(edited, places[0])
    export_merged(edited, places[1], stored="float32")
    for place in places:
        assert "lm_head.weight" not in load_file(place / "model.safetensors")
        plain = AutoModelForCausalLM.from_pretrained(place)
        assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight


# ---------------------------------------------------------------------------------------------------- rounding


def test_what_rounding_takes_is_said_and_float32_keeps_it(tmp_path: Path, folder: Path) -> None:
    handle = load(str(save_tiny(tmp_path / "model", "llama")), device="cpu", dtype="bfloat16")
    small = with_edits(handle, edits_of(handle, "llama", full=False, size=0.02))
    said = export_merged(small, folder)
    assert len(said) == 2
    assert all("Written in bfloat16" in text and "write it in float32" in text for text in said)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    kept = folder.with_name("kept")
    assert export_merged(small, kept, stored="float32") == ()
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "model", kept))
    assert after.dtype == torch.float32
    name = "model.layers.1.mlp.down_proj.weight"
    loaded = before.get_parameter(name).detach().to(torch.bfloat16).double()
    change = sum(d.matrix().double() for edit in small.edits for d in edit.deltas if d.layer == 1)
    assert isinstance(change, torch.Tensor)
    moved = after.get_parameter(name).detach().double() - loaded
    assert float((moved - change.T).abs().max()) <= 1e-6
    assert float(change.abs().max()) > 1e-4


def test_an_edit_that_survives_rounding_is_not_complained_of(tmp_path: Path, folder: Path) -> None:
    handle = load(str(save_tiny(tmp_path / "model", "llama")), device="cpu", dtype="bfloat16")
    edited = with_edits(handle, edits_of(handle, "llama", full=False))
    assert export_merged(edited, folder) == ()
    same(edited, AutoModelForCausalLM.from_pretrained(folder).eval(), handle.tokenizer, tolerance=0.1)


# ----------------------------------------------------------------------------------------------------- offload


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_a_model_on_disk_is_edited_and_exported(tmp_path: Path, folder: Path) -> None:
    place = save_tiny(tmp_path / "model", "llama")
    places: dict[str, int | str] = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.rotary_emb": "cpu"} | {f"model.layers.{layer}": "disk" for layer in range(4)}
    spread = load(str(place), device="cpu", device_map=places, settings=Settings(cache_dir=tmp_path / "own"))
    assert spread.parts.wiring.down_projection[1].weight.is_meta  # type: ignore[union-attr]
    whole = load(str(place), device="cpu")
    edits = edits_of(whole, "llama", full=True)
    edited, beside = with_edits(spread, edits), with_edits(whole, edits)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    assert torch.allclose(edited.forward(ids), beside.forward(ids), atol=1e-5)
    for stored in ("loaded", "float32"):
        target = folder.with_name(stored)
        assert export_merged(edited, target, stored=stored) == ()
        same(beside, AutoModelForCausalLM.from_pretrained(target).eval(), whole.tokenizer)


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def edited(tmp_path: Path) -> ModelHandle:
    handle = load(str(save_tiny(tmp_path / "model", "llama")), device="cpu")
    return with_edits(handle, edits_of(handle, "llama", full=False))


def test_without_edits_there_is_nothing_to_export(edited: ModelHandle, folder: Path) -> None:
    for write in (export_merged, export_peft):
        with pytest.raises(EditError, match="no edit is on"):
            write(edited.original, folder)
    assert not folder.exists()


def test_a_folder_that_is_taken_is_refused(edited: ModelHandle, folder: Path) -> None:
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    for write in (export_merged, export_peft):
        with pytest.raises(EditError, match=r"exported' is there already and not empty"):
            write(edited, folder)
        with pytest.raises(EditError, match=r"mine.txt' is there already"):
            write(edited, folder / "mine.txt")
        with pytest.raises(EditError, match=r"lies in a folder that does not exist"):
            write(edited, folder / "a" / "b")
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    (folder / "mine.txt").unlink()
    export_peft(edited, folder)
    assert (folder / "adapter_config.json").is_file()


@pytest.mark.parametrize("write", [export_merged, export_peft])
def test_a_failure_in_the_middle_leaves_nothing(
    write: Any, edited: ModelHandle, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_write_json", full)
    before = sorted(folder.parent.iterdir())
    with pytest.raises(EditError, match=r"exported' cannot be written \(No space left"):
        write(edited, folder)
    assert sorted(folder.parent.iterdir()) == before


def test_a_bias_that_the_model_does_not_have_cannot_be_merged(edited: ModelHandle, folder: Path) -> None:
    biased = edit_of(edited, [delta(_whole("llama"), 2, "down_projection", rank=1, bias=True, seed=9)])
    with pytest.raises(CapabilityError, match=r"layers\.2\.mlp\.down_proj .*llama.* has no bias"):
        export_merged(with_edits(edited.original, [biased]), folder)
    with pytest.raises(EditError, match="down-projection of layer 2 changes a bias, which no LoRA adapter holds"):
        export_peft(with_edits(edited.original, [biased]), folder)
    assert not folder.exists()


def test_a_change_of_full_rank_is_no_adapter(edited: ModelHandle, folder: Path) -> None:
    full = edit_of(edited, [delta(_whole("llama"), 2, "down_projection", rank=None, bias=False, seed=9)])
    with pytest.raises(EditError, match=r"layer 2 is of full rank, .*; export it merged"):
        export_peft(with_edits(edited.original, [full]), folder)


# ------------------------------------------------------------------------------------------------- the command


def test_the_command_writes_both_forms(edited: ModelHandle, tmp_path: Path) -> None:
    paths = []
    for number, edit in enumerate(edited.edits):
        paths += ["--edit", str(tmp_path / f"{number}.safetensors")]
        save_edit(edit, paths[-1])
    done = invoke("export", *paths, "--to", str(tmp_path / "merged"), "--as", "merged")
    assert (done.status, done.err) == (0, "")
    assert edited.info.weights in done.out and "merged" in done.out
    same(edited, AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), edited.tokenizer)
    done = invoke("export", *paths, "--to", str(tmp_path / "adapter"), "--as", "peft")
    assert (done.status, done.err) == (0, "")
    same(edited, peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval(), edited.tokenizer)
    moved = tmp_path / "elsewhere"
    os.rename(tmp_path / "model", moved)
    gone = invoke("export", *paths, "--to", str(tmp_path / "again"))
    refused(gone, str(tmp_path / "model"))
    found = invoke("export", *paths, "--to", str(tmp_path / "again"), "--model", str(moved), "--stored", "float32")
    assert found.status == 0
    same(edited, AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval(), edited.tokenizer)


def test_the_command_refuses(edited: ModelHandle, tmp_path: Path) -> None:
    one, two = edited.edits
    path, other = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_edit(one, path)
    save_edit(two, other)

    def never(*_: Any) -> Any:
        raise AssertionError("a model was loaded")

    to = ("--to", str(tmp_path / "new"))
    refused(invoke("export", *to, load=never), "--edit")
    refused(invoke("export", "--edit", str(path), load=never), "--to")
    refused(invoke("export", "--edit", "none.safetensors", *to, load=never), "none.safetensors", "does not exist")
    refused(invoke("export", "--edit", str(path), "--to", str(tmp_path), load=never), "not empty")
    refused(invoke("export", "--edit", str(path), *to, "--as", "gguf", load=never), "--as", "'gguf'")
    refused(invoke("export", "--edit", str(path), *to, "--as", "peft", "--stored", "float32", load=never), "--stored")
    refused(invoke("export", "--edit", str(path), "--edit", str(path), *to), "given twice")
    warned = invoke("export", "--edit", str(other), *to)
    assert warned.status == 0
    assert "was computed in the weight state" in warned.err


def test_an_adapter_of_the_bundled_model_and_of_random_weights_says_where_it_belongs(edited: ModelHandle) -> None:
    class Named:
        def __init__(self, name: str) -> None:
            self.info = EditedModel(name=name, revision="abc", dtype="float32", weights="0")

    found = {name: export._base(Named(name), False) for name in ("bundled", "random:bundled", "owner/name")}  # type: ignore[arg-type]
    assert found["bundled"][0] is not None and Path(found["bundled"][0]).joinpath("config.json").is_file()
    assert found["random:bundled"] == (None, None)
    assert found["owner/name"] == ("owner/name", "abc")

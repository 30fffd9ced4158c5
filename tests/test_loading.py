"""Each way in which a model cannot be loaded has its own sentence, and what can be loaded is loaded whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from fake_hub import COMMIT, FakeHub, FakeRepo, use_hub
from safetensors.torch import load_file, save_file
from tiny_models import build, tiny_tokenizer
from transformers import PreTrainedModel

from factscope.errors import (
    Cancelled,
    FactScopeError,
    ModelError,
    ModelFilesError,
    ModelGated,
    ModelNotCached,
    ModelNotFound,
    ModelTooLarge,
    ModelUnsupported,
    NetworkUnavailable,
    RevisionNotFound,
    SpecError,
)
from factscope.interventions.weights import down_weight
from factscope.models import hub as hub_module
from factscope.models import loading, memory
from factscope.models.checkpoint import needed_names
from factscope.models.creation import creating
from factscope.models.loading import estimate_memory, list_local_models, load
from factscope.models.sources import parse_name
from factscope.settings import Settings, get_settings

HUB_ID = "tester/tiny"


def save_tiny(folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, shards: bool = False) -> Path:
    """A complete tiny model on disk."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = tiny_tokenizer("byte")
    model = build(family, vocab_size=len(tokenizer)).to(dtype)
    model.save_pretrained(folder, **({"max_shard_size": "100KB"} if shards else {}))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("original") / "tiny")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of the complete model that a test may spoil."""
    return Path(shutil.copytree(original, tmp_path / "tiny"))


@pytest.fixture
def hub(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as fake:
        fake.repos[HUB_ID] = FakeRepo.of(original)
        use_hub(monkeypatch, fake.endpoint, tmp_path / "cache")
        yield fake


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def says(error: FactScopeError, *words: str) -> None:
    """One sentence, naming each of these words, and none of the raw messages."""
    text = str(error)
    assert "\n" not in text
    assert text.endswith(".")
    assert error.try_, text
    for word in words:
        assert word in text, text


# What a name means


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", ("model name is empty",)),
        (" \t", ("model name is empty",)),
        ("gpt\x072", (r"'gpt\x072'", "control character U+0007")),
        ("gpt2\n", ("control character U+000A",)),
        ("\ud800", ("control character U+D800",)),
        ("y" * 3000, ("3,000 characters", "too long")),
        ("z" * 200, ("200 characters", "neither a folder nor a hub id")),
        ("/no/such/folder", ("there is no folder '/no/such/folder'",)),
        ("./gone", ("there is no folder './gone'",)),
        ("~nobody-by-this-name/x", ("there is no folder '~nobody-by-this-name/x'",)),
        ("a/b/c", ("there is no folder 'a/b/c'",)),
        ("C:\\models", ("there is no folder",)),
        ("two words!", ("'two words!' is neither a folder nor a hub id",)),
        ("-dash/-", ("neither a folder nor a hub id",)),
        ("ünï/cödé", ("neither a folder nor a hub id",)),
        ("https://huggingface.co/openai-community/gpt2", ("is an address", "owner/name")),
        ("random:", ("does not say which model to randomise",)),
        ("random:random:bundled", ("does not say which model to randomise",)),
        ("random:bundled:x", ("'x'", "is not a seed")),
    ],
)
def test_a_name_that_means_nothing_is_refused(name: str, words: tuple[str, ...]) -> None:
    with pytest.raises(ModelNotFound) as refusal:
        load(name)
    says(refusal.value, *words)
    assert len(str(refusal.value)) < 400


def test_a_file_is_not_a_folder(folder: Path) -> None:
    with pytest.raises(ModelNotFound) as refusal:
        load(str(folder / "config.json"))
    says(refusal.value, "config.json", "is a file, not a folder")


def test_a_folder_has_no_revisions(folder: Path) -> None:
    with pytest.raises(RevisionNotFound) as refusal:
        load(str(folder), revision="v1")
    says(refusal.value, "'v1'", "has no revisions")


def test_the_bundled_model_may_be_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("factscope.models.sources.bundled_folder", lambda: tmp_path / "model")
    with pytest.raises(ModelNotFound) as refusal:
        load("bundled")
    says(refusal.value, "'bundled' is not part of this installation")


def test_only_allowed_names_on_a_public_address(folder: Path) -> None:
    settings = Settings(models_allowed=("bundled", HUB_ID))
    for name in (str(folder), f"random:{folder}", "openai-community/gpt2"):
        with pytest.raises(ModelError) as refusal:
            load(name, settings=settings)
        says(refusal.value, "is not offered here", "bundled, tester/tiny")
    with pytest.raises(ModelError, match="is not offered here"):  # every seed would be another load
        load(f"random:{HUB_ID}:3", settings=settings)
    assert parse_name(f"random:{HUB_ID}", settings=settings).seed == 0


@pytest.mark.parametrize(
    ("option", "value"), [("dtype", "int3"), ("device", "warp9"), ("device", "cuda:99"), ("device_map", "x")]
)
def test_a_choice_out_of_range_is_refused(folder: Path, option: str, value: str) -> None:
    with pytest.raises(SpecError) as refusal:
        load(str(folder), **{option: value})  # type: ignore[arg-type]
    says(refusal.value, f"'{value}'", "use")


# A folder that is whole


def test_a_folder_is_loaded_whole(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stages: list[str] = []
    handle = load(str(folder), device="cpu", progress=lambda done, total, stage: stages.append(stage))
    stored = load_file(folder / "model.safetensors")
    loaded = dict(handle._model.state_dict())
    assert stored
    for name, tensor in stored.items():
        assert torch.equal(loaded[name], tensor), name
    assert handle.info.dtype == "float32"
    assert handle.info.revision.startswith("files-")
    assert handle.warnings == ()
    assert not handle._model.training
    assert not any(parameter.requires_grad for parameter in handle._model.parameters())
    assert handle._model.config._attn_implementation == "factscope"
    assert [stage.split()[0] for stage in stages] == ["looking", "reading", "measuring"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("chosen", "expected"), [("auto", "bfloat16"), ("float32", "float32"), ("float16", "float16")])
def test_the_type_is_the_one_asked_for(tmp_path: Path, chosen: str, expected: str) -> None:
    place = save_tiny(tmp_path / "half", "gpt2", dtype=torch.bfloat16)
    assert load(str(place), dtype=chosen).info.dtype == expected


def test_falcon_with_alibi_uses_sdpa(tmp_path: Path) -> None:
    handle = load(str(save_tiny(tmp_path / "falcon", "falcon_rw")))
    assert handle._model.config._attn_implementation == "sdpa"


def test_shards_are_read_together(tmp_path: Path) -> None:
    place = save_tiny(tmp_path / "shards", shards=True)
    parts = sorted(place.glob("model-*.safetensors"))
    assert len(parts) > 1
    load(str(place))
    parts[1].unlink()
    with pytest.raises(ModelFilesError) as refusal:
        load(str(place))
    says(refusal.value, f"lacks 1 of {len(parts)} parts", parts[1].name)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    place = save_tiny(tmp_path / "tied", "gpt2")
    assert "lm_head.weight" not in load_file(place / "model.safetensors")
    handle = load(str(place))
    assert handle._model.get_output_embeddings().weight is handle._model.get_input_embeddings().weight


def test_disk_offload_gives_the_same_logits(folder: Path, tmp_path: Path) -> None:
    settings = Settings(cache_dir=tmp_path / "own")
    places: dict[str, int | str] = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.rotary_emb": "cpu"} | {f"model.layers.{layer}": "disk" for layer in range(4)}
    spread = load(str(folder), device="cpu", device_map=places, settings=settings)
    ids = torch.tensor([[1, 2, 3]])
    assert any(parameter.is_meta for parameter in spread._model.parameters())
    assert torch.allclose(spread.forward(ids), load(str(folder), device="cpu").forward(ids), atol=1e-6)
    assert list((tmp_path / "own").glob("offload-*"))
    whole = load(str(folder), device="cpu")
    assert spread.info.weights == whole.info.weights, "where the weights lie is no part of what they are"
    assert torch.equal(down_weight(spread, 2), down_weight(whole, 2))


def test_models_created_at_once_are_all_whole(tmp_path: Path) -> None:
    """Creating one replaces functions of torch and of transformers for the whole process."""
    place = save_tiny(tmp_path / "tied", "gpt2")
    names = [str(place), f"random:{place}", str(place), f"random:{place}:3"]
    ids = torch.tensor([[1, 2, 3]])
    expected = [load(name).forward(ids) for name in names]
    before = [vars(PreTrainedModel)["tie_weights"], torch.nn.init.normal_, torch.nn.init.uniform_]
    barrier = threading.Barrier(len(names))

    def again(index: int) -> bool:
        same = []
        for _ in range(3):
            barrier.wait(60)
            same.append(torch.equal(load(names[index]).forward(ids), expected[index]))
        return all(same)

    with ThreadPoolExecutor(len(names)) as pool:
        assert list(pool.map(again, range(len(names)))) == [True] * len(names)
    assert [vars(PreTrainedModel)["tie_weights"], torch.nn.init.normal_, torch.nn.init.uniform_] == before


def test_a_load_that_waits_for_another_says_so_and_can_be_cancelled(folder: Path) -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with creating():
            inside.set()
            leave.wait(60)

    def stop(done: int, total: int, stage: str) -> None:
        if stage.startswith("waiting for another model"):
            raise Cancelled

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(60)
    try:
        with pytest.raises(Cancelled):
            load(str(folder), progress=stop)
    finally:
        leave.set()
        thread.join()


# Random weights


def test_random_weights_are_seeded_and_leave_the_global_state_alone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()  # not needed
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (load(f"random:{folder}{end}") for end in ("", ":0", ":1"))
    assert torch.equal(torch.rand(3), expected)
    weights = [dict(handle._model.named_parameters()) for handle in (first, again, other)]
    matrix = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(weights[0][matrix], weights[1][matrix])
    assert not torch.equal(weights[0][matrix], weights[2][matrix])
    assert 0.01 < float(weights[0][matrix].std()) < 0.03, "the architecture's own initialisation"
    assert first.tokenizer.get_vocab() == tiny_tokenizer("byte").get_vocab()
    half = load(f"random:{folder}", dtype="bfloat16")
    assert torch.equal(dict(half._model.named_parameters())[matrix], weights[0][matrix].bfloat16())


# Damaged folders


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def change_shape(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, path, metadata={"format": "pt"})


def spoil_value(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


def only_pickle(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def edit_config(**changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return apply


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return apply


def remove(*patterns: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return apply


def short_tensor_list(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "x": "y"}, "b": 3}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


DAMAGE: list[tuple[str, Callable[[Path], None], type[ModelError], tuple[str, ...]]] = [
    ("empty folder", remove("*"), ModelNotFound, ("is empty",)),
    ("no config", remove("config.json"), ModelFilesError, ("has no config.json",)),
    ("config no json", write("config.json", b'{"model_type": '), ModelFilesError, ("config.json", "line 1, column 16")),
    ("config no text", write("config.json", b"\xff\xfe\x00"), ModelFilesError, ("config.json", "not text")),
    ("config a list", write("config.json", b"[1]"), ModelFilesError, ("config.json", "holds no object")),
    ("no model type", edit_config(model_type=None), ModelFilesError, ("names no model_type",)),
    ("unknown type", edit_config(model_type="zorg9"), ModelUnsupported, ("'zorg9'", "does not know")),
    (
        "remote code",
        edit_config(model_type="zorg9", auto_map={"AutoModelForCausalLM": "evil.Model"}),
        ModelUnsupported,
        ("'zorg9'", "code in its own repository", "never run"),
    ),
    ("T5", edit_config(model_type="t5"), ModelUnsupported, ("'t5'", "not a causal language model")),
    ("ViT", edit_config(model_type="vit"), ModelUnsupported, ("'vit'", "not a causal language model")),
    ("odd sizes", edit_config(hidden_size="wide"), ModelFilesError, ("config.json", "hidden_size")),
    ("negative layers", edit_config(num_attention_heads=0), ModelFilesError, ("cannot be built from its config.json",)),
    ("only pickle", only_pickle, ModelFilesError, ("pytorch_model.bin", "could run code")),
    ("no weights", remove("*.safetensors"), ModelFilesError, ("has no weights",)),
    ("truncated", truncate, ModelFilesError, ("model.safetensors", "is damaged", "should have", "bytes")),
    ("no header", write("model.safetensors", b"nonsense"), ModelFilesError, ("no safetensors header (8 bytes)",)),
    ("empty weights", write("model.safetensors", b""), ModelFilesError, ("no safetensors header (0 bytes)",)),
    ("bad header", short_tensor_list, ModelFilesError, ("header cannot be read",)),
    (
        "pointer",
        write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ModelFilesError,
        ("Git LFS pointer",),
    ),
    ("missing tensor", drop_tensor, ModelFilesError, ("lacks 1 of", "model.layers.2.mlp.down_proj.weight")),
    ("wrong shape", change_shape, ModelFilesError, ("model.norm.weight", "(7,) stored, (32,) expected")),
    ("not a number", spoil_value, ModelFilesError, ("model.norm.weight", "not finite numbers")),
    ("no tokenizer", remove("tokenizer*"), ModelFilesError, ("has no tokenizer files",)),
    ("bad tokenizer", write("tokenizer.json", b"{}"), ModelFilesError, ("the tokenizer of", "cannot be read")),
    ("foreign tokenizer", edit_config(vocab_size=50), ModelFilesError, ("400",)),
    (
        "quantised",
        edit_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        ModelUnsupported,
        ("quantised", "not installed"),
    ),
    ("bad index", remove("model.safetensors"), ModelFilesError, ("has no weights",)),
]


@pytest.mark.parametrize(("spoil", "kind", "words"), [row[1:] for row in DAMAGE], ids=[row[0] for row in DAMAGE])
def test_a_damaged_folder_is_refused_with_its_own_sentence(
    folder: Path,
    spoil: Callable[[Path], None],
    kind: type[ModelError],
    words: tuple[str, ...],
    capfd: pytest.CaptureFixture[str],
) -> None:
    spoil(folder)
    with pytest.raises(ModelError) as refusal:
        load(str(folder))
    assert type(refusal.value) is kind, refusal.value
    says(refusal.value, str(folder)[-20:], *words)
    assert capfd.readouterr() == ("", "")


def test_the_sentences_differ(original: Path, tmp_path: Path) -> None:
    """No two kinds of damage are told alike, the folder's name aside."""
    told: dict[str, str] = {}
    for number, (label, spoil, _, _) in enumerate(DAMAGE):
        place = Path(shutil.copytree(original, tmp_path / str(number)))
        spoil(place)
        with pytest.raises(ModelError) as refusal:
            load(str(place))
        told[label] = str(refusal.value).replace(str(place), "FOLDER")
    del told["bad index"]  # told as "no weights": the same damage
    assert len(set(told.values())) == len(told), told


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": "../../secret.safetensors"}}, ("outside its folder", "secret.safetensors")),
        ({"weight_map": "x"}, ("has no weight_map",)),
        ([], ("has no weight_map",)),
        ({"weight_map": {"a": "model-1.safetensors"}}, ("lacks 1 of 1 parts", "model-1.safetensors")),
    ],
)
def test_an_index_that_points_nowhere(folder: Path, index: object, words: tuple[str, ...]) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFilesError) as refusal:
        load(str(folder))
    says(refusal.value, *words)


def test_a_bidirectional_model_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel

    tokenizer = tiny_tokenizer("byte")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, is_decoder=False, **sizes)
    place = tmp_path / "bert"
    BertLMHeadModel(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    with pytest.raises(ModelUnsupported) as refusal:
        load(str(place))
    says(refusal.value, "causal")


def test_float16_overflow_is_told(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, path, metadata={"format": "pt"})
    load(str(folder))
    with pytest.raises(ModelFilesError) as refusal:
        load(str(folder), dtype="float16")
    says(refusal.value, "model.norm.weight", "as float16", "bfloat16")


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [
        (MemoryError(), ModelTooLarge, ("memory was not enough",)),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            ModelTooLarge,
            ("memory was not enough",),
        ),
        (OSError(errno.ENOSPC, "No space left on device"), ModelTooLarge, ("disk was full",)),
        (ImportError("install sentencepiece"), ModelUnsupported, ("needs a package", "sentencepiece")),
        (ValueError("pass trust_remote_code=True"), ModelUnsupported, ("code from its own repository",)),
        (KeyError("rope"), ModelFilesError, ("cannot be built from its config.json", "OSError: can't load")),
    ],
)
def test_what_goes_wrong_while_reading_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: type[ModelError], words: tuple[str, ...]
) -> None:
    def fail(*args: object) -> None:
        raise OSError("can't load") from raised  # as transformers wraps

    monkeypatch.setattr(loading, "_read_model", fail)
    with pytest.raises(ModelError) as refusal:
        load(str(folder))
    assert type(refusal.value) is kind
    says(refusal.value, str(folder)[-20:], *words)


# The hub


def test_a_model_of_the_hub_is_downloaded_and_then_cached(hub: FakeHub, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int, str]] = []
    handle = load(HUB_ID, progress=lambda *report: seen.append(report))
    assert handle.info.revision == COMMIT
    assert handle.info.name == HUB_ID
    downloads = [report for report in seen if report[2].startswith("downloading")]
    assert downloads[-1][0] > 0
    assert downloads[-1][1] >= downloads[-1][0]
    hub.requests.clear()
    assert load(HUB_ID).key == handle.key
    assert hub.requests == [f"GET /api/models/{HUB_ID}"]
    assert load(HUB_ID, local_only=True).info.revision == COMMIT
    assert capfd.readouterr() == ("", "")
    assert [(row.name, row.revision, row.usable) for row in list_local_models() if row.name != "bundled"] == [
        (HUB_ID, "main", True)
    ]


def test_a_revision_is_respected(hub: FakeHub) -> None:
    hub.repos[HUB_ID].revisions = ("main", "v1.0")
    assert load(HUB_ID, revision="v1.0").info.revision == COMMIT
    assert f"GET /api/models/{HUB_ID}/revision/v1.0" in hub.requests


def test_random_weights_of_a_hub_model_need_no_download_of_weights(hub: FakeHub) -> None:
    load(f"random:{HUB_ID}")
    assert not any(request.endswith(".safetensors") for request in hub.requests)


def test_an_unknown_id(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFound) as refusal:
        load("tester/nobody")
    says(refusal.value, "'tester/nobody' is not on the hub", "set HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_some")
    with pytest.raises(ModelNotFound) as refusal:
        load("tester/nobody")
    says(refusal.value, "'tester/nobody' is not on the hub", "a token with access")


def test_a_private_model_opens_with_its_token(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[HUB_ID].private = True
    with pytest.raises(ModelNotFound):
        load(HUB_ID)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert load(HUB_ID).info.revision == COMMIT


def test_a_gated_model_asks_for_a_token_then_for_access(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos[HUB_ID].gated = True
    with pytest.raises(ModelGated) as refusal:
        load(HUB_ID)
    says(refusal.value, "'tester/tiny' is gated", "set HF_TOKEN", f"{hub.endpoint}/{HUB_ID}")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ModelGated) as refusal:
        load(HUB_ID)
    says(refusal.value, "'tester/tiny' is gated", "no access", "ask for access")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert load(HUB_ID).info.name == HUB_ID


def test_a_bad_revision(hub: FakeHub) -> None:
    with pytest.raises(RevisionNotFound) as refusal:
        load(HUB_ID, revision="v9")
    says(refusal.value, "'tester/tiny' has no revision 'v9'")
    for odd in ("", "a b", "x\x00", "../up", "r" * 300):
        with pytest.raises(RevisionNotFound) as refusal:
            load(HUB_ID, revision=odd)
        says(refusal.value, "is not a revision of 'tester/tiny'")


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (500, NetworkUnavailable, ("problem of its own (500)",)),
        (503, NetworkUnavailable, ("problem of its own (503)",)),
        (429, NetworkUnavailable, ("limits how often", "429")),
        (403, ModelGated, ("does not let you read", "403")),
        (418, NetworkUnavailable, ("refused", "418")),
    ],
)
def test_a_hub_that_refuses(hub: FakeHub, status: int, kind: type[ModelError], words: tuple[str, ...]) -> None:
    hub.repos[HUB_ID].api_status = status
    started = time.monotonic()
    with pytest.raises(ModelError) as refusal:
        load(HUB_ID)
    assert time.monotonic() - started < 5
    assert type(refusal.value) is kind
    says(refusal.value, "'tester/tiny'", *words)


def test_a_hub_that_fails_later_still_answers_soon(hub: FakeHub) -> None:
    hub.repos[HUB_ID].file_status = 503
    started = time.monotonic()
    with pytest.raises(NetworkUnavailable) as refusal:
        load(HUB_ID, settings=Settings(hub_timeout_seconds=1))
    assert time.monotonic() - started < 5
    says(refusal.value, "'tester/tiny'")


def test_no_network_answers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, f"http://127.0.0.1:{closed_port()}", tmp_path / "cache")
    started = time.monotonic()
    with pytest.raises(NetworkUnavailable) as refusal:
        load(HUB_ID)
    assert time.monotonic() - started < 5
    says(refusal.value, "cannot be reached to look for 'tester/tiny'", "'bundled'")


def test_a_hub_that_is_silent_is_not_waited_for(hub: FakeHub) -> None:
    hub.hanging = True
    started = time.monotonic()
    with pytest.raises(NetworkUnavailable) as refusal:
        load(HUB_ID, settings=Settings(hub_timeout_seconds=0.5))
    assert time.monotonic() - started < 5
    says(refusal.value, "did not answer in time when asked for 'tester/tiny'")


def test_without_network_the_cache_is_used_and_says_so(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(HUB_ID)
    hub.repos[HUB_ID].api_status = 503
    again = load(HUB_ID)
    assert again.key == first.key
    assert len(again.warnings) == 1
    assert "'tester/tiny'" in again.warnings[0]
    assert "local cache" in again.warnings[0]
    with pytest.raises(NetworkUnavailable):
        load(HUB_ID, revision="v2")


def test_offline_and_not_cached(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotCached) as refusal:
        load(HUB_ID)
    says(refusal.value, "'tester/tiny' is not in the local cache", "HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ModelNotCached) as refusal:
        load(HUB_ID, revision="v1", local_only=True)
    says(refusal.value, "'tester/tiny' at revision 'v1'", "only local models")
    assert hub.requests == []
    load(HUB_ID)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load(HUB_ID).warnings == ()


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        (only_pickle, ModelFilesError, ("pytorch_model.bin", "could run code")),
        (remove("tokenizer*"), ModelFilesError, ("has no tokenizer files",)),
        (remove("config.json"), ModelFilesError, ("has no config.json",)),
        (edit_config(model_type="t5"), ModelUnsupported, ("'t5'", "not a causal")),
        (edit_config(model_type="zorg9", auto_map={"AutoModel": "m.M"}), ModelUnsupported, ("never run",)),
        (write("config.json", b"{"), ModelFilesError, ("no JSON at line 1",)),
        (drop_tensor, ModelFilesError, ("lacks 1 of",)),
        (truncate, ModelFilesError, ("is damaged",)),
    ],
    ids=["pickle", "no tokenizer", "no config", "T5", "remote code", "broken config", "missing tensor", "truncated"],
)
def test_a_bad_repository_is_refused_before_its_weights_are_downloaded(
    hub: FakeHub, folder: Path, spoil: Callable[[Path], None], kind: type[ModelError], words: tuple[str, ...]
) -> None:
    spoil(folder)
    hub.repos["tester/bad"] = FakeRepo.of(folder)
    with pytest.raises(ModelError) as refusal:
        load("tester/bad")
    assert type(refusal.value) is kind
    says(refusal.value, "'tester/bad'", *words)
    if spoil not in (drop_tensor, truncate):
        assert not any("safetensors" in request for request in hub.requests)


def test_code_of_a_known_family_is_ignored(hub: FakeHub, folder: Path) -> None:
    edit_config(auto_map={"AutoModelForCausalLM": "evil.Model"})(folder)
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    hub.repos["tester/evil"] = FakeRepo.of(folder)
    assert type(load("tester/evil")._model).__name__ == "LlamaForCausalLM"
    assert not any(request.endswith(".py") for request in hub.requests)


def test_only_what_is_needed_is_downloaded() -> None:
    names = [
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "README.md",
        "onnx/model.onnx",
        "merges.txt",
        "run.py",
    ]
    assert needed_names(names) == ("config.json", "merges.txt", "model.safetensors")
    shards = [
        "config.json",
        "model.safetensors.index.json",
        "model-1.safetensors",
        "model-2.safetensors",
        "x.safetensors",
    ]
    assert needed_names(shards) == (shards[0], shards[1], shards[2], shards[3])


def test_a_download_can_be_cancelled(hub: FakeHub) -> None:
    def stop(done: int, total: int, stage: str) -> None:
        if stage.startswith("downloading"):
            raise Cancelled

    with pytest.raises(Cancelled):
        load(HUB_ID, progress=stop)
    assert load(HUB_ID).info.revision == COMMIT


@pytest.mark.parametrize("times", [2, 3])
def test_a_client_that_another_thread_closes_ends_no_download(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """The hub's client is closed for all threads when a connection is refused to one of them."""
    download, closed = hub_module.hf_hub_download, list(range(times))

    def interrupted(repo: str, file: str, **options: Any) -> str:
        if file == "model.safetensors" and closed:
            closed.pop()
            client = huggingface_hub.get_session()
            huggingface_hub.close_session()
            client.get(f"{hub.endpoint}/{repo}/resolve/{COMMIT}/{file}")
        return download(repo, file, **options)

    monkeypatch.setattr(hub_module, "hf_hub_download", interrupted)
    if times < 3:
        assert load(HUB_ID).info.revision == COMMIT
    else:
        with pytest.raises(NetworkUnavailable) as refusal:
            load(HUB_ID)
        says(refusal.value, "cannot be reached", "'tester/tiny'")
    assert not closed


@pytest.mark.parametrize(("name", "again"), [("ReadError", True), ("ConnectError", False)])
def test_a_connection_that_breaks_is_made_again_and_one_that_is_refused_is_not(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, name: str, again: bool
) -> None:
    download, left = hub_module.hf_hub_download, [type(name, (Exception,), {})]

    def interrupted(repo: str, file: str, **options: Any) -> str:
        if left and file == "model.safetensors":
            raise left.pop()("[Errno 9] Bad file descriptor")
        return download(repo, file, **options)

    monkeypatch.setattr(hub_module, "hf_hub_download", interrupted)
    if again:
        assert load(HUB_ID).info.revision == COMMIT
    else:
        with pytest.raises(NetworkUnavailable):
            load(HUB_ID)


def test_a_full_disk_is_told_before_the_download(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(ModelTooLarge) as refusal:
        load(HUB_ID)
    says(refusal.value, "'tester/tiny'", "GB of disk free", "HF_HOME")
    assert not any("safetensors" in request for request in hub.requests)


@pytest.mark.slow
@pytest.mark.timeout(540)
def test_a_process_of_its_own_loads_by_environment_alone(hub: FakeHub, tmp_path: Path) -> None:
    """The endpoint, cache and token of the environment, a real process, nothing on standard error; then no network."""
    hub.repos[HUB_ID].gated = True
    program = (
        "import sys, time; from factscope.errors import FactScopeError; from factscope.models.loading import load\n"
        "import transformers\n"
        "for name in sys.argv[1:]:\n"
        "    start = time.monotonic()\n"
        "    try: handle = load(name); print(handle.info.revision, len(handle.warnings))\n"
        "    except FactScopeError as error: print(type(error).__name__, error)\n"
        "    print(time.monotonic() - start)"
    )
    root = Path(__file__).resolve().parents[1]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment = kept | {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_right", "PYTHONPATH": str(root)}

    def run(endpoint: str, *ids: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", program, *ids],
            env=environment | {"HF_ENDPOINT": endpoint},
            capture_output=True,
            text=True,
            timeout=240,
            check=True,
        )
        assert done.stderr == ""
        return done.stdout.splitlines()

    assert run(hub.endpoint, HUB_ID)[0] == f"{COMMIT} 0"
    absent, seconds, cached, more_seconds = run(f"http://127.0.0.1:{closed_port()}", "tester/other", HUB_ID)
    assert absent.startswith("NetworkUnavailable the hub cannot be reached to look for 'tester/other'")
    assert float(seconds) < 5
    assert cached == f"{COMMIT} 1"
    assert float(more_seconds) < 20


# Memory


def test_the_estimate_counts_what_the_model_has(folder: Path, hub: FakeHub) -> None:
    handle = load(str(folder))
    guess = estimate_memory(str(folder), device="cpu")
    assert guess.parameters == handle.n_parameters
    assert guess.bytes_weights == 4 * handle.n_parameters
    assert guess.fits
    assert guess.bytes_total_needed > guess.bytes_weights
    assert f"{handle.n_parameters:,} parameters" in guess.sentence
    assert estimate_memory(str(folder), dtype="bfloat16").bytes_weights == 2 * handle.n_parameters
    assert estimate_memory(f"random:{folder}").parameters == handle.n_parameters
    assert estimate_memory(HUB_ID).parameters == handle.n_parameters, "from the configuration"
    assert not any("safetensors" in request for request in hub.requests)
    hub.repos[HUB_ID].parameters = {"BF16": 7_000_000_000}
    large = estimate_memory(HUB_ID, dtype="auto")
    assert large.bytes_weights == 14_000_000_000
    assert "7.0 billion parameters, 14.0 GB as stored" in large.sentence


def test_a_model_that_does_not_fit_is_refused_before_it_is_downloaded(hub: FakeHub) -> None:
    hub.repos[HUB_ID].parameters = {"F32": 10**13}
    with pytest.raises(ModelTooLarge) as refusal:
        load(HUB_ID)
    says(refusal.value, "'tester/tiny' has 10000.0 billion parameters", "does not fit", "choose a smaller model")
    assert not any("safetensors" in request for request in hub.requests)
    assert load(HUB_ID, force=True).info.name == HUB_ID


def test_a_folder_that_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1_000_000)
    with pytest.raises(ModelTooLarge) as refusal:
        load(str(folder))
    says(refusal.value, "1.0 MB are free", "does not fit")
    load(str(folder), device_map={"": "cpu"}, settings=Settings(cache_dir=tmp_path))


def test_the_limits_of_a_container_count(tmp_path: Path) -> None:
    process = tmp_path / "cgroup"
    inner = tmp_path / "fs" / "outer" / "inner"
    inner.mkdir(parents=True)
    process.write_text("0::/outer/inner\n")
    for place, limit, used, reclaimable in ((inner, "max", 100, 0), (inner.parent, "1000", 700, 50)):
        (place / "memory.max").write_text(f"{limit}\n")
        (place / "memory.current").write_text(f"{used}\n")
        (place / "memory.stat").write_text(f"anon 5\ninactive_file {reclaimable}\n")
    assert memory.container_free(tmp_path / "fs", process) == 350
    assert memory.container_free(tmp_path / "nowhere", process) > 1 << 50
    assert memory.container_free(tmp_path / "fs", tmp_path / "gone") > 1 << 50


def test_room_is_made_before_memory_is_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [0]
    monkeypatch.setattr(memory, "free_bytes", lambda device: free[0])
    load(str(folder), make_room=lambda: free.__setitem__(0, 10**12))


# What stays on this machine, and settings


def test_an_unreadable_cache_is_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    assert {row.name for row in list_local_models()} <= {"bundled"}
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file"))
    assert {row.name for row in list_local_models()} <= {"bundled"}


def test_threads_that_load_together_leave_the_log_as_it_was(folder: Path) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    threads = [threading.Thread(target=load, args=(str(folder),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_settings_follow_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert get_settings().max_models == 2
    assert get_settings().torch_threads >= 1
    monkeypatch.setenv("FACTSCOPE_MODELS_ALLOWED", "bundled, openai-community/gpt2 ,")
    monkeypatch.setenv("FACTSCOPE_MAX_MODELS", "3")
    assert get_settings().models_allowed == ("bundled", "openai-community/gpt2")
    assert get_settings().max_models == 3
    (tmp_path / "s.env").write_text("FACTSCOPE_RENDERER=svg\n")
    monkeypatch.setenv("FACTSCOPE_SETTINGS_FILE", str(tmp_path / "s.env"))
    assert get_settings().renderer == "svg"
    assert get_settings() is get_settings(), "every prompt asks: what has not changed is not read again"
    (tmp_path / "s.env").write_text("FACTSCOPE_RENDERER=canvas\n")
    assert get_settings().renderer == "canvas"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert get_settings().cache_dir == tmp_path / "factscope"
    monkeypatch.delenv("FACTSCOPE_SETTINGS_FILE")
    monkeypatch.delenv("FACTSCOPE_MAX_MODELS")
    assert get_settings().max_models == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_MODELS", "zero"),
        ("MAX_MODELS", "0"),
        ("RENDERER", "crayon"),
        ("HUB_TIMEOUT_SECONDS", "nan"),
        ("SETTINGS_FILE", "/no/file"),
    ],
)
def test_a_bad_setting_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"FACTSCOPE_{name}", value)
    with pytest.raises(SpecError) as refusal:
        get_settings()
    says(refusal.value, f"FACTSCOPE_{name}={value!r}")

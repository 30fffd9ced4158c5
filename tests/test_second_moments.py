"""Second moments of keys: collected ones are those of plain forwards, stopped ones go on, files are checked."""

from __future__ import annotations

import io
import json
import math
import random
import sys
import zipfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runner import save_tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from factscope.demo import second_moments as shipped
from factscope.editors import collecting, named_corpora
from factscope.editors.edit import Edit, with_edits
from factscope.editors.second_moments import Moments, SecondMoment, moments_for, read_file, stored
from factscope.errors import Cancelled, DatasetError, FactScopeError, SpecError
from factscope.interventions.weights import WeightDelta
from factscope.models.handle import ModelHandle
from factscope.models.loading import load
from tests.oracle import plain_editing
from tests.oracle.edits import edit_of
from tests.oracle.laboratory import handle_of, subject, words

TOLD: dict[str, Any] = {"n_tokens": 10**6, "origin": "drawn", "key": "drawn"}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACTSCOPE_CACHE_DIR", str(tmp_path / "cache"))


@lru_cache
def handle(family: str = "gpt2") -> ModelHandle:
    return handle_of(subject(family).model, family)


def texts(count: int = 150, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 12, (count,), generator=generator).tolist()
    return [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]


def corpus(count: int = 150) -> collecting.Corpus:
    return collecting.Corpus.of([words(ids) for ids in texts(count)], "drawn words")


def plainly(family: str, layer: int, count: int) -> Tensor:
    """The mean of ``k k'``, one plain float64 forward a text, token after token."""
    total, tokens = None, 0
    for ids in texts(count):
        for at in range(len(ids)):
            key = plain_editing.key_and_output(subject(family), plain_editing.Row(ids=ids, at=at, read=[]), layer)[0]
            total = torch.outer(key, key) if total is None else total + torch.outer(key, key)
            tokens += 1
    assert total is not None
    return total / tokens


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_collected_is_the_mean_of_plain_forwards(family: str) -> None:
    found = collecting.collect(handle(family), corpus(40), (1, 3))
    assert [entry.layer for entry in found] == [1, 3]
    assert found[0].n_tokens == sum(map(len, texts(40)))
    for entry in found:
        kept = read_file(handle(family), entry.path, entry.layer).matrix
        exact = plainly(family, entry.layer, 40)
        assert kept is not None and float((kept - exact).norm() / exact.norm()) <= 1e-5


def test_special_tokens_are_not_counted() -> None:
    model = load("bundled")
    ids = model.tokenizer("The capital of Japan is")["input_ids"]
    _, tokens = collecting.sums_of(model, ["The capital of Japan is"], (0,))
    assert tokens == len(ids) - 1


def test_a_stopped_collection_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factscope.progress.STEP_SECONDS", math.inf)  # told after batches alone
    model, wanted = handle(), corpus()
    whole = collecting.collect(model, wanted, (1,))[0]
    matrix = read_file(model, whole.path, 1).matrix
    collecting.remove(whole.key)
    seen: list[int] = []

    def stop(done: int, total: int, partial: Any) -> None:
        seen.append(done)
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        collecting.collect(model, wanted, (1,), progress=stop)
    assert not stored()
    seen.clear()
    again = collecting.collect(model, wanted, (1,), progress=lambda done, total, partial: seen.append(done))[0]
    assert seen[0] == 2 and again.key == whole.key
    resumed = read_file(model, again.path, 1).matrix
    assert matrix is not None and resumed is not None and torch.equal(resumed, matrix)
    assert [path.name for path in again.path.parent.iterdir()] == [again.path.name]
    monkeypatch.setattr(collecting, "_keys", None)
    assert collecting.collect(model, wanted, (1,)) == (again,)


def test_a_collection_that_stops_at_every_chance_comes_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, wanted, layers = handle(), corpus(20), (0, 2, 3)
    whole = [read_file(model, one.path, one.layer).matrix for one in collecting.collect(model, wanted, layers)]
    for one in stored():
        collecting.remove(one.key)
    monkeypatch.setattr("factscope.progress.STEP_SECONDS", 0.0)  # a chance before every block and every layer's sum
    chances = 0

    def stop_at(chance: int) -> bool:
        left = iter(range(chance))

        def stop(done: int, total: int, partial: Any) -> None:
            if next(left, None) is None:
                raise Cancelled

        try:
            collecting.collect(model, wanted, layers, progress=stop)
        except Cancelled:
            return False
        return True

    while not stop_at(chances := chances + 1):
        assert not stored()
    assert chances > 2 * len(layers)
    parts = [read_file(model, one.path, one.layer).matrix for one in sorted(stored(), key=lambda one: one.layer)]
    for one, other in zip(whole, parts, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_keys_tell_models_layers_corpora_and_samples_apart() -> None:
    wanted = corpus()
    keys = {
        collecting.key(handle("gpt2"), 1, wanted, None, 1),
        collecting.key(handle("llama"), 1, wanted, None, 1),
        collecting.key(handle("gpt2"), 2, wanted, None, 1),
        collecting.key(handle("gpt2"), 1, corpus(149), None, 1),
        collecting.key(handle("gpt2"), 1, wanted, 20, 1),
        collecting.key(handle("gpt2"), 1, wanted, 20, 2),
        collecting.key(handle("gpt2"), 1, wanted, 21, 1),
    }
    assert len(keys) == 7
    assert collecting.key(handle("gpt2"), 1, wanted, 10**6, 5) == collecting.key(handle("gpt2"), 1, wanted, None, 1)


def test_the_cost_is_known_before() -> None:
    cost = collecting.estimate(handle(), corpus(), (1, 2))
    assert cost.tokens == sum(map(len, texts())) and cost.n_bytes == 2 * 4 * 144**2 and cost.seconds > 0
    assert not cost.warnings and not stored()
    assert collecting.estimate(handle(), corpus(10), (1,)).warnings


def test_too_few_tokens_get_a_stated_ridge() -> None:
    model = handle()
    collecting.collect(model, corpus(5), (1,))
    found = moments_for(model, (1,), "auto")
    key = torch.randn(144, dtype=torch.float64)
    assert torch.isfinite(found.solve(1, key)).all()
    assert found.told(1)["ridge"] > 0 and "singular" in found.warnings()[0]


def test_auto_takes_what_was_collected_for_these_weights() -> None:
    model = handle()
    with pytest.raises(SpecError, match="statistics"):
        moments_for(model, (1,), "auto")
    entry = collecting.collect(model, corpus(), (1,))[0]
    assert moments_for(model, (1,), "auto").told(1)["key"] == entry.key
    with pytest.raises(SpecError, match="layer 2"):
        moments_for(model, (1, 2), "auto")
    with pytest.raises(SpecError):
        moments_for(handle("llama"), (1,), "auto")


def test_identity_says_what_it_is() -> None:
    found = moments_for(handle(), (1,), "identity")
    key = torch.randn(144)
    assert torch.equal(found.solve(1, key), key.double())
    assert "identity" in found.warnings()[0] and "identity" in found.told(1)["origin"]


def test_solutions_are_those_of_plain_algebra() -> None:
    drawn = torch.randn(20, 60, dtype=torch.float64)
    matrix = drawn @ drawn.T / 60
    found = Moments({0: SecondMoment(layer=0, matrix=matrix, **TOLD)})
    keys = torch.randn(20, 3, dtype=torch.float64)
    assert torch.allclose(found.solve(0, keys), torch.linalg.inv(matrix) @ keys)
    assert torch.allclose(found.solve(0, keys[:, 0]), torch.linalg.inv(matrix) @ keys[:, 0])
    exact = torch.linalg.solve(0.3 * matrix + keys @ keys.T, keys)
    assert torch.allclose(found.solve_with(0, keys, 0.3), exact)
    assert not found.warnings() and "ridge" not in found.told(0)


# --------------------------------------------------------------------------------------------------- published files


def published(path: Path, **changed: Any) -> Path:
    drawn = np.random.RandomState(0).randn(400, 144).astype(np.float32)
    fields = {
        "mom2.constructor": "util.runningstats.SecondMoment()", "mom2.count": 400, "mom2.mom2": drawn.T @ drawn,
        "sample_size": 100_000,
    }  # fmt: skip
    fields |= changed
    np.savez(path, **{name: value for name, value in fields.items() if value is not None})
    return path


def test_published_files_hold_the_sum_and_the_count(tmp_path: Path) -> None:
    path = published(tmp_path / "transformer.h.1.mlp.c_proj_float32_mom2_100000.npz")
    found = read_file(handle(), path, 1)
    drawn = np.random.RandomState(0).randn(400, 144)
    assert found.matrix is not None and found.n_tokens == 400
    assert np.allclose(found.matrix.numpy(), drawn.T @ drawn / 400, atol=1e-5)
    entry = collecting.take_over(handle(), path, 1)
    assert moments_for(handle(), (1,), "auto").told(1)["key"] == entry.key
    both = {layer: published(tmp_path / f"layer-{layer}.npz") for layer in (1, 2)}
    assert moments_for(handle(), tuple(both), str(tmp_path / "layer-{layer}.npz")).told(2)["tokens"] == 400
    with pytest.raises(SpecError, match="one file"):
        moments_for(handle(), (1, 2), str(path))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"mom2.count": None}, "mom2.count"),
        ({"mom2.mom2": None}, "mom2.mom2"),
        ({"mom2.count": 0}, "positive"),
        ({"mom2.count": np.inf}, "cannot be read"),
        ({"mom2.count": np.nan}, "cannot be read"),
        ({"mom2.count": 1e300}, "positive"),
        ({"mom2.count": np.ones(3)}, "no number"),
        ({"mom2.mom2": np.eye(7, dtype=np.float32)}, "7 x 7"),
        ({"mom2.mom2": np.full((144, 144), np.nan, dtype=np.float32)}, "finite"),
        ({"mom2.mom2": np.ones(144, dtype=np.float32)}, "matrix"),
        ({"mom2.mom2": np.array([{}], dtype=object)}, "cannot be read"),
    ],
)
def test_published_files_that_are_wrong_are_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        read_file(handle(), published(tmp_path / "file.npz", **changed), 1)


def test_a_file_that_claims_more_than_memory_is_refused_unread(tmp_path: Path) -> None:
    path = published(tmp_path / "file.npz", **{"mom2.mom2": None})
    for name, said in (("mom2.mom2", "10000000 x 10000000"), ("mom2.count", "no number")):
        claim = io.BytesIO()
        np.lib.format.write_array_header_1_0(claim, {"descr": "<f4", "fortran_order": False, "shape": (10**7, 10**7)})
        other = tmp_path / f"{name}.npz"
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as new:
            for entry in old.namelist():
                if entry != f"{name}.npy":
                    new.writestr(entry, old.read(entry))
            new.writestr(f"{name}.npy", claim.getvalue() + bytes(10**6))
        with pytest.raises(DatasetError, match=said):
            read_file(handle(), other, 1)


def test_any_damage_of_a_compressed_file_is_refused_or_changes_no_number(tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    drawn = np.random.RandomState(0).randn(400, 144).astype(np.float32)
    np.savez_compressed(path, **{"mom2.count": 400, "mom2.mom2": drawn.T @ drawn})
    content, exact = path.read_bytes(), read_file(handle(), path, 1).matrix
    assert exact is not None
    draw, refusals = random.Random(0), 0
    places = [draw.randrange(len(content)) for _ in range(100)] + list(range(160)) + list(range(-160, 0))
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            found = read_file(handle(), path, 1).matrix
        except DatasetError:
            refusals += 1
            continue
        assert found is not None and torch.equal(found, exact)
    assert refusals > 200


@pytest.mark.parametrize("name", ["file.npz", "file.safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nothing", b"\x08\0\0\0\0\0\0\0{}      "])
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=name):
        read_file(handle(), path, 1)
    with pytest.raises(DatasetError, match="nowhere"):
        read_file(handle(), tmp_path / f"nowhere{path.suffix}", 1)


def test_a_file_of_another_layer_is_refused() -> None:
    entry = collecting.collect(handle(), corpus(), (1,))[0]
    with pytest.raises(DatasetError, match="layer 1, not 2"):
        read_file(handle(), entry.path, 2)


@pytest.mark.parametrize("changed", [{"weights": "f" * 16, "model": "other/model"}, {"dtype": "bfloat16"}])
def test_a_file_of_another_model_is_refused(tmp_path: Path, changed: dict[str, str]) -> None:
    entry = collecting.collect(handle(), corpus(), (1,))[0]
    told = told_of(entry.path)
    other = tmp_path / "other.safetensors"
    save_file(load_file(entry.path), other, metadata={"factscope": json.dumps({**told, **changed})})
    for use in (read_file, collecting.take_over):
        with pytest.raises(DatasetError) as refusal:
            use(handle(), other, 1)
        said = str(refusal.value)
        assert "'other.safetensors'" in said and "\n" not in said
        for whose in ({**told, **changed}, told):
            assert all(whose[name] in said for name in ("model", "dtype", "weights")), said
    with pytest.raises(DatasetError, match=r"other\.safetensors"):
        moments_for(handle(), (1,), str(other))
    edited = with_edits(handle(), [an_edit(handle())])
    assert read_file(edited, entry.path, 1).n_tokens == entry.n_tokens, (
        "an edited model's statistics are its original's"
    )


@pytest.mark.parametrize("name", ["weights", "dtype", "model"])
def test_a_file_that_says_no_model_is_refused(tmp_path: Path, name: str) -> None:
    entry = collecting.collect(handle(), corpus(), (1,))[0]
    told = told_of(entry.path)
    told.pop(name)
    save_file(load_file(entry.path), tmp_path / "other.safetensors", metadata={"factscope": json.dumps(told)})
    with pytest.raises(DatasetError, match=name):
        read_file(handle(), tmp_path / "other.safetensors", 1)


def told_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["factscope"])


def an_edit(model: ModelHandle) -> Edit:
    left, right = torch.ones(144, 1), torch.ones(1, 36)
    return edit_of(model, [WeightDelta(layer=1, place="down_projection", left=left, right=right)])


def test_corpora_are_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("first paragraph\nstill\n\nsecond")
    assert collecting.read_corpus(tmp_path / "one.txt").texts == ("first paragraph still", "second")
    (tmp_path / "two.md").write_text("third")
    (tmp_path / "three.bin").write_bytes(b"\x89PNG\xff")
    assert collecting.read_corpus(tmp_path).texts == ("first paragraph still", "second", "third")
    for wrong in ("missing.txt", "three.bin"):
        with pytest.raises(DatasetError):
            collecting.read_corpus(tmp_path / wrong)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError):
        collecting.read_corpus(tmp_path / "empty")


# ------------------------------------------------------------------------------------------------ datasets by name


def written(folder: Path, form: str, count: int = 300) -> str:
    """A dataset on disk: as tables of the hub have it, or as ``save_to_disk`` writes it."""
    library = pytest.importorskip("datasets")
    rows = {"title": [f"t{i}" for i in range(count)], "text": [words(ids) for ids in texts(count)]}
    made = library.Dataset.from_dict(rows)
    place = folder / form
    if form == "saved":
        made.save_to_disk(str(place))
    elif form == "splits":
        library.DatasetDict({"train": made, "test": made.select(range(3))}).save_to_disk(str(place))
    else:
        place.mkdir()
        for part in range(2):
            rest = made.shard(2, part, contiguous=True)
            rest.to_parquet(str(place / f"train-{part}.parquet")) if form == "parquet" else rest.to_json(
                str(place / f"train-{part}.jsonl")
            )
    return str(place)


@pytest.mark.parametrize("form", ["parquet", "jsonl", "saved", "splits"])
def test_a_dataset_in_a_folder_is_streamed(form: str, tmp_path: Path) -> None:
    given = named_corpora.named(written(tmp_path, form))
    assert given is not None and given.folder
    whole = named_corpora.stream(given, None)
    assert whole.texts == tuple(words(ids) for ids in texts(300)) and form in whole.origin
    if form == "parquet":  # of which the package waits five seconds for every stream that is not read to its end
        return
    some = named_corpora.stream(given, 50, seed=3)
    assert len(set(some.texts)) == 50 and set(some.texts) < set(whole.texts) and some.texts != whole.texts[:50]
    assert named_corpora.stream(given, 50, seed=3).texts == some.texts
    assert named_corpora.stream(given, 50, seed=4).fingerprint != some.fingerprint
    assert named_corpora.stream(given, 20, seed=3).texts == some.texts[:20], "an estimate sees the beginning"
    other = named_corpora.stream(replace(given, column="title"), 5)
    assert all(text.startswith("t") for text in other.texts)
    with pytest.raises(DatasetError, match="no column 'body'"):
        named_corpora.stream(replace(given, column="body"), 5)
    if form != "saved":  # which has no splits
        with pytest.raises(DatasetError, match="cannot be read"):
            named_corpora.stream(replace(given, split="nowhere"), 5)


def test_a_dataset_is_estimated_by_its_beginning_and_collected_whole(tmp_path: Path) -> None:
    seen: list[int] = []
    source = named_corpora.Source(written(tmp_path, "jsonl"), 260, seed=2, step=seen.append)
    assert len(source.begin.texts) == collecting.PROBED_TEXTS == 200 and source.in_all == 260 and seen[-1] == 200
    cost = collecting.estimate(handle(), source.begin, (1,), n_texts=source.n_texts, in_all=source.in_all)
    corpus = source.whole()
    assert len(corpus.texts) == cost.n_texts == 260 and corpus.texts[:200] == source.begin.texts
    entry = collecting.collect(handle(), corpus, (1,))[0]
    assert abs(entry.n_tokens / cost.tokens - 1) < 0.1 and "260 texts drawn with seed 2" in entry.origin

    def stop(taken: int) -> None:
        if taken == 7:
            raise Cancelled

    with pytest.raises(Cancelled):
        named_corpora.Source(str(tmp_path / "jsonl"), 100, step=stop)
    small = named_corpora.Source(str(tmp_path / "jsonl"), 30)
    assert small.in_all is None and small.whole() is small.begin


def test_without_the_package_a_name_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from cli_runner import invoke, refused

    monkeypatch.setitem(sys.modules, "datasets", None)
    asked = ("statistics", "--layers", "1", "--texts", "10", "--text")
    refused(invoke(*asked, "wikimedia/wikipedia:20231101.en"), "wikimedia/wikipedia", "pip install datasets")
    refused(invoke(*asked, "corpus"), "'corpus' is no file and no folder", "pip install datasets")
    refused(invoke(*asked[:3], "--text", "wikimedia/wikipedia"), "wikimedia/wikipedia", "--texts")


@pytest.mark.parametrize("text", ["corpus.txt", "notes.md", "/no/where", "./text", "a b", "x/y/z", "a:b:c:d:e", "\0"])
def test_what_looks_like_a_path_is_no_name(text: str) -> None:
    assert named_corpora.named(text) is None


def test_names_have_parts() -> None:
    found = named_corpora.named("Salesforce/wikitext:wikitext-103-raw-v1:test:text")
    assert found == named_corpora.NamedCorpus(
        name="Salesforce/wikitext", configuration="wikitext-103-raw-v1", split="test", column="text"
    )
    assert found.label == "Salesforce/wikitext:wikitext-103-raw-v1:test"
    plain = named_corpora.named("wikitext::validation")
    assert plain is not None and (plain.configuration, plain.split) == ("", "validation")


def test_the_command_collects_from_a_dataset(tmp_path: Path) -> None:
    from cli_runner import invoke

    library = pytest.importorskip("datasets")
    made = library.Dataset.from_dict({"text": shipped.documents(230)})
    (tmp_path / "data").mkdir()
    made.to_json(str(tmp_path / "data" / "train.jsonl"))
    asked = ("statistics", "--model", str(save_tiny(tmp_path / "model")), "--layers", "1", "--format", "json")
    asked += ("--text", str(tmp_path / "data"), "--texts", "220")
    cost = invoke(*asked, "--estimate")
    assert cost.status == 0 and cost.data["rows"][0]["texts"] == 220, cost.err
    done = invoke(*asked)
    assert done.status == 0 and "about" in done.err, done.err
    (row,) = done.data["rows"]
    assert "dataset data, 220 texts drawn with seed 1" in row["origin"]


# ------------------------------------------------------------------------------------------------------- the shipped


def test_what_ships_belongs_to_the_bundled_model() -> None:
    model = load("bundled")
    assert shipped.provenance()["weights"] == model.info.weights
    assert shipped.FILE.stat().st_size < 5_000_000
    assert shipped.read("other", 0) is None
    found = moments_for(model, range(model.info.n_layers), "auto")
    assert not found.warnings()
    for layer in range(model.info.n_layers):
        assert found.told(layer)["tokens"] >= 100 * 768


def test_what_ships_is_what_new_documents_give() -> None:
    """A thousand documents more: directions that they use weigh as they do in the file."""
    model = load("bundled")
    documents = shipped.documents(9_000)[8_000:]
    layers = (0, 3, 7)
    sums, tokens = collecting.sums_of(model, documents, layers)
    for layer in layers:
        kept = shipped.read(model.info.weights, layer)
        assert kept is not None
        mean = sums[layer] / tokens
        assert float((kept[0] - mean).norm() / mean.norm()) <= 0.1


def test_packing_keeps_a_covariance() -> None:
    drawn = torch.randn(60, 200, dtype=torch.float64) * torch.logspace(-3, 1, 60, dtype=torch.float64)[:, None]
    matrix = drawn @ drawn.T / 200
    again = shipped.unpacked(*shipped.packed(matrix))
    key = torch.randn(60, dtype=torch.float64) * matrix.diagonal().sqrt()
    exact, found = torch.linalg.solve(matrix, key), torch.linalg.solve(again, key)
    assert float((found - exact).norm() / exact.norm()) <= 0.02
    assert float(torch.linalg.eigvalsh(again).min()) > 0


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_lists_collects_and_removes(tmp_path: Path) -> None:
    from cli_runner import invoke as run

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(shipped.documents(60)))
    folder = str(save_tiny(tmp_path / "model"))
    asked = ("statistics", "--model", folder, "--layers", "1-2", "--text", str(text))
    empty = run("statistics", "--format", "json")
    assert empty.status == 0 and empty.data["rows"] == []
    cost = run(*asked, "--estimate", "--format", "json")
    assert cost.status == 0 and cost.data["rows"][0]["texts"] == 60 and "tokens of 60 texts" in cost.err
    assert run("statistics", "--format", "json").data["rows"] == []
    made = run(*asked, "--format", "json")
    assert made.status == 0 and [row["layer"] for row in made.data["rows"]] == [1, 2] and "seconds" in made.err
    listed = run("statistics", "--format", "json").data["rows"]
    assert {row["key"] for row in listed} == {row["key"] for row in made.data["rows"]}
    gone = run("statistics", "--remove", listed[0]["key"], "--format", "json")
    assert gone.status == 0 and len(run("statistics", "--format", "json").data["rows"]) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--layers", "1"), "without --text"),
        (("--text", "nowhere.txt"), "--layers is missing"),
        (("--text", "nowhere.txt", "--layers", "1"), "nowhere.txt"),
        (("--estimate",), "without --text"),
        (("--remove", "abc"), "'abc'"),
        (("--remove", "abc", "--text", "x"), "stands beside"),
        (("--text", "x.txt", "--layers", "3-1"), "backwards"),
        (("--text", "x.txt", "--layers", "one"), "whole number"),
        (("--import", "nowhere.npz", "--layers", "1"), "nowhere.npz"),
    ],
)
def test_the_command_refuses(given: tuple[str, ...], said: str) -> None:
    from cli_runner import invoke as run

    refused = run("statistics", *given)
    assert refused.status == 2 and said in refused.err and refused.err.count("\n") == 1


def test_a_layer_out_of_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FactScopeError, match="layer 9"):
        collecting.estimate(handle(), corpus(), (9,))
    with pytest.raises(SpecError, match="0 texts"):
        collecting.estimate(handle(), corpus(), (1,), n_texts=0)

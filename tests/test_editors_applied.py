"""What the editors themselves make, applied: the overlay is the merged copy, whatever the model is built like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_editors as invariants
import torch
from cli_runner import save_tiny
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from factscope.editors import problems, rome, suffix
from factscope.editors.compute import edit
from factscope.editors.edit import Edit, EditFact, with_edits
from factscope.editors.specs import FineTuningSpec, MemitSpec, RomeSpec
from factscope.errors import Cancelled
from factscope.models.handle import ModelHandle
from factscope.models.loading import load
from factscope.settings import Settings
from tests.oracle.edits import merged
from tests.oracle.laboratory import handle_of
from tests.tiny_models import _SETTINGS, FAMILIES, build, redraw

ROUNDING = 1e-5
SCALES = {"gpt_neo": 1.0}
"""It amplifies rounding: drawn at 1.5, its plain float32 forward itself is more than 1e-5 off."""
SPECS: dict[str, Any] = {
    "rome": RomeSpec(steps=12, stop=0.0, clamp=20.0, contexts="none", statistics="identity", layers=(1,)),
    "memit": MemitSpec(
        steps=12, stop=0.0, contexts="none", statistics="identity", layers=(1, 2), covariance_weight=0.05
    ),
    "ft": FineTuningSpec(steps=6, learning_rate=1e-2, bound=2e-2, layers=(1, 2)),
}
MADE = [(m, f) for f in invariants.DENSE for m in SPECS if m != "memit" or f not in invariants.NORMED]


def tied(model: PreTrainedModel) -> bool:
    head: Any = model.get_output_embeddings()
    return head.weight is model.get_input_embeddings().weight


def down(handle: ModelHandle) -> nn.Module:
    found = handle.parts.wiring.down_projection[1]
    assert found is not None
    return found


def gated(model: PreTrainedModel) -> bool:
    return any(name.endswith(("gate_proj", "gate_up_proj")) for name, _ in model.named_modules())


def moved(found: torch.Tensor, before: torch.Tensor) -> float:
    """The largest change of a probability."""
    return float((found - before.softmax(-1)).abs().max())


BUILT: dict[str, tuple[str, ...]] = {
    "tied embeddings": ("gpt2", "gpt_neo", "opt", "bloom", "falcon_7b", "gemma", "gemma2", "gemma3", "cohere", "mpt"),
    "Conv1D": ("gpt2",),
    "gated": ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "olmo2", "granite", "cohere", "glm4"),
    "parallel": ("gptj", "gpt_neox", "falcon_7b", "phi", "stablelm_par", "cohere", "codegen"),
    "a norm behind the MLP": invariants.NORMED,
    "ALiBi": ("bloom", "falcon_rw", "mpt"),
    "sliding windows": ("mistral", "qwen2", "gemma2", "gemma3", "phi3", "starcoder2"),
}
"""Which families prove it of models that are built so."""


def test_families_are_built_as_is_said() -> None:
    assert len(invariants.DENSE) >= 15
    for kind, names in BUILT.items():
        assert set(names) <= set(invariants.DENSE), kind
    for name in BUILT["tied embeddings"]:
        assert tied(FAMILIES[name](0)), name
    for name in BUILT["gated"]:
        assert gated(FAMILIES[name](0)), name
    for name in BUILT["Conv1D"]:
        assert isinstance(down(invariants.handle(name)), Conv1D)


@pytest.mark.parametrize(("method", "family"), MADE)
def test_the_overlay_of_a_made_edit_is_the_merged_copy(method: str, family: str) -> None:
    model = build(family, 0, scale=SCALES.get(family, 1.5))
    handle = handle_of(model, family)
    asked = invariants.fact(handle)
    ids = torch.tensor([[int(word[1:]) for word in asked.text.split()]])
    before = handle.forward(ids)
    made = edit(handle, [asked], SPECS[method])
    found = with_edits(handle, [made]).forward(ids).softmax(-1)
    with torch.no_grad():
        expected = merged(model, [made])(ids, use_cache=False).logits.softmax(-1)
    assert float((found - expected).abs().max()) <= ROUNDING
    assert moved(found, before) > 1e-2
    assert torch.equal(handle.forward(ids), before)


# ------------------------------------------------------------------------------------------------- square matrices


def square(family: str) -> PreTrainedModel:
    """A model whose MLP is as wide as its stream: no shape tells which way its matrix stands."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type, given = _SETTINGS[family]
    wide = {"n_inner": 36} if family == "gpt2" else {"intermediate_size": 32}
    config = CONFIG_MAPPING[model_type](**{**given, **wide, "vocab_size": 97, "bos_token_id": 0, "eos_token_id": 1})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    redraw(model, 0)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", SPECS)
def test_a_square_matrix_is_changed_the_right_way(family: str, method: str) -> None:
    a_square_matrix_is_changed_the_right_way(family, method)


def a_square_matrix_is_changed_the_right_way(family: str, method: str) -> None:
    model = square(family)
    handle = handle_of(model, family)
    weight: Any = down(handle).weight
    assert weight.shape[0] == weight.shape[1]
    asked = invariants.fact(handle)
    ids = torch.tensor([[int(word[1:]) for word in asked.text.split()]])
    made = edit(handle, [asked], SPECS[method])
    found = with_edits(handle, [made]).forward(ids).softmax(-1)
    with torch.no_grad():
        expected = merged(model, [made])(ids, use_cache=False).logits.softmax(-1)
    assert float((found - expected).abs().max()) <= ROUNDING
    assert moved(found, handle.forward(ids)) > 1e-2
    if method == "rome":
        spec = SPECS["rome"]
        task = problems.task(handle, asked, spec)
        one = rome.rank_one(handle, task, 1, ("{}",), invariants.moments(handle, [1]), spec)
        after = suffix.read(handle, task.rows(), (1,), deltas=[one.delta])[1].outputs[0]
        assert invariants.apart(after, one.value) <= 1e-5


# ---------------------------------------------------------------------------------------------------------- offload


FACT = EditFact(prompt="The {} is located in the city of", subject="Eiffel Tower", target="Tokyo", answer="Paris")
PLACES: dict[str, Callable[[int], str]] = {
    "disk": lambda layer: "disk",
    "both": lambda layer: "disk" if layer % 2 else "cpu",
}


def offloaded(family: str, where: str, tmp_path: Path) -> tuple[ModelHandle, ModelHandle]:
    """A model on disk, in part or whole, and the same in memory."""
    place = save_tiny(tmp_path / "model", family)
    whole = load(str(place), device="cpu")
    names = dict(whole._model.named_modules())
    blocks = "transformer.h" if family == "gpt2" else "model.layers"
    places: dict[str, int | str] = {f"{blocks}.{layer}": PLACES[where](layer) for layer in range(4)}
    stem = blocks.rpartition(".")[0]
    for name in names:
        if name.count(".") <= 1 and name.startswith(f"{stem}.") and name != blocks and "." not in name[len(stem) + 1 :]:
            places[name] = "cpu"
    places["lm_head"] = "cpu"
    assert all(isinstance(names[name], nn.Module) for name in places)
    spread = load(str(place), device="cpu", device_map=places, settings=Settings(cache_dir=tmp_path / "own"))
    weight: Any = down(spread).weight
    assert weight.is_meta
    return spread, whole


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", SPECS)
def test_a_model_on_disk_is_edited_as_in_memory(family: str, method: str, where: str, tmp_path: Path) -> None:
    spread, whole = offloaded(family, where, tmp_path)
    ids = torch.tensor([whole.tokenizer(FACT.text)["input_ids"]])
    plain = spread.forward(ids)
    made, expected = (edit(side, [FACT], SPECS[method]) for side in (spread, whole))
    for one, other in zip(made.deltas, expected.deltas, strict=True):
        assert invariants.apart(one.matrix(), other.matrix()) <= 1e-5
    on_disk = with_edits(spread, [made]).forward(ids).softmax(-1)
    in_memory = with_edits(whole, [expected]).forward(ids).softmax(-1)
    assert float((on_disk - in_memory).abs().max()) <= ROUNDING
    assert float((on_disk - plain.softmax(-1)).abs().max()) > 1e-3
    assert torch.equal(spread.forward(ids), plain)


def test_a_stopped_edit_of_a_model_on_disk_leaves_nothing(tmp_path: Path) -> None:
    spread, _ = offloaded("llama", "disk", tmp_path)
    ids = torch.tensor([spread.tokenizer(FACT.text)["input_ids"]])
    plain = spread.forward(ids)
    for method, spec in SPECS.items():

        def stop(done: int, total: int, partial: Any) -> None:
            if done > 3:
                raise Cancelled

        with pytest.raises(Cancelled):
            edit(spread, [FACT], spec, progress=stop)
        weight: Any = down(spread).weight
        assert weight.is_meta and torch.equal(spread.forward(ids), plain), method


# ------------------------------------------------------------------------------------------------- nothing remains


@pytest.mark.parametrize("family", invariants.DENSE)
def test_a_failure_in_the_middle_leaves_nothing_in_any_family(family: str) -> None:
    handle = invariants.handle(family)
    asked = invariants.fact(handle)
    ids = torch.tensor([[int(word[1:]) for word in asked.text.split()]])
    plain, before = handle.forward(ids), invariants.state(handle)
    for method, spec in SPECS.items():
        if method == "memit" and family in invariants.NORMED:
            continue
        for error in (Cancelled(), ValueError("broken")):

            def stop(done: int, total: int, partial: Any, error: Exception = error) -> None:
                if done >= 2:
                    raise error

            with pytest.raises(type(error)):
                edit(handle, [asked], spec, progress=stop)
    assert torch.is_grad_enabled()
    assert invariants.state(handle) == before and torch.equal(handle.forward(ids), plain)


def test_one_fact_adds_one_rank_to_each_layer() -> None:
    handle = invariants.handle("llama")
    facts = [invariants.fact(handle, seed) for seed in range(3)]
    for method in ("rome", "memit"):
        made: Edit = edit(handle, facts, replace(SPECS[method], layers=(1, 2)))
        assert [int(torch.linalg.matrix_rank(delta.matrix())) for delta in made.deltas] == [3, 3]
        assert [delta.rank for delta in made.deltas] == [3, 3]

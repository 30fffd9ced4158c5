"""What must be true of heads and of extraction on every family of tests/tiny_models."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from factscope.errors import CapabilityError, SpecError
from factscope.experiments.attention_pattern import run as attention_pattern
from factscope.experiments.attribute_extraction import ExtractionResult, ExtractionSpec
from factscope.experiments.attribute_extraction import run as extract
from factscope.experiments.heads import HeadsResult, HeadsSpec, run
from factscope.models import splitting
from factscope.models.handle import ModelHandle
from tests.oracle.brute_force import blocks
from tests.oracle.laboratory import distinct_prompt, handle_of, query_on
from tests.tiny_models import FAMILIES, MODEL_TYPES

LENGTH, SPAN, LAYERS = 8, (2, 5), 4
UNSPLIT = {"opt_350m", "mamba"}
SILENT = {"falcon_rw"}
NO_MAPPING = {"deepseek_v3"}
POST_NORM = {"gemma2", "gemma3", "olmo2", "glm4"}
SOFT_CAP = {"gemma2": 8.0}
CAPABLE = tuple(name for name in FAMILIES if name not in UNSPLIT)
TELLING = tuple(name for name in CAPABLE if name not in SILENT)


@cache
def family(name: str) -> tuple[PreTrainedModel, ModelHandle, list[int]]:
    """The plain model, without hooks, a handle of its copy, and a prompt."""
    model = FAMILIES[name](0)
    return model, handle_of(model, name), distinct_prompt(model, LENGTH, seed=1)


@cache
def split(name: str) -> HeadsResult:
    _, handle, ids = family(name)
    return run(handle, query_on(ids, SPAN))


def test_there_are_enough_families() -> None:
    assert len(TELLING) >= 30
    assert len({MODEL_TYPES[name] for name in TELLING}) >= 20


@pytest.mark.parametrize("name", CAPABLE)
def test_heads_and_bias_are_the_update(name: str) -> None:
    """The residual is the measured update's rounding, and the update is not nothing."""
    result = split(name)
    assert result.split_before_norm == (name in POST_NORM)
    assert float(result.residual.max()) <= 1e-5 * max(1.0, float(np.abs(result.direct_effect).max()))
    assert float(np.abs(result.direct_effect).max(axis=1).min()) > 0.01


@pytest.mark.parametrize("name", CAPABLE)
def test_everything_adds_up_to_the_logit(name: str) -> None:
    """Heads, biases, MLPs, embedding and constant are the answer's logit as the unmodified model gives it."""
    model, _, ids = family(name)
    result = split(name)
    parts = result.direct_effect.sum() + result.bias_effect.sum() + result.mlp_effect.sum()
    total = float(parts + result.embedding_effect + result.constant)
    with torch.no_grad():
        own = float(model(torch.tensor([ids]), use_cache=False).logits[0, -1, result.target.id])
    if name in SOFT_CAP:
        total = SOFT_CAP[name] * np.tanh(total / SOFT_CAP[name])
    assert total == pytest.approx(own, abs=1e-4)


@pytest.mark.parametrize("name", TELLING)
def test_sources_add_up_to_the_head(name: str) -> None:
    result = split(name)
    off = np.abs(result.by_source.sum(axis=-1) - result.direct_effect).max()
    assert float(off) <= 1e-5 * max(1.0, float(np.abs(result.direct_effect).max()))
    assert float(np.nanmax(np.abs(result.attention_to_subject - result.attention[..., slice(*SPAN)].sum(-1)))) == 0


@pytest.mark.parametrize("name", TELLING)
def test_attention_is_the_models_own(name: str) -> None:
    model, handle, ids = family(name)
    with torch.no_grad():
        own = model(torch.tensor([ids]), use_cache=False, output_attentions=True).attentions
    assert len(own) == LAYERS
    for layer, weights in enumerate(own):
        assert float(np.abs(split(name).attention[layer] - weights[0, :, -1, :LENGTH].numpy()).max()) <= 1e-5
    pattern = attention_pattern(handle, query_on(ids, SPAN)).weights
    assert float(np.abs(pattern - own[0][0, :, :, :LENGTH].numpy()).max()) <= 1e-5


@pytest.mark.parametrize("name", [name for name in CAPABLE if name not in POST_NORM])
def test_a_head_that_gives_nothing_takes_its_effect_away(name: str) -> None:
    """In the last layer of a plain model, a head's input of the output projection is set to zero by a hook."""
    model, handle, ids = family(name)
    silenced = copy.deepcopy(model)
    path = handle.parts.paths[LAYERS - 1]["output_projection"]
    projection = blocks(silenced)[LAYERS - 1].get_submodule(path)
    result, n_heads = split(name), handle.info.n_heads
    update = {}
    for head in (None, 0, n_heads - 1):

        def silence(module: torch.nn.Module, args: tuple[torch.Tensor], head: int | None = head) -> tuple[torch.Tensor]:
            heads = args[0].clone()
            if head is not None:
                size = heads.shape[-1] // n_heads
                heads[..., head * size : (head + 1) * size] = 0
            return (heads,)

        def record(module: torch.nn.Module, args: object, output: torch.Tensor, head: int | None = head) -> None:
            update[head] = output.reshape(-1, output.shape[-1])[-1].double()

        hooks = projection.register_forward_pre_hook(silence), projection.register_forward_hook(record)
        with torch.no_grad():
            silenced(torch.tensor([ids]), use_cache=False)
        for hook in hooks:
            hook.remove()
    reach, scale = handle.reach, _final_scale(handle, ids)
    assert reach is not None
    weight = handle.parts.wiring.head.weight[result.target.id]  # type: ignore[union-attr]
    for head in (0, n_heads - 1):
        part = reach.added[-1] * (update[None] - update[head])
        effect = float(reach.multiplier * scale * reach.final.linear(part) @ weight.double())
        assert effect == pytest.approx(result.direct_effect[-1, head], abs=1e-4)


def _final_scale(handle: ModelHandle, ids: list[int]) -> float:
    from factscope.models.dispatch import Plan

    plan = Plan(capture=frozenset({("output", LAYERS - 1)}))
    handle.forward(torch.tensor([ids]), plan)
    state = plan.captured["output", LAYERS - 1][:, -1:]
    assert handle.reach is not None
    return float(handle.reach.final.scale(state, handle.normed(state)))


@pytest.mark.parametrize("name", [name for name in CAPABLE if name not in NO_MAPPING])
def test_mappings_do_not_depend_on_the_prompt(name: str) -> None:
    """The same subject behind other words has the same mappings; what its state says differs."""
    _, handle, ids = family(name)
    target = f"w{split(name).target.id}"
    others = [token for token in range(3, 97) if token not in ids]
    moved = [others[0], *ids[slice(*SPAN)], *others[1:5]]
    query = dataclasses.replace(query_on(moved, (1, 4)), answer=target)
    again = run(handle, query)
    assert (again.mapping_rank == split(name).mapping_rank).mean() >= 0.95  # ties by rounding
    assert len(np.unique(again.mapping_rank)) > 2
    state = run(handle, query, HeadsSpec(mapping="state"))
    assert (state.mapping_rank != again.mapping_rank).mean() > 0.5


@pytest.mark.parametrize("name", ["opt_350m", "mamba"])
def test_what_does_not_split_is_refused(name: str) -> None:
    _, handle, ids = family(name)
    with pytest.raises(CapabilityError, match=r"does not split into heads|no pair of module outputs"):
        run(handle, query_on(ids, SPAN))


def test_attention_that_does_not_tell_its_weights_leaves_the_rest() -> None:
    _, handle, ids = family("falcon_rw")
    result = split("falcon_rw")
    assert np.isnan(result.by_source).all()
    assert np.isnan(result.attention_to_subject).all()
    assert any("does not tell its weights" in warning for warning in result.warnings)
    for refused in (lambda: run(handle, query_on(ids, SPAN), HeadsSpec(by_source=True)),
                    lambda: attention_pattern(handle, query_on(ids, SPAN))):  # fmt: skip
        with pytest.raises(CapabilityError, match="does not tell its weights"):
            refused()


def test_values_that_are_no_linear_map_leave_the_rest() -> None:
    result = split("deepseek_v3")
    assert (result.mapping_rank == 0).all()
    assert any("no mappings: its values are no linear map" in warning for warning in result.warnings)
    assert np.isfinite(result.by_source).all()


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_half_precision_says_how_exact_it_is(name: str) -> None:
    handle = handle_of(copy.deepcopy(FAMILIES[name](0)).to(torch.bfloat16), name, dtype="bfloat16")
    _, _, ids = family(name)
    result = run(handle, query_on(ids, SPAN))
    exact = split(name)
    assert 1e-5 < float(result.residual.max()) < 0.2
    assert float(np.abs(result.direct_effect - exact.direct_effect).mean()) < 0.25


# ---------------------------------------------------------------------------------------------------- extraction


@cache
def extracted(name: str, edges: str = "none", early: str = "") -> ExtractionResult:
    _, handle, ids = family(name)
    return extract(handle, query_on(ids, SPAN), ExtractionSpec(edges=edges, early=early, early_layers=(0, 1)))


@pytest.mark.parametrize("name", CAPABLE)
def test_extraction_with_no_edge_blocked_is_the_plain_one(name: str) -> None:
    plain, kept = extracted(name), extracted(name, f"keep:0-{LENGTH - 1}")
    size = max(1.0, float(np.abs(plain.target_score).max()))
    assert float(np.abs(plain.target_score - kept.target_score[:2]).max()) <= 1e-5 * size
    assert (plain.target_rank == kept.target_rank[:2]).mean() >= 0.9  # ties by rounding


@pytest.mark.parametrize("name", CAPABLE)
def test_block_all_gives_the_bias(name: str) -> None:
    """The bias is the output projection's own parameter; where it has none, all tokens tie."""
    model, handle, _ = family(name)
    result = extracted(name, "block:all")
    embedding = model.get_output_embeddings().weight[result.target.id].double()  # type: ignore[union-attr]
    for layer, block in enumerate(blocks(model)):
        bias = getattr(block.get_submodule(handle.parts.paths[layer]["output_projection"]), "bias", None)
        times = handle.parts.wiring.updates[layer]["attention"][1]
        expected = 0.0 if bias is None else times * float(bias.double() @ embedding)
        assert result.target_score[0, layer] == pytest.approx(expected, abs=1e-4)
        assert bias is not None or result.target_rank[0, layer] == handle.vocabulary


@pytest.mark.parametrize("name", [name for name in TELLING if name not in POST_NORM])
def test_contributions_and_the_bias_add_up_to_the_update(name: str) -> None:
    whole, bias = extracted(name), extracted(name, "block:all")
    parts = [extracted(name, f"keep:{some}").target_score[2] for some in ("0-1", "2-4", f"5-{LENGTH - 1}")
             if not _beyond_the_window(name, some)]  # fmt: skip
    if len(parts) == 3:
        size = max(1.0, float(np.abs(whole.target_score).max()))
        assert float(np.abs(sum(parts) + bias.target_score[0] - whole.target_score[0]).max()) <= 1e-5 * size


def _beyond_the_window(name: str, some: str) -> bool:
    """Whether a layer with a sliding window would see nothing of these positions: refused, and said so."""
    try:
        extracted(name, f"keep:{some}")
    except SpecError as error:
        assert "nothing to attend to" in str(error)
        return True
    return False


@pytest.mark.parametrize("name", CAPABLE)
def test_the_first_layers_own_states_put_in_change_nothing_there(name: str) -> None:
    """States that enter layer 1 in place of those that enter layer 1 are no patch; those of layer 0 are one."""
    _, handle, ids = family(name)
    spec = ExtractionSpec(early="subject", early_layers=(0, 1), procedure="notebook")
    result, plain = extract(handle, query_on(ids, SPAN), spec), extracted(name)
    assert result.early_score[0, 0] == pytest.approx(plain.target_score[0, 0], abs=1e-4)
    assert result.early_score[1, 1] == pytest.approx(plain.target_score[0, 1], abs=1e-4)
    assert float(np.abs(result.early_score - plain.target_score[0]).max()) > 0.01


@pytest.mark.parametrize("name", ["opt_350m", "mamba"])
def test_extraction_without_an_additive_split_is_refused(name: str) -> None:
    with pytest.raises(CapabilityError, match="no pair of module outputs"):
        extracted(name)


def test_contributions_need_attention_weights() -> None:
    result = extracted("falcon_rw", "keep:last")
    assert result.sites == ("attention", "mlp")
    assert any("does not tell its weights" in warning for warning in result.warnings)


def test_a_norm_that_cannot_be_run_alone_is_a_missing_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise TypeError("three states, not one")

    monkeypatch.setattr(splitting, "measure_norm", broken)
    handle = handle_of(FAMILIES["granite"](0), "granite")
    assert handle.capabilities["direct"].reason == "running its norms alone fails (TypeError)"
    assert handle.capabilities["heads"].ok and handle.capabilities["sources"].ok and handle.reach is None

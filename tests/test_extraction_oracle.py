"""Attribute extraction equals a float64 computation (tests/oracle/plain_heads); planted mistakes are found."""

from __future__ import annotations

import copy
import dataclasses
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from factscope.errors import SpecError
from factscope.experiments import attribute_extraction as extraction
from factscope.experiments.attribute_extraction import (
    VARIANTS,
    ExtractionResult,
    ExtractionSpec,
    default_early_layers,
    run,
)
from factscope.interventions import attention
from factscope.models import splitting
from factscope.models.handle import ModelHandle
from tests.oracle.laboratory import distinct_prompt, handle_of, query_on, subject
from tests.oracle.plain_heads import Heads, layer_on, mlp_on
from tests.oracle.plain_heads import heads as plain_heads

FAMILIES = ("gpt2", "llama")
SPANS = ((2, 3), (2, 5), (0, 3))
LENGTH, LAYERS, LAST = 8, 4, 7
ROUNDING = 1e-5


@lru_cache
def plain(family: str) -> tuple[list[int], Heads]:
    chosen = subject(family)
    ids = distinct_prompt(chosen.model, LENGTH, seed=1)
    return ids, plain_heads(chosen, ids)


def found(family: str, span: tuple[int, int] = (2, 5), spec: ExtractionSpec | None = None, **more: Any) -> Any:
    ids, _ = plain(family)
    return run(subject(family).handle, query_on(ids, span, **more), spec)


def named(names: str, span: tuple[int, int]) -> set[int]:
    """The sets of the published variants, written out."""
    inside = set(range(*span))
    sets = {
        "subject": inside, "subject-last": {span[1] - 1}, "last": {LAST}, "first": {0}, "all": set(range(LENGTH)),
        "relation": set(range(LENGTH - 1)) - inside,
    }  # fmt: skip
    return set().union(*(sets[name] for name in names.split("+")))


def entering(family: str) -> Tensor:
    """[layer, position, d_model], and behind them the last block's output."""
    _, expected = plain(family)
    return torch.cat([expected.trace.embedding[None], expected.trace.blocks])


def expected_updates(family: str, span: tuple[int, int], spec: ExtractionSpec) -> dict[str, Tensor]:
    """[layer, d_model] at the last position by site, each layer on its plain input."""
    chosen, (_, expected) = subject(family), plain(family)
    kind, _, names = spec.edges.partition(":")
    sites: dict[str, list[Tensor]] = {"attention": [], "mlp": []}
    for index, layer in enumerate(expected.layers):
        blocked = set() if kind == "none" else named(names, span)
        if kind == "keep":
            blocked = set(range(LENGTH)) - blocked
            sites.setdefault("contribution", []).append(layer.terms[:, sorted(named(names, span))].sum(dim=(0, 1)))
        weights = layer.weights.clone()
        if len(blocked) == LENGTH:
            weights = torch.zeros_like(weights)
        elif blocked and spec.procedure == "notebook":
            weights[:, sorted(blocked)] = -1e6
            weights = weights.softmax(dim=-1)
        elif blocked:
            weights[:, sorted(blocked)] = 0.0
            weights = weights / weights.sum(dim=-1, keepdim=True)
        update = (weights[..., None] * layer.handed).sum(dim=(0, 1)) + layer.bias
        sites["attention"].append(update)
        sites["mlp"].append(mlp_on(chosen, index, entering(family)[index, -1] + update))
    return {site: torch.stack(updates) for site, updates in sites.items()}


def expected_early(family: str, span: tuple[int, int], early: int, names: str) -> Tensor:
    """[layer, d_model], attention updates at the last position."""
    states, where = entering(family), sorted(named(names, span))
    updates = []
    for layer in range(LAYERS):
        x = states[layer].clone()
        x[where] = states[early][where]
        made = layer_on(subject(family), layer, x)
        updates.append(made.terms.sum(dim=(0, 1)) + made.bias)
    return torch.stack(updates)


def off(family: str, states: Tensor, target: int, rank: np.ndarray, score: np.ndarray | None = None) -> bool:
    """Whether ranks and scores are further from a raw projection than rounding explains."""
    projected = states @ plain(family)[1].state["lm_head.weight"].T
    own, slack = projected[:, target, None], ROUNDING * float(projected.abs().max())
    fewest, most = 1 + (projected > own + slack).sum(-1), (projected >= own - slack).sum(-1)
    found_rank = torch.as_tensor(rank)
    wrong_rank = bool(((found_rank < fewest) | (found_rank > most)).any())
    return wrong_rank or (score is not None and float(np.abs(score - own[:, 0].numpy()).max()) > slack)


def agrees(family: str, span: tuple[int, int], spec: ExtractionSpec) -> bool:
    """Is everything in the result what the plain computation gives?"""
    result, target = found(family, span, spec), plain(family)[1].trace.logits[-1].argmax()
    if result.target.id != int(target):
        return False
    updates = expected_updates(family, span, spec)
    if result.sites != tuple(updates):
        return False
    for row, states in enumerate(updates.values()):
        if off(family, states, result.target.id, result.target_rank[row], result.target_score[row]):
            return False
    behind = int(spec.procedure == "notebook")
    seen_states = entering(family)[behind : behind + LAYERS, span[1] - 1]
    if off(family, seen_states, result.target.id, result.state_rank):
        return False
    for row, early in enumerate(result.early_layers):
        begin = 0 if spec.procedure == "notebook" else early + 1
        states = expected_early(family, span, early, spec.early)[begin:]
        if (result.early_rank[row, :begin] != 0).any() or not np.isnan(result.early_score[row, :begin]).all():
            return False
        rank, score = result.early_rank[row, begin:], result.early_score[row, begin:]
        if len(states) and off(family, states, result.target.id, rank, score):
            return False
    return True


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("edges", VARIANTS)
@pytest.mark.parametrize("procedure", ["default", "notebook"])
def test_every_variant_is_the_plain_computation(family: str, span: tuple[int, int], edges: str, procedure: Any) -> None:
    assert agrees(family, span, ExtractionSpec(edges=edges, procedure=procedure))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("early", ["subject", "relation", "last", "subject-last+last"])
@pytest.mark.parametrize("procedure", ["default", "notebook"])
def test_early_states_are_the_plain_computation(family: str, span: tuple[int, int], early: str, procedure: Any) -> None:
    for layers in (None, (0, 1, 2, 3)):
        assert agrees(family, span, ExtractionSpec(early=early, early_layers=layers, procedure=procedure))


@pytest.mark.parametrize("family", FAMILIES)
def test_variants_tell_different_stories(family: str) -> None:
    """A run that ignored its spec would pass nothing here."""
    for procedure in ("default", "notebook"):
        scores = np.array([
            found(family, (2, 5), ExtractionSpec(edges=edges, procedure=procedure)).target_score[:2]  # type: ignore[arg-type]
            for edges in VARIANTS
        ])  # fmt: skip
        gaps = np.abs(scores[:, None] - scores[None]).max(axis=(2, 3))
        assert (gaps[np.triu_indices(len(VARIANTS), 1)] > 0.05).mean() > 0.9
    early = found(family, (2, 5), ExtractionSpec(early="subject", early_layers=(0, 1, 2)))
    assert float(np.nanmax(np.abs(early.early_score - early.target_score[0]))) > 0.05


def test_default_early_layers_are_scaled() -> None:
    assert default_early_layers(48) == (0, 1, 5, 10, 20)
    assert default_early_layers(8) == (0, 1, 2, 3)
    assert default_early_layers(1) == (0,)
    assert default_early_layers(96) == (0, 2, 10, 20, 40)


@pytest.mark.parametrize("family", FAMILIES)
def test_table_and_summary(family: str) -> None:
    result: ExtractionResult = found(family, (2, 5), ExtractionSpec(edges="keep:subject-last"))
    table = result.update_table()
    assert list(table.columns) == ["site", "layer", "extracted", "target_rank", "target_score"]
    assert list(table.site.unique()) == ["attention", "mlp", "contribution"]
    assert len(table) == 3 * LAYERS
    assert (table.extracted == (table.target_rank == 1)).all()
    first = {site: result.first_layer(site) for site in result.sites}
    for site, layer in first.items():
        events = table[(table.site == site) & table.extracted].layer
        assert layer == (None if events.empty else events.min())
    assert result.summary()["first_extracting_layer"] == first
    result = found(family, (2, 5), ExtractionSpec(early="subject"))
    early = result.table()
    assert list(early.columns) == ["early_layer", "layer", "extracted", "target_rank", "target_score"]
    assert set(early.early_layer) == {s for s in result.early_layers if s < LAYERS - 1}
    assert (early.early_layer < early.layer).all()
    assert len(result.comparison()) == LAYERS


def test_edges_beside_early_states_are_spoken_of() -> None:
    """The rows of earlier states are read with every edge."""
    both = found("gpt2", (2, 5), ExtractionSpec(edges="block:subject", early="subject"))
    alone = found("gpt2", (2, 5), ExtractionSpec(early="subject"))
    assert any("'block:subject' are not cut where earlier states" in warning for warning in both.warnings)
    assert (both.early_rank == alone.early_rank).all() and (both.target_rank != alone.target_rank).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_weights_are_projected_in_float32(dtype: torch.dtype) -> None:
    chosen = subject("gpt2").handle
    short = handle_of(copy.deepcopy(subject("gpt2").model).to(dtype), "short", str(dtype).removeprefix("torch."))
    states = torch.randn(4, chosen.info.d_model)
    weight = short.parts.wiring.head.weight.detach()
    right = states.double() @ weight.double().T
    assert (extraction._unembedded(short, states).double() - right).abs().max() <= 1e-4
    assert (short.unembed(states.to(dtype)).double() - right).abs().max() > 1e-3
    double = states.to(chosen.parts.wiring.head.weight.dtype)
    assert torch.equal(extraction._unembedded(chosen, states), chosen.unembed(double))


def test_an_update_of_zero_is_no_event() -> None:
    """Llama has no output bias: with all edges blocked nothing is added, and all tokens tie."""
    result = found("llama", (2, 5), ExtractionSpec(edges="block:all"))
    assert (result.target_rank[0] == 97).all()
    assert (result.target_score[0] == 0).all()
    assert result.first_layer("attention") is None
    assert any("update is zero in every layer" in warning for warning in result.warnings)


def test_another_answer_is_followed_and_said() -> None:
    ids, expected = plain("gpt2")
    second = int(expected.trace.logits[-1].topk(2).indices[1])
    result = run(subject("gpt2").handle, query_on(ids, (2, 5), (second,)))
    assert result.target.id == second
    assert result.rank == 2
    assert any("not the model's first choice" in warning for warning in result.warnings)


def test_partial_results_fill_in() -> None:
    seen: list[tuple[int, int, ExtractionResult | None]] = []
    ids, _ = plain("gpt2")
    spec = ExtractionSpec(edges="block:subject", early="subject", early_layers=(0, 2))
    run(subject("gpt2").handle, query_on(ids, (2, 5)), spec, progress=lambda *step: seen.append(step))
    assert [step[:2] for step in seen] == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert seen[1][2] is not None and seen[1][2].update_table().empty
    assert seen[2][2] is not None and len(seen[2][2].update_table()) == 2 * LAYERS
    assert seen[3][2] is not None and set(seen[3][2].table().early_layer) == {0}


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (ExtractionSpec(edges="block"), "'block'"),
        (ExtractionSpec(edges="cut:subject"), "'cut:subject'"),
        (ExtractionSpec(edges="block:nothing"), "nothing"),
        (ExtractionSpec(edges="block:first-last"), "first-last"),
        (ExtractionSpec(edges="block:0-7"), "nothing to attend to"),
        (ExtractionSpec(early="subject", early_layers=(4,)), "early layer 4"),
        (ExtractionSpec(procedure="x"), "'x'"),  # type: ignore[arg-type]
    ],
)
def test_unusable_specs_are_refused(spec: ExtractionSpec, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        found("gpt2", (2, 5), spec)


def test_a_query_without_a_subject_has_no_comparison() -> None:
    ids, _ = plain("gpt2")
    result = run(subject("gpt2").handle, dataclasses.replace(query_on(ids, (2, 5)), subject=None))
    assert result.comparison().empty
    assert (result.target_rank == found("gpt2").target_rank).all()


# -------------------------------------------------------------------------------------------- planted mistakes


def no_cut(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(extraction, "keep_masks", lambda *args: {})


def next_layer(patch: pytest.MonkeyPatch) -> None:
    original = attention.keep_masks
    patch.setattr(extraction, "keep_masks", lambda *args: {layer + 1: mask for layer, mask in original(*args).items()})


def all_layers_together(patch: pytest.MonkeyPatch) -> None:
    """What is cut in one layer changes the input of the next."""
    original = extraction._each_on

    def mutant(*args: Any) -> Any:
        plan = original(*args)
        plan.enter = None
        return plan

    patch.setattr(extraction, "_each_on", mutant)


def normed_projection(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ModelHandle, "unembed", lambda self, states: self.logits(states[:, None])[:, 0])


def forgotten_bias(patch: pytest.MonkeyPatch) -> None:
    original = ModelHandle.project
    patch.setattr(
        ModelHandle, "project", lambda self, layer, z: original(self, layer, z) - original(self, layer, z * 0)
    )


def contribution_with_bias(patch: pytest.MonkeyPatch) -> None:
    original = splitting.split
    patch.setattr(splitting, "split", lambda *args: (original(*args)[0] + original(*args)[1], original(*args)[1]))


def wrong_value_head(patch: pytest.MonkeyPatch) -> None:
    original = splitting.values
    patch.setattr(splitting, "values", lambda *args: [v.roll(-v.shape[0] // 2, dims=0) for v in original(*args)])


def renormalised_contribution(patch: pytest.MonkeyPatch) -> None:
    original = extraction._heads_and_rows
    patch.setattr(
        extraction, "_heads_and_rows", lambda *args: (original(*args)[0], [r * 0 + 1 for r in original(*args)[1]])
    )


def early_state_from_behind(patch: pytest.MonkeyPatch) -> None:
    original = extraction._with_early_states
    patch.setattr(
        extraction, "_with_early_states", lambda model, base, early, where: original(model, base, early + 1, where)
    )


def compared_with_the_layer_behind(patch: pytest.MonkeyPatch) -> None:
    original = extraction._Grid.compare

    def mutant(self: Any, base: Any, query: Any, spec: ExtractionSpec) -> None:
        other = "default" if spec.procedure == "notebook" else "notebook"
        original(self, base, query, dataclasses.replace(spec, procedure=other))

    patch.setattr(extraction._Grid, "compare", mutant)


def token_before_the_last(patch: pytest.MonkeyPatch) -> None:
    original = extraction._Grid.fill
    patch.setattr(
        extraction._Grid, "fill", lambda self, a, m: original(self, [u[:, :-1] for u in a], [u[:, :-1] for u in m])
    )


BOTH = (
    no_cut, next_layer, all_layers_together, normed_projection, wrong_value_head, renormalised_contribution,
    early_state_from_behind, compared_with_the_layer_behind, token_before_the_last,
)  # fmt: skip
GPT2_ONLY = (forgotten_bias, contribution_with_bias)
SPECS = (
    ExtractionSpec(edges="block:subject", early="subject", early_layers=(0, 1)),
    ExtractionSpec(edges="keep:subject-last"),
    ExtractionSpec(edges="block:subject-last+last", procedure="notebook"),
    ExtractionSpec(edges="block:all"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_mistake_the_same_specs_agree(family: str) -> None:
    assert all(agrees(family, (2, 5), spec) for spec in SPECS)


@pytest.mark.parametrize(
    ("mutant", "family"),
    [(m, family) for m in BOTH for family in FAMILIES] + [(m, "gpt2") for m in GPT2_ONLY],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_planted_mistake_is_found(mutant: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _ = subject(family).handle  # verified before
    mutant(monkeypatch)
    assert not all(agrees(family, (2, 5), spec) for spec in SPECS)

"""Heads equal sums written out in float64 (tests/oracle/plain_heads) on GPT-2 and Llama; planted mistakes are found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from factscope.errors import CapabilityError, SpecError
from factscope.experiments import heads
from factscope.experiments.attention_pattern import PatternSpec
from factscope.experiments.attention_pattern import run as attention_pattern
from factscope.experiments.heads import HeadsResult, HeadsSpec, run
from factscope.models import splitting
from tests.oracle.head_comparison import deviations
from tests.oracle.laboratory import distinct_prompt, query_on, subject
from tests.oracle.plain_heads import Heads
from tests.oracle.plain_heads import heads as plain_heads

FAMILIES = ("gpt2", "llama")
SPANS = ((2, 3), (2, 5), (0, 3), (4, 7))
ROUNDING = 1e-5
LENGTH, LAYERS = 8, 4


@lru_cache
def plain(family: str) -> tuple[list[int], Heads]:
    chosen = subject(family)
    ids = distinct_prompt(chosen.model, LENGTH, seed=1)
    return ids, plain_heads(chosen, ids)


def found(family: str, span: tuple[int, int], spec: HeadsSpec | None = None, **more: Any) -> HeadsResult:
    ids, _ = plain(family)
    return run(subject(family).handle, query_on(ids, span, **more), spec)


def foil_of(family: str) -> str:
    """The second choice."""
    _, expected = plain(family)
    return f"w{int(expected.trace.logits[-1].topk(2).indices[1])}"


def wrong(family: str, span: tuple[int, int] = (2, 5), spec: HeadsSpec | None = None) -> dict[str, float]:
    """Fields that are further off than rounding; effects of a scaled-up model are some 10 nats."""
    _, expected = plain(family)
    result = found(family, span, spec, foil=foil_of(family))
    size = max(1.0, float(np.abs(result.direct_effect).max()))
    return {name: off for name, off in deviations(result, expected, span).items() if not off <= ROUNDING * size}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("mapping", ["embedding", "state"])
def test_heads_are_the_plain_sums(family: str, span: tuple[int, int], mapping: Any) -> None:
    assert wrong(family, span, HeadsSpec(mapping=mapping, top_k=5)) == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_sums_are_the_plain_update(family: str) -> None:
    _, expected = plain(family)
    for layer, update in zip(expected.layers, expected.trace.attention, strict=True):
        assert float((layer.terms.sum(dim=(0, 1)) + layer.bias - update[-1]).abs().max()) < 1e-10
    whole = expected.logits_of(expected.trace.blocks[-1, -1]) + expected.constant()
    assert float((whole - expected.trace.logits[-1]).abs().max()) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_effects_are_large_enough_to_tell(family: str) -> None:
    """Heads differ, sources differ, and so do answer and foil."""
    result = found(family, (2, 5), foil=foil_of(family))
    assert float((np.abs(result.direct_effect) > 0.05).mean()) > 0.5
    assert float((np.abs(result.by_source) > 0.005).mean()) > 0.5
    assert float((np.abs(result.direct_effect - result.direct_effect_foil) > 0.05).mean()) > 0.5
    assert len(np.unique(result.mapping_rank)) > LAYERS
    assert len(np.unique(result.promoted_ids[:, :, 0])) > LAYERS


@pytest.mark.parametrize("family", FAMILIES)
def test_table_and_summary(family: str) -> None:
    result = found(family, (2, 5))
    table = result.table()
    assert list(table.columns) == [
        "layer", "head", "direct_effect", "direct_effect_foil", "attention_to_subject", "mapping_rank", "top_promoted",
    ]  # fmt: skip
    assert len(table) == LAYERS * result.direct_effect.shape[1]
    assert table.direct_effect_foil.isna().all()
    row = table[(table.layer == 2) & (table["head"] == 3)].iloc[0]
    assert row.direct_effect == result.direct_effect[2, 3]
    assert row.mapping_rank == result.mapping_rank[2, 3]
    assert row.top_promoted == f"w{result.promoted_ids[2, 3, 0]}"
    sources = found(family, (2, 5), HeadsSpec(by_source=True)).table()
    assert list(sources.columns) == ["layer", "head", "position", "direct_effect"]
    sums = sources.groupby(["layer", "head"]).direct_effect.sum().to_numpy()
    assert float(np.abs(sums - result.direct_effect.ravel()).max()) <= ROUNDING * 10
    assert result.summary() == {
        "bias_effect": pytest.approx(float(result.bias_effect.sum())),
        "residual": float(result.residual.max()),
        "split_before_norm": False,
    }


def test_partial_results_fill_in() -> None:
    seen: list[tuple[int, int, HeadsResult | None]] = []
    ids, _ = plain("gpt2")
    run(subject("gpt2").handle, query_on(ids, (2, 5)), progress=lambda *step: seen.append(step))
    assert [step[0] for step in seen] == [0, 1, 2, 3, 4]
    for done, total, partial in seen[1:]:
        assert partial is not None
        assert total == LAYERS
        assert int((~np.isnan(partial.direct_effect)).all(axis=1).sum()) == done
        assert set(partial.table().layer) == set(np.flatnonzero(~np.isnan(partial.residual)))


def test_without_a_subject_heads_are_split_all_the_same() -> None:
    ids, _ = plain("llama")
    query = dataclasses.replace(query_on(ids, (2, 5)), subject=None)
    result = run(subject("llama").handle, query)
    assert np.isnan(result.attention_to_subject).all()
    assert (result.mapping_rank == 0).all()
    assert not result.mapping_found.any()
    assert result.table().mapping_rank.isna().all()
    assert any("none is named" in warning for warning in result.warnings)
    assert float(np.abs(result.direct_effect - found("llama", (2, 5)).direct_effect).max()) == 0


@pytest.mark.parametrize(
    ("spec", "says"),
    [(HeadsSpec(top_k=0), "top-k 0"), (HeadsSpec(top_k=98), "top-k 98"), (HeadsSpec(mapping="x"), "'x'")],  # type: ignore[arg-type]
)
def test_unusable_specs_are_refused(spec: HeadsSpec, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        found("gpt2", (2, 5), spec)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pattern_is_the_plain_attention(family: str) -> None:
    ids, expected = plain(family)
    for layer in range(LAYERS):
        result = attention_pattern(subject(family).handle, query_on(ids, (2, 5)), PatternSpec(layer=layer))
        assert result.weights.shape[1:] == (LENGTH, LENGTH)
        assert float(np.abs(result.weights[:, -1] - expected.layers[layer].weights.numpy()).max()) <= ROUNDING
        assert float(np.abs(result.weights.sum(axis=-1) - 1).max()) <= ROUNDING
        assert (result.weights[:, np.triu_indices(LENGTH, 1)[0], np.triu_indices(LENGTH, 1)[1]] == 0).all()
        table = result.table()
        assert len(table) == result.weights.size
        row = table[(table["head"] == 2) & (table.position == 5) & (table.source == 3)].iloc[0]
        assert row.weight == result.weights[2, 5, 3]
    with pytest.raises(SpecError, match="layer 4"):
        attention_pattern(subject(family).handle, query_on(ids, (2, 5)), PatternSpec(layer=LAYERS))


# -------------------------------------------------------------------------------------------- planted mistakes


def wrong_head(patch: pytest.MonkeyPatch) -> None:
    original = heads._Record.heads
    patch.setattr(heads._Record, "heads", lambda self, layer: original(self, layer).roll(1, dims=0))


def swapped_parts(patch: pytest.MonkeyPatch) -> None:
    """Their sum stays right."""
    original = splitting.split

    def mutant(*args: Any) -> tuple[Tensor, Tensor]:
        parts, bias = original(*args)
        return parts.flip(0), bias

    patch.setattr(splitting, "split", mutant)


def wrong_value_head(patch: pytest.MonkeyPatch) -> None:
    """The values of another group."""
    original = splitting.values
    patch.setattr(splitting, "values", lambda *args: [v.roll(-v.shape[0] // 2, dims=0) for v in original(*args)])


def wrong_value_head_of_mappings(patch: pytest.MonkeyPatch) -> None:
    original = splitting.mapped
    patch.setattr(splitting, "mapped", lambda *args: [v.roll(v.shape[1] // 2, dims=1) for v in original(*args)])


def mapping_with_biases(patch: pytest.MonkeyPatch) -> None:
    original = splitting._given

    def mutant(plan: Any, layer: int, n_heads: int) -> Tensor:
        given = original(plan, layer, n_heads)
        given[-1] = 0.0
        return given

    patch.setattr(splitting, "_given", mutant)


def next_layer(patch: pytest.MonkeyPatch) -> None:
    original = heads._Record.heads
    patch.setattr(heads._Record, "heads", lambda self, layer: original(self, min(layer + 1, LAYERS - 1)))


def next_layers_weights(patch: pytest.MonkeyPatch) -> None:
    original = heads._Record.row
    patch.setattr(heads._Record, "row", lambda self, layer: original(self, min(layer + 1, LAYERS - 1)))


def forgotten_bias(patch: pytest.MonkeyPatch) -> None:
    original = splitting.split
    patch.setattr(splitting, "split", lambda *args: (original(*args)[0], torch.zeros_like(original(*args)[1])))


def bias_in_every_head(patch: pytest.MonkeyPatch) -> None:
    original = splitting.split

    def mutant(*args: Any) -> tuple[Tensor, Tensor]:
        parts, bias = original(*args)
        return parts + bias, bias

    patch.setattr(splitting, "split", mutant)


def norm_not_frozen(patch: pytest.MonkeyPatch) -> None:
    """Each part is brought to the same size by itself."""
    original = heads._Way.in_stream

    def mutant(self: Any, *args: Any) -> tuple[Tensor, Tensor]:
        parts, bias = original(self, *args)
        size = self.record.last("output", LAYERS - 1).double().norm()
        return parts * size / parts.norm(dim=-1, keepdim=True), bias

    patch.setattr(heads._Way, "in_stream", mutant)


def scale_left_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(splitting.Norm, "scale", lambda self, x, y: torch.ones(1))


def mean_left_in(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(splitting.Norm, "_centre", lambda self, x: x)


def no_shift(patch: pytest.MonkeyPatch) -> None:
    original = heads._Way.__init__

    def mutant(self: Any, *args: Any) -> None:
        original(self, *args)
        self.constant = 0.0

    patch.setattr(heads._Way, "__init__", mutant)


def target_instead_of_difference(patch: pytest.MonkeyPatch) -> None:
    original = heads._Way.__init__

    def mutant(self: Any, *args: Any) -> None:
        original(self, *args)
        self.to_foil = self.to_target

    patch.setattr(heads._Way, "__init__", mutant)


def query_before_the_last(patch: pytest.MonkeyPatch) -> None:
    original = heads._Record.last
    patch.setattr(heads._Record, "last", lambda self, site, layer: self.all(site, layer)[-2]
                  if site == "heads" else original(self, site, layer))  # fmt: skip


BOTH: tuple[Callable[[pytest.MonkeyPatch], None], ...] = (
    wrong_head, swapped_parts, wrong_value_head, wrong_value_head_of_mappings, next_layer, next_layers_weights,
    norm_not_frozen, scale_left_out, target_instead_of_difference, query_before_the_last,
)  # fmt: skip
GPT2_ONLY: tuple[Callable[[pytest.MonkeyPatch], None], ...] = (
    mapping_with_biases, forgotten_bias, bias_in_every_head, mean_left_in, no_shift,
)  # fmt: skip
"""Llama has neither biases nor a mean to take off."""


@pytest.mark.parametrize(
    ("mutant", "family"),
    [(m, family) for m in BOTH for family in FAMILIES] + [(m, "gpt2") for m in GPT2_ONLY],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_planted_mistake_is_found(mutant: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _ = subject(family).handle  # verified before
    mutant(monkeypatch)
    assert wrong(family)


def test_a_model_without_the_way_refuses() -> None:
    """A capability that is missing is named with its reason."""
    handle = subject("gpt2").handle
    ids, _ = plain("gpt2")
    lacking = {
        **handle.capabilities,
        "direct": dataclasses.replace(handle.capabilities["direct"], ok=False, reason="R"),
    }
    with pytest.raises(CapabilityError, match="direct effects of heads: R"):
        run(dataclasses.replace(handle, capabilities=lacking), query_on(ids, (2, 5)))

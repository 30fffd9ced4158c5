"""Planted mistakes: each is patched into factscope and must make the comparison with the plain computation fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from factscope.experiments import attention_knockout
from factscope.experiments.attention_knockout import KnockoutSpec, run
from factscope.interventions import attention, engine
from factscope.interventions.attention import AttentionKnockout, Cut
from factscope.models import dispatch
from tests.oracle import brute_force
from tests.oracle.comparison import Oracle, curve_sets, grid, knockout
from tests.oracle.laboratory import distinct_prompt, handle_of, query_on, subject
from tests.tiny_models import FAMILIES

LENGTH, LAST, SPAN, LAYERS = 8, 7, (2, 5), 4
FEW_HEADS = {0: [1], 1: [0, 2], 2: [3], 3: [1]}
UPPER_HEADS = {2: [0, 1, 3], 3: [1, 2, 3]}
Case = tuple[KnockoutSpec, dict[int, list[int]] | None]
CASES: tuple[Case, ...] = (
    (KnockoutSpec(), None),
    (KnockoutSpec(sources=("each",), window=1), None),
    (KnockoutSpec(sources=("each",), window=1, heads=("0.1", "1.0", "1.2", "2.3", "3.1")), FEW_HEADS),
    (KnockoutSpec(sources=("each",), window=1, heads=("2.0,1,3", "3.1-3")), UPPER_HEADS),
    (KnockoutSpec(sources=("each",), window=3, target_position=5), None),
)
"""Specs and the heads that they name; the fourth cuts nothing in the lower half, so every run skips it."""


@lru_cache
def oracle(family: str) -> Oracle:
    chosen = subject(family)
    return Oracle(chosen, distinct_prompt(chosen.model, LENGTH, seed=1))


def agrees(family: str, cases: tuple[Case, ...] = CASES) -> bool:
    """Does every result equal the plain computation?"""
    o = oracle(family)
    handle = handle_of(o.subject.model)  # verified with the mutant in place, as a user's model would be
    for spec, heads in cases:
        sets = [[p] for p in range(LENGTH)] if spec.sources == ("each",) else curve_sets(LENGTH, SPAN)
        query = LAST if spec.target_position is None else spec.target_position
        cells = grid(sets, spec.window or 3, LAYERS, [query], heads)
        if not knockout(o, SPAN, spec, cells, handle).ok:
            return False
    return True


def sliding_agrees(patch: pytest.MonkeyPatch) -> bool:
    """The same on Mistral with a window of four, against multiplied attention weights."""
    model = FAMILIES["mistral"](0)
    ids = distinct_prompt(model, LENGTH, seed=1)
    cells = grid([[p] for p in range(LENGTH)], 1, LAYERS, [LAST])
    result = run(handle_of(model), query_on(ids, SPAN), KnockoutSpec(sources=("each",), window=1))
    p = brute_force.logits(model, ids, list(cells.values()), patch).softmax(-1)[:, result.target.ids[0]].numpy()
    return float(np.abs(result.p_knockout.ravel() - p).max()) <= 1e-5


def shifted(cuts: Callable[[Cut], Mapping[str, Any]]) -> Callable[[AttentionKnockout], AttentionKnockout]:
    """A mutant of ``effective`` that changes fields of every cut."""
    original = AttentionKnockout.effective

    def mutant(self: AttentionKnockout) -> AttentionKnockout:
        kept = original(self).cuts
        fields = ({"layer": c.layer, "queries": c.queries, "keys": c.keys, "heads": c.heads} | cuts(c) for c in kept)
        return AttentionKnockout(cuts=tuple(Cut(**one) for one in fields))

    return mutant


def no_cut(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dispatch, "combine", _combine_with_nothing)


def _combine_with_nothing(mask: Tensor | None, keep: Tensor) -> Tensor:
    return _COMBINE(mask, torch.ones_like(keep))


_COMBINE = dispatch.combine


def next_layer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AttentionKnockout, "effective", shifted(lambda cut: {"layer": min(cut.layer + 1, LAYERS - 1)}))


def window_too_wide(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention_knockout, "window", lambda center, size, n: attention.window(center, size + 1, n))


def window_off_by_one(patch: pytest.MonkeyPatch) -> None:
    shift = attention.window
    patch.setattr(attention_knockout, "window", lambda center, size, n: shift(min(center + 1, n - 1), size, n))


def wrong_head(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        AttentionKnockout,
        "effective",
        shifted(lambda cut: {"heads": None if cut.heads is None else tuple((h + 1) % 4 for h in cut.heads)}),
    )


def all_heads(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AttentionKnockout, "effective", shifted(lambda cut: {"heads": None}))


def wrong_key(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AttentionKnockout, "effective", shifted(lambda cut: {"keys": tuple(max(k - 1, 0) for k in cut.keys)}))


def wrong_query(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        AttentionKnockout, "effective", shifted(lambda cut: {"queries": tuple(max(q - 1, 1) for q in cut.queries)})
    )


def empty_lower_layers(patch: pytest.MonkeyPatch) -> None:
    """The cache of the skipped blocks is left empty: masks and positions are derived from its length."""
    original = engine.prefix_cache

    def mutant(base: Any, start_layer: int, *args: Any, **kwargs: Any) -> Any:
        cache = original(base, start_layer, *args, **kwargs)
        for entry in cache.layers[:start_layer]:
            entry.keys, entry.values = entry.keys[:, :, :0], entry.values[:, :, :0]
        return cache

    patch.setattr(engine, "prefix_cache", mutant)
    patch.setattr("factscope.models.verification._suffix", _claims_to_work)


def stale_prefix(patch: pytest.MonkeyPatch) -> None:
    """Keys and values of the prefix shifted by one position."""
    original = engine.prefix_cache

    def mutant(*args: Any, **kwargs: Any) -> Any:
        cache = original(*args, **kwargs)
        for entry in cache.layers:
            entry.keys, entry.values = entry.keys.roll(1, dims=2), entry.values.roll(1, dims=2)
        return cache

    patch.setattr(engine, "prefix_cache", mutant)
    patch.setattr("factscope.models.verification._suffix", _claims_to_work)


def _claims_to_work(*_: Any, **__: Any) -> Any:
    from factscope.models.handle import Capability

    return Capability(ok=True)


def swapped_cells(patch: pytest.MonkeyPatch) -> None:
    """The numbers of a coarse-to-fine run are written down in plain order."""
    original = attention_knockout._plan

    def mutant(*args: Any) -> Any:
        plan = original(*args)
        object.__setattr__(plan, "cells", tuple(sorted(plan.cells, key=lambda cell: cell[::-1])))
        return plan

    patch.setattr(attention_knockout, "_plan", mutant)


MUTANTS = (
    no_cut,
    next_layer,
    window_too_wide,
    window_off_by_one,
    wrong_head,
    all_heads,
    wrong_key,
    wrong_query,
    empty_lower_layers,
    stale_prefix,
    swapped_cells,
)


@pytest.fixture(autouse=True)
def _every_model_passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Verification on load would refuse some mutants; here the comparison has to find them."""
    if "mutant" in request.fixturenames:
        monkeypatch.setattr("factscope.models.verification._knockout", _claims_to_work)
    yield


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_without_a_mutant_everything_agrees(family: str) -> None:
    assert agrees(family)


def test_without_a_mutant_the_sliding_family_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sliding_agrees(monkeypatch)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_planted_mistake_is_found(
    family: str, mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    try:
        same = agrees(family)
    except RuntimeError:
        return  # shapes that do not fit: found as well
    assert not same


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weights_that_are_not_renormalised_are_found(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cut comes after the softmax: what is left does not sum to one."""
    asked: list[Tensor] = []

    def remember(mask: Tensor | None, keep: Tensor) -> Tensor:
        asked.append(keep)
        return _COMBINE(mask, torch.ones_like(keep))

    original = torch.nn.functional.softmax

    def cut_afterwards(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weights = original(scores, *args, **kwargs)
        return weights * asked.pop()[..., -weights.shape[-1] :] if asked and weights.dim() == 4 else weights

    monkeypatch.setattr("factscope.models.verification._knockout", _claims_to_work)
    monkeypatch.setattr(dispatch, "combine", remember)
    monkeypatch.setattr(torch.nn.functional, "softmax", cut_afterwards)
    assert not agrees(family, CASES[:2])


def test_a_mask_that_is_replaced_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh causal mask loses the sliding window. Full attention would not notice."""

    def fresh(mask: Tensor | None, keep: Tensor) -> Tensor:
        dtype = torch.float32 if mask is None else mask.dtype
        queries, keys = keep.shape[-2:]
        causal = torch.ones(queries, keys, dtype=torch.bool).tril(diagonal=keys - queries)
        return torch.zeros(keep.shape, dtype=dtype).masked_fill(~(keep & causal), torch.finfo(dtype).min)

    monkeypatch.setattr("factscope.models.verification._knockout", _claims_to_work)
    monkeypatch.setattr(dispatch, "combine", fresh)
    assert agrees("llama", CASES[:2])
    assert not sliding_agrees(monkeypatch)

"""Attributes rate and sublayer knockout equal plain float64 algebra without hooks, on GPT-2 and Llama."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from factscope.errors import CapabilityError, DatasetError, SpecError, SubjectError
from factscope.experiments import attributes_rate, subject_enrichment
from factscope.experiments.sub_updates import SubUpdatesSpec
from factscope.experiments.sub_updates import run as sub_updates
from factscope.experiments.subject_enrichment import EnrichmentResult, EnrichmentSpec, run
from factscope.models.handle import ModelHandle
from factscope.queries import Query
from tests.oracle import enrichment
from tests.oracle.laboratory import Subject, distinct_prompt, query_on, subject, words
from tests.oracle.plain import Trace, layers_of_window
from tests.oracle.questions import Path as Way
from tests.oracle.questions import on_path

FAMILIES = ("gpt2", "llama")
SPANS = ((2, 3), (2, 5), (0, 3))
SITES: tuple[Literal["mlp", "attention"], ...] = ("mlp", "attention")
LENGTH, LAYERS = 9, 6
M = 30
PARAGRAPHS = {
    "own": (31, 5, 31, 40, 77, 2, 58, 90, 12, 66, 23, 84, 17, 19, 35, 36, 52, 53, 60, 61, 72, 80, 88, 93, 11, 49),
    "first": (10, 31, 44, 95, 20, 21, 22, 33, 34),
    "second": (12, 70, 71, 81, 82, 83, 24, 25),
}


@lru_cache
def known(family: str) -> tuple[Subject, list[int], Trace]:
    chosen = subject(family, LAYERS, 2, 1.5)
    ids = distinct_prompt(chosen.model, LENGTH, seed=3)
    return chosen, ids, chosen.trace(ids)


@lru_cache
def source(family: str, span: tuple[int, int]) -> str:
    """A table about the prompt's subject and two others."""
    _, ids, _ = known(family)
    path = Path(tempfile.mkdtemp()) / "about.csv"
    about = {words(ids[slice(*span)]): [*PARAGRAPHS["own"], *ids[slice(*span)]]}
    return enrichment.write_table(path, about | {name: PARAGRAPHS[name] for name in ("first", "second")})


def spec_of(family: str, span: tuple[int, int], **more: Any) -> EnrichmentSpec:
    return EnrichmentSpec(attributes=source(family, span), **{"kept": M, "others": 2, **more})


def rates_of(family: str, span: tuple[int, int], states: Tensor, m: int, *, drop: bool = True) -> list[list[float]]:
    """For each state: its rate, and those for the two others' attributes, in any order."""
    chosen, ids, _ = known(family)
    name = set(ids[slice(*span)])
    left_out = name if drop else set()
    own = enrichment.attribute_ids([*PARAGRAPHS["own"], *ids[slice(*span)]], left_out)
    others = [enrichment.attribute_ids(PARAGRAPHS[which], left_out | set(own)) for which in ("first", "second")]
    logits = chosen.raw(states)
    return [[enrichment.rate(row, set(a), left_out, m or len(own)) for a in (own, *others)] for row in logits]


def same(result: EnrichmentResult, i: int, j: int, expected: list[float]) -> bool:
    found = [float(result.rate[i, j]), *sorted(result.other_rates[:, i, j].tolist())]
    return all(
        math.isclose(a, b, abs_tol=1e-5) for a, b in zip(found, [expected[0], *sorted(expected[1:])], strict=True)
    )


# ---------------------------------------------------------------------------------------------------- the rate


def plain_agrees(family: str, span: tuple[int, int], handle: ModelHandle | None = None, **more: Any) -> bool:
    chosen, ids, trace = known(family)
    spec = spec_of(family, span, positions=(*subject_enrichment.POSITIONS, "1"), **more)
    result = run(handle or chosen.handle, query_on(ids, span), spec)
    where = {
        "subject-first": span[0],
        "subject-last": span[1] - 1,
        "subject-after": span[1],
        "last": LENGTH - 1,
        "1": 1,
    }
    m, drop = more.get("kept", M), not more.get("notebook", False)
    for i, name in enumerate(result.positions):
        if name == "mean-embedding":
            table = chosen.state["transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"]
            mean = table[ids[slice(*span)]].mean(dim=0)
            if not same(result, i, 0, rates_of(family, span, mean[None], m, drop=drop)[0]):
                return False
            continue
        expected = rates_of(family, span, trace.blocks[:, where.get(name, 1)], m, drop=drop)
        if not all(same(result, i, 1 + layer, expected[layer]) for layer in range(LAYERS)):
            return False
    return True


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("more", [{}, {"kept": 3}, {"kept": 50}, {"kept": None}, {"notebook": True}])
def test_rates_are_the_plain_ones(family: str, span: tuple[int, int], more: dict[str, Any]) -> None:
    assert plain_agrees(family, span, **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_precision_ceiling_and_places(family: str) -> None:
    chosen, ids, trace = known(family)
    result = run(chosen.handle, query_on(ids, (2, 5)), spec_of(family, (2, 5)))
    exact = run(chosen.handle, query_on(ids, (2, 5)), spec_of(family, (2, 5), kept=None))
    own = enrichment.attribute_ids(PARAGRAPHS["own"], ids[2:5])
    assert [a.id for a in result.attributes] == own
    assert result.n_attributes == len(own) < M
    assert result.ceiling == pytest.approx(100 * len(own) / M)
    assert exact.ceiling == 100
    assert np.array_equal(result.precision, exact.rate, equal_nan=True)
    at = result.positions.index("subject-last")
    logits = chosen.raw(trace.blocks[:, 4])
    for layer in range(LAYERS):
        kept = enrichment.kept_tokens(logits[layer], ids[2:5], M)
        assert result.places[at, 1 + layer].tolist() == [kept.index(i) + 1 if i in kept else 0 for i in own]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cells_differ(family: str) -> None:
    """A rate that were the same everywhere would pass nothing here."""
    chosen, ids, _ = known(family)
    result = run(chosen.handle, query_on(ids, (2, 5)), spec_of(family, (2, 5)))
    assert len(np.unique(result.rate[~np.isnan(result.rate)])) >= 5
    for site in SITES:
        found = run(chosen.handle, query_on(ids, (2, 5)), spec_of(family, (2, 5), knockout=site, window=2))
        assert len(np.unique(found.rate)) >= 3


def test_fewer_tokens_than_are_to_be_kept_are_said() -> None:
    chosen, ids, _ = known("gpt2")
    result = run(chosen.handle, query_on(ids, (2, 5)), spec_of("gpt2", (2, 5), kept=90))
    assert any("of 90 tokens were left" in warning for warning in result.warnings)


# ---------------------------------------------------------------------------------------------------- the knockout


def zeroed(site: str, layers: list[int], span: tuple[int, int]) -> Callable[[str, int, Tensor], Tensor]:
    def change(at: str, layer: int, update: Tensor) -> Tensor:
        if at != site or layer not in layers:
            return update
        kept = update.clone()
        kept[slice(*span)] = 0
        return kept

    return change


def knockout_agrees(
    family: str, span: tuple[int, int], site: Any, size: int, read: int, handle: ModelHandle | None = None
) -> bool:
    chosen, ids, trace = known(family)
    spec = spec_of(family, span, knockout=site, window=size, read_layer=read)
    result = run(handle or chosen.handle, query_on(ids, span), spec)
    at = span[1] - 1
    base = rates_of(family, span, trace.blocks[read, at][None], M)[0]
    if not math.isclose(result.base_rate, base[0], abs_tol=1e-5):
        return False
    if sorted(result.base_other_rates) != pytest.approx(sorted(base[1:])):
        return False
    for center in range(LAYERS):
        change = zeroed(site, layers_of_window(center, size, LAYERS), span)
        state = chosen.trace(ids, change=change).blocks[read, at]
        if not same(result, 0, center, rates_of(family, span, state[None], M)[0]):
            return False
    return True


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("site", SITES)
def test_a_knocked_out_sublayer_is_the_plain_one(family: str, span: tuple[int, int], site: str) -> None:
    for size in (1, 2, 3):
        for read in (0, 3, LAYERS - 1):
            assert knockout_agrees(family, span, site, size, read), (size, read)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("path", ["swept", "rows", "resumed", "whole"])
def test_every_path_of_the_engine_gives_the_same(family: str, path: Way) -> None:
    chosen, _, _ = known(family)
    for site in SITES:
        for read in (3, LAYERS - 1):
            assert knockout_agrees(family, (2, 5), site, 2, read, on_path(chosen.handle, path))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("size", [None, 2])
def test_the_notebooks_knockout(family: str, site: Any, size: int | None) -> None:
    """MLP: the output bias at all positions; attention: the same weight for all earlier tokens."""
    chosen, ids, _ = known(family)
    read, span = 4, (2, 5)
    result = run(
        chosen.handle,
        query_on(ids, span),
        spec_of(family, span, knockout=site, window=size, read_layer=read, notebook=True),
    )
    assert result.layers == tuple(range(read))
    for first in range(read):
        layers = [layer for layer in range(first, first + (size or 11)) if layer < read]

        def bias(at: str, layer: int, update: Tensor, layers: list[int] = layers) -> Tensor:
            if at != "mlp" or layer not in layers:
                return update
            left = chosen.state.get(f"transformer.h.{layer}.mlp.c_proj.bias", torch.zeros(update.shape[1]).double())
            return left.expand_as(update)

        changed = {"change": bias} if site == "mlp" else {"even": layers}
        state = chosen.trace(ids, **changed).blocks[read, span[1] - 1]
        assert same(result, 0, first, rates_of(family, span, state[None], M, drop=False)[0]), first


# ---------------------------------------------------------------------------------------------------- sub-updates


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 4])
def test_sub_updates_are_activation_times_row(family: str, layer: int) -> None:
    chosen, ids, trace = known(family)
    span = (2, 5)
    spec = SubUpdatesSpec(layer=layer, neurons=400, tokens=5, attributes=source(family, span), kept=M, others=2)
    result = sub_updates(chosen.handle, query_on(ids, span), spec)
    weight = {
        "gpt2": lambda: chosen.state[f"transformer.h.{layer}.mlp.c_proj.weight"],
        "llama": lambda: chosen.state[f"model.layers.{layer}.mlp.down_proj.weight"].T,
    }[family]()
    bias = chosen.state.get(f"transformer.h.{layer}.mlp.c_proj.bias", 0.0)
    assert sorted(result.neurons) == list(range(len(weight)))
    activation = torch.from_numpy(result.activation).double()
    parts = activation[:, None] * weight[list(result.neurons)]
    update = trace.mlp[layer, span[1] - 1]
    scale = float(update.abs().max())
    assert float((parts.sum(dim=0) + bias - update).abs().max()) <= 1e-5 * scale
    assert result.total_size == pytest.approx(float((update - bias).norm()), rel=1e-5)
    sizes = parts.norm(dim=1).numpy()
    assert np.allclose(result.size, sizes, rtol=1e-4)
    assert (np.diff(result.size) <= 0).all()
    loud = sizes > 1e-3 * sizes.max()
    expected = rates_of(family, span, parts, M)
    right = [math.isclose(result.rate[i], expected[i][0], abs_tol=1e-5) for i in np.nonzero(loud)[0]]
    assert np.mean(right) > 0.99
    logits = chosen.raw(parts)
    for i in np.nonzero(loud)[0][:20]:
        assert result.top_ids[i].tolist() == logits[i].topk(5).indices.tolist()
    table = result.table()
    assert list(table.columns) == [
        "layer", "neuron", "activation", "size", "attributes_rate", "other_subject_rate", "top_tokens",
    ]  # fmt: skip
    assert len(table) == len(weight)


# ---------------------------------------------------------------------------------------------------- mutants

SPAN = (2, 5)


def everything_agrees(family: str) -> bool:
    return plain_agrees(family, SPAN) and all(knockout_agrees(family, SPAN, site, 2, 3) for site in SITES)


def m_off_by_one(patch: pytest.MonkeyPatch) -> None:
    original = attributes_rate.Attributes.__init__

    def mutant(self: Any, *, kept: int, **fields: Any) -> None:
        original(self, kept=kept + 1, **fields)

    patch.setattr(attributes_rate.Attributes, "__init__", mutant)


def one_place_too_far(patch: pytest.MonkeyPatch) -> None:
    """The m tokens are counted before the filter."""
    original = attributes_rate.Attributes.rates

    def mutant(self: Any, states: Tensor) -> Any:
        top, self_top = self.kept, self.top
        object.__setattr__(self, "top", top)
        try:
            return original(self, states)
        finally:
            object.__setattr__(self, "top", self_top)

    patch.setattr(attributes_rate.Attributes, "rates", mutant)


def entering_states(patch: pytest.MonkeyPatch) -> None:
    """What enters a layer under that layer's number, as the notebook draws it."""
    original = subject_enrichment.record_states

    def mutant(*args: Any) -> Any:
        layers, states, logits = original(*args)
        return layers, torch.cat([states[:1], states[:-1]]), logits

    patch.setattr(subject_enrichment, "record_states", mutant)


def read_one_layer_late(patch: pytest.MonkeyPatch) -> None:
    original = subject_enrichment._by_zeros
    patch.setattr(subject_enrichment, "_by_zeros", lambda m, i, s, r, read, t: original(m, i, s, r, read + 1, t))


def wrong_position(patch: pytest.MonkeyPatch) -> None:
    """The token before the subject's last is read."""
    original = subject_enrichment.record_base
    patch.setattr(subject_enrichment, "record_base", lambda *args, **more: original(*args, n_readout=2, **more))


def window_shifted(patch: pytest.MonkeyPatch) -> None:
    original = subject_enrichment.window
    patch.setattr(subject_enrichment, "window", lambda c, size, n: original(min(c + 1, n - 1), size, n))


def other_sublayer(patch: pytest.MonkeyPatch) -> None:
    original = subject_enrichment.Patch
    swap = {"mlp": "attention", "attention": "mlp"}
    patch.setattr(subject_enrichment, "Patch", lambda *, site, **more: original(site=swap[site], **more))


def last_token_only(patch: pytest.MonkeyPatch) -> None:
    original = subject_enrichment.Patch
    patch.setattr(subject_enrichment, "Patch", lambda *, positions, **more: original(positions=positions[-1:], **more))


def swapped_cells(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(subject_enrichment._Grid, "fill", _filled_backwards)


def _filled_backwards(self: Any, cells: Any, found: Any) -> None:
    rows, columns = (list(part) for part in zip(*reversed(cells), strict=True))
    self.rate[rows, columns], self.other_rates[:, rows, columns] = found.rate, found.others


def name_counts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attributes_rate, "name_tokens", lambda *_: frozenset())


def shared_attributes_in_the_null(patch: pytest.MonkeyPatch) -> None:
    original = attributes_rate.Attributes.__init__

    def mutant(self: Any, *, others: Any, own: Any, **fields: Any) -> None:
        original(self, others=tuple((*ids, *own[:5]) for ids in others), own=own, **fields)

    patch.setattr(attributes_rate.Attributes, "__init__", mutant)


def normed_projection(patch: pytest.MonkeyPatch) -> None:
    original = attributes_rate.distribution_of_states
    patch.setattr(attributes_rate, "distribution_of_states", lambda m, s, t, k, raw: original(m, s, t, k, raw=False))


MUTANTS = (
    m_off_by_one, one_place_too_far, entering_states, read_one_layer_late, wrong_position, window_shifted,
    other_sublayer, last_token_only, swapped_cells, name_counts, shared_attributes_in_the_null, normed_projection,
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_mutant_everything_agrees(family: str) -> None:
    assert everything_agrees(family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_planted_mistake_is_found(
    family: str, mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert known(family)[0].handle.capabilities["packed"].ok
    mutant(monkeypatch)
    assert not everything_agrees(family)


# ---------------------------------------------------------------------------------------------------- what is asked


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"kept": 0}, "kept 0"),
        ({"kept": 501}, "kept 501"),
        ({"top": 0}, "top 0"),
        ({"others": -1}, "others -1"),
        ({"positions": ()}, "name none"),
        ({"positions": ("last", "LAST ")}, "twice"),
        ({"positions": ("subject",)}, "not one position"),
        ({"positions": ("nowhere",)}, "nowhere"),
        ({"positions": ("99",)}, "99"),
        ({"knockout": "norm"}, "norm"),
        ({"knockout": "mlp", "window": 0}, "window 0"),
        ({"knockout": "mlp", "window": LAYERS + 1}, f"window {LAYERS + 1}"),
        ({"knockout": "mlp", "read_layer": LAYERS}, f"read layer {LAYERS}"),
    ],
)
def test_what_cannot_be_asked_is_refused(more: dict[str, Any], says: str) -> None:
    chosen, ids, _ = known("gpt2")
    with pytest.raises(SpecError, match=says):
        run(chosen.handle, query_on(ids, SPAN), spec_of("gpt2", SPAN, **more))


def test_an_unknown_subject_is_no_number() -> None:
    chosen, ids, _ = known("gpt2")
    for attributes in ("bundled", source("gpt2", (2, 3))):
        with pytest.raises(SubjectError, match="no attributes of") as refused:
            run(chosen.handle, query_on(ids, (5, 7)), EnrichmentSpec(attributes=attributes))
        assert "CSV file" in str(refused.value)
    with pytest.raises(SubjectError, match="none is named"):
        run(chosen.handle, Query(prompt=words(ids)), EnrichmentSpec())
    with pytest.raises(DatasetError):
        run(chosen.handle, query_on(ids, SPAN), EnrichmentSpec(attributes="/nowhere.csv"))


def test_a_subject_at_the_end_has_nothing_after_it() -> None:
    chosen, ids, _ = known("gpt2")
    span = (LENGTH - 2, LENGTH)
    result = run(chosen.handle, query_on(ids, span), spec_of("gpt2", span))
    assert "subject-after" not in result.positions
    assert any("no position after" in warning for warning in result.warnings)


def test_partial_results_fill_in() -> None:
    chosen, ids, _ = known("llama")
    seen: list[tuple[int, int, EnrichmentResult | None]] = []
    for more in ({}, {"knockout": "mlp"}, {"knockout": "attention", "notebook": True}):
        seen.clear()
        spec = spec_of("llama", SPAN, **more)
        final = run(chosen.handle, query_on(ids, SPAN), spec, progress=lambda *step: seen.append(step))
        done = [step[0] for step in seen]
        assert done == sorted(done) and done[0] == 0 and done[-1] == seen[-1][1] == final.passes
        for _, _, partial in seen:
            if partial is not None:
                where = ~np.isnan(partial.rate)
                assert np.array_equal(partial.rate[where], final.rate[where])


def test_a_progress_that_raises_ends_the_run() -> None:
    chosen, ids, _ = known("gpt2")

    def stop(done: int, total: int, partial: Any) -> None:
        raise CapabilityError("stop")

    with pytest.raises(CapabilityError, match="stop"):
        run(chosen.handle, query_on(ids, SPAN), spec_of("gpt2", SPAN, knockout="mlp"), progress=stop)

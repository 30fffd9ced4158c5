"""Planted mistakes: each is patched into factscope and must make the comparison with the plain computation fail.

Every mistake is planted on each of the engine's two paths where it can be made there. Models are verified before, and
the fast path's control row is not looked at: the comparison itself has to find what is wrong.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from factscope.experiments import attention_knockout
from factscope.experiments.attention_knockout import KnockoutSpec, run
from factscope.interventions import attention, engine, packing, sweep
from factscope.interventions.attention import Cut
from factscope.interventions.base import Base, Noise
from factscope.interventions.intervention import Intervention, Patch
from factscope.interventions.sweep import Ride, Sweep
from factscope.interventions.weights import WeightDelta
from factscope.models import dispatch
from factscope.models.dispatch import Replacement
from factscope.models.handle import ModelHandle
from tests.oracle import brute_force
from tests.oracle.comparison import Oracle, curve_sets, grid, knockout
from tests.oracle.laboratory import distinct_prompt, handle_of, query_on, subject
from tests.oracle.questions import Path, Setting, answered, expected, on_path
from tests.oracle.whole import Whole
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


@lru_cache
def handle(family: str, path: Path) -> ModelHandle:
    """Verified without any mistake, and made to take one of the engine's paths."""
    model = FAMILIES["mistral"](0) if family == "mistral" else subject(family).model
    return on_path(handle_of(model), path)


@contextmanager
def without_help(path: Path) -> Iterator[None]:
    """Inside, the fast path neither hands over to the other one nor looks at its control row."""
    with pytest.MonkeyPatch.context() as patch:
        if path != "rows":
            patch.setattr(engine, "run_rows", _unreachable)
            patch.setattr(Sweep, "_check", lambda *_: None)
        yield


def _unreachable(*_: Any) -> Tensor:
    raise AssertionError("the fast path handed over")


def agrees(family: str, path: Path, cases: tuple[Case, ...] = CASES) -> bool:
    """Does every knockout equal the plain computation?"""
    o, model = oracle(family), handle(family, path)
    with without_help(path):
        for spec, heads in cases:
            sets = [[p] for p in range(LENGTH)] if spec.sources == ("each",) else curve_sets(LENGTH, SPAN)
            query = LAST if spec.target_position is None else spec.target_position
            cells = grid(sets, spec.window or 3, LAYERS, [query], heads)
            if not knockout(o, SPAN, spec, cells, model).ok:
                return False
    return True


@lru_cache
def multiplied() -> np.ndarray:
    """Probabilities of Mistral with a window of four, each edge into the last token cut, by multiplied weights."""
    model = FAMILIES["mistral"](0)
    ids = distinct_prompt(model, LENGTH, seed=1)
    cells = grid([[p] for p in range(LENGTH)], 1, LAYERS, [LAST])
    return brute_force.logits(model, ids, list(cells.values()), pytest.MonkeyPatch).softmax(-1).numpy()


def sliding_agrees(path: Path) -> bool:
    """The same on Mistral with a window of four, against multiplied attention weights."""
    ids = distinct_prompt(FAMILIES["mistral"](0), LENGTH, seed=1)
    model = handle("mistral", path)
    with without_help(path):
        result = run(model, query_on(ids, SPAN), KnockoutSpec(sources=("each",), window=1))
    p = multiplied()[:, result.target.ids[0]]
    return float(np.abs(result.p_knockout.ravel() - p).max()) <= 1e-5


def shifted(cuts: Callable[[Cut], Mapping[str, Any]]) -> Callable[[Intervention, Base], Intervention]:
    """A mutant of ``effective`` that changes fields of every cut."""
    original = Intervention.effective

    def mutant(self: Intervention, base: Base) -> Intervention:
        kept = original(self, base).cuts
        fields = ({"layer": c.layer, "queries": c.queries, "keys": c.keys, "heads": c.heads, **cuts(c)} for c in kept)
        return Intervention(cuts=tuple(Cut(**one) for one in fields))

    return mutant


def no_cut(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dispatch, "combine", lambda mask, keep: _COMBINE(mask, torch.ones_like(keep)))
    masks = packing.keep_masks

    def open_masks(*args: Any) -> dict[int, Tensor]:
        return {layer: torch.ones_like(mask) for layer, mask in masks(*args).items()}

    patch.setattr(packing, "keep_masks", open_masks)


_COMBINE = dispatch.combine


def next_layer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Intervention, "effective", shifted(lambda cut: {"layer": min(cut.layer + 1, LAYERS - 1)}))


def window_too_wide(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention_knockout, "window", lambda center, size, n: attention.window(center, size + 1, n))


def window_off_by_one(patch: pytest.MonkeyPatch) -> None:
    shift = attention.window
    patch.setattr(attention_knockout, "window", lambda center, size, n: shift(min(center + 1, n - 1), size, n))


def wrong_head(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        Intervention,
        "effective",
        shifted(lambda cut: {"heads": None if cut.heads is None else tuple((h + 1) % 4 for h in cut.heads)}),
    )


def all_heads(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Intervention, "effective", shifted(lambda cut: {"heads": None}))


def wrong_key(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Intervention, "effective", shifted(lambda cut: {"keys": tuple(max(k - 1, 0) for k in cut.keys)}))


def wrong_query(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        Intervention, "effective", shifted(lambda cut: {"queries": tuple(max(q - 1, 1) for q in cut.queries)})
    )


def empty_lower_layers(patch: pytest.MonkeyPatch) -> None:
    """The cache of the skipped blocks is left empty: masks and positions are derived from its length."""
    original: Any = engine.prefix_cache

    def mutant(base: Any, start_layer: int, *args: Any, **kwargs: Any) -> Any:
        cache = original(base, start_layer, *args, **kwargs)
        for entry in cache.layers[:start_layer]:
            entry.keys, entry.values = entry.keys[:, :, :0], entry.values[:, :, :0]
        return cache

    patch.setattr(engine, "prefix_cache", mutant)


def stale_prefix(patch: pytest.MonkeyPatch) -> None:
    """Keys and values of the prefix shifted by one position."""
    original: Any = engine.prefix_cache

    def mutant(*args: Any, **kwargs: Any) -> Any:
        cache = original(*args, **kwargs)
        for entry in cache.layers:
            entry.keys, entry.values = entry.keys.roll(1, dims=2), entry.values.roll(1, dims=2)
        return cache

    patch.setattr(engine, "prefix_cache", mutant)


def swapped_cells(patch: pytest.MonkeyPatch) -> None:
    """The numbers of a coarse-to-fine run are written down in plain order."""
    original = attention_knockout._plan

    def mutant(*args: Any) -> Any:
        plan = original(*args)
        object.__setattr__(plan, "cells", tuple(sorted(plan.cells, key=lambda cell: cell[::-1])))
        return plan

    patch.setattr(attention_knockout, "_plan", mutant)


# ---------------------------------------------------------------------------- the fast path's own


def stale_shared_prefix(patch: pytest.MonkeyPatch) -> None:
    """The base's keys shifted by one position."""
    original = sweep._Attention.__call__

    def mutant(self: Any, query: Any, key: Any, value: Any, keys: Tensor, *args: Any) -> None:
        original(self, query, key, value, keys.roll(1, dims=2), *args)

    patch.setattr(sweep._Attention, "__call__", mutant)


def _built(history: Callable[[int, int], int]) -> Callable[[Any], tuple[list[Any], list[int]]]:
    """A mutant of ``_build``: which rows of one layer are the same, by the layer and the row that they continue."""

    def mutant(self: Any) -> tuple[list[Any], list[int]]:
        n, steps = self._base.n_layers, self._steps
        levels: list[Any] = [packing.Level(parents=[]) for _ in range(self.start)]
        current, joined = [-1] * len(steps), [False] * len(steps)
        for layer in range(self.start, n + 1):
            rows: dict[Any, list[int]] = {}
            for index, changes in enumerate(steps):
                joined[index] |= layer in changes
                if joined[index]:
                    key = history(layer, current[index]), changes.get(layer)
                    rows.setdefault(key, []).append(index)
            ordered = sorted(rows, key=lambda row: (row[0] < 0, row[0]))
            named = [(current[rows[row][0]], row[1]) for row in ordered]
            named = sorted(named, key=lambda row: (row[0] < 0, row[0]))
            for at, row in enumerate(ordered):
                for index in rows[row]:
                    current[index] = at
            levels.append(self._level(layer, named))
        return levels, current

    return mutant


def forgotten_history(patch: pytest.MonkeyPatch) -> None:
    """Runs whose histories differ become one row where both go on unchanged."""
    patch.setattr(packing.Group, "_build", _built(lambda layer, row: min(row, 0)))


def _entering_with(patch: pytest.MonkeyPatch, shift: int) -> None:
    original = Sweep._enter

    def mutant(self: Sweep, layer: int, hidden: Tensor) -> Tensor:
        base = self._base
        states = [base.states[min(max(i + shift, 0), base.n_layers)] for i in range(base.n_layers + 1)]
        self._base = dataclasses.replace(base, states=tuple(states))
        try:
            return original(self, layer, hidden)
        finally:
            self._base = base

    patch.setattr(Sweep, "_enter", mutant)


def joins_with_the_state_above(patch: pytest.MonkeyPatch) -> None:
    _entering_with(patch, 1)


def joins_with_the_state_below(patch: pytest.MonkeyPatch) -> None:
    _entering_with(patch, -1)


def joins_one_layer_late(patch: pytest.MonkeyPatch) -> None:
    """The first layer's change is lost: a run starts with its second, or does the first one layer above."""
    original = packing.steps_of

    def mutant(*args: Any) -> dict[int, Any]:
        steps = original(*args)
        first = min(steps)
        rest = {layer: step for layer, step in steps.items() if layer > first}
        return rest or {min(first + 1, LAYERS - 1): steps[first]}

    patch.setattr(packing, "steps_of", mutant)


def joins_one_layer_early(patch: pytest.MonkeyPatch) -> None:
    """The first layer's change is made one layer below already."""
    original = packing.steps_of

    def mutant(*args: Any) -> dict[int, Any]:
        steps = original(*args)
        first = min(steps)
        return {max(first - 1, 0): steps[first]} | {layer: step for layer, step in steps.items() if layer > first}

    patch.setattr(packing, "steps_of", mutant)


def rides_from_the_token_before(patch: pytest.MonkeyPatch) -> None:
    """Runs that ride with the plain forward join with the state of the token before the last."""
    original = Ride._enter

    def mutant(self: Ride, layer: int, hidden: Tensor) -> Tensor:
        length = self._base.length
        swapped = hidden.clone()
        swapped[:, length - 1] = hidden[:, length - 2]
        entered = original(self, layer, swapped)
        entered[:, length - 1] = hidden[:, length - 1]
        return entered

    patch.setattr(Ride, "_enter", mutant)


ON_BOTH = (
    no_cut,
    next_layer,
    window_too_wide,
    window_off_by_one,
    wrong_head,
    all_heads,
    wrong_key,
    wrong_query,
    swapped_cells,
)
ON_ROWS = (empty_lower_layers, stale_prefix)
ON_SWEEPS = (
    stale_shared_prefix,
    forgotten_history,
    joins_with_the_state_above,
    joins_with_the_state_below,
    joins_one_layer_late,
    joins_one_layer_early,
)
ON_RIDES = (
    stale_shared_prefix,
    forgotten_history,
    joins_one_layer_late,
    joins_one_layer_early,
    rides_from_the_token_before,
)
PATHS: tuple[Path, ...] = ("swept", "ridden", "rows")
PLANTED: tuple[tuple[Path, Callable[[pytest.MonkeyPatch], None]], ...] = (
    *((path, mutant) for path in PATHS for mutant in ON_BOTH),
    *(("rows", mutant) for mutant in ON_ROWS),
    *(("swept", mutant) for mutant in ON_SWEEPS),
    *(("ridden", mutant) for mutant in ON_RIDES),
)


def named(planted: Any) -> str:
    return planted if isinstance(planted, str) else planted.__name__


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_without_a_mutant_everything_agrees(family: str, path: Path) -> None:
    assert agrees(family, path)


@pytest.mark.parametrize("path", PATHS)
def test_without_a_mutant_the_sliding_family_agrees(path: Path) -> None:
    assert sliding_agrees(path)


@pytest.mark.parametrize(("path", "mutant"), PLANTED, ids=named)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_planted_mistake_is_found(
    family: str, path: Path, mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle(family).score()
    handle(family, path)
    mutant(monkeypatch)
    try:
        same = agrees(family, path)
    except RuntimeError:
        return  # shapes that do not fit: found as well
    assert not same


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weights_that_are_not_renormalised_are_found(family: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cut comes after the softmax: what is left does not sum to one."""
    asked: list[Tensor] = []

    def remember(mask: Tensor | None, keep: Tensor) -> Tensor:
        asked.append(keep)
        return _COMBINE(mask, torch.ones_like(keep))

    forbidden = sweep._Attention._forbidden

    def remember_forbidden(self: Any, keep: Tensor | None, n_kv: int, group: int) -> Tensor | None:
        if keep is not None:
            closed = forbidden(self, keep, n_kv, group)
            assert closed is not None
            asked.append(~closed)
        return forbidden(self, None, n_kv, group)

    original = torch.nn.functional.softmax

    def cut_afterwards(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weights = original(scores, *args, **kwargs)
        return weights * asked.pop()[..., -weights.shape[-1] :] if asked and weights.dim() in (4, 6) else weights

    oracle(family).score()
    handle(family, path)
    monkeypatch.setattr(dispatch, "combine", remember)
    monkeypatch.setattr(sweep._Attention, "_forbidden", remember_forbidden)
    monkeypatch.setattr(torch.nn.functional, "softmax", cut_afterwards)
    monkeypatch.setattr(torch, "softmax", cut_afterwards)
    assert not agrees(family, path, CASES[:2])


def test_a_mask_that_is_replaced_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh causal mask loses the sliding window. Full attention would not notice."""

    def fresh(mask: Tensor | None, keep: Tensor) -> Tensor:
        dtype = torch.float32 if mask is None else mask.dtype
        queries, keys = keep.shape[-2:]
        causal = torch.ones(queries, keys, dtype=torch.bool).tril(diagonal=keys - queries)
        return torch.zeros(keep.shape, dtype=dtype).masked_fill(~(keep & causal), torch.finfo(dtype).min)

    multiplied()
    handle("mistral", "rows")
    monkeypatch.setattr(dispatch, "combine", fresh)
    assert agrees("llama", "rows", CASES[:2])
    assert not sliding_agrees("rows")


def test_a_sweep_that_forgets_the_sliding_window_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when nobody looks at the control row; full attention would not notice."""
    original = Sweep._attend

    def mutant(self: Sweep, *args: Any, **kwargs: Any) -> Any:
        base = self._base
        causal = torch.ones(base.length, base.length, dtype=torch.bool).tril()
        self._base = dataclasses.replace(base, allowed=(causal,) * base.n_layers)
        try:
            return original(self, *args, **kwargs)
        finally:
            self._base = base

    multiplied()
    handle("mistral", "swept")
    monkeypatch.setattr(Sweep, "_attend", mutant)
    assert agrees("llama", "swept", CASES[:2])
    assert not sliding_agrees("swept")


# ---------------------------------------------------------------------------- patches, noise, edits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """Runs with patches on a base with noise and edits, and their probabilities by whole forwards."""

    setting: Setting
    sources: tuple[Setting, ...]
    answers: Tensor


def _runs(clean: Base, own: Base) -> list[Intervention]:
    """Patches of all sites and layers from a clean run, from another sample's state and zeros, with cuts and alone."""
    cut = Cut(layer=2, queries=(LAST,), keys=(1, 4))
    runs = [
        Intervention(patches=(Patch(layer=layer, site=site, positions=positions, source=source),))
        for layer in range(LAYERS)
        for site in ("output", "attention", "mlp")
        for positions, source in (((3 if layer < LAYERS - 1 else LAST - 1,), clean), ((2, LAST), None))
        if site != "output" or layer < LAYERS - 1
    ]
    noisy = (Patch(layer=1, site="output", positions=(5,), source=own, source_positions=(3,)),)
    runs += [Intervention(patches=noisy), Intervention(patches=noisy, cuts=(cut,))]
    runs += [Intervention(cuts=(cut,)), Intervention(cuts=(Cut(layer=0, queries=(4,), keys=(2,)), cut))]
    runs.append(Intervention(patches=(Patch(layer=-1, site="output", positions=(2, 3), source=clean),)))
    several = tuple(Patch(layer=layer, site="mlp", positions=(4, LAST), source=clean) for layer in (1, 2, 3))
    return [*runs, Intervention(patches=several), Intervention(patches=several, cuts=(cut,))]


@lru_cache
def question(family: str) -> Question:
    """Two samples of noise; an edit of low rank in the MLP and one of the attention's projection with a bias."""
    model = subject(family).model
    ids = tuple(distinct_prompt(model, LENGTH, seed=1))
    whole, generator = Whole(model), torch.Generator().manual_seed(5)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    (wide, narrow), (heads, width) = whole.shape("down_projection", 2), whole.shape("output_projection", 1)
    deltas = (
        WeightDelta(layer=2, place="down_projection", left=drawn(wide, 1) * 0.2, right=drawn(1, narrow)),
        WeightDelta(layer=1, place="output_projection", right=drawn(heads, width) * 0.1, bias=drawn(width) * 0.3),
    )
    noise = Noise(positions=(2, 3, 4), values=drawn(2, 3, width).double())
    setting = Setting(ids=ids, n_readout=2, noise=noise, deltas=deltas)
    clean = Setting(ids=ids, n_readout=2)
    bases = [one.base(handle(family, "rows")) for one in (clean, setting)]
    sources = {id(base): one.forwards(whole) for base, one in zip(bases, (clean, setting), strict=True)}
    return Question(
        setting=setting, sources=(clean, setting), answers=expected(whole, setting, _runs(bases[0], bases[1]), sources)
    )


def patched_agrees(family: str, path: Path) -> bool:
    """Do runs with patches equal whole forwards, sample by sample?"""
    asked, model = question(family), handle(family, path)
    with without_help(path):
        clean, own = (one.base(model) for one in asked.sources)
        found = answered(model, own, _runs(clean, own), path)
    return float((found - asked.answers).abs().max()) <= 1e-5


def wrong_position(patch: pytest.MonkeyPatch) -> None:
    original = Replacement.__init__

    def mutant(self: Replacement, *, positions: Tensor, length: int, **fields: Any) -> None:
        original(self, positions=(positions + 1).clamp(max=length - 1), length=length, **fields)

    patch.setattr(Replacement, "__init__", mutant)


def wrong_source_position(patch: pytest.MonkeyPatch) -> None:
    original = Patch.values

    def mutant(self: Patch, base: Base) -> Tensor:
        return original(dataclasses.replace(self, source_positions=self.positions), base)

    patch.setattr(Patch, "values", mutant)


def wrong_layer(patch: pytest.MonkeyPatch) -> None:
    """What is put in comes from the layer below."""
    original = Patch.values

    def mutant(self: Patch, base: Base) -> Tensor:
        return original(dataclasses.replace(self, layer=max(self.layer - 1, 0)), base)

    patch.setattr(Patch, "values", mutant)


def wrong_sample(patch: pytest.MonkeyPatch) -> None:
    original = Patch.values
    patch.setattr(Patch, "values", lambda self, base: original(self, base).flip(0))


def swapped_samples(patch: pytest.MonkeyPatch) -> None:
    """The second sample's noise goes to the first."""
    original = Noise.apply
    patch.setattr(Noise, "apply", lambda self, embedded: original(self, embedded).flip(0))


def patch_one_layer_late(patch: pytest.MonkeyPatch) -> None:
    """An output is replaced behind the next layer, on either path."""
    steps, replacements = packing.steps_of, engine._replacements

    def late_steps(*args: Any) -> dict[int, Any]:
        found = steps(*args)
        moved: dict[int, Any] = {layer: dataclasses.replace(step, inputs=()) for layer, step in found.items()}
        for layer, step in found.items():
            later = min(layer + 1, LAYERS)
            before = moved.get(later, packing.Step())
            moved[later] = dataclasses.replace(before, inputs=before.inputs + step.inputs)
        return moved

    def late(*args: Any) -> dict[Any, Any]:
        found = replacements(*args)
        kept = {at: change for at, change in found.items() if at[0] != "input"}
        return kept | {(site, min(n + 1, LAYERS)): c for (site, n), c in found.items() if site == "input"}

    patch.setattr(packing, "steps_of", late_steps)
    patch.setattr(engine, "_replacements", late)


def added_instead(patch: pytest.MonkeyPatch) -> None:
    """What is put in is added to what is there."""
    original = Patch.values
    patch.setattr(
        Patch, "values", lambda self, base: original(self, base) + self.recorded(base)[:, list(self.positions)]
    )


def edit_on_some_rows(patch: pytest.MonkeyPatch) -> None:
    original = WeightDelta.added

    def mutant(self: WeightDelta, x: Tensor) -> Tensor:
        change = original(self, x).clone()
        if change[..., 0].numel() > 2 * LENGTH:  # the record itself is right
            change.flatten(0, -2)[:LENGTH] = 0
        return change

    patch.setattr(WeightDelta, "added", mutant)


def edit_without_bias(patch: pytest.MonkeyPatch) -> None:
    original = WeightDelta.added
    patch.setattr(WeightDelta, "added", lambda self, x: original(dataclasses.replace(self, bias=None), x))


def last_edit_only(patch: pytest.MonkeyPatch) -> None:
    original = Base.plan

    def mutant(self: Base, **fields: Any) -> Any:
        return original(dataclasses.replace(self, deltas=self.deltas[-1:]), **fields)

    patch.setattr(Base, "plan", mutant)


def joins_unchanged(patch: pytest.MonkeyPatch) -> None:
    """A run that begins with a patched update joins behind the layer, with the base's states."""
    patch.setattr(
        packing.Joining, "values", lambda self, p: self._base.states[p.layer + 1][:, list(p.positions)].clone()
    )


def mlp_does_not_follow(patch: pytest.MonkeyPatch) -> None:
    """A patched attention update is added to the layer's output; its own MLP does not see it."""
    patch.setattr(packing.Joining, "_adds", lambda *_: True)


PATCHES_ON_BOTH = (
    wrong_position,
    wrong_source_position,
    wrong_layer,
    wrong_sample,
    swapped_samples,
    patch_one_layer_late,
    added_instead,
    edit_on_some_rows,
    edit_without_bias,
    last_edit_only,
)
PATCHES_ON_SWEEPS = (
    forgotten_history,
    stale_shared_prefix,
    joins_with_the_state_above,
    joins_with_the_state_below,
    joins_unchanged,
    mlp_does_not_follow,
)
PLANTED_PATCHES: tuple[tuple[Path, Callable[[pytest.MonkeyPatch], None]], ...] = (
    *((path, mutant) for path in PATHS for mutant in PATCHES_ON_BOTH),
    *(("rows", mutant) for mutant in ON_ROWS),
    *(("swept", mutant) for mutant in PATCHES_ON_SWEEPS),
)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_patches_agree_without_a_mutant_and_move_probabilities(family: str, path: Path) -> None:
    assert patched_agrees(family, path)
    answers = question(family).answers
    assert float((answers[:, 0] - answers[:, 1]).abs().amax(dim=(1, 2)).min()) > 1e-2  # the samples differ
    apart = torch.cdist(answers.flatten(1), answers.flatten(1)) + torch.eye(len(answers))
    assert float(apart.min()) > 1e-3  # and so do the runs


@pytest.mark.parametrize(("path", "mutant"), PLANTED_PATCHES, ids=named)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_mistake_with_patches_is_found(
    family: str, path: Path, mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    question(family)
    handle(family, path)
    mutant(monkeypatch)
    try:
        same = patched_agrees(family, path)
    except RuntimeError:
        return  # shapes that do not fit: found as well
    assert not same


def _embedded() -> tuple[Tensor, Tensor]:
    """What the engine records as Llama's embedding under noise, and the float64 sum, rounded once."""
    model = subject("llama").model
    ids = distinct_prompt(model, LENGTH, seed=1)
    values = torch.randn(3, 2, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
    base = Setting(ids=tuple(ids), noise=Noise(positions=(1, 4), values=values)).base(handle("llama", "swept"))
    table = model.get_input_embeddings().weight.detach().numpy().astype(np.float64)  # type: ignore[operator]
    right = np.repeat(table[ids][None], 3, axis=0)
    right[:, [1, 4]] += values.numpy()
    return base.states[0], torch.from_numpy(right.astype(np.float32))


def test_noise_is_added_in_float64_and_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found, right = _embedded()
    assert torch.equal(found, right)
    original = Noise.apply

    def narrow(self: Noise, embedded: Tensor) -> Tensor:
        changed = embedded.clone()
        changed[:, list(self.positions)] += self.values.float()
        return changed

    monkeypatch.setattr(Noise, "apply", narrow)
    found, right = _embedded()
    assert not torch.equal(found, right)
    monkeypatch.setattr(Noise, "apply", original)


# ---------------------------------------------------------------------------- a plan that everybody sees


class _Global:
    """Stands in for the ContextVar of the plan: one for all threads."""

    def __init__(self) -> None:
        self.plan: Any = None

    def get(self) -> Any:
        return self.plan

    def set(self, plan: Any) -> Any:
        before, self.plan = self.plan, plan
        return before

    def reset(self, before: Any) -> None:
        self.plan = before


def _neighbour_is_undisturbed(path: Path) -> bool:
    """Does a thread that runs the plain model, in the middle of our runs, get the plain model's numbers?"""
    asked, model = question("llama"), handle("llama", path)
    ids = list(asked.setting.ids)
    plain = Whole(subject("llama").model).run(ids).logits.softmax(-1)
    ours, module = threading.get_ident(), model._model
    right: list[bool] = []

    def neighbour() -> None:
        try:
            with torch.no_grad():
                found = module(torch.tensor([ids]), use_cache=False).logits[0].double().softmax(-1)
            right.append(found.shape == plain.shape and float((found - plain).abs().max()) <= 1e-5)
        except Exception:  # whatever somebody else's plan does to a forward
            right.append(False)

    def meanwhile(*_: Any) -> None:
        if threading.get_ident() == ours:
            thread = threading.Thread(target=neighbour)
            thread.start()
            thread.join()

    embedding: Any = model.parts.wiring.embedding
    clean, own = (one.base(model) for one in asked.sources)
    hook = embedding.register_forward_hook(meanwhile)
    try:
        for _ in engine.run(model, own, _runs(clean, own)):
            pass
    finally:
        hook.remove()
    assert right, "nobody else ran meanwhile"
    return all(right)


@pytest.mark.parametrize("path", PATHS)
def test_a_plan_that_is_shared_by_all_threads_is_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _neighbour_is_undisturbed(path)
    monkeypatch.setattr(dispatch, "_ACTIVE", _Global())
    assert not _neighbour_is_undisturbed(path)

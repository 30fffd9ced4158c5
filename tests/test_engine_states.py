"""Runs that are read out behind an inner block: their states, on every family and path, against whole forwards."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from factscope.interventions import engine
from factscope.interventions.attention import Cut
from factscope.interventions.base import Base, record_base
from factscope.interventions.intervention import Intervention, Patch
from factscope.models.handle import ModelHandle
from tests.oracle.laboratory import distinct_prompt, handle_of
from tests.oracle.questions import edges_of, on_path, paths_of, puts_of
from tests.oracle.whole import Whole
from tests.tiny_models import FAMILIES, N_LAYERS

LENGTH, LAST, READ = 8, 7, (0, 2, N_LAYERS - 1)
ROUNDING = 3e-6
"""Largest deviation of a float32 state, as a share of the states' scale."""


@lru_cache(maxsize=1)
def known(name: str) -> tuple[ModelHandle, Whole, list[int]]:
    model = FAMILIES[name](0)
    return handle_of(model, name), Whole(model), distinct_prompt(model, LENGTH, seed=3)


def runs_on(handle: ModelHandle) -> list[Intervention]:
    """Zeros at every site below, at and above the layers that are read, cuts where edges can be cut, and nothing."""
    sites = ("output", "attention", "mlp") if handle.capabilities["additive"].ok else ("output",)
    runs = [Intervention()]
    for layer in range(N_LAYERS):
        for site in sites:
            for positions in ((2, 3), (LAST,), (1, LAST)):
                runs.append(Intervention(patches=(Patch(layer=layer, site=site, positions=positions),)))
        if handle.capabilities["knockout"].ok:
            runs.append(Intervention(cuts=(Cut(layer=layer, queries=(3, LAST), keys=(1, 2)),)))
    for site in sites[1:]:
        window = tuple(Patch(layer=layer, site=site, positions=(2, 3, LAST)) for layer in (1, 2, 3))
        runs.append(Intervention(patches=window))
    return runs


def found(handle: ModelHandle, base: Base, runs: list[Intervention]) -> Tensor:
    rows: dict[int, Tensor] = {}
    for indices, readout in engine.run(handle, base, runs):
        assert not set(indices) & set(rows)
        rows |= dict(zip(indices, readout.final_states(), strict=True))
    return torch.stack([rows[i] for i in range(len(runs))])[:, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_states_behind_a_block_are_those_of_whole_forwards(name: str) -> None:
    handle, whole, ids = known(name)
    runs = runs_on(handle)
    zero = torch.zeros(whole.width, dtype=torch.float64)
    seen = [whole.run(ids, cuts=edges_of(run), puts=puts_of(run, {}, 0, zero), record=True) for run in runs]
    moved = []
    for path in paths_of(handle):
        own = on_path(handle, path)
        record = record_base(own, ids, updates=("attention", "mlp") if own.capabilities["additive"].ok else ())
        for layer in READ:
            expected = torch.stack([one.states[layer + 1][-1:] for one in seen])
            states = found(own, record.up_to(layer), runs)
            scale = float(expected.abs().max())
            assert float((states - expected).abs().max()) <= ROUNDING * scale * (10 if name in AMPLIFY else 1), path
            moved.append(float((expected - expected[0]).abs().amax(dim=(1, 2)).gt(0.01 * scale).double().mean()))
    assert max(moved) > 0.4


AMPLIFY = ("gpt_neo", "mamba")
"""Their plain float32 forwards amplify rounding (tests/test_engine_properties.py)."""


def test_what_happens_behind_the_block_that_is_read_changes_nothing() -> None:
    handle, _, ids = known("llama")
    base = record_base(handle, ids, updates=("attention", "mlp")).up_to(1)
    late = [
        Intervention(patches=(Patch(layer=layer, site=site, positions=(LAST,)),))
        for layer in (2, 3)
        for site in ("output", "mlp", "attention")
    ]
    late.append(Intervention(cuts=(Cut(layer=2, queries=(LAST,), keys=(0, 1)),)))
    states = found(handle, base, late)
    assert torch.equal(states, base.states[2][:, -1:].expand_as(states))

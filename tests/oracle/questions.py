"""One question for two: the engine's descriptions of runs, answered by the engine and by whole forwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from factscope.interventions import engine
from factscope.interventions.base import Base, Noise, record_base
from factscope.interventions.intervention import Intervention
from factscope.interventions.weights import WeightDelta
from factscope.models.handle import Capability, ModelHandle
from tests.oracle.plain import Edge
from tests.oracle.whole import Edited, Put, Seen, Whole

Path = Literal["swept", "ridden", "rows", "resumed", "whole"]
"""The engine's ways: all runs in one sweep, along with the plain forward where they can, rows on a cached prefix, rows
on all positions, rows through all blocks."""

_LACKING: dict[Path, frozenset[str]] = {
    "swept": frozenset(),
    "ridden": frozenset(),
    "rows": frozenset({"packed"}),
    "resumed": frozenset({"packed", "suffix"}),
    "whole": frozenset({"packed", "suffix", "resume"}),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """What holds for every run on one base."""

    ids: tuple[int, ...]
    n_readout: int = 1
    noise: Noise | None = None
    deltas: tuple[WeightDelta, ...] = ()

    @property
    def n_samples(self) -> int:
        return 1 if self.noise is None else self.noise.values.shape[0]

    def base(self, handle: ModelHandle, *, updates: bool | None = None) -> Base:
        """The engine's record; updates where the family has them, unless told."""
        wanted = handle.capabilities["additive"].ok if updates is None else updates
        return record_base(
            handle,
            self.ids,
            n_readout=self.n_readout,
            noise=self.noise,
            deltas=self.deltas,
            updates=("attention", "mlp") if wanted else (),
        )

    def forwards(self, whole: Whole, *, record: bool = True, **changes: Any) -> list[Seen]:
        """A plain forward for every sample."""
        edited = [edit(delta) for delta in self.deltas]
        return [
            whole.run(self.ids, edited=edited, embed=self.embed(sample), record=record, **changes)
            for sample in range(self.n_samples)
        ]

    def embed(self, sample: int) -> Callable[[Tensor], Tensor] | None:
        """The noise of one sample."""
        if self.noise is None:
            return None
        where, values, replace = self.noise.positions, self.noise.values[sample], self.noise.replace

        def change(embedded: Tensor) -> Tensor:
            changed = embedded.clone()
            for position, value in zip(where, values.to(embedded.dtype), strict=True):
                changed[position] = value if replace else embedded[position] + value
            return changed

        return change


def edit(delta: WeightDelta) -> Edited:
    """The edit of a weight that a delta stands for."""
    weight = delta.right.double() if delta.left is None else delta.left.double() @ delta.right.double()
    return Edited(layer=delta.layer, place=delta.place, weight=weight, bias=delta.bias)


def edges_of(intervention: Intervention) -> set[Edge]:
    """Every edge that is cut, one by one; those into the future do not exist."""
    return {
        (cut.layer, head, query, key)
        for cut in intervention.cuts
        for head in (cut.heads if cut.heads is not None else (None,))
        for query in cut.queries
        for key in cut.keys
        if key <= query
    }


def puts_of(intervention: Intervention, sources: Mapping[int, Sequence[Seen]], sample: int, like: Tensor) -> list[Put]:
    """Every vector that is put in, one by one.

    Args:
        sources: by ``id`` of a base, the plain forwards of its samples.
    """
    puts = []
    for patch in intervention.patches:
        where = patch.positions if patch.source_positions is None else patch.source_positions
        for position, at in zip(patch.positions, where, strict=True):
            vector = torch.zeros_like(like)
            if patch.source is not None:
                seen = sources[id(patch.source)]
                one = seen[sample if len(seen) > 1 else 0]
                given = one.states[patch.layer + 1] if patch.site == "output" else one.updates[patch.site, patch.layer]
                vector = given[at]
            puts.append(Put(layer=patch.layer, site=patch.site, position=position, vector=vector))
    return puts


def expected(
    whole: Whole, setting: Setting, runs: Sequence[Intervention], sources: Mapping[int, Sequence[Seen]]
) -> Tensor:
    """Probabilities [run, sample, readout, vocabulary] by one whole forward for every run and sample."""
    width = whole.width
    found = [
        [
            whole.run(
                setting.ids,
                edited=[edit(delta) for delta in setting.deltas],
                embed=setting.embed(sample),
                cuts=edges_of(run),
                puts=puts_of(run, sources, sample, torch.zeros(width)),
            ).logits[-setting.n_readout :]
            for sample in range(setting.n_samples)
        ]
        for run in runs
    ]
    return torch.stack([torch.stack(row) for row in found]).double().softmax(dim=-1)


def answered(handle: ModelHandle, base: Base, runs: Sequence[Intervention], path: Path, **more: Any) -> Tensor:
    """The engine's probabilities of the same runs; what is asked of the fast path has to be answered by it."""
    rows: dict[int, Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        if path == "swept":
            patch.setattr(engine, "run_rows", _not_here)
        for indices, readout in engine.run(handle, base, runs, **more):
            assert not set(indices) & set(rows), "answered twice"
            rows |= dict(zip(indices, readout.logits().double().softmax(dim=-1), strict=True))
    assert sorted(rows) == list(range(len(runs)))
    return torch.stack([rows[index] for index in range(len(runs))])


def _not_here(*_: Any) -> Tensor:
    raise AssertionError("the fast path gave up")


def on_path(handle: ModelHandle, path: Path) -> ModelHandle:
    """A handle of the same model that takes one of the engine's ways."""
    lacking = _LACKING[path]
    own = object.__new__(ModelHandle)
    for name, value in vars(handle).items():
        object.__setattr__(own, name, value)
    found = {
        name: Capability(ok=False, reason="not on this path") if name in lacking else capability
        for name, capability in handle.capabilities.items()
    }
    object.__setattr__(own, "capabilities", found)
    object.__setattr__(own, "rides", path == "ridden")
    return own


def paths_of(handle: ModelHandle) -> list[Path]:
    """The ways that a family can go."""
    packed, suffix, resume = (handle.capabilities[name].ok for name in ("packed", "suffix", "resume"))
    found: list[Path] = ["swept"] if packed else []
    if suffix:
        found.append("rows")
    if resume:
        found.append("resumed")
    return [*found, "whole"]

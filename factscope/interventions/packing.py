"""Which rows a sweep computes in each layer, and where in the packed sequence they stand.

A run is a step (what it changes) in each of some layers. At every layer there is a row for each run that has differed
so far: a run joins at its first changed layer (staircase), and runs whose steps were the same up to here are one row
(trie). A run that begins with a replaced update joins behind that layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from factscope.interventions.attention import Cut, keep_masks
from factscope.interventions.base import Base, replacement
from factscope.interventions.intervention import Intervention, Patch, PatchSite
from factscope.models.dispatch import Replacement, Stopped
from factscope.models.handle import ModelHandle


class Joining:
    """What the next layer is given where a run begins with replaced updates of one site, for all runs of a base.

    At its first layer such a run differs from the base at the patched positions only. So it need not go through that
    layer: it joins behind it, with the base's states and, at these positions, what the layer makes of the new update.
    """

    def __init__(self, model: ModelHandle, base: Base) -> None:
        self._model, self._base = model, base
        self._behind: dict[tuple[int, Base | None], Tensor] = {}

    def values(self, patch: Patch) -> Float[Tensor, "sample position d_model"]:
        """The layer's output at the patch's positions."""
        base, where = self._base, list(patch.positions)
        if self._adds(patch):
            return base.states[patch.layer + 1][:, where] + patch.values(base) - patch.recorded(base)[:, where]
        key = patch.layer, patch.source
        if key not in self._behind:
            self._behind[key] = self._through(patch)
        return self._behind[key][:, where]

    def possible(self, patches: Sequence[Patch]) -> bool:
        """Whether runs that begin with these patches, all in one layer, may join behind it."""
        if len({(patch.site, patch.source) for patch in patches}) > 1 or patches[0].site == "output":
            return False
        if self._adds(patches[0]):
            return patches[0].site in self._base.updates
        source = patches[0].source
        reaches = source is None or source.length >= self._base.length
        return reaches and all(patch.source_positions in (None, patch.positions) for patch in patches)

    def _adds(self, patch: Patch) -> bool:
        """Whether the update reaches nothing but the sum."""
        return patch.site == "mlp" or self._model.parts.parallel[patch.layer]

    def _through(self, patch: Patch) -> Float[Tensor, "sample position d_model"]:
        """The layer's output with its attention update replaced at all positions: each is as if it were the only one.

        Positions speak to each other in the attention alone.
        """
        base, layer = self._base, patch.layer
        everywhere = replace(patch, positions=tuple(range(base.length)), source_positions=None)
        change = replacement(base, [(0, everywhere.positions, everywhere.values(base))], 0)
        plan = base.plan(
            start_layer=layer,
            resume=base.states[layer].clone(),
            replace={("attention", layer): change},
            stop_after=layer,
            capture=frozenset({("output", layer)}),
        )
        with suppress(Stopped):
            self._model.forward(base.ids.expand(base.n_samples, -1), plan, last=1)
        return plan.captured["output", layer]


@dataclass(frozen=True)
class PutIn:
    """A patch as it is done: at its site, or to the next layer's input instead."""

    patch: Patch
    behind: bool = False


@dataclass(frozen=True)
class Step:
    """What one run changes in one layer. Equal steps of equal histories are one row."""

    cuts: tuple[Cut, ...] = ()
    inputs: tuple[PutIn, ...] = ()
    attention: tuple[PutIn, ...] = ()
    mlp: tuple[PutIn, ...] = ()

    @cached_property
    def _hash(self) -> int:
        return hash((self.cuts, self.inputs, self.attention, self.mlp))

    def __hash__(self) -> int:
        """Computed once: the runs of a map share their steps."""
        return self._hash


@dataclass(frozen=True, kw_only=True, eq=False)
class Level:
    """The rows of one layer.

    Attributes:
        parents: row of the layer below that each row continues; -1 where it joins from the base. Continued rows come
            first.
        keep: which edges each row's cuts leave; None where nothing is cut.
        replace: per site, what is put in, in tokens of this group.
    """

    parents: list[int]
    keep: Bool[Tensor, "row head query key"] | None = None
    replace: Mapping[str, Replacement] = field(default_factory=dict)

    @property
    def continued(self) -> list[int]:
        """Rows of the layer below that go on."""
        return [parent for parent in self.parents if parent >= 0]


class Group:
    """Runs that are computed from one position on: a stretch of the packed sequence in every layer.

    Args:
        begin: the first position computed; at most the first changed one of any run, and the first read-out one.
    """

    def __init__(
        self, model: ModelHandle, base: Base, begin: int, runs: Sequence[Intervention], joining: Joining
    ) -> None:
        self._model, self._base, self._joining = model, base, joining
        self.begin, self.n_own = begin, base.length - begin
        alone: dict[Cut, Step] = {}
        self._steps = [steps_of(run, joining, alone) for run in runs]
        self.start = min(min(steps) for steps in self._steps)
        self.levels, self.leaves = self._build()

    def n_tokens(self, layer: int) -> int:
        """Length of the stretch in a layer."""
        return len(self.levels[layer].parents) * self._base.n_samples * self.n_own

    def fill(self, layer: int, before: Tensor, after: Tensor, entering: Tensor) -> None:
        """Write the stretch of a layer.

        Args:
            before: [token, d_model], the stretch behind the layer below.
            after: [token, d_model], to be written.
            entering: [sample, position, d_model], the base's states at all positions.
        """
        level, own = self.levels[layer], entering[:, self.begin :]
        rows, old = after.view(-1, *own.shape), level.continued
        if old:
            kept = before.view(-1, *own.shape)
            if old == list(range(kept.shape[0])):
                rows[: len(old)] = kept
            else:
                torch.index_select(kept, 0, torch.tensor(old, device=kept.device), out=rows[: len(old)])
        rows[len(old) :] = own
        if (change := level.replace.get("input")) is not None:
            after[change.positions] = change.values.to(after.dtype)

    def _build(self) -> tuple[list[Level], list[int]]:
        """The levels, layer by layer and one behind the last block, and the last level's row of every run."""
        n = self._base.n_layers
        levels = [Level(parents=[]) for _ in range(self.start)]
        current = [-1] * len(self._steps)
        joined = [False] * len(self._steps)
        for layer in range(self.start, n + 1):
            rows: dict[tuple[int, Step | None], list[int]] = {}
            for run, steps in enumerate(self._steps):
                step = steps.get(layer)
                if step is not None or joined[run]:
                    joined[run] = True
                    rows.setdefault((current[run], step), []).append(run)
            ordered = sorted(rows, key=lambda row: (row[0] < 0, row[0]))
            for index, row in enumerate(ordered):
                for run in rows[row]:
                    current[run] = index
            levels.append(self._level(layer, ordered))
        return levels, current

    def _level(self, layer: int, rows: list[tuple[int, Step | None]]) -> Level:
        base, device = self._base, self._model.device
        cuts = [() if step is None else step.cuts for _, step in rows]
        keep = None
        if any(cuts):
            keep = keep_masks(cuts, base.length, self.begin, self._model.info.n_heads, device)[layer]
        replace = {}
        for site in ("inputs", "attention", "mlp"):
            found = [(row, put) for row, (_, step) in enumerate(rows) if step for put in getattr(step, site)]
            if found:
                replace["input" if site == "inputs" else site] = self._replacement(found)
        return Level(parents=[parent for parent, _ in rows], keep=keep, replace=replace)

    def _replacement(self, found: list[tuple[int, PutIn]]) -> Replacement:
        parts = []
        for row, put in found:
            patch = put.patch
            values = self._joining.values(patch) if put.behind else patch.values(self._base)
            parts.append((row, patch.positions, values))
        change = replacement(self._base, parts, self.begin)
        return replace(
            change, rows=torch.zeros_like(change.rows), positions=change.rows * self.n_own + change.positions
        )


def steps_of(run: Intervention, joining: Joining, alone: dict[Cut, Step]) -> dict[int, Step]:
    """What a run changes, by layer.

    A layer's output that is replaced stands over an update inside that layer.

    Args:
        alone: steps of one cut and nothing else, made once for all runs that share it.
    """
    if not run.patches and len({cut.layer for cut in run.cuts}) == len(run.cuts):
        return {cut.layer: alone.get(cut) or alone.setdefault(cut, Step(cuts=(cut,))) for cut in run.cuts}
    cuts: dict[int, list[Cut]] = {}
    for cut in run.cuts:
        cuts.setdefault(cut.layer, []).append(cut)
    by_site: dict[PatchSite, dict[int, list[PutIn]]] = {"output": {}, "attention": {}, "mlp": {}}
    first = run.first_layer
    begins = [patch for patch in run.patches if patch.layer + (patch.site == "output") == first]
    behind = first not in cuts and bool(begins) and joining.possible(begins)
    moves = [behind and patch in begins for patch in run.patches]
    for patch, moved in sorted(zip(run.patches, moves, strict=True), key=lambda one: not one[1]):
        site, layer = ("output", patch.layer + 1) if moved or patch.site == "output" else (patch.site, patch.layer)
        by_site[site].setdefault(layer, []).append(PutIn(patch, moved))
    inputs, attention, mlp = by_site["output"], by_site["attention"], by_site["mlp"]
    return {
        layer: Step(
            cuts=tuple(cuts.get(layer, ())),
            inputs=tuple(inputs.get(layer, ())),
            attention=tuple(attention.get(layer, ())),
            mlp=tuple(mlp.get(layer, ())),
        )
        for layer in sorted({*cuts, *inputs, *attention, *mlp})
    }

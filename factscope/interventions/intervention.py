"""Descriptions of what one run changes: attention edges cut, states and updates replaced. Plain values, no hooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from factscope.interventions.attention import Cut
from factscope.interventions.base import Base

PatchSite = Literal["output", "attention", "mlp"]


@dataclass(frozen=True, kw_only=True)
class Patch:
    """Replace what one layer gives at some positions.

    Attributes:
        layer: the block, from 0; with site ``output`` also -1, the embedding (the input of block 0).
        site: the block's output, or the update that its attention or its MLP adds.
        positions: where.
        source: the run whose values are put in, a row for each of ours or one for all; None puts in zeros.
        source_positions: where they stand in the source; None means the same positions.
    """

    layer: int
    site: PatchSite
    positions: tuple[int, ...]
    source: Base | None = None
    source_positions: tuple[int, ...] | None = None

    def values(self, base: Base) -> Float[Tensor, "sample position d_model"]:
        """What is put in, a row for each sample of the base run."""
        like = base.states[0]
        shape = (base.n_samples, len(self.positions), like.shape[-1])
        if self.source is None:
            return like.new_zeros(shape)
        found = self.source.states[self.layer + 1] if self.site == "output" else self.recorded(self.source)
        where = self.positions if self.source_positions is None else self.source_positions
        return found[:, list(where)].expand(shape)

    def recorded(self, base: Base) -> Float[Tensor, "sample position d_model"]:
        """What a run itself gives at this site of this layer."""
        if self.site == "output":
            return base.states[self.layer + 1]
        return base.updates[self.site][self.layer]

    def without_effect(self, base: Base) -> bool:
        """Whether it puts in what is there, as long as nothing else changes it: a state before the first noisy
        position.
        """
        same_run = self.source is not None and torch.equal(self.source.ids, base.ids)
        return (
            same_run
            and self.source is not None
            and self.source.deltas == base.deltas
            and self.source_positions in (None, self.positions)
            and max(self.positions) < min(base.first_noisy, self.source.first_noisy)
        )


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """One run: all its cuts and patches together."""

    cuts: tuple[Cut, ...] = ()
    patches: tuple[Patch, ...] = ()

    def effective(self, base: Base) -> Intervention:
        """Without what cannot change the read-out.

        Edges into the future do not exist in a causal model. What the last block does at positions that are not read
        out reaches nothing, nor does any block behind it, where the base ends before the model does.
        """
        end, read_from = base.n_layers - 1, base.length - base.n_readout
        if not self.patches and all(
            cut.all_past and (cut.layer < end or (cut.layer == end and min(cut.queries) >= read_from))
            for cut in self.cuts
        ):
            return self

        def seen_from(layer: int) -> int:
            return 0 if layer < end else read_from if layer == end else base.length

        cuts = []
        for cut in self.cuts:
            low = seen_from(cut.layer)
            queries = tuple(q for q in cut.queries if q >= low and any(k <= q for k in cut.keys))
            if queries and (cut.heads is None or cut.heads):
                keys = tuple(k for k in cut.keys if k <= max(queries))
                cuts.append(Cut(layer=cut.layer, queries=queries, keys=keys, heads=cut.heads))
        seen = [_seen(patch, seen_from(patch.layer)) for patch in self.patches]
        patches = [patch for patch in seen if patch.positions]
        acting = Intervention(
            cuts=tuple(cuts), patches=tuple(patch for patch in patches if not patch.without_effect(base))
        )
        if acting.changes:
            kept = (patch if patch in acting.patches else _undoing(patch, acting) for patch in patches)
            acting = Intervention(cuts=acting.cuts, patches=tuple(patch for patch in kept if patch.positions))
        return acting

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.cuts or self.patches)

    @property
    def first_layer(self) -> int:
        """The lowest layer whose run differs from the base; the number of layers where only the last output does."""
        of_patches = [patch.layer + (patch.site == "output") for patch in self.patches]
        return min([cut.layer for cut in self.cuts] + of_patches)

    @property
    def first_position(self) -> int:
        """The first position that differs from the base run."""
        return min([min(cut.queries) for cut in self.cuts] + [min(patch.positions) for patch in self.patches])


def _undoing(patch: Patch, acting: Intervention) -> Patch:
    """What of a patch with the base's own values undoes changes that come before it; the rest changes nothing."""
    below = patch.layer + (patch.site == "output") < acting.first_layer
    return _seen(patch, max(patch.positions) + 1 if below else acting.first_position)


def _seen(patch: Patch, low: int) -> Patch:
    """A patch without the positions below ``low``."""
    if not patch.positions or min(patch.positions) >= low:
        return patch
    pairs = list(zip(patch.positions, patch.source_positions or patch.positions, strict=True))
    kept = [(p, s) for p, s in pairs if p >= low]
    return Patch(
        layer=patch.layer,
        site=patch.site,
        positions=tuple(p for p, _ in kept),
        source=patch.source,
        source_positions=tuple(s for _, s in kept),
    )

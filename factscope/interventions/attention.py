"""Descriptions of attention knockouts (Geva et al. 2023, section 4): which edges are cut in which layers and heads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Forbid attention from some positions to others in one layer.

    Attributes:
        layer: the block, from 0.
        queries: the positions that attend ("from", Geva's target t).
        keys: the positions attended to ("to", Geva's sources s).
        heads: the heads cut; None cuts all.
    """

    layer: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    heads: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionKnockout:
    """One run: all its cuts together."""

    cuts: tuple[Cut, ...]

    def effective(self) -> AttentionKnockout:
        """Without the edges into the future, which do not exist in a causal model."""
        if all((cut.heads is None or cut.heads) and max(cut.keys) <= min(cut.queries) for cut in self.cuts):
            return self
        kept = []
        for cut in self.cuts:
            queries = tuple(q for q in cut.queries if any(k <= q for k in cut.keys))
            if queries and (cut.heads is None or cut.heads):
                keys = tuple(k for k in cut.keys if k <= max(queries))
                kept.append(Cut(layer=cut.layer, queries=queries, keys=keys, heads=cut.heads))
        return AttentionKnockout(cuts=tuple(kept))

    @property
    def first_layer(self) -> int:
        """The lowest layer that differs from the plain run."""
        return min(cut.layer for cut in self.cuts)

    @property
    def first_position(self) -> int:
        """The first position that differs from the plain run."""
        return min(min(cut.queries) for cut in self.cuts)


def window(center: int, size: int, n_layers: int) -> range:
    """Layers of a window of ``size`` around ``center``, clipped at the ends (Geva et al. 2023, section 4)."""
    return range(max(0, center - size // 2), min(n_layers, center + -(-size // 2)))


def default_flow_window(n_layers: int) -> int:
    """The odd number nearest to a fifth of the layers (ties down), at least 3: 9 of 48, 5 of 28, 3 of 8."""
    fifth = n_layers / 5
    odd = min(range(1, n_layers + 3, 2), key=lambda k: (abs(k - fifth), k))
    return max(3, odd)

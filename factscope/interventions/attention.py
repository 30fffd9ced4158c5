"""Attention knockouts (Geva et al. 2023, section 4): which edges are cut in which layers and heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor


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

    @cached_property
    def _hash(self) -> int:
        return hash((self.layer, self.queries, self.keys, self.heads))

    def __hash__(self) -> int:
        """Computed once: thousands of runs share their cuts."""
        return self._hash

    @cached_property
    def all_past(self) -> bool:
        """Whether every edge leads to the same or an earlier position, in some head."""
        return bool(self.heads is None or self.heads) and max(self.keys) <= min(self.queries)


def keep_masks(
    runs: Sequence[Sequence[Cut]], length: int, begin: int, n_heads: int, device: torch.device
) -> dict[int, Bool[Tensor, "row head query key"]]:
    """Per layer, which attention edges stay, for queries from position ``begin`` on; one head axis unless heads
    differ.
    """
    cut_edges: dict[int, list[tuple[int, int, int, int]]] = {}
    every_head = -1
    for row, cuts in enumerate(runs):
        for cut in cuts:
            heads = (every_head,) if cut.heads is None else cut.heads
            edges = ((row, h, q - begin, k) for h in heads for q in cut.queries for k in cut.keys)
            cut_edges.setdefault(cut.layer, []).extend(edges)
    masks = {}
    for layer, edges in sorted(cut_edges.items()):
        rows, heads, queries, keys = torch.tensor(edges).unbind(dim=1)
        by_head = bool((heads != every_head).any())
        mask = torch.ones(len(runs), n_heads if by_head else 1, length - begin, length, dtype=torch.bool)
        chosen = heads != every_head
        mask[rows[~chosen], :, queries[~chosen], keys[~chosen]] = False
        mask[rows[chosen], heads[chosen], queries[chosen], keys[chosen]] = False
        masks[layer] = mask.to(device)
    return masks


def window(center: int, size: int, n_layers: int) -> range:
    """Layers of a window of ``size`` around ``center``, clipped at the ends (Geva et al. 2023, section 4)."""
    return range(max(0, center - size // 2), min(n_layers, center + -(-size // 2)))


def default_flow_window(n_layers: int) -> int:
    """The odd number nearest to a fifth of the layers (ties down), at least 3: 9 of 48, 5 of 28, 3 of 8."""
    fifth = n_layers / 5
    odd = min(range(1, n_layers + 3, 2), key=lambda k: (abs(k - fifth), k))
    return max(3, odd)

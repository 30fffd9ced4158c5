"""A recorded run of one query, from which every intervention on it starts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache

from factscope.interventions.weights import WeightDelta, overlay
from factscope.models.dispatch import Plan, Replacement, first
from factscope.models.handle import ModelHandle

Update = Literal["attention", "mlp"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Noise:
    """A change of the embedding module's output, before positions are added (causal tracing, Meng et al. 2022).

    Attributes:
        positions: whose embeddings change.
        values: float64, added to them, or put in their place. One sample is one row of the base run.
    """

    positions: tuple[int, ...]
    values: Float[Tensor, "sample position d_model"]
    replace: bool = False

    def apply(self, embedded: Float[Tensor, "sample position d_model"]) -> Float[Tensor, "sample position d_model"]:
        """The changed embeddings; the sum is made in float64 and rounded once."""
        where = list(self.positions)
        changed = embedded.clone()
        values = self.values.to(embedded.device)
        changed[:, where] = (values if self.replace else embedded[:, where].double() + values).to(embedded.dtype)
        return changed


@dataclass(frozen=True, kw_only=True, eq=False)
class Base:
    """One recorded forward of one sequence, one row per noise sample (one row without noise).

    Attributes:
        ids: token ids, the prompt and, where a whole answer is scored, its tokens but the last.
        n_readout: how many last positions are read out (1, or the number of answer tokens).
        logits: at these positions.
        states: input of every block, and the last block's output behind them; fewer where runs are to end earlier.
        updates: per site, what attention or MLP adds in each layer; only what was asked for.
        allowed: per layer, which edges the model's own mask leaves open; empty where nothing can be cut.
        keys, values: per layer, as the model caches them; empty where the family has no such cache.
        noise, deltas: under which the run was recorded; they hold for every intervention on it.
        reads_states: runs on it are read out as states of its last block, not as logits.
    """

    ids: Int[Tensor, " position"]
    n_readout: int
    logits: Float[Tensor, "sample readout vocabulary"]
    states: tuple[Float[Tensor, "sample position d_model"], ...]
    updates: Mapping[Update, tuple[Float[Tensor, "sample position d_model"], ...]] = field(default_factory=dict)
    allowed: tuple[Bool[Tensor, "query key"], ...] = ()
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    noise: Noise | None = None
    deltas: tuple[WeightDelta, ...] = ()
    reads_states: bool = False

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.ids.shape[0]

    @property
    def n_samples(self) -> int:
        """Rows of the recorded run."""
        return self.logits.shape[0]

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.states) - 1

    @property
    def first_noisy(self) -> int:
        """Positions before this one are as in a run without noise."""
        return self.length if self.noise is None else min(self.noise.positions, default=self.length)

    def up_to(self, layer: int) -> Base:
        """The same record as if the model ended behind this block: what runs on it come to is that block's output."""
        return replace(self, states=self.states[: layer + 2], reads_states=True)

    def plan(self, **fields: Any) -> Plan:
        """A plan for a forward under this base's edits."""
        return Plan(added=overlay(self.deltas), **fields)


def outline_base(
    model: ModelHandle, ids: Sequence[int], *, n_readout: int = 1, deltas: Sequence[WeightDelta] = ()
) -> Base:
    """A base of which nothing is recorded yet: its sizes only."""
    empty = torch.empty(1, 0, 0, device=model.device)
    return Base(
        ids=torch.tensor(list(ids), device=model.device),
        n_readout=n_readout,
        logits=empty,
        states=(empty,) * (model.info.n_layers + 1),
        deltas=tuple(deltas),
    )


def record_base(
    model: ModelHandle,
    ids: Sequence[int],
    *,
    n_readout: int = 1,
    noise: Noise | None = None,
    deltas: Sequence[WeightDelta] = (),
    updates: Collection[Update] = (),
) -> Base:
    """Run the model once, under noise and edits where there are any, and keep what later runs start from.

    Raises:
        CapabilityError: updates are asked of a model without an additive split.
    """
    if updates:
        model.require("additive", "patches of attention and MLP updates")
    n_samples = 1 if noise is None else noise.values.shape[0]
    tokens = torch.tensor([list(ids)] * n_samples, device=model.device)
    layers = range(model.info.n_layers)
    cuttable = model.capabilities["knockout"].ok
    wanted = {("input", layer) for layer in layers} | {("output", layers[-1])}
    wanted |= {(site, layer) for layer in layers for site in updates}
    wanted |= {("allowed", layer) for layer in layers if cuttable}
    plan = Plan(added=overlay(deltas), capture=frozenset(wanted), embedding=None if noise is None else noise.apply)
    suffix = model.capabilities["suffix"].ok
    cache: Any = DynamicCache() if suffix else None
    logits = model.forward(tokens, plan, cache=cache, last=n_readout)
    seen = plan.captured

    def of(site: str) -> tuple[Tensor, ...]:
        shape = (*tokens.shape, -1)
        return tuple(first(seen[site, layer]).reshape(shape) for layer in layers)

    return Base(
        ids=tokens[0],
        n_readout=n_readout,
        logits=logits,
        states=(*(seen["input", layer] for layer in layers), seen["output", layers[-1]]),
        updates={site: of(site) for site in updates},
        allowed=tuple(seen["allowed", layer] for layer in layers) if cuttable else (),
        keys=tuple(layer.keys for layer in cache.layers) if suffix else (),
        values=tuple(layer.values for layer in cache.layers) if suffix else (),
        noise=noise,
        deltas=tuple(deltas),
    )


def replacement(base: Base, found: Sequence[tuple[int, Sequence[int], Tensor]], begin: int) -> Replacement:
    """What runs put in at one site of one layer, in rows of runs times samples.

    Args:
        found: run, positions and values [sample, position, d_model]; of two at one place the later one holds.
        begin: the first position that the forward computes.
    """
    taken: set[tuple[int, int]] = set()
    rows, positions, values = [], [], []
    samples = torch.arange(base.n_samples)
    for run, places, given in reversed(found):
        kept = [i for i, place in enumerate(places) if (run, place) not in taken]
        taken.update((run, place) for place in places)
        where = torch.tensor([places[i] for i in kept], dtype=torch.long) - begin
        rows.append((run * base.n_samples + samples).repeat_interleave(len(kept)))
        positions.append(where.repeat(base.n_samples))
        values.append((given if len(kept) == len(places) else given[:, kept]).flatten(0, 1))
    device = base.logits.device
    return Replacement(
        rows=torch.cat(rows).to(device),
        positions=torch.cat(positions).to(device),
        values=torch.cat(values),
        length=base.length - begin,
    )

"""Rows run again and again from an edited layer on, with gradients: what a change there makes of the logits.

A change of what one layer's MLP writes at one token reaches nothing below that layer and nothing before that token. So
one ordinary forward is recorded, and every further one starts at the layer, from its recorded input, with the keys and
values of earlier positions as they were. All rows share a forward, each from its own edited token on: recorded keys
and values are shifted to end there, and what is left in front of them is masked. That forward is compared with the
recorded one; where a family gives other logits, rows share a forward from the first of their edited tokens on, and
which rows do is chosen so that few positions are computed twice. The head sees the positions that are read, no others.

What the MLP writes reaches the stream as it is, or times a number that is measured (``multiplier``); then the layer
itself need not be run either. Behind a norm after the MLP (Gemma 2, OLMo 2) it is.

Where a model cannot resume or cannot use recorded keys and values, more of it is run; the numbers are the same. Weights
ask for no gradients, no hook is added, and nothing is left behind: the change is a function in the plan of a forward.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from factscope.editors.noise import RowNoise
from factscope.editors.prompts import Rows
from factscope.interventions.weights import WeightDelta, overlay
from factscope.models.dispatch import Plan, Stopped
from factscope.models.handle import ModelHandle

logger = logging.getLogger(__name__)

FORWARD_TOKENS = 24
"""Tokens that take as long as a forward's own overhead: below, two groups of rows are run as one."""
Added = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Group:
    """Rows that share a forward, from position ``begin`` on.

    Attributes:
        rows: which. ``at``: their edited tokens, counted from ``begin``.
        states: what enters the first block that is run. ``keys``, ``values``: of the positions before, per layer.
        places: where the tokens stand, where rows begin at different ones. ``keep``: False for the keys in front of a
            row's own.
    """

    rows: list[int]
    begin: int
    ids: Tensor
    at: Tensor
    read: Tensor
    states: Tensor | None
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    places: Int[Tensor, "row position"] | None = None
    keep: Bool[Tensor, "row 1 position key"] | None = None


class Suffix:
    """Rows, recorded once, to be run from a layer's MLP on.

    Args:
        layer: whose MLP writes something else.
        multiplier: how many times what it writes the stream gets; None where that is not linear.
        deltas: edits under which everything runs.
        noise: of the embeddings, if there is any.
        everywhere: the change is not at the edited tokens alone, so that every position is computed.
        pause: called between forwards; may raise to end it.
    """

    def __init__(
        self,
        model: ModelHandle,
        rows: Rows,
        layer: int,
        *,
        multiplier: float | None = None,
        deltas: Sequence[WeightDelta] = (),
        noise: RowNoise | None = None,
        everywhere: bool = False,
        pause: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._rows, self._layer = model, rows, layer
        self._noise, self._overlay = noise, overlay(deltas)
        fresh = noise is not None and noise.fresh
        self._resumes = model.capabilities["resume"].ok and not fresh
        cached = self._resumes and model.capabilities["suffix"].ok and not everywhere
        self._behind = self._resumes and multiplier is not None and not everywhere
        self._multiplier = multiplier or 1.0
        self._start = (layer + self._behind) if self._resumes else 0
        states, keys, values = self._record(cached) if self._resumes else (None, (), ())
        pause()
        if states is not None and states.dim() != 3:
            self._resumes = self._behind = False
            self._start, states, keys, values = 0, None, (), ()
        together = self._together(states, keys, values) if cached and states is not None and keys else None
        pause()
        if together is not None:
            self._groups = [together]
            return
        parted = _parted(rows, cached and bool(keys))
        self._groups = [self._group(chosen, begin, states, keys, values) for chosen, begin in parted]

    @property
    def n_tokens(self) -> int:
        """Tokens that one evaluation computes."""
        return sum(group.ids.numel() for group in self._groups)

    def with_value(
        self, change: Float[Tensor, " d_out"], *, in_stream: bool = False
    ) -> Float[Tensor, "row place vocabulary"]:
        """Logits where each row's MLP writes so much more at its edited token.

        Args:
            in_stream: the change is what the residual stream gets, not what the down-projection gives.
        """
        written = change / self._multiplier if in_stream else change

        def put(group: _Group) -> Added:
            def added(x: Tensor) -> Tensor:
                shape = (len(group.rows), group.ids.shape[1], written.shape[0])
                spread = written.to(x).expand(shape[0], -1)
                where = torch.arange(shape[0], device=x.device), group.at.to(x.device)
                return x.new_zeros(shape).index_put(where, spread).reshape(*x.shape[:-1], -1)

            return added

        def moved(group: _Group) -> Tensor:
            assert group.states is not None
            where = torch.arange(len(group.rows), device=change.device), group.at
            got = change if in_stream else change * self._multiplier
            spread = got.to(group.states).expand(len(group.rows), -1)
            return group.states.index_put(where, spread, accumulate=True)

        if self._behind:
            return self._run(lambda group: ({}, moved(group)))
        return self._run(lambda group: ({self._layer: put(group)}, group.states))

    def with_maps(self, changes: dict[int, Added]) -> Float[Tensor, "row place vocabulary"]:
        """Logits where down-projections give so much more, as a function of what they are given."""
        return self._run(lambda group: (changes, group.states))

    def _run(self, change: Callable[[_Group], tuple[dict[int, Added], Tensor | None]]) -> Tensor:
        parts, layers = [], range(self._start, self._model.info.n_layers)
        for group in self._groups:
            added, states = change(group)
            plan = Plan(
                start_layer=self._start,
                resume=states,
                added=self._with_overlay(added),
                embedding=None if self._resumes or self._noise is None else self._noise.on(group.rows),
                read=group.read,
                keep={} if group.keep is None else dict.fromkeys(layers, group.keep),
            )
            cache = self._cache(group)
            logits = self._model.forward(group.ids, plan, cache=cache, positions=group.places, gradients=True)
            if self._model.parts.wiring.head is None:
                logits = logits.gather(1, group.read[..., None].expand(-1, -1, logits.shape[-1]))
            parts.append(logits)
        order = torch.tensor([row for group in self._groups for row in group.rows], device=self._model.device)
        return torch.cat(parts)[order.argsort()]

    def _with_overlay(self, added: dict[int, Added]) -> dict[tuple[str, int], Added]:
        together = dict(self._overlay)
        for layer, new in added.items():
            at = "down_projection", layer
            together[at] = new if at not in together else _sum(together[at], new)
        return together

    # ------------------------------------------------------------------ the record

    def _record(self, cached: bool) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        n = self._model.info.n_layers
        site = ("input", self._start) if self._start < n else ("output", n - 1)
        plan = Plan(
            capture=frozenset({site}),
            added=self._overlay,
            embedding=None if self._noise is None else self._noise.on(range(len(self._rows.at))),
            read=self._rows.read,
        )
        cache: Any = DynamicCache() if cached else None
        self._recorded = self._model.forward(self._rows.ids, plan, cache=cache)
        if cache is None:
            return plan.captured[site], (), ()
        return plan.captured[site], tuple(e.keys for e in cache.layers), tuple(e.values for e in cache.layers)

    def _group(
        self,
        chosen: list[int],
        begin: int,
        states: Tensor | None,
        keys: tuple[Tensor, ...],
        values: tuple[Tensor, ...],
    ) -> _Group:
        rows, end = self._rows, max(self._rows.lengths[row] for row in chosen)
        device = self._model.device
        return _Group(
            rows=chosen,
            begin=begin,
            ids=rows.ids[chosen, begin:end],
            at=torch.tensor([rows.at[row] - begin for row in chosen], device=device),
            read=rows.read[chosen] - begin,
            states=None if states is None else states[chosen, begin:end].clone(),
            keys=tuple(one[chosen, :, :begin] for one in keys),
            values=tuple(one[chosen, :, :begin] for one in values),
        )

    def _together(self, states: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> _Group | None:
        """All rows in one forward, each from its edited token on; None where that gives other logits."""
        rows, model = self._rows, self._model
        begins = torch.tensor(rows.at, device=states.device)
        lengths = torch.tensor(rows.lengths, device=states.device)
        front, length = int(begins.max()), int((lengths - begins).max())
        if front == 0 or model.parts.wiring.head is None or not model.capabilities["knockout"].ok:
            return None
        steps = torch.arange(length, device=states.device)
        places = torch.minimum(begins[:, None] + steps, lengths[:, None] - 1)
        earlier = torch.arange(front, device=states.device) - (front - begins[:, None])  # negative: in front of a row

        def shifted(one: Tensor) -> Tensor:
            where = earlier.clamp(min=0)[:, None, :, None].expand(-1, one.shape[1], -1, one.shape[3])
            return one.gather(2, where)

        own = torch.ones(length, length, dtype=torch.bool, device=states.device).expand(len(rows.at), 1, -1, -1)
        before = (earlier >= 0)[:, None, None].expand(-1, 1, length, -1)
        group = _Group(
            rows=list(range(len(rows.at))),
            begin=front,
            ids=rows.ids.gather(1, places),
            at=torch.zeros_like(begins),
            read=rows.read - begins[:, None],
            states=states.gather(1, places[..., None].expand(-1, -1, states.shape[-1])),
            keys=tuple(map(shifted, keys)),
            values=tuple(map(shifted, values)),
            places=places,
            keep=torch.cat([before, own.tril()], dim=-1),
        )
        self._groups = [group]
        try:
            with torch.no_grad():
                found = self._run(lambda group: ({}, group.states))
        except Exception as error:  # any failure: rows that begin alike go together
            logger.debug("%s: no common forward (%s)", model.info.name, error)
            return None
        half = model.info.dtype in ("bfloat16", "float16")
        share = max(1e-4, 8 * float(torch.finfo(getattr(torch, model.info.dtype)).eps)) if half else 1e-4
        off = float((found - self._recorded).abs().max())
        return group if off <= share * max(1.0, float(self._recorded.abs().max())) else None

    def _cache(self, group: _Group) -> DynamicCache | None:
        """A fresh shell around the recorded keys and values, since a forward writes into it."""
        if group.begin == 0:
            return None
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(group.keys, group.values, strict=True)):
            entry = DynamicLayer()
            entry.lazy_initialization(keys, values)
            if layer < self._start:  # skipped: of the right length, since masks and positions are derived from it
                keys = values = keys.new_zeros(1).expand(len(group.rows), 1, group.begin, 1)
            entry.keys, entry.values = keys, values
            cache.layers.append(entry)
        return cache


def _sum(one: Added, other: Added) -> Added:
    return lambda x: one(x) + other(x)


def _parted(rows: Rows, cached: bool) -> list[tuple[list[int], int]]:
    """Rows that share a forward, with the first position that it computes; the least work in all."""
    order = sorted(range(len(rows.at)), key=lambda row: rows.at[row])
    if not cached:
        return [(order, 0)]
    best: list[tuple[int, list[tuple[list[int], int]]]] = [(0, [])]
    for stop in range(1, len(order) + 1):
        options = []
        for start in range(stop):
            chosen, begin = order[start:stop], rows.at[order[start]]
            tokens = len(chosen) * (max(rows.lengths[row] for row in chosen) - begin)
            work, before = best[start]
            options.append((work + tokens + FORWARD_TOKENS, [*before, (chosen, begin)]))
        best.append(min(options, key=lambda option: option[0]))
    return best[-1][1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Read:
    """What a down-projection is given and gives at each row's edited token, and the stream behind its block."""

    keys: Float[Tensor, "row d_in"]
    outputs: Float[Tensor, "row d_out"]
    stream: Float[Tensor, "row d_model"]


def read(
    model: ModelHandle,
    rows: Rows,
    layers: Sequence[int],
    *,
    deltas: Sequence[WeightDelta] = (),
    noise: RowNoise | None = None,
) -> dict[int, Read]:
    """Keys, outputs and streams at some layers, in one forward that ends behind the last of them."""
    sites = [(site, layer) for layer in layers for site in ("neurons", "written", "output")]
    plan = Plan(
        added=overlay(deltas),
        capture=frozenset(sites),
        embedding=None if noise is None else noise.on(range(len(rows.at))),
        stop_after=max(layers),
    )
    with suppress(Stopped):
        model.forward(rows.ids, plan, last=1)
    where = torch.arange(len(rows.at)), torch.tensor(rows.at)

    def at(site: str, layer: int) -> Tensor:
        return plan.captured[site, layer].reshape(*rows.ids.shape, -1)[where].to(model.device)

    return {
        layer: Read(keys=at("neurons", layer), outputs=at("written", layer), stream=at("output", layer))
        for layer in layers
    }


def multiplier(model: ModelHandle, layer: int, deltas: Sequence[WeightDelta] = ()) -> float | None:
    """How many times what a layer's MLP writes the residual stream gets; None where that is no constant.

    Measured: a random vector, and twice it, added to the down-projection's output at one token.
    """
    ids = model.probe
    together = overlay(deltas)
    width = read(model, _probe_rows(ids), (layer,)).popitem()[1].outputs.shape[-1]
    generator = torch.Generator().manual_seed(5)
    vector = torch.randn(width, generator=generator).to(model.device)

    def stream(times: float) -> Tensor:
        def added(x: Tensor) -> Tensor:
            change = x.new_zeros(*ids.shape, width)
            change[0, -1] = times * vector.to(x)
            return change.reshape(*x.shape[:-1], width)

        at = "down_projection", layer
        changed: dict[tuple[str, int], Added] = {**together, at: _sum(together[at], added) if at in together else added}
        plan = Plan(added=changed, capture=frozenset({("output", layer)}), stop_after=layer)
        with suppress(Stopped):
            model.forward(ids, plan, last=1)
        return plan.captured["output", layer].reshape(*ids.shape, -1)[0, -1].double()

    plain, once, twice = stream(0.0), stream(1.0), stream(2.0)
    vector = vector.double()
    if plain.shape != vector.shape:
        return None
    found = float(((once - plain) @ vector) / (vector @ vector))
    half = model.info.dtype in ("bfloat16", "float16")
    eps = float(torch.finfo(getattr(torch, model.info.dtype)).eps) if half else 1e-5
    allowed = 8 * eps * float(twice.norm() + plain.norm())
    off = max(float((once - plain - found * vector).norm()), float((twice - plain - 2 * found * vector).norm()))
    if not off <= allowed or abs(found) < 1e-6:
        return None
    return 1.0 if abs(found - 1.0) <= 4 * eps else found


def _probe_rows(ids: Tensor) -> Rows:
    length = ids.shape[1]
    return Rows(
        ids=ids,
        lengths=(length,),
        subjects=((0, 1),),
        at=(length - 1,),
        read=torch.tensor([[length - 1]], device=ids.device),
        essence=False,
    )

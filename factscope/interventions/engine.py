"""Run many interventions on one query, exactly, without computing what cannot change.

A ``Base`` is one recorded forward. An intervention changes nothing below its first layer and nothing before its first
position, so a run starts there: blocks below are skipped, the recorded input of that block is put in, and keys and
values of earlier positions come from the record. Equal runs are run once.

Two paths give the same numbers. The fast one sends all runs through the layers together (``sweep``); it is for families
whose attention goes through transformers' interface, verified on load. The universal one gives each run rows of its
own in the model's own forward: on a cached prefix (``suffix``), all positions from the first changed layer (``resume``)
or the whole forward. It is the plain computation that the fast path is tested against, and takes over where a sweep is
refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from factscope.errors import SpecError
from factscope.interventions.attention import Cut, keep_masks
from factscope.interventions.base import Base, outline_base, record_base, replacement
from factscope.interventions.intervention import Intervention
from factscope.interventions.packing import Joining
from factscope.interventions.sweep import Ride, Sweep, SweepRefused, supports
from factscope.interventions.weights import WeightDelta
from factscope.models.dispatch import Replacement, Stopped
from factscope.models.handle import ModelHandle
from factscope.models.head import Scores, scores_of_logits, scores_of_states

logger = logging.getLogger(__name__)

WAVE_WORK = 150_000_000_000
"""Floating-point operations after which a wave of runs ends and its numbers are handed over: a second or two. The first
wave is half as long, so that there is something to see."""
WAVE_BYTES = 192 * 2**20
"""Bytes that the widest layer of one wave may take."""
WAVE_TOKENS = 8192
"""Tokens of one wave in its widest layer: also in a narrow model a layer is through in a tenth of a second."""
MAX_ROWS, MIN_ROWS = 192, 8
"""Rows of a forward on the universal path: products of fewer than some 200 rows leave a core half idle."""
CHUNK_WORK = 50_000_000_000
"""Floating-point operations of one forward on the universal path."""
CACHE_BUDGET = 256 * 2**20
"""Bytes that the copied keys and values of one such forward may take."""

Step = Callable[[], None]
"""Called between layers; may raise to end the computation."""


def no_step() -> None:
    """A step that does nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Readout:
    """What runs came to at the read-out positions: final states, or logits where the model takes no states in.

    On a base that ends before the model does they are its last block's states, and scores are those of a lens on them.

    Attributes:
        pick: row of each run; equal runs share one.
    """

    model: ModelHandle
    pick: list[int]
    states: Float[Tensor, "row sample readout d_model"] | None = None
    whole: Float[Tensor, "row sample readout vocabulary"] | None = None

    def scores(self, ids: Sequence[int]) -> Scores:
        """Scores [run, sample] of the tokens, token ``ids[i]`` at read-out position i."""
        if self.states is None:
            assert self.whole is not None
            found = scores_of_logits(self.whole, ids)
            return Scores(logit=found.logit[self.pick], others=found.others[self.pick])
        rows, samples = self.states.shape[:2]
        found = scores_of_states(self.model, self.states.flatten(0, 1), ids)
        logit, others = (part.view(rows, samples, -1)[self.pick] for part in (found.logit, found.others))
        return Scores(logit=logit, others=others)

    def final_states(self) -> Float[Tensor, "run sample readout d_model"]:
        """States of all runs; always there on a base that is read out as states."""
        assert self.states is not None
        return self.states[self.pick]

    def logits(self) -> Float[Tensor, "run sample readout vocabulary"]:
        """Whole logits of all runs; large."""
        if self.states is None:
            assert self.whole is not None
            return self.whole[self.pick]
        rows, samples = self.states.shape[:2]
        return self.model.logits(self.states.flatten(0, 1)).unflatten(0, (rows, samples))[self.pick]


def refuse_empty_rows(base: Base, runs: Sequence[Intervention]) -> None:
    """Refuse a cut that leaves some position of some head nothing to attend to.

    Raises:
        SpecError: names the layer and the position.
    """
    open_keys: dict[tuple[int, int], frozenset[int]] = {}
    for cuts in {frozenset(run.cuts) for run in runs}:
        by_row: dict[tuple[int, int], list[Cut]] = {}
        for cut in cuts:
            for query in cut.queries:
                by_row.setdefault((cut.layer, query), []).append(cut)
        for (layer, query), row in by_row.items():
            if (layer, query) not in open_keys:
                open_keys[layer, query] = frozenset(base.allowed[layer][query].nonzero().flatten().tolist())
            if sum(len(cut.keys) for cut in row) < len(open_keys[layer, query]):
                continue
            named = {head for cut in row for head in cut.heads or ()}
            for head in named or {None}:
                keys = {key for cut in row for key in cut.keys if cut.heads is None or head in cut.heads}
                if open_keys[layer, query] <= keys:
                    raise SpecError(
                        f"cutting {sorted(keys)} leaves position {query} nothing to attend to in layer {layer}",
                        "keep at least one token that it may attend to",
                    )


Answers = Iterator[tuple[list[int], Readout]]
"""Indices of the interventions that are answered, and their read-outs."""


def run(model: ModelHandle, base: Base, interventions: Sequence[Intervention], *, step: Step = no_step) -> Answers:
    """What the runs come to, some at a time.

    Args:
        step: called between layers and sublayers.

    Yields:
        The indices of the interventions that are answered, and their read-outs. Waves follow the given order.
    """
    order, nothing = _different(base, interventions)
    if nothing:
        plain = base.states[-1][:, -base.n_readout :] if base.reads_states else base.logits
        yield nothing, _readout(model, base, [0] * len(nothing), plain[None])
    yield from _run_waves(model, base, order, list(order), step)


def record_and_run(
    model: ModelHandle,
    ids: Sequence[int],
    interventions: Sequence[Intervention],
    *,
    n_readout: int = 1,
    deltas: Sequence[WeightDelta] = (),
    step: Step = no_step,
) -> tuple[Base, Answers]:
    """Record the base and run interventions on it; where they change the last position alone, in one and the same pass.

    Args:
        step: called between layers and sublayers.
    """
    outline = outline_base(model, ids, n_readout=n_readout, deltas=deltas)
    order, nothing = _different(outline, interventions)
    riders = next(_waves(model, outline, list(order)), [])
    if model.rides and riders and Ride.carries(riders, outline):
        try:
            base, states = Ride(model, outline, riders, step).record()
        except SweepRefused as refused:
            logger.warning("%s: runs go after the plain forward, since %s", model.info.name, refused)
        else:
            return base, _after_ride(model, base, order, nothing, riders, states, step)
    base = record_base(model, ids, n_readout=n_readout, deltas=deltas)
    return base, run(model, base, interventions, step=step)


def _after_ride(
    model: ModelHandle,
    base: Base,
    order: dict[Intervention, list[int]],
    nothing: list[int],
    riders: Sequence[Intervention],
    states: Tensor,
    step: Step,
) -> Answers:
    if nothing:
        yield nothing, Readout(model=model, pick=[0] * len(nothing), whole=base.logits[None])
    indices, pick = _places(riders, order)
    yield indices, Readout(model=model, pick=pick, states=states)
    yield from _run_waves(model, base, order, list(order)[len(riders) :], step)


def _different(base: Base, interventions: Sequence[Intervention]) -> tuple[dict[Intervention, list[int]], list[int]]:
    """Different runs with the indices of the interventions that they answer, and those that change nothing."""
    order: dict[Intervention, list[int]] = {}
    nothing: list[int] = []
    for index, intervention in enumerate(interventions):
        effective = intervention.effective(base)
        (order.setdefault(effective, []) if effective.changes else nothing).append(index)
    return order, nothing


def _run_waves(
    model: ModelHandle, base: Base, order: dict[Intervention, list[int]], runs: list[Intervention], step: Step
) -> Answers:
    joining = Joining(model, base)
    for wave in _waves(model, base, runs):
        groups = _groups(base, wave)
        if supports(model, base):
            try:
                states = Sweep(model, base, groups, joining, step).run()
            except SweepRefused as refused:
                logger.warning("%s: one row per run instead, since %s", model.info.name, refused)
            else:
                indices, pick = _places([run_ for _, some in groups for run_ in some], order)
                yield indices, Readout(model=model, pick=pick, states=states)
                continue
        for begin, alike in groups:
            size = _rows(model, base, begin)
            for first in range(0, len(alike), size):
                step()
                some = alike[first : first + size]
                indices, pick = _places(some, order)
                yield indices, _readout(model, base, pick, run_rows(model, base, some, begin))


def _readout(model: ModelHandle, base: Base, pick: list[int], found: Tensor) -> Readout:
    """What the universal path gives: logits, or states of the base's last block."""
    if base.reads_states:
        return Readout(model=model, pick=pick, states=found)
    return Readout(model=model, pick=pick, whole=found)


def _places(runs: Sequence[Intervention], order: dict[Intervention, list[int]]) -> tuple[list[int], list[int]]:
    """Indices of the interventions that some runs answer, and the run of each."""
    where = [(index, row) for row, run_ in enumerate(runs) for index in order[run_]]
    return [index for index, _ in where], [row for _, row in where]


# ---------------------------------------------------------------------------- what is run together


def _waves(model: ModelHandle, base: Base, runs: list[Intervention]) -> Iterator[list[Intervention]]:
    """Runs in the given order, as many at a time as work and memory allow.

    Runs from one position share most of their work, so a wave may become twice as long to hold all of them.
    """
    operations = 2 * max(1, model.n_parameters - model.vocabulary * model.info.d_model) / model.info.n_layers
    scores = 3 * model.info.n_heads * base.length
    token_bytes = (12 * model.info.d_model + scores) * base.logits.element_size()
    wave: list[Intervention] = []
    work, size, limit = 0.0, 0, WAVE_WORK / 2
    most = min(WAVE_TOKENS, WAVE_BYTES / token_bytes)
    for run_ in runs:
        tokens = base.n_samples * (base.length - run_.first_position)
        cost = tokens * operations * (base.n_layers - run_.first_layer)
        alike = bool(wave) and wave[-1].first_position == run_.first_position
        if wave and (work + cost > limit * (1 + alike) or size + tokens > most):
            yield wave
            wave, work, size, limit = [], 0.0, 0, WAVE_WORK
        wave.append(run_)
        work, size = work + cost, size + tokens
    if wave:
        yield wave


def _groups(base: Base, wave: list[Intervention]) -> list[tuple[int, list[Intervention]]]:
    """Runs by the position from which they are computed."""
    at: dict[int, list[Intervention]] = {}
    for run_ in wave:
        at.setdefault(min(run_.first_position, base.length - base.n_readout), []).append(run_)
    return list(at.items())


# ---------------------------------------------------------------------------- the universal path


def _rows(model: ModelHandle, base: Base, begin: int) -> int:
    """How many runs share a forward: their copies of cached keys and values and their work stay within the budgets."""
    copied = sum(k[0].numel() + v[0].numel() for k, v in zip(base.keys, base.values, strict=True))
    n_tokens = base.length - begin
    by_memory = CACHE_BUDGET // max(1, copied * base.logits.element_size())
    by_work = CHUNK_WORK // (2 * model.n_parameters * n_tokens)
    return max(1, min(MAX_ROWS, by_memory, max(MIN_ROWS, by_work)) // base.n_samples)


def run_rows(
    model: ModelHandle, base: Base, runs: Sequence[Intervention], begin: int
) -> Float[Tensor, "run sample readout value"]:
    """Logits of runs that have rows of their own in one forward, from position ``begin`` on where that can be.

    Where the base says so, states of its last block.
    """
    resumes = model.capabilities["resume"].ok and base.states[0].dim() == 3
    begin = begin if base.keys and resumes else 0
    n, last = base.n_layers, model.info.n_layers - 1
    highest = last if base.reads_states else n
    start = min(highest, *(run_.first_layer for run_ in runs)) if resumes else 0
    n_samples, rows = base.n_samples, len(runs) * base.n_samples
    masks = keep_masks([run_.cuts for run_ in runs], base.length, begin, model.info.n_heads, model.device)
    read = ("input", n) if n <= last else ("output", last)
    plan = base.plan(
        start_layer=start,
        stop_after=min(n, last) if base.reads_states else None,
        capture=frozenset({read} if base.reads_states else ()),
        resume=_repeated(base.states[start][:, begin:], rows) if resumes else None,
        keep={layer: mask.repeat_interleave(n_samples, dim=0) for layer, mask in masks.items()},
        replace=_replacements(base, runs, begin),
        embedding=None if base.noise is None or resumes else _on_all(base, len(runs)),
    )
    cache = prefix_cache(base, start, begin, rows) if begin > 0 else None
    ids = base.ids[None, begin:].expand(rows, -1)
    if not base.reads_states:
        return model.forward(ids, plan, cache=cache, last=base.n_readout).unflatten(0, (len(runs), n_samples))
    with suppress(Stopped):
        model.forward(ids, plan, cache=cache, last=1)
    return plan.captured[read][:, -base.n_readout :].unflatten(0, (len(runs), n_samples))


def _on_all(base: Base, runs: int) -> Callable[[Tensor], Tensor]:
    """The base's noise, for the same samples of every run."""

    def apply(embedded: Tensor) -> Tensor:
        assert base.noise is not None
        return torch.cat([base.noise.apply(part) for part in embedded.chunk(runs)])

    return apply


def _replacements(base: Base, runs: Sequence[Intervention], begin: int) -> dict[tuple[str, int], Replacement]:
    """What is put in where, in the order in which each run names it."""
    by_site: dict[tuple[str, int], list[tuple[int, Sequence[int], Tensor]]] = {}
    for row, run_ in enumerate(runs):
        for patch in run_.patches:
            site = ("input", patch.layer + 1) if patch.site == "output" else (patch.site, patch.layer)
            by_site.setdefault(site, []).append((row, patch.positions, patch.values(base)))
    return {site: replacement(base, found, begin) for site, found in by_site.items()}


def _repeated(values: Tensor, rows: int) -> Tensor:
    """One row for each sample, repeated for as many runs as fill ``rows``; copied, since blocks may write."""
    return values.repeat(rows // values.shape[0], *[1] * (values.dim() - 1))


def prefix_cache(base: Base, start_layer: int, begin: int, rows: int) -> DynamicCache:
    """Keys and values of the positions before ``begin``, shared by ``rows`` rows (runs times samples).

    Skipped layers get placeholders of the right length: masks and positions are derived from the cache's length, and
    empty lower layers would make them silently wrong. A plain cache keeps every key, also of sliding layers.
    """
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(base.keys, base.values, strict=True)):
        entry = DynamicLayer()
        entry.lazy_initialization(keys, values)
        if layer < start_layer:
            placeholder = keys.new_zeros(1).expand(rows, 1, begin, 1)
            entry.keys, entry.values = placeholder, placeholder
        else:
            entry.keys, entry.values = (
                kept.expand(rows, -1, -1, -1) if kept.shape[0] == 1 else _repeated(kept, rows)
                for kept in (keys[:, :, :begin], values[:, :, :begin])
            )
        cache.layers.append(entry)
    return cache

"""Where is the answer taken out? The updates that attention and MLP write at the read-out, projected to the vocabulary.

Source: Geva et al. 2023 (arXiv 2304.14767), section 6.

1. An *extraction event* of a layer: the raw projection (output embedding times update) of what its attention (MHSA), or
   its MLP, adds at the last position has the target on top. Reported with the target's rank and score.
2. Edge variants: a layer is given its plain input, and in that layer alone the last position may not attend to some
   positions (``block:SET``) or to others than some (``keep:SET``). One softmax over what is left. ``block:all`` leaves
   the output bias, the null. Keeping one position sets its weight to 1, so what the kept positions contribute with the
   weights they had stands beside it (site ``contribution``).
3. Early states: at a set of positions, the states entering layer l are those that entered layer s < l; the attention
   update of layer l alone is read. Does the event stay?
4. Comparison: the target's rank in the subject's last state entering the layer, beside its rank in the update.

The target is the model's own first choice unless an answer is named. A token that ties with others is not on top.

``notebook`` does as the released code: blocked weights are set to -1e6 after the softmax, which is then taken again
over all weights; early layers s >= l are run too; the comparison takes the state behind layer l, which that update
never saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from factscope import measures
from factscope.errors import SpecError
from factscope.experiments.results import (
    Progress,
    Timed,
    resolve_target,
    silent,
    target_warnings,
    tokenized,
)
from factscope.interventions import engine
from factscope.interventions.attention import Cut, keep_masks
from factscope.interventions.base import Base, record_base, replacement
from factscope.interventions.intervention import Intervention
from factscope.models import splitting
from factscope.models.dispatch import Plan
from factscope.models.handle import ModelHandle, ModelInfo
from factscope.queries import Query
from factscope.tokens import Target, TokenizedQuery, token_text

Procedure = Literal["default", "notebook"]
PLAIN = "none"
VARIANTS = (
    PLAIN, "block:subject", "block:subject-last", "block:last", "block:subject-last+last", "block:relation",
    "block:relation+last", "keep:first", "keep:last", "keep:subject-last", "keep:subject-last+last", "block:all",
)  # fmt: skip
"""The published edge variants; any other sets can be named in the same way."""
EARLY_OF_48 = (0, 1, 5, 10, 20)
CONTRIBUTION = "contribution"
_BLOCKED = -1e6


@dataclass(frozen=True, kw_only=True)
class ExtractionSpec:
    """What the attention may read.

    Attributes:
        edges: "none", "block:SET", "keep:SET" or "block:all"; a SET is a name of positions ("subject", "relation",
            "last", "first", "subject-last", ...) or positions ("7", "3-5"), several joined by "+".
        early: a SET whose states are replaced by earlier ones, one early layer at a time, with every edge; empty for
            none.
        early_layers: which; None takes 0, 1, 5, 10 and 20 of 48 layers, scaled to the model's depth.
        procedure: "default", or "notebook" for that of the released code.
    """

    edges: str = PLAIN
    early: str = ""
    early_layers: tuple[int, ...] | None = None
    procedure: Procedure = "default"


@dataclass(frozen=True, kw_only=True, eq=False)
class ExtractionResult:
    """The grid [site, layer], and [early layer, layer] where earlier states are put in.

    Attributes:
        sites: "attention", "mlp", and with kept positions "contribution": theirs, with the weights they had.
        target_rank: [site, layer], from 1; tokens with the same score count as before it. 0 where not computed yet.
        target_score: [site, layer], of the raw projection.
        top_ids: [site, layer], the token on top.
        state_rank: [layer], of the target in the subject's last state entering the layer (``notebook``: behind it); 0
            without a subject.
        early_layers: rows of ``early_rank`` and ``early_score`` [early layer, layer], of the attention's update; 0 and
            NaN where the early layer is not below.
        p_target, rank: of the target in the plain run.
    """

    spec: ExtractionSpec
    query: TokenizedQuery
    model: ModelInfo
    target: Target
    p_target: float
    rank: int
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    target_rank: np.ndarray
    target_score: np.ndarray
    top_ids: np.ndarray
    state_rank: np.ndarray
    early_layers: tuple[int, ...]
    early_rank: np.ndarray
    early_score: np.ndarray
    texts: dict[int, tuple[str, str]]
    warnings: tuple[str, ...]
    seconds: float
    passes: int

    @property
    def extracted(self) -> np.ndarray:
        """Extraction events, [site, layer]."""
        return self.target_rank == 1

    @property
    def early_extracted(self) -> np.ndarray:
        """Events of the attention with earlier states put in, [early layer, layer]."""
        return self.early_rank == 1

    def first_layer(self, site: str) -> int | None:
        """The first layer with an event; None where there is none."""
        events = np.flatnonzero(self.extracted[self.sites.index(site)])
        return int(events[0]) if events.size else None

    def table(self) -> pd.DataFrame:
        """The contract's columns for ``extract``: one row per (site, layer), with early states (early layer, layer)."""
        return self.early_table() if self.spec.early else self.update_table()

    def update_table(self) -> pd.DataFrame:
        """One row per (site, layer)."""
        rows = [
            (site, layer, bool(self.extracted[i, j]), int(self.target_rank[i, j]), float(self.target_score[i, j]))
            for i, site in enumerate(self.sites)
            for j, layer in enumerate(self.layers)
            if self.target_rank[i, j]
        ]
        return pd.DataFrame(rows, columns=["site", "layer", "extracted", "target_rank", "target_score"])

    def early_table(self) -> pd.DataFrame:
        """One row per (early layer, layer)."""
        rows = [
            (early, layer, bool(rank == 1), int(rank), float(self.early_score[i, j]))
            for i, early in enumerate(self.early_layers)
            for j, (layer, rank) in enumerate(zip(self.layers, self.early_rank[i], strict=True))
            if rank
        ]
        return pd.DataFrame(rows, columns=["early_layer", "layer", "extracted", "target_rank", "target_score"])

    def comparison(self) -> pd.DataFrame:
        """Per layer, the target's rank in the subject's last state and in the attention's update; empty without one."""
        ranks = zip(self.layers, self.state_rank.tolist(), self.target_rank[0].tolist(), strict=True)
        rows = [(layer, state, update) for layer, state, update in ranks if state and update]
        return pd.DataFrame(rows, columns=["layer", "state_rank", "target_rank"])

    def summary(self) -> dict[str, Any]:
        """The first extracting layer of each site, and which earlier states still lead to an event."""
        found: dict[str, Any] = {"first_extracting_layer": {site: self.first_layer(site) for site in self.sites}}
        if self.early_layers:
            found["extracted_with_early_state"] = {
                str(early): bool((ranks == 1).any())
                for early, ranks in zip(self.early_layers, self.early_rank, strict=True)
            }
        return found


def run(
    model: ModelHandle,
    query: Query | TokenizedQuery,
    spec: ExtractionSpec | None = None,
    *,
    progress: Progress = silent,
) -> ExtractionResult:
    """Project what attention and MLP add at the read-out, layer by layer.

    Raises:
        InputError: the query or the spec cannot be used, or a cut leaves a layer nothing to attend to.
        CapabilityError: the updates cannot be told apart, or the attention cannot be cut.
    """
    spec = spec or ExtractionSpec()
    timed = Timed(progress)
    seen = tokenized(model, query)
    wanted = _Wanted(model, seen, spec)
    total = 1 + wanted.changes + len(wanted.early_layers)
    timed(0, total, None)
    base = record_base(model, seen.ids, updates=("attention", "mlp"))
    target = resolve_target(model, seen, base.logits[0, 0])
    grid = _Grid(model, target, wanted)
    rank = int(measures.rank(base.logits[0, 0], target.id))
    warnings = seen.warnings + target_warnings(model, seen, target) + wanted.warnings + _about(target, rank, seen)
    done = 1

    def snapshot() -> ExtractionResult:
        return grid.result(
            spec=spec, query=seen, model=model.info, target=target, rank=rank,
            p_target=float(measures.probability(base.logits[0, 0], target.id)),
            sites=wanted.sites, layers=tuple(range(model.info.n_layers)), early_layers=wanted.early_layers,
            warnings=warnings + grid.warnings, seconds=timed.seconds, passes=done,
        )  # fmt: skip

    if not wanted.changes:
        grid.fill(base.updates["attention"], base.updates["mlp"])
    grid.compare(base, seen, spec)
    timed(done, total, snapshot())
    if wanted.changes:
        grid.fill(*_with_edges(model, base, wanted))
        if CONTRIBUTION in wanted.sites:
            grid.contribute(_contributions(model, base, wanted.kept))
        done += 1
        timed(done, total, snapshot())
    for index, early in enumerate(wanted.early_layers):
        grid.early(index, early, _with_early_states(model, base, early, wanted.patched), every=wanted.every)
        done += 1
        timed(done, total, snapshot())
    return snapshot()


def default_early_layers(n_layers: int) -> tuple[int, ...]:
    """0, 1, 5, 10 and 20 of 48 layers, scaled to the depth, without repeats."""
    return tuple(sorted({round(layer * n_layers / 48) for layer in EARLY_OF_48} - {n_layers}))


def _about(target: Target, rank: int, query: TokenizedQuery) -> tuple[str, ...]:
    said: tuple[str, ...] = ()
    if rank > 1:
        said += (
            f"{target.text.strip()!r} is not the model's first choice (rank {rank}), for which extraction is defined",
        )
    if query.query.score == "sequence" and target.n_tokens > 1:
        said += (f"extraction follows the first of the {target.n_tokens} tokens of {target.text.strip()!r}",)
    return said


class _Wanted:
    """A spec on this prompt: which positions are blocked, kept and patched.

    Raises:
        SpecError, CapabilityError: it cannot be.
    """

    def __init__(self, model: ModelHandle, query: TokenizedQuery, spec: ExtractionSpec) -> None:
        if spec.procedure not in get_args(Procedure):
            raise SpecError(
                f"procedure {spec.procedure!r} is unknown", f"choose one of {', '.join(get_args(Procedure))}"
            )
        model.require("additive", "attribute extraction")
        model.require("lens", "attribute extraction")
        model.require_square_head(model.info.d_model)
        self.warnings: tuple[str, ...] = ()
        self.notebook = spec.procedure == "notebook"
        kind, colon, names = spec.edges.partition(":")
        self.changes = spec.edges != PLAIN
        self.all = spec.edges == "block:all"
        if self.changes and not (colon and names.strip() and kind in ("block", "keep")):
            raise SpecError(f"edges {spec.edges!r} are unknown", f"choose one of {', '.join(VARIANTS)}")
        everywhere = tuple(range(len(query.ids)))
        named = everywhere if self.all else positions(query, names) if self.changes else ()
        self.kept = named if kind == "keep" else ()
        self.blocked = tuple(p for p in everywhere if p not in named) if kind == "keep" else named
        self.sites: tuple[str, ...] = ("attention", "mlp")
        if self.changes and not self.all:
            model.require("sources" if self.notebook else "knockout", f"the edges {spec.edges}")
        if self.all:
            model.require("heads", "the output bias alone")
        if self.kept and model.capabilities["sources"].ok and model.capabilities["direct"].ok:
            self.sites += (CONTRIBUTION,)
        elif self.kept:
            lacking = next(c.reason for c in map(model.capabilities.get, ("sources", "direct")) if c and not c.ok)
            self.warnings += (f"no contribution of the kept positions with the weights they had: {lacking}",)
        self.early_layers, self.patched, self.every = (), (), self.notebook
        if spec.early:
            if self.changes:
                said = f"the edges {spec.edges!r} are not cut where earlier states of {spec.early!r} are put in"
                self.warnings += (said,)
            model.require("resume", "early states")
            self.patched = positions(query, spec.early)
            self.early_layers = _early_layers(spec.early_layers, model.info.n_layers)


def positions(query: TokenizedQuery, names: str) -> tuple[int, ...]:
    """Positions of sets joined by "+"; "first" is position 0, whatever stands there.

    Raises:
        SpecError: an unknown set, or one without a token in this prompt.
    """
    parts = [part.strip() for part in names.split("+")]
    found = {p for part in parts for p in ((0,) if part == "first" else query.positions(part))}
    if not found:
        raise SpecError(f"the set {names!r} has no token in this prompt", "choose another set or positions")
    return tuple(sorted(found))


def _early_layers(given: tuple[int, ...] | None, n_layers: int) -> tuple[int, ...]:
    if given is None:
        return default_early_layers(n_layers)
    for layer in given:
        if not 0 <= layer < n_layers:
            raise SpecError(f"early layer {layer} is not between 0 and {n_layers - 1}", "name layers of the model")
    return tuple(sorted(set(given)))


# ------------------------------------------------------------------------------------------------------- the runs

Updates = tuple[Sequence[Tensor], Sequence[Tensor]]
"""Attention's and MLP's, per layer [row, position, d_model]."""


def _with_edges(model: ModelHandle, base: Base, wanted: _Wanted) -> Updates:
    """Each layer on its plain input, the last position's attention changed in it alone: one forward for all layers."""
    last, layers = base.length - 1, range(base.n_layers)
    plan = _each_on(base, base.states[:-1])
    if wanted.all or wanted.notebook:
        plan.replace = {
            ("attention", layer): replacement(base, [(0, (last,), update[None, None])], 0)
            for layer, update in enumerate(_replaced_updates(model, base, wanted))
        }
    else:
        cut = layers if wanted.blocked else ()
        cuts = tuple(Cut(layer=layer, queries=(last,), keys=wanted.blocked) for layer in cut)
        engine.refuse_empty_rows(base, [Intervention(cuts=cuts)])
        plan.keep = keep_masks([cuts], base.length, 0, model.info.n_heads, model.device)
    return _updates(model, base, plan)


def _with_early_states(model: ModelHandle, base: Base, early: int, where: tuple[int, ...]) -> Sequence[Tensor]:
    """Attention updates of layers whose input has, at some positions, the states that entered an earlier layer."""
    states = [state.clone() for state in base.states[:-1]]
    for state in states:
        state[:, list(where)] = base.states[early][:, list(where)]
    return _updates(model, base, _each_on(base, states))[0]


def _each_on(base: Base, states: Sequence[Tensor]) -> Plan:
    """A forward in which every layer is given states of its own; its updates are read."""
    wanted = frozenset((site, layer) for site in ("attention", "mlp") for layer in range(base.n_layers))
    return base.plan(capture=wanted, enter=lambda layer, hidden: states[layer].clone())


def _updates(model: ModelHandle, base: Base, plan: Plan) -> Updates:
    model.forward(base.ids[None], plan, last=1)
    shape = (1, base.length, -1)
    attention, mlp = (
        [plan.captured[site, layer].reshape(shape) for layer in range(base.n_layers)] for site in ("attention", "mlp")
    )
    return attention, mlp


def _replaced_updates(model: ModelHandle, base: Base, wanted: _Wanted) -> list[Tensor]:
    """Per layer, the attention's update at the read-out made from the notebook's weights, or from no weight at all."""
    heads, rows = _heads_and_rows(model, base)
    given = None if wanted.all else splitting.values(model, base.ids, [state[0] for state in base.states[:-1]])
    found = []
    for layer in range(base.n_layers):
        mixed = torch.zeros_like(heads[layer])
        if given is not None:
            weights = rows[layer].clone()
            weights[:, list(wanted.blocked)] = _BLOCKED
            mixed = torch.einsum("hs,hsd->hd", weights.softmax(dim=-1), given[layer]).to(mixed.dtype)
        with torch.no_grad():
            projected = model.project(layer, mixed.flatten()[None])
        found.append(splitting.update_of(model, layer, projected)[0])
    return found


def _contributions(model: ModelHandle, base: Base, kept: tuple[int, ...]) -> list[Tensor]:
    """Per layer, the part of the plain update that comes from the kept positions; the bias belongs to none."""
    assert model.reach is not None
    given = splitting.values(model, base.ids, [state[0] for state in base.states[:-1]])
    heads, rows = _heads_and_rows(model, base)
    found = []
    for layer in range(base.n_layers):
        own = list(kept)
        mixed = torch.einsum("hs,hsd->hd", rows[layer][:, own], given[layer][:, own])
        parts, _ = splitting.split(model, layer, mixed.to(heads[layer].dtype))
        with torch.no_grad():
            projected = model.project(layer, heads[layer].flatten()[None])[0]
        scale = model.reach.scale_behind(layer, projected, base.updates["attention"][layer][0, -1])
        found.append(model.reach.into_stream(layer, parts.sum(dim=0), scale))
    return found


def _heads_and_rows(model: ModelHandle, base: Base) -> tuple[list[Tensor], list[Tensor]]:
    """Per layer, what the heads give at the read-out [head, size], and their weights [head, position] if told."""
    layers = range(base.n_layers)
    plan = base.plan(capture=frozenset((site, layer) for site in ("heads", "row") for layer in layers))
    model.forward(base.ids[None], plan, last=1)
    heads = [plan.captured["heads", layer] for layer in layers]
    shaped = [found.reshape(-1, found.shape[-1])[-1].reshape(model.info.n_heads, -1) for found in heads]
    return shaped, [plan.captured["row", layer][0].double() for layer in layers if ("row", layer) in plan.captured]


class _Grid:
    """Arrays that fill in as runs are done."""

    def __init__(self, model: ModelHandle, target: Target, wanted: _Wanted) -> None:
        self._model, self._target, self._sites = model, target.id, wanted.sites
        self.warnings: tuple[str, ...] = ()
        shape, early = (len(wanted.sites), model.info.n_layers), (len(wanted.early_layers), model.info.n_layers)
        self.target_rank, self.top_ids = (np.zeros(shape, dtype=np.int64) for _ in range(2))
        self.target_score, self.early_score = np.full(shape, np.nan), np.full(early, np.nan)
        self.early_rank = np.zeros(early, dtype=np.int64)
        self.state_rank = np.zeros(model.info.n_layers, dtype=np.int64)

    def fill(self, attention: Sequence[Tensor], mlp: Sequence[Tensor]) -> None:
        """Write down both sublayers' updates at the read-out."""
        for site, updates in (("attention", attention), ("mlp", mlp)):
            self._write(site, torch.stack([update[0, -1] for update in updates]))

    def contribute(self, parts: Sequence[Tensor]) -> None:
        """Write down what the kept positions contribute with the weights they had."""
        self._write(CONTRIBUTION, torch.stack(list(parts)))

    def compare(self, base: Base, query: TokenizedQuery, spec: ExtractionSpec) -> None:
        """Write down the target's rank in the subject's last state."""
        if query.subject is not None:
            behind = int(spec.procedure == "notebook")
            states = torch.stack([state[0, query.subject[1] - 1] for state in base.states])
            self.state_rank[:] = self._project(states[behind : behind + base.n_layers])[0]

    def early(self, index: int, early: int, updates: Sequence[Tensor], *, every: bool) -> None:
        """Write down the attention's updates with the states of one early layer put in."""
        rank, score, _ = self._project(torch.stack([update[0, -1] for update in updates]))
        begin = 0 if every else early + 1
        self.early_rank[index, begin:], self.early_score[index, begin:] = rank[begin:], score[begin:]

    def _write(self, site: str, updates: Tensor) -> None:
        row = self._sites.index(site)
        self.target_rank[row], self.target_score[row], self.top_ids[row] = self._project(updates)
        silent_ = [layer for layer, update in enumerate(updates) if not bool(update.any())]
        if silent_:
            where = "every layer" if len(silent_) == len(updates) else f"layers {', '.join(map(str, silent_))}"
            self.warnings += (f"the {site} update is zero in {where}: all tokens tie",)

    def _project(self, states: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rank and score of the target, and the token on top, of states [row, d_model]."""
        found = _unembedded(self._model, states)
        own = found[:, self._target, None]
        rank = (found >= own).sum(dim=-1)
        return rank.cpu().numpy(), own[:, 0].double().cpu().numpy(), found.argmax(dim=-1).cpu().numpy()

    def result(self, **axes: Any) -> ExtractionResult:
        arrays: dict[str, Any] = {n: a.copy() for n, a in vars(self).items() if isinstance(a, np.ndarray)}
        tokens = {*np.unique(arrays["top_ids"]).tolist(), self._target}
        texts = {token: token_text(self._model.tokenizer, token) for token in tokens}
        return ExtractionResult(**axes, **arrays, texts=texts)


def _unembedded(model: ModelHandle, states: Tensor) -> Tensor:
    """``E h``, of short weights in float32: their own type would round many tokens to one score, a tie."""
    weight: Tensor = cast(Any, model.parts.wiring.head).weight
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return model.unembed(states.to(weight.dtype))
    with torch.no_grad():
        return functional.linear(states.to(weight.device, torch.float32), weight.float())

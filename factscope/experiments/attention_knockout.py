"""Which tokens must be read, and when? Attention knockout.

Source: Geva et al. 2023 (arXiv 2304.14767), section 4.

1. Run the plain model; p_base is the target's probability at the last position, softmax over the full vocabulary.
2. For every source set and every window of layers, forbid attention from the target position to the sources in each
   layer of the window, in all heads or chosen ones. The remaining weights renormalise; nothing else changes.
3. Report p_knockout, the relative change in percent, and the change in log-odds, which does not saturate near 0 and 1;
   with a foil also the change of the logit difference, answer minus foil, each one's first token.

Controls: a row "control-N" cuts as many randomly drawn positions as the subject has, a row "relation-control-N" as many
as the relation, and so on; positions outside the set, matched for containing position 0 or not, never special ones or
the last. The map of single positions has the subject's alone. With free edges one run cuts all of them together. An
edge into the future does not exist: its change is 0 and a warning says so. Where the whole answer is scored, its tokens
are appended, and the cut holds for every position that reads out a token of it, unless a target position is named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from factscope import measures
from factscope.columns import control_name
from factscope.errors import SpecError
from factscope.experiments.results import (
    Progress,
    Timed,
    coarse_to_fine,
    foil_target,
    named_target,
    resolve_target,
    scored_ids,
    silent,
    target_warnings,
    tokenized,
)
from factscope.interventions import engine
from factscope.interventions.attention import Cut, default_flow_window, window
from factscope.interventions.intervention import Intervention
from factscope.models.handle import ModelHandle, ModelInfo
from factscope.models.head import Scores, scores_of_logits
from factscope.queries import Query
from factscope.tokens import Target, TokenizedQuery

EACH = "each"
MAX_CONTROLS = 100


@dataclass(frozen=True, kw_only=True)
class KnockoutSpec:
    """What to cut.

    Attributes:
        sources: names of position sets ("subject", "relation", "last", "subject-last", "special"), positions ("7",
            "3-5"), several joined by "+", or "each" for one run per position.
        target_position: the position that may not read them; None is the last.
        window: layers cut around each layer; None takes the default for the model's depth.
        heads: "LAYER.HEAD" or "LAYER.*"; empty cuts all heads, otherwise other layers of a window stay as they are.
        edges: "FROM:TO:LAYERS[:HEADS]" instead of sources and windows: FROM may not attend to TO; sets or positions,
            layers "3-6", "2,5" or "*", heads likewise.
        control: how many random position sets to cut beside each of them, matched to it.
        seed: of these draws.
    """

    sources: tuple[str, ...] = ("subject", "relation", "last")
    target_position: int | None = None
    window: int | None = None
    heads: tuple[str, ...] = ()
    edges: tuple[str, ...] = ()
    control: int = 0
    seed: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class KnockoutResult:
    """The grid [source, layer].

    Attributes:
        window: layers cut around each layer; for free edges the number of layers with a cut.
        sources: rows of the arrays; with "each" the positions as text. ``positions``: what each row cuts.
        layers: columns, the centres of the windows.
        p_base, log_odds_base: of the plain run. Probabilities are fractions, log-odds nats. ``rank``: of the target's
            first token in the plain run, from 1.
        p_knockout, log_odds: [source, layer]; NaN where not computed yet.
        foil: the competing answer, if one is named.
        logit_difference_base, logit_difference: logit of the answer's first token minus that of the foil's, of the
            plain run and [source, layer]; None without a foil.
    """

    spec: KnockoutSpec
    query: TokenizedQuery
    model: ModelInfo
    target: Target
    window: int
    sources: tuple[str, ...]
    positions: tuple[tuple[int, ...], ...]
    layers: tuple[int, ...]
    p_base: float
    log_odds_base: float
    rank: int
    p_knockout: np.ndarray
    log_odds: np.ndarray
    warnings: tuple[str, ...]
    seconds: float
    passes: int
    foil: Target | None = None
    logit_difference_base: float | None = None
    logit_difference: np.ndarray | None = None

    @property
    def p_target(self) -> float:
        """Probability of the target in the plain run."""
        return self.p_base

    @property
    def relative_change_percent(self) -> np.ndarray:
        """``100 (p_knockout - p_base) / p_base``, [source, layer]."""
        return (
            100.0 * (self.p_knockout - self.p_base) / self.p_base
            if self.p_base > 0
            else np.full_like(self.p_knockout, np.nan)
        )

    @property
    def log_odds_change(self) -> np.ndarray:
        """Change of the log-odds in nats, [source, layer]."""
        return self.log_odds - self.log_odds_base

    @property
    def logit_difference_change(self) -> np.ndarray | None:
        """Change of the logit difference between answer and foil, [source, layer]; None without a foil."""
        if self.logit_difference is None or self.logit_difference_base is None:
            return None
        return self.logit_difference - self.logit_difference_base

    def table(self) -> pd.DataFrame:
        """One row per (source, layer) that was computed: the contract's columns for ``flow``; with a foil one more."""
        percent, odds = self.relative_change_percent, self.log_odds_change
        against_foil = self.logit_difference_change
        each = self.spec.sources == (EACH,) and not self.spec.edges
        rows = []
        for i, source in enumerate(self.sources):
            name = int(source) if each and source.isdigit() else source
            for j, layer in enumerate(self.layers):
                if np.isnan(self.p_knockout[i, j]):
                    continue
                values = self.p_base, float(self.p_knockout[i, j]), float(percent[i, j]), float(odds[i, j])
                more = () if against_foil is None else (float(against_foil[i, j]),)
                rows.append((name, layer, self.window, *values, *more))
        names = ["source", "layer", "window", "p_base", "p_knockout", "relative_change_percent", "log_odds_change"]
        return pd.DataFrame(rows, columns=names if against_foil is None else [*names, "logit_difference_change"])


def run(
    model: ModelHandle, query: Query | TokenizedQuery, spec: KnockoutSpec | None = None, *, progress: Progress = silent
) -> KnockoutResult:
    """Cut attention edges and see what becomes of the target's probability.

    Raises:
        InputError: the query or the spec cannot be used, or a cut leaves a position nothing to attend to.
        CapabilityError: the model's attention cannot be cut.
    """
    spec = spec or KnockoutSpec()
    model.require("knockout", "attention knockout")
    timed = Timed(progress)
    seen = tokenized(model, query)
    plan = _plan(model, seen, spec)
    _require_heads(model, plan.knockouts)
    named = named_target(model, seen)
    scored = () if named is None else scored_ids(seen, named)
    n_scored = max(1, len(scored))
    knockouts = [_with_readout(knockout, seen, spec, n_scored) for knockout in plan.knockouts]
    ids = [*seen.ids, *scored[:-1]]
    timed(0, len(knockouts), None)
    base, answers = engine.record_and_run(model, ids, knockouts, n_readout=n_scored, step=timed.step)
    target = named or resolve_target(model, seen, base.logits[0, 0])
    scored = scored or scored_ids(seen, target)
    foil = foil_target(model, seen, target)
    rival = () if foil is None else (foil.id, *scored[1:])
    engine.refuse_empty_rows(base, knockouts)
    rank = int(measures.rank(base.logits[0, 0], target.ids[0]))
    plain = scores_of_logits(base.logits[None], scored)
    p_base, odds_base = _score(plain)
    difference_base = None if foil is None else _above(plain, scores_of_logits(base.logits[None], rival))
    p, odds, difference = (np.full((len(plan.sources), len(plan.layers)), np.nan) for _ in range(3))
    warnings = seen.warnings + target_warnings(model, seen, target) + plan.warnings
    done = 0

    def snapshot() -> KnockoutResult:
        return KnockoutResult(
            spec=spec, query=seen, model=model.info, target=target, window=plan.window, sources=plan.sources,
            positions=plan.positions, layers=plan.layers, p_base=float(p_base[0]), log_odds_base=float(odds_base[0]),
            rank=rank,
            p_knockout=p.copy(), log_odds=odds.copy(), warnings=warnings,
            seconds=timed.seconds, passes=done,
            foil=foil, logit_difference_base=None if difference_base is None else float(difference_base[0]),
            logit_difference=None if foil is None else difference.copy(),
        )  # fmt: skip

    timed(0, len(knockouts), snapshot())
    for indices, readout in answers:
        scores = readout.scores(scored)
        for index, value, odd in zip(indices, *_score(scores), strict=True):
            p[plan.cells[index]], odds[plan.cells[index]] = value, odd
        if foil is not None:
            for index, value in zip(indices, _above(scores, readout.scores(rival)), strict=True):
                difference[plan.cells[index]] = value
        done += len(indices)
        timed(done, len(knockouts), snapshot())
    return snapshot()


@dataclass(frozen=True, kw_only=True)
class _RunPlan:
    window: int
    sources: tuple[str, ...]
    positions: tuple[tuple[int, ...], ...]
    layers: tuple[int, ...]
    knockouts: tuple[Intervention, ...]
    cells: tuple[tuple[int, int], ...]
    warnings: tuple[str, ...]


def _require_heads(model: ModelHandle, knockouts: Sequence[Intervention]) -> None:
    if any(cut.heads is not None for knockout in knockouts for cut in knockout.cuts):
        model.require("head_knockout", "knockout of single heads")


def _score(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Probability and log-odds of the answer under each run."""
    return scores.log_probability[:, 0].exp().cpu().numpy(), scores.log_odds[:, 0].cpu().numpy()


def _above(scores: Scores, rival: Scores) -> np.ndarray:
    """Logit of the answer's first token minus that of the foil's, under each run."""
    return (scores.logit.double() - rival.logit.double())[:, 0, 0].cpu().numpy()


def _plan(model: ModelHandle, query: TokenizedQuery, spec: KnockoutSpec) -> _RunPlan:
    if spec.edges:
        return _edge_plan(model, query, spec)
    n = model.info.n_layers
    size, warnings = _window(spec.window, n)
    at = _target_position(query, spec.target_position)
    heads = _heads(spec.heads, model)
    sources, missing = _sources(query, spec.sources)
    warnings += missing
    controls, more = _controls(query, sources, spec)
    sources += controls
    warnings += more + _future_warnings(sources, at)
    cells = _order(len(sources), n, _telling(query) if tuple(spec.sources) == (EACH,) else ())
    cuts: dict[tuple[int, int], Cut] = {}
    for layer in range(n):
        chosen = None if heads is None else heads.get(layer, ())
        if chosen is None or chosen:
            for i, (_, keys) in enumerate(sources):
                cuts[i, layer] = Cut(layer=layer, queries=(at,), keys=keys, heads=chosen)
    knockouts = [
        Intervention(cuts=tuple(cuts[i, layer] for layer in window(center, size, n) if (i, layer) in cuts))
        for i, center in cells
    ]
    return _RunPlan(
        window=size,
        sources=tuple(name for name, _ in sources),
        positions=tuple(positions for _, positions in sources),
        layers=tuple(range(n)),
        knockouts=tuple(knockouts),
        cells=cells,
        warnings=warnings,
    )


def _order(n_sources: int, n_layers: int, early: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The cells, coarse to fine in the layers: all of a few rows first, which say most while a long map is computed."""
    layers = coarse_to_fine(n_layers)
    first = tuple((i, layer) for layer in layers for i in early)
    return first + tuple((i, layer) for layer in layers for i in range(n_sources) if i not in early)


def _telling(query: TokenizedQuery) -> tuple[int, ...]:
    """The subject's last token and the prompt's last, by number."""
    found = () if query.subject is None else query.positions("subject-last")
    return tuple(dict.fromkeys([*found, query.last]))


def _edge_plan(model: ModelHandle, query: TokenizedQuery, spec: KnockoutSpec) -> _RunPlan:
    if spec.heads or spec.control:
        raise SpecError("heads and control do not go with edges", "name the heads in the edge: FROM:TO:LAYERS:HEADS")
    cuts: list[Cut] = []
    warnings: tuple[str, ...] = ()
    for text in spec.edges:
        parts = text.split(":")
        if len(parts) not in (3, 4) or not all(parts):
            raise SpecError(
                f"edge {text!r} is not FROM:TO:LAYERS or FROM:TO:LAYERS:HEADS", "write for instance last:subject:3-6"
            )
        queries, keys = _set(query, parts[0]), _set(query, parts[1])
        heads = None if len(parts) == 3 or parts[3].strip() == "*" else _numbers(parts[3], model.info.n_heads, "head")
        layers = _numbers(parts[2], model.info.n_layers, "layer")
        if any(key > q for key in keys for q in queries):
            warnings += (f"edge {text!r}: edges into the future do not exist in a causal model; they change nothing",)
        cuts += [Cut(layer=layer, queries=queries, keys=keys, heads=heads) for layer in layers]
    layers = sorted({cut.layer for cut in cuts})
    return _RunPlan(
        window=len(layers),
        sources=("edges",),
        positions=(tuple(sorted({key for cut in cuts for key in cut.keys})),),
        layers=(layers[0],),
        knockouts=(Intervention(cuts=tuple(cuts)),),
        cells=((0, 0),),
        warnings=warnings,
    )


def _with_readout(knockout: Intervention, query: TokenizedQuery, spec: KnockoutSpec, n_scored: int) -> Intervention:
    """A cut into the last prompt position also holds for the appended tokens of the answer that read out the next
    one.
    """
    if n_scored == 1 or spec.target_position is not None:
        return knockout
    appended = tuple(range(query.last + 1, query.last + n_scored))
    cuts = []
    for cut in knockout.cuts:
        queries = cut.queries + appended if query.last in cut.queries else cut.queries
        cuts.append(Cut(layer=cut.layer, queries=queries, keys=cut.keys, heads=cut.heads))
    return Intervention(cuts=tuple(cuts))


def _window(size: int | None, n_layers: int) -> tuple[int, tuple[str, ...]]:
    if size is None:
        return default_flow_window(n_layers), ()
    if not 1 <= size <= n_layers:
        raise SpecError(
            f"window {size} is not between 1 and {n_layers}", "choose a number of layers that the model has"
        )
    if size > n_layers / 2:
        return size, (f"a window of {size} covers more than half of the {n_layers} layers: its place says little",)
    return size, ()


def _target_position(query: TokenizedQuery, position: int | None) -> int:
    if position is None:
        return query.last
    if not 0 <= position <= query.last:
        raise SpecError(
            f"target position {position} is not between 0 and {query.last}", "choose a position of the prompt"
        )
    return position


def _sources(
    query: TokenizedQuery, names: Sequence[str]
) -> tuple[tuple[tuple[str, tuple[int, ...]], ...], tuple[str, ...]]:
    """Names with their positions, and a warning for each set that this prompt has no token of.

    Raises:
        SpecError: no set, an unknown one, one named twice, or none with a token.
    """
    if not names:
        raise SpecError("no sources are given", "name at least one of subject, relation, last, each, or positions")
    if tuple(names) == (EACH,):
        return tuple((str(p), (p,)) for p in range(len(query.ids))), ()
    if EACH in names:
        raise SpecError(f"{EACH!r} stands beside other sources", f"give {EACH!r} alone")
    if len({name.strip().lower() for name in names}) < len(names):
        raise SpecError(f"sources {', '.join(names)} name one set twice", "name each once")
    found = {name: _positions(query, name) for name in names}
    if not any(found.values()):
        _set(query, names[0])
    blind = query.subject is None and "relation" in found
    unnamed = ("no subject is named: 'relation' is every token but the last",) if blind else ()
    empty = unnamed + tuple(
        f"the set {name!r} has no token in this prompt: left out" for name, where in found.items() if not where
    )
    return tuple((name, where) for name, where in found.items() if where), empty


def _positions(query: TokenizedQuery, name: str) -> tuple[int, ...]:
    return tuple(sorted({p for part in name.split("+") for p in query.positions(part.strip())}))


def _set(query: TokenizedQuery, name: str) -> tuple[int, ...]:
    positions = _positions(query, name)
    if not positions:
        raise SpecError(f"the set {name!r} has no token in this prompt", "choose another set or positions")
    return positions


def _numbers(text: str, count: int, what: str) -> tuple[int, ...]:
    """Numbers in "3-6", "2,5" or "*", each below ``count``."""
    if text.strip() == "*":
        return tuple(range(count))
    found: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not _is_number(low) or (dash and not _is_number(high)):
            raise SpecError(
                f"{what} {text!r} is not a number, a range like 3-6 or a list like 2,5", f"name {what}s from 0"
            )
        bounds = int(low), int(high) if dash else int(low)
        if bounds[0] > bounds[1]:
            raise SpecError(f"{what}s {part.strip()!r} run backwards", f"write {high}-{low}")
        if bounds[1] >= count:
            raise SpecError(
                f"{what} {part.strip()!r} is not between 0 and {count - 1}", f"the model has {count} {what}s"
            )
        found.update(range(bounds[0], bounds[1] + 1))
    return tuple(sorted(found))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 9


def _heads(names: Sequence[str], model: ModelHandle) -> dict[int, tuple[int, ...]] | None:
    if not names:
        return None
    chosen: dict[int, set[int]] = {}
    for name in names:
        layer, dot, head = name.partition(".")
        if not dot:
            raise SpecError(f"head {name!r} is not LAYER.HEAD", "write for instance 5.3 or 6.*")
        for index in _numbers(layer, model.info.n_layers, "layer"):
            chosen.setdefault(index, set()).update(_numbers(head, model.info.n_heads, "head"))
    return {layer: tuple(sorted(heads)) for layer, heads in chosen.items()}


def _future_warnings(sources: Sequence[tuple[str, tuple[int, ...]]], at: int) -> tuple[str, ...]:
    return tuple(
        f"{name}: edges from position {at} into the future do not exist in a causal model; they change nothing"
        for name, positions in sources
        if any(p > at for p in positions)
    )


def _controls(
    query: TokenizedQuery, sources: Sequence[tuple[str, tuple[int, ...]]], spec: KnockoutSpec
) -> tuple[tuple[tuple[str, tuple[int, ...]], ...], tuple[str, ...]]:
    """The control of every source with its names, and warnings. Of single positions the others are the control."""
    if spec.control == 0:
        return (), ()
    if tuple(spec.sources) == (EACH,):
        if query.subject is None:
            return (), ("no control: it is matched to the subject, and none is named",)
        sources = (("subject", query.positions("subject")),)
    found: list[tuple[str, tuple[int, ...]]] = []
    warnings: tuple[str, ...] = ()
    for name, positions in sources:
        drawn, more = control_sets(query, name, positions, spec.control, spec.seed)
        found += [(control_name(name, i), one) for i, one in enumerate(drawn, start=1)]
        warnings += more
    return tuple(found), warnings


def control_sets(
    query: TokenizedQuery, name: str, positions: Sequence[int], draws: int, seed: int
) -> tuple[list[tuple[int, ...]], tuple[str, ...]]:
    """Random sets matched to some positions: as many others, position 0 in or out, never last or special.

    Args:
        name: of the positions, for what is said.

    Returns:
        The sets, all different, and a warning where there are fewer than asked.

    Raises:
        SpecError: the number of draws is out of range.
    """
    if not 0 <= draws <= MAX_CONTROLS:
        raise SpecError(
            f"control {draws} is not between 0 and {MAX_CONTROLS}", "choose a number of draws in that range"
        )
    if draws == 0:
        return [], ()
    own = set(positions)
    others = {*query.positions("relation"), *(() if query.subject is None else query.positions("subject"))}
    pool = sorted(others - own - {0, query.last})
    fixed = (0,) if 0 in own else ()
    size = len(own) - len(fixed)
    if not size:
        return [], (f"no control: position 0 is all that {name!r} has, and a matched set holds it too",)
    available = math.comb(len(pool), size) if size <= len(pool) else 0
    if available == 0:
        there = "1 other position is" if len(pool) == 1 else f"{len(pool)} other positions are"
        return [], (f"no control: {there} too few to match {len(own)} of {name!r}",)
    generator = np.random.default_rng(seed)
    sets: set[tuple[int, ...]] = set()
    ordered: list[tuple[int, ...]] = []
    while len(ordered) < min(draws, available):
        drawn = tuple(sorted((*fixed, *generator.choice(pool, size=size, replace=False).tolist())))
        if drawn not in sets:
            sets.add(drawn)
            ordered.append(drawn)
    if available < draws:
        return ordered, (f"control: only {available} different sets match {name!r}; all are drawn",)
    return ordered, ()

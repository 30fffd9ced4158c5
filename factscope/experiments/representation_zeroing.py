"""Which updates must be there? Representation zeroing: the second localizer of Hase et al. 2023.

Source: Hase et al. 2023 (arXiv 2301.04213), appendix on representation zeroing.

1. Run the plain model; p_clean is the target's probability.
2. For every set of positions and every window of layers, put zeros in the place of the MLP's (or attention's) updates
   there; nothing is corrupted otherwise. p_zeroed is the target's probability then.
3. The effect is the share of p_clean that is gone.

The paper zeroes all of the subject's tokens together; the released helper one token at a time from position 0 and from
layer 1 on, and cannot run, since it uses a name that it never imports. Here any sets, or each position, in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from factscope import measures
from factscope.errors import SpecError
from factscope.experiments.causal_tracing import default_trace_window
from factscope.experiments.results import (
    Progress,
    Timed,
    coarse_to_fine,
    named_target,
    resolve_target,
    scored_ids,
    silent,
    target_warnings,
    tokenized,
)
from factscope.interventions import engine
from factscope.interventions.attention import window
from factscope.interventions.intervention import Intervention, Patch
from factscope.models.handle import ModelHandle, ModelInfo
from factscope.models.head import scores_of_logits
from factscope.queries import Query
from factscope.tokens import Target, TokenizedQuery

EACH = "each"


@dataclass(frozen=True, kw_only=True)
class ZeroingSpec:
    """What is zeroed.

    Attributes:
        site: whose updates.
        window: layers zeroed around each layer; None takes the default of causal tracing. The paper has 5.
        sources: sets of positions, each zeroed together: names, positions, several joined by "+"; or "each" alone.
    """

    site: Literal["mlp", "attention"] = "mlp"
    window: int | None = None
    sources: tuple[str, ...] = ("subject",)


@dataclass(frozen=True, kw_only=True, eq=False)
class ZeroingResult:
    """The grid [source, layer].

    Attributes:
        sources: rows; with "each" the positions as text. ``positions``: what each row zeroes.
        layers: columns, the centres of the windows.
        p_clean: of the plain run. p_zeroed: [source, layer], NaN where not computed yet.
        rank: of the target's first token in the plain run, from 1.
    """

    spec: ZeroingSpec
    query: TokenizedQuery
    model: ModelInfo
    target: Target
    window: int
    sources: tuple[str, ...]
    positions: tuple[tuple[int, ...], ...]
    layers: tuple[int, ...]
    p_clean: float
    rank: int
    p_zeroed: np.ndarray
    warnings: tuple[str, ...]
    seconds: float
    passes: int

    @property
    def p_target(self) -> float:
        """Probability of the target in the plain run."""
        return self.p_clean

    @property
    def fraction_removed(self) -> np.ndarray:
        """``(p_clean - p_zeroed) / p_clean``, [source, layer]; negative where zeroing helps the answer."""
        return (
            (self.p_clean - self.p_zeroed) / self.p_clean if self.p_clean > 0 else np.full_like(self.p_zeroed, np.nan)
        )

    def table(self) -> pd.DataFrame:
        """One row per (source, layer) that was computed."""
        removed = self.fraction_removed
        rows = [
            (source, layer, self.window, self.p_clean, float(self.p_zeroed[i, j]), float(removed[i, j]))
            for i, source in enumerate(self.sources)
            for j, layer in enumerate(self.layers)
            if not np.isnan(self.p_zeroed[i, j])
        ]
        return pd.DataFrame(rows, columns=["source", "layer", "window", "p_clean", "p_zeroed", "fraction_removed"])


def run(
    model: ModelHandle, query: Query | TokenizedQuery, spec: ZeroingSpec | None = None, *, progress: Progress = silent
) -> ZeroingResult:
    """Zero updates and see how much of the target's probability goes.

    Raises:
        InputError: the query or the spec cannot be used.
        CapabilityError: the model has no additive split.
    """
    spec = spec or ZeroingSpec()
    model.require("additive", "zeroing the updates of MLP and attention")
    if spec.site not in ("mlp", "attention"):
        raise SpecError(f"site {spec.site!r} is unknown", "choose mlp or attention")
    timed = Timed(progress)
    seen = tokenized(model, query)
    n = model.info.n_layers
    size = default_trace_window(n) if spec.window is None else spec.window
    if not 1 <= size <= n:
        raise SpecError(f"window {size} is not between 1 and {n}", "choose a number of layers that the model has")
    sources = _sources(seen, spec.sources)
    cells = [(i, layer) for layer in coarse_to_fine(n) for i in range(len(sources))]
    zeros = {
        (i, layer): Patch(layer=layer, site=spec.site, positions=where)
        for i, (_, where) in enumerate(sources)
        for layer in range(n)
    }
    runs = [Intervention(patches=tuple(zeros[i, at] for at in window(layer, size, n))) for i, layer in cells]
    named = named_target(model, seen)
    scored = () if named is None else scored_ids(seen, named)
    timed(0, len(runs), None)
    base, answers = engine.record_and_run(
        model, [*seen.ids, *scored[:-1]], runs, n_readout=max(1, len(scored)), step=timed.step
    )
    target = named or resolve_target(model, seen, base.logits[0, 0])
    scored = scored or scored_ids(seen, target)
    p_clean = float(scores_of_logits(base.logits[None], scored).log_probability.exp())
    p, done = np.full((len(sources), n), np.nan), 0

    def snapshot() -> ZeroingResult:
        return ZeroingResult(
            spec=spec, query=seen, model=model.info, target=target, window=size,
            sources=tuple(name for name, _ in sources), positions=tuple(where for _, where in sources),
            layers=tuple(range(n)), p_clean=p_clean, rank=int(measures.rank(base.logits[0, 0], target.id)),
            p_zeroed=p.copy(), warnings=seen.warnings + target_warnings(model, seen, target),
            seconds=timed.seconds, passes=done,
        )  # fmt: skip

    for indices, readout in answers:
        values = readout.scores(scored).log_probability[:, 0].exp().cpu().numpy()
        for index, value in zip(indices, values, strict=True):
            p[cells[index]] = value
        done += len(indices)
        timed(done, len(runs), snapshot())
    return snapshot()


def _sources(query: TokenizedQuery, names: Sequence[str]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names with their positions.

    Raises:
        SpecError: none is given, or a set has no token in this prompt.
    """
    if tuple(names) == (EACH,):
        return tuple((str(p), (p,)) for p in range(len(query.ids)))
    found = tuple(
        (name, tuple(sorted({p for part in name.split("+") for p in query.positions(part.strip())}))) for name in names
    )
    for name, where in found:
        if not where:
            raise SpecError(f"the set {name!r} has no token in this prompt", "choose another set or positions")
    if not found:
        raise SpecError("no sources are given", "name subject, last, relation, each, or positions such as 3-5")
    return found

"""Where does a head look? The attention weights of one layer, every token's to every token.

1. One plain forward up to the layer; its attention's own weights are recorded, all heads.
2. Row t holds what position t reads; a row adds up to 1 (less where a family lets a sink take part of it).

Source: attention weights as in Chughtai et al. 2024 (arXiv 2402.07321) and Geva et al. 2023 (arXiv 2304.14767), section
6; the subject's mapping beside them on the page as in Dar et al. 2022 (arXiv 2209.02535).

The implementation of the attention is never switched for it: a model whose attention does not tell its weights is
refused, with the reason.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from factscope.errors import SpecError
from factscope.experiments.results import Progress, Timed, silent, tokenized
from factscope.models.dispatch import Plan, Stopped
from factscope.models.handle import ModelHandle, ModelInfo
from factscope.queries import Query
from factscope.tokens import TokenizedQuery


@dataclass(frozen=True, kw_only=True)
class PatternSpec:
    """``layer``: from 0."""

    layer: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class PatternResult:
    """``weights``: [head, position, source], fractions; 0 where the source lies in the future."""

    spec: PatternSpec
    query: TokenizedQuery
    model: ModelInfo
    weights: np.ndarray
    warnings: tuple[str, ...]
    seconds: float
    passes: int

    def table(self) -> pd.DataFrame:
        """One row per (head, position, source)."""
        heads, positions, sources = (axis.ravel() for axis in np.indices(self.weights.shape))
        names = {"head": heads, "position": positions, "source": sources, "weight": self.weights.ravel()}
        return pd.DataFrame({"layer": self.spec.layer, **names})


def run(
    model: ModelHandle, query: Query | TokenizedQuery, spec: PatternSpec | None = None, *, progress: Progress = silent
) -> PatternResult:
    """The attention weights of a layer.

    Raises:
        InputError: the query cannot be used, or there is no such layer.
        CapabilityError: the attention does not tell its weights.
    """
    spec = spec or PatternSpec()
    model.require("sources", "attention patterns")
    if not 0 <= spec.layer < model.info.n_layers:
        raise SpecError(f"layer {spec.layer} is not between 0 and {model.info.n_layers - 1}", "name a layer from 0")
    timed = Timed(progress)
    seen = tokenized(model, query)
    plan = Plan(capture=frozenset({("pattern", spec.layer)}), stop_after=spec.layer)
    with suppress(Stopped):
        model.forward(torch.tensor([seen.ids], device=model.device), plan, last=1)
    result = PatternResult(
        spec=spec,
        query=seen,
        model=model.info,
        weights=plan.captured["pattern", spec.layer][0].float().cpu().numpy(),
        warnings=seen.warnings,
        seconds=timed.seconds,
        passes=1,
    )
    timed(1, 1, result)
    return result

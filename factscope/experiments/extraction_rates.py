"""How often is the answer taken out? Rates over many queries of extraction and of mappings in parameters.

Source: Geva et al. 2023 (arXiv 2304.14767), section 6.

1. Extraction rate per layer: share of the queries with an event there; and of those with an event in any layer.
2. Extracting layers per query: the mean over all queries, and over those with at least one event.
3. Which sublayer is first? Queries where both have an event are counted apart for attention first, MLP first and the
   same layer. The released notebook counts a tie as attention first, which says nothing of parallel blocks.
4. Share of the queries with an attention event where, in an extracting layer, some head's parameters map the subject to
   the target.

Intervals are percentiles of a bootstrap over subjects: queries about one subject are drawn together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from factscope.errors import SpecError
from factscope.experiments.attribute_extraction import ExtractionResult
from factscope.experiments.heads import HeadsResult

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Share:
    """A mean over ``n`` queries with its interval; NaN where there is none."""

    value: float
    low: float
    high: float
    n: int


def mean(values: Sequence[float], subjects: Sequence[str], *, seed: int = 1, draws: int = DRAWS) -> Share:
    """Mean over queries, 95% interval by a bootstrap over subjects."""
    numbers = np.asarray(values, dtype=float)
    if not numbers.size:
        return Share(value=np.nan, low=np.nan, high=np.nan, n=0)
    names, index = np.unique(np.asarray(subjects, dtype=str), return_inverse=True)
    sums, counts = np.bincount(index, weights=numbers), np.bincount(index)
    drawn = np.random.default_rng(seed).integers(0, len(names), size=(draws, len(names)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Share(value=float(numbers.mean()), low=float(low), high=float(high), n=numbers.size)


def extraction_rates(results: Sequence[ExtractionResult], *, seed: int = 1) -> pd.DataFrame:
    """Per site and layer, and for any layer (``layer`` empty): the share of the queries with an event.

    Raises:
        SpecError: no results, or they are not of one model and one spec.
    """
    _check(results)
    subjects = [_subject(result) for result in results]
    rows = []
    for i, site in enumerate(results[0].sites):
        events = np.array([result.extracted[i] for result in results], dtype=float)
        columns: list[np.ndarray] = [*events.T, events.max(axis=1)]
        for layer, column in zip([*results[0].layers, None], columns, strict=True):
            share = mean(column.tolist(), subjects, seed=seed)
            rows.append((site, layer, share.value, share.low, share.high, share.n))
    return pd.DataFrame(rows, columns=["site", "layer", "extraction_rate", "low", "high", "n"])


def extracting_layers(results: Sequence[ExtractionResult], *, seed: int = 1) -> pd.DataFrame:
    """Per site, how many layers extract: mean over all queries, and over those with an event.

    Raises:
        SpecError: no results, or they are not of one model and one spec.
    """
    _check(results)
    rows = []
    for i, site in enumerate(results[0].sites):
        counts = [(int(result.extracted[i].sum()), _subject(result)) for result in results]
        for over, kept in (("all", counts), ("extracted", [found for found in counts if found[0]])):
            share = mean([count for count, _ in kept], [name for _, name in kept], seed=seed)
            rows.append((site, over, share.value, share.low, share.high, share.n))
    return pd.DataFrame(rows, columns=["site", "over", "extracting_layers", "low", "high", "n"])


def first_sublayer(results: Sequence[ExtractionResult]) -> dict[str, int]:
    """In how many queries attention is first, MLP is first, both begin in one layer, one alone has events, or none.

    Raises:
        SpecError: no results, or they are not of one model and one spec.
    """
    _check(results)
    found: dict[str, int] = {}
    for name in ("attention_first", "mlp_first", "tie", "attention_only", "mlp_only", "neither"):
        found[name] = 0
    for result in results:
        attention, mlp = result.first_layer("attention"), result.first_layer("mlp")
        if attention is None or mlp is None:
            only = "attention_only" if attention is not None else "mlp_only" if mlp is not None else "neither"
            found[only] += 1
        else:
            found["tie" if attention == mlp else "attention_first" if attention < mlp else "mlp_first"] += 1
    return found


def mapping_share(pairs: Iterable[tuple[ExtractionResult, HeadsResult]], *, seed: int = 1) -> Share:
    """Of the queries with an attention event, the share where a head of an extracting layer maps subject to target.

    Raises:
        SpecError: two results of a pair are not about one target of one query and model.
    """
    values, subjects = [], []
    for extraction, heads in pairs:
        same = extraction.query.ids == heads.query.ids and extraction.target.id == heads.target.id
        if not same or extraction.model.key != heads.model.key:
            raise SpecError("a pair of results is of two queries, targets or models", "pair results of one query")
        events = extraction.extracted[0]
        if events.any():
            values.append(float(heads.mapping_found[events].any()))
            subjects.append(_subject(extraction))
    return mean(values, subjects, seed=seed)


def _subject(result: ExtractionResult) -> str:
    return result.query.subject_text or result.query.query.prompt


def _check(results: Sequence[ExtractionResult]) -> None:
    if not results:
        raise SpecError("there are no results to average", "run attribute extraction on some queries")
    for what, values in (
        ("models", {result.model.key for result in results}),
        ("specs", {result.spec for result in results}),
    ):
        if len(values) > 1:
            raise SpecError(f"the results are of {len(values)} different {what}", "average those of one")
    if len({result.sites for result in results}) > 1 or any((result.target_rank == 0).any() for result in results):
        raise SpecError("some results are partial", "leave out runs that were cancelled")

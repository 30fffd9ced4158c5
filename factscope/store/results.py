"""Results as JSON: numbers with their axes, exactly enough to be drawn again."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from factscope.experiments.attention_knockout import KnockoutResult, KnockoutSpec
from factscope.experiments.attribute_extraction import ExtractionResult, ExtractionSpec
from factscope.experiments.attributes_rate import Attribute
from factscope.experiments.heads import HeadsResult, HeadsSpec
from factscope.experiments.logit_lens import LensResult, LensSpec
from factscope.experiments.prediction import Prediction, PredictionSpec, TokenProbability
from factscope.experiments.sub_updates import SubUpdatesResult, SubUpdatesSpec
from factscope.experiments.subject_enrichment import EnrichmentResult, EnrichmentSpec
from factscope.experiments.traces import TraceResult, TraceSpec
from factscope.models.handle import ModelInfo
from factscope.queries import Query
from factscope.tokens import Target, Token, TokenizedQuery

_TYPES = {
    cls.__name__: cls
    for cls in (
        Attribute, EnrichmentResult, EnrichmentSpec, SubUpdatesResult, SubUpdatesSpec,
        ExtractionResult, ExtractionSpec, HeadsResult, HeadsSpec, KnockoutResult, KnockoutSpec, LensResult, LensSpec,
        ModelInfo, Prediction, PredictionSpec, Query, Target, Token, TokenizedQuery, TokenProbability,
        TraceResult, TraceSpec,
    )
}  # fmt: skip


def to_json(value: Any) -> Any:
    """A result as plain JSON values: numbers with seven significant digits, NaN as null or named, types named."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"$type": type(value).__name__, **fields}
    if isinstance(value, np.ndarray):
        return {"$array": _numbers(value.tolist()), "dtype": str(value.dtype)}
    if isinstance(value, tuple):
        return {"$tuple": [to_json(v) for v in value]}
    if isinstance(value, dict):
        return {"$dict": [[to_json(k), to_json(v)] for k, v in value.items()]}
    if isinstance(value, float):
        return {"$float": "nan"} if math.isnan(value) else _numbers(value)
    return value


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.7g}")
    return value


def from_json(data: Any) -> Any:
    """The value that ``to_json`` was given.

    Raises:
        KeyError: a type that is no result's.
    """
    if isinstance(data, list):
        return [from_json(v) for v in data]
    if not isinstance(data, dict):
        return data
    if "$type" in data:
        fields = {name: from_json(v) for name, v in data.items() if name != "$type"}
        return _TYPES[data["$type"]](**fields)
    if "$array" in data:
        dtype = np.dtype(data["dtype"])
        values = np.array(data["$array"], dtype=object if dtype.kind == "f" else dtype)
        if dtype.kind == "f":
            values = np.where(values == None, np.nan, values).astype(dtype)  # noqa: E711 - elementwise
        return values
    if "$float" in data:
        return float(data["$float"])
    if "$tuple" in data:
        return tuple(from_json(v) for v in data["$tuple"])
    return {from_json(k): from_json(v) for k, v in data["$dict"]}

"""FactScope: see how a causal language model recalls a fact.

    from factscope import load, Query, attention_knockout model = load("bundled") result = attention_knockout(model,
    Query(prompt="The Eiffel Tower is located in the city of", subject="Eiffel Tower")) result.table()

Names are imported when they are first used: drawing a chart does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "load": "factscope.models.loading:load",
    "ModelHandle": "factscope.models.handle:ModelHandle",
    "Query": "factscope.queries:Query",
    "Fact": "factscope.queries:Fact",
    "Relation": "factscope.queries:Relation",
    "Probe": "factscope.queries:Probe",
    "EditingSpec": "factscope.experiments.editing:EditingSpec",
    "edit_fact": "factscope.experiments.editing:run",
    "LayersSpec": "factscope.experiments.edit_layers:LayersSpec",
    "edit_layers": "factscope.experiments.edit_layers:run",
    "EvaluationSpec": "factscope.experiments.edit_evaluation:EvaluationSpec",
    "evaluate_edit": "factscope.experiments.edit_evaluation:evaluate",
    "blast_radius": "factscope.experiments.blast_radius:blast_radius",
    "tokenize": "factscope.tokens:tokenize",
    "predict": "factscope.experiments.prediction:run",
    "PredictionSpec": "factscope.experiments.prediction:PredictionSpec",
    "attention_knockout": "factscope.experiments.attention_knockout:run",
    "KnockoutSpec": "factscope.experiments.attention_knockout:KnockoutSpec",
    "logit_lens": "factscope.experiments.logit_lens:run",
    "LensSpec": "factscope.experiments.logit_lens:LensSpec",
    "representation_zeroing": "factscope.experiments.representation_zeroing:run",
    "ZeroingSpec": "factscope.experiments.representation_zeroing:ZeroingSpec",
    "counterfactual_patching": "factscope.experiments.counterfactual_patching:run",
    "CounterfactualSpec": "factscope.experiments.counterfactual_patching:CounterfactualSpec",
    "causal_tracing": "factscope.experiments.causal_tracing:run",
    "TraceSpec": "factscope.experiments.causal_tracing:TraceSpec",
    "subject_enrichment": "factscope.experiments.subject_enrichment:run",
    "EnrichmentSpec": "factscope.experiments.subject_enrichment:EnrichmentSpec",
    "sub_updates": "factscope.experiments.sub_updates:run",
    "SubUpdatesSpec": "factscope.experiments.sub_updates:SubUpdatesSpec",
    "heads": "factscope.experiments.heads:run",
    "HeadsSpec": "factscope.experiments.heads:HeadsSpec",
    "attention_pattern": "factscope.experiments.attention_pattern:run",
    "PatternSpec": "factscope.experiments.attention_pattern:PatternSpec",
    "attribute_extraction": "factscope.experiments.attribute_extraction:run",
    "ExtractionSpec": "factscope.experiments.attribute_extraction:ExtractionSpec",
    "bundled_facts": "factscope.datasets:bundled_facts",
    "read_facts": "factscope.datasets:read_facts",
    "Edit": "factscope.editors.edit:Edit",
    "EditFact": "factscope.editors.edit:EditFact",
    "with_edits": "factscope.editors.edit:with_edits",
    "load_edit": "factscope.editors.files:load_edit",
    "save_edit": "factscope.editors.files:save_edit",
    "charts": "factscope.charts",
    "FactScopeError": "factscope.errors:FactScopeError",
}

if TYPE_CHECKING:
    from factscope import charts
    from factscope.datasets import bundled_facts, read_facts
    from factscope.editors.edit import Edit, EditFact, with_edits
    from factscope.editors.files import load_edit, save_edit
    from factscope.errors import FactScopeError
    from factscope.experiments.attention_knockout import KnockoutSpec
    from factscope.experiments.attention_knockout import run as attention_knockout
    from factscope.experiments.attention_pattern import PatternSpec
    from factscope.experiments.attention_pattern import run as attention_pattern
    from factscope.experiments.attribute_extraction import ExtractionSpec
    from factscope.experiments.attribute_extraction import run as attribute_extraction
    from factscope.experiments.blast_radius import blast_radius
    from factscope.experiments.causal_tracing import TraceSpec
    from factscope.experiments.causal_tracing import run as causal_tracing
    from factscope.experiments.counterfactual_patching import CounterfactualSpec
    from factscope.experiments.counterfactual_patching import run as counterfactual_patching
    from factscope.experiments.edit_evaluation import EvaluationSpec
    from factscope.experiments.edit_evaluation import evaluate as evaluate_edit
    from factscope.experiments.edit_layers import LayersSpec
    from factscope.experiments.edit_layers import run as edit_layers
    from factscope.experiments.editing import EditingSpec
    from factscope.experiments.editing import run as edit_fact
    from factscope.experiments.heads import HeadsSpec
    from factscope.experiments.heads import run as heads
    from factscope.experiments.logit_lens import LensSpec
    from factscope.experiments.logit_lens import run as logit_lens
    from factscope.experiments.prediction import PredictionSpec
    from factscope.experiments.prediction import run as predict
    from factscope.experiments.representation_zeroing import ZeroingSpec
    from factscope.experiments.representation_zeroing import run as representation_zeroing
    from factscope.experiments.sub_updates import SubUpdatesSpec
    from factscope.experiments.sub_updates import run as sub_updates
    from factscope.experiments.subject_enrichment import EnrichmentSpec
    from factscope.experiments.subject_enrichment import run as subject_enrichment
    from factscope.models.handle import ModelHandle
    from factscope.models.loading import load
    from factscope.queries import Fact, Probe, Query, Relation
    from factscope.tokens import tokenize

__all__ = [
    "CounterfactualSpec", "Edit", "EditFact", "EditingSpec", "EnrichmentSpec", "EvaluationSpec", "ExtractionSpec",
    "Fact", "FactScopeError", "HeadsSpec", "KnockoutSpec", "LayersSpec", "LensSpec", "ModelHandle", "PatternSpec",
    "PredictionSpec", "Probe", "Query", "Relation", "SubUpdatesSpec", "TraceSpec", "ZeroingSpec",
    "attention_knockout", "attention_pattern", "attribute_extraction", "blast_radius", "bundled_facts",
    "causal_tracing", "charts", "counterfactual_patching", "edit_fact", "edit_layers", "evaluate_edit", "heads",
    "load", "load_edit", "logit_lens", "predict", "read_facts", "representation_zeroing", "save_edit", "sub_updates",
    "subject_enrichment", "tokenize", "with_edits",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'factscope' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    loaded = importlib.import_module(module)
    return getattr(loaded, attribute) if attribute else loaded


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

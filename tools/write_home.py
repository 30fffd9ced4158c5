"""Compute the home example with the bundled model and store it: what a newcomer sees before any computation.

python tools/write_home.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dashboard import picker, requests
from dashboard.link import HOME
from factscope import load
from factscope.experiments import (
    attention_knockout,
    attribute_extraction,
    causal_tracing,
    heads,
    logit_lens,
    prediction,
    sub_updates,
    subject_enrichment,
)
from factscope.queries import Query
from factscope.store.examples import write_examples

EXPERIMENTS = {
    "prediction": prediction.run,
    "logit_lens": logit_lens.run,
    "attention_knockout": attention_knockout.run,
    "causal_tracing": causal_tracing.run,
    "subject_enrichment": subject_enrichment.run,
    "sub_updates": sub_updates.run,
    "heads": heads.run,
    "attribute_extraction": attribute_extraction.run,
}


def home_results() -> list[tuple[str, Query, Any, Any]]:
    """Every (experiment, query, spec, result) of the home example, computed from the shipped weights."""
    model = load("bundled")
    asked = requests.home(picker.paraphrases(HOME))
    return [(kind, query, spec, EXPERIMENTS[kind](model, query, spec)) for kind, query, spec in asked]


if __name__ == "__main__":
    write_examples(home_results())

"""What can be loaded and what it supports: rows for the ``models`` command and the Model drawer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from factscope.models.handle import ModelHandle
from factscope.models.hub import LocalModel
from factscope.models.loading import list_local_models

FAMILIES = Path(__file__).resolve().parent / "families.json"
"""Measured on tiny random models of every family; a test measures it again."""

MEANINGS = {
    "knockout": "attention knockout",
    "head_knockout": "attention knockout of single heads",
    "lens": "the lens",
    "resume": "starting at any layer",
    "suffix": "only changed tokens are computed, on cached keys and values",
    "packed": "the fast path of many runs: all go through the layers together",
    "additive": "attention and MLP updates told apart",
    "heads": "attention updates split into heads",
    "direct": "what a head adds to the answer's logit",
    "sources": "attention weights, and a head's part from each token",
    "mappings": "what a head maps a token to, whatever the prompt",
    "dense_mlp": "edits of the MLP's down-projection",
}


def overview() -> dict[str, Any]:
    """Rows of models at hand and of families measured, one vocabulary of columns."""
    local = [
        {"kind": "model", "name": m.name, "family": None, "size_mb": round(m.bytes / 1e6, 1), **_before_loading(m)}
        for m in list_local_models()
    ]
    return {"rows": local + families(), "meanings": MEANINGS}


def families() -> list[dict[str, Any]]:
    """One row per measured family: "yes" per capability, or why not."""
    measured = json.loads(FAMILIES.read_text(encoding="utf-8"))
    return [
        {"kind": "family", "name": name, "family": row["family"], "size_mb": None, **row["capabilities"]}
        for name, row in measured.items()
    ]


def inspect(model: ModelHandle) -> dict[str, Any]:
    """One row per capability of a loaded model, with the measured reason where it is missing."""
    rows = [
        {"capability": name, "meaning": MEANINGS[name], "supported": found.ok, "reason": found.reason}
        for name, found in model.capabilities.items()
    ]
    info = {
        "name": model.info.name, "revision": model.info.revision, "dtype": model.info.dtype,
        "family": model.info.family, "n_layers": model.info.n_layers,
        "n_heads": model.info.n_heads, "d_model": model.info.d_model,
        "weights": model.info.weights, "parameters": model.n_parameters, "max_tokens": model.max_tokens,
    }  # fmt: skip
    return {"model": info, "rows": rows}


def capability_words(model: ModelHandle) -> dict[str, str]:
    """Per capability "yes", or why not."""
    return {name: "yes" if found.ok else f"no: {found.reason}" for name, found in model.capabilities.items()}


def _before_loading(model: LocalModel) -> dict[str, str]:
    return dict.fromkeys(MEANINGS, "measured on load" if model.usable else f"no: {model.reason}")

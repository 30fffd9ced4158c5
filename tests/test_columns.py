"""The vocabulary of columns: one sentence each, and every column that a table has."""

from __future__ import annotations

import subprocess
import sys

import pytest

from factscope.columns import COLUMNS

PREDICT = ("rank", "id", "text", "probability")
FLOW = ("source", "layer", "window", "p_base", "p_knockout", "relative_change_percent", "log_odds_change")
LENS = (
    "site",
    "layer",
    "position",
    "rank",
    "id",
    "text",
    "probability",
    "target_rank",
    "target_probability",
    "entropy",
)
ENRICH = ("attributes_rate", "ceiling", "other_subject_rate", "neuron", "activation", "size", "top_tokens")
TRACE = ("site", "position", "layer", "p_restored", "indirect_effect", "p_clean", "p_corrupted", "total_effect")
HEADS = (
    "head", "direct_effect", "direct_effect_foil", "attention_to_subject", "mapping_rank", "top_promoted",
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    sorted(
        {
            *PREDICT,
            *FLOW,
            *LENS,
            *TRACE,
            *ENRICH,
            *HEADS,
            "extracted",
            "target_score",
            "early_layer",
            "role",
            "continuation",
            "known",
            "taught",
        }
    ),
)
def test_every_column_of_the_contract_is_defined(name: str) -> None:
    assert COLUMNS[name].name == name


@pytest.mark.parametrize("name", list(COLUMNS))
def test_a_meaning_is_one_plain_sentence(name: str) -> None:
    column = COLUMNS[name]
    assert column.meaning[0].isupper() and column.meaning.endswith(".") and ". " not in column.meaning
    assert not set("\\$*`_#|[]") & set(column.meaning)
    assert 20 <= len(column.meaning) <= 140
    assert column.source


def test_units_are_those_of_the_house() -> None:
    assert {c.unit for c in COLUMNS.values()} <= {
        "", "probability", "nats", "percent", "rank", "layer", "layers", "position", "seconds", "MB", "head",
        "fraction",
    }  # fmt: skip
    for name, column in COLUMNS.items():
        if name.startswith("p_") or name.endswith("probability"):
            assert column.unit == "probability", name
        if name.endswith("_percent"):
            assert column.unit == "percent", name
        if name.endswith("rank"):
            assert column.unit == "rank", name


def test_the_vocabulary_needs_the_standard_library_alone() -> None:
    code = (
        "import sys; before = set(sys.modules); import factscope.columns;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(*sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["factscope"]

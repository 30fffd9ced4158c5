"""Results are the same after JSON, and the shipped ones are found by what was asked."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from cli_runner import PROMPT, SUBJECT, tiny_handle

from factscope.experiments import (
    attention_knockout,
    attribute_extraction,
    causal_tracing,
    heads,
    logit_lens,
    prediction,
)
from factscope.experiments.attention_knockout import KnockoutSpec
from factscope.queries import Query
from factscope.store import from_json, to_json
from factscope.store.examples import stored_examples, write_examples

QUERY = Query(prompt=PROMPT, subject=SUBJECT)


@pytest.fixture(scope="module")
def flow() -> attention_knockout.KnockoutResult:
    return attention_knockout.run(tiny_handle(), QUERY, KnockoutSpec(sources=("subject", "last")))


@pytest.mark.parametrize(
    "experiment",
    [prediction, attention_knockout, logit_lens, causal_tracing, heads, attribute_extraction],
    ids=lambda module: module.__name__,
)
def test_a_result_survives_json(experiment: object) -> None:
    result = experiment.run(tiny_handle(), QUERY)  # type: ignore[attr-defined]
    text = json.dumps(to_json(result), allow_nan=False)
    again = from_json(json.loads(text))
    assert type(again) is type(result)
    assert again.query == result.query
    assert again.spec == result.spec
    assert again.target == result.target
    pd.testing.assert_frame_equal(again.table(), result.table(), rtol=1e-5, atol=1e-4)


def test_what_was_not_computed_stays_so(flow: attention_knockout.KnockoutResult) -> None:
    p = flow.p_knockout.copy()
    p[0, 1] = np.nan
    again = from_json(json.loads(json.dumps(to_json(dataclasses.replace(flow, p_knockout=p)), allow_nan=False)))
    assert np.isnan(again.p_knockout[0, 1])
    assert len(again.table()) == len(flow.table()) - 1


def test_a_number_that_is_none_stays_so() -> None:
    result = causal_tracing.run(tiny_handle(), QUERY)
    again = from_json(json.loads(json.dumps(to_json(result), allow_nan=False)))
    assert np.isnan(again.logit_difference_clean)
    assert again.doubts == result.doubts
    assert again.peak == result.peak


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(KeyError):
        from_json({"$type": "os.system"})


def test_examples_are_found_by_what_was_asked(tmp_path, flow: attention_knockout.KnockoutResult) -> None:
    path = tmp_path / "home.json"
    write_examples([("flow", QUERY, flow.spec, flow)], path)
    (found,) = stored_examples(path).values()
    pd.testing.assert_frame_equal(found.table(), flow.table(), rtol=1e-5, atol=1e-4)
    assert stored_examples(tmp_path / "none.json") == {}

"""The stored home example is what the shipped weights give."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from write_home import EXPERIMENTS

from dashboard import picker, requests
from dashboard.link import HOME
from factscope import load
from factscope.store.examples import stored_examples, stored_result


@pytest.fixture(scope="module")
def model():
    return load("bundled")


def test_every_request_of_the_home_pages_is_stored_and_no_other() -> None:
    asked = requests.home(picker.paraphrases(HOME))
    assert all(stored_result(kind, query, spec) is not None for kind, query, spec in asked)
    assert len(stored_examples()) == len(asked) >= 5


@pytest.mark.parametrize("kind, query, spec", requests.home(picker.paraphrases(HOME)))
def test_stored_result_is_recomputed(model, kind, query, spec) -> None:
    stored, fresh = stored_result(kind, query, spec), EXPERIMENTS[kind](model, query, spec)
    assert stored.model == fresh.model
    assert stored.query == fresh.query and stored.target == fresh.target and stored.spec == fresh.spec
    assert stored.warnings == fresh.warnings
    left, right = stored.table(), fresh.table()
    assert list(left.columns) == list(right.columns) and len(left) == len(right) > 0
    for column in left.columns:
        if left[column].dtype.kind == "f":
            assert (left[column].isna() == right[column].isna()).all()
            if right[column].isna().all():
                continue
            scale = np.maximum(1.0, np.abs(right[column].to_numpy()))
            difference = np.max(np.abs(left[column].to_numpy() - right[column].to_numpy()) / scale)
            assert difference < (2e-3 if "percent" in column else 2e-5)
        else:
            assert (left[column] == right[column]).all()

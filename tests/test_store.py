"""Results that are kept: under a key that tells them apart, read-only, and the same after JSON."""

from __future__ import annotations

import dataclasses
import json
import threading

import numpy as np
import pandas as pd
import pytest
from cli_runner import PROMPT, SUBJECT, tiny_handle

from factscope.experiments import attention_knockout, logit_lens, prediction
from factscope.experiments.attention_knockout import KnockoutSpec
from factscope.experiments.logit_lens import LensSpec
from factscope.queries import Query
from factscope.store import ResultStore, from_json, result_key, to_json
from factscope.store.examples import stored_examples, write_examples
from factscope.tokens import tokenize

QUERY = Query(prompt=PROMPT, subject=SUBJECT)


@pytest.fixture(scope="module")
def flow() -> attention_knockout.KnockoutResult:
    return attention_knockout.run(tiny_handle(), QUERY, KnockoutSpec(sources=("subject", "last")))


def key(query: Query = QUERY, spec: object = None, *, kind: str = "flow", model: str = "m") -> str:
    return result_key(kind, tokenize(query, tiny_handle().tokenizer), spec or KnockoutSpec(), model)


def test_equal_requests_have_equal_keys() -> None:
    assert key() == key(dataclasses.replace(QUERY))
    assert key() == key(dataclasses.replace(QUERY, prompt=f"{PROMPT} "))  # the same tokens


def test_whatever_changes_a_number_changes_the_key() -> None:
    keys = [
        key(),
        key(kind="lens"),
        key(model="m2"),
        key(spec=KnockoutSpec(window=1)),
        key(spec=KnockoutSpec(seed=2)),
        key(dataclasses.replace(QUERY, answer="Paris")),
        key(dataclasses.replace(QUERY, answer="Paris", score="sequence")),
        key(dataclasses.replace(QUERY, foil="Rome")),
        key(dataclasses.replace(QUERY, subject="Tower")),
        key(dataclasses.replace(QUERY, bos="no")),
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("experiment", [prediction, attention_knockout, logit_lens], ids=lambda module: module.__name__)
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


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(KeyError):
        from_json({"$type": "os.system"})


def test_a_kept_result_cannot_be_changed(flow: attention_knockout.KnockoutResult) -> None:
    store = ResultStore()
    store.put("k", flow)
    with pytest.raises(ValueError, match="read-only"):
        store.get("k").p_knockout[0, 0] = 1.0  # type: ignore[union-attr]


def test_the_least_recently_used_goes_first(flow: attention_knockout.KnockoutResult) -> None:
    store = ResultStore(max_entries=2)
    store.put("a", flow)
    store.put("b", flow)
    assert store.get("a") is flow
    store.put("c", flow)
    assert store.get("b") is None
    assert store.get("a") is store.get("c") is flow


def test_many_threads_share_a_store(flow: attention_knockout.KnockoutResult) -> None:
    store = ResultStore(max_entries=8)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(200):
                store.put(f"{(number * step) % 16}", flow)
                assert store.get(f"{step % 16}") in (None, flow)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_examples_are_found_by_what_was_asked(tmp_path, flow: attention_knockout.KnockoutResult) -> None:
    path = tmp_path / "home.json"
    write_examples([("flow", QUERY, flow.spec, flow)], path)
    (found,) = stored_examples(path).values()
    pd.testing.assert_frame_equal(found.table(), flow.table(), rtol=1e-5, atol=1e-4)
    assert stored_examples(tmp_path / "none.json") == {}


def test_specs_of_two_experiments_do_not_meet() -> None:
    assert key(spec=LensSpec(), kind="lens") != key(spec=LensSpec(projection="raw"), kind="lens")

"""What the model predicts: the numbers are those of a plain forward, the verdict asks for the whole answer."""

from __future__ import annotations

import dataclasses
import functools
import json

import pandas as pd
import pytest
import torch
from cli_runner import PROMPT, SUBJECT, TINY, tiny_handle
from tiny_models import build, tiny_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from factscope import load
from factscope.errors import FactScopeError, SpecError, TargetError
from factscope.experiments import prediction
from factscope.experiments.prediction import PredictionSpec
from factscope.models.handle import ModelHandle, build_handle
from factscope.queries import Query
from factscope.tokens import answer_target, tokenize

QUERY = Query(prompt=PROMPT, subject=SUBJECT)


@pytest.fixture(scope="module")
def found() -> prediction.Prediction:
    return prediction.run(tiny_handle(), QUERY)


def plain_probabilities(ids: tuple[int, ...]) -> torch.Tensor:
    model = build("gpt2", vocab_size=len(tiny_tokenizer("byte")))
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().softmax(-1)


def test_the_numbers_are_those_of_a_plain_forward(found: prediction.Prediction) -> None:
    p = plain_probabilities(found.query.ids)[-1]
    assert found.p_target == pytest.approx(float(p.max()), abs=1e-6)
    assert found.rank == 1
    assert found.entropy == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)
    assert found.log_odds == pytest.approx(float((p.max() / (1 - p.max())).log()), abs=1e-5)
    values, ids = p.topk(10)
    assert [token.id for token in found.top] == ids.tolist()
    assert [token.probability for token in found.top] == pytest.approx(values.tolist(), abs=1e-6)
    assert [token.rank for token in found.top] == list(range(1, 11))


def test_the_columns_are_the_contract(found: prediction.Prediction) -> None:
    assert list(found.table()) == ["rank", "id", "text", "probability"]
    assert len(found.table()) == 10


def test_two_runs_give_the_same_rows(found: prediction.Prediction) -> None:
    pd.testing.assert_frame_equal(prediction.run(tiny_handle(), QUERY).table(), found.table())


def test_all_of_the_distribution_adds_up_to_one() -> None:
    size = tiny_handle().vocabulary
    rows = prediction.run(tiny_handle(), QUERY, PredictionSpec(top_k=size)).table()
    assert rows["probability"].sum() == pytest.approx(1.0, abs=1e-5)
    assert rows["id"].is_unique
    assert rows["probability"].is_monotonic_decreasing


@pytest.mark.parametrize("top_k", [0, -1, 401])
def test_a_number_of_tokens_that_there_is_not(top_k: int) -> None:
    with pytest.raises(SpecError, match=f"top-k {top_k} "):
        prediction.run(tiny_handle(), QUERY, PredictionSpec(top_k=top_k))


def test_the_whole_answer_is_scored_token_by_token() -> None:
    query = dataclasses.replace(QUERY, answer="Paris")
    target = answer_target(tiny_handle().tokenizer, tokenize(query, tiny_handle().tokenizer), "Paris")
    assert target.n_tokens > 1
    one = prediction.run(tiny_handle(), query)
    whole = prediction.run(tiny_handle(), dataclasses.replace(query, score="sequence"))
    ids = one.query.ids
    p = plain_probabilities((*ids, *target.ids[:-1]))
    expected = 1.0
    for step, token in enumerate(target.ids):
        expected *= float(p[len(ids) - 1 + step, token])
    assert one.p_target == pytest.approx(float(p[len(ids) - 1, target.id]), abs=1e-7)
    assert whole.p_target == pytest.approx(expected, rel=1e-4)
    assert one.known is whole.known is False


@pytest.mark.parametrize("answer", ["Paris", "Tokyo", "of", "e", "😀", "<s>", "1"])
def test_known_is_the_whole_answer_as_first_choice(found: prediction.Prediction, answer: str) -> None:
    assert found.known is None
    said = prediction.run(tiny_handle(), dataclasses.replace(QUERY, answer=answer))
    assert said.known is _is_greedy(found, said.target.ids)
    assert said.rank == 1 or not said.known


def _is_greedy(found: prediction.Prediction, ids: tuple[int, ...]) -> bool:
    p = plain_probabilities((*found.query.ids, *ids[:-1]))
    start = len(found.query.ids) - 1
    return [int(p[start + step].argmax()) for step in range(len(ids))] == list(ids)


def test_a_continuation_is_greedy_and_stops_in_time(found: prediction.Prediction) -> None:
    handle = tiny_handle()
    long = prediction.run(handle, Query(prompt="of " * 30))  # about 62 of 64 positions
    assert len(long.query.ids) + long.passes - 2 <= 64 + 1
    none = prediction.run(handle, QUERY, PredictionSpec(continuation_tokens=0))
    assert none.continuation == ""
    first = found.table()["text"][0]
    assert found.continuation.startswith(first) or "<" in first


def test_only_the_bundled_model_was_taught(found: prediction.Prediction) -> None:
    assert found.taught is None


@pytest.mark.parametrize(
    ("prompt", "answer", "hint"),
    [
        ("The capital of Japan is", "tokyo", "Did you mean the answer 'Tokyo'?"),
        ("The capital of Japan is Tokyo", "Tokyo", "The prompt ends in the answer 'Tokyo' already"),
        ("The capital of Japan is", "Tokyo", ""),
        ("The capital of Japan is", "Beijing", ""),
        ("Miles Davis plays the trumpet", "pet", ""),
    ],
)
def test_an_answer_that_was_probably_meant_otherwise_is_hinted_at(prompt: str, answer: str, hint: str) -> None:
    said = prediction.run(bundled(), Query(prompt=prompt, answer=answer)).warnings
    hints = [w for w in said if w.startswith(("Did you mean", "The prompt ends"))]
    assert hints == ([] if not hint else [w for w in said if hint in w])
    assert bool(hints) == bool(hint)


@functools.cache
def bundled() -> ModelHandle:
    return load("bundled")


def test_a_foil_has_a_probability(found: prediction.Prediction) -> None:
    assert found.p_foil is None
    query = dataclasses.replace(QUERY, answer="Paris", foil="Tokyo")
    foil = answer_target(tiny_handle().tokenizer, tokenize(query, tiny_handle().tokenizer), "Tokyo")
    p = plain_probabilities(found.query.ids)[-1, foil.id]
    assert prediction.run(tiny_handle(), query).p_foil == pytest.approx(float(p), abs=1e-7)


@pytest.mark.parametrize("foil", ["", " \n", "x" * 401, "Ro\0me"])
def test_a_foil_that_cannot_be_used_is_called_a_foil(foil: str) -> None:
    with pytest.raises(TargetError, match="foil"):
        prediction.run(tiny_handle(), dataclasses.replace(QUERY, answer="Paris", foil=foil))


def test_a_foil_equal_to_the_answer_is_refused() -> None:
    with pytest.raises(TargetError, match="Paris"):
        prediction.run(tiny_handle(), dataclasses.replace(QUERY, answer="Paris", foil=" Paris"))


def test_a_foil_that_the_model_has_no_row_for_is_refused() -> None:
    tokenizer = tiny_tokenizer("byte")
    model = build("gpt2", vocab_size=len(tokenizer))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    state["added_tokens"].append({"id": len(tokenizer), "content": "Zorblax", **flags})
    larger = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>"
    )
    handle = build_handle(model, larger, name=TINY, revision="test", dtype="float32", device="cpu")
    for query in (Query(prompt='They said "', foil="Zorblax"), Query(prompt='They said "', answer="Zorblax")):
        with pytest.raises(FactScopeError, match="400"):
            prediction.run(handle, query)


def test_an_answer_that_does_not_fit_behind_the_prompt_is_refused() -> None:
    for score in ("token", "sequence"):
        with pytest.raises(TargetError, match="64"):
            prediction.run(tiny_handle(), dataclasses.replace(QUERY, answer="Paris " * 60, score=score))

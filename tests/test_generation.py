"""Continuations: with and without cached keys and values the same, and those of plain forwards and a plain draw."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from cli_runner import tiny_handle
from torch import Tensor

from factscope import generation
from factscope.errors import Cancelled, SpecError
from factscope.generation import Sampling, continue_prompt, first_sentence
from factscope.interventions.base import Noise
from factscope.models.handle import ModelHandle
from tests.oracle.laboratory import distinct_prompt, handle_of, subject
from tests.tiny_models import FAMILIES

NEW = 12
SAMPLED = Sampling(top_k=4, seed=3)


@lru_cache
def handle(family: str) -> ModelHandle:
    return handle_of(FAMILIES[family](0), name=family)


def tokens(model: ModelHandle, ids: list[int], sampling: Sampling | None, **more: Any) -> list[tuple[int, ...]]:
    return [text.ids for text in continue_prompt(model, ids, NEW, sampling=sampling, **more)]


def plain(family: str, ids: list[int], sampling: Sampling | None, rows: int) -> list[tuple[int, ...]]:
    """Whole forwards of the model itself, one row at a time; each draw by numpy in float64."""
    model = FAMILIES[family](0)
    texts = []
    for row in range(rows):
        stream = np.random.RandomState([0 if sampling is None else sampling.seed, row])
        written: list[int] = []
        for _ in range(NEW):
            with torch.no_grad():
                logits = model(torch.tensor([[*ids, *written]]), use_cache=False).logits[0, -1].double().numpy()
            order = np.argsort(-logits, kind="stable")
            if sampling is None:
                written.append(int(order[0]))
                continue
            kept = np.exp(logits[order[: sampling.top_k]] - logits[order[0]])
            reached = np.cumsum(kept / kept.sum())
            written.append(int(order[int(np.searchsorted(reached, stream.random_sample(), side="right"))]))
        texts.append(tuple(written))
    return texts


@pytest.mark.parametrize("sampling", [None, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_cached_equals_uncached_equals_plain_forwards(family: str, sampling: Sampling | None) -> None:
    model = handle(family)
    ids = distinct_prompt(FAMILIES[family](0), 7, seed=2)
    cached = tokens(model, ids, sampling, rows=3)
    assert cached == tokens(model, ids, sampling, rows=3, cached=False)
    assert cached == plain(family, ids, sampling, 3)
    assert (len(set(cached)) == 1) == (sampling is None)
    assert all(len(text) == NEW for text in cached)


def test_most_families_generate_on_a_cache() -> None:
    assert sum(handle(family).capabilities["suffix"].ok for family in FAMILIES) >= 20


def test_the_cache_is_really_used(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    original = ModelHandle.forward

    def seen(self: ModelHandle, ids: Tensor, *args: Any, **more: Any) -> Tensor:
        lengths.append(ids.shape[1])
        return original(self, ids, *args, **more)

    monkeypatch.setattr(ModelHandle, "forward", seen)
    continue_prompt(handle("llama"), [5, 6, 7], 4)
    assert lengths == [3, 1, 1, 1]


def _stale_position(patch: pytest.MonkeyPatch) -> None:
    original = ModelHandle.forward

    def mutant(self: ModelHandle, ids: Tensor, plan: Any = None, *, cache: Any = None, **more: Any) -> Tensor:
        if cache is not None and cache.get_seq_length():
            more["positions"] = torch.zeros_like(ids)
        return original(self, ids, plan, cache=cache, **more)

    patch.setattr(ModelHandle, "forward", mutant)


def _forgotten_prompt(patch: pytest.MonkeyPatch) -> None:
    original = ModelHandle.forward

    def mutant(self: ModelHandle, ids: Tensor, plan: Any = None, *, cache: Any = None, **more: Any) -> Tensor:
        fresh = cache is not None and cache.get_seq_length() > 0
        return original(self, ids, plan, cache=None if fresh else cache, **more)

    patch.setattr(ModelHandle, "forward", mutant)


def _one_stream(patch: pytest.MonkeyPatch) -> None:
    state = np.random.RandomState(3)
    patch.setattr(generation.np.random, "RandomState", lambda seed: state)


def _not_renormalised(patch: pytest.MonkeyPatch) -> None:
    def mutant(logits: Tensor, top_k: int, stream: np.random.RandomState) -> int:
        values, order = logits.log_softmax(-1).topk(top_k)
        place = int((values.double().exp().cumsum(-1) <= stream.random_sample()).sum())
        return int(order[min(place, top_k - 1)])

    patch.setattr(generation, "_drawn", mutant)


@pytest.mark.parametrize("mutant", [_stale_position, _forgotten_prompt, _one_stream, _not_renormalised])
def test_planted_mistakes_are_found(
    mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = handle("gpt2")
    ids = distinct_prompt(FAMILIES["gpt2"](0), 7, seed=2)
    right = plain("gpt2", ids, SAMPLED, 3)
    mutant(monkeypatch)
    assert tokens(model, ids, SAMPLED, rows=3) != right


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_noise_is_on_the_prompt_once(family: str) -> None:
    chosen = subject(family)
    ids = distinct_prompt(chosen.model, 8, seed=1)
    values = torch.from_numpy(0.8 * np.random.RandomState(1).randn(1, 2, int(chosen.model.config.hidden_size)))
    noise = Noise(positions=(2, 3), values=values)

    def embed(words: Tensor) -> Tensor:
        changed = words.clone()
        changed[2:4] += values[0]
        return changed

    written: list[int] = []
    for _ in range(NEW):
        written.append(int(chosen.trace([*ids, *written], embed=embed).logits[-1].argmax()))
    assert tokens(chosen.handle, ids, None, noise=noise) == [tuple(written)]
    assert tokens(chosen.handle, ids, None, noise=noise, cached=False) == [tuple(written)]
    assert tokens(chosen.handle, ids, None) != [tuple(written)]


def test_a_text_does_not_depend_on_how_many_are_drawn() -> None:
    ids = [4, 9, 23]
    many = tokens(handle("llama"), ids, SAMPLED, rows=5)
    assert tokens(handle("llama"), ids, SAMPLED, rows=2) == many[:2]
    assert tokens(handle("llama"), ids, Sampling(top_k=4, seed=4), rows=5) != many
    assert tokens(handle("llama"), ids, Sampling(top_k=1), rows=2) == tokens(handle("llama"), ids, None) * 2


def test_draws_follow_the_renormalised_probabilities() -> None:
    logits = torch.tensor([2.0, -1.0, 1.0, 0.0, 3.0])
    stream = np.random.RandomState(1)
    drawn = np.array([generation._drawn(logits, 3, stream) for _ in range(20_000)])
    weights = {4: np.exp(3.0), 0: np.exp(2.0), 2: np.exp(1.0)}
    for token, weight in weights.items():
        assert (drawn == token).mean() == pytest.approx(weight / sum(weights.values()), abs=0.01)
    assert set(drawn) == set(weights)


def _speaks(monkeypatch: pytest.MonkeyPatch, model: ModelHandle, said: list[int]) -> None:
    """Whatever is asked, the model goes on with these tokens, one after the other."""
    pending = iter(said)

    def forward(self: ModelHandle, ids: Tensor, *args: Any, **more: Any) -> Tensor:
        logits = torch.zeros(ids.shape[0], 1, model.vocabulary)
        logits[:, :, next(pending)] = 9.0
        return logits

    monkeypatch.setattr(ModelHandle, "forward", forward)


def test_the_end_token_ends_a_text_and_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_handle()
    words = model.tokenizer(" Paris", add_special_tokens=False)["input_ids"]
    _speaks(monkeypatch, model, [*words, model.tokenizer.eos_token_id, *words])
    (found,) = continue_prompt(model, [1], 50)
    assert (found.ids, found.text, found.ended, found.forwards) == (tuple(words), " Paris", True, len(words) + 1)


def test_a_sentence_is_cut_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_handle()
    said = model.tokenizer(" is in Paris. And", add_special_tokens=False)["input_ids"]
    _speaks(monkeypatch, model, said * 2)
    (found,) = continue_prompt(model, [1], 50, sentence=True)
    assert found.text == " is in Paris." and not found.ended
    assert first_sentence("no end") is None and first_sentence("a? b.") == "a?"


def test_a_text_ends_where_the_model_reads_no_more() -> None:
    (found,) = continue_prompt(handle("gpt2"), [5] * 60, 50)
    assert len(found.ids) == 4
    assert continue_prompt(handle("gpt2"), [5] * 60, 0)[0].ids == ()


@pytest.mark.parametrize("top_k", [0, -1, 98])
def test_a_number_of_tokens_that_there_is_not(top_k: int) -> None:
    with pytest.raises(SpecError, match=f"top-k {top_k} "):
        continue_prompt(handle("gpt2"), [5], 4, sampling=Sampling(top_k=top_k))


def test_a_step_can_end_it() -> None:
    def stop() -> None:
        raise Cancelled()

    with pytest.raises(Cancelled):
        continue_prompt(handle("gpt2"), [5], 4, step=stop)

"""Zeroed updates against plain float64 forwards, and what holds for any weights."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pytest
import torch

from factscope.errors import CapabilityError, SpecError
from factscope.experiments import representation_zeroing
from factscope.experiments.representation_zeroing import ZeroingResult, ZeroingSpec, run
from tests.oracle.laboratory import Subject, distinct_prompt, handle_of, query_on, subject
from tests.oracle.plain import layers_of_window, log_probability
from tests.tiny_models import FAMILIES

LENGTH, LAST, LAYERS, SPAN = 8, 7, 4, (2, 5)


@lru_cache
def known(family: str) -> tuple[Subject, list[int], list[int]]:
    """A model, a prompt and its two most probable next tokens, one after the other."""
    chosen = subject(family)
    ids = distinct_prompt(chosen.model, LENGTH, seed=3)
    answer = [int(chosen.trace(ids).logits[-1].argmax())]
    answer.append(int(chosen.trace([*ids, *answer]).logits[-1].argmax()))
    return chosen, ids, answer


@lru_cache
def plain(family: str, site: str, size: int, positions: tuple[int, ...], n_answer: int) -> np.ndarray:
    """Of the clean run, then of a window of zeros around each layer."""
    chosen, ids, tokens = known(family)
    answer = tokens[:n_answer]
    found = []
    for layers in ([], *(layers_of_window(layer, size, LAYERS) for layer in range(LAYERS))):
        nothing = torch.zeros(int(chosen.model.config.hidden_size)).double()
        puts = {(site, at, position): nothing for at in layers for position in positions}
        trace = chosen.trace([*ids, *answer[:-1]], puts=puts)
        found.append(float(log_probability(trace, LENGTH, answer).exp()))
    return np.array(found)


def zeroed(family: str, n_answer: int = 1, **spec: Any) -> ZeroingResult:
    chosen, ids, tokens = known(family)
    more: dict[str, Any] = {"score": "sequence"} if n_answer > 1 else {}
    return run(chosen.handle, query_on(ids, SPAN, tokens[:n_answer], **more), ZeroingSpec(**spec))


def agrees(family: str, site: Literal["mlp", "attention"], size: int, n_answer: int = 1) -> bool:
    result = zeroed(family, n_answer, site=site, window=size, sources=("subject", "last", "3+6"))
    rows = [plain(family, site, size, where, n_answer) for where in ((2, 3, 4), (LAST,), (3, 6))]
    found = np.abs(result.p_zeroed - np.array(rows)[:, 1:]).max()
    return float(found) <= 1e-5 and abs(result.p_clean - rows[0][0]) <= 1e-5


@pytest.mark.parametrize("n_answer", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("site", ["mlp", "attention"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_zeroed_updates_are_the_plain_computation(
    family: str, site: Literal["mlp", "attention"], size: int, n_answer: int
) -> None:
    assert agrees(family, site, size, n_answer)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_zeroing_moves_probabilities_and_the_table_says_how_far(family: str) -> None:
    result = zeroed(family, sources=("each",), window=2)
    assert result.sources == tuple(map(str, range(LENGTH)))
    assert float((np.abs(result.fraction_removed[[2, 3, 4, LAST]]) > 0.05).mean()) > 0.4
    table = result.table()
    assert list(table.columns) == ["source", "layer", "window", "p_clean", "p_zeroed", "fraction_removed"]
    assert len(table) == LENGTH * LAYERS
    assert table["fraction_removed"].to_numpy() == pytest.approx(1 - table["p_zeroed"].to_numpy() / result.p_clean)
    assert zeroed(family).window == 1


def test_a_window_that_is_too_wide_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    around = representation_zeroing.window
    monkeypatch.setattr(representation_zeroing, "window", lambda layer, size, n: around(layer, size + 1, n))
    assert not agrees("gpt2", "mlp", 2)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("opt_350m", "mamba")])
def test_the_last_layer_at_other_positions_changes_nothing(family: str) -> None:
    model = FAMILIES[family](0)
    ids = distinct_prompt(model, LENGTH, seed=1)
    result = run(handle_of(model, family), query_on(ids, SPAN), ZeroingSpec(sources=("subject", "last"), window=1))
    assert result.p_zeroed[0, -1] == pytest.approx(result.p_clean, abs=1e-5)
    assert float(np.abs(result.fraction_removed).max()) > 1e-3


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"site": "hidden"}, "'hidden'"),
        ({"window": 0}, "window 0"),
        ({"window": 5}, "window 5"),
        ({"sources": ()}, "no sources"),
        ({"sources": ("special",)}, "special"),
    ],
)
def test_what_cannot_be_used_is_refused(spec: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        zeroed("gpt2", **spec)


def test_a_model_without_a_split_is_refused() -> None:
    model = FAMILIES["opt_350m"](0)
    with pytest.raises(CapabilityError, match="no pair of module outputs"):
        run(handle_of(model), query_on(distinct_prompt(model, LENGTH, seed=1), SPAN))

"""Attention knockout equals a float64 computation written out in plain algebra (tests/oracle), on GPT-2 and Llama."""

from __future__ import annotations

import copy
from collections.abc import Collection
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from factscope.experiments.attention_knockout import KnockoutSpec, run
from tests.oracle import plain_gpt2
from tests.oracle.comparison import Difference, Oracle, curve_sets, difference, grid, knockout
from tests.oracle.laboratory import Subject, distinct_prompt, handle_of, query_on, subject
from tests.oracle.plain import edges

FAMILIES = ("gpt2", "llama")
WINDOWS = (1, 3, 4, 5, 9, 10)
DEEP = {"gpt2": (12, 1, 2.0), "llama": (12, 1, 1.5)}
"""Layers, seed and scale at which windows of one layer move probabilities too."""
LENGTH = 8
LAST = LENGTH - 1


@lru_cache
def oracle(family: str, depth: int = 4, n_answer: int = 1, length: int = LENGTH) -> Oracle:
    layers, seed, scale = DEEP[family] if depth > 4 else (4, 0, 1.5)
    chosen = subject(family, layers, seed, scale)
    for seed in range(1, 100):
        ids = distinct_prompt(chosen.model, length, seed)
        found = Oracle(chosen, ids, answer_of(chosen, ids, n_answer) if n_answer > 1 else ())
        if found.score()[0] > 0.25:
            return found
    raise AssertionError("no answer that can fall")


def answer_of(chosen: Subject, ids: list[int], count: int) -> list[int]:
    """The greedy continuation, so that the whole answer has a probability that can fall."""
    tokens = list(ids)
    for _ in range(count):
        tokens.append(int(chosen.trace(tokens).logits[-1].argmax()))
    return tokens[len(ids) :]


def each(length: int = LENGTH) -> list[list[int]]:
    return [[position] for position in range(length)]


class _InFloat64(TorchFunctionMode):
    """The model's code asks for float32 in norms and rotary positions; here it gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is torch.Tensor.float:
            return args[0].double()
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth", [4, 12])
def test_plain_computation_is_the_unmodified_model(family: str, depth: int) -> None:
    o = oracle(family, depth)
    reference = copy.deepcopy(o.subject.model).double()
    for module in reference.modules():
        if hasattr(module, "inv_freq"):
            size = 2 * module.inv_freq.numel()
            module.inv_freq = 10000.0 ** (-torch.arange(0, size, 2).double() / size)
    with torch.no_grad(), _InFloat64():
        found = reference(torch.tensor([o.ids]), output_hidden_states=True)
    trace = o.subject.trace(o.ids)
    assert found.logits.dtype == torch.float64
    assert float((trace.logits - found.logits[0]).abs().max()) < 1e-10
    assert float((trace.embedding - found.hidden_states[0][0]).abs().max()) < 1e-10
    for layer in range(depth - 1):  # the last entry of hidden_states is already normed
        assert float((trace.blocks[layer] - found.hidden_states[layer + 1][0]).abs().max()) < 1e-10
    before = torch.cat([trace.embedding[None], trace.blocks[:-1]])
    assert float((before + trace.attention + trace.mlp - trace.blocks).abs().max()) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_curve_and_map_with_every_window(family: str) -> None:
    o = oracle(family, 12)
    moved = []
    for size in WINDOWS:
        curve = grid(curve_sets(LENGTH, (2, 5)), size, 12, [LAST])
        check(knockout(o, (2, 5), KnockoutSpec(window=size), curve), moved)
        full = grid(each(), size, 12, [LAST])
        check(knockout(o, (2, 5), KnockoutSpec(sources=("each",), window=size), full), moved)
    assert_visible(moved)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("span", [(0, 1), (0, 3), (2, 3), (2, 5), (4, 7), (6, 7), (5, 8), (7, 8)])
def test_subjects_of_one_and_three_tokens_first_and_late(family: str, span: tuple[int, int]) -> None:
    o = oracle(family)
    check(knockout(o, span, KnockoutSpec(), grid(curve_sets(LENGTH, span), 3, 4, [LAST])), moved := [])
    assert_visible(moved)


@pytest.mark.parametrize("family", FAMILIES)
def test_default_window_and_table(family: str) -> None:
    o = oracle(family, 12)
    result = run(o.subject.handle, query_on(o.ids, (2, 5)))
    assert result.window == 3
    check(difference(result, o, grid(curve_sets(LENGTH, (2, 5)), 3, 12, [LAST])))
    table = result.table()
    assert list(table.columns) == [
        "source",
        "layer",
        "window",
        "p_base",
        "p_knockout",
        "relative_change_percent",
        "log_odds_change",
    ]
    assert len(table) == 36
    for row in table.itertuples():
        at = result.sources.index(row.source), result.layers.index(row.layer)
        assert row.p_knockout == result.p_knockout[at]
        assert row.relative_change_percent == pytest.approx(100 * (row.p_knockout - row.p_base) / row.p_base)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_answer", [1, 3])
def test_the_logit_difference_to_a_foil(family: str, n_answer: int) -> None:
    o = oracle(family, 12, n_answer)
    query = query_on(o.ids, (2, 5), o.answer if n_answer > 1 else (), foil="q", score="sequence")
    result = run(o.subject.handle, query, KnockoutSpec(window=4))
    assert result.foil is not None and result.foil.id != o.answer[0]
    cells = grid(curve_sets(LENGTH, (2, 5)), 4, 12, list(range(LAST, LAST + n_answer)))

    def apart(forbidden: Collection[Any]) -> float:
        logits = o.subject.trace([*o.ids, *o.answer[:-1]], forbidden).logits[LAST]
        return float(logits[o.answer[0]] - logits[result.foil.id])  # type: ignore[union-attr]

    expected = np.array([[apart(cells[i, layer]) for layer in range(12)] for i in range(3)])
    assert result.logit_difference_base == pytest.approx(apart(()), abs=1e-4)
    assert result.logit_difference is not None and result.logit_difference_change is not None
    assert float(np.abs(result.logit_difference - expected).max()) < 1e-4
    assert float(np.abs(result.logit_difference_change).max()) > 0.5
    table = result.table()
    assert list(table.columns)[-1] == "logit_difference_change"
    assert table["logit_difference_change"].tolist() == result.logit_difference_change.ravel().tolist()
    check(difference(result, o, cells))


@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_heads(family: str) -> None:
    """Other heads, and other layers of a window, stay as they are."""
    o = oracle(family, 12)
    most = list(range(1, o.subject.n_heads))
    heads = {1: most, 2: [0, 3], 3: most, 5: [1], 6: list(range(o.subject.n_heads)), 7: most}
    names = ("2.0", "2.3", "5.1", "6.*", *(f"{layer}.1-{most[-1]}" for layer in (1, 3, 7)))
    moved: list[np.ndarray] = []
    for size in (1, 4, 9):
        curve = grid(curve_sets(LENGTH, (2, 5)), size, 12, [LAST], heads)
        full = grid(each(), size, 12, [LAST], heads)
        for cells, sources in ((curve, ("subject", "relation", "last")), (full, ("each",))):
            found = knockout(o, (2, 5), KnockoutSpec(sources=sources, window=size, heads=names), cells)
            check(found)
            reached = np.array([bool(cells[divmod(cell, 12)]) for cell in range(len(cells))])
            assert (found.moved[~reached] == 0).all()
            moved.append(found.moved[reached])
    assert_visible(moved)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", [3, 5, 6])
def test_target_position_before_the_last(family: str, target: int) -> None:
    o = oracle(family)
    spec = KnockoutSpec(sources=("each",), target_position=target, window=3)
    cells = grid(each(), 3, 4, [target])
    found = knockout(o, (2, 5), spec, cells)
    check(found)
    late = found.moved.reshape(LENGTH, 4)[target + 1 :]
    assert (late == 0).all()  # an edge into the future does not exist
    assert (found.moved > 1e-3).mean() > 0.25


EDGES: dict[str, tuple[tuple[str, ...], Any]] = {
    "one edge": (("last:2:0-3",), lambda n: edges(range(4), [LAST], [2])),
    "set to set": (("subject-last:0-2:*",), lambda n: edges(range(4), [4], [0, 1, 2])),
    "several queries": (
        ("4-6:0+2:1-3", "last:3:0-1"),
        lambda n: edges([1, 2, 3], [4, 5, 6], [0, 2]) | edges([0, 1], [LAST], [3]),
    ),
    "heads differ by edge": (
        ("last:subject:1-3:0,2", "5-6:1+2:0-1:1", "last:5:2"),
        lambda n: (
            edges([1, 2, 3], [LAST], [2, 3, 4], [0, 2]) | edges([0, 1], [5, 6], [1, 2], [1]) | edges([2], [LAST], [5])
        ),
    ),
    "all heads by name": (("last:0-3:0,2,3:*",), lambda n: edges([0, 2, 3], [LAST], [0, 1, 2, 3])),
    "queries above keys": (("2-6:4:*",), lambda n: edges(range(4), [4, 5, 6], [4])),
    "itself": (("last:last:*", "5:5:1-2"), lambda n: edges(range(4), [LAST], [LAST]) | edges([1, 2], [5], [5])),
    "first layer, early query": (("1:0:0", "3:0-2:0"), lambda n: edges([0], [1], [0]) | edges([0], [3], [0, 1, 2])),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_free_edges(family: str) -> None:
    o = oracle(family)
    moved: list[np.ndarray] = []
    for texts, forbidden in EDGES.values():
        check(knockout(o, (2, 5), KnockoutSpec(edges=texts), {(0, 0): forbidden(o.subject.n_heads)}), moved)
    assert_visible(moved)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_that_each_keep_a_key_are_not_refused(family: str) -> None:
    """The two edges together name every key, but no head loses all of its own."""
    o = oracle(family)
    spec = KnockoutSpec(edges=("last:0-3:1:0", "last:4-7:1:1"))
    forbidden = edges([1], [LAST], [0, 1, 2, 3], [0]) | edges([1], [LAST], [4, 5, 6, 7], [1])
    check(knockout(o, (2, 5), spec, {(0, 0): forbidden}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [2, 3])
def test_whole_answers(family: str, count: int) -> None:
    """The cut holds for every position that reads out a token of the answer."""
    o = oracle(family, 4, count)
    reading = list(range(LAST, LAST + count))
    moved: list[np.ndarray] = []
    for size in (1, 3):
        curve = grid(curve_sets(LENGTH, (2, 5)), size, 4, reading)
        check(knockout(o, (2, 5), KnockoutSpec(window=size), curve, score="sequence"), moved)
        full = grid(each(), size, 4, reading)
        check(knockout(o, (2, 5), KnockoutSpec(sources=("each",), window=size), full, score="sequence"), moved)
    assert_visible(moved)
    spec = KnockoutSpec(sources=("each",), window=3, target_position=5)
    check(knockout(o, (2, 5), spec, grid(each(), 3, 4, [5]), score="sequence"))
    heads = {1: [0], 2: [1, 2]}
    spec = KnockoutSpec(window=3, heads=("1.0", "2.1-2"))
    check(knockout(o, (2, 5), spec, grid(curve_sets(LENGTH, (2, 5)), 3, 4, reading, heads), score="sequence"))
    spec = KnockoutSpec(edges=("last:subject:1-3:0,2", "5:3:*"))
    forbidden = edges([1, 2, 3], reading, [2, 3, 4], [0, 2]) | edges(range(4), [5], [3])
    check(knockout(o, (2, 5), spec, {(0, 0): forbidden}, score="sequence"))


@pytest.mark.parametrize("count", [1, 2])
def test_certain_answers_keep_their_log_odds(count: int) -> None:
    """Where p > 0.9999 the probability says nothing any more; the log-odds still do, also of a whole answer."""
    certain = _certain(count)
    p_base, odds_base = certain.score()
    assert p_base > 0.9999
    reading = list(range(LAST, LAST + count))
    cells = grid(each(), 1, 4, reading)
    query = query_on(certain.ids, (2, 5), certain.answer if count > 1 else (), score="sequence")
    result = run(handle_of(certain.subject.model), query, KnockoutSpec(sources=("each",), window=1))
    assert result.log_odds_base == pytest.approx(odds_base, abs=5e-4)
    found = difference(result, certain, cells)
    assert found.p <= 1e-5
    assert found.log_odds_change <= 2e-3  # logits as large as 60, in float32
    odds = np.array([[certain.score(cells[row, layer])[1] for layer in range(4)] for row in range(LENGTH)])
    assert (np.abs(odds - odds_base) > 0.05).mean() > 0.5


def _certain(count: int) -> Oracle:
    """GPT-2 with its final norm turned up until the greedy answer is all but certain."""
    plain = subject("gpt2", 4, 0, 1.5)
    model = copy.deepcopy(plain.model)
    with torch.no_grad():
        model.transformer.ln_f.weight *= 4
        model.transformer.ln_f.bias *= 4
    sharp = Subject(model=model, plain=plain_gpt2)
    for seed in range(200):
        ids = torch.randperm(90, generator=torch.Generator().manual_seed(seed))[:LENGTH].add(3).tolist()
        found = Oracle(sharp, ids, answer_of(sharp, ids, count))
        if 0.99995 < found.score()[0] < 1 - 1e-8:
            return found
    raise AssertionError("no certain answer found")


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_nothing_cut_everything_twice(family: str) -> None:
    """True for any weights: no edge, no change; a key nobody reads is dead."""
    o = oracle(family)
    spec = KnockoutSpec(sources=("each",), window=1, heads=("3.0",))
    result = run(o.subject.handle, query_on(o.ids, (2, 5)), spec)
    assert (result.log_odds[:, :3] == result.log_odds_base).all()
    # The exponential of a number may differ in its last bit from the same number's in a vector.
    np.testing.assert_array_max_ulp(result.p_knockout[:, :3], np.full((LENGTH, 3), result.p_base), maxulp=2)
    dead = KnockoutSpec(edges=("3-7:2:*",))
    first = run(o.subject.handle, query_on(o.ids, (4, 6)), dead)
    other = [*o.ids]
    other[2] = next(t for t in range(3, 97) if t not in o.ids)
    second = run(o.subject.handle, query_on(other, (4, 6), [o.answer[0]]), dead)
    assert first.target.ids == second.target.ids
    assert first.p_knockout[0, 0] == pytest.approx(second.p_knockout[0, 0], abs=1e-6)
    assert abs(first.p_base - second.p_base) > 1e-3


def check(found: Difference, moved: list[np.ndarray] | None = None) -> None:
    assert found.ok, found
    if moved is not None:
        moved.append(found.moved)


def assert_visible(moved: Collection[np.ndarray]) -> None:
    """At the default initialisation nothing moves and every comparison passes."""
    assert float((np.concatenate(list(moved)) > 0.05).mean()) >= 0.5

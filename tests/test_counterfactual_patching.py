"""States of one question in the run of another, against plain float64 forwards."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from factscope import load
from factscope.errors import CapabilityError, SpecError, SubjectError, TargetError
from factscope.experiments import counterfactual_patching
from factscope.experiments.counterfactual_patching import (
    CounterfactualResult,
    CounterfactualSpec,
    paired,
    run,
    second_question,
)
from factscope.interventions.intervention import Patch
from factscope.queries import Query
from factscope.tokens import tokenize
from tests.oracle.laboratory import Subject, distinct_prompt, handle_of, query_on, subject, word_tokenizer, words
from tests.oracle.plain import Trace, layers_of_window
from tests.tiny_models import FAMILIES

LENGTH, LAYERS, SPAN = 8, 4, (2, 4)
FIELDS = {"hidden": "blocks", "mlp": "mlp", "attention": "attention"}
SITES = {"hidden": "output", "mlp": "mlp", "attention": "attention"}
OTHERS: dict[str, Callable[[list[int], list[int]], tuple[list[int], tuple[int, int]]]] = {
    "another subject": lambda ids, fresh: ([*ids[:2], *fresh[:2], *ids[4:]], (2, 4)),
    "a longer subject": lambda ids, fresh: ([*ids[:2], *fresh[:3], *ids[4:]], (2, 5)),
    "another relation": lambda ids, fresh: ([*ids[:4], *fresh[:4]], (2, 4)),
    "a shorter relation": lambda ids, fresh: ([ids[0], *ids[2:4], *fresh[:3]], (1, 3)),
}
Made = tuple[Subject, list[int], list[int], tuple[int, int]]


@lru_cache
def asked(family: str, case: str) -> Made:
    """A model, a prompt, and another one with its subject's span, of the prompts on which most cells show."""
    chosen = subject(family)
    found: list[tuple[float, Made]] = []
    for seed in range(1, 12):
        ids = distinct_prompt(chosen.model, LENGTH, seed)
        fresh = [token for token in range(3 + seed, 97) if token not in ids][:4]
        other, span = OTHERS[case](ids, fresh)
        own, foreign = chosen.trace(ids), chosen.trace(other)
        answer, second = (int(trace.logits[-1].argmax()) for trace in (own, foreign))
        if answer == second:
            continue
        made = chosen, ids, other, span
        grid = plain(made, own, foreign, ids, pairs(LENGTH, SPAN, len(other), span), answer, second)
        clean = float(own.logits[-1].softmax(-1)[answer])
        found.append((float((np.abs(grid[0] - clean) > 0.05).mean()), made))
    assert found
    return max(found, key=lambda one: one[0])[1]


def pairs(n: int, span: tuple[int, int], m: int, other: tuple[int, int]) -> list[tuple[int, int]]:
    """Partners, written out: each part counted from its end."""
    found = []
    for (a, b), (c, d) in zip(((0, span[0]), span, (span[1], n)), ((0, other[0]), other, (other[1], m)), strict=True):
        found += [(b - k, d - k) for k in range(1, min(b - a, d - c) + 1)]
    return sorted(found)


def plain(
    made: Made,
    base: Trace,
    source: Trace,
    ids: list[int],
    partners: list[tuple[int, int]],
    answer: int,
    second: int,
    site: str = "hidden",
    size: int = 1,
) -> np.ndarray:
    """[p, p of the other answer, logit difference; position, layer]."""
    chosen = made[0]
    grid = np.empty((3, len(partners), LAYERS))
    for i, (here, there) in enumerate(partners):
        for layer in range(LAYERS):
            puts = {
                (SITES[site], at, here): getattr(source, FIELDS[site])[at, there]
                for at in layers_of_window(layer, size, LAYERS)
            }
            row = chosen.trace(ids, puts=puts).logits[-1]
            p = row.softmax(-1)
            grid[:, i, layer] = float(p[answer]), float(p[second]), float(row[answer] - row[second])
    return grid


def patched(family: str, case: str, **spec: Any) -> CounterfactualResult:
    chosen, ids, other, span = asked(family, case)
    named = CounterfactualSpec(prompt=words(other), subject=words(other[slice(*span)]), **spec)
    return run(chosen.handle, query_on(ids, SPAN), named)


def agrees(family: str, case: str, **spec: Any) -> bool:
    made = asked(family, case)
    chosen, ids, other, span = made
    result = patched(family, case, **spec)
    own, foreign = chosen.trace(ids), chosen.trace(other)
    answer, second = (int(trace.logits[-1].argmax()) for trace in (own, foreign))
    partners = pairs(LENGTH, SPAN, len(other), span)
    site, size = spec.get("site", "hidden"), spec.get("window") or 1
    if spec.get("direction") == "into_other":
        swapped = sorted((there, here) for here, there in partners)
        right = plain(made, foreign, own, other, swapped, answer, second, site, size)
        partners = swapped
    else:
        right = plain(made, own, foreign, ids, partners, answer, second, site, size)
    found = np.stack([result.p_patched, result.p_other_patched, result.logit_difference_patched])
    if list(zip(result.positions, result.partners, strict=True)) != partners or found.shape != right.shape:
        return False
    ends = [result.p_clean, result.p_other_clean, result.p_counterfactual, result.p_other_counterfactual]
    right_ends = [float(trace.logits[-1].softmax(-1)[token]) for trace in (own, foreign) for token in (answer, second)]
    off = max(float(np.abs(found[:2] - right[:2]).max()), float(np.abs(np.array(ends) - right_ends).max()))
    apart = [float(trace.logits[-1][answer] - trace.logits[-1][second]) for trace in (own, foreign)]
    assert [result.logit_difference_clean, result.logit_difference_counterfactual] == pytest.approx(apart, abs=5e-4)
    return off <= 1e-5 and float(np.abs(found[2] - right[2]).max()) <= 5e-4


@pytest.mark.parametrize("direction", ["into_query", "into_other"])
@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_cell_is_the_plain_computation(family: str, case: str, direction: str) -> None:
    assert agrees(family, case, direction=direction)
    assert agrees(family, case, direction=direction, site="mlp", window=2)
    assert agrees(family, case, direction=direction, site="attention", window=1)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_patches_move_probabilities(family: str) -> None:
    result = patched(family, "a shorter relation")
    assert float((np.abs(result.p_patched - result.p_clean) > 0.05).mean()) >= 0.3


def wrong_partner(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        counterfactual_patching, "paired", lambda mine, other: dict(zip(range(LENGTH), range(LENGTH), strict=True))
    )


def same_positions(patch: pytest.MonkeyPatch) -> None:
    original = Patch.values
    patch.setattr(
        Patch,
        "values",
        lambda self, base: original(
            Patch(layer=self.layer, site=self.site, positions=self.positions, source=self.source), base
        ),
    )


def window_too_wide(patch: pytest.MonkeyPatch) -> None:
    around = counterfactual_patching.window
    patch.setattr(counterfactual_patching, "window", lambda layer, size, n: around(layer, size + 2, n))


@pytest.mark.parametrize("mutant", [wrong_partner, same_positions, window_too_wide])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_planted_mistake_is_found(
    family: str, mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(family, "a longer subject")
    mutant(monkeypatch)
    assert not agrees(family, "a longer subject")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_read_outs_last_state_makes_the_other_answer(name: str) -> None:
    """On every family: all that is read out comes from the other run then, whatever the number of tokens."""
    model = FAMILIES[name](0)
    for seed in range(1, 6):
        ids = distinct_prompt(model, LENGTH, seed)
        fresh = [token for token in range(3, 97) if token not in ids][:4]
        other, span = OTHERS["a longer subject"](ids, fresh)
        spec = CounterfactualSpec(prompt=words(other), subject=words(other[slice(*span)]), positions=("last",))
        try:
            result = run(handle_of(model, name), query_on(ids, SPAN), spec)
        except TargetError:
            continue
        assert result.p_patched[0, -1] == pytest.approx(result.p_counterfactual, abs=1e-5)
        assert result.p_other_patched[0, -1] == pytest.approx(result.p_other_counterfactual, abs=1e-5)
        assert result.p_other_counterfactual > result.p_counterfactual
        return
    raise AssertionError("all prompts have one answer")


def test_one_cell_a_row_and_the_whole_map_agree() -> None:
    whole = patched("gpt2", "another subject")
    row = patched("gpt2", "another subject", positions=("subject-last",))
    one = patched("gpt2", "another subject", positions=("3",), layers=(2,))
    assert row.p_patched[0] == pytest.approx(whole.p_patched[3], abs=1e-6)
    assert one.p_patched[0, 0] == pytest.approx(whole.p_patched[3, 2], abs=1e-6)
    assert (one.positions, one.layers, one.passes) == ((3,), (2,), 1)
    assert list(whole.table().columns) == [
        "site", "position", "partner", "layer", "p_patched", "p_other_patched", "logit_difference",
    ]  # fmt: skip
    assert len(whole.table()) == LENGTH * LAYERS


def test_another_subject_alone_is_the_same_sentence() -> None:
    chosen, ids, _, _ = asked("gpt2", "a longer subject")
    fresh = [token for token in range(3, 97) if token not in ids][:3]
    by_subject = run(chosen.handle, query_on(ids, SPAN), CounterfactualSpec(subject=words(fresh)))
    assert list(by_subject.other.ids) == [*ids[:2], *fresh, *ids[4:]]
    assert by_subject.other.subject == (2, 5)


@pytest.mark.parametrize("prompt", ["The capital of Japan is", "Japan is a country on the continent of"])
def test_the_second_sentence_has_no_space_that_the_tokenizer_put_first(prompt: str) -> None:
    model = load("bundled")
    query = tokenize(Query(prompt=prompt, subject="Japan"), model.tokenizer)
    other = second_question(model, query, CounterfactualSpec(subject=" Miles Davis "))
    assert (other.query.prompt, other.query.subject) == (prompt.replace("Japan", "Miles Davis"), "Miles Davis")


def test_pairs_of_any_two_questions() -> None:
    tokenizer = word_tokenizer()
    mine = tokenize(Query(prompt="w3 w4 w5 w6 w7 w8", subject="w5 w6"), tokenizer)
    theirs = tokenize(Query(prompt="w5 w6 w9 w10 w11 w12", subject="w5"), tokenizer)
    assert paired(mine, theirs) == {3: 0, 4: 4, 5: 5}
    assert paired(theirs, mine) == {0: 3, 4: 4, 5: 5}


def test_a_start_token_is_never_paired_with_a_word() -> None:
    tokenizer = load("bundled").tokenizer
    mine = tokenize(Query(prompt="The capital of Japan is", subject="Japan"), tokenizer)
    theirs = tokenize(Query(prompt="Miles Davis plays the", subject="Miles Davis"), tokenizer)
    pairs = paired(mine, theirs)
    special = {p for p, token in enumerate(mine.tokens) if token.role == "special"}
    assert special == {0}
    assert pairs[0] == 0
    assert {1, 2, 3}.isdisjoint(pairs)
    assert (0, 0) in paired(theirs, mine).items()
    bare = tokenize(Query(prompt="The capital of Japan is", subject="Japan", bos="no"), tokenizer)
    assert 0 not in paired(mine, bare)


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ({}, SpecError, "no second question"),
        ({"site": "block", "subject": "w9"}, SpecError, "'block'"),
        ({"subject": "w9", "window": 7, "site": "mlp"}, SpecError, "window 7"),
        ({"subject": "w9", "layers": (4,)}, SpecError, "layers"),
        ({"subject": "w9", "positions": ("2",)}, SpecError, "no partner"),
        ({"subject": "w9", "positions": ("far",)}, SpecError, "far"),
        ({"prompt": "w9 w10", "subject": "w11"}, SubjectError, "w11"),
    ],
)
def test_what_cannot_be_used_is_refused(spec: dict[str, Any], error: type[Exception], says: str) -> None:
    chosen = subject("gpt2")
    query = query_on([20, 21, 22, 23, 24, 25], (2, 4))
    with pytest.raises(error, match=says):
        run(chosen.handle, query, CounterfactualSpec(**spec))


def test_a_query_that_is_its_own_counterfactual_is_refused() -> None:
    chosen, ids, other, span = asked("gpt2", "another subject")
    query = query_on(ids, SPAN)
    with pytest.raises(SpecError, match="the query itself"):
        run(chosen.handle, query, CounterfactualSpec(prompt=words(ids)))
    with pytest.raises(TargetError, match="nothing tells them apart"):
        named = CounterfactualSpec(prompt=words(other), subject=words(other[slice(*span)]), answer="w7")
        run(chosen.handle, query_on(ids, SPAN, [7]), named)
    with pytest.raises(SubjectError, match="has none"):
        run(chosen.handle, Query(prompt=words(ids)), CounterfactualSpec(subject="w9"))
    model = FAMILIES["opt_350m"](0)
    with pytest.raises(CapabilityError, match="no pair of module outputs"):
        run(handle_of(model), query, CounterfactualSpec(subject="w9 w8", site="mlp"))

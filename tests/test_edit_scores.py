"""Scores of edits: the formulas by hand, planted mistakes, and what has no score."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from factscope.columns import COLUMNS
from factscope.experiments import edit_scores, edit_texts
from factscope.experiments.answers import AnswerScore
from factscope.experiments.edit_scores import (
    NAMES,
    Asked,
    FactProbes,
    FactScores,
    Pair,
    essence_score,
    harmonic_mean,
    neighbourhood_score,
    rewrite_score,
    score_fact,
    summarise,
)
from tests.oracle.plain_evaluation import entropies, tf_idf_cosine

INJECTION, ERASURE = "error-injection", "fact-erasure"


def of(*p: float, greedy: bool = False) -> AnswerScore:
    return AnswerScore(log_p=tuple(math.log(value) for value in p), greedy=greedy)


def pair(before: tuple[AnswerScore, AnswerScore | None], after: tuple[AnswerScore, AnswerScore | None]) -> Pair:
    return Pair(before=Asked(target=before[0], true=before[1]), after=Asked(target=after[0], true=after[1]))


# ------------------------------------------------------------------------------------------------------- Hase's scores


def test_a_rewrite_that_gains_nothing_scores_the_smallest_number() -> None:
    assert rewrite_score(of(0.5), of(0.1), INJECTION) == 2e-8
    assert rewrite_score(of(0.5), of(0.5), "fact-forcing") == 2e-8
    assert rewrite_score(of(0.2), of(0.8), ERASURE) == 0.0


@pytest.mark.parametrize("problem", ["tracing-reversal", "fact-amplification", "fact-forcing", INJECTION])
def test_all_problems_but_erasure_gain(problem: str) -> None:
    assert rewrite_score(of(0.25), of(0.5), problem) == pytest.approx(1 / 3)


def test_the_whole_target_counts_as_a_product() -> None:
    before, after = of(0.5, 0.4), of(0.9, 0.8)
    assert rewrite_score(before, after, INJECTION) == pytest.approx((0.72 - 0.2) / 0.8)
    assert of(0.9, 0.8).per_token == pytest.approx(math.sqrt(0.72))
    assert of(0.9, 0.8).first == pytest.approx(0.9)


def test_a_certain_target_leaves_room_that_float32_cannot_hold() -> None:
    nearly = AnswerScore(log_p=(-1e-12,), greedy=True)
    nearer = AnswerScore(log_p=(-0.25e-12,), greedy=True)
    assert rewrite_score(nearly, nearer, INJECTION) == pytest.approx(0.75, rel=1e-3)
    certain = AnswerScore(log_p=(0.0,), greedy=True)
    assert math.isnan(rewrite_score(certain, certain, INJECTION))


@given(st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_scores_lie_between_none_and_all(before: float, after: float) -> None:
    for problem in (INJECTION, ERASURE):
        assert 0 <= rewrite_score(of(before), of(after), problem) <= 1 + 1e-12
    assert 0 <= neighbourhood_score(before, after) <= 1
    assert neighbourhood_score(before, before) == 1


@pytest.mark.parametrize(("before", "after", "score"), [(10, 10, 1), (10, 9, 1), (10, 12.5, 0.5), (10, 40, 0)])
def test_essence_is_what_perplexity_did_not_grow(before: float, after: float, score: float) -> None:
    assert essence_score(before, after) == pytest.approx(score)


def test_means() -> None:
    assert harmonic_mean([1, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert harmonic_mean([1, 0, 1]) == 0
    assert math.isnan(harmonic_mean([1, math.nan]))


# --------------------------------------------------------------------------------------------------------- one fact


def example() -> FactProbes:
    """A fact with two paraphrases, three neighbours and two other facts; the target has two tokens, the answer one."""
    return FactProbes(
        fact=pair((of(0.1, 0.2), of(0.9)), (of(0.8, 0.9, greedy=True), of(0.1))),
        paraphrases=(
            pair((of(0.1, 0.1), of(0.8)), (of(0.6, 0.9, greedy=True), of(0.2))),
            pair((of(0.2, 0.3), of(0.7)), (of(0.3, 0.4), of(0.6))),
        ),
        neighbours=(
            pair((of(0.1, 0.5), of(0.7, greedy=True)), (of(0.4, 0.5), of(0.6, greedy=True))),
            pair((of(0.05, 0.5), of(0.6, greedy=True)), (of(0.5, 0.6), of(0.2))),
            pair((of(0.2, 0.5), of(0.1)), (of(0.25, 0.5), of(0.3, greedy=True))),
        ),
        others=(
            pair((of(0.01, 0.5), of(0.9, greedy=True)), (of(0.02, 0.5), of(0.3))),
            pair((of(0.01, 0.5), of(0.9, greedy=True)), (of(0.02, 0.5), of(0.8, greedy=True))),
        ),
    )


EXPECTED = {
    "rewrite": (0.72 - 0.02) / 0.98,
    "paraphrase": ((0.54 - 0.01) / 0.99 + (0.12 - 0.06) / 0.94) / 2,
    "neighbourhood": np.mean([1 - 0.15 / 0.95, 1 - 0.275 / 0.975, 1 - 0.025 / 0.9]),
    "es": 1.0,
    "em": math.sqrt(0.72) - 0.1,
    "ps": 0.5,
    "pm": (math.sqrt(0.54) - 0.2 + math.sqrt(0.12) - 0.6) / 2,
    "ns": 1 / 3,
    "nm": (0.6 - math.sqrt(0.2) + 0.2 - math.sqrt(0.3) + 0.3 - math.sqrt(0.125)) / 3,
    "exact_rewrite": 1.0,
    "exact_paraphrase": 0.5,
    "exact_neighbourhood": 2 / 3,
    "neighbours_kept": 0.5,
    "other_relations_kept": 0.5,
}


def agrees(scores: FactScores) -> bool:
    found = all(getattr(scores, name) == pytest.approx(value, abs=1e-12) for name, value in EXPECTED.items())
    hase = [EXPECTED[name] for name in ("rewrite", "paraphrase", "neighbourhood")]
    return (
        found
        and scores.overall == pytest.approx(np.mean(hase))
        and scores.overall_essence == pytest.approx(np.mean([*hase, 0.4]))
        and scores.overall_harmonic == pytest.approx(3 / sum(1 / value for value in hase))
        and scores.s == pytest.approx(3 / (1 + 2 + 3))
    )


def test_every_score_of_a_fact_by_hand() -> None:
    assert agrees(score_fact(example(), INJECTION, essence=0.4))


MISTAKES: tuple[Callable[[pytest.MonkeyPatch], None], ...] = (
    lambda patch: patch.setattr(AnswerScore, "probability", property(lambda self: self.per_token)),
    lambda patch: patch.setattr(AnswerScore, "per_token", property(lambda self: self.probability)),
    lambda patch: patch.setattr(AnswerScore, "per_token", property(lambda self: self.first)),
    lambda patch: patch.setattr(edit_scores, "_mean", lambda values: float(values[0])),
    lambda patch: patch.setattr(edit_scores, "_true_minus_new", edit_scores._new_minus_true),
    lambda patch: patch.setattr(edit_scores, "neighbourhood_score", lambda p, q: 1 - abs(q - p)),
    lambda patch: patch.setattr(edit_scores, "rewrite_score", lambda b, a, problem: a.probability - b.probability),
    lambda patch: patch.setattr(edit_scores, "harmonic_mean", lambda values: float(np.mean(values))),
    lambda patch: patch.setattr(
        edit_scores, "_kept", lambda pairs: float(np.mean([bool(p.after.true and p.after.true.greedy) for p in pairs]))
    ),
)  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_found(
    mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    assert not agrees(score_fact(example(), INJECTION, essence=0.4))


def test_the_first_prompt_alone_as_in_the_released_code() -> None:
    first = score_fact(example(), INJECTION, averaging="first")
    assert first.paraphrase == pytest.approx((0.54 - 0.01) / 0.99)
    assert first.neighbourhood == pytest.approx(1 - 0.15 / 0.95)
    assert first.ps == 0.5, "ROME's scores are means all the same"


def test_what_was_not_asked_has_no_score() -> None:
    alone = score_fact(FactProbes(fact=example().fact), INJECTION)
    missing = {name for name in NAMES if math.isnan(getattr(alone, name))}
    assert missing == set(NAMES) - {"rewrite", "es", "em", "exact_rewrite"}


def test_a_target_that_is_the_true_answer_beats_nothing() -> None:
    same = score_fact(replace(example(), contrasts=False), "fact-amplification")
    assert all(math.isnan(getattr(same, name)) for name in ("es", "em", "ps", "pm", "ns", "nm", "s"))
    assert same.neighbours_kept == 0.5 and same.rewrite == pytest.approx(EXPECTED["rewrite"])


# ----------------------------------------------------------------------------------------------------- several facts


def several() -> tuple[list[FactScores], list[str]]:
    random = np.random.default_rng(3)
    one = score_fact(example(), INJECTION, essence=0.4)
    scores = [replace(one, es=float(random.random() > 0.3), ps=random.random(), ns=random.random()) for _ in range(12)]
    scores[4] = replace(scores[4], ps=math.nan)
    return scores, [f"s{i // 2}" for i in range(12)]


def test_means_over_facts_leave_out_those_without_a_score() -> None:
    scores, subjects = several()
    found = summarise(scores, subjects)
    for name in ("es", "ps", "ns"):
        values = [getattr(one, name) for one in scores if not math.isnan(getattr(one, name))]
        assert found[name].value == pytest.approx(np.mean(values)) and found[name].n == len(values)
        assert found[name].low <= found[name].value <= found[name].high
    assert found["ps"].n == 11 and found["es"].n == 12


def test_s_is_the_harmonic_mean_of_means() -> None:
    scores, subjects = several()
    parts = [np.nanmean([getattr(one, name) for one in scores]) for name in ("es", "ps", "ns")]
    found = summarise(scores, subjects)["s"]
    assert found.value == pytest.approx(3 / sum(1 / part for part in parts))
    assert found.value != pytest.approx(np.mean([harmonic_mean((one.es, one.ps, one.ns)) for one in several()[0][:4]]))
    assert found.low < found.value < found.high and found.n == 12


def bootstrap_of_s(scores: Sequence[FactScores], subjects: Sequence[str], seed: int, draws: int) -> list[float]:
    names = sorted(set(subjects))
    drawn = np.random.default_rng(seed).integers(0, len(names), size=(draws, len(names)))
    values = []
    for row in drawn:
        chosen = [one for number in row for one, name in zip(scores, subjects, strict=True) if name == names[number]]
        parts = [np.nanmean([getattr(one, name) for one in chosen]) for name in ("es", "ps", "ns")]
        values.append(harmonic_mean([float(part) for part in parts]))
    return np.quantile(values, [0.025, 0.975]).tolist()


def test_subjects_are_drawn_together() -> None:
    scores, subjects = several()
    found = summarise(scores, subjects, seed=5, draws=200)["s"]
    assert [found.low, found.high] == pytest.approx(bootstrap_of_s(scores, subjects, 5, 200))
    alone = summarise(scores, [str(i) for i in range(12)], seed=5, draws=200)["s"]
    assert alone.value == pytest.approx(found.value) and (alone.low, alone.high) != (found.low, found.high)


def test_one_failure_makes_s_zero_and_no_warning() -> None:
    scores, subjects = several()
    found = summarise([replace(one, ns=0.0) for one in scores], subjects)["s"]
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
    none = summarise([replace(one, ns=math.nan) for one in scores], subjects)["s"]
    assert math.isnan(none.value) and none.n == 0
    assert summarise([], [])["s"].n == 0


def test_every_score_has_its_protocol() -> None:
    for name in (*NAMES, "fluency", "consistency"):
        assert COLUMNS[name].source != "FactScope" or name.endswith("_kept")


# -------------------------------------------------------------------------------------------------------------- texts


@given(st.lists(st.sampled_from("abcd"), min_size=3, max_size=30))
def test_entropy_is_counted_right(letters: list[str]) -> None:
    assert edit_texts.n_gram_entropy(" ".join(letters)) == pytest.approx(entropies(letters), abs=1e-9)


def test_a_text_without_pairs_has_no_entropy() -> None:
    assert edit_texts.n_gram_entropy("") == edit_texts.n_gram_entropy("word") == 0.0
    assert math.isnan(edit_texts.fluency([]))
    assert edit_texts.fluency(["a b a b a c", "a"]) == pytest.approx(75.365, abs=1e-3)


def test_words_are_split_without_a_download() -> None:
    assert edit_texts.words("It's Paris. Yes, Paris.") == ["It", "'s", "Paris.", "Yes", ",", "Paris", "."]


def test_consistency_is_a_cosine_of_weighed_words() -> None:
    texts = ["The tower is in Rome", "Rome is a city"]
    references = ["Rome is the capital of Italy", "The city of Rome has seven hills", "Paris is in France"]

    def words(text: str) -> list[str]:
        return [word.lower() for word in text.split() if len(word) > 1]

    right = 100 * tf_idf_cosine([words(text) for text in texts], [words(text) for text in references])
    assert edit_texts.consistency(texts, references) == pytest.approx(right, abs=1e-9)
    assert edit_texts.consistency(references, references) == pytest.approx(100)
    assert edit_texts.consistency(["nothing shared here"], ["entirely other words"]) == 0
    assert math.isnan(edit_texts.consistency([""], references)) and math.isnan(edit_texts.consistency(texts, [""]))

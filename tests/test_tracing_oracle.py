"""Causal tracing equals plain float64 forwards, cell by cell and sample by sample; its noise is the promised stream."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from factscope.experiments import causal_tracing
from factscope.experiments.causal_tracing import TraceResult, TraceSpec, run
from factscope.interventions import base as bases
from factscope.interventions.base import Noise
from factscope.interventions.noise import NoiseSource, noise_source, subject_embeddings
from tests.oracle.laboratory import Subject, distinct_prompt, query_on, subject, words
from tests.oracle.plain_tracing import Answer, Question, noise_of, trace

FAMILIES = ("gpt2", "llama")
LENGTH, LAYERS, SAMPLES, STD = 8, 4, 3, 0.8
SPANS = ((3, 4), (1, 4))
ROUNDING, ODDS = 1e-5, 5e-4
Changes = dict[str, Any]


def width(chosen: Subject) -> int:
    return int(chosen.model.config.hidden_size)


@lru_cache
def asked(family: str, span: tuple[int, int], n_answer: int = 1) -> tuple[Subject, Question]:
    """Of some prompts, the one on which most cells show; its answer is its own first choice."""
    chosen = subject(family)
    found: list[tuple[float, Question]] = []
    for seed in range(1, 25):
        ids = distinct_prompt(chosen.model, LENGTH, seed)
        tokens = list(ids)
        for _ in range(n_answer):
            tokens.append(int(chosen.trace(tokens).logits[-1].argmax()))
        noise = noise_of(STD, 1, SAMPLES, span[1] - span[0], width(chosen))
        question = Question(ids=ids, span=span, answer=tokens[LENGTH:], noise=noise)
        found.append((visible(trace(chosen, question), span), question))
    return chosen, max(found, key=lambda one: one[0])[1]


def visible(right: Answer, span: tuple[int, int]) -> float:
    """Share of the cells that move p by more than 0.05, of those that can: the subject's and the read-out's."""
    effect = np.abs(right.restored[0] - right.corrupted[0])
    return float((np.concatenate([effect[slice(*span), :-1].ravel(), effect[-1]]) > 0.05).mean())


@lru_cache(maxsize=64)
def expected(family: str, span: tuple[int, int], n_answer: int, changes: tuple[tuple[str, Any], ...]) -> Answer:
    chosen, question = asked(family, span, n_answer)
    fields: dict[str, Any] = dict(changes)
    if "extra" in fields or "seed" in fields:
        tokens = min(span[1] + fields.pop("extra", 0), LENGTH) - span[0]
        fields["noise"] = noise_of(STD, fields.pop("seed", 1), SAMPLES, tokens, width(chosen))
    if fields.pop("twice", False):
        fields["second"] = noise_of(STD, 1, SAMPLES, span[1] - span[0], width(chosen), which=1)
    return trace(chosen, dataclasses.replace(question, **fields))


def found(family: str, span: tuple[int, int], n_answer: int = 1, **spec: Any) -> TraceResult:
    chosen, question = asked(family, span, n_answer)
    more: dict[str, Any] = {"score": "sequence"} if n_answer > 1 else {}
    query = query_on(question.ids, span, question.answer, **more)
    return run(chosen.handle, query, TraceSpec(**{"noise": str(STD), "samples": SAMPLES, **spec}))


def apart(result: TraceResult, right: Answer, seed: int = 0) -> tuple[float, float]:
    """Largest deviations of probabilities and of log-odds; infinite where a number is missing."""
    p = [result.p_clean, result.p_corrupted_by_seed[seed], *result.p_restored_by_seed[seed].ravel()]
    odds = [result.log_odds_clean, result.log_odds_corrupted_by_seed[seed]]
    odds += [*result.log_odds_restored_by_seed[seed].ravel()]
    right_p, right_odds = (np.array([right.clean[k], right.corrupted[k], *right.restored[k].ravel()]) for k in (0, 1))
    if not (np.isfinite(p).all() and np.isfinite(odds).all()) or len(p) != len(right_p):
        return np.inf, np.inf
    return float(np.abs(p - right_p).max()), float(np.abs(odds - right_odds).max())


def agrees(family: str, span: tuple[int, int], spec: Changes, plain: Changes, n_answer: int = 1) -> bool:
    result = found(family, span, n_answer, **spec)
    p, odds = apart(result, expected(family, span, n_answer, tuple(plain.items())))
    return p <= ROUNDING and odds <= ODDS


CASES: dict[str, tuple[Changes, Changes]] = {
    "hidden": ({}, {}),
    "mlp, default window": ({"site": "mlp"}, {"site": "mlp"}),
    "mlp, window 2": ({"site": "mlp", "window": 2}, {"site": "mlp", "size": 2}),
    "mlp, window 3": ({"site": "mlp", "window": 3}, {"site": "mlp", "size": 3}),
    "attention, window 1": ({"site": "attention", "window": 1}, {"site": "attention"}),
    "attention, window 4": ({"site": "attention", "window": 4}, {"site": "attention", "size": 4}),
    "mlp severed": ({"sever": "mlp"}, {"sever": "mlp"}),
    "attention severed": ({"sever": "attention"}, {"sever": "attention"}),
    "mlp severed, second draw": ({"sever": "mlp", "sever_draws": "compat"}, {"sever": "mlp", "twice": True}),
    "attention severed, second draw": (
        {"sever": "attention", "sever_draws": "compat"},
        {"sever": "attention", "twice": True},
    ),
    "mlp with attention severed": (
        {"site": "mlp", "window": 2, "sever": "attention"},
        {"site": "mlp", "size": 2, "sever": "attention"},
    ),
    "mlp with other mlps severed": (
        {"site": "mlp", "window": 2, "sever": "mlp"},
        {"site": "mlp", "size": 2, "sever": "mlp"},
    ),
    "in the place": ({"replace": True}, {"replace": True}),
    "extra tokens": ({"extra_tokens": 2}, {"extra": 2}),
    "another seed": ({"seeds": (7,)}, {"seed": 7}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_cell_is_the_plain_computation(family: str, span: tuple[int, int], case: str) -> None:
    assert agrees(family, span, *CASES[case])


@pytest.mark.parametrize("family", FAMILIES)
def test_traces_move_probabilities(family: str) -> None:
    """At the default initialisation nothing moves and every comparison passes."""
    for span in SPANS:
        shares = [
            visible(expected(family, span, 1, tuple(CASES[case][1].items())), span)
            for case in ("hidden", "mlp, window 3", "attention, window 4")
        ]
        assert shares[0] >= 0.5
        assert min(shares) > 0.25


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ["hidden", "mlp, window 3", "attention severed"])
def test_whole_answers(family: str, case: str) -> None:
    assert agrees(family, SPANS[1], *CASES[case], n_answer=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_foil_gives_the_logit_difference(family: str) -> None:
    chosen, question = asked(family, SPANS[1])
    foil = (question.answer[0] + 5) % 90 + 3
    right = expected(family, SPANS[1], 1, (("foil", foil),))
    query = query_on(question.ids, SPANS[1], question.answer, foil=f"w{foil}")
    result = run(chosen.handle, query, TraceSpec(noise=str(STD), samples=SAMPLES))
    clean, corrupted, restored = result.measured("logit_difference")
    assert [clean, corrupted] == pytest.approx([right.clean[2], right.corrupted[2]], abs=ODDS)
    assert float(np.abs(restored[0] - right.restored[2]).max()) <= ODDS


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replaced_subject_is_another_prompt(family: str) -> None:
    _, question = asked(family, SPANS[1])
    others = [token for token in range(3, 97) if token not in question.ids][:3]
    swapped = [*question.ids[:1], *others, *question.ids[4:]]
    for site, size in (("hidden", 1), ("mlp", 2)):
        plain = (("noise", None), ("swapped", tuple(swapped)), ("site", site), ("size", size))
        result = found(family, SPANS[1], site=site, window=size, replace_subject=words(others))
        assert max(apart(result, expected(family, SPANS[1], 1, plain))) <= ODDS
        assert result.p_restored_by_seed.shape[0] == 1
        assert np.isnan(result.noise_std)
    assert abs(result.total_effect) > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_positions_are_rows_of_the_whole_map(family: str) -> None:
    whole = found(family, SPANS[1])
    some = found(family, SPANS[1], positions=("subject-last", "last", "5"))
    assert some.positions == (3, 5, 7)
    assert float(np.abs(some.p_restored - whole.p_restored[[3, 5, 7]]).max()) <= 1e-6
    assert len(some.table()) == 3 * LAYERS


def test_several_seeds_are_their_traces_and_the_table_their_mean() -> None:
    many = found("gpt2", SPANS[1], seeds=(1, 2, 3))
    for number, seed in enumerate((1, 2, 3)):
        one = found("gpt2", SPANS[1], seeds=(seed,))
        assert float(np.abs(many.p_restored_by_seed[number] - one.p_restored_by_seed[0]).max()) <= 1e-6
    mean = many.p_restored_by_seed.mean(axis=0)
    table = many.table()
    assert list(table.columns) == ["site", "position", "layer", "p_restored", "indirect_effect"]
    assert table["p_restored"].to_numpy() == pytest.approx(mean.ravel())
    assert (table["p_restored"] - table["indirect_effect"]).to_numpy() == pytest.approx(many.p_corrupted)
    assert float(np.ptp(many.p_corrupted_by_seed)) > 1e-3


# ---------------------------------------------------------------------------- the stream


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [1, 2**32 - 1])
def test_the_noise_is_the_promised_stream_bit_for_bit(family: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Noise] = []
    original = Noise.apply

    def spy(self: Noise, embedded: torch.Tensor) -> torch.Tensor:
        seen.append(self)
        return original(self, embedded)

    monkeypatch.setattr(bases.Noise, "apply", spy)
    chosen, _ = asked(family, SPANS[1])
    found(family, SPANS[1], seeds=(seed,), site="mlp")
    stream = STD * np.random.RandomState(seed).randn(SAMPLES, 3, width(chosen))
    assert seen
    for noise in seen:
        assert noise.positions == (1, 2, 3)
        assert noise.values.dtype == torch.float64
        assert np.array_equal(noise.values.numpy(), stream)


def facts_file(folder: Path, subjects: list[str]) -> str:
    rows = [{"subject": s, "prompt": f"{s} is w{i}", "attribute": "w9"} for i, s in enumerate(subjects)]
    path = folder / "facts.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def embedded(chosen: Subject, texts: list[str]) -> np.ndarray:
    """All tokens' embeddings, repeats kept, float64."""
    table = chosen.model.get_input_embeddings().weight.detach().double().numpy()  # type: ignore[operator]
    return table[[int(word[1:]) for text in texts for word in text.split()]]


TEXTS = ["w5 w9", "w5", "w20 w33 w41", "w5 w9", *(f"w{i} w{i + 1}" for i in range(50, 90))]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_scale_is_that_of_the_subjects(family: str, tmp_path: Path) -> None:
    chosen, _ = asked(family, SPANS[1])
    file = facts_file(tmp_path, TEXTS)
    source = noise_source(chosen.handle, "s3", file)
    assert source.std == pytest.approx(3 * embedded(chosen, TEXTS).std(ddof=1), rel=1e-12)
    assert "44 subjects (88 tokens) of facts.json" in source.provenance
    drawn = source.draw(4, 2, 3).numpy()
    assert np.array_equal(drawn, source.std * np.random.RandomState(4).randn(2, 3, width(chosen)))
    result = found(family, SPANS[1], noise="s3", noise_facts=file)
    assert result.noise_std == source.std


def test_uniform_gaussian_and_student_have_their_moments(tmp_path: Path) -> None:
    chosen, _ = asked("llama", SPANS[1])
    file, vectors = facts_file(tmp_path, TEXTS), embedded(chosen, TEXTS)
    uniform = noise_source(chosen.handle, "u0.5").draw(3, 4, 5).numpy()
    assert np.array_equal(uniform, 0.5 * np.random.RandomState(3).uniform(-1, 1, (4, 5, width(chosen))))
    covariance = np.cov(vectors.T)
    known = subject_embeddings(chosen.handle, file)
    assert np.abs((known.root @ known.root).numpy() - covariance).max() < 1e-10
    for rule, allowed in (("m", 0.04), ("t6", 0.08)):
        source = noise_source(chosen.handle, rule, file)
        drawn = source.draw(1, 20_000, 1).numpy()[:, 0]
        scale = np.abs(covariance).max()
        assert np.abs(np.cov(drawn.T) - covariance).max() < allowed * scale
        assert np.abs(drawn.mean(axis=0) - vectors.mean(axis=0)).max() < 0.03 * np.sqrt(scale)
        assert source.std == pytest.approx(np.sqrt(np.diag(covariance).mean()))
    gauss = noise_source(chosen.handle, "m", file).draw(9, 2, 3).numpy()
    student = noise_source(chosen.handle, "t6", file).draw(9, 2, 3).numpy()
    factors = np.sqrt(4 / np.random.RandomState(10).chisquare(6, size=6).reshape(2, 3, 1))
    assert student - vectors.mean(axis=0) == pytest.approx(factors * (gauss - vectors.mean(axis=0)))


# ---------------------------------------------------------------------------- planted mistakes


def noise_one_position_late(patch: pytest.MonkeyPatch) -> None:
    original = causal_tracing._noise

    def mutant(*args: Any) -> Noise:
        made = original(*args)
        return Noise(positions=tuple(p + 1 for p in made.positions), values=made.values, replace=made.replace)

    patch.setattr(causal_tracing, "_noise", mutant)


def next_layer(patch: pytest.MonkeyPatch) -> None:
    around = causal_tracing.window
    patch.setattr(causal_tracing, "window", lambda layer, size, n: around(min(layer + 1, n - 1), size, n))


def window_too_wide(patch: pytest.MonkeyPatch) -> None:
    around = causal_tracing.window
    patch.setattr(causal_tracing, "window", lambda layer, size, n: around(layer, size + 1, n))


def logarithms_averaged(patch: pytest.MonkeyPatch) -> None:
    original = causal_tracing._Score._values

    def mutant(self: Any, scores: Any) -> np.ndarray:
        values = original(self, scores)
        values[0] = scores(self.ids).log_probability.mean(dim=1).exp().numpy()
        return values

    patch.setattr(causal_tracing._Score, "_values", mutant)


def severed_with_the_wrong_draw(patch: pytest.MonkeyPatch) -> None:
    original = causal_tracing._noise
    patch.setattr(causal_tracing, "_noise", lambda *args: original(*args[:-1], 3 - args[-1]))


def severed_from_the_clean_run(patch: pytest.MonkeyPatch) -> None:
    original = causal_tracing._restorations
    patch.setattr(
        causal_tracing, "_restorations", lambda plan, spec, clean, frozen: original(plan, spec, frozen, frozen)
    )


def fresh_noise_for_every_seed_call(patch: pytest.MonkeyPatch) -> None:
    """The stream is not started anew: a second trace goes on where the first one ended."""
    original = NoiseSource.draw
    calls: list[int] = []

    def mutant(self: NoiseSource, seed: int, samples: int, tokens: int, which: int = 1) -> torch.Tensor:
        calls.append(1)
        return original(self, seed, samples, tokens, which + len(calls) - 1)

    patch.setattr(NoiseSource, "draw", mutant)
    causal_tracing.noise_source(subject("gpt2").handle, "1").draw(1, 1, 1)


def replaced_baseline_is_added(patch: pytest.MonkeyPatch) -> None:
    """The released code's defect: the corrupted run is measured under added noise."""
    original = causal_tracing._Score.of_logits
    adding: list[Any] = []
    noisy = causal_tracing._noisy

    def remember(model: Any, ids: Any, noise: Noise, *rest: Any) -> Any:
        adding.append(noisy(model, ids, Noise(positions=noise.positions, values=noise.values), *rest))
        return noisy(model, ids, noise, *rest)

    def mutant(self: Any, base: Any) -> np.ndarray:
        return original(self, base if base.noise is None else adding[-1])

    patch.setattr(causal_tracing, "_noisy", remember)
    patch.setattr(causal_tracing._Score, "of_logits", mutant)


def swapped_cells(patch: pytest.MonkeyPatch) -> None:
    original = causal_tracing._plan

    def mutant(*args: Any) -> Any:
        plan = original(*args)
        runs = causal_tracing._restorations
        patch.setattr(causal_tracing, "_restorations", lambda _, *rest: runs(plan, *rest))
        return dataclasses.replace(plan, cells=tuple(sorted(plan.cells)))

    patch.setattr(causal_tracing, "_plan", mutant)


MUTANTS: tuple[tuple[Callable[[pytest.MonkeyPatch], None], str], ...] = (
    (noise_one_position_late, "hidden"),
    (next_layer, "hidden"),
    (next_layer, "mlp, window 2"),
    (window_too_wide, "mlp, window 2"),
    (logarithms_averaged, "hidden"),
    (severed_with_the_wrong_draw, "mlp severed"),
    (severed_with_the_wrong_draw, "mlp severed, second draw"),
    (severed_from_the_clean_run, "attention severed"),
    (fresh_noise_for_every_seed_call, "hidden"),
    (replaced_baseline_is_added, "in the place"),
    (swapped_cells, "hidden"),
)


@pytest.mark.parametrize(("mutant", "case"), MUTANTS, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_planted_mistake_is_found(
    family: str, mutant: Callable[[pytest.MonkeyPatch], None], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert agrees(family, SPANS[1], *CASES[case])
    mutant(monkeypatch)
    assert not agrees(family, SPANS[1], *CASES[case])

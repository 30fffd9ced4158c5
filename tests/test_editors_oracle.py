"""ROME, MEMIT and finetuning against plain float64 computations, given contexts and second moments."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from factscope.editors import fine_tuning, memit, problems, rome
from factscope.editors.edit import EditFact
from factscope.editors.second_moments import Moments, SecondMoment
from factscope.editors.specs import FineTuningSpec, MemitSpec, RomeSpec
from factscope.models.handle import ModelHandle
from factscope.tokens import Target
from tests.oracle import plain_editing as plain
from tests.oracle.laboratory import distinct_prompt, handle_of, subject, words

TEMPLATES = ("{}", "w60 w61 {}", "w70 w71 w72 w73 {}")
PREFIXES: dict[str, list[int]] = {"{}": [], "w60 w61 {}": [60, 61], "w70 w71 w72 w73 {}": [70, 71, 72, 73]}
UNKNOWN = 2
"""The word tokenizer's id for "is" and "a"."""
SPANS = {"one": (2, 3), "three": (2, 5)}
TARGETS = {"one": (17,), "two": (17, 31)}
LAYER = 1
EXACT = {"gpt2": 1e-8, "llama": 1e-6}
"""What is left between two float64 computations; Llama's rotations and norms are rounded to float32 in transformers."""


@lru_cache
def handle(family: str, dtype: str = "float64") -> ModelHandle:
    model = copy.deepcopy(subject(family).model)
    return handle_of(model.double() if dtype == "float64" else model, family, dtype, copied=False)


def prompt(family: str, seed: int = 1) -> list[int]:
    ids = distinct_prompt(subject(family).model, 7, seed=seed)
    taken = {17, 31, 60, 61, 70, 71, 72, 73}
    return [
        next(f for f in range(i, 97) if f not in taken and f not in ids[:k]) if i in taken else i
        for k, i in enumerate(ids)
    ]


def fact_of(ids: Sequence[int], span: tuple[int, int], target: Sequence[int]) -> EditFact:
    text = " ".join([*(f"w{i}" for i in ids[: span[0]]), "{}", *(f"w{i}" for i in ids[span[1] :])])
    return EditFact(prompt=text, subject=words(ids[slice(*span)]), target=words(target), answer="w96")


def rows_of(
    ids: Sequence[int], span: tuple[int, int], target: Sequence[int], where: str = "subject_last"
) -> tuple[list[plain.Row], plain.Row]:
    """The rows, token by token, without any tokenizer."""
    after = {"subject_last": span[1] - 1, "subject_first": span[0], "subject_first_after_last": span[1]}
    rows = []
    for template in TEMPLATES:
        front = PREFIXES[template]
        at = len(front) + (len(ids) - 1 if where == "last" else after[where])
        last = len(front) + len(ids) - 1
        read = [last + i for i in range(len(target))]
        rows.append(plain.Row(ids=[*front, *ids, *target[:-1]], at=at, read=read))
    length = span[1] - span[0]
    about = [*ids[slice(*span)], UNKNOWN, UNKNOWN]
    ends = {"subject_last": length - 1, "subject_first": 0, "subject_first_after_last": length, "last": len(about) - 1}
    return rows, plain.Row(ids=about, at=ends[where], read=[ends[where]])


def own_answer(family: str, ids: Sequence[int], n_tokens: int) -> tuple[int, ...]:
    """What the model goes on with."""
    found = list(ids)
    for _ in range(n_tokens):
        found.append(int(subject(family).trace(found).logits[-1].argmax()))
    return tuple(found[len(ids) :])


def covariance(width: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(width, 2 * width, generator=generator, dtype=torch.float64)
    spread = torch.rand(width, generator=generator, dtype=torch.float64) + 0.1
    return spread[:, None] * (drawn @ drawn.T / (2 * width)) * spread


def moments(width: int, layers: Sequence[int]) -> tuple[Moments, dict[int, Tensor]]:
    found = {layer: covariance(width, seed=layer) for layer in layers}
    told = {"n_tokens": 10**6, "origin": "drawn", "key": "drawn"}
    return Moments({layer: SecondMoment(layer=layer, matrix=m, **told) for layer, m in found.items()}), found


def width(family: str) -> int:
    return {"gpt2": 144, "llama": 64}[family]


def settings(spec: RomeSpec | MemitSpec, limit: float) -> plain.Settings:
    return plain.Settings(
        steps=spec.steps, rate=spec.learning_rate, decay=spec.weight_decay, kl=spec.kl_factor, limit=limit,
        stop=spec.stop, erase=spec.problem == "fact-erasure",
    )  # fmt: skip


def apart(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


ROME_CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "gpt2-averaged": ("gpt2", "three", "one", {}),
    "gpt2-original": ("gpt2", "three", "two", {"key_mode": "original"}),
    "gpt2-prompt-only": ("gpt2", "one", "one", {"key_mode": "prompt_only"}),
    "gpt2-subject-first": ("gpt2", "three", "two", {"fact_token": "subject_first"}),
    "gpt2-after": ("gpt2", "three", "one", {"fact_token": "subject_first_after_last"}),
    "gpt2-last": ("gpt2", "three", "two", {"fact_token": "last"}),
    "gpt2-erasure": ("gpt2", "one", "two", {"problem": "fact-erasure"}),
    "gpt2-residual": ("gpt2", "three", "one", {"clamp_reference": "residual", "clamp": 0.3}),
    "gpt2-stops": ("gpt2", "three", "one", {"stop": 16.9, "clamp": 50.0}),
    "llama-averaged": ("llama", "three", "two", {}),
    "llama-original": ("llama", "one", "one", {"key_mode": "original"}),
}


@pytest.mark.parametrize("name", ROME_CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_rome(name: str, dtype: str) -> None:
    family, span_name, target_name, changed = ROME_CASES[name]
    span, target, ids = SPANS[span_name], TARGETS[target_name], prompt(family)
    spec = RomeSpec(steps=12, **{"stop": 0.0, "kl_factor": 0.5, **changed})
    model = handle(family, dtype)
    asked = fact_of(ids, span, target)
    if spec.problem == "fact-erasure":
        target = own_answer(family, ids, len(target))
        asked = replace(asked, answer=words(target))
    given, matrices = moments(width(family), [LAYER])
    found = rome.rank_one(model, problems.task(model, asked, spec), LAYER, TEMPLATES, given, spec)
    rows, essence = rows_of(ids, span, target, spec.fact_token)
    _, output, stream = plain.key_and_output(subject(family), rows[0], LAYER)
    reference = output if spec.clamp_reference == "mlp" else stream
    exact = plain.rome(
        subject(family), rows, essence, target, LAYER, matrices[LAYER],
        settings(spec, spec.clamp * float(reference.norm())), spec.key_mode,
    )  # fmt: skip
    tolerance = EXACT[family] if dtype == "float64" else 1e-4
    assert apart(found.key, exact["key"]) <= tolerance
    assert apart(found.value, exact["value"]) <= tolerance
    assert abs(found.k_dot_u / float(exact["k_dot_u"]) - 1) <= tolerance
    assert apart(found.delta.matrix(), exact["change"]) <= (10 * tolerance if dtype == "float64" else tolerance)
    losses = [step.loss for step in found.found.steps]
    assert np.allclose(losses, exact["losses"].numpy(), rtol=10 * tolerance, atol=10 * tolerance)
    assert (len(losses) < spec.steps) == (name == "gpt2-stops")
    assert abs(losses[-1] - losses[0]) > 0.03 * losses[0], "nothing was optimised: the comparison would be empty"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_memit(family: str, dtype: str) -> None:
    model, layers = handle(family, dtype), (0, 1, 2)
    spec = MemitSpec(steps=8, stop=0.0, covariance_weight=0.05, clamp=0.75)
    given, matrices = moments(width(family), layers)
    tasks, facts = [], []
    for seed, span, target in ((1, (2, 5), (17,)), (2, (1, 2), (31, 17))):
        ids = prompt(family, seed)
        tasks.append(problems.task(model, fact_of(ids, span, target), spec))
        facts.append((*rows_of(ids, span, target), target))
    found = memit.spread(model, tasks, layers, TEMPLATES, given, spec)
    exact = plain.memit(subject(family), facts, layers, matrices, settings(spec, 0.0), spec.clamp, 0.05 * width(family))
    for change in found.layers:
        layer = change.delta.layer
        assert apart(change.delta.matrix(), exact[layer]) <= (10 * EXACT[family] if dtype == "float64" else 1e-4)
        left = change.keys @ change.keys.T + change.covariance * matrices[layer]
        solved = change.delta.matrix().T.double() @ left
        assert apart(solved, change.residual @ change.keys.T) <= 1e-4
        size = torch.linalg.solve(matrices[layer], change.keys).mul(change.keys).sum(dim=0) / change.covariance
        assert np.allclose(change.shares, (size / (1 + size)).numpy())


FT_CASES: dict[str, tuple[str, str, tuple[int, ...], dict[str, Any]]] = {
    "gpt2": ("gpt2", "two", (1,), {}),
    "gpt2-bounded": ("gpt2", "one", (1,), {"bound": 1e-2, "learning_rate": 5e-3}),
    "gpt2-window": ("gpt2", "two", (0, 1, 2), {"bound": 2e-3}),
    "gpt2-compat": ("gpt2", "two", (2,), {"loss": "compat"}),
    "gpt2-erasure": ("gpt2", "one", (1,), {"problem": "fact-erasure"}),
    "llama": ("llama", "two", (0, 1), {"bound": 1e-2}),
}


@pytest.mark.parametrize("name", FT_CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_fine_tuning(name: str, dtype: str) -> None:
    family, target_name, layers, changed = FT_CASES[name]
    span, target, ids = SPANS["three"], TARGETS[target_name], prompt(family)
    spec = FineTuningSpec(**{"steps": 6, "bound": None, "learning_rate": 1e-3, "stop": 0.0, **changed})
    model = handle(family, dtype)
    if spec.problem == "fact-erasure":
        target = own_answer(family, ids, len(target))
    asked = replace(fact_of(ids, span, target), answer=words(target) if spec.problem == "fact-erasure" else "w96")
    found = fine_tuning.tune(model, [problems.task(model, asked, spec)], layers, spec)
    row = rows_of(ids, span, target)[0][0]
    exact = plain.fine_tuning(
        subject(family), [row], target, layers, steps=6, rate=spec.learning_rate, bound=spec.bound,
        compat=spec.loss == "compat", stop=0.0, erase="erasure" in name,
    )  # fmt: skip
    for delta in found.deltas:
        assert apart(delta.right, exact[delta.layer]) <= (100 * EXACT[family] if dtype == "float64" else 1e-4)
        if spec.bound is not None:
            assert float(delta.right.abs().max()) <= spec.bound * (1 + 1e-6)
    assert abs(found.steps[-1].loss - found.steps[0].loss) > 0.05


def test_noise_is_put_on_every_rows_own_subject() -> None:
    """Fact forcing: keys and value under noise, the plain prompt's draw that of a causal trace's first sample."""
    family, span, target = "gpt2", (2, 5), (17,)
    ids, spec = prompt(family), RomeSpec(steps=8, stop=0.0, problem="fact-forcing", noise="0.3", seed=4)
    model = handle(family)
    asked = replace(fact_of(ids, span, target), answer=words(target))
    given, matrices = moments(width(family), [LAYER])
    found = rome.rank_one(model, problems.task(model, asked, spec), LAYER, TEMPLATES, given, spec)
    drawn = torch.from_numpy(0.3 * np.random.RandomState(4).randn(len(TEMPLATES) + 1, 3, 36))

    def noised(row: plain.Row, number: int, start: int) -> plain.Row:
        def embed(found: Tensor) -> Tensor:
            changed = found.clone()
            changed[start : start + 3] += drawn[number]
            return changed

        return replace(row, embed=embed)

    rows, essence = rows_of(ids, span, target)
    rows = [noised(row, i, len(PREFIXES[t]) + 2) for i, (row, t) in enumerate(zip(rows, TEMPLATES, strict=True))]
    essence = noised(essence, len(rows), 0)
    output = plain.key_and_output(subject(family), rows[0], LAYER)[1]
    exact = plain.rome(
        subject(family), rows, essence, target, LAYER, matrices[LAYER],
        settings(spec, 4 * float(output.norm())), "averaged",
    )  # fmt: skip
    assert apart(found.key, exact["key"]) <= 1e-8
    assert apart(found.delta.matrix(), exact["change"]) <= 1e-6


def test_a_target_is_resolved_as_words_of_the_prompt() -> None:
    model = handle("gpt2")
    task = problems.task(model, fact_of(prompt("gpt2"), (2, 5), (17, 31)), RomeSpec())
    assert task.target == Target(ids=(17, 31), text=" w17 w31")

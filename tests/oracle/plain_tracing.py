"""Causal tracing written out: for every cell and sample one plain float64 forward, its vectors put in by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests.oracle.laboratory import Subject
from tests.oracle.plain import Trace, layers_of_window, log_odds, log_probability

SITES = {"hidden": "output", "mlp": "mlp", "attention": "attention"}


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is traced.

    Attributes:
        span: the subject's positions [start, stop).
        answer: tokens that are scored, one after the other.
        noise: [sample, token, width], what is added to the embeddings from the subject's start on.
        replace: it takes their place instead.
        swapped: the ids of another prompt that is the corrupted run, instead of noise.
        sever: "" or the kind of update that stays corrupted at the restored position.
        second: noise of the restored run where it is not that of the corrupted one.
    """

    ids: Sequence[int]
    span: tuple[int, int]
    answer: Sequence[int]
    site: str = "hidden"
    size: int = 1
    noise: np.ndarray | None = None
    replace: bool = False
    swapped: Sequence[int] = ()
    sever: str = ""
    second: np.ndarray | None = None
    foil: int | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Arrays: p, log-odds and logit difference of the clean run [3], the corrupted one [3], and the restored ones
    [3, position, layer].
    """

    clean: np.ndarray
    corrupted: np.ndarray
    restored: np.ndarray


def noise_of(std: float, seed: int, samples: int, tokens: int, width: int, which: int = 0) -> np.ndarray:
    """The stream as it is promised, its first draw or a later one."""
    stream = np.random.RandomState(seed)
    for _ in range(which):
        stream.randn(samples, tokens, width)
    return std * stream.randn(samples, tokens, width)


def trace(subject: Subject, asked: Question) -> Answer:
    """Every position and layer."""
    ids = [*asked.ids, *asked.answer[:-1]]
    clean = subject.trace(ids)
    wrong = _runs(subject, asked, asked.noise)
    second = asked.noise if asked.second is None else asked.second
    restored = np.empty((3, len(asked.ids), subject.n_layers))
    for position in range(len(asked.ids)):
        for layer in range(subject.n_layers):
            runs = []
            for sample, corrupted in enumerate(wrong):
                puts = _puts(asked, clean, corrupted, position, layer, subject.n_layers)
                runs.append(_run(subject, asked, second, sample, puts))
            restored[:, position, layer] = _score(asked, runs)
    return Answer(clean=_score(asked, [clean]), corrupted=_score(asked, wrong), restored=restored)


def _puts(
    asked: Question, clean: Trace, corrupted: Trace, position: int, layer: int, n_layers: int
) -> dict[tuple[str, int, int], Tensor]:
    puts = {}
    if asked.sever:
        for at in range(n_layers):
            puts[asked.sever, at, position] = getattr(corrupted, asked.sever)[at, position]
    field = "blocks" if asked.site == "hidden" else asked.site
    for at in layers_of_window(layer, asked.size, n_layers):
        puts[SITES[asked.site], at, position] = getattr(clean, field)[at, position]
    return puts


def _runs(subject: Subject, asked: Question, noise: np.ndarray | None) -> list[Trace]:
    return [_run(subject, asked, noise, sample, {}) for sample in range(1 if noise is None else len(noise))]


def _run(subject: Subject, asked: Question, noise: np.ndarray | None, sample: int, puts: dict) -> Trace:
    rest = list(asked.answer[:-1])
    if noise is None:
        return subject.trace([*asked.swapped, *rest], puts=puts)
    values, start = torch.from_numpy(noise[sample]), asked.span[0]

    def embed(words: Tensor) -> Tensor:
        changed = words.clone()
        for i, value in enumerate(values):
            changed[start + i] = value if asked.replace else words[start + i] + value
        return changed

    return subject.trace([*asked.ids, *rest], embed=embed, puts=puts)


def _score(asked: Question, runs: Sequence[Trace]) -> np.ndarray:
    """Means over the samples: of probabilities; the log-odds of that mean; of logit differences."""
    length = len(asked.ids)
    p = np.array([float(log_probability(run, length, asked.answer).exp()) for run in runs])
    odds = [log_odds(run, length, asked.answer) for run in runs]
    missed = np.array([1 / (1 + np.exp(o)) for o in odds])
    rows = [run.logits[length - 1] for run in runs]
    apart = np.nan
    if asked.foil is not None:
        apart = float(np.mean([float(row[asked.answer[0]] - row[asked.foil]) for row in rows]))
    return np.array([p.mean(), np.log(p.mean()) - np.log(missed.mean()), apart])

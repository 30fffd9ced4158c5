"""The experiments in terms of the engine: record a run, describe the interventions, score what they come to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.references import Cell, window
from factscope.editors.prompts import Rows
from factscope.editors.suffix import Suffix
from factscope.interventions import engine
from factscope.interventions.attention import Cut
from factscope.interventions.base import Base, Noise, Update, record_base
from factscope.interventions.intervention import Intervention, Patch
from factscope.models.handle import ModelHandle
from factscope.models.head import Distribution, distribution_of_states

Site = Literal["output", "mlp", "attention"]


def noise_values(samples: int, positions: int, width: int, std: float, seed: int = 1) -> Tensor:
    """Gaussian noise [sample, position, width] in float64, the same for every way to run a trace."""
    return std * torch.from_numpy(np.random.RandomState(seed).randn(samples, positions, width))


def knockout(
    model: ModelHandle, ids: Sequence[int], cells: Sequence[Cell], size: int, target: int
) -> dict[Cell, float]:
    """The last position may not attend to one position in a window of layers: p of the target, by cell."""
    n, last = model.info.n_layers, len(ids) - 1
    runs = [
        Intervention(cuts=tuple(Cut(layer=k, queries=(last,), keys=(at,)) for k in window(layer, size, n)))
        for at, layer in cells
    ]
    _, answers = engine.record_and_run(model, ids, runs)
    return _probabilities(answers, cells, target)


def trace(
    model: ModelHandle,
    ids: Sequence[int],
    cells: Sequence[Cell],
    target: int,
    *,
    values: Tensor,
    noised: tuple[int, ...],
    site: Site = "output",
    size: int = 1,
) -> dict[Cell, float]:
    """Restore one position of a window of layers in noised runs: mean p of the target over the samples, by cell."""
    updates: Collection[Update] = () if site == "output" else (site,)
    clean = record_base(model, ids, updates=updates)
    base = record_base(model, ids, noise=Noise(positions=noised, values=values), updates=updates)
    runs = [_replaced(model, cell, site, size, clean) for cell in cells]
    return _probabilities(engine.run(model, base, runs), cells, target)


def zero(
    model: ModelHandle, ids: Sequence[int], cells: Sequence[Cell], target: int, *, site: Update, size: int
) -> dict[Cell, float]:
    """Zero the updates of a window of layers at one position of the clean run: p of the target, by cell."""
    base = record_base(model, ids, updates=(site,))
    runs = [_replaced(model, cell, site, size, None) for cell in cells]
    return _probabilities(engine.run(model, base, runs), cells, target)


def value_steps(
    model: ModelHandle, rows: Rows, target: int, layer: int, changes: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Steps of ROME's optimisation: for every change the target's probabilities, and the gradient of the loss."""
    suffix = Suffix(model, rows, layer, multiplier=1.0)
    return [_value_step(suffix, target, change) for change in changes]


def value_search(
    model: ModelHandle, rows: Rows, target: int, layer: int, steps: int, *, size: float = 2.0
) -> list[Tensor]:
    """The changes that a search tries which goes a step of one size along every coordinate, the first one zero."""
    suffix = Suffix(model, rows, layer, multiplier=1.0)
    changes = [torch.zeros(model.info.d_model)]
    while len(changes) < steps:
        changes.append(changes[-1] - size * _value_step(suffix, target, changes[-1])[1].sign())
    return changes


def _value_step(suffix: Suffix, target: int, change: Tensor) -> tuple[Tensor, Tensor]:
    given = change.detach().clone().requires_grad_()
    log_p = suffix.with_value(given)[:, 0].log_softmax(dim=-1)
    loss = -log_p[:-1, target].mean() + (log_p[-1].exp() * log_p[-1]).sum()
    return log_p[:-1, target].detach().exp(), torch.autograd.grad(loss, given)[0]


def lens(model: ModelHandle, ids: Sequence[int], top_k: int, target: int) -> Distribution:
    """What every layer's state says at every position, the embedding first; rows are layer after layer."""
    base = record_base(model, ids)
    states = torch.cat([state[0] for state in base.states])
    return distribution_of_states(model, states, (target,), top_k)


def _replaced(model: ModelHandle, cell: Cell, site: Site, size: int, source: Base | None) -> Intervention:
    at, center = cell
    layers = [center] if size == 1 else window(center, size, model.info.n_layers)
    return Intervention(patches=tuple(Patch(layer=k, site=site, positions=(at,), source=source) for k in layers))


def _probabilities(answers: engine.Answers, cells: Sequence[Cell], target: int) -> dict[Cell, float]:
    found: dict[Cell, float] = {}
    for indices, readout in answers:
        values = readout.scores((target,)).log_probability.exp().mean(dim=1).tolist()
        found |= {cells[index]: value for index, value in zip(indices, values, strict=True)}
    return found

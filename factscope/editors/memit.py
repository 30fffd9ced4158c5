"""Change many associations at once, over several layers. Mass-editing memory in a transformer (MEMIT).

Source: Meng et al. 2022 (arXiv 2210.07229), section 4 and the released code.

1. For each fact, z = the last layer's block output at the edited token, plus what the optimisation of ``targets``
   finds.
2. Layer by layer, on the model as edited so far: K has a column for each fact, the mean of the plain prompt's key and
   of the mean over the other contexts; R has what is missing, z - the last layer's block output on the plain prompt,
   divided by the layers that are left and by how many times the stream gets what this layer's MLP writes.
3. The change solves ``Delta (lambda C + K K') = R K'`` in float64.

lambda is a multiple of the MLP's width (``covariance_weight``): the published 15,000 and 20,000 belong to widths of
16,384 and 6,400. One fact in one layer writes the share q / (1 + q) of what is missing, q = k' C^-1 k / lambda; it is
reported, since with a lambda that does not shrink with the width small models are hardly edited.

Where a norm stands between the MLP and the stream, no change of the map's output is a given change of the stream: such
models are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from factscope.editors.problems import Task
from factscope.editors.prompts import Rows
from factscope.editors.second_moments import Moments
from factscope.editors.specs import MemitSpec
from factscope.editors.suffix import Suffix, multiplier, read
from factscope.editors.targets import Step, Value, limit_of, optimise
from factscope.errors import CapabilityError
from factscope.interventions.weights import WeightDelta
from factscope.models.handle import ModelHandle


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerChange:
    """What one layer was given.

    Attributes:
        keys: K, [d_in, fact]. ``residual``: R, [d_out, fact]. ``multiplier``: of this layer.
        covariance: lambda. ``shares``: q / (1 + q) of each fact, as if it were alone.
        missing: norm of what each fact's stream still misses before this layer.
    """

    delta: WeightDelta
    keys: Float[Tensor, "d_in fact"]
    residual: Float[Tensor, "d_out fact"]
    multiplier: float
    covariance: float
    shares: tuple[float, ...]
    missing: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Spread:
    """All of a mass edit: every fact's z, and every layer's change."""

    values: tuple[Value, ...]
    targets: tuple[Float[Tensor, " d_model"], ...]
    layers: tuple[LayerChange, ...]


def spread(
    model: ModelHandle,
    tasks: Sequence[Task],
    layers: Sequence[int],
    templates: Sequence[str],
    moments: Moments,
    spec: MemitSpec,
    *,
    step: Callable[[int, tuple[Step, ...]], None] = lambda done, steps: None,
    pause: Callable[[], None] = lambda: None,
) -> Spread:
    """The changes of some layers for some facts.

    Args:
        step: called with the number of facts and layers that are done, after every step; may raise to end it.
        pause: the same, called between steps.

    Raises:
        InputError: something of a fact or the spec cannot be used.
        CapabilityError: what an MLP writes does not reach the stream linearly.
    """
    times = {}
    for layer in layers:
        times[layer] = _linear(model, layer)
        pause()
    last = layers[-1]
    values, targets, prompts = [], [], []
    for number, task in enumerate(tasks):
        told = lambda steps, n=number: step(n, steps)  # noqa: E731
        value, goal = _goal(model, task, last, times[last], templates, spec, told, pause)
        values.append(value)
        targets.append(goal)
        prompts.append(task.rows(templates, spec.fact_token))
    changes: list[LayerChange] = []
    for number, layer in enumerate(layers):
        deltas = [change.delta for change in changes]
        keys, streams = _seen(model, tasks, prompts, layer, last, deltas, pause)
        missing = torch.stack(targets) - streams
        changes.append(_change(moments, spec, layer, keys, missing, len(layers) - number, times[layer]))
        step(len(tasks) + number + 1, ())
    return Spread(values=tuple(values), targets=tuple(targets), layers=tuple(changes))


def _linear(model: ModelHandle, layer: int) -> float:
    times = multiplier(model, layer)
    if times is None:
        raise CapabilityError(
            f"{model.info.name} ({model.info.family}) does not support MEMIT: what the MLP of layer {layer} writes "
            "does not reach the residual stream linearly",
            "edit it with rome or ft",
        )
    return times


def _goal(
    model: ModelHandle,
    task: Task,
    layer: int,
    times: float,
    templates: Sequence[str],
    spec: MemitSpec,
    step: Callable[[tuple[Step, ...]], None],
    pause: Callable[[], None],
) -> tuple[Value, Tensor]:
    """z of one fact, in float64; delta is measured in the stream."""
    rows = task.rows(templates, spec.fact_token, essence=True)
    noise = task.noise(rows)
    pause()
    seen = read(model, rows, (layer,), noise=noise)[layer]
    pause()
    written = seen.outputs[0] * times
    found = optimise(
        Suffix(model, rows, layer, multiplier=times, noise=noise, pause=pause),
        task.target.ids,
        spec,
        first=seen.stream[0],
        limit=limit_of(spec, written, seen.stream[0], 1.0),
        objective=task.objective,
        in_stream=True,
        step=step,
    )
    return found, seen.stream[0].double() + found.delta.double()


def _seen(
    model: ModelHandle,
    tasks: Sequence[Task],
    prompts: Sequence[Rows],
    layer: int,
    last: int,
    deltas: Sequence[WeightDelta],
    pause: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """K [d_in, fact], and the last layer's output on each plain prompt [fact, d_model]."""
    keys, streams = [], []
    for task, rows in zip(tasks, prompts, strict=True):
        pause()
        seen = read(model, rows, sorted({layer, last}), deltas=deltas, noise=task.noise(rows))
        found = seen[layer].keys.double()
        others = found[1:] if len(found) > 1 else found
        keys.append((found[0] + others.mean(dim=0)) / 2)
        streams.append(seen[last].stream[0].double())
    return torch.stack(keys, dim=1), torch.stack(streams)


def _change(
    moments: Moments, spec: MemitSpec, layer: int, keys: Tensor, missing: Tensor, left: int, times: float
) -> LayerChange:
    covariance = spec.covariance_weight * keys.shape[0]
    residual = (missing / (left * times)).T
    adjusted = moments.solve_with(layer, keys, covariance)
    sizes = (keys * moments.solve(layer, keys)).sum(dim=0) / covariance
    return LayerChange(
        delta=WeightDelta(
            layer=layer,
            place="down_projection",
            left=adjusted.float().cpu(),
            right=residual.T.float().cpu(),
        ),
        keys=keys,
        residual=residual,
        multiplier=times,
        covariance=covariance,
        shares=tuple((sizes / (1 + sizes)).tolist()),
        missing=tuple(missing.norm(dim=1).tolist()),
    )

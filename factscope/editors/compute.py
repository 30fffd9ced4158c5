"""Compute an edit: the one way from facts and settings to an ``Edit``, for every method and problem.

1. The settings are checked, layers and linear maps are looked for; what cannot work is refused with its reason.
2. The problem decides target and objective of every fact (``problems``).
3. Contexts are sampled, second moments fetched. Nothing is collected or downloaded here.
4. The method computes changes of linear maps (``rome``, ``memit``, ``fine_tuning``), on the model in the weight state
   that it was handed in. ROME takes facts and layers one after another, each on what is edited so far.

In half precision keys and outputs are what the model computes; what is solved is solved in float64, what is optimised
is optimised in float32 through the model's own forward, and changes are kept in float32. Where they are applied they
are rounded to the model's type.

The model is never touched: the changes ride in plans of forwards, gradients are asked of them alone, and what is begun
can be stopped between any two steps without a trace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from factscope.editors import contexts, fine_tuning, memit, presets, problems, rome
from factscope.editors.edit import Edit, EditedModel, EditFact, refuse_unless_it_has, widths
from factscope.editors.problems import Task
from factscope.editors.second_moments import moments_for
from factscope.editors.specs import EditSpec, FineTuningSpec, MemitSpec, RomeSpec
from factscope.editors.targets import Step, Value
from factscope.errors import SpecError
from factscope.interventions.weights import WeightDelta
from factscope.models.handle import ModelHandle
from factscope.progress import Progress, Timed, silent

MAX_FACTS = 10_000
MAX_STEPS = 10_000


@dataclass(frozen=True, kw_only=True)
class Partial:
    """How far an edit is.

    Attributes:
        fact: which is worked on. ``layer``: the one that is edited; None while a value is sought for all.
        steps: its loss so far.
    """

    fact: int
    layer: int | None
    steps: tuple[Step, ...]


def edit(
    model: ModelHandle, facts: Sequence[EditFact], spec: EditSpec | None = None, *, progress: Progress = silent
) -> Edit:
    """Compute the edit of some facts.

    Args:
        model: in the weight state that the edit is computed on.
        spec: the method and its settings; None takes ROME's of the preset for this model.
        progress: called at every step with a ``Partial``; may raise to end it.

    Raises:
        InputError: a fact or the spec cannot be used.
        CapabilityError: the model lacks what the method needs.
    """
    chosen = spec or presets.preset(default_preset(model), "rome", "error-injection", model.info)
    given = tuple(facts)
    if not 1 <= len(given) <= MAX_FACTS:
        raise SpecError(f"{len(given)} facts are to be edited", f"give 1 to {MAX_FACTS:,}")
    layers = check(model, chosen)
    timed = Timed(progress)
    total = _steps(chosen, len(given), len(layers))
    timed(0, total, None)
    tasks = [problems.task(model, fact, chosen, step=timed.step) for fact in given]
    run = _Run(model=model, tasks=tasks, layers=layers, timed=timed, total=total)
    if isinstance(chosen, RomeSpec):
        made = _rome(run, chosen)
    elif isinstance(chosen, MemitSpec):
        made = _memit(run, chosen)
    else:
        made = _fine_tuning(run, chosen)
    said = dict.fromkeys(
        [*presets.doubts(chosen, model.info), *(w for one in tasks for w in one.warnings), *made.warnings]
    )
    result = Edit(
        method=chosen.method,
        problem=chosen.problem,
        model=EditedModel.of(model),
        computed_on=model.info.weights,
        facts=tuple(one.fact for one in tasks),
        spec={**asdict(chosen), "layers": list(layers)},
        templates=made.templates,
        deltas=made.deltas,
        report={**made.report, "warnings": list(said), "seconds": round(timed.seconds, 3)},
    )
    timed(total, total, None)
    return result


def default_preset(model: ModelHandle) -> str:
    """The preset of a model for which nothing is chosen."""
    return "bundled" if presets.shape_of(model.info) == presets.BUNDLED else "rome"


def check(model: ModelHandle, spec: EditSpec) -> tuple[int, ...]:
    """The layers that are edited, in order; what cannot work is refused.

    Raises:
        SpecError: names the value.
        CapabilityError: a layer has no plain down-projection.
    """
    layers = spec.layers or presets.default_layers(spec.method, model.info.n_layers)
    if len(set(layers)) < len(layers):
        raise SpecError(f"layers {', '.join(map(str, layers))} name one twice", "name each layer once")
    for layer in layers:
        refuse_unless_it_has(model, "down_projection", layer)
    if not 1 <= spec.steps <= MAX_STEPS:
        raise SpecError(f"steps {spec.steps} is not between 1 and {MAX_STEPS:,}", "choose a number in that range")
    _refuse_outside("learning rate", spec.learning_rate, 0.0, 100.0, above=True)
    if not 0 <= spec.seed < 2**32:
        raise SpecError(f"seed {spec.seed} is not between 0 and {2**32 - 1}", "choose a seed in that range")
    if isinstance(spec, FineTuningSpec):
        if spec.bound is not None:
            _refuse_outside("bound", spec.bound, 0.0, 100.0, above=True)
        if spec.loss not in ("correct", "compat"):
            raise SpecError(f"loss {spec.loss!r} is unknown", "choose correct or compat")
        if not (spec.patience >= 1 and 1 <= spec.rows <= 1000):
            raise SpecError(
                f"patience {spec.patience} or rows {spec.rows} is out of range", "choose 1 or more, and 1 to 1000"
            )
        return tuple(sorted(layers))
    _refuse_outside("clamp", spec.clamp, 0.0, 1e6, above=True)
    _refuse_outside("kl factor", spec.kl_factor, 0.0, 1e6)
    _refuse_outside("weight decay", spec.weight_decay, 0.0, 1e6)
    _refuse_outside("stop", spec.stop, 0.0, 1e6)
    if spec.clamp_reference not in ("mlp", "residual"):
        raise SpecError(f"clamp reference {spec.clamp_reference!r} is unknown", "choose mlp or residual")
    if spec.stop_on not in ("loss", "nll"):
        raise SpecError(f"stop on {spec.stop_on!r} is unknown", "choose loss or nll")
    if isinstance(spec, MemitSpec):
        _refuse_outside("covariance weight", spec.covariance_weight, 0.0, 1e9, above=True)
    return tuple(sorted(layers))


def _refuse_outside(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    inside = low < value <= high if above else low <= value <= high
    if not (inside and math.isfinite(value)):
        raise SpecError(
            f"{name} {value:g} is not {'above' if above else 'at least'} {low:g} and at most {high:g}",
            "choose such a number",
        )


def delta_bytes(model: ModelHandle, spec: EditSpec, n_facts: int = 1) -> int:
    """How much memory the edit will take: two vectors a fact and layer, or for finetuning a whole matrix a layer."""
    found = 0
    for layer in check(model, spec):
        d_in, d_out = widths(model, "down_projection", layer) or (4 * model.info.d_model, model.info.d_model)
        if isinstance(spec, FineTuningSpec):
            found += 4 * (d_in + spec.bias) * d_out
        else:
            found += 4 * n_facts * (d_in + d_out)
    return found


# ------------------------------------------------------------------------------------------------------- the methods


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    model: ModelHandle
    tasks: Sequence[Task]
    layers: tuple[int, ...]
    timed: Timed
    total: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Made:
    deltas: tuple[WeightDelta, ...]
    templates: tuple[str, ...]
    report: dict[str, Any]
    warnings: tuple[str, ...]


def _steps(spec: EditSpec, n_facts: int, n_layers: int) -> int:
    """Steps of progress, at most."""
    if isinstance(spec, RomeSpec):
        return spec.steps * n_facts * n_layers
    return spec.steps if isinstance(spec, FineTuningSpec) else spec.steps * n_facts + n_layers


def _rome(run: _Run, spec: RomeSpec) -> _Made:
    moments = moments_for(run.model, run.layers, spec.statistics)
    templates = contexts.sample(run.model, spec.contexts, spec.seed, step=run.timed.step)
    deltas: list[WeightDelta] = []
    told: list[dict[str, Any]] = []
    warnings: list[str] = []
    for fact, one in enumerate(run.tasks):
        for place, layer in enumerate(run.layers):
            before = (fact * len(run.layers) + place) * spec.steps

            def step(steps: tuple[Step, ...], before: int = before, fact: int = fact, layer: int = layer) -> None:
                run.timed(before + len(steps), run.total, Partial(fact=fact, layer=layer, steps=steps))

            found = rome.rank_one(
                run.model, one, layer, templates, moments, spec, deltas=deltas, step=step, pause=run.timed.step
            )
            deltas.append(found.delta)
            told.append({"fact": fact, "layer": layer, **_told_rank_one(found)})
            warnings += _doubts(one, layer, found)
    report = {"values": told, "statistics": [moments.told(layer) for layer in run.layers]}
    return _Made(
        deltas=_joined(deltas),
        templates=templates,
        report={**report, "update_norm": _norms(deltas)},
        warnings=(*warnings, *moments.warnings()),
    )


def _told_rank_one(found: rome.RankOne) -> dict[str, Any]:
    return {
        "k_dot_u": found.k_dot_u,
        "share_of_k_dot_u": found.share,
        "key_norm": float(found.key.norm()),
        "value_norm": float(found.value.norm()),
        "update_norm": float((found.value - found.output).norm()) / abs(found.k_dot_u),
        **_told_value(found.found),
    }


def _told_value(value: Value) -> dict[str, Any]:
    return {
        "delta_norm": float(value.delta.norm()),
        "limit": value.limit,
        "stopped": value.stopped,
        "p_target": value.steps[-1].p_target,
        "steps": [asdict(step) for step in value.steps],
    }


def _doubts(one: Task, layer: int, found: rome.RankOne) -> list[str]:
    said = []
    if found.share < rome.SMALL:
        said.append(
            f"{one.fact.subject}, layer {layer}: k . u of the prompt is {found.share:.2g} of that of the averaged key; "
            "the update is large and may disable the model. Key mode averaged does without."
        )
    return said + _not_reached(one, f"layer {layer}", found.found)


def _not_reached(one: Task, where: str, value: Value) -> list[str]:
    p = value.steps[-1].p_target
    if one.objective == "minimise" or p >= 0.5:
        return []
    at_limit = value.steps[-1].norm >= 0.999 * value.limit
    why = "its length is at the limit (clamp)" if at_limit else "more steps or another learning rate may help"
    return [f"{one.fact.subject}, {where}: even the value itself gives the target only p {p:.2g}; {why}."]


def _memit(run: _Run, spec: MemitSpec) -> _Made:
    moments = moments_for(run.model, run.layers, spec.statistics)
    templates = contexts.sample(run.model, spec.contexts, spec.seed, step=run.timed.step)

    def step(done: int, steps: tuple[Step, ...]) -> None:
        n = len(run.tasks)
        sought = done < n or bool(steps)
        at = done * spec.steps + len(steps) if sought else n * spec.steps + (done - n)
        layer = None if sought else run.layers[done - n - 1]
        run.timed(at, run.total, Partial(fact=min(done, n - 1), layer=layer, steps=steps))

    found = memit.spread(run.model, run.tasks, run.layers, templates, moments, spec, step=step, pause=run.timed.step)
    deltas = tuple(layer.delta for layer in found.layers)
    values = [{"fact": fact, **_told_value(value)} for fact, value in enumerate(found.values)]
    layers = [
        {
            "layer": change.delta.layer,
            "lambda": change.covariance,
            "share_written": list(change.shares),
            "missing": list(change.missing),
            "multiplier": change.multiplier,
        }
        for change in found.layers
    ]
    report = {"values": values, "layers": layers, "statistics": [moments.told(layer) for layer in run.layers]}
    warnings = [
        said
        for one, value in zip(run.tasks, found.values, strict=True)
        for said in _not_reached(one, f"layer {run.layers[-1]}", value)
    ]
    return _Made(
        deltas=deltas,
        templates=templates,
        report={**report, "update_norm": _norms(deltas)},
        warnings=(*warnings, *moments.warnings()),
    )


def _fine_tuning(run: _Run, spec: FineTuningSpec) -> _Made:
    def step(steps: tuple[Step, ...]) -> None:
        run.timed(len(steps), run.total, Partial(fact=0, layer=None, steps=steps))

    found = fine_tuning.tune(run.model, run.tasks, run.layers, spec, step=step, pause=run.timed.step)
    values = [{"stopped": "stop" if found.stopped else "steps", "steps": [asdict(one) for one in found.steps]}]
    largest = {delta.layer: float(delta.right.abs().max()) for delta in found.deltas}
    report = {"values": values, "largest_change": {str(layer): value for layer, value in largest.items()}}
    return _Made(deltas=found.deltas, templates=(), report={**report, "update_norm": _norms(found.deltas)}, warnings=())


def _joined(deltas: Sequence[WeightDelta]) -> tuple[WeightDelta, ...]:
    """One change for each layer, of rank one for each fact."""
    by_layer: dict[int, list[WeightDelta]] = {}
    for delta in deltas:
        by_layer.setdefault(delta.layer, []).append(delta)
    return tuple(
        WeightDelta(
            layer=layer,
            place="down_projection",
            left=torch.cat([one.left for one in some if one.left is not None], dim=1),
            right=torch.cat([one.right for one in some], dim=0),
        )
        for layer, some in sorted(by_layer.items())
    )


def _norms(deltas: Sequence[WeightDelta]) -> dict[str, float]:
    """Frobenius norm of the change by layer; of factors without multiplying them out."""
    found: dict[str, float] = {}
    for delta in _joined(deltas) if all(delta.left is not None for delta in deltas) else deltas:
        right = delta.right.double()
        if delta.left is None:
            squared = float(right.square().sum())
        else:
            left = delta.left.double()
            squared = float(((left.T @ left) * (right @ right.T)).sum())
        found[str(delta.layer)] = math.sqrt(max(0.0, squared))
    return found

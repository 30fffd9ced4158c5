"""Change one association of one layer. Rank-one model editing (ROME).

Source: Meng et al. 2022 (arXiv 2202.05262), section 3 and the released code; key modes: Gupta et al. 2024 (R-ROME,
arXiv 2403.07175).

For each fact and each layer, on the model as edited so far:

1. k is the down-projection's input at the edited token, o its output (bias included), in every context.
2. ``u = C^-1 k / |C^-1 k|``, C the second moment of keys.
3. ``v* = v0 + delta`` by the optimisation of ``targets``; v0 is o on the plain prompt.
4. The change is ``u (v* - o) / (k . u)``, of rank one; the bias stays. The edited map takes k to v*.

Which k and o: ``averaged`` (default) the means over contexts in steps 2 and 4; ``prompt_only`` the plain prompt's;
``original``, as published, the mean in step 2 and the plain prompt's in step 4, where k . u can come out near zero, and
the change explodes. k . u is reported, and told when it is small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from factscope.editors.problems import Task
from factscope.editors.second_moments import Moments
from factscope.editors.specs import KeyMode, RomeSpec
from factscope.editors.suffix import Suffix, multiplier, read
from factscope.editors.targets import Step, Value, limit_of, optimise
from factscope.errors import SpecError
from factscope.interventions.weights import WeightDelta
from factscope.models.handle import ModelHandle

SMALL = 0.1
"""k . u as a share of what it is for the key that u was made of; below, an update is told to be doubtful."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RankOne:
    """One association's change.

    Attributes:
        key, output: k and o of step 4. ``value``: v*.
        k_dot_u: of the key that is edited. ``share``: the same, divided by that of the key that u was made of.
        found: how v* was found.
    """

    delta: WeightDelta
    key: Float[Tensor, " d_in"]
    output: Float[Tensor, " d_out"]
    value: Float[Tensor, " d_out"]
    k_dot_u: float
    share: float
    found: Value


def rank_one(
    model: ModelHandle,
    task: Task,
    layer: int,
    templates: Sequence[str],
    moments: Moments,
    spec: RomeSpec,
    *,
    deltas: Sequence[WeightDelta] = (),
    step: Callable[[tuple[Step, ...]], None] = lambda steps: None,
    pause: Callable[[], None] = lambda: None,
) -> RankOne:
    """The change of one layer for one fact.

    Args:
        deltas: edits that are in place already.
        step: called after every step of the optimisation; may raise to end it.
        pause: the same, called between what comes before and behind it.

    Raises:
        InputError: something of the fact or the spec cannot be used.
    """
    rows = task.rows(templates, spec.fact_token, essence=True)
    noise = task.noise(rows)
    pause()
    times = multiplier(model, layer, deltas)
    pause()
    seen = read(model, rows, (layer,), deltas=deltas, noise=noise)[layer]
    keys, outputs = seen.keys[:-1].double(), seen.outputs[:-1].double()
    pause()
    suffix = Suffix(model, rows, layer, multiplier=times, deltas=deltas, noise=noise, pause=pause)
    found = optimise(
        suffix,
        task.target.ids,
        spec,
        first=seen.outputs[0],
        limit=limit_of(spec, seen.outputs[0], seen.stream[0], times),
        objective=task.objective,
        step=step,
    )
    pause()
    value = outputs[0] + found.delta.double()
    made_of, key, output = _chosen(spec.key_mode, keys, outputs)
    direction = moments.solve(layer, made_of)
    u = direction / direction.norm()
    k_dot_u, own = float(key @ u), float(made_of @ u)
    if k_dot_u == 0.0:
        raise SpecError("k . u is 0, so that no change of rank one takes the key anywhere", "choose key mode averaged")
    right = (value - output) / k_dot_u
    return RankOne(
        delta=WeightDelta(
            layer=layer,
            place="down_projection",
            left=_rounded(u[:, None], seen.keys),
            right=_rounded(right[None], seen.keys),
        ),
        key=key,
        output=output,
        value=value,
        k_dot_u=k_dot_u,
        share=k_dot_u / own,
        found=found,
    )


def _chosen(mode: KeyMode, keys: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The key that u is made of, the key that is edited, and what it gives now."""
    if mode == "averaged":
        return keys.mean(dim=0), keys.mean(dim=0), outputs.mean(dim=0)
    if mode == "prompt_only":
        return keys[0], keys[0], outputs[0]
    if mode == "original":
        return keys.mean(dim=0), keys[0], outputs[0]
    raise SpecError(f"key mode {mode!r} is unknown", "choose averaged, prompt_only or original")


def _rounded(matrix: Tensor, like: Tensor) -> Tensor:
    """Float32 on the CPU, whatever the model runs in; float64 where it runs in that."""
    return matrix.to("cpu", torch.float64 if like.dtype == torch.float64 else torch.float32)

"""Train down-projections until the model says it. Finetuning, with or without a bound on every weight (FT, FT-L).

Source: Meng et al. 2022 (arXiv 2202.05262), section 3.4 and appendix E.1; Hase et al. 2023 (arXiv 2301.04213), appendix
A; their released code.

1. The change of each layer's matrix starts at zero and is trained with Adam. The model's weights are not: the change is
   added to what the down-projection gives.
2. The loss is ``-sum log p(target tokens)``, each after those before it, mean over facts. To erase it is ``exp`` of the
   negative of that sum, the target's probability.
3. Steps are skipped while the loss is below ``stop``; after ``patience`` such steps in a row training ends. An erasure
   trains to its last step.
4. With a bound, every entry of the change is cut to plus or minus the bound after each step.

Where this differs from the released code: there the bias is trained too, since its name matches (``bias``); ROME's code
scores all tokens of the target at the prompt's last token, takes their mean and ends below ``stop`` at once (``loss``
``compat``). In fact forcing the prompt stands there in ten noisy copies, their losses added up; here the ten samples of
a causal trace, the same at every step, and with ``noise_at`` ``compat`` fresh ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from factscope.editors.noise import RowNoise
from factscope.editors.problems import Task
from factscope.editors.prompts import PLAIN
from factscope.editors.specs import FineTuningSpec
from factscope.editors.suffix import Added, Suffix, read
from factscope.editors.targets import Step
from factscope.interventions.weights import WeightDelta
from factscope.models.handle import ModelHandle


@dataclass(frozen=True, kw_only=True, eq=False)
class Tuned:
    """What training came to.

    Attributes:
        steps: losses; ``p_target`` is the mean over facts, ``norm`` that of all changes together.
        stopped: whether the loss stayed below ``stop``.
    """

    deltas: tuple[WeightDelta, ...]
    steps: tuple[Step, ...]
    stopped: bool


def tune(
    model: ModelHandle,
    tasks: Sequence[Task],
    layers: Sequence[int],
    spec: FineTuningSpec,
    *,
    step: Callable[[tuple[Step, ...]], None] = lambda steps: None,
    pause: Callable[[], None] = lambda: None,
) -> Tuned:
    """Train the change of some layers on some facts.

    Args:
        step: called after every evaluation of the loss; may raise to end it.
        pause: the same, called between the facts.

    Raises:
        InputError: something of a fact or the spec cannot be used.
    """
    runs = [_Run(model, one, layers, spec, pause) for one in tasks]
    weights = {layer: _zeros(model, runs[0], layer) for layer in layers}
    biases = {layer: weights[layer].new_zeros(weights[layer].shape[1]) for layer in layers} if spec.bias else {}
    parameters = [*weights.values(), *biases.values()]
    for parameter in parameters:
        parameter.requires_grad_()
    optimiser = torch.optim.Adam(parameters, lr=spec.learning_rate)
    erasing = tasks[0].objective == "minimise"
    steps: list[Step] = []
    quiet = 0
    for number in range(spec.steps):
        nlls = []
        for run in runs:
            pause()
            nlls.append(run.nll(_changes(weights, biases)))
        losses = [torch.exp(-nll) if erasing else nll for nll in nlls]
        loss = torch.stack([one.sum() for one in losses]).mean()
        steps.append(_told(number, loss, nlls, runs, weights))
        step(tuple(steps))
        below = not erasing and float(loss.detach()) < spec.stop
        quiet = quiet + 1 if below else 0
        if quiet >= (1 if spec.loss == "compat" else spec.patience):
            break
        if below:
            continue
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        optimiser.step()
        if spec.bound is not None:
            for parameter in parameters:
                parameter.detach().clamp_(-spec.bound, spec.bound)
    return Tuned(deltas=_deltas(weights, biases), steps=tuple(steps), stopped=quiet > 0)


class _Run:
    """One fact's prompt, recorded up to the first trained layer; in fact forcing so many noisy copies of it."""

    def __init__(
        self, model: ModelHandle, one: Task, layers: Sequence[int], spec: FineTuningSpec, pause: Callable[[], None]
    ) -> None:
        copies = spec.rows if one.source is not None else 1
        rows = one.rows([PLAIN] * copies)
        self.noise: RowNoise | None = one.noise(rows)
        self.target = torch.tensor(one.target.ids, device=model.device)
        self._compat, self._n = spec.loss == "compat", one.target.n_tokens
        if self._compat:  # all of the target is scored where its first token is
            rows = replace(rows, read=rows.read[:, :1])
        self.rows = rows
        self._suffix = Suffix(model, rows, min(layers), noise=self.noise, everywhere=True, pause=pause)

    def nll(self, changes: dict[int, Added]) -> Tensor:
        """Of the target, one for each copy; summed over its tokens, or as ROME's code has it, their mean."""
        log_p = torch.log_softmax(self._suffix.with_maps(changes), dim=-1)
        if self._compat:
            return -log_p[:, 0, self.target].mean(dim=-1)
        return -log_p.gather(-1, self.target[None, :, None].expand(len(log_p), -1, 1))[..., 0].sum(dim=-1)

    def probability(self, nll: Tensor) -> float:
        """Of the whole target, mean over copies; with ROME's loss the geometric mean of its tokens'."""
        return float(torch.exp(-nll.detach().double()).mean())


def _zeros(model: ModelHandle, run: _Run, layer: int) -> Tensor:
    seen = read(model, run.rows, (layer,))[layer]
    dtype = torch.float64 if seen.keys.dtype == torch.float64 else torch.float32
    return torch.zeros(seen.keys.shape[-1], seen.outputs.shape[-1], dtype=dtype, device=model.device)


def _changes(weights: dict[int, Tensor], biases: dict[int, Tensor]) -> dict[int, Added]:
    def added(layer: int) -> Added:
        def change(x: Tensor) -> Tensor:
            found = x @ weights[layer].to(x)
            return found + biases[layer].to(x) if layer in biases else found

        return change

    return {layer: added(layer) for layer in weights}


def _told(number: int, loss: Tensor, nlls: Sequence[Tensor], runs: Sequence[_Run], weights: dict[int, Tensor]) -> Step:
    p = [run.probability(nll) for run, nll in zip(runs, nlls, strict=True)]
    return Step(
        step=number,
        loss=float(loss.detach()),
        nll=float(torch.stack([nll.detach().mean() for nll in nlls]).mean()),
        kl=0.0,
        decay=0.0,
        p_target=sum(p) / len(p),
        norm=float(torch.stack([w.detach().norm() for w in weights.values()]).norm()),
    )


def _deltas(weights: dict[int, Tensor], biases: dict[int, Tensor]) -> tuple[WeightDelta, ...]:
    return tuple(
        WeightDelta(
            layer=layer,
            place="down_projection",
            right=matrix.detach().cpu(),
            bias=biases[layer].detach().cpu() if layer in biases else None,
        )
        for layer, matrix in weights.items()
    )

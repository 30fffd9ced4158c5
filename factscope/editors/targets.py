"""Which value makes the model say it? The optimisation of v* (ROME) and z (MEMIT).

Source: Meng et al. 2022 (arXiv 2202.05262), section 3.1 and the released code; Meng et al. 2022 (arXiv 2210.07229),
section 4.2; for erasure Hase et al. 2023 (arXiv 2301.04213), appendix A and the released code.

1. A vector delta, zero at first, is added to what the layer's MLP writes at the edited token of every row: the prompt
   in its contexts, and "{subject} is a".
2. loss = mean over contexts of ``-sum log p(target tokens) / n``
        + kl_factor * KL(p of this step || p of the first step) of what follows the edited token of the last row
        + weight_decay * |delta| / |v0|^2, where v0 is not zero.
   The first term is called nll. To erase a fact it is replaced by ``exp(-nll)``, and nothing stops early.
3. Adam; after every update delta is cut to ``clamp`` times the reference norm. The last step evaluates only.

Where this differs: the published limit is four times the norm of what the MLP wrote, ``v0``. In a small model that is
short beside the residual stream and cannot change an answer, so that the stream's norm is offered as the reference.
"Weight decay" has the norm over the squared norm, as in the released code. The limit of ROME and the residual of MEMIT
are measured in the down-projection's own output; where the block multiplies it, so is the stream's norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from factscope.editors.specs import ValueSpec
from factscope.editors.suffix import Suffix
from factscope.errors import SpecError

Objective = Literal["maximise", "minimise"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One evaluation of the loss.

    Attributes:
        loss: all of it. ``nll``: in nats a token, mean over contexts; ``kl`` and ``decay`` as they are added.
        p_target: of the whole target behind the plain prompt.
        norm: of delta.
    """

    step: int
    loss: float
    nll: float
    kl: float
    decay: float
    p_target: float
    norm: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Value:
    """What the optimisation came to.

    Attributes:
        delta: to be added to what the MLP writes.
        steps: the loss at each.
        limit: the longest delta that was allowed.
        stopped: why it ended.
    """

    delta: Float[Tensor, " d_out"]
    steps: tuple[Step, ...]
    limit: float
    stopped: Literal["steps", "stop"]


def optimise(
    suffix: Suffix,
    target: tuple[int, ...],
    spec: ValueSpec,
    *,
    first: Float[Tensor, " d_out"],
    limit: float,
    objective: Objective = "maximise",
    essence: bool = True,
    in_stream: bool = False,
    step: Callable[[tuple[Step, ...]], None] = lambda steps: None,
) -> Value:
    """Find the delta.

    Args:
        suffix: the rows, recorded; the last is about the subject's essence if ``essence``.
        target: its tokens.
        first: what the MLP writes at the plain prompt's edited token, v0; in the stream, the block's output.
        limit: the longest delta.
        in_stream: delta is what the residual stream gets (MEMIT), not what the MLP writes.
        step: called after every evaluation; may raise to end it.
    """
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    delta = torch.zeros(first.shape, dtype=dtype, device=first.device, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=spec.learning_rate)
    squared = float(first.to(dtype).square().sum())
    scale = spec.weight_decay / squared if squared else 0.0
    ids = torch.tensor(target, device=first.device)
    before: Tensor | None = None
    steps: list[Step] = []
    for number in range(spec.steps):
        log_p = torch.log_softmax(suffix.with_value(delta, in_stream=in_stream), dim=-1)
        prompts = log_p[:-1] if essence else log_p
        of_target = prompts.gather(-1, ids[None, :, None].expand(len(prompts), -1, 1))[..., 0]
        nll = -of_target.mean(dim=-1).mean()
        kl = delta.new_zeros(())
        if essence:
            now = log_p[-1:, 0]
            before = now.detach().clone() if before is None else before
            kl = spec.kl_factor * functional.kl_div(before, now, log_target=True, reduction="batchmean")
        decay = scale * delta.norm()
        asked = nll if objective == "maximise" else torch.exp(-nll)
        loss = asked + kl + decay
        steps.append(_told(number, loss, nll, kl, decay, of_target[0], delta))
        step(tuple(steps))
        if _reached(spec, steps[-1], objective):
            return Value(delta=delta.detach(), steps=tuple(steps), limit=limit, stopped="stop")
        if number == spec.steps - 1:
            break
        delta.grad = torch.autograd.grad(loss, delta)[0]
        optimiser.step()
        _cut(delta, limit)
    return Value(delta=delta.detach(), steps=tuple(steps), limit=limit, stopped="steps")


def _told(number: int, loss: Tensor, nll: Tensor, kl: Tensor, decay: Tensor, of_target: Tensor, delta: Tensor) -> Step:
    told = [float(one.detach()) for one in (loss, nll, kl, decay)]
    return Step(
        step=number,
        loss=told[0],
        nll=told[1],
        kl=told[2],
        decay=told[3],
        p_target=float(of_target.detach().double().sum().exp()),
        norm=float(delta.detach().norm()),
    )


def _reached(spec: ValueSpec, last: Step, objective: Objective) -> bool:
    return objective == "maximise" and (last.loss if spec.stop_on == "loss" else last.nll) < spec.stop


@torch.no_grad()
def _cut(delta: Tensor, limit: float) -> None:
    length = float(delta.detach().norm())
    if length > limit:
        delta.mul_(limit / length)


def limit_of(spec: ValueSpec, first: Tensor, stream: Tensor, times: float | None) -> float:
    """The longest delta: ``clamp`` times the norm of v0, or of the stream in units of what the MLP writes.

    Args:
        first: v0. ``stream``: the block's output at the same token.
        times: how many times what the MLP writes the stream gets; None where that is no constant.

    Raises:
        SpecError: v0 is the reference, and is zero; or the stream is, and what the MLP writes does not reach it
            linearly.
    """
    if spec.clamp_reference == "mlp":
        if not bool(first.any()):
            raise SpecError(
                "clamp reference 'mlp' is the length of what the MLP writes at the edited token, and this layer's MLP "
                "writes nothing there (its down-projection may be zero)",
                "choose clamp reference residual, or another layer",
            )
        return spec.clamp * float(first.norm())
    if times is None:
        raise SpecError(
            "clamp reference 'residual' compares with the residual stream, which gets what this model's MLP writes "
            "through a norm",
            "choose mlp",
        )
    return spec.clamp * float(stream.norm()) / abs(times)

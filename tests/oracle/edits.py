"""Random edits of tiny models, and the same models with the edits written into a copy of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from factscope.editors.edit import Edit, EditedModel, EditFact, weight_state
from factscope.interventions.weights import Place, WeightDelta
from factscope.models.handle import ModelHandle
from tests.oracle.questions import edit as as_written
from tests.oracle.whole import Whole

FACT = EditFact(prompt="{} is owned by", subject="Beats Music", target="Sony", answer="Apple")


def delta(
    whole: Whole, layer: int, place: Place, *, rank: int | None, bias: bool, seed: int, size: float = 0.5
) -> WeightDelta:
    """A random change that moves what the map gives by about ``size`` for an input of unit variance."""
    d_in, d_out = whole.shape(place, layer)
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, spread: float) -> Tensor:
        return spread * torch.randn(shape, generator=generator)

    left = None if rank is None else drawn(d_in, rank, spread=d_in**-0.5)
    right = drawn(d_in if rank is None else rank, d_out, spread=size * (d_in if rank is None else rank) ** -0.5)
    return WeightDelta(
        layer=layer, place=place, left=left, right=right, bias=drawn(d_out, spread=0.3 * size) if bias else None
    )


def edit_of(
    handle: ModelHandle,
    deltas: Sequence[WeightDelta],
    *,
    after: Sequence[Edit] = (),
    subject: str = FACT.subject,
    **more: Any,
) -> Edit:
    """An edit made of these deltas for the model behind a handle, as if computed while others were on."""
    fact = EditFact(prompt=FACT.prompt, subject=subject, target=FACT.target, answer=FACT.answer)
    fields: dict[str, Any] = {
        "method": "rome",
        "problem": "error-injection",
        "model": EditedModel.of(handle),
        "computed_on": weight_state(handle, after),
        "facts": (fact,),
        "spec": {"preset": "bundled", "layers": [d.layer for d in deltas], "v_lr": 0.5},
        "templates": ("{}", "The day. {}"),
        "report": {"loss": [2.5, 0.25], "k_u": 1.5},
    }
    return Edit(deltas=tuple(deltas), **(fields | more))


def merged(model: PreTrainedModel, edits: Sequence[Edit]) -> PreTrainedModel:
    """A copy of the model with the edits written into its weights; nothing of factscope takes part."""
    return Whole(model, wide=False).write([as_written(delta) for edit in edits for delta in edit.deltas])

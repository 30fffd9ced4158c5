"""Edits of weights that never touch a weight: what they add to a linear map's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from factscope.errors import CapabilityError

if TYPE_CHECKING:
    from factscope.models.handle import ModelHandle

Place = Literal["down_projection", "output_projection"]


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightDelta:
    """A change of one linear map ``y = x W + b``: ``W + left right`` (or ``W + right``) and ``b + bias``.

    Attributes:
        layer, place: which map: the MLP's down-projection or the attention's output projection.
        left: None where the change is not of low rank.
    """

    layer: int
    place: Place
    right: Float[Tensor, "rank d_out"]
    left: Float[Tensor, "d_in rank"] | None = None
    bias: Float[Tensor, " d_out"] | None = None

    def added(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """What the edited map gives for x beyond the plain one."""
        inner = x if self.left is None else x @ self.left.to(x)
        change = inner @ self.right.to(x)
        return change if self.bias is None else change + self.bias.to(x)


def overlay(deltas: Sequence[WeightDelta]) -> Mapping[tuple[str, int], Callable[[Tensor], Tensor]]:
    """Deltas as a plan takes them: one function for each edited map."""
    by_map: dict[tuple[str, int], list[WeightDelta]] = {}
    for delta in deltas:
        by_map.setdefault((delta.place, delta.layer), []).append(delta)

    def together(found: Sequence[WeightDelta]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.stack([delta.added(x) for delta in found]).sum(dim=0)

    return {at: found[0].added if len(found) == 1 else together(found) for at, found in by_map.items()}


def down_weight(model: ModelHandle, layer: int) -> Float[Tensor, "d_in d_out"]:
    """The matrix of an MLP's down-projection: row i is what neuron i writes.

    Raises:
        CapabilityError: the MLP has no such matrix, or it is kept in another form.
    """
    model.require("dense_mlp", "a look into the MLP's neurons")
    module: Any = model.parts.wiring.down_projection[layer]
    weight = module.weight.detach()
    if not weight.is_floating_point():
        raise CapabilityError(
            f"the weights of {model.info.name} are kept in {weight.dtype}, which has no plain matrix to look into",
            "load it in float32 or bfloat16",
        )
    return weight.T if isinstance(module, nn.Linear) else weight


def silenced(model: ModelHandle, layer: int) -> Callable[[Tensor], Tensor]:
    """What to add to a down-projection's output so that its bias alone is left, as if all neurons were at zero.

    Raises:
        CapabilityError: the MLP has no plain down-projection.
    """
    return WeightDelta(layer=layer, place="down_projection", right=-down_weight(model, layer)).added

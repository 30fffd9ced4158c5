"""Edits of weights that never touch a weight: what they add to a linear map's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from factscope.errors import CapabilityError
from factscope.models.dispatch import Overlay

if TYPE_CHECKING:
    from factscope.models.handle import ModelHandle

Place = Literal["down_projection", "output_projection"]
PLACES: tuple[Place, ...] = get_args(Place)


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

    @property
    def rank(self) -> int | None:
        """Of the change of W; None where it is kept as one matrix."""
        return None if self.left is None else self.left.shape[1]

    @property
    def d_in(self) -> int:
        """Width of the map's input."""
        return self.right.shape[0] if self.left is None else self.left.shape[0]

    @property
    def d_out(self) -> int:
        """Width of the map's output."""
        return self.right.shape[1]

    def to(self, like: Tensor) -> WeightDelta:
        """The same change on a tensor's device and in its type."""
        left = None if self.left is None else self.left.to(like)
        bias = None if self.bias is None else self.bias.to(like)
        return replace(self, right=self.right.to(like), left=left, bias=bias)

    def matrix(self) -> Float[Tensor, "d_in d_out"]:
        """The change of W, written out."""
        return self.right if self.left is None else self.left @ self.right

    def added(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """What the edited map gives for x beyond the plain one."""
        inner = x if self.left is None else x @ self.left.to(x)
        change = inner @ self.right.to(x)
        return change if self.bias is None else change + self.bias.to(x)


class _Together:
    """Deltas of one map, as what they add to its output.

    A copy of them is kept where the map was run last (a device, a type), so that they travel once. A map of a loaded
    model stays where it is, so that there is one copy.
    """

    def __init__(self, deltas: Sequence[WeightDelta]) -> None:
        self._deltas = tuple(deltas)
        self._near: tuple[torch.device, torch.dtype, tuple[WeightDelta, ...]] | None = None

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        near = self._near  # read once: another thread may put its own in place
        if near is None or near[:2] != (x.device, x.dtype):
            near = self._near = (x.device, x.dtype, tuple(delta.to(x) for delta in self._deltas))
        change = near[2][0].added(x)
        for delta in near[2][1:]:
            change = change + delta.added(x)
        return change


def overlay(deltas: Sequence[WeightDelta]) -> Overlay:
    """Deltas as a forward takes them: one function for each edited map."""
    by_map: dict[tuple[str, int], list[WeightDelta]] = {}
    for delta in deltas:
        by_map.setdefault((delta.place, delta.layer), []).append(delta)
    return {at: _Together(found) for at, found in by_map.items()}


def down_weight(model: ModelHandle, layer: int) -> Float[Tensor, "d_in d_out"]:
    """The matrix of an MLP's down-projection, edits included: row i is what neuron i writes.

    Raises:
        CapabilityError: the MLP has no such matrix, or it is kept in another form.
    """
    model.require("dense_mlp", "a look into the MLP's neurons")
    module: Any = model.parts.wiring.down_projection[layer]
    weight = model.weight(module)
    if not weight.is_floating_point():
        raise CapabilityError(
            f"the weights of {model.info.name} are kept in {weight.dtype}, which has no plain matrix to look into",
            "load it in float32 or bfloat16",
        )
    matrix = weight.T if isinstance(module, nn.Linear) else weight
    for edit in model.edits:
        for delta in edit.deltas:
            if (delta.place, delta.layer) == ("down_projection", layer):
                matrix = matrix + delta.to(matrix).matrix()
    return matrix


def silenced(model: ModelHandle, layer: int) -> Callable[[Tensor], Tensor]:
    """What to add to a down-projection's output so that its bias alone is left, as if all neurons were at zero.

    Raises:
        CapabilityError: the MLP has no plain down-projection.
    """
    return WeightDelta(layer=layer, place="down_projection", right=-down_weight(model, layer)).added

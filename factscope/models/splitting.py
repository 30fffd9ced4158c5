"""How a model's attention updates split into heads, and how such a part reaches the logits; measured on load.

Nothing here reads a weight by its name. What a head gives is the input of the output projection, cut into equal
pieces. What a position hands to a head (its values) is what the head gives for that position alone: with nothing else
to look at its weight is 1, so the model itself looks up the group's value head, adds biases, and norms its input. A
norm is a matrix with one scale for each state, ``y = s(x) W x + shift``: the matrix and the shift are found by feeding
it vectors, and the scale of a state by comparing with what the model made of it. Held fast, that scale makes the way
from an update to the logits linear.

    heads     each head's part and the bias add up to what the output projection gives
    direct    norms behind the attention and the final norm are such norms, and the output embedding is a matrix
    sources   attention weights are told, and weights times values are what the heads give
    mappings  values are a linear map of what the attention reads, so that heads map tokens to tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from factscope.models.dispatch import Plan, Replacement, first

if TYPE_CHECKING:
    from factscope.models.handle import ModelHandle


@dataclass(frozen=True, kw_only=True, eq=False)
class Norm:
    """A norm as ``y = s(x) weight (x - mean(x)) + shift``, the mean taken off only where ``centred``.

    ``weight`` is known up to a factor, which the scales take in.
    """

    weight: Float[Tensor, " d_model"]
    shift: Float[Tensor, " d_model"]
    centred: bool

    def linear(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """``weight (x - mean(x))``, in float64."""
        return self.weight * self._centre(x.double())

    def transposed(self, direction: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
        """What ``direction`` of the outcome is as a direction of x, in float64."""
        return self._centre(self.weight * direction.double())

    def scale(
        self, x: Float[Tensor, "*batch d_model"], y: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch 1"]:
        """``s(x)`` from a state and what the norm made of it."""
        line = self.linear(x)
        return ((y.double() - self.shift) * line).sum(-1, keepdim=True) / line.square().sum(-1, keepdim=True)

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=-1, keepdim=True) if self.centred else x


@dataclass(frozen=True, kw_only=True, eq=False)
class Reach:
    """The way from an attention update to the logits.

    Attributes:
        final: the final norm.
        behind: per layer, the norm between the output projection and the stream; None where there is none.
        added: per layer, how many times the block adds the update.
        multiplier: scale of the logits; 1 where more than a scale follows (a soft-cap, before which logits are taken).
    """

    final: Norm
    behind: tuple[Norm | None, ...]
    added: tuple[float, ...]
    multiplier: float

    def scale_behind(
        self, layer: int, projected: Float[Tensor, " d_model"], update: Float[Tensor, " d_model"]
    ) -> float:
        """Scale of the norm behind a layer's attention for one state: what the projection gave, and what was added."""
        norm = self.behind[layer]
        return 1.0 if norm is None else float(norm.scale(projected, update.double() / self.added[layer]))

    def into_stream(
        self, layer: int, parts: Float[Tensor, "*batch d_model"], scale: float
    ) -> Float[Tensor, "*batch d_model"]:
        """Parts of what the projection gives as parts of what is added, the norm behind held at a scale."""
        norm = self.behind[layer]
        return self.added[layer] * (parts if norm is None else scale * norm.linear(parts))

    def before_norm(self, layer: int, direction: Float[Tensor, " d_model"], scale: float) -> Float[Tensor, " d_model"]:
        """A direction in the stream as a direction of what the projection gives."""
        norm = self.behind[layer]
        return self.added[layer] * (direction if norm is None else scale * norm.transposed(direction))

    def shift_behind(self, layer: int) -> Tensor | float:
        """What the norm behind a layer's attention adds whatever it is given."""
        norm = self.behind[layer]
        return 0.0 if norm is None else self.added[layer] * norm.shift


def measure_norm(
    apply: Callable[[Tensor], Tensor], examples: Float[Tensor, "row d_model"], tolerance: float
) -> Norm | None:
    """A module as a norm; None where it is none.

    Args:
        apply: the module, on rows.
        examples: states that go through it, on which the finding is verified.
        tolerance: of the deviation, as a share of what the module gives.
    """
    width = examples.shape[-1]
    half = (width + 1) // 2
    signs = torch.ones(width, dtype=torch.float64)
    signs[torch.arange(width)[1::2]] = -half / (width - half) if width > half else 1.0  # their mean is 0
    rows = torch.stack([torch.zeros_like(signs), signs, signs + 2.0]).to(examples)
    found: Tensor = apply(rows).double()
    if found.shape != rows.shape or not bool(torch.isfinite(found).all()):
        return None
    shift, plain, moved = found[0], found[1] - found[0], found[2] - found[0]
    size = float(plain.abs().max())
    centred = float((moved - plain).abs().max()) <= 10 * tolerance * size
    norm = Norm(weight=plain / rows[1].double(), shift=shift, centred=centred)
    given = apply(examples).double()
    off = norm.scale(examples, given) * norm.linear(examples) + shift - given
    return norm if float(off.abs().max()) <= tolerance * float(given.abs().max()) else None


def split(
    model: ModelHandle, layer: int, heads: Float[Tensor, "*row head size"]
) -> tuple[Float[Tensor, "*row head d_model"], Float[Tensor, " d_model"]]:
    """What each head puts into the output of the projection, and the projection's bias, which belongs to no head."""
    n_heads, size = heads.shape[-2:]
    apart = heads.new_zeros(*heads.shape[:-2], n_heads, n_heads, size)
    index = torch.arange(n_heads, device=heads.device)
    apart[..., index, index, :] = heads
    rows = apart.reshape(-1, n_heads * size)
    with torch.no_grad():
        projected = model.project(layer, torch.cat([rows, rows.new_zeros(1, n_heads * size)])).double()
    return (projected[:-1] - projected[-1]).reshape(*heads.shape[:-1], -1), projected[-1]


def seen_from_heads(
    model: ModelHandle, layer: int, direction: Float[Tensor, " d_model"], heads: Float[Tensor, "head size"]
) -> Float[Tensor, "head size"]:
    """A direction of the projection's output as a direction of each head's own space: ``W_O direction``.

    The projection is linear, so this is its gradient; the matrix itself, which may be quantised, is not touched.

    Args:
        heads: of the layer; only their shape and type matter.
    """
    with torch.enable_grad():
        given = torch.zeros_like(heads).flatten()[None].requires_grad_()
        (gradient,) = torch.autograd.grad((model.project(layer, given).double() * direction).sum(), given)
    return gradient[0].double().unflatten(0, heads.shape)


def update_of(model: ModelHandle, layer: int, projected: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
    """What the block adds to the stream where its attention's output projection gives this: the norm behind acts."""
    module, times = model.parts.wiring.updates[layer]["attention"]
    if module is model.parts.wiring.output_projection[layer]:
        return projected * times
    with torch.no_grad():
        return first(module(projected)) * times


def values(
    model: ModelHandle, ids: Int[Tensor, " position"], states: Sequence[Float[Tensor, "position d_model"]]
) -> list[Float[Tensor, "head position size"]]:
    """Per layer, what every position hands to every head: what the head gives for the position alone.

    Args:
        states: the input of every block.
    """
    plan = _alone(model.info.n_layers)
    plan.enter = lambda layer, hidden: states[layer][:, None].clone()
    model.forward(ids[:, None], plan, last=1)
    return [_given(plan, layer, model.info.n_heads).transpose(0, 1) for layer in range(model.info.n_layers)]


def mapped(model: ModelHandle, reads: Sequence[Float[Tensor, "row d_model"]]) -> list[Float[Tensor, "row head size"]]:
    """Per layer, what heads make of vectors that their attention reads, ``x W_V`` without any bias.

    Args:
        reads: per layer, in place of what the attention module is given.
    """
    rows = reads[0].shape[0]
    both = [torch.cat([given, torch.zeros_like(given[:1])]) for given in reads]
    place = {"rows": torch.arange(rows + 1), "positions": torch.zeros(rows + 1, dtype=torch.long), "length": 1}
    plan = _alone(model.info.n_layers)
    plan.replace = {("read", layer): Replacement(values=given, **place) for layer, given in enumerate(both)}
    model.forward(torch.zeros(rows + 1, 1, dtype=torch.long, device=model.device), plan, last=1)
    found = [_given(plan, layer, model.info.n_heads) for layer in range(model.info.n_layers)]
    return [given[:-1] - given[-1] for given in found]


def _alone(n_layers: int) -> Plan:
    return Plan(capture=frozenset((site, layer) for layer in range(n_layers) for site in ("heads", "row")))


def _given(plan: Plan, layer: int, n_heads: int) -> Float[Tensor, "row head size"]:
    """What heads give for one position alone; where a sink takes part of the attention, as if it did not."""
    heads = plan.captured["heads", layer]
    given = heads.reshape(-1, n_heads, heads.shape[-1] // n_heads).double()
    weights = plan.captured.get(("row", layer))
    return given if weights is None else given / weights[:, :, -1:].double()


# ---------------------------------------------------------------------------------------------- measured on load


def measure(
    model: ModelHandle, ids: Int[Tensor, "row position"], tolerance: float
) -> tuple[dict[str, str], Reach | None]:
    """Why the model cannot do each of ``heads``, ``direct``, ``sources``, ``mappings`` (empty where it can), and the
    way to the logits.

    Args:
        tolerance: largest deviation that counts as rounding, as a share.
    """
    names: tuple[str, ...] = ("heads", "direct", "sources", "mappings")
    sites = ("input", "heads", "projected", "attention", "row")
    layers = range(model.info.n_layers)
    plan = Plan(capture=frozenset({(site, layer) for layer in layers for site in sites} | {("output", layers[-1])}))
    model.forward(ids, plan, last=1)
    seen = plan.captured
    if reason := _unsplit(model, seen, tolerance):
        return dict.fromkeys(names, reason), None
    reasons: dict[str, str] = dict.fromkeys(names, "")
    reach: Reach | None = None
    try:
        reasons["direct"], reach = _direct(model, seen, tolerance)
    except Exception as error:  # any failure is a missing capability
        reasons["direct"] = f"running its norms alone fails ({type(error).__name__})"
    for name, check in (("sources", _sources), ("mappings", _mappings)):
        try:
            reasons[name] = check(model, ids, seen, tolerance)
        except Exception as error:  # any failure is a missing capability
            reasons[name] = f"running one position alone fails ({type(error).__name__})"
    return reasons, reach


def _where(bad: Sequence[int], n_layers: int) -> str:
    return "every layer" if len(bad) == n_layers else f"layers {', '.join(map(str, bad))}"


def _unsplit(model: ModelHandle, seen: dict[Any, Tensor], tolerance: float) -> str:
    n_heads, bad = model.info.n_heads, []
    for layer in range(model.info.n_layers):
        heads, projected = seen.get(("heads", layer)), seen.get(("projected", layer))
        if heads is None or projected is None or n_heads < 1 or heads.shape[-1] % n_heads:
            bad.append(layer)
            continue
        given = heads.reshape(-1, heads.shape[-1])[-1]
        parts, bias = split(model, layer, given.reshape(n_heads, -1))
        whole = projected.reshape(-1, projected.shape[-1])[-1].double()
        if not float((parts.sum(dim=0) + bias - whole).abs().max()) <= tolerance * max(1.0, float(whole.abs().max())):
            bad.append(layer)
    if not bad:
        return ""
    return f"the attention output does not split into heads ({_where(bad, model.info.n_layers)})"


def _direct(model: ModelHandle, seen: dict[Any, Tensor], tolerance: float) -> tuple[str, Reach | None]:
    if not model.capabilities["lens"].ok:
        return model.capabilities["lens"].reason, None
    if not model.capabilities["additive"].ok:
        return model.capabilities["additive"].reason, None
    wiring = model.parts.wiring
    weight = getattr(wiring.head, "weight", None)
    last = seen["output", model.info.n_layers - 1][0]
    if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point() or weight.dim() != 2:
        return "its output embedding is no plain matrix", None
    if weight.shape[-1] != last.shape[-1]:
        return "its states and its output embedding differ in width", None
    final = measure_norm(lambda rows: model.normed(rows[:, None])[:, 0], last, tolerance)
    if final is None:
        return "what stands before its output embedding is no norm", None
    behind: list[Norm | None] = []
    for layer in range(model.info.n_layers):
        module: Any = wiring.updates[layer]["attention"][0]
        if module is wiring.output_projection[layer]:
            behind.append(None)
            continue
        projected = seen["projected", layer]
        with torch.no_grad():
            norm = measure_norm(
                lambda rows, module=module: first(module(rows)), projected.reshape(-1, projected.shape[-1]), tolerance
            )
        if norm is None:
            return f"what stands behind the attention's output projection is no norm (layer {layer})", None
        behind.append(norm)
    added = tuple(wiring.updates[layer]["attention"][1] for layer in range(model.info.n_layers))
    multiplier = 1.0 if model.head is None else model.head.multiplier
    return "", Reach(final=final, behind=tuple(behind), added=added, multiplier=multiplier)


def _sources(model: ModelHandle, ids: Tensor, seen: dict[Any, Tensor], tolerance: float) -> str:
    n_layers, n_heads = model.info.n_layers, model.info.n_heads
    silent = [layer for layer in range(n_layers) if ("row", layer) not in seen]
    if silent:
        return f"its attention does not tell its weights ({_where(silent, n_layers)})"
    given = values(model, ids[0], [seen["input", layer][0] for layer in range(n_layers)])
    bad = []
    for layer in range(n_layers):
        heads = seen["heads", layer].reshape(-1, n_heads, seen["heads", layer].shape[-1] // n_heads)[-1].double()
        weights = seen["row", layer][0].double()
        if weights.shape != given[layer].shape[:2]:
            return "its attention weights are not one number a head and position"
        mixed = torch.einsum("hs,hsd->hd", weights, given[layer])
        if not float((mixed - heads).abs().max()) <= tolerance * max(1.0, float(heads.abs().max())):
            bad.append(layer)
    return f"attention weights times values are not what the heads give ({_where(bad, n_layers)})" if bad else ""


def _mappings(model: ModelHandle, ids: Tensor, seen: dict[Any, Tensor], tolerance: float) -> str:
    generator = torch.Generator().manual_seed(5)
    like = seen["input", 0]
    one, other = (torch.randn(like.shape[-1], generator=generator).to(like) for _ in range(2))
    rows = torch.stack([one, other, one + other])
    found = mapped(model, [rows] * model.info.n_layers)
    bad = [
        layer
        for layer, given in enumerate(found)
        if not float((given[0] + given[1] - given[2]).abs().max()) <= tolerance * max(1.0, float(given.abs().max()))
    ]
    reason = "its values are no linear map of what the attention reads"
    return f"{reason} ({_where(bad, model.info.n_layers)})" if bad else ""

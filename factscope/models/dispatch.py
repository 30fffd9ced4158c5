"""The one set of permanent hooks of a loaded model.

Hooks registered per request are global to a model: another session's clean run would go through your knockout. So the
hooks are put in place once, when the model is loaded, and what they do comes from a plan in a ``ContextVar``: a thread
without a plan runs the plain model, and threads with different plans never meet (a new thread starts with an empty
context, so the plan is set inside the worker).

The masks are combined with whatever mask the attention module receives, never replaced: a fresh mask would lose sliding
windows and ALiBi.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

Site = str
"""``input`` and ``output`` of a block; ``attention`` and ``mlp``: the updates added to the residual stream;
``pattern``: attention weights; ``heads``: input of the attention's output projection; ``allowed``: [query, key],
which edges the model's own mask leaves open."""


@dataclass(kw_only=True, eq=False)
class Plan:
    """What one forward does besides being a forward.

    Attributes:
        start_layer: blocks below are skipped; equal to the number of blocks, all are.
        resume: replaces the input of block ``start_layer`` (or, when all are skipped, the output of the last one).
        keep: per layer, False where an attention edge is cut; broadcast to [row, head, query, key].
        stop_after: the forward ends behind this block by raising ``Stopped``; None runs to the logits.
        capture: which (site, layer) to record into ``captured``; copies, on the model's device.
    """

    start_layer: int = 0
    resume: Float[Tensor, "row position d_model"] | None = None
    keep: Mapping[int, Bool[Tensor, "row head query key"]] = field(default_factory=dict)
    stop_after: int | None = None
    capture: frozenset[tuple[Site, int]] = frozenset()
    captured: dict[tuple[Site, int], Tensor] = field(default_factory=dict)


class Stopped(Exception):
    """A forward has come to the block behind which its plan ends it; whoever made the plan catches this."""


_ACTIVE: ContextVar[tuple[int, Plan] | None] = ContextVar("factscope_plan", default=None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Wiring:
    """The modules that the dispatcher holds on to, found by discovery.

    Attributes:
        layers: the blocks.
        layer_output_length: 0 where a block returns a tensor, else the length of the tuple it returns.
        attention: the module of each block that receives the mask; None for a block without attention.
        output_projection: the last linear map inside the attention.
        updates: per block, site to (module whose output is added to the stream, multiplier).
    """

    layers: tuple[nn.Module, ...]
    layer_output_length: tuple[int, ...]
    attention: tuple[nn.Module | None, ...]
    output_projection: tuple[nn.Module | None, ...]
    updates: tuple[Mapping[Site, tuple[nn.Module, float]], ...]


class Dispatcher:
    """Permanent hooks of one model; ``running`` sets what they do in this context."""

    def __init__(self, wiring: Wiring) -> None:
        self._wiring = wiring
        for index, layer in enumerate(wiring.layers):
            self._wrap_layer(index, layer)
            if (attention := wiring.attention[index]) is not None:
                attention.register_forward_pre_hook(self._mask_hook(index), with_kwargs=True)
                attention.register_forward_hook(self._pattern_hook(index))
            if (projection := wiring.output_projection[index]) is not None:
                projection.register_forward_pre_hook(self._heads_hook(index))
            for site, (module, multiplier) in wiring.updates[index].items():
                module.register_forward_hook(self._update_hook(site, index, multiplier))

    @contextmanager
    def running(self, plan: Plan) -> Iterator[Plan]:
        """Every forward of this model in this context follows the plan until the block ends."""
        token = _ACTIVE.set((id(self), plan))
        try:
            yield plan
        finally:
            _ACTIVE.reset(token)

    def _plan(self) -> Plan | None:
        active = _ACTIVE.get()
        return active[1] if active is not None and active[0] == id(self) else None

    def _wrap_layer(self, index: int, layer: nn.Module) -> None:
        original: Callable[..., Any] = layer.forward
        last = len(self._wiring.layers) - 1
        length = self._wiring.layer_output_length[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            plan = self._plan()
            if plan is None:
                return original(*args, **kwargs)
            positional = bool(args)
            hidden = args[0] if positional else kwargs["hidden_states"]
            if index < plan.start_layer:
                if index == last and plan.resume is not None:
                    hidden = plan.resume
                return hidden if length == 0 else (hidden, *([None] * (length - 1)))
            if index == plan.start_layer and plan.resume is not None:
                hidden = plan.resume
            if ("input", index) in plan.capture:
                plan.captured["input", index] = hidden.detach().clone()
            if positional:
                output = original(hidden, *args[1:], **kwargs)
            else:
                output = original(**{**kwargs, "hidden_states": hidden})
            if ("output", index) in plan.capture:
                plan.captured["output", index] = first(output).detach().clone()
            if index == plan.stop_after:
                raise Stopped
            return output

        layer.forward = forward

    def _mask_hook(self, index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            plan = self._plan()
            if plan is None:
                return None
            if ("allowed", index) in plan.capture:
                hidden = args[0] if args else kwargs["hidden_states"]
                plan.captured["allowed", index] = allowed(kwargs.get("attention_mask"), hidden.shape[-2])
            if index not in plan.keep:
                return None
            keep = plan.keep[index]
            return args, {**kwargs, "attention_mask": combine(kwargs.get("attention_mask"), keep)}

        return hook

    def _pattern_hook(self, index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            plan = self._plan()
            if plan is not None and ("pattern", index) in plan.capture and isinstance(output, tuple):
                weights = next((part for part in output[1:] if isinstance(part, Tensor) and part.dim() == 4), None)
                if weights is not None:
                    plan.captured["pattern", index] = weights.detach().clone()

        return hook

    def _heads_hook(self, index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            plan = self._plan()
            if plan is not None and ("heads", index) in plan.capture:
                plan.captured["heads", index] = args[0].detach().clone()

        return hook

    def _update_hook(self, site: Site, index: int, multiplier: float) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            plan = self._plan()
            if plan is not None and (site, index) in plan.capture:
                plan.captured[site, index] = first(output).detach() * multiplier

        return hook


def first(output: Any) -> Tensor:
    """The hidden states in what a module returned: the tensor itself or the first entry of a tuple or list."""
    return output[0] if isinstance(output, tuple | list) else output


def combine(mask: Tensor | None, keep: Bool[Tensor, "row head query key"]) -> Tensor:
    """The mask that the attention module was given, with the cut edges forbidden besides.

    Three conventions meet here: no mask at all (plain causal attention), a boolean mask of either polarity (the last
    query attends to itself, which tells them apart), and an additive one. Forbidden entries of an additive mask are set
    to the smallest number of its type, never added: two of them would overflow.
    """
    if mask is None:
        queries, keys = keep.shape[-2:]
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=keep.device).tril(diagonal=keys - queries)
        return allowed & keep
    kept = keep[..., -mask.shape[-1] :]
    if mask.dtype == torch.bool:
        true_means_attend = bool(mask.reshape(-1, *mask.shape[-2:])[0, -1, -1])
        return mask & kept if true_means_attend else mask | ~kept
    return mask.masked_fill(~kept, torch.finfo(mask.dtype).min)


def allowed(mask: Tensor | None, queries: int) -> Bool[Tensor, "query key"]:
    """Which edges a model's own mask leaves open in any head, for a forward without cached positions."""
    if mask is None:
        return torch.ones(queries, queries, dtype=torch.bool).tril()
    flat = mask.reshape(-1, *mask.shape[-2:])
    if mask.dtype == torch.bool:
        opened = flat if bool(flat[0, -1, -1]) else ~flat
    else:
        opened = flat > torch.finfo(mask.dtype).min / 2
    return opened.any(dim=0).cpu()

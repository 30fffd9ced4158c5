"""The one set of permanent hooks of a loaded model.

Hooks registered per request are global to a model: another session's clean run would go through your knockout. So the
hooks are put in place once, when the model is loaded, and what they do comes from a plan in a ``ContextVar``: a thread
without a plan runs the plain model, and threads with different plans never meet (a new thread starts with an empty
context, so the plan is set inside the worker).

The masks are combined with whatever mask the attention module receives, never replaced: a fresh mask would lose sliding
windows and ALiBi.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

Site = str
"""``input`` and ``output`` of a block; ``attention`` and ``mlp``: the updates added to the residual stream;
``pattern``: attention weights; ``row``: those of the last query alone; ``read``: what the attention module is given;
``heads``: input of the attention's output projection; ``projected``: its output; ``neurons``: input of the MLP's
down-projection; ``written``: its output, edits included; ``allowed``: [query, key], which edges the model's own mask
leaves open; ``embedding``: output of the embedding module; ``head``: what the output embedding is given."""

Overlay = Mapping[tuple[str, int], Callable[[Tensor], Tensor]]
"""Per (module, layer) of ``down_projection`` and ``output_projection``: what is added to the output, from the module's
input."""

Attend = Callable[..., tuple[Tensor, Tensor | None]]
"""An attention function as transformers calls it: (module, query, key, value, mask, ...) to (output, weights)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Replacement:
    """States or updates that take the place of what a site gives.

    Attributes:
        rows, positions: where, in rows of the forward and in positions of ``length`` that it computes.
        values: what, one vector for each.
        length: positions per row.
        shown: of these, the ones that a pruned module is given; None: all.
    """

    rows: Int[Tensor, " place"]
    positions: Int[Tensor, " place"]
    values: Float[Tensor, "place d_model"]
    length: int
    shown: Int[Tensor, " position"] | None = None

    def put_into(self, states: Tensor, multiplier: float = 1.0, *, own: bool = False) -> Tensor:
        """States [row, position, d_model], or flattened [row * position, d_model], with the values put in.

        Args:
            multiplier: the block adds so many times what this module gives.
            own: nobody else holds these states, so that they may be written; otherwise a copy is.
        """
        rows, positions, values = self.rows, self.positions, self.values
        length = self.length
        if self.shown is not None and len(self.shown) < length and states.shape[-2] % length:
            index = positions.new_full((length,), -1)
            index[self.shown] = torch.arange(len(self.shown), device=positions.device)
            positions, length = index[positions], len(self.shown)
            seen = positions >= 0
            rows, positions, values = rows[seen], positions[seen], values[seen]
        shown = states.reshape(-1, length, states.shape[-1]) if states.dim() == 2 else states
        changed = shown if own else shown.clone()
        changed[rows, positions] = (values if multiplier == 1.0 else values / multiplier).to(changed.dtype)
        return changed.reshape(states.shape)


@dataclass(kw_only=True, eq=False)
class Plan:
    """What one forward does besides being a forward.

    Attributes:
        start_layer: blocks below are skipped; equal to the number of blocks, all are.
        resume: replaces the input of block ``start_layer`` (or, when all are skipped, the output of the last one).
        keep: per layer, False where an attention edge is cut; broadcast to [row, head, query, key].
        stop_after: the forward ends behind this block by raising ``Stopped``; None runs to the logits.
        stop_at_head: the forward ends before the output embedding, whose input is recorded.
        capture: which (site, layer) to record into ``captured``; copies, on the model's device.
        embedding: changes what the embedding module gives.
        replace: per (site, layer), what is put in; ``input`` of the layer behind the last is the last one's output.
        added: what this run adds to the outputs of linear maps, besides what the weight state adds.
        enter: gives the input of a block its place; called before every block that runs.
        made_for: number of positions for which the model prepared what it hands its blocks (masks, rotations); where
            others enter a block, it is shown the first of them, or those that ``places`` gives.
        places: per block, which of these positions each token that enters stands at.
        attend: the attention of every block, where the family goes through transformers' attention interface.
        prune: the last block's output projection and MLP are shown these tokens of the sequence only; the others are
            not used.
        read: the output embedding is shown these positions of each row only, in this order.
    """

    start_layer: int = 0
    resume: Float[Tensor, "row position d_model"] | None = None
    keep: Mapping[int, Bool[Tensor, "row head query key"]] = field(default_factory=dict)
    stop_after: int | None = None
    stop_at_head: bool = False
    capture: frozenset[tuple[Site, int]] = frozenset()
    captured: dict[tuple[Site, int], Tensor] = field(default_factory=dict)
    embedding: Callable[[Tensor], Tensor] | None = None
    replace: Mapping[tuple[Site, int], Replacement] = field(default_factory=dict)
    added: Overlay = field(default_factory=dict)
    enter: Callable[[int, Tensor], Tensor] | None = None
    made_for: int | None = None
    places: Callable[[int], Int[Tensor, " token"]] | None = None
    attend: Attend | None = None
    prune: Int[Tensor, " token"] | None = None
    read: Int[Tensor, "row place"] | None = None


class Stopped(Exception):
    """A forward has come to where its plan ends it; whoever made the plan catches this."""


class _Active(NamedTuple):
    """What forwards in this context follow.

    Attributes:
        owner: which dispatcher's.
        weights: what the edits that are on add to the outputs of linear maps.
    """

    owner: int
    plan: Plan
    weights: Overlay


_ACTIVE: ContextVar[_Active | None] = ContextVar("factscope_plan", default=None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Wiring:
    """The modules that the dispatcher holds on to, found by discovery.

    Attributes:
        layers: the blocks.
        layer_output_length: 0 where a block returns a tensor, else the length of the tuple it returns.
        attention: the module of each block that receives the mask; None for a block without attention.
        output_projection: the last linear map inside the attention.
        down_projection: the last linear map inside the MLP; None for experts.
        mlp: the module that maps the last block's stream to its MLP update, alone; None where there is no such module.
        updates: per block, site to (module whose output is added to the stream, multiplier).
        embedding, head: the input and the output embedding.
    """

    layers: tuple[nn.Module, ...]
    layer_output_length: tuple[int, ...]
    attention: tuple[nn.Module | None, ...]
    output_projection: tuple[nn.Module | None, ...]
    down_projection: tuple[nn.Module | None, ...]
    mlp: nn.Module | None
    updates: tuple[Mapping[Site, tuple[nn.Module, float]], ...]
    embedding: nn.Module
    head: nn.Module | None


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
                projection.register_forward_hook(self._added_hook("output_projection", index))
            if (projection := wiring.down_projection[index]) is not None:
                projection.register_forward_pre_hook(self._neurons_hook(index))
                projection.register_forward_hook(self._added_hook("down_projection", index))
            for site, (module, multiplier) in wiring.updates[index].items():
                module.register_forward_hook(self._update_hook(site, index, multiplier))
        for module in (wiring.mlp, wiring.output_projection[-1]):
            if module is not None:
                self._prune(module)
        wiring.embedding.register_forward_hook(self._embedding_hook())
        if wiring.head is not None:
            wiring.head.register_forward_pre_hook(self._head_hook())

    @contextmanager
    def running(self, plan: Plan, weights: Overlay | None = None) -> Iterator[Plan]:
        """Every forward of this model in this context follows the plan until the block ends.

        Args:
            weights: the weight state, as what it adds to the outputs of linear maps; None: the weights as loaded.
        """
        token = _ACTIVE.set(_Active(id(self), plan, weights or {}))
        try:
            yield plan
        finally:
            _ACTIVE.reset(token)

    def _active(self) -> _Active | None:
        active = _ACTIVE.get()
        return active if active is not None and active.owner == id(self) else None

    def _plan(self) -> Plan | None:
        active = self._active()
        return None if active is None else active.plan

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
                if index == last and (change := plan.replace.get(("input", last + 1))) is not None:
                    hidden = change.put_into(hidden)
                return hidden if length == 0 else (hidden, *([None] * (length - 1)))
            if index == plan.start_layer and plan.resume is not None:
                hidden = plan.resume
            if plan.enter is not None:
                hidden = plan.enter(index, hidden)
                if plan.made_for is not None and plan.places is not None:
                    places = plan.places(index)
                    kwargs = {name: placed(value, plan.made_for, places) for name, value in kwargs.items()}
                elif plan.made_for is not None:
                    kwargs = {name: shortened(value, plan.made_for, hidden.shape[1]) for name, value in kwargs.items()}
            if (change := plan.replace.get(("input", index))) is not None:
                hidden = change.put_into(hidden)
            if ("input", index) in plan.capture:
                plan.captured["input", index] = hidden.detach().clone()
            if positional:
                output = original(hidden, *args[1:], **kwargs)
            else:
                output = original(**{**kwargs, "hidden_states": hidden})
            if index == last and (change := plan.replace.get(("input", last + 1))) is not None:
                changed = change.put_into(first(output))
                output = changed if length == 0 else (changed, *output[1:])
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
            if (change := plan.replace.get(("read", index))) is not None:
                args, kwargs = _with_states(args, kwargs, change.put_into(_states(args, kwargs)))
            if ("read", index) in plan.capture:
                plan.captured["read", index] = _states(args, kwargs).detach().clone()
            if ("allowed", index) in plan.capture:
                queries = _states(args, kwargs).shape[-2]
                plan.captured["allowed", index] = allowed(kwargs.get("attention_mask"), queries)
            if index not in plan.keep:
                return None if change is None else (args, kwargs)
            keep = plan.keep[index]
            return args, {**kwargs, "attention_mask": combine(kwargs.get("attention_mask"), keep)}

        return hook

    def _pattern_hook(self, index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            plan = self._plan()
            if plan is None or not isinstance(output, tuple) or not {("pattern", index), ("row", index)} & plan.capture:
                return
            weights = next((part for part in output[1:] if isinstance(part, Tensor) and part.dim() == 4), None)
            if weights is not None:
                for site, kept in (("pattern", weights), ("row", weights[:, :, -1])):
                    if (site, index) in plan.capture:
                        plan.captured[site, index] = kept.detach().clone()

        return hook

    def _heads_hook(self, index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            plan = self._plan()
            if plan is not None and ("heads", index) in plan.capture:
                plan.captured["heads", index] = args[0].detach().clone()

        return hook

    def _neurons_hook(self, index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            plan = self._plan()
            if plan is not None and ("neurons", index) in plan.capture:
                plan.captured["neurons", index] = args[0].detach().clone()

        return hook

    def _update_hook(self, site: Site, index: int, multiplier: float) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            plan = self._plan()
            if plan is None:
                return None
            change = plan.replace.get((site, index))
            if change is not None:
                changed = change.put_into(first(output), multiplier, own=isinstance(module, nn.Linear | Conv1D))
                output = (changed, *output[1:]) if isinstance(output, tuple | list) else changed
            if (site, index) in plan.capture:
                plan.captured[site, index] = first(output).detach() * multiplier
            return None if change is None else output

        return hook

    def _added_hook(self, name: str, index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            active = self._active()
            if active is None:
                return None
            changed = output
            for added in (active.weights.get((name, index)), active.plan.added.get((name, index))):
                if added is not None:
                    changed = changed + added(args[0]).to(output.dtype)
            site = "projected" if name == "output_projection" else "written"
            if (site, index) in active.plan.capture:
                active.plan.captured[site, index] = changed.detach().clone()
            return None if changed is output else changed

        return hook

    def _prune(self, module: nn.Module) -> None:
        """Show a module of the last block some tokens only, and hand back zeros for the others."""
        lengths: ContextVar[int] = ContextVar("factscope_length")

        def narrow(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
            plan = self._plan()
            if plan is None or plan.prune is None:
                return None
            lengths.set(args[0].shape[1])
            return (args[0][:, plan.prune],)

        def widen(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            plan = self._plan()
            if plan is None or plan.prune is None:
                return None
            wide = output.new_zeros(output.shape[0], lengths.get(), output.shape[-1])
            wide[:, plan.prune] = output
            return wide

        module.register_forward_pre_hook(narrow)
        module.register_forward_hook(widen)

    def _embedding_hook(self) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            plan = self._plan()
            if plan is None:
                return None
            if plan.embedding is not None:
                output = plan.embedding(output)
            if ("embedding", 0) in plan.capture:
                plan.captured["embedding", 0] = output.detach().clone()
            return None if plan.embedding is None else output

        return hook

    def _head_hook(self) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            plan = self._plan()
            if plan is None:
                return None
            if plan.stop_at_head:
                plan.captured["head", 0] = args[0].detach()
                raise Stopped
            states = args[0]
            if plan.read is not None:
                states = states.gather(1, plan.read[..., None].expand(-1, -1, states.shape[-1]))
            return (states.contiguous(), *args[1:])  # a slice would be multiplied row by row

        return hook


def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The attention function of every model here: the plan's where there is one, else the family's own, eager."""
    active = _ACTIVE.get()
    if active is not None and active.plan.attend is not None:
        return active.plan.attend(module, *args, **kwargs)
    return eager_attention(module)(module, *args, **kwargs)


def eager_attention(module: nn.Module) -> Attend:
    """The eager attention function that a family keeps beside its modules.

    Raises:
        LookupError: it keeps none.
    """
    for kind in type(module).__mro__:
        own = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if own is not None:
            return own
    raise LookupError(f"no eager attention beside {type(module).__name__}")


ATTENTION = "factscope"
"""The name under which transformers finds it. Its masks are the eager ones: an unregistered name would get no mask at
all, and silently lose causality."""
ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, eager_mask)


@contextmanager
def plan_set(plan: Plan) -> Iterator[None]:
    """A plan for forwards of a model that has no dispatcher yet: its attention alone follows it."""
    token = _ACTIVE.set(_Active(0, plan, {}))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def shortened(value: Any, made_for: int, length: int) -> Any:
    """Masks and positions made for so many positions, for the first ``length`` of them."""
    if isinstance(value, tuple):
        return tuple(shortened(part, made_for, length) for part in value)
    if not isinstance(value, Tensor) or made_for not in value.shape:
        return value
    if value.dim() == 4 and value.shape[-1] == made_for:  # an attention mask
        return value[..., :length, :length]
    if value.dim() >= 2 and value.shape[1] == made_for:  # position ids, rotations
        return value[:, :length]
    return value[:length] if value.shape[0] == made_for else value


def placed(value: Any, made_for: int, places: Int[Tensor, " token"]) -> Any:
    """Positions made for so many positions, for tokens that stand at ``places``; masks stay, since none is asked."""
    if isinstance(value, tuple):
        return tuple(placed(part, made_for, places) for part in value)
    if not isinstance(value, Tensor) or made_for not in value.shape or value.dim() == 4:
        return value
    if value.dim() >= 2 and value.shape[1] == made_for:  # position ids, rotations
        return value[:, places]
    return value[places] if value.shape[0] == made_for else value


def _states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a module."""
    return args[0] if args else kwargs["hidden_states"]


def _with_states(args: tuple[Any, ...], kwargs: dict[str, Any], states: Tensor) -> tuple[Any, Any]:
    """The arguments with other hidden states."""
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})


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

"""Find a model's parts by one probe forward; nothing else in the project knows a module path.

There is no table of architectures. One ordinary forward on random tokens, watched by temporary hooks, tells which
module list holds the blocks, which module receives the attention mask, and in which order the linear maps run. Where
an update is read ("attention output", "MLP output") is found by numbers: the pair of module outputs that adds up to
what the block added to the residual stream. Post-norm families are read after the norm, blocks that scale their
updates get the measured multiplier, and where no pair fits the model has no additive split, which is a missing
capability with a reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from factscope.errors import ModelUnsupported
from factscope.models.dispatch import Wiring, first

PROBE_LENGTH = 10
_FIT = 1e-4


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """What discovery found.

    Attributes:
        wiring: the modules that the dispatcher hooks.
        paths: dotted module names per layer, for people: ``attention``, ``output_projection``, ``down_projection``.
        n_heads: attention heads per layer.
        parallel: per layer, whether the MLP cannot see the attention update of its own block.
        additive: per layer, whether attention update + MLP update = what the block adds.
        experts: per layer, whether the MLP is a mixture of experts.
    """

    wiring: Wiring
    paths: tuple[dict[str, str], ...]
    n_heads: int
    parallel: tuple[bool, ...]
    additive: tuple[bool, ...]
    experts: tuple[bool, ...]


def probe_ids(vocabulary: int, length: int = PROBE_LENGTH, seed: int = 0) -> Tensor:
    """Random token ids [1, length], the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (1, length), generator=generator)


def discover(model: Any, device: torch.device) -> Parts:
    """Find blocks, attention, updates and down-projections of a causal language model.

    Raises:
        ModelUnsupported: the model has no list of blocks, or its forward cannot run on plain token ids.
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    layers = _blocks(model, int(text.num_hidden_layers))
    ids = probe_ids(model.get_input_embeddings().num_embeddings).to(device)
    watch = _Watch(layers)
    with watch.hooked(), torch.no_grad():
        try:
            model(input_ids=ids, use_cache=False)
        except Exception as error:
            raise ModelUnsupported(
                f"the architecture {config.model_type!r} did not run on plain token ids "
                f"({type(error).__name__}: {error})",
                "choose a decoder-only causal language model",
            ) from error
    if not all(bool(torch.isfinite(states).all()) for states in watch.outputs.values()):
        raise ModelUnsupported(
            f"the weights of this {config.model_type!r} model give values that are not finite",
            "choose an undamaged checkpoint",
        )
    n_heads = int(getattr(text, "num_attention_heads", 0) or 0)
    found = [_layer_parts(layer, watch.calls[i], watch.inputs[i], watch.outputs[i]) for i, layer in enumerate(layers)]
    parallel = _parallel(model, ids, layers, found, watch.inputs)
    wiring = Wiring(
        layers=tuple(layers),
        layer_output_length=tuple(watch.output_lengths[i] for i in range(len(layers))),
        attention=tuple(part.attention for part in found),
        output_projection=tuple(part.output_projection for part in found),
        down_projection=tuple(part.down_projection for part in found),
        mlp=found[-1].mlp,
        embedding=model.get_input_embeddings(),
        head=model.get_output_embeddings(),
        updates=tuple(part.updates for part in found),
    )
    return Parts(
        wiring=wiring,
        paths=tuple(part.paths for part in found),
        n_heads=n_heads,
        parallel=parallel,
        additive=tuple(bool(part.updates) for part in found),
        experts=tuple(part.experts for part in found),
    )


def _blocks(model: nn.Module, count: int) -> list[nn.Module]:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise ModelUnsupported(
            f"the architecture {model.config.model_type!r} has no list of {count} blocks",  # type: ignore[union-attr]
            "choose a decoder-only causal language model",
        )
    return list(max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters())))


@dataclass(kw_only=True, eq=False)
class _Call:
    """One executed sub-module of a block, in order of completion."""

    name: str
    module: nn.Module
    takes_mask: bool
    returns_tuple: bool
    output: Tensor | None
    is_linear: bool


class _Watch:
    """Temporary hooks that record one forward; used before the model is shared."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self.layers = layers
        self.calls: dict[int, list[_Call]] = {i: [] for i in range(len(layers))}
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.output_lengths: dict[int, int] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        for i, layer in enumerate(self.layers):
            handles.append(layer.register_forward_pre_hook(self._before_layer(i), with_kwargs=True))
            handles.append(layer.register_forward_hook(self._after_layer(i)))
            for name, module in layer.named_modules():
                if name:
                    handles.append(module.register_forward_hook(self._after(i, name), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before_layer(self, i: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.inputs[i] = (args[0] if args else kwargs["hidden_states"]).clone()

        return hook

    def _after_layer(self, i: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.output_lengths[i] = len(output) if isinstance(output, tuple | list) else 0
            self.outputs[i] = first(output).clone()

        return hook

    def _after(self, i: int, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            value = first(output) if isinstance(output, tuple | list) and output else output
            self.calls[i].append(
                _Call(
                    name=name,
                    module=module,
                    takes_mask="attention_mask" in kwargs,
                    returns_tuple=isinstance(output, tuple),
                    output=value.clone() if isinstance(value, Tensor) else None,
                    is_linear=_is_linear(module),
                )
            )

        return hook


def _is_linear(module: nn.Module) -> bool:
    """A leaf that multiplies by a matrix: Linear and its subclasses, Conv1D, quantised stand-ins."""
    if any(True for _ in module.children()):
        return False
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) or (isinstance(weight, Tensor) and weight.dim() == 2)


@dataclass(kw_only=True, eq=False)
class _LayerParts:
    attention: nn.Module | None = None
    output_projection: nn.Module | None = None
    down_projection: nn.Module | None = None
    mlp: nn.Module | None = None
    updates: dict[str, tuple[nn.Module, float]] = field(default_factory=dict)
    experts: bool = False
    paths: dict[str, str] = field(default_factory=dict)


def _layer_parts(layer: nn.Module, calls: list[_Call], h_in: Tensor, h_out: Tensor) -> _LayerParts:
    parts = _LayerParts()
    width = h_in.shape[-1]
    masked = [call for call in calls if call.takes_mask and call.returns_tuple]
    inside = ""
    if masked:
        attention = max(masked, key=lambda call: call.name.count("."))
        parts.attention, inside = attention.module, attention.name
        parts.paths["attention"] = inside
    in_attention = [c for c in calls if inside and (c.name == inside or c.name.startswith(inside + "."))]
    outside = [c for c in calls if c not in in_attention]
    projections = [c for c in in_attention if c.is_linear and _width(c) == width]
    if projections:
        parts.output_projection = projections[-1].module
        parts.paths["output_projection"] = projections[-1].name
    parts.experts = any(
        p.dim() == 3 for name, p in layer.named_parameters() if not (inside and name.startswith(inside + "."))
    )
    downs = [c for c in outside if c.is_linear and _width(c) == width and not _surrounds(c.name, inside)]
    if downs and not parts.experts:
        parts.down_projection = downs[-1].module
        parts.paths["down_projection"] = downs[-1].name
        parts.mlp = _container(downs[-1], calls, h_in)
    parts.updates = _updates(calls, in_attention, h_in, h_out, parts)
    return parts


def _container(down: _Call, calls: list[_Call], h_in: Tensor) -> nn.Module | None:
    """The module around the down-projection that maps states to states."""
    parent = down.name.rpartition(".")[0]
    found = [c for c in calls if c.name == parent and c.output is not None and c.output.shape == h_in.shape]
    return found[0].module if parent and len(found) == 1 and not found[0].returns_tuple else None


def _surrounds(name: str, inside: str) -> bool:
    return bool(inside) and inside.startswith(name + ".")


def _width(call: _Call) -> int:
    return -1 if call.output is None or call.output.dim() < 2 else call.output.shape[-1]


def _updates(
    calls: list[_Call], in_attention: list[_Call], h_in: Tensor, h_out: Tensor, parts: _LayerParts
) -> dict[str, tuple[nn.Module, float]]:
    """The pair of module outputs that the block adds to the stream, with multipliers; empty where none fits."""
    added = h_out.double() - h_in.double()
    shape = added.shape
    eligible = [
        c for c in calls if c.output is not None and c.output.numel() == added.numel() and _width(c) == shape[-1]
    ]
    boundary = max((calls.index(c) for c in in_attention), default=-1)
    if boundary < 0:
        return {}
    firsts = [c for c in eligible if calls.index(c) <= boundary] + [c for c in eligible if calls.index(c) > boundary]
    attention_side = [c for c in firsts if c.module is parts.output_projection]
    attention_side += [c for c in firsts if c not in attention_side and not _before_attention(c, calls, in_attention)]
    mlp_side = [
        c for c in reversed(eligible) if c not in in_attention and not _before_attention(c, calls, in_attention)
    ]
    mlp_side.sort(key=lambda c: c.module is not parts.down_projection)
    attention_side, mlp_side = _distinct(attention_side), _distinct(mlp_side)
    tolerance = max(_FIT, 8 * float(torch.finfo(h_out.dtype).eps))
    scale = float(added.norm())
    scaled: tuple[float, dict[str, tuple[nn.Module, float]]] | None = None
    for a in attention_side:
        for m in mlp_side:
            if a is m:
                continue
            a_value, m_value = _flat(a, shape), _flat(m, shape)
            if float((added - a_value - m_value).norm()) <= tolerance * scale:
                return {"attention": (a.module, 1.0), "mlp": (m.module, 1.0)}
            basis = torch.stack([a_value.flatten(), m_value.flatten()], dim=1)
            solution = torch.linalg.lstsq(basis, added.flatten()[:, None]).solution[:, 0]
            residual = float((added.flatten() - basis @ solution).norm())
            if residual <= tolerance * scale and (scaled is None or residual < scaled[0]):
                weights = [float(w) for w in solution]
                scaled = residual, {"attention": (a.module, weights[0]), "mlp": (m.module, weights[1])}
    return {} if scaled is None else scaled[1]


def _before_attention(call: _Call, calls: list[_Call], in_attention: list[_Call]) -> bool:
    return (
        calls.index(call) < min(calls.index(c) for c in in_attention)
        and not call.is_linear
        and call.name.count(".") == 0
        and "norm" in type(call.module).__name__.lower()
    )


def _flat(call: _Call, shape: torch.Size) -> Tensor:
    assert call.output is not None
    return call.output.double().reshape(shape)


def _distinct(calls: list[_Call]) -> list[_Call]:
    """The first of the modules that give the same: which one is named must not hang on rounding.

    An attention module gives what its output projection gives; fits of the two tie, and a thread more decides.
    """
    kept: list[_Call] = []
    for call in calls:
        assert call.output is not None
        if not any(torch.equal(call.output.flatten(), cast(Tensor, other.output).flatten()) for other in kept):
            kept.append(call)
    return kept


def _parallel(
    model: nn.Module, ids: Tensor, layers: list[nn.Module], parts: list[_LayerParts], inputs: dict[int, Tensor]
) -> tuple[bool, ...]:
    """Per layer: does noise on the attention update leave the MLP update of the same block unchanged?

    Two forwards for all layers: every block is given its recorded input, so that noise in one does not reach the next.
    """
    seen: dict[int, list[Tensor]] = {i: [] for i, part in enumerate(parts) if part.updates}
    noisy_run = False

    def put_in(i: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            states = inputs[i].clone()
            return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

        return hook

    def noise(module: nn.Module, args: Any, output: Any) -> Any:
        if not noisy_run:
            return output
        value = first(output)
        generator = torch.Generator().manual_seed(1)
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value)
        noisy = value + drawn * value.float().std().to(value)
        return (noisy, *output[1:]) if isinstance(output, tuple) else noisy

    def record(i: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[i].append(first(output).clone())

        return hook

    hooks = []
    for i in seen:
        hooks.append(layers[i].register_forward_pre_hook(put_in(i), with_kwargs=True))
        hooks.append(parts[i].updates["attention"][0].register_forward_hook(noise))
        hooks.append(parts[i].updates["mlp"][0].register_forward_hook(record(i)))
    try:
        with torch.no_grad():
            for noisy_run in (False, True):  # noqa: B007  # the hooks read it
                model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    same = {i: torch.allclose(plain, noisy, rtol=1e-4, atol=1e-6) for i, (plain, noisy) in seen.items()}
    return tuple(bool(same.get(i, False)) for i in range(len(layers)))

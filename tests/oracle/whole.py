"""Interventions on any family as whole forwards of a copy: hooks for one forward, weights really edited, no caches.

One sequence at a time, from the first block to the logits, in float64. Nothing of factscope is used: where a family's
updates are added to the stream is written down here by hand, edges are cut by multiplying attention weights
(``brute_force``), and an edit of a weight changes the weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.oracle.brute_force import blocks, weights_multiplied
from tests.oracle.plain import Edge

Site = str
"""``output`` of a block (layer -1: the input of the first one), ``attention`` and ``mlp``: updates of the stream."""

_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_UPDATES: dict[str, tuple[str, str]] = {
    "gpt2": ("attn", "mlp"),
    "gptj": ("attn", "mlp"),
    "gpt_neo": ("attn", "mlp"),
    "gpt_neox": ("attention", "mlp"),
    "opt": ("self_attn", "fc2"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),  # the residual is added inside the modules around
    "falcon": ("self_attention", "mlp"),
    "gemma2": _POST_NORMS,
    "gemma3_text": _POST_NORMS,
    "olmo2": _POST_NORMS,
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm"),
    "mpt": ("attn", "ffn.down_proj"),
    "gpt_bigcode": ("attn", "mlp"),
    "codegen": ("attn", "mlp"),
}
"""Per model type, the modules of a block whose outputs are added to the stream; else ``self_attn`` and ``mlp``."""
_OUTPUT_PROJECTIONS: dict[str, str] = {
    "gpt2": "attn.c_proj",
    "gptj": "attn.out_proj",
    "gpt_neo": "attn.attention.out_proj",
    "gpt_neox": "attention.dense",
    "opt": "self_attn.out_proj",
    "bloom": "self_attention.dense",
    "falcon": "self_attention.dense",
    "phi": "self_attn.dense",
    "mpt": "attn.out_proj",
    "gpt_bigcode": "attn.c_proj",
    "codegen": "attn.out_proj",
}
_DOWN_PROJECTIONS: dict[str, str] = {
    "gpt2": "mlp.c_proj",
    "gptj": "mlp.fc_out",
    "gpt_neo": "mlp.c_proj",
    "gpt_neox": "mlp.dense_4h_to_h",
    "opt": "fc2",
    "bloom": "mlp.dense_4h_to_h",
    "falcon": "mlp.dense_4h_to_h",
    "phi": "mlp.fc2",
    "starcoder2": "mlp.c_proj",
    "mpt": "ffn.down_proj",
    "gpt_bigcode": "mlp.c_proj",
    "codegen": "mlp.fc_out",
}


@dataclass(frozen=True, kw_only=True)
class Put:
    """A vector that takes the place of what a site gives at one position."""

    layer: int
    site: Site
    position: int
    vector: Tensor


@dataclass(frozen=True, kw_only=True)
class Edited:
    """A change of the weight of a linear map, as [d_in, d_out], and of its bias.

    Attributes:
        place: ``output_projection`` of the attention or ``down_projection`` of the MLP.
    """

    layer: int
    place: str
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one forward gave.

    Attributes:
        logits: [position, vocabulary].
        states: the input of every block and, behind them, the last one's output, [position, d_model] each.
        updates: (site, layer) to what is added to the stream, [position, d_model].
    """

    logits: Tensor
    states: tuple[Tensor, ...]
    updates: Mapping[tuple[Site, int], Tensor] = field(default_factory=dict)


class Whole:
    """A copy of a model and its whole forwards.

    Args:
        wide: compute in float64 where the model's code says float32, too.
    """

    def __init__(self, model: PreTrainedModel, *, wide: bool = True) -> None:
        self.wide = wide
        own: Any = copy.deepcopy(model)
        own.config._experts_implementation = "eager"  # the grouped product knows no float64
        self._model = own.double() if wide else own
        self._blocks = blocks(own)
        kind = own.config.model_type
        self._names = dict(zip(("attention", "mlp"), _UPDATES.get(kind, ("self_attn", "mlp")), strict=True))
        self._places = {
            "output_projection": _OUTPUT_PROJECTIONS.get(kind, "self_attn.o_proj"),
            "down_projection": _DOWN_PROJECTIONS.get(kind, "mlp.down_proj"),
        }
        self._multiplier = float(getattr(own.config, "residual_multiplier", 1.0))
        self._additive = kind != "mamba" and getattr(own.config, "do_layer_norm_before", True)

    @property
    def width(self) -> int:
        """Of the stream."""
        config: Any = self._model.config
        return int(config.get_text_config().hidden_size)

    def shape(self, place: str, layer: int) -> tuple[int, int]:
        """Inputs and outputs of a linear map."""
        module = self._blocks[layer].get_submodule(self._places[place])
        rows, columns = getattr(module, "weight").shape  # noqa: B009  # a submodule may be anything
        return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)

    def run(
        self,
        ids: Sequence[int],
        *,
        cuts: Collection[Edge] = (),
        puts: Sequence[Put] = (),
        edited: Sequence[Edited] = (),
        embed: Callable[[Tensor], Tensor] | None = None,
        record: bool = False,
    ) -> Seen:
        """One forward.

        Args:
            puts: in order; a later one at the same place stands.
            embed: changes the output of the embedding module, [position, width].
            record: whether states and updates are kept.
        """
        states: dict[int, Tensor] = {}
        updates: dict[tuple[Site, int], Tensor] = {}
        with ExitStack() as stack:
            for edit in edited:
                stack.enter_context(self._with(edit))
            for handle in self._hooks(puts, embed, states if record else None, updates):
                stack.callback(handle.remove)
            if cuts:
                stack.enter_context(self._cut(cuts, len(ids)))
            if self.wide:
                stack.enter_context(_wide())
            with torch.no_grad():
                logits = self._model(torch.tensor([list(ids)]), use_cache=False).logits[0]
        n = len(self._blocks)
        return Seen(
            logits=logits, states=tuple(states[layer] for layer in range(n + 1)) if record else (), updates=updates
        )

    def _hooks(
        self,
        puts: Sequence[Put],
        embed: Callable[[Tensor], Tensor] | None,
        states: dict[int, Tensor] | None,
        updates: dict[tuple[Site, int], Tensor],
    ) -> Iterator[Any]:
        if embed is not None:
            embedding: Any = self._model.get_input_embeddings()
            yield embedding.register_forward_hook(lambda module, args, output: embed(output[0])[None])
        last = len(self._blocks) - 1

        def entering(layer: int) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                hidden = _put(args[0] if args else kwargs["hidden_states"], puts, "output", layer - 1)
                if states is not None:
                    states[layer] = hidden[0].clone()
                return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

            return hook

        def leaving(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = _put(output[0] if isinstance(output, tuple) else output, puts, "output", last)
            if states is not None:
                states[last + 1] = hidden[0].clone()
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        def adding(layer: int, site: Site) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, output: Any) -> Any:
                given = output[0] if isinstance(output, tuple) else output
                update = _put(given.reshape(1, -1, given.shape[-1]) * self._multiplier, puts, site, layer)
                if states is not None:
                    updates[site, layer] = update[0].clone()
                changed = (update / self._multiplier).reshape(given.shape)
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            return hook

        for layer, block in enumerate(self._blocks):
            yield block.register_forward_pre_hook(entering(layer), with_kwargs=True)
            if self._additive:
                for site, name in self._names.items():
                    yield block.get_submodule(name).register_forward_hook(adding(layer, site))
        yield self._blocks[last].register_forward_hook(leaving)

    def write(self, edited: Sequence[Edited]) -> PreTrainedModel:
        """The copy itself, with these edits written into its weights for good."""
        for edit in edited:
            self._write(edit)
        return self._model

    def _write(self, edit: Edited) -> None:
        module: Any = self._blocks[edit.layer].get_submodule(self._places[edit.place])
        weight, bias = module.weight, module.bias
        changed = weight.double() + (edit.weight.T if isinstance(module, nn.Linear) else edit.weight)
        module.weight = nn.Parameter(changed.to(weight.dtype), requires_grad=False)
        if edit.bias is not None:
            moved = edit.bias.double() + (0 if bias is None else bias.double())
            module.bias = nn.Parameter(moved.to(weight.dtype), requires_grad=False)

    @contextmanager
    def _with(self, edit: Edited) -> Iterator[None]:
        module: Any = self._blocks[edit.layer].get_submodule(self._places[edit.place])
        weight, bias = module.weight, module.bias
        self._write(edit)
        try:
            yield
        finally:
            module.weight, module.bias = weight, bias

    @contextmanager
    def _cut(self, cuts: Collection[Edge], length: int) -> Iterator[None]:
        n_heads = int(self._model.config.get_text_config().num_attention_heads)
        keep = torch.ones(len(self._blocks), 1, n_heads, length, length, dtype=torch.bool)
        for layer, head, query, key in cuts:
            keep[layer, 0, slice(None) if head is None else head, query, key] = False
        with weights_multiplied(self._model, keep, pytest.MonkeyPatch) as calls:
            yield
        assert calls == dict.fromkeys(range(len(self._blocks)), 1), f"attention weights were seen {calls}"


def _put(hidden: Tensor, puts: Sequence[Put], site: Site, layer: int) -> Tensor:
    wanted = [put for put in puts if put.site == site and put.layer == layer]
    if not wanted:
        return hidden
    changed = hidden.clone()
    for put in wanted:
        changed[0, put.position] = put.vector.to(changed.dtype)
    return changed


@contextmanager
def _wide() -> Iterator[None]:
    """Norms, rotations and routers that are written in float32 stay in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(Tensor, "float", Tensor.double)
        yield

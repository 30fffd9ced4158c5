"""GPT-2 in plain tensor algebra, float64, from its state dict alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from tests.oracle.plain import Change, Edge, Embed, Puts, State, Trace, attend, open_edges, put, unchanged


def run(
    state: State,
    ids: Sequence[int],
    forbidden: Collection[Edge] = (),
    *,
    n_heads: int,
    eps: float = 1e-5,
    embed: Embed = lambda words: words,
    puts: Puts = MappingProxyType({}),
    change: Change = unchanged,
    even: Collection[int] = (),
) -> Trace:
    """One forward; ``state`` is the float64 state dict of GPT2LMHeadModel."""
    length = len(ids)
    n_layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("transformer.h."))
    x = embed(state["transformer.wte.weight"][list(ids)]) + state["transformer.wpe.weight"][:length]
    embedding, blocks, attentions, mlps = x, [], [], []
    for layer in range(n_layers):
        at = f"transformer.h.{layer}."
        fused = _affine(state, at + "attn.c_attn", layer_norm(state, at + "ln_1", x, eps))
        q, k, v = (part.reshape(length, n_heads, -1).transpose(0, 1) for part in fused.chunk(3, dim=-1))
        q = q * (layer not in even)  # where it is, every open edge weighs the same
        mixed = attend(q, k, v, open_edges(length, n_heads, layer, forbidden))
        attention = put(change("attention", layer, _affine(state, at + "attn.c_proj", mixed)), puts, "attention", layer)
        x = x + attention
        inner = gelu(_affine(state, at + "mlp.c_fc", layer_norm(state, at + "ln_2", x, eps)))
        mlp = put(change("mlp", layer, _affine(state, at + "mlp.c_proj", inner)), puts, "mlp", layer)
        x = put(x + mlp, puts, "output", layer)
        blocks.append(x)
        attentions.append(attention)
        mlps.append(mlp)
    return Trace(
        logits=normed(state, x, eps=eps),
        embedding=embedding,
        blocks=torch.stack(blocks),
        attention=torch.stack(attentions),
        mlp=torch.stack(mlps),
    )


def normed(state: State, x: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Logits of a state through the final norm and the head."""
    return raw(state, layer_norm(state, "transformer.ln_f", x, eps))


def raw(state: State, x: Tensor) -> Tensor:
    """``E h``."""
    return x @ state["lm_head.weight"].T


def layer_norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = (centred * centred).mean(dim=-1, keepdim=True)
    return centred / torch.sqrt(variance + eps) * state[name + ".weight"] + state[name + ".bias"]


def gelu(x: Tensor) -> Tensor:
    """The tanh form."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _affine(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[name + ".weight"] + state[name + ".bias"]  # Conv1D keeps (in, out)

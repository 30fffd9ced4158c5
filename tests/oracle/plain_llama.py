"""Llama in plain tensor algebra, float64, from its state dict: RMS norm, rotary positions, grouped heads, SwiGLU."""

from __future__ import annotations

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
    n_groups: int,
    eps: float = 1e-6,
    theta: float = 10000.0,
    embed: Embed = lambda words: words,
    puts: Puts = MappingProxyType({}),
    change: Change = unchanged,
    even: Collection[int] = (),
) -> Trace:
    """One forward; ``state`` is the float64 state dict of LlamaForCausalLM, ``n_groups`` its key-value heads."""
    length = len(ids)
    n_layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("model.layers."))
    x = embed(state["model.embed_tokens.weight"][list(ids)])
    embedding, blocks, attentions, mlps = x, [], [], []
    for layer in range(n_layers):
        at = f"model.layers.{layer}."
        read = rms_norm(state, at + "input_layernorm", x, eps)
        q = rotate(_heads(read @ state[at + "self_attn.q_proj.weight"].T, n_heads), theta)
        k = rotate(_heads(read @ state[at + "self_attn.k_proj.weight"].T, n_groups), theta)
        v = _heads(read @ state[at + "self_attn.v_proj.weight"].T, n_groups)
        group = [head * n_groups // n_heads for head in range(n_heads)]
        q = q * (layer not in even)  # where it is, every open edge weighs the same
        mixed = attend(q, k[group], v[group], open_edges(length, n_heads, layer, forbidden))
        attention = put(
            change("attention", layer, mixed @ state[at + "self_attn.o_proj.weight"].T), puts, "attention", layer
        )
        x = x + attention
        read = rms_norm(state, at + "post_attention_layernorm", x, eps)
        gate = read @ state[at + "mlp.gate_proj.weight"].T
        up = read @ state[at + "mlp.up_proj.weight"].T
        mlp = put(
            change("mlp", layer, (gate * torch.sigmoid(gate) * up) @ state[at + "mlp.down_proj.weight"].T),
            puts,
            "mlp",
            layer,
        )
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


def normed(state: State, x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Logits of a state through the final norm and the head."""
    return raw(state, rms_norm(state, "model.norm", x, eps))


def raw(state: State, x: Tensor) -> Tensor:
    """``E h``."""
    return x @ state["lm_head.weight"].T


def rms_norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * state[name + ".weight"]


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary positions: coordinate i of the first half turns with coordinate i of the second."""
    size = x.shape[-1]
    frequency = theta ** (-torch.arange(0, size, 2).double() / size)
    angle = torch.arange(x.shape[-2]).double()[:, None] * frequency
    left, right = x[..., : size // 2], x[..., size // 2 :]
    return torch.cat([left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], dim=-1)


def _heads(x: Tensor, count: int) -> Tensor:
    return x.reshape(x.shape[0], count, -1).transpose(0, 1)

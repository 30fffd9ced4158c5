"""Heads in plain tensor algebra, float64, from a state dict: every sum written out, head by head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracle import plain_gpt2, plain_llama
from tests.oracle.laboratory import Subject
from tests.oracle.plain import State, Trace


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """One layer's attention at the last position.

    Attributes:
        weights: [head, source].
        handed: [head, source, d_model], what a source hands over if it is all that is read, ``x_s W_V W_O``.
        bias: of the output.
        maps: [head, d_model, d_model], ``W_V W_O`` without any bias.
        read: [position, d_model], what the attention reads.
    """

    weights: Tensor
    handed: Tensor
    bias: Tensor
    maps: Tensor
    read: Tensor

    @property
    def terms(self) -> Tensor:
        """[head, source, d_model], ``A[t, s] x_s W_V W_O`` with value biases."""
        return self.weights[..., None] * self.handed


@dataclass(frozen=True, kw_only=True, eq=False)
class Heads:
    """All layers, and the last step to the logits with the final norm's scale held."""

    layers: list[Layer]
    trace: Trace
    state: State
    gpt2: bool

    @property
    def embedding(self) -> Tensor:
        return self.state["transformer.wte.weight" if self.gpt2 else "model.embed_tokens.weight"]

    def logits_of(self, part: Tensor) -> Tensor:
        """What a part of the last state adds to all logits, the final norm's scale being that of the whole state."""
        whole = self.trace.blocks[-1, -1]
        if self.gpt2:
            spread = torch.sqrt(((whole - whole.mean()) ** 2).mean() + 1e-5)
            gain = self.state["transformer.ln_f.weight"]
            normed = (part - part.mean(dim=-1, keepdim=True)) / spread * gain
        else:
            normed = part / torch.sqrt((whole**2).mean() + 1e-6) * self.state["model.norm.weight"]
        return normed @ self.state["lm_head.weight"].T

    def constant(self) -> Tensor:
        """What the final norm's shift adds to all logits."""
        shift = self.state["transformer.ln_f.bias"] if self.gpt2 else torch.zeros(self.embedding.shape[1]).double()
        return self.state["lm_head.weight"] @ shift

    def mapping(self, layer: int, head: int, vector: Tensor) -> Tensor:
        """``vector W_V W_O E^T``."""
        return (vector @ self.layers[layer].maps[head]) @ self.state["lm_head.weight"].T


def heads(subject: Subject, ids: Sequence[int]) -> Heads:
    """Every head of every layer on one sequence."""
    trace = subject.trace(ids)
    entering = [trace.embedding, *trace.blocks[:-1]]
    gpt2 = subject.plain is plain_gpt2
    layers = [layer_on(subject, layer, entering[layer]) for layer in range(subject.n_layers)]
    return Heads(layers=layers, trace=trace, state=subject.state, gpt2=gpt2)


def layer_on(subject: Subject, layer: int, x: Tensor) -> Layer:
    """One layer's attention on any states."""
    return (_gpt2_layer if subject.plain is plain_gpt2 else _llama_layer)(subject, layer, x)


def mlp_on(subject: Subject, layer: int, x: Tensor) -> Tensor:
    """What one layer's MLP adds to states that its attention has been added to."""
    state = subject.state
    if subject.plain is plain_gpt2:
        at = f"transformer.h.{layer}."
        read = plain_gpt2.layer_norm(state, at + "ln_2", x, 1e-5)
        inner = plain_gpt2.gelu(read @ state[at + "mlp.c_fc.weight"] + state[at + "mlp.c_fc.bias"])
        return inner @ state[at + "mlp.c_proj.weight"] + state[at + "mlp.c_proj.bias"]
    at = f"model.layers.{layer}."
    eps = subject.model.config.rms_norm_eps
    read = plain_llama.rms_norm(state, at + "post_attention_layernorm", x, eps)
    gate, up = (read @ state[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return (gate * torch.sigmoid(gate) * up) @ state[at + "mlp.down_proj.weight"].T


def _gpt2_layer(subject: Subject, layer: int, x: Tensor) -> Layer:
    state, at, width = subject.state, f"transformer.h.{layer}.", x.shape[1]
    size = width // subject.n_heads
    read = plain_gpt2.layer_norm(state, at + "ln_1", x, 1e-5)
    fused, fused_bias = state[at + "attn.c_attn.weight"], state[at + "attn.c_attn.bias"]
    out = state[at + "attn.c_proj.weight"]
    weights, handed, maps = [], [], []
    for head in range(subject.n_heads):
        own = slice(head * size, (head + 1) * size)
        q, k, v = (read @ fused[:, part * width :][:, own] + fused_bias[part * width :][own] for part in range(3))
        weights.append((q[-1] @ k.T / size**0.5).softmax(dim=-1))
        handed.append(v @ out[own])
        maps.append(fused[:, 2 * width :][:, own] @ out[own])
    return Layer(
        weights=torch.stack(weights),
        handed=torch.stack(handed),
        bias=state[at + "attn.c_proj.bias"],
        maps=torch.stack(maps),
        read=read,
    )


def _llama_layer(subject: Subject, layer: int, x: Tensor) -> Layer:
    state, at, config = subject.state, f"model.layers.{layer}.", subject.model.config
    read = plain_llama.rms_norm(state, at + "input_layernorm", x, config.rms_norm_eps)
    query, key, value, out = (state[f"{at}self_attn.{name}_proj.weight"] for name in "qkvo")
    size, shared = query.shape[0] // subject.n_heads, subject.n_heads // config.num_key_value_heads
    weights, handed, maps = [], [], []
    for head in range(subject.n_heads):
        own, group = slice(head * size, (head + 1) * size), head // shared
        theirs = slice(group * size, (group + 1) * size)
        q = plain_llama.rotate(read @ query[own].T, 10000.0)
        k = plain_llama.rotate(read @ key[theirs].T, 10000.0)
        weights.append((q[-1] @ k.T / size**0.5).softmax(dim=-1))
        handed.append(read @ value[theirs].T @ out[:, own].T)
        maps.append(value[theirs].T @ out[:, own].T)
    return Layer(
        weights=torch.stack(weights),
        handed=torch.stack(handed),
        bias=torch.zeros(x.shape[1]).double(),
        maps=torch.stack(maps),
        read=read,
    )

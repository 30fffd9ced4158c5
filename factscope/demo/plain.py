"""GPT-2 written out: a forward pass in which each layer has its own attention mask, without hooks.

The measurements of the bundled model use this and not FactScope's engine, so that each checks the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import GPT2LMHeadModel


@dataclass(frozen=True, eq=False, kw_only=True)
class Pass:
    """What one forward pass gives.

    Attributes:
        logits: of the next token after the last position.
        blocks: the output of every block.
    """

    logits: Float[Tensor, "batch vocabulary"]
    blocks: list[Float[Tensor, "batch position width"]]


def forward(
    model: GPT2LMHeadModel,
    ids: Int[Tensor, "batch position"],
    cut: Bool[Tensor, "layer batch target source"] | None = None,
) -> Pass:
    """Runs the model; where ``cut`` is true, a target may not attend to a source in that layer.

    The remaining weights renormalise, since the cut is made before the softmax. The caller leaves every target at
    least one source.
    """
    body = model.transformer
    batch, length = ids.shape
    heads = model.config.n_head
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    state = body.wte(ids) + body.wpe(torch.arange(length))
    blocks = []
    layers: Any = body.h
    for layer, block in enumerate(layers):
        forbidden = future if cut is None else future | cut[layer].unsqueeze(1)
        mixed = block.attn.c_attn(block.ln_1(state))
        query, key, value = (
            part.view(batch, length, heads, -1).transpose(1, 2) for part in mixed.split(model.config.n_embd, dim=-1)
        )
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        weights = torch.softmax(scores.masked_fill(forbidden, float("-inf")), dim=-1)
        state = state + block.attn.c_proj((weights @ value).transpose(1, 2).reshape(batch, length, -1))
        hidden = functional.gelu(block.mlp.c_fc(block.ln_2(state)), approximate="tanh")
        state = state + block.mlp.c_proj(hidden)
        blocks.append(state)
    return Pass(logits=head(model, state[:, -1]), blocks=blocks)


def head(model: GPT2LMHeadModel, state: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch vocabulary"]:
    """The model's own final norm and unembedding."""
    return model.transformer.ln_f(state) @ model.transformer.wte.weight.T

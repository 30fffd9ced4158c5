"""What the plain computations share: their result, the attention step with forbidden edges, cells and their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Edge = tuple[int, int | None, int, int]
"""(layer, head or None for all heads, query, key): the query may not attend to the key."""

State = Mapping[str, Tensor]

Embed = Callable[[Tensor], Tensor]
"""A change of the token embeddings, before positions are added."""
Puts = Mapping[tuple[str, int, int], Tensor]
"""(site, layer, position) to the vector that takes the place of a block's ``output``, or of the update of its
``attention`` or ``mlp``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """One forward of one sequence, everything in float64.

    Attributes:
        logits: [position, vocabulary].
        embedding: what enters the first block, [position, d_model].
        blocks: output of every block, [layer, position, d_model].
        attention, mlp: what each sublayer adds to the residual stream, [layer, position, d_model].
    """

    logits: Tensor
    embedding: Tensor
    blocks: Tensor
    attention: Tensor
    mlp: Tensor


Change = Callable[[str, int, Tensor], Tensor]
"""(site "attention" or "mlp", layer, update [position, d_model]) to what is added to the stream instead."""

Plain = Callable[[Sequence[int], Collection[Edge]], Trace]


def put(given: Tensor, puts: Puts, site: str, layer: int) -> Tensor:
    """What a site gives, [position, d_model], with the vectors put in."""
    changed = given.clone()
    for (where, at, position), vector in puts.items():
        if (where, at) == (site, layer):
            changed[position] = vector
    return changed


def float64(state: State) -> dict[str, Tensor]:
    return {name: tensor.detach().double() for name, tensor in state.items()}


def open_edges(length: int, n_heads: int, layer: int, forbidden: Iterable[Edge]) -> Tensor:
    """[head, query, key], True where the head may look: the past and itself, less what is forbidden."""
    allowed = torch.ones(n_heads, length, length, dtype=torch.bool).tril()
    for at, head, query, key in forbidden:
        if at == layer:
            allowed[slice(None) if head is None else head, query, key] = False
    return allowed


def attend(queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
    """Softmax attention over the open edges alone: from [head, position, size] to [position, head * size]."""
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    highest = scores.masked_fill(~allowed, -torch.inf).amax(dim=-1, keepdim=True)
    weights = torch.where(allowed, (scores - highest).exp(), 0.0)
    mixed = (weights / weights.sum(dim=-1, keepdim=True)) @ values
    return mixed.transpose(0, 1).reshape(queries.shape[1], -1)


def unchanged(site: str, layer: int, update: Tensor) -> Tensor:
    return update


def layers_of_window(center: int, size: int, n_layers: int) -> list[int]:
    """recall.md section 1, written out: ``size`` layers, one more below the centre than above if that is even."""
    below, above = size // 2, math.ceil(size / 2)
    return [layer for layer in range(center - below, center + above) if 0 <= layer < n_layers]


def edges(
    layers: Iterable[int], queries: Iterable[int], keys: Sequence[int], heads: Iterable[int] | None = None
) -> set[Edge]:
    chosen: list[int | None] = [None] if heads is None else list(heads)
    return {(layer, head, q, k) for layer in layers for head in chosen for q in queries for k in keys if k <= q}


def log_probability(trace: Trace, prompt_length: int, answer: Sequence[int]) -> Tensor:
    """Of the whole answer, teacher-forced; the trace ran on the prompt and the answer without its last token."""
    log_p = trace.logits.log_softmax(dim=-1)
    return sum((log_p[prompt_length - 1 + i, token] for i, token in enumerate(answer)), torch.zeros(()).double())


def log_odds(trace: Trace, prompt_length: int, answer: Sequence[int]) -> float:
    """``log p - log(1 - p)`` in float64; where one token is scored, 1 - p is summed from the other tokens."""
    if len(answer) > 1:
        value = log_probability(trace, prompt_length, answer)
        return float(value - torch.log(-torch.expm1(value)))
    row = trace.logits[prompt_length - 1]
    others = torch.cat([row[: answer[0]], row[answer[0] + 1 :]])
    return float(row[answer[0]] - others.logsumexp(dim=0))

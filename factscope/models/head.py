"""From final states to numbers about tokens, without keeping a row of logits for every state.

The output embedding has tens of thousands of rows, and most experiments want one number of them: how probable is the
answer? So states are projected to a stretch of the vocabulary at a time, and only running sums are kept: the matrix
product stays in the processor's cache, and memory does not grow with the vocabulary. What follows the output embedding
(a scale) is measured on load; where it is more than a scale (a soft-cap), or the output embedding is no plain matrix,
the model's own forward gives whole logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from factscope import measures
from factscope.models.dispatch import Plan

if TYPE_CHECKING:
    from factscope.models.handle import ModelHandle

STRETCH = 4096
"""Tokens of the vocabulary that are projected to at once."""
ROWS = 512
"""States that are projected at once."""
WHOLE_ROWS = 64
"""States whose whole logits are held at once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """The output embedding as a matrix, and the scale that the model puts on its logits."""

    weight: Float[Tensor, "vocabulary d_model"]
    bias: Float[Tensor, " vocabulary"] | None
    multiplier: float

    def stretches(
        self, normed: Float[Tensor, "row d_model"], first: Sequence[int] = (), *, reuse: bool = False
    ) -> Iterator[tuple[int, Float[Tensor, "row token"]]]:
        """First token and logits, stretch by stretch, those with the tokens ``first`` before the others.

        The logits may be written over. With ``reuse`` the next stretch takes the memory of the one before: fresh memory
        has to be cleared by the system first, which takes as long as a fifth of the product.
        """
        early = {token // STRETCH for token in first}
        buffer = normed.new_empty(normed.shape[0], STRETCH) if reuse else None
        for begin in sorted(range(0, self.weight.shape[0], STRETCH), key=lambda b: (b // STRETCH not in early, b)):
            weight = self.weight[begin : begin + STRETCH]
            full = buffer is not None and weight.shape[0] == STRETCH
            logits = torch.mm(normed, weight.t(), out=buffer) if full else normed @ weight.t()
            if self.bias is not None:
                logits += self.bias[begin : begin + STRETCH]
            logits = measures.at_least_float32(logits)
            yield begin, logits if self.multiplier == 1.0 else logits.mul_(self.multiplier)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What rows of logits say about the scored tokens, one token at each read-out position.

    Attributes:
        logit: of the scored token.
        others: log of the sum of the exponentials of all other tokens' logits.
    """

    logit: Float[Tensor, "*batch readout"]
    others: Float[Tensor, "*batch readout"]

    @property
    def log_probability(self) -> Float[Tensor, "*batch"]:
        """In nats, float64, summed over the read-out positions (teacher forcing)."""
        return -functional.softplus(self.others.double() - self.logit.double()).sum(dim=-1)

    @property
    def log_odds(self) -> Float[Tensor, "*batch"]:
        """``log p - log(1 - p)`` in nats, float64; exact also where float32 cannot hold 1 - p."""
        if self.logit.shape[-1] == 1:
            return (self.logit.double() - self.others.double())[..., 0]
        return measures.log_odds_of_log_probability(self.log_probability)


def scores_of_logits(logits: Float[Tensor, "*batch readout vocabulary"], ids: Sequence[int]) -> Scores:
    """Scores from whole logits, token ``ids[i]`` at read-out position i."""
    logits = measures.at_least_float32(logits)
    index = torch.tensor(list(ids), device=logits.device).expand(logits.shape[:-1])[..., None]
    others = logits.scatter(-1, index, -torch.inf)
    return Scores(logit=logits.gather(-1, index)[..., 0], others=torch.logsumexp(others, dim=-1))


def scores_of_states(model: ModelHandle, states: Float[Tensor, "row readout d_model"], ids: Sequence[int]) -> Scores:
    """Scores from final states (outputs of the last block), token ``ids[i]`` at read-out position i.

    Raises:
        CapabilityError: the model takes no states in.
    """
    parts = []
    size = WHOLE_ROWS if model.head is None else max(1, ROWS // len(ids))
    for begin in range(0, states.shape[0], size):
        chunk = states[begin : begin + size]
        if model.head is None:
            parts.append(scores_of_logits(model.logits(chunk), ids))
        else:
            parts.append(_scores(model.head, model.normed(chunk), ids))
    return Scores(logit=torch.cat([p.logit for p in parts]), others=torch.cat([p.others for p in parts]))


def _scores(head: Head, normed: Float[Tensor, "row readout d_model"], ids: Sequence[int]) -> Scores:
    rows, n_readout = normed.shape[:2]
    flat = normed.reshape(rows * n_readout, -1)
    chosen = torch.empty(rows, n_readout, dtype=torch.float32, device=flat.device)
    tops, sums = [], []
    for begin, logits in head.stretches(flat, reuse=True):
        by_position = logits.view(rows, n_readout, -1)
        if chosen.dtype != logits.dtype:
            chosen = chosen.to(logits.dtype)
        for i, token in enumerate(ids):
            if begin <= token < begin + logits.shape[1]:
                chosen[:, i] = by_position[:, i, token - begin]
                by_position[:, i, token - begin] = -torch.inf
        lowest = torch.finfo(logits.dtype).min  # of a stretch that held scored tokens only, nothing is left
        top = logits.amax(dim=-1, keepdim=True).clamp_(min=lowest)
        tops.append(top[:, 0])
        sums.append(logits.sub_(top).exp_().sum(dim=-1))
    others = torch.logsumexp(torch.stack(tops) + torch.stack(sums).log(), dim=0)
    return Scores(logit=chosen, others=others.view(rows, n_readout))


@dataclass(frozen=True, kw_only=True, eq=False)
class Distribution:
    """What states say about the whole vocabulary.

    Attributes:
        top_ids, top_probability: the most probable tokens, in order.
        rank, probability: of the tokens asked for; ranks from 1.
        entropy: in nats.
    """

    top_ids: Int[Tensor, "row k"]
    top_probability: Float[Tensor, "row k"]
    rank: Int[Tensor, "row token"]
    probability: Float[Tensor, "row token"]
    entropy: Float[Tensor, " row"]


def distribution_of_logits(logits: Float[Tensor, "row vocabulary"], tokens: Sequence[int], top_k: int) -> Distribution:
    """From whole logits."""
    log_p = measures.log_probabilities(logits)
    values, top_ids = log_p.topk(top_k, dim=-1)
    return Distribution(
        top_ids=top_ids,
        top_probability=values.exp(),
        rank=torch.stack([measures.rank(logits, token) for token in tokens], dim=-1),
        probability=log_p[:, list(tokens)].exp(),
        entropy=-(log_p.exp() * log_p).sum(dim=-1),
    )


def distribution_of_states(
    model: ModelHandle,
    states: Float[Tensor, "row d_model"],
    tokens: Sequence[int],
    top_k: int,
    *,
    raw: bool = False,
) -> Distribution:
    """From states put in as the output of the last block; raw: through the output embedding alone.

    Raises:
        CapabilityError: raw, and the states are not as wide as the output embedding.
    """
    head = model.head if top_k <= STRETCH // 8 else None
    parts = []
    for rows in states.split(WHOLE_ROWS if head is None else ROWS):
        if head is None:
            logits = model.unembed(rows) if raw else model.logits(rows[:, None])[:, 0]
            parts.append(distribution_of_logits(logits, tokens, top_k))
        elif raw:
            model.require_square_head(rows.shape[-1])
            parts.append(_distribution(replace(head, bias=None, multiplier=1.0), rows, tokens, top_k))
        else:
            parts.append(_distribution(head, model.normed(rows[:, None])[:, 0], tokens, top_k))
    fields_ = [field.name for field in fields(Distribution)]
    return Distribution(**{name: torch.cat([getattr(part, name) for part in parts]) for name in fields_})


def _distribution(head: Head, normed: Float[Tensor, "row d_model"], tokens: Sequence[int], top_k: int) -> Distribution:
    """Tokens asked for are ranked against the same product that they come from: their stretches come first."""
    found: dict[int, Tensor] = {}
    waiting: list[tuple[int, Tensor]] = []
    stretches = head.stretches(normed, tokens)
    while len(found) < len(set(tokens)):
        begin, logits = next(stretches)
        found |= {t: logits[:, t - begin].clone() for t in tokens if begin <= t < begin + logits.shape[1]}
        waiting.append((begin, logits))
    asked = torch.stack([found[t] for t in tokens], dim=-1)
    rank = torch.ones(asked.shape, dtype=torch.int64, device=asked.device)
    best: list[Tensor] = []
    best_ids: list[Tensor] = []
    tops, sums, products = [], [], []
    for begin, logits in chain(waiting, stretches):
        for i in range(len(tokens)):
            rank[:, i] += (logits > asked[:, i, None]).sum(dim=-1)
        values, ids = logits.topk(min(top_k, logits.shape[1]), dim=-1)
        best.append(values)
        best_ids.append(ids + begin)
        tops.append(values[:, 0])
        shifted = logits.sub_(values[:, :1])
        weights = shifted.exp()
        sums.append(weights.sum(dim=-1))
        products.append(weights.mul_(shifted.clamp_(min=-1e4)).sum(dim=-1))
    top = torch.stack(tops)
    highest = top.amax(dim=0)
    scale = (top - highest).exp()
    total = (torch.stack(sums) * scale).sum(dim=0)
    log_total = highest + total.log()
    product = ((torch.stack(products) + torch.stack(sums) * (top - highest)) * scale).sum(dim=0)
    values, places = torch.cat(best, dim=-1).topk(top_k, dim=-1)
    return Distribution(
        top_ids=torch.cat(best_ids, dim=-1).gather(-1, places),
        top_probability=(values - log_total[:, None]).exp(),
        rank=rank,
        probability=(asked - log_total[:, None]).exp(),
        entropy=total.log() - product / total,
    )


def measure_head(model: ModelHandle, plain: Float[Tensor, "position vocabulary"], tolerance: float) -> Head | None:
    """The output embedding as a matrix and its scale, if they give the model's own logits; None where they do not.

    Args:
        plain: logits of the probe prompt.
    """
    module = model.parts.wiring.head
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.is_meta or hasattr(module, "_hf_hook"):
        return None
    if weight.shape[0] != plain.shape[-1] or not weight.is_floating_point():
        return None
    n = model.info.n_layers
    recorded = Plan(capture=frozenset({("output", n - 1)}))
    model.forward(model.probe, recorded, last=1)
    normed = model.normed(recorded.captured["output", n - 1])[0]
    bias = getattr(module, "bias", None)
    if normed.shape[-1] != weight.shape[1]:
        return None
    raw = measures.at_least_float32(functional.linear(normed, weight, bias))
    fitted = float((raw.double() * plain.double()).sum() / raw.double().square().sum().clamp(min=1e-30))
    for multiplier in (1.0, fitted):
        if float((raw * multiplier - plain).abs().max()) <= tolerance:
            return Head(weight=weight.detach(), bias=None if bias is None else bias.detach(), multiplier=multiplier)
    return None

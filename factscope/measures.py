"""Numbers read from logits: pure functions, softmax in float32, ranks from 1, log-probabilities in nats."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def log_probabilities(logits: Float[Tensor, "*batch vocabulary"]) -> Float[Tensor, "*batch vocabulary"]:
    """Log-softmax over the full vocabulary, in nats, float32 at least."""
    return torch.log_softmax(at_least_float32(logits), dim=-1)


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision raised to float32; float32 and float64 as they are."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def probability(logits: Float[Tensor, "*batch vocabulary"], token: int) -> Float[Tensor, "*batch"]:
    """Probability of one token, a fraction."""
    return log_probabilities(logits)[..., token].exp()


def log_odds(logits: Float[Tensor, "*batch vocabulary"], token: int) -> Float[Tensor, "*batch"]:
    """``log p - log(1 - p)`` in nats, exact also where p is so near 1 that float32 cannot hold 1 - p."""
    values = at_least_float32(logits)
    others = values.clone()
    others[..., token] = -torch.inf
    return values[..., token] - torch.logsumexp(others, dim=-1)


def log_odds_of_log_probability(log_p: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """``log p - log(1 - p)`` in nats from a log-probability (of a whole answer, say), in float64."""
    wide = log_p.double()
    return wide - torch.log(-torch.expm1(wide))


def rank(values: Float[Tensor, "*batch vocabulary"], token: int) -> Int[Tensor, "*batch"]:
    """One plus the number of tokens with a strictly greater value."""
    return 1 + (values > values[..., token, None]).sum(dim=-1)


def entropy(logits: Float[Tensor, "*batch vocabulary"]) -> Float[Tensor, "*batch"]:
    """Entropy of the distribution, in nats."""
    log_p = log_probabilities(logits)
    return -(log_p.exp() * log_p).sum(dim=-1)


def logit_difference(logits: Float[Tensor, "*batch vocabulary"], token: int, foil: int) -> Float[Tensor, "*batch"]:
    """Logit of the token minus logit of the foil."""
    values = at_least_float32(logits)
    return values[..., token] - values[..., foil]

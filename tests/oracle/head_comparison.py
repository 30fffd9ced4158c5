"""The heads of factscope beside the plain ones: largest deviation of each field of the result."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from factscope.experiments.heads import HeadsResult
from tests.oracle.plain_heads import Heads


def deviations(result: HeadsResult, plain: Heads, span: tuple[int, int]) -> dict[str, float]:
    """Per field of the result, how far it is from the plain computation; ranks may differ where rounding decides."""
    target, foil = result.target.id, None if result.foil is None else result.foil.id
    updates = torch.stack([layer.terms for layer in plain.layers])  # [layer, head, source, d_model]
    by_source = plain.logits_of(updates)
    parts = by_source.sum(dim=2)
    biases = plain.logits_of(torch.stack([layer.bias for layer in plain.layers]))
    weights = torch.stack([layer.weights for layer in plain.layers])
    found = {
        "direct_effect": _off(result.direct_effect, parts[..., target]),
        "by_source": _off(result.by_source, by_source[..., target]),
        "attention": _off(result.attention, weights),
        "attention_to_subject": _off(result.attention_to_subject, weights[..., slice(*span)].sum(dim=-1)),
        "bias_effect": _off(result.bias_effect, biases[..., target]),
        "mlp_effect": _off(result.mlp_effect, plain.logits_of(plain.trace.mlp[:, -1])[..., target]),
        "embedding_effect": abs(result.embedding_effect - float(plain.logits_of(plain.trace.embedding[-1])[target])),
        "constant": abs(result.constant - float(plain.constant()[target])),
        "logit": abs(result.logit - float(plain.trace.logits[-1, target])),
        "residual": float(np.abs(result.residual).max()),
        "promoted": _tops(result.promoted_ids, result.promoted, parts),
        "suppressed": _tops(result.suppressed_ids, -result.suppressed, -parts),
        "mapping_rank": _mappings(result, plain, span),
    }
    if foil is not None:
        found["direct_effect_foil"] = _off(result.direct_effect_foil, parts[..., target] - parts[..., foil])
    return found


def _off(found: np.ndarray, expected: Tensor) -> float:
    if found.shape != tuple(expected.shape) or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected.numpy()).max())


def _tops(ids: np.ndarray, values: np.ndarray, expected: Tensor) -> float:
    """The values found are those of the tokens found, and of the highest ones there are."""
    highest = expected.topk(ids.shape[-1], dim=-1).values.numpy()
    own = np.take_along_axis(expected.numpy(), ids, axis=-1)
    return float(max(np.abs(values - own).max(), np.abs(own - highest).max()))


def _mappings(result: HeadsResult, plain: Heads, span: tuple[int, int]) -> float:
    """By how much the rank leaves those that rounding allows, and the tokens those of the highest values."""
    worst = 0.0
    tokens = [token.id for token in result.query.tokens][slice(*span)]
    for layer, found in enumerate(plain.layers):
        vector = plain.embedding[tokens].mean(dim=0) if result.spec.mapping == "embedding" else found.read[span[1] - 1]
        for head in range(found.weights.shape[0]):
            values = plain.mapping(layer, head, vector)
            own, slack = values[result.target.id], 1e-5 * float(values.abs().max())
            fewest, most = 1 + int((values > own + slack).sum()), int((values > own - slack).sum())
            rank = int(result.mapping_rank[layer, head])
            worst = max(worst, fewest - rank, rank - most)
            ids = result.mapping_ids[layer, head]
            gap = values.topk(len(ids)).values - values[torch.as_tensor(ids)]
            worst = max(worst, 0.0 if float(gap.abs().max()) <= slack else float(gap.abs().max()))
    return worst

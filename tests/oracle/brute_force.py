"""Attention knockout on any family without touching a mask: the weights themselves are multiplied and renormalised.

The function that turns scores into weights is replaced for one forward. In the layers concerned its weights P become
P * keep / sum(P * keep); what the family adds to the scores (its own mask, ALiBi, a soft-cap, sinks) is in P already.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.oracle.plain import Edge


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The longest module list that has one entry per layer."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))


def logits(model: PreTrainedModel, ids: Sequence[int], runs: Sequence[Collection[Edge]], patch: Any) -> Tensor:
    """Logits [run, vocabulary] at the last position, one row for every set of forbidden edges."""
    length, n_heads = len(ids), int(model.config.get_text_config().num_attention_heads)
    n_layers = len(blocks(model))
    keep = torch.ones(n_layers, len(runs), n_heads, length, length, dtype=torch.bool)
    for row, forbidden in enumerate(runs):
        for layer, head, query, key in forbidden:
            keep[layer, row, slice(None) if head is None else head, query, key] = False
    with torch.no_grad(), weights_multiplied(model, keep, patch) as calls:
        found = model(torch.tensor([list(ids)]).expand(len(runs), -1), use_cache=False).logits[:, -1].float()
    assert calls == dict.fromkeys(range(n_layers), 1), f"attention weights were seen {calls}"
    return found


@contextmanager
def weights_multiplied(model: PreTrainedModel, keep: Tensor, patch: Any) -> Iterator[dict[int, int]]:
    """Inside, softmax over attention scores obeys ``keep``; tells in which layers it was called how often."""
    rows, n_heads, length = keep.shape[1], keep.shape[2], keep.shape[4]
    calls: dict[int, int] = {}
    current: list[int] = []

    def obey(weights: Tensor) -> Tensor:
        layer = current[-1]
        calls[layer] = calls.get(layer, 0) + 1
        allowed = keep[layer].reshape(weights.shape[0], -1, *keep.shape[-2:])
        if weights.shape[-1] == length + 1:  # a sink beside the keys: nobody cuts it
            allowed = torch.cat([allowed, torch.ones_like(allowed[..., :1])], dim=-1)
        wide = weights.double() * allowed
        return (wide / wide.sum(dim=-1, keepdim=True)).to(weights.dtype)

    def is_attention(scores: Tensor) -> bool:
        return bool(current) and scores.dim() == 4 and scores.shape[:3] == (rows, n_heads, length)

    def softmax(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def patched(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not is_attention(scores):
                return original(scores, *args, **kwargs)
            wanted = kwargs.get("dtype") or scores.dtype
            return obey(original(scores.double(), dim=-1)).to(wanted)

        return patched

    def fused(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:
        """What scaled_dot_product_attention is defined to compute."""
        scores = q.double() @ k.double().transpose(-1, -2) * (kwargs.get("scale") or q.shape[-1] ** -0.5)
        if attn_mask is None:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        elif attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        else:
            scores = scores + attn_mask
        return (obey(scores.softmax(dim=-1)) @ v.double()).to(v.dtype)

    def entering(layer: int) -> Callable[..., None]:
        return lambda module, args: current.append(layer)

    handles = []
    for index, block in enumerate(blocks(model)):
        handles.append(block.register_forward_pre_hook(entering(index)))
        handles.append(block.register_forward_hook(lambda module, args, output: _pop(current)))
    with patch.context() as patched:
        patched.setattr(nn.functional, "softmax", softmax(nn.functional.softmax))
        patched.setattr(torch, "softmax", softmax(torch.softmax))
        patched.setattr(nn.functional, "scaled_dot_product_attention", fused)
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()


def _pop(stack: list[int]) -> None:
    stack.pop()

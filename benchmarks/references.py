"""What a user would write without FactScope: plain hooks on the model itself, one full forward per cell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

Cell = tuple[int, int]
"""(position cut, layer at the centre of the window)."""


def window(center: int, size: int, n_layers: int) -> range:
    """Geva's window, written out here so that a wrong one in FactScope shows."""
    return range(max(0, center - size // 2), min(n_layers, center + (size + 1) // 2))


@contextmanager
def cut(model: GPT2LMHeadModel, layers: Sequence[int], rows: Sequence[int], length: int) -> Iterator[None]:
    """Hooks for one forward: in these layers the last position may not attend to ``rows[b]`` in row b of the batch."""
    blocked = torch.zeros(len(rows), 1, length, length, dtype=torch.bool)
    blocked[torch.arange(len(rows)), 0, -1, torch.tensor(rows)] = True

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"]
        return args, {**kwargs, "attention_mask": mask.masked_fill(blocked, torch.finfo(mask.dtype).min)}

    handles = [model.transformer.h[i].attn.register_forward_pre_hook(hook, with_kwargs=True) for i in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def knockout_cell(model: GPT2LMHeadModel, ids: Tensor, cell: Cell, size: int, target: int) -> float:
    """Probability of the target with one position cut in one window: one full forward, logits of the last position."""
    position, center = cell
    layers = window(center, size, model.config.n_layer)
    with torch.no_grad(), cut(model, layers, [position], ids.shape[1]):
        logits = model(ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    return float(logits.softmax(dim=-1)[target])


def knockout_batched(
    model: GPT2LMHeadModel, ids: Tensor, cells: Sequence[Cell], size: int, target: int, batch: int = 16
) -> dict[Cell, float]:
    """The same, with up to ``batch`` positions of one window in one forward."""
    found: dict[Cell, float] = {}
    for center in sorted({layer for _, layer in cells}):
        same = [cell for cell in cells if cell[1] == center]
        for begin in range(0, len(same), batch):
            chunk = same[begin : begin + batch]
            layers = window(center, size, model.config.n_layer)
            with torch.no_grad(), cut(model, layers, [position for position, _ in chunk], ids.shape[1]):
                rows = ids.expand(len(chunk), -1)
                logits = model(rows, use_cache=False, logits_to_keep=1).logits[:, -1]
            found |= dict(zip(chunk, logits.softmax(dim=-1)[:, target].tolist(), strict=True))
    return found


def lens(model: GPT2LMHeadModel, ids: Tensor, top_k: int, target: int) -> dict[str, Tensor]:
    """Top tokens, rank, probability and entropy of every layer and position: final norm and head, layer by layer."""
    parts: dict[str, list[Tensor]] = {
        "top_ids": [],
        "top_probability": [],
        "rank": [],
        "probability": [],
        "entropy": [],
    }
    states: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    blocks = model.transformer.h
    handles = [block.register_forward_hook(keep) for block in blocks]
    handles.append(blocks[0].register_forward_pre_hook(lambda module, args: states.append(args[0])))
    try:
        with torch.no_grad():
            model(ids, use_cache=False, logits_to_keep=1)
            for state in states:
                log_p = model.lm_head(model.transformer.ln_f(state))[0].log_softmax(dim=-1)
                values, tokens = log_p.topk(top_k, dim=-1)
                parts["top_ids"].append(tokens)
                parts["top_probability"].append(values.exp())
                parts["rank"].append(1 + (log_p > log_p[:, target, None]).sum(dim=-1))
                parts["probability"].append(log_p[:, target].exp())
                parts["entropy"].append(-(log_p.exp() * log_p).sum(dim=-1))
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.stack(values) for name, values in parts.items()}

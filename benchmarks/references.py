"""What a user would write without FactScope: plain hooks on the model itself, one full forward per cell.

The procedures that are named after a publication run as published: a cell of a causal trace is one forward of a clean
row and all noised ones, with logits at every position (Meng et al. 2022). The others ask for the last logits only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Cell = tuple[int, int]
"""(position, layer at the centre of the window)."""


def window(center: int, size: int, n_layers: int) -> range:
    """Geva's window, and Meng's, written out here so that a wrong one in FactScope shows."""
    return range(max(0, center - size // 2), min(n_layers, center + (size + 1) // 2))


def blocks(model: Any) -> Sequence[nn.Module]:
    """The blocks of a GPT-2 or a Llama."""
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def sublayer(block: Any, site: str) -> nn.Module:
    """The module whose output is the block's output, its MLP's update or its attention's."""
    if site == "output":
        return block
    return block.mlp if site == "mlp" else block.attn if hasattr(block, "attn") else block.self_attn


@contextmanager
def hooked(hooks: Sequence[tuple[nn.Module, Callable[[Tensor], Tensor]]]) -> Iterator[None]:
    """For one forward, the first output of each module goes through its function."""

    def around(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        return hook

    handles = [module.register_forward_hook(around(change)) for module, change in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def cut(model: Any, layers: Sequence[Sequence[int]], rows: Sequence[int], length: int) -> Iterator[None]:
    """Hooks for one forward: in ``layers[b]`` the last position may not attend to ``rows[b]`` in row b of the batch."""

    def hook_for(blocked: Tensor) -> Callable[..., Any]:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            mask = kwargs["attention_mask"]
            lowest = torch.finfo(mask.dtype).min
            return args, {**kwargs, "attention_mask": mask.masked_fill(blocked.to(mask.device), lowest)}

        return hook

    handles = []
    for layer in sorted({layer for of_row in layers for layer in of_row}):
        blocked = torch.zeros(len(rows), 1, length, length, dtype=torch.bool)
        for row, position in enumerate(rows):
            blocked[row, 0, -1, position] = layer in layers[row]
        attention = sublayer(blocks(model)[layer], "attention")
        handles.append(attention.register_forward_pre_hook(hook_for(blocked), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def knockout_cell(model: Any, ids: Tensor, cell: Cell, size: int, target: int) -> float:
    """Probability of the target with one position cut in one window: one full forward, logits of the last position."""
    return knockout_batched(model, ids, [cell], size, target)[cell]


def knockout_batched(
    model: Any, ids: Tensor, cells: Sequence[Cell], size: int, target: int, batch: int = 16
) -> dict[Cell, float]:
    """The same, with up to ``batch`` cells in one forward, whatever their windows."""
    found: dict[Cell, float] = {}
    n_layers = len(blocks(model))
    for begin in range(0, len(cells), batch):
        chunk = cells[begin : begin + batch]
        layers = [window(center, size, n_layers) for _, center in chunk]
        with torch.no_grad(), cut(model, layers, [position for position, _ in chunk], ids.shape[1]):
            logits = model(ids.expand(len(chunk), -1), use_cache=False, logits_to_keep=1).logits[:, -1]
            found |= dict(zip(chunk, _p(logits, target).tolist(), strict=True))
    return found


def trace_cell(
    model: Any, ids: Tensor, cell: Cell, target: int, *, values: Tensor, noised: Sequence[int], site: str, size: int
) -> float:
    """Row 0 clean, the others noised and given row 0's states at the cell: mean p of the target over the noised rows.

    Args:
        values: noise [sample, noised position, width], added to what the embedding gives before positions are added.
        site: ``output``, ``mlp`` or ``attention``.
    """
    position, center = cell
    layers = [center] if size == 1 else window(center, size, len(blocks(model)))

    def add_noise(embedded: Tensor) -> Tensor:
        embedded[1:, list(noised)] += values.to(embedded.device)
        return embedded

    def restore(states: Tensor) -> Tensor:
        states[1:, position] = states[0, position]
        return states

    hooks = [(model.get_input_embeddings(), add_noise)]
    hooks += [(sublayer(blocks(model)[layer], site), restore) for layer in layers]
    with torch.no_grad(), hooked(hooks):
        logits = model(ids.expand(1 + len(values), -1), use_cache=False).logits
        return float(_p(logits[1:, -1], target).mean())


def _p(logits: Tensor, target: int) -> Tensor:
    """Probability of the target in each row, in float32 or finer."""
    return (logits if logits.dtype == torch.float64 else logits.float()).softmax(dim=-1)[:, target]


def zero_cell(model: Any, ids: Tensor, cell: Cell, target: int, *, site: str, size: int) -> float:
    """The updates of a window of layers set to zero at one position: p of the target, logits of the last position."""
    position, center = cell

    def clear(update: Tensor) -> Tensor:
        update[:, position] = 0
        return update

    layers = window(center, size, len(blocks(model)))
    with torch.no_grad(), hooked([(sublayer(blocks(model)[layer], site), clear) for layer in layers]):
        logits = model(ids, use_cache=False, logits_to_keep=1).logits
        return float(_p(logits[:, -1], target)[0])


def value_step(
    model: Any, ids: Tensor, at: Sequence[int], read: Sequence[int], target: int, layer: int, change: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of ROME's optimisation: a vector added to an MLP's output at one token of every row.

    The last row is about the subject's essence, the others ask for the target at ``read``. A full forward, logits at
    all positions.

    Returns:
        The target's probability in every row that asks for it, and the gradient of their mean log-probability and of
        the divergence in the last row.
    """
    change = change.detach().clone().requires_grad_()
    where = list(range(len(at)))

    def add(output: Tensor) -> Tensor:
        moved = output.clone()
        moved[where, list(at)] += change
        return moved

    with torch.enable_grad(), hooked([(sublayer(blocks(model)[layer], "mlp"), add)]):
        log_p = model(ids, use_cache=False).logits.log_softmax(dim=-1)
        asked = log_p[where[:-1], list(read)[:-1], target]
        essence = log_p[-1, read[-1]]
        loss = -asked.mean() + (essence.exp() * essence).sum()
        return asked.detach().exp(), torch.autograd.grad(loss, change)[0]


def lens(model: Any, ids: Tensor, top_k: int, target: int) -> dict[str, Tensor]:
    """Top tokens, rank, probability and entropy of every layer and position: final norm and head, layer by layer."""
    names = ("top_ids", "top_probability", "rank", "probability", "entropy")
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    states: list[Tensor] = []

    def keep(output: Tensor) -> Tensor:
        states.append(output)
        return output

    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(hooked([(block, keep) for block in blocks(model)]))
        first = blocks(model)[0].register_forward_pre_hook(lambda module, args: states.append(args[0]))
        stack.callback(first.remove)
        model(ids, use_cache=False, logits_to_keep=1)
        for state in states:
            log_p = model.lm_head(model.transformer.ln_f(state))[0].log_softmax(dim=-1)
            values, tokens = log_p.topk(top_k, dim=-1)
            parts["top_ids"].append(tokens)
            parts["top_probability"].append(values.exp())
            parts["rank"].append(1 + (log_p > log_p[:, target, None]).sum(dim=-1))
            parts["probability"].append(log_p[:, target].exp())
            parts["entropy"].append(-(log_p.exp() * log_p).sum(dim=-1))
    return {name: torch.stack(values) for name, values in parts.items()}

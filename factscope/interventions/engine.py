"""Run many interventions on one query, exactly, without computing what cannot change.

A ``Base`` is one recorded ordinary forward. A knockout changes nothing below its first cut layer and nothing before its
first cut position, so a run starts there: blocks below are skipped, the recorded input of that block is put in, keys
and values of earlier positions come from the record, and only the changed positions (for a cut into the last token:
one) go through the model's own blocks. Many runs share one forward; equal runs are run once.

Exact for every family whose ``suffix`` capability was verified on load; others run all positions from the first cut
layer (``resume``) or the whole forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from factscope.errors import SpecError
from factscope.interventions.attention import AttentionKnockout, Cut
from factscope.models.dispatch import Plan
from factscope.models.handle import ModelHandle

PACKED_LAYERS = 16
"""Deeper models keep one row per run: there progress and cancel in small steps matter more than the copies."""
PACKED_TOLERANCE = 1e-4
"""Largest difference in logits, as a share of their scale, between a run without a cut and the plain run."""
MAX_ROWS, MIN_ROWS = 192, 8
"""Runs that share a forward: matrix products of fewer than some 200 rows leave a core half idle."""
CHUNK_WORK = 50_000_000_000
"""Floating-point operations after which a chunk ends: progress and cancel come about twice a second on a core."""
CACHE_BUDGET = 256 * 2**20
"""Bytes that the copied keys and values of one chunk of runs may take."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Base:
    """One recorded forward of one sequence.

    Attributes:
        ids: token ids, the prompt and, where a whole answer is scored, its tokens but the last.
        n_readout: how many last positions are read out (1, or the number of answer tokens).
        logits: at these positions.
        inputs: input of every block.
        allowed: per layer, which edges the model's own mask leaves open; empty where nothing can be cut.
        keys, values: per layer, as the model caches them; empty where the family has no such cache.
    """

    ids: Int[Tensor, " position"]
    n_readout: int
    logits: Float[Tensor, "readout vocabulary"]
    inputs: tuple[Float[Tensor, "position d_model"], ...]
    allowed: tuple[Bool[Tensor, "query key"], ...] = ()
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()


def record_base(model: ModelHandle, ids: Sequence[int], *, n_readout: int = 1) -> Base:
    """Run the plain model once and keep what later runs resume from."""
    tokens = torch.tensor([list(ids)], device=model.device)
    layers = range(model.info.n_layers)
    cuttable = model.capabilities["knockout"].ok
    sites = ("input", "allowed") if cuttable else ("input",)
    plan = Plan(capture=frozenset((site, layer) for layer in layers for site in sites))
    suffix = model.capabilities["suffix"].ok
    cache: Any = DynamicCache() if suffix else None
    logits = model.forward(tokens, plan, cache=cache, last=n_readout)
    return Base(
        ids=tokens[0],
        n_readout=n_readout,
        logits=logits[0],
        inputs=tuple(plan.captured["input", layer][0] for layer in layers),
        allowed=tuple(plan.captured["allowed", layer] for layer in layers) if cuttable else (),
        keys=tuple(layer.keys for layer in cache.layers) if suffix else (),
        values=tuple(layer.values for layer in cache.layers) if suffix else (),
    )


def refuse_empty_rows(base: Base, knockouts: Sequence[AttentionKnockout]) -> None:
    """Refuse a cut that leaves some position of some head nothing to attend to.

    Raises:
        SpecError: names the layer and the position.
    """
    open_keys: dict[tuple[int, int], frozenset[int]] = {}
    for cuts in {frozenset(knockout.cuts) for knockout in knockouts}:
        by_row: dict[tuple[int, int], list[Cut]] = {}
        for cut in cuts:
            for query in cut.queries:
                by_row.setdefault((cut.layer, query), []).append(cut)
        for (layer, query), row in by_row.items():
            if (layer, query) not in open_keys:
                open_keys[layer, query] = frozenset(base.allowed[layer][query].nonzero().flatten().tolist())
            if sum(len(cut.keys) for cut in row) < len(open_keys[layer, query]):
                continue
            named = {head for cut in row for head in cut.heads or ()}
            for head in named or {None}:
                keys = {key for cut in row for key in cut.keys if cut.heads is None or head in cut.heads}
                if open_keys[layer, query] <= keys:
                    raise SpecError(
                        f"cutting {sorted(keys)} leaves position {query} nothing to attend to in layer {layer}",
                        "keep at least one token that it may attend to",
                    )


def run_knockouts(
    model: ModelHandle, base: Base, knockouts: Sequence[AttentionKnockout]
) -> Iterator[tuple[list[int], Float[Tensor, "row readout vocabulary"]]]:
    """Logits at the read-out positions under each knockout, in chunks.

    Runs of one chunk share a forward from the lowest layer at which any of them is cut: a run whose own cuts come later
    repeats the plain computation until then, which costs less than a forward of few rows.

    Yields:
        The indices of the knockouts that a chunk answers, and their logits. Chunks follow the given order.
    """
    groups: dict[int, dict[AttentionKnockout, list[int]]] = {}
    nothing: list[int] = []
    for index, knockout in enumerate(knockouts):
        effective = knockout.effective()
        if effective.cuts:
            groups.setdefault(effective.first_position, {}).setdefault(effective, []).append(index)
        else:
            nothing.append(index)
    if nothing:
        yield nothing, base.logits.expand(len(nothing), *base.logits.shape)
    for position, members in groups.items():
        runs = list(members)
        size = _rows(model, base, position)
        for begin in range(0, len(runs), size):
            chunk = runs[begin : begin + size]
            logits = _run_packed(model, base, chunk, position) if _can_pack(model, base, chunk, position) else None
            if logits is None:
                logits = _run_chunk(model, base, chunk, position)
            where = [(row, i) for row, run in enumerate(chunk) for i in members[run]]
            yield [i for _, i in where], logits[[row for row, _ in where]]


def _rows(model: ModelHandle, base: Base, position: int) -> int:
    """How many runs share a forward: their copies of cached keys and values and their work stay within the budgets."""
    copied = sum(k[0].numel() + v[0].numel() for k, v in zip(base.keys, base.values, strict=True))
    n_tokens = base.ids.shape[0] - position
    by_memory = CACHE_BUDGET // max(1, copied * base.logits.element_size())
    by_work = CHUNK_WORK // (2 * model.n_parameters * n_tokens)
    return max(1, min(MAX_ROWS, by_memory, max(MIN_ROWS, by_work)))


def _run_chunk(
    model: ModelHandle, base: Base, runs: Sequence[AttentionKnockout], position: int
) -> Float[Tensor, "row readout vocabulary"]:
    length = base.ids.shape[0]
    begin = min(position, length - base.n_readout) if base.keys else 0
    start = min(run.first_layer for run in runs) if model.capabilities["resume"].ok else 0
    n_rows = len(runs)
    keep = keep_masks([run.cuts for run in runs], length, begin, model.info.n_heads, model.device)
    states = base.inputs[start][None, begin:]
    plan = Plan(start_layer=start, resume=states.expand(n_rows, *states.shape[1:]).clone(), keep=keep)
    cache = prefix_cache(base, start, begin, n_rows) if begin > 0 else None
    return model.forward(base.ids[None, begin:].expand(n_rows, -1), plan, cache=cache, last=base.n_readout)


def _can_pack(model: ModelHandle, base: Base, runs: Sequence[AttentionKnockout], position: int) -> bool:
    one_token = base.n_readout == 1 and position == base.ids.shape[0] - 1 > 0
    shallow = model.info.n_layers <= PACKED_LAYERS
    return (
        one_token and shallow and len(runs) > 1 and "packed" in model.capabilities and model.capabilities["packed"].ok
    )


def _run_packed(
    model: ModelHandle, base: Base, runs: Sequence[AttentionKnockout], position: int
) -> Float[Tensor, "row readout vocabulary"] | None:
    """Runs as tokens of one sequence, all at the last position, that see the shared prefix and themselves alone.

    Nothing of the prefix is copied per run. A run without a cut goes along as the last token: where it does not give
    the plain logits (a sliding window that counts the other runs as distance, say) nothing is returned.
    """
    n_rows, start = len(runs) + 1, min(run.first_layer for run in runs)
    masks = keep_masks([*(run.cuts for run in runs), ()], position + 1, position, model.info.n_heads, model.device)
    own = torch.eye(n_rows, dtype=torch.bool, device=model.device)
    keep = {}
    for layer in range(start, model.info.n_layers):
        mask = masks.get(layer)
        if mask is None:
            mask = torch.ones(n_rows, 1, 1, position + 1, dtype=torch.bool, device=model.device)
        rows = mask[:, :, 0].transpose(0, 1)
        keep[layer] = torch.cat([rows[..., :position], own & rows[..., position:]], dim=-1)[None]
    states = base.inputs[start][None, position:]
    plan = Plan(start_layer=start, resume=states.expand(1, n_rows, *states.shape[2:]).clone(), keep=keep)
    logits = model.forward(
        base.ids[None, position:].expand(1, n_rows),
        plan,
        cache=prefix_cache(base, start, position, 1),
        last=n_rows,
        positions=torch.full((1, n_rows), position, device=model.device),
    )[0]
    off = float((logits[-1] - base.logits[0]).abs().max())
    return logits[:-1, None] if off <= PACKED_TOLERANCE * max(1.0, float(base.logits.abs().max())) else None


def keep_masks(
    runs: Sequence[Sequence[Cut]], length: int, begin: int, n_heads: int, device: torch.device
) -> dict[int, Bool[Tensor, "row head query key"]]:
    """Per layer, which attention edges stay, for queries from position ``begin`` on; one head axis unless heads
    differ.
    """
    cut_edges: dict[int, list[tuple[int, int, int, int]]] = {}
    every_head = -1
    for row, cuts in enumerate(runs):
        for cut in cuts:
            heads = (every_head,) if cut.heads is None else cut.heads
            edges = ((row, h, q - begin, k) for h in heads for q in cut.queries for k in cut.keys)
            cut_edges.setdefault(cut.layer, []).extend(edges)
    masks = {}
    for layer, edges in sorted(cut_edges.items()):
        rows, heads, queries, keys = torch.tensor(edges).unbind(dim=1)
        by_head = bool((heads != every_head).any())
        mask = torch.ones(len(runs), n_heads if by_head else 1, length - begin, length, dtype=torch.bool)
        chosen = heads != every_head
        mask[rows[~chosen], :, queries[~chosen], keys[~chosen]] = False
        mask[rows[chosen], heads[chosen], queries[chosen], keys[chosen]] = False
        masks[layer] = mask.to(device)
    return masks


def prefix_cache(base: Base, start_layer: int, begin: int, rows: int) -> DynamicCache:
    """Keys and values of the positions before ``begin``, shared by ``rows`` runs without copying.

    Skipped layers get placeholders of the right length: masks and positions are derived from the cache's length, and
    empty lower layers would make them silently wrong. A plain cache keeps every key, also of sliding layers.
    """
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(base.keys, base.values, strict=True)):
        entry = DynamicLayer()
        entry.lazy_initialization(keys, values)
        if layer < start_layer:
            placeholder = keys.new_zeros(1).expand(rows, 1, begin, 1)
            entry.keys, entry.values = placeholder, placeholder
        else:
            entry.keys = keys[:, :, :begin].expand(rows, -1, -1, -1)
            entry.values = values[:, :, :begin].expand(rows, -1, -1, -1)
        cache.layers.append(entry)
    return cache

"""Where does the answer appear? Hidden states and updates projected to the vocabulary.

Source: logit lens (nostalgebraist 2020); projections of updates as in Geva et al. 2023, sections 5 and 6.
``normed`` goes through the model's own final norm and head, soft-cap and scale included, so that its last
row is the model's output; ``raw`` is the output embedding times the state, as in the released notebook.

1. One forward records every block's input, the last block's output and, for the other sites, the update each sublayer
   adds to the residual stream.
2. Normed: the model's own forward with all blocks skipped and the states put in as the last block's output.
3. Per cell: top tokens with probability, rank and probability of the target, entropy (nats).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from factscope import measures
from factscope.errors import SpecError
from factscope.experiments.results import (
    Progress,
    Timed,
    coarse_to_fine,
    resolve_target,
    silent,
    target_warnings,
    tokenized,
)
from factscope.models.dispatch import Plan
from factscope.models.handle import ModelHandle, ModelInfo
from factscope.models.head import Distribution, distribution_of_states
from factscope.queries import Query
from factscope.tokens import Target, TokenizedQuery, token_text

Site = Literal["block", "mlp", "attention"]
Projection = Literal["normed", "raw"]
EMBEDDING = -1
"""The layer number of the embedding column."""
_CHUNK_STATES = 512


@dataclass(frozen=True, kw_only=True)
class LensSpec:
    """What to project and what to keep of it.

    Attributes:
        site: block output (with the embedding as layer -1), or the update of the MLP or the attention.
        projection: "normed" or "raw".
        top_k: tokens kept per cell.
        positions: names of position sets or positions; empty takes all.
        pinned: token ids whose probability and rank are followed besides the target's.
    """

    site: Site = "block"
    projection: Projection = "normed"
    top_k: int = 10
    positions: tuple[str, ...] = ()
    pinned: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class LensResult:
    """The grid [layer, position].

    Attributes:
        layers: rows of the arrays; -1 is the embedding.
        positions: columns of the arrays.
        p_target, rank: of the target in the model's output.
        top_ids, top_probability: [layer, position, k].
        target_rank, target_probability, entropy: [layer, position]; NaN (rank 0) where not computed yet.
        pinned_rank, pinned_probability: [layer, position, pinned token].
        texts: text and display form of every token id that occurs.
    """

    spec: LensSpec
    query: TokenizedQuery
    model: ModelInfo
    target: Target
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    p_target: float
    rank: int
    top_ids: np.ndarray
    top_probability: np.ndarray
    target_rank: np.ndarray
    target_probability: np.ndarray
    entropy: np.ndarray
    pinned_rank: np.ndarray
    pinned_probability: np.ndarray
    texts: dict[int, tuple[str, str]]
    warnings: tuple[str, ...]
    seconds: float
    passes: int

    def table(self) -> pd.DataFrame:
        """One row per (layer, position, rank): the contract's columns for ``lens``."""
        rows = []
        for i, layer in enumerate(self.layers):
            for j, position in enumerate(self.positions):
                if np.isnan(self.entropy[i, j]):
                    continue
                cell = int(self.target_rank[i, j]), float(self.target_probability[i, j]), float(self.entropy[i, j])
                for rank in range(self.top_ids.shape[2]):
                    token = int(self.top_ids[i, j, rank])
                    text = self.texts[token][0]
                    p = float(self.top_probability[i, j, rank])
                    rows.append((self.spec.site, layer, position, rank + 1, token, text, p, *cell))
        names = ["site", "layer", "position", "rank", "id", "text", "probability"]
        return pd.DataFrame(rows, columns=[*names, "target_rank", "target_probability", "entropy"])


def run(
    model: ModelHandle, query: Query | TokenizedQuery, spec: LensSpec | None = None, *, progress: Progress = silent
) -> LensResult:
    """Project every layer's states or updates to tokens.

    Raises:
        InputError: the query or the spec cannot be used.
        CapabilityError: updates are asked of a model without an additive split.
    """
    spec = spec or LensSpec()
    _check(model, spec)
    timed = Timed(progress)
    seen = tokenized(model, query)
    positions = _positions(seen, spec)
    layers, states, logits = record_states(model, seen, spec.site)
    target = resolve_target(model, seen, logits)
    warnings = seen.warnings + target_warnings(model, seen, target) + _score_warnings(seen, target)
    p_target, rank = float(measures.probability(logits, target.ids[0])), int(measures.rank(logits, target.ids[0]))
    grid = _Grid(len(layers), len(positions), spec)
    texts: dict[int, tuple[str, str]] = {}
    order = coarse_to_fine(len(layers))
    done = 0

    def snapshot() -> LensResult:
        return grid.result(
            spec=spec, query=seen, model=model.info, target=target, layers=layers, positions=positions,
            p_target=p_target, rank=rank, texts=dict(texts), warnings=warnings,
            seconds=timed.seconds, passes=done + 1,
        )  # fmt: skip

    timed(0, len(layers), None)
    asked = (target.ids[0], *spec.pinned)
    for chunk in _chunks(order, len(positions)):
        grid.fill(chunk, _project(model, states[chunk][:, list(positions)], spec, asked))
        for token in {*np.unique(grid.top_ids[chunk]).tolist(), *spec.pinned, target.ids[0]} - texts.keys():
            texts[token] = token_text(model.tokenizer, token)
        done += len(chunk)
        timed(done, len(layers), snapshot())
    return snapshot()


def _check(model: ModelHandle, spec: LensSpec) -> None:
    if spec.site not in get_args(Site):
        raise SpecError(f"site {spec.site!r} is unknown", f"choose one of {', '.join(get_args(Site))}")
    if spec.projection not in get_args(Projection):
        raise SpecError(
            f"projection {spec.projection!r} is unknown", f"choose one of {', '.join(get_args(Projection))}"
        )
    if not 1 <= spec.top_k <= model.vocabulary:
        raise SpecError(f"top-k {spec.top_k} is not between 1 and {model.vocabulary}", "choose a number in that range")
    for token in spec.pinned:
        if not 0 <= token < model.vocabulary:
            raise SpecError(
                f"pinned token {token} is not between 0 and {model.vocabulary - 1}", "choose a token id of this model"
            )
    model.require("lens", "the lens")
    if spec.site != "block":
        model.require("additive", f"the lens on {spec.site} updates")


def _score_warnings(query: TokenizedQuery, target: Target) -> tuple[str, ...]:
    if query.query.score == "sequence" and target.n_tokens > 1:
        return (f"the lens follows the first of the {target.n_tokens} tokens of {target.text.strip()!r}",)
    return ()


def _positions(query: TokenizedQuery, spec: LensSpec) -> tuple[int, ...]:
    if not spec.positions:
        return tuple(range(len(query.ids)))
    return tuple(sorted({p for name in spec.positions for p in query.positions(name)}))


def record_states(model: ModelHandle, query: TokenizedQuery, site: Site) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """Layer numbers, states [layer, position, d_model] of a site, and the logits [vocabulary] at the last position."""
    n = model.info.n_layers
    wanted = [("input", layer) for layer in range(n)] + [("output", n - 1)]
    if site != "block":
        wanted = [(site, layer) for layer in range(n)]
    plan = Plan(capture=frozenset(wanted))
    ids = torch.tensor([query.ids], device=model.device)
    logits = model.forward(ids, plan, last=1)[0, -1]
    length = ids.shape[1]
    states = torch.stack([plan.captured[key].reshape(length, -1) for key in wanted])
    first = EMBEDDING if site == "block" else 0
    return tuple(range(first, n)), states, logits


def _chunks(order: list[int], positions: int) -> Iterator[list[int]]:
    """Layers that are projected together: some hundred states make good use of a matrix product."""
    size = max(1, _CHUNK_STATES // positions)
    for begin in range(0, len(order), size):
        yield order[begin : begin + size]


def _project(model: ModelHandle, states: Tensor, spec: LensSpec, asked: tuple[int, ...]) -> Distribution:
    """What states [layer, position, d_model] say about the tokens asked for, rows flattened."""
    return distribution_of_states(model, states.flatten(0, 1), asked, spec.top_k, raw=spec.projection == "raw")


class _Grid:
    """Arrays that fill in as layers are done."""

    def __init__(self, layers: int, positions: int, spec: LensSpec) -> None:
        shape = (layers, positions)
        self.top_ids = np.zeros((*shape, spec.top_k), dtype=np.int64)
        self.top_probability = np.full((*shape, spec.top_k), np.nan)
        self.target_rank = np.zeros(shape, dtype=np.int64)
        self.target_probability = np.full(shape, np.nan)
        self.entropy = np.full(shape, np.nan)
        self.pinned_rank = np.zeros((*shape, len(spec.pinned)), dtype=np.int64)
        self.pinned_probability = np.full((*shape, len(spec.pinned)), np.nan)

    def fill(self, rows: list[int], found: Distribution) -> None:
        """Write down whole layers."""

        def cells(values: Tensor) -> np.ndarray:
            return values.unflatten(0, (len(rows), -1)).cpu().numpy()

        self.top_ids[rows], self.top_probability[rows] = cells(found.top_ids), cells(found.top_probability)
        rank, probability = cells(found.rank), cells(found.probability)
        self.target_rank[rows], self.target_probability[rows] = rank[..., 0], probability[..., 0]
        self.pinned_rank[rows], self.pinned_probability[rows] = rank[..., 1:], probability[..., 1:]
        self.entropy[rows] = cells(found.entropy)

    def result(self, **axes: object) -> LensResult:
        arrays = {name: array.copy() for name, array in vars(self).items()}
        return LensResult(**axes, **arrays)  # type: ignore[arg-type]

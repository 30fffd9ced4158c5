"""Who extracts it? The attention update at the read-out, head by head, and what each head adds to the answer.

Sources: heads as a sum, Elhage et al. 2021, *A Mathematical Framework for Transformer Circuits*; direct effects by
head and by source, Chughtai et al. 2024 (arXiv 2402.07321); subject-attribute mappings in parameters, Geva et al. 2023
(arXiv 2304.14767), section 6, by the projection of Dar et al. 2022 (arXiv 2209.02535).

1. One forward records what the heads give at the last position, and what their attention reads.
2. Head h's part is ``sum over s of A[t, s] x_s W_V W_O``, value biases included; the output bias belongs to no head.
   Parts and bias add up to what the output projection gives; the residual says how exactly. Where a norm follows before
   the stream (Gemma 2 and 3, OLMo 2, GLM-4), the split is made before it, and the norm is held at its scale.
3. The final norm is held at its scale of the plain run. What is then left between a part and the answer's logit (before
   a soft-cap) is linear: that is the part's direct effect, in nats of logit, on the target and on target - foil. Heads,
   biases, MLPs, the embedding and a constant add up to the logit.
4. By source: the same of every term of the sum over s.
5. The tokens whose logits a head's part raises and lowers most.
6. Mapping: the mean input embedding of the subject's tokens times W_V W_O E^T, whatever the prompt; option: what the
   head's attention reads at the subject's last token. A mapping is found where the target is among its first tokens.
   Grouped query heads use their group's values.

Only the first token of the answer is followed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

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
    foil_target,
    resolve_target,
    silent,
    target_warnings,
    tokenized,
)
from factscope.models import splitting
from factscope.models.dispatch import Plan
from factscope.models.handle import ModelHandle, ModelInfo
from factscope.queries import Query
from factscope.tokens import Target, TokenizedQuery, token_text

Mapping = Literal["embedding", "state"]


@dataclass(frozen=True, kw_only=True)
class HeadsSpec:
    """What to keep and how to look for mappings.

    Attributes:
        top_k: tokens kept of each head; a mapping is found where the target is among so many.
        mapping: "embedding", the mean input embedding of the subject's tokens, or "state", what the layer's attention
            reads at the subject's last token (after the input norm).
        by_source: the table has a row for every source position instead of one a head.
    """

    top_k: int = 10
    mapping: Mapping = "embedding"
    by_source: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadsResult:
    """The grid [layer, head], and the rest of the logit. Effects are in nats of logit; NaN where not computed yet.

    Attributes:
        split_before_norm: a norm stands between the heads and the stream, and is held at its scale.
        logit: of the target, before a soft-cap.
        direct_effect, direct_effect_foil: [layer, head], on the target's logit, on target - foil (NaN without a foil).
        by_source: [layer, head, position]; NaN where attention weights are not told.
        attention: [layer, head, position], the read-out's attention weights.
        attention_to_subject: [layer, head], their sum over the subject's tokens; NaN without one.
        mapping_rank: [layer, head], of the target in the head's mapping of the subject; 0 where there is none.
        mapping_ids, promoted_ids, suppressed_ids: [layer, head, k]; promoted, suppressed: the changes of their logits.
        bias_effect, mlp_effect: [layer], of the output bias and of the MLP update. embedding_effect: of what enters
            the first block. constant: of the final norm's shift and the output embedding's bias.
        residual: [layer], largest entry of parts and bias minus the measured update.
    """

    spec: HeadsSpec
    query: TokenizedQuery
    model: ModelInfo
    target: Target
    foil: Target | None
    p_target: float
    rank: int
    split_before_norm: bool
    logit: float
    layers: tuple[int, ...]
    direct_effect: np.ndarray
    direct_effect_foil: np.ndarray
    by_source: np.ndarray
    attention: np.ndarray
    attention_to_subject: np.ndarray
    mapping_rank: np.ndarray
    mapping_ids: np.ndarray
    promoted_ids: np.ndarray
    promoted: np.ndarray
    suppressed_ids: np.ndarray
    suppressed: np.ndarray
    bias_effect: np.ndarray
    mlp_effect: np.ndarray
    embedding_effect: float
    constant: float
    residual: np.ndarray
    texts: dict[int, tuple[str, str]]
    warnings: tuple[str, ...]
    seconds: float
    passes: int

    @property
    def mapping_found(self) -> np.ndarray:
        """Whether the target is among the first tokens of the head's mapping, [layer, head]."""
        return (self.mapping_rank > 0) & (self.mapping_rank <= self.spec.top_k)

    def table(self) -> pd.DataFrame:
        """One row per (layer, head), or per (layer, head, position) by source: the contract's columns for ``heads``."""
        done = [i for i in range(len(self.layers)) if not np.isnan(self.residual[i])]
        if self.spec.by_source:
            cells = [
                (self.layers[i], head, position, float(value))
                for i in done
                for head, row in enumerate(self.by_source[i])
                for position, value in enumerate(row)
            ]
            return pd.DataFrame(cells, columns=["layer", "head", "position", "direct_effect"])
        rows = []
        for i in done:
            for head in range(self.direct_effect.shape[1]):
                rank = int(self.mapping_rank[i, head])
                numbers = (grid[i, head] for grid in (self.direct_effect, self.direct_effect_foil))
                rows.append(
                    (
                        self.layers[i],
                        head,
                        *map(float, numbers),
                        float(self.attention_to_subject[i, head]),
                        rank or np.nan,
                        self.texts[int(self.promoted_ids[i, head, 0])][0],
                    )
                )
        names = ["layer", "head", "direct_effect", "direct_effect_foil", "attention_to_subject", "mapping_rank"]
        return pd.DataFrame(rows, columns=[*names, "top_promoted"])

    def summary(self) -> dict[str, float | bool]:
        """What of the attention belongs to no head, how exact the split is, and whether a norm stands behind it."""
        return {
            "bias_effect": float(np.nansum(self.bias_effect)),
            "residual": float(np.nanmax(self.residual, initial=0.0)),
            "split_before_norm": self.split_before_norm,
        }


def run(
    model: ModelHandle, query: Query | TokenizedQuery, spec: HeadsSpec | None = None, *, progress: Progress = silent
) -> HeadsResult:
    """Split every layer's attention update at the read-out into heads.

    Raises:
        InputError: the query or the spec cannot be used.
        CapabilityError: the attention does not split, or nothing linear leads from it to the logits; attention weights
            where a table by source is asked for.
    """
    spec = spec or HeadsSpec()
    _check(model, spec)
    timed = Timed(progress)
    seen = tokenized(model, query)
    record = _Record(model, seen)
    target = resolve_target(model, seen, record.logits)
    foil = foil_target(model, seen, target)
    way = _Way(model, record, target, foil)
    timed(0, model.info.n_layers, None)
    warnings = seen.warnings + target_warnings(model, seen, target) + _score_warnings(seen, target)
    sources, mappings, extra = _sources_and_mappings(model, seen, spec, record)
    grid = _Grid(model, seen, spec)
    texts: dict[int, tuple[str, str]] = {}
    done = 0

    def snapshot() -> HeadsResult:
        return grid.result(
            spec=spec, query=seen, model=model.info, target=target, foil=foil,
            p_target=float(measures.probability(record.logits, target.id)),
            rank=int(measures.rank(record.logits, target.id)),
            split_before_norm=any(norm is not None for norm in way.reach.behind),
            logit=way.logit, layers=tuple(range(model.info.n_layers)), embedding_effect=way.embedding_effect,
            constant=way.constant, texts=dict(texts), warnings=warnings + extra,
            seconds=timed.seconds, passes=done + 1,
        )  # fmt: skip

    for layer in coarse_to_fine(model.info.n_layers):
        grid.fill(layer, _layer(way, layer, sources, mappings, spec))
        kept = (grid.promoted_ids[layer], grid.suppressed_ids[layer], grid.mapping_ids[layer])
        for token in {*np.concatenate(kept).ravel().tolist(), target.id} - texts.keys():
            texts[token] = token_text(model.tokenizer, token)
        done += 1
        timed(done, model.info.n_layers, snapshot())
    return snapshot()


def _check(model: ModelHandle, spec: HeadsSpec) -> None:
    if spec.mapping not in get_args(Mapping):
        raise SpecError(f"mapping {spec.mapping!r} is unknown", f"choose one of {', '.join(get_args(Mapping))}")
    if not 1 <= spec.top_k <= model.vocabulary:
        raise SpecError(f"top-k {spec.top_k} is not between 1 and {model.vocabulary}", "choose a number in that range")
    model.require("heads", "one head at a time")
    model.require("direct", "direct effects of heads")
    if spec.by_source:
        model.require("sources", "direct effects by source")


def _score_warnings(query: TokenizedQuery, target: Target) -> tuple[str, ...]:
    if query.query.score == "sequence" and target.n_tokens > 1:
        return (f"direct effects are on the first of the {target.n_tokens} tokens of {target.text.strip()!r}",)
    return ()


class _Record:
    """One forward: what enters every block, what attention reads and gives, and what leads on from there."""

    def __init__(self, model: ModelHandle, query: TokenizedQuery) -> None:
        self.n_layers, self.n_heads = model.info.n_layers, model.info.n_heads
        sites = ("input", "read", "heads", "projected", "attention", "mlp", "row")
        wanted = {(site, layer) for site in sites for layer in range(self.n_layers)}
        plan = Plan(capture=frozenset(wanted | {("output", self.n_layers - 1), ("embedding", 0)}))
        self.ids = torch.tensor(query.ids, device=model.device)
        self.logits = model.forward(self.ids[None], plan, last=1)[0, -1]
        self._seen = plan.captured

    def all(self, site: str, layer: int) -> Tensor:
        """[position, width]; some modules work on flattened tokens."""
        found = self._seen[site, layer]
        return found.reshape(-1, found.shape[-1])

    def last(self, site: str, layer: int) -> Tensor:
        """[width], at the read-out."""
        return self.all(site, layer)[-1]

    def heads(self, layer: int) -> Tensor:
        """[head, size], at the read-out."""
        return self.last("heads", layer).reshape(self.n_heads, -1)

    def row(self, layer: int) -> Tensor:
        """[head, position], the read-out's attention weights."""
        return self._seen["row", layer][0].double()


class _Way:
    """From a vector in the stream at the read-out to logits, the final norm held at its scale."""

    def __init__(self, model: ModelHandle, record: _Record, target: Target, foil: Target | None) -> None:
        assert model.reach is not None
        self.model, self.record, self.reach = model, record, model.reach
        self._embedding: Any = model.parts.wiring.head
        end = record.last("output", record.n_layers - 1)
        self._scale = float(self.reach.final.scale(end, model.normed(end[None, None])[0, 0]))
        self.to_target = self._direction(target.id)
        self.to_foil = None if foil is None else self.to_target - self._direction(foil.id)
        bias = getattr(self._embedding, "bias", None)
        given = self._embedding.weight[target.id].double()
        shift = float(self.reach.final.shift @ given) + (0.0 if bias is None else float(bias[target.id]))
        self.target = target.id
        self.constant = self.reach.multiplier * shift
        self.embedding_effect = float(record.last("input", 0).double() @ self.to_target)
        self.logit = float(end.double() @ self.to_target) + self.constant

    def _direction(self, token: int) -> Tensor:
        row = self._embedding.weight[token].double()
        return self.reach.multiplier * self._scale * self.reach.final.transposed(row)

    def on_all(self, vectors: Tensor) -> Tensor:
        """Changes of all logits [row, vocabulary]."""
        normed = self.reach.multiplier * self._scale * self.reach.final.linear(vectors)
        return self.model.unembed(normed.to(self._embedding.weight.dtype))

    def in_stream(self, layer: int, parts: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Parts of the projection's output, and its bias, as what the block adds to the stream."""
        scale = self.scale_behind(layer)
        into, shift = self.reach.into_stream, self.reach.shift_behind(layer)
        return into(layer, parts, scale), into(layer, bias, scale) + shift

    def scale_behind(self, layer: int) -> float:
        """Of the norm between the heads and the stream, at the read-out."""
        record = self.record
        return self.reach.scale_behind(layer, record.last("projected", layer), record.last("attention", layer))


def _sources_and_mappings(
    model: ModelHandle, query: TokenizedQuery, spec: HeadsSpec, record: _Record
) -> tuple[list[Tensor] | None, list[Tensor] | None, tuple[str, ...]]:
    """Values [head, position, size] and the mapped subject [head, size] of every layer; None with a warning where the
    model or the query has none.
    """
    layers = range(record.n_layers)
    warnings: tuple[str, ...] = ()
    sources = mappings = None
    if model.capabilities["sources"].ok:
        sources = splitting.values(model, record.ids, [record.all("input", layer) for layer in layers])
    else:
        warnings += (f"no attention weights and no effects by source: {model.capabilities['sources'].reason}",)
    if query.subject is None:
        return sources, None, (*warnings, "no mappings and no attention to the subject: none is named")
    if not model.capabilities["mappings"].ok:
        return sources, None, (*warnings, f"no mappings: {model.capabilities['mappings'].reason}")
    start, stop = query.subject
    if spec.mapping == "state":
        reads = [record.all("read", layer)[stop - 1][None] for layer in layers]
    else:
        embedded = record.all("embedding", 0)[start:stop].mean(dim=0)
        reads = [embedded[None]] * record.n_layers
    mappings = [given[0] for given in splitting.mapped(model, reads)]
    return sources, mappings, warnings


def _layer(
    way: _Way, layer: int, sources: list[Tensor] | None, mappings: list[Tensor] | None, spec: HeadsSpec
) -> dict[str, Tensor | float]:
    """Everything of one layer, under the names of the result's fields."""
    model, record, k = way.model, way.record, spec.top_k
    heads = record.heads(layer)
    parts, bias = way.in_stream(layer, *splitting.split(model, layer, heads))
    update = record.last("attention", layer).double()
    found: dict[str, Tensor | float] = {
        "direct_effect": parts @ way.to_target,
        "bias_effect": float(bias @ way.to_target),
        "mlp_effect": float(record.last("mlp", layer).double() @ way.to_target),
        "residual": float((parts.sum(dim=0) + bias - update).abs().max()),
    }
    if way.to_foil is not None:
        found["direct_effect_foil"] = parts @ way.to_foil
    if sources is not None:
        direction = way.reach.before_norm(layer, way.to_target, way.scale_behind(layer))
        own = splitting.seen_from_heads(model, layer, direction, heads)
        found["attention"] = record.row(layer)
        found["by_source"] = record.row(layer) * torch.einsum("hsd,hd->hs", sources[layer], own)
    changes = way.on_all(parts)
    for name, sign in (("promoted", 1.0), ("suppressed", -1.0)):
        top, ids = (sign * changes).topk(k, dim=-1)
        found |= {name: sign * top, f"{name}_ids": ids}
    if mappings is not None:
        mapped, _ = splitting.split(model, layer, mappings[layer].to(heads.dtype))
        projected = model.unembed(mapped.to(way._embedding.weight.dtype))
        found |= {
            "mapping_rank": measures.rank(projected, way.target),
            "mapping_ids": projected.topk(k, dim=-1).indices,
        }
    return found


class _Grid:
    """Arrays that fill in as layers are done."""

    def __init__(self, model: ModelHandle, query: TokenizedQuery, spec: HeadsSpec) -> None:
        layers, heads, length = model.info.n_layers, model.info.n_heads, len(query.ids)
        self._subject = slice(*query.subject) if query.subject is not None else None
        self.direct_effect, self.direct_effect_foil, self.attention_to_subject = (
            np.full((layers, heads), np.nan) for _ in range(3)
        )
        self.by_source, self.attention = (np.full((layers, heads, length), np.nan) for _ in range(2))
        self.mapping_rank = np.zeros((layers, heads), dtype=np.int64)
        self.mapping_ids, self.promoted_ids, self.suppressed_ids = (
            np.zeros((layers, heads, spec.top_k), dtype=np.int64) for _ in range(3)
        )
        self.promoted, self.suppressed = (np.full((layers, heads, spec.top_k), np.nan) for _ in range(2))
        self.bias_effect, self.mlp_effect, self.residual = (np.full(layers, np.nan) for _ in range(3))

    def fill(self, layer: int, found: dict[str, Tensor | float]) -> None:
        """Write down a layer."""
        for name, value in found.items():
            getattr(self, name)[layer] = value.cpu().numpy() if isinstance(value, Tensor) else value
        if self._subject is not None:
            self.attention_to_subject[layer] = self.attention[layer][:, self._subject].sum(axis=-1)

    def result(self, **axes: object) -> HeadsResult:
        arrays = {name: array.copy() for name, array in vars(self).items() if not name.startswith("_")}
        return HeadsResult(**axes, **arrays)  # type: ignore[arg-type]

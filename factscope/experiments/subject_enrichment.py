"""Is the subject's last token enriched with attributes, where, and by what? Attributes rate and sublayer knockout.

Source: Geva et al. 2023 (arXiv 2304.14767), section 5.

1. Gather attribute tokens of the subject and of other subjects (``attributes_rate``).
2. Record every block's output, and report the rate at named positions. The axis is the block's output; the released
   notebook draws the state that enters a layer, under the number of the next one.
3. Beside them the mean input embedding of the subject's tokens, as layer -1.
4. With ``knockout``: at the subject's positions the updates of the MLP, or of the attention, are replaced by zeros in a
   window of layers around each layer; report the rate of the subject's last token at the output of one later layer.

``notebook`` follows the released notebook in step 4: windows begin at each layer, have 11 layers and end before the
layer that is read; the MLP is silenced at all positions by zeros in place of its pre-activations, so that its output
bias stays; in place of the attention's weights stands what forbidding every edge came to there, the same weight for
every token up to the own one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from factscope import measures
from factscope.errors import SpecError, SubjectError
from factscope.experiments.attributes_rate import KEPT, TOP, Attribute, Attributes, Rates, gather
from factscope.experiments.logit_lens import record_states
from factscope.experiments.results import (
    Progress,
    Timed,
    coarse_to_fine,
    resolve_target,
    silent,
    target_warnings,
    tokenized,
)
from factscope.interventions import engine
from factscope.interventions.attention import window
from factscope.interventions.base import record_base
from factscope.interventions.intervention import Intervention, Patch
from factscope.interventions.weights import silenced
from factscope.models.dispatch import Plan, Stopped, allowed, eager_attention
from factscope.models.handle import ModelHandle, ModelInfo
from factscope.queries import Query
from factscope.tokens import Target, TokenizedQuery

Sublayer = Literal["mlp", "attention"]
MEAN_EMBEDDING = "mean-embedding"
POSITIONS = ("subject-first", "subject-last", "subject-after", "last", MEAN_EMBEDDING)
EMBEDDING = -1
"""The layer number of the mean input embedding."""
NOTEBOOK_WINDOW = 11


@dataclass(frozen=True, kw_only=True)
class EnrichmentSpec:
    """What is measured.

    Attributes:
        attributes: where the attributes come from: "bundled", a CSV file (subject, paragraphs) or a folder of text.
        positions: "subject-first", "subject-last", "subject-after", "last", single positions such as "0", and
            "mean-embedding"; a knockout reads "subject-last" alone.
        kept: m, the number of tokens kept; None takes the number of attributes (precision).
        top: tokens of the raw projection that are looked at.
        others: how many other subjects are drawn as the null.
        knockout: None measures the rate; "mlp" or "attention" cancels these updates first.
        window: layers cancelled around each layer; None takes the default for the model's depth.
        read_layer: whose output is read after a knockout; None takes round(0.83 * number of layers).
        notebook: the released notebook's choices.
        seed: of the draw of other subjects.
    """

    attributes: str = "bundled"
    positions: tuple[str, ...] = POSITIONS
    kept: int | None = KEPT
    top: int = TOP
    others: int = 10
    knockout: Sublayer | None = None
    window: int | None = None
    read_layer: int | None = None
    notebook: bool = False
    seed: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class EnrichmentResult:
    """The grid [position, layer]; all rates in percent.

    Attributes:
        p_target, rank: of the target in the model's output.
        source: where the attributes come from, with the fingerprint of the content.
        attributes: the subject's attribute tokens.
        positions: rows of the arrays, by name. layers: columns; block outputs, -1 the mean input embedding. With a
            knockout the centres of the windows (``notebook``: their first layers).
        rate, precision: NaN where not computed, or where there is no such cell.
        other_rates: [draw, position, layer], for other subjects' attributes.
        places: [position, layer, attribute]: place among the kept tokens, from 1; 0 where it is not among them.
        ceiling: the highest rate possible.
        base_rate, base_other_rates: with a knockout, of the same state when nothing is cancelled; else None, and none.
        read_layer, window: of a knockout; None and 0 without.
    """

    spec: EnrichmentSpec
    query: TokenizedQuery
    model: ModelInfo
    target: Target
    p_target: float
    rank: int
    source: str
    attributes: tuple[Attribute, ...]
    positions: tuple[str, ...]
    layers: tuple[int, ...]
    rate: np.ndarray
    precision: np.ndarray
    other_rates: np.ndarray
    places: np.ndarray
    ceiling: float
    base_rate: float | None
    base_other_rates: tuple[float, ...]
    read_layer: int | None
    window: int
    warnings: tuple[str, ...]
    seconds: float
    passes: int

    @property
    def n_attributes(self) -> int:
        """How many attribute tokens are known."""
        return len(self.attributes)

    @property
    def other_rate(self) -> np.ndarray:
        """Mean over the other subjects, [position, layer]; NaN without any."""
        return self.other_rates.mean(axis=0) if len(self.other_rates) else np.full(self.rate.shape, np.nan)

    @property
    def beats_null(self) -> np.ndarray:
        """Where the rate is higher than that for every other subject, [position, layer]."""
        if not len(self.other_rates):
            return np.zeros(self.rate.shape, dtype=bool)
        return self.rate > self.other_rates.max(axis=0)

    @property
    def base_beats_null(self) -> bool:
        """With a knockout: whether there is anything to lose."""
        return self.base_rate is not None and self.base_rate > max(self.base_other_rates, default=np.inf)

    def table(self) -> pd.DataFrame:
        """One row per (position, layer) that was computed: the contract's columns for ``enrich``."""
        others = self.other_rate
        rows = [
            (name, layer, float(self.rate[i, j]), self.ceiling, float(others[i, j]))
            for i, name in enumerate(self.positions)
            for j, layer in enumerate(self.layers)
            if not np.isnan(self.rate[i, j])
        ]
        return pd.DataFrame(rows, columns=["position", "layer", "attributes_rate", "ceiling", "other_subject_rate"])


def default_window(n_layers: int) -> int:
    """Layers whose updates are cancelled together: 10 of 48, at least 1."""
    return max(1, round(10 * n_layers / 48))


def default_read_layer(n_layers: int) -> int:
    """The layer that is read after a knockout: 40 of 48."""
    return min(n_layers - 1, round(0.83 * n_layers))


def run(
    model: ModelHandle,
    query: Query | TokenizedQuery,
    spec: EnrichmentSpec | None = None,
    *,
    progress: Progress = silent,
) -> EnrichmentResult:
    """Measure the attributes rate, or what becomes of it when a sublayer is knocked out.

    Raises:
        InputError: the query, the spec or the source of attributes cannot be used, or it knows none of the subject.
        CapabilityError: the model's states cannot be projected, or its updates cannot be cancelled.
    """
    spec = spec or EnrichmentSpec()
    model.require("lens", "the attributes rate")
    timed = Timed(progress)
    seen = tokenized(model, query)
    attributes = gather(
        model, seen, spec.attributes,
        kept=spec.kept, top=spec.top, others=spec.others, notebook=spec.notebook, seed=spec.seed,
    )  # fmt: skip
    work = _plain(model, seen, spec) if spec.knockout is None else _knockout(model, seen, spec, spec.knockout, timed)
    target = resolve_target(model, seen, work.logits)
    warnings = (*seen.warnings, *target_warnings(model, seen, target), *attributes.warnings, *work.warnings)
    grid = _Grid(work, attributes)
    base = None if work.base is None else attributes.rates(work.base[None])
    done = 0

    def snapshot() -> EnrichmentResult:
        return EnrichmentResult(
            spec=spec, query=seen, model=model.info, target=target,
            p_target=float(measures.probability(work.logits, target.id)),
            rank=int(measures.rank(work.logits, target.id)),
            source=attributes.source, attributes=attributes.listed, positions=work.positions, layers=work.layers,
            ceiling=attributes.ceiling, base_rate=None if base is None else float(base.rate[0]),
            base_other_rates=() if base is None else tuple(base.others[:, 0].tolist()),
            read_layer=work.read_layer, window=work.window, warnings=(*warnings, *grid.warnings()),
            seconds=timed.seconds, passes=done, **grid.copies(),
        )  # fmt: skip

    timed(0, work.total, None)
    for cells, states in work.answers:
        grid.fill(cells, attributes.rates(states))
        done += len(cells) if spec.knockout else 1
        timed(done, work.total, snapshot())
    return snapshot()


Cell = tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Work:
    """What is to be measured.

    Attributes:
        answers: cells (position, layer, by index) and their states, some at a time; ``total`` in all.
        base: the state that a knockout starts from.
    """

    logits: Tensor
    positions: tuple[str, ...]
    layers: tuple[int, ...]
    answers: Iterator[tuple[list[Cell], Tensor]]
    total: int
    base: Tensor | None = None
    read_layer: int | None = None
    window: int = 0
    warnings: tuple[str, ...] = ()


class _Grid:
    """Arrays that fill in as states are answered."""

    def __init__(self, work: _Work, attributes: Attributes) -> None:
        shape = len(work.positions), len(work.layers)
        self.rate, self.precision = np.full(shape, np.nan), np.full(shape, np.nan)
        self.other_rates = np.full((len(attributes.others), *shape), np.nan)
        self.places = np.zeros((*shape, len(attributes.own)), dtype=np.int32)
        self._kept, self._fewest = attributes.kept, attributes.kept

    def fill(self, cells: list[Cell], found: Rates) -> None:
        """Write down some cells."""
        rows, columns = (list(part) for part in zip(*cells, strict=True))
        self.rate[rows, columns], self.precision[rows, columns] = found.rate, found.precision
        self.other_rates[:, rows, columns] = found.others
        self.places[rows, columns] = found.places
        self._fewest = min(self._fewest, int(found.counted.min()))

    def warnings(self) -> tuple[str, ...]:
        """Where the filter left fewer tokens than are to be kept."""
        if self._fewest >= self._kept:
            return ()
        return (f"of some states only {self._fewest} of {self._kept} tokens were left to be counted",)

    def copies(self) -> dict[str, Any]:
        """The arrays as they are now."""
        return {name: array.copy() for name, array in vars(self).items() if isinstance(array, np.ndarray)}


# ------------------------------------------------------------------------------------------------- the plain rate


def _plain(model: ModelHandle, query: TokenizedQuery, spec: EnrichmentSpec) -> _Work:
    names, warnings = _positions(query, spec.positions)
    layers, states, logits = record_states(model, query, "block")
    mean = MEAN_EMBEDDING in names
    columns = layers if mean else layers[1:]
    rows = [(i, query.positions(name)[0]) for i, name in enumerate(names) if name != MEAN_EMBEDDING]
    cells = [(i, columns.index(layer)) for i, _ in rows for layer in layers[1:]]
    chosen = states[1:, [at for _, at in rows]].transpose(0, 1).flatten(0, 1)

    def answers() -> Iterator[tuple[list[Cell], Tensor]]:
        if mean:
            yield [(names.index(MEAN_EMBEDDING), 0)], mean_embedding(model, query)[None]
        if cells:
            yield cells, chosen

    return _Work(
        logits=logits, positions=names, layers=columns, answers=answers(), total=mean + bool(cells), warnings=warnings
    )


def _positions(query: TokenizedQuery, names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of single positions, and a warning for one that this prompt has not.

    Raises:
        SpecError: none, one twice, or one that stands for several positions.
    """
    plain = tuple(name.strip().lower() for name in names)
    if not plain or len(set(plain)) < len(plain):
        raise SpecError(f"positions {', '.join(names)!r} name none, or one twice", "name each once")
    if "subject-after" in plain and query.subject is not None and query.subject[1] > query.last:
        missing = ("the subject ends the prompt: there is no position after it",)
        plain = tuple(name for name in plain if name != "subject-after") or ("subject-last",)
    else:
        missing = ()
    for name in plain:
        if name != MEAN_EMBEDDING and len(query.positions(name)) != 1:
            raise SpecError(
                f"{name!r} is not one position",
                f"choose among {', '.join(POSITIONS)}, or name single positions such as 0",
            )
    return plain, missing


def mean_embedding(model: ModelHandle, query: TokenizedQuery) -> Tensor:
    """Mean of what the embedding module gives for the subject's tokens, [d_model]."""
    if query.subject is None:
        raise SubjectError("the mean embedding is the subject's, and none is named", "name the subject")
    plan = Plan(capture=frozenset({("embedding", 0)}), stop_after=0)
    with suppress(Stopped):
        model.forward(torch.tensor([query.ids], device=model.device), plan, last=1)
    return plan.captured["embedding", 0][0, slice(*query.subject)].mean(dim=0)


# ------------------------------------------------------------------------------------------------- the knockout


def _knockout(model: ModelHandle, query: TokenizedQuery, spec: EnrichmentSpec, site: Sublayer, timed: Timed) -> _Work:
    if site not in get_args(Sublayer):
        raise SpecError(f"knockout {site!r} is unknown", f"choose one of {', '.join(get_args(Sublayer))}")
    if query.subject is None:
        raise SubjectError("a sublayer knockout is at the subject, and none is named", "name the subject")
    n = model.info.n_layers
    read = default_read_layer(n) if spec.read_layer is None else spec.read_layer
    if not 0 <= read < n:
        raise SpecError(f"read layer {read} is not between 0 and {n - 1}", "choose a layer that the model has")
    size, warnings = _window(spec, n)
    start, stop = query.subject
    ids = query.ids[:stop]  # what comes behind the subject cannot reach it
    logits = model.forward(torch.tensor([query.ids], device=model.device), last=1)[0, -1]
    windows = _windows(spec, size, read, n)
    if spec.notebook:
        base, answers = _in_the_notebook(model, ids, site, windows, read, timed)
    else:
        runs = [
            Intervention(
                patches=tuple(Patch(layer=at, site=site, positions=tuple(range(start, stop))) for at in layers)
            )
            for layers in windows
        ]
        base, answers = _by_zeros(model, ids, site, runs, read, timed)
    return _Work(
        logits=logits, positions=("subject-last",), layers=tuple(range(len(windows))), answers=answers,
        total=len(windows), base=base, read_layer=read, window=size, warnings=warnings,
    )  # fmt: skip


def _window(spec: EnrichmentSpec, n_layers: int) -> tuple[int, tuple[str, ...]]:
    default = NOTEBOOK_WINDOW if spec.notebook else default_window(n_layers)
    size = default if spec.window is None else spec.window
    if spec.window is not None and not 1 <= size <= n_layers:
        raise SpecError(f"window {size} is not between 1 and {n_layers}", "choose a number of layers of the model")
    if size > n_layers / 2:
        return size, (f"a window of {size} covers more than half of the {n_layers} layers: its place says little",)
    return size, ()


def _windows(spec: EnrichmentSpec, size: int, read: int, n_layers: int) -> list[range]:
    """The layers that each run cancels."""
    if spec.notebook:
        return [range(first, min(first + size, read)) for first in range(max(1, read))]
    return [window(center, size, n_layers) for center in range(n_layers)]


Answers = Iterator[tuple[list[Cell], Tensor]]


def _by_zeros(
    model: ModelHandle, ids: tuple[int, ...], site: Sublayer, runs: list[Intervention], read: int, timed: Timed
) -> tuple[Tensor, Answers]:
    """The state that is read, plain and under every run, by the engine."""
    base = record_base(model, ids, updates=(site,)).up_to(read)
    order = coarse_to_fine(len(runs))

    def answers() -> Answers:
        for indices, readout in engine.run(model, base, [runs[i] for i in order], step=timed.step):
            yield [(0, order[i]) for i in indices], readout.final_states()[:, 0, 0]

    return base.states[-1][0, -1], answers()


def _in_the_notebook(
    model: ModelHandle, ids: tuple[int, ...], site: Sublayer, windows: list[range], read: int, timed: Timed
) -> tuple[Tensor, Answers]:
    """The same by one forward a window, up to the layer that is read."""
    if site == "mlp":
        model.require("dense_mlp", "the notebook's knockout of MLPs")
    else:
        model.require("packed", "the notebook's knockout of attention")
    tokens = torch.tensor([ids], device=model.device)

    def state(layers: range) -> Tensor:
        plan = Plan(
            stop_after=read,
            capture=frozenset({("output", read)}),
            added={("down_projection", at): silenced(model, at) for at in layers} if site == "mlp" else {},
        )
        if site == "attention" and len(layers):
            even = _EvenAttention(frozenset(layers))
            plan.enter, plan.attend = even.enter, even.attend
        with suppress(Stopped):
            model.forward(tokens, plan, last=1)
        return plan.captured["output", read][0, -1]

    def answers() -> Answers:
        for i in coarse_to_fine(len(windows)):
            timed.step()
            yield [(0, i)], state(windows[i])[None]

    return state(range(0)), answers()


@dataclass
class _EvenAttention:
    """Attention that gives every token that it may see the same weight, in some layers."""

    layers: frozenset[int]
    _layer: int = field(default=-1, init=False)

    def enter(self, layer: int, hidden: Tensor) -> Tensor:
        """Notes which block runs."""
        self._layer = layer
        return hidden

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """An attention function as transformers calls it."""
        if self._layer not in self.layers:
            plain: Callable[..., tuple[Tensor, Tensor | None]] = eager_attention(module)
            return plain(module, query, key, value, mask, **options)
        edges = allowed(mask, query.shape[2]).to(value)
        weights = edges / edges.sum(dim=-1, keepdim=True)
        mixed = torch.einsum("qk,rhkd->rqhd", weights, value)
        return mixed.repeat_interleave(query.shape[1] // value.shape[1], dim=2).contiguous(), None

"""The rows of the benchmark: two ways to answer a question, how far they are apart, how long they take."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import references
from benchmarks.shapes import Shape
from benchmarks.timing import interleaved, median
from factscope.experiments.attention_knockout import KnockoutResult, KnockoutSpec
from factscope.experiments.attention_knockout import run as knockout
from factscope.experiments.logit_lens import LensSpec
from factscope.experiments.logit_lens import run as lens

ROUNDING = 1e-5
MOVES = 0.05


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison.

    Attributes:
        experiment, model, tokens, reference: what was asked of which model, and against what.
        seconds, reference_seconds: CPU seconds of every round; a sampled reference is scaled to all cells.
        sampled: cells that the reference ran a round; 0 where it ran all. cells: of the whole.
        difference: largest deviation of a probability. moved: share of cells that move p by more than 0.05.
        at_least: the ratio that must be reached, None where none is set.
    """

    experiment: str
    model: str
    tokens: int
    reference: str
    seconds: list[float]
    reference_seconds: list[float]
    cells: int
    sampled: int
    difference: float
    moved: float
    at_least: float | None

    @property
    def ratio(self) -> float:
        """Median of the rounds' ratios."""
        return median([slow / fast for slow, fast in zip(self.reference_seconds, self.seconds, strict=True)])

    @property
    def same_numbers(self) -> bool:
        """Are the two answers one answer?"""
        return self.difference <= ROUNDING

    @property
    def ok(self) -> bool:
        """Same numbers, and fast enough."""
        return self.same_numbers and (self.at_least is None or self.ratio >= self.at_least)


def knockout_map(
    shape: Shape,
    tokens: int,
    *,
    window: int,
    rounds: int,
    sample: int = 0,
    at_least: float | None = None,
    seed: int = 0,
) -> Row:
    """The map, every position and layer, against one full forward per cell or a sample of the cells."""
    ids, query = shape.prompt(tokens)
    spec = KnockoutSpec(sources=("each",), window=window)
    n_layers = shape.plain.config.n_layer
    cells = [(position, layer) for position in range(tokens) for layer in range(n_layers)]
    chosen = random.Random(seed).sample(cells, sample) if sample else cells
    result = knockout(shape.handle, query, spec)
    target = result.target.ids[0]

    def per_cell() -> dict[references.Cell, float]:
        return {cell: references.knockout_cell(shape.plain, ids, cell, window, target) for cell in chosen}

    difference = max(abs(p - result.p_knockout[cell]) for cell, p in per_cell().items())
    seconds = interleaved({"ours": lambda: knockout(shape.handle, query, spec), "theirs": per_cell}, rounds)
    return Row(
        experiment=f"knockout map, window {window}",
        model=shape.name,
        tokens=tokens,
        reference="one full forward per cell",
        seconds=seconds["ours"],
        reference_seconds=[s * len(cells) / len(chosen) for s in seconds["theirs"]],
        cells=len(cells),
        sampled=sample,
        difference=float(difference),
        moved=moved(result),
        at_least=at_least,
    )


def knockout_batched(shape: Shape, tokens: int, *, window: int, rounds: int, layers: int = 0, seed: int = 0) -> Row:
    """The map against plain hooks with 16 cells a batch; with ``layers`` only so many layers of it, scaled."""
    ids, query = shape.prompt(tokens)
    spec = KnockoutSpec(sources=("each",), window=window)
    n_layers = shape.plain.config.n_layer
    centers = sorted(random.Random(seed).sample(range(n_layers), layers or n_layers))
    cells = [(position, layer) for position in range(tokens) for layer in centers]
    result = knockout(shape.handle, query, spec)
    target = result.target.ids[0]

    def batched() -> dict[references.Cell, float]:
        return references.knockout_batched(shape.plain, ids, cells, window, target)

    difference = max(abs(p - result.p_knockout[cell]) for cell, p in batched().items())
    seconds = interleaved({"ours": lambda: knockout(shape.handle, query, spec), "theirs": batched}, rounds)
    return Row(
        experiment=f"knockout map, window {window}",
        model=shape.name,
        tokens=tokens,
        reference="plain hooks, 16 cells a batch",
        seconds=seconds["ours"],
        reference_seconds=[s * n_layers / len(centers) for s in seconds["theirs"]],
        cells=tokens * n_layers,
        sampled=len(cells) if layers else 0,
        difference=float(difference),
        moved=moved(result),
        at_least=None,
    )


def lens_grid(shape: Shape, tokens: int, *, rounds: int, top_k: int = 10) -> Row:
    """The lens, all layers and positions, against a loop over layers with the same outputs."""
    ids, query = shape.prompt(tokens)
    spec = LensSpec(top_k=top_k)
    result = lens(shape.handle, query, spec)
    target = result.target.ids[0]

    def loop() -> dict[str, Any]:
        return references.lens(shape.plain, ids, top_k, target)

    found = loop()
    difference = max(
        float(np.abs(found["probability"].numpy() - result.target_probability).max()),
        float(np.abs(found["top_probability"].numpy() - result.top_probability).max()),
    )
    seconds = interleaved({"ours": lambda: lens(shape.handle, query, spec), "theirs": loop}, rounds)
    steps = np.abs(np.diff(result.top_probability[:, :, 0], axis=0))
    return Row(
        experiment=f"lens, top {top_k}",
        model=shape.name,
        tokens=tokens,
        reference="final norm and head, layer by layer",
        seconds=seconds["ours"],
        reference_seconds=seconds["theirs"],
        cells=result.entropy.size,
        sampled=0,
        difference=difference,
        moved=float((steps > MOVES).mean()),
        at_least=None,
    )


def moved(result: KnockoutResult) -> float:
    """Share of the cells that move p by more than 0.05: without any, equal numbers would say nothing."""
    return float((np.abs(result.p_knockout - result.p_base) > MOVES).mean())

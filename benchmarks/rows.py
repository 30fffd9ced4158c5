"""The rows of the benchmark: two ways to answer a question, how far they are apart, how long they take."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks import ours, references
from benchmarks.references import Cell
from benchmarks.shapes import Shape
from benchmarks.timing import interleaved, median
from factscope.editors.prompts import Rows
from factscope.experiments.attention_knockout import KnockoutSpec
from factscope.experiments.attention_knockout import run as knockout
from factscope.experiments.logit_lens import LensSpec
from factscope.experiments.logit_lens import run as lens

ROUNDING = 1e-5
COARSE = 1e-4
"""Farther than this from its own float64 no float32 computation is by rounding: the reference is another one."""
MOVES = 0.05
GATE = 4
"""Cells whose numbers are compared before anything is timed; the timed runs' own numbers are compared after."""
SAMPLES, NOISED, NOISE = 10, (1, 2, 3, 4), 0.5
"""Noise samples, noised positions, and the noise's standard deviation, as large as the embedding's."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison.

    Attributes:
        experiment, model, tokens, reference: what was asked of which model, and against what.
        seconds, reference_seconds: CPU seconds of every round; a sampled reference is scaled to all cells. Empty where
            the numbers differed before anything was timed.
        sampled: cells that the reference ran a round; 0 where it ran all. cells: of the whole.
        difference: largest deviation of a probability. exact: whether from the reference's computation in float64, to
            which both are held where two float32 computations are further apart than the limit.
        moved: share of cells that move p by more than 0.05.
        at_least: the ratio that must be reached, None where none is set. aim: the one that is wished for.
        profile: where the time went, for a row that misses either.
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
    at_least: float | None = None
    aim: float | None = None
    exact: bool = False
    profile: dict[str, Any] | None = None

    @property
    def ratio(self) -> float:
        """Median of the rounds' ratios; where the reference ran once, of the seconds."""
        if len(self.reference_seconds) != len(self.seconds):
            return median(self.reference_seconds) / median(self.seconds)
        pairs = zip(self.reference_seconds, self.seconds, strict=True)
        return median([slow / fast for slow, fast in pairs] or [0.0])

    @property
    def same_numbers(self) -> bool:
        """Are the two answers one answer?"""
        return self.difference <= ROUNDING

    @property
    def ok(self) -> bool:
        """Same numbers, and fast enough."""
        return self.same_numbers and (self.at_least is None or self.ratio >= self.at_least)

    @property
    def aimed(self) -> bool:
        """Same numbers, and as fast as was wished for."""
        return self.ok and (self.aim is None or self.ratio >= self.aim)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Two ways to the same numbers by cell.

    Attributes:
        fast, slow: the numbers of some cells. exact: the slow way in float64, if there is one.
        p_base: of a run without a cell, which those that move p move away from.
        sample: cells that the slow way runs a round, drawn anew; 0 runs all.
        once: the slow way runs in the first round alone.
        flat: cells whose numbers need not be a cell each (a lens): no sample, no gate on a part.
    """

    experiment: str
    reference: str
    shape: Shape
    tokens: int
    cells: Sequence[Cell]
    fast: Callable[[Sequence[Cell]], Mapping[Cell, Any]]
    slow: Callable[[Sequence[Cell]], Mapping[Cell, Any]]
    p_base: float
    sample: int = 0
    seed: int = 0
    at_least: float | None = None
    aim: float | None = None
    once: bool = False
    flat: bool = False
    exact: Callable[[Sequence[Cell]], Mapping[Cell, Any]] | None = None

    def chosen(self, number: int) -> list[Cell]:
        """What the slow way runs in a round; the gate is round -1."""
        size = min(GATE if number < 0 else self.sample or len(self.cells), len(self.cells))
        if self.flat or size == len(self.cells):
            return list(self.cells)
        return random.Random(1000 * self.seed + number + 1).sample(list(self.cells), size)


def apart(fast: Mapping[Cell, Any], slow: Mapping[Cell, Any]) -> float:
    """Largest deviation of the slow way's numbers from the fast way's; NaN counts as infinite."""
    largest = max(float(np.max(np.abs(np.asarray(fast[cell]) - np.asarray(slow[cell])))) for cell in slow)
    return float("inf") if np.isnan(largest) else largest


def measure(task: Task, rounds: int) -> Row:
    """Compare, then time, then compare what was timed."""
    row = Row(
        experiment=task.experiment,
        model=task.shape.name,
        tokens=task.tokens,
        reference=task.reference,
        seconds=[],
        reference_seconds=[],
        cells=len(task.cells),
        sampled=0 if len(task.chosen(0)) == len(task.cells) else task.sample,
        difference=float("inf"),
        moved=0.0,
        at_least=task.at_least,
        aim=task.aim,
    )
    gate = task.chosen(-1)
    row = _compared(row, task, [(task.fast(gate), task.slow(gate))])
    if not row.same_numbers:
        return row
    slow_rounds = 1 if task.once else rounds
    actions: dict[str, Callable[[int], Mapping[Cell, Any]]] = {
        "ours": lambda number: task.fast(task.cells),
        "theirs": lambda number: task.slow(task.chosen(number)) if number < slow_rounds else {},
    }
    seconds, given = interleaved(actions, rounds)
    row = _compared(row, task, [(found["ours"], found["theirs"] or given[0]["theirs"]) for found in given])
    scale = len(task.cells) / len(task.chosen(0))
    return replace(
        row,
        seconds=seconds["ours"],
        reference_seconds=[s * scale for s in seconds["theirs"][:slow_rounds]],
        moved=_moved(task, given[0]["ours"]),
    )


def _compared(row: Row, task: Task, pairs: Sequence[tuple[Mapping[Cell, Any], Mapping[Cell, Any]]]) -> Row:
    """The row with the largest deviation so far."""
    before = 0.0 if row.difference == float("inf") else row.difference
    largest = max([before, *(apart(fast, slow) for fast, slow in pairs)])
    if largest <= ROUNDING or task.exact is None or not np.isfinite(largest):
        return replace(row, difference=largest)
    exact = task.exact(sorted({cell for _, slow in pairs for cell in slow}))
    if max(apart({cell: exact[cell] for cell in slow}, slow) for _, slow in pairs) > COARSE:
        return replace(row, difference=largest)
    held = [apart(fast, {cell: exact[cell] for cell in slow}) for fast, slow in pairs]
    return replace(row, difference=max([before, *held]), exact=True)


def _moved(task: Task, found: Mapping[Cell, Any]) -> float:
    """Share of the cells that move p: without any, equal numbers would say nothing.

    For a lens: of steps from layer to layer that move the probability of the first choice as much.
    """
    if task.flat:
        first = np.array([found[cell][0] for cell in task.cells]).reshape(-1, task.tokens)
        return float((np.abs(np.diff(first, axis=0)) > MOVES).mean())
    return float(np.mean([abs(p - task.p_base) > MOVES for p in found.values()]))


# ---------------------------------------------------------------------------- what is asked


def grid(shape: Shape, tokens: int) -> list[Cell]:
    """Every position, every layer."""
    return [(position, layer) for position in range(tokens) for layer in range(shape.handle.info.n_layers)]


def top(shape: Shape, ids: list[int]) -> tuple[int, float]:
    """The model's first choice after a prompt, and its probability."""
    with torch.no_grad():
        p = shape.plain(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1].softmax(dim=-1)
    return int(p.argmax()), float(p.max())


def knockouts(shape: Shape, tokens: int, *, size: int = 9, batched: bool = False, **fields: Any) -> Task:
    """Attention knockout, last position to each, against one forward per cell or 16 cells a batch."""
    ids = shape.ids(tokens, seed=tokens)
    target, p_base = top(shape, ids)
    rows = torch.tensor([ids])
    batch = 16 if batched else 1

    def slow(model: Any, cells: Sequence[Cell]) -> dict[Cell, float]:
        return references.knockout_batched(model, rows, cells, size, target, batch)

    return Task(
        experiment=f"attention knockout, window {size}",
        reference="plain hooks, 16 cells a batch" if batched else "one forward per cell",
        shape=shape,
        tokens=tokens,
        cells=grid(shape, tokens),
        fast=lambda cells: ours.knockout(shape.handle, ids, cells, size, target),
        slow=lambda cells: slow(shape.plain, cells),
        exact=lambda cells: slow(shape.exact(), cells),
        p_base=p_base,
        seed=tokens,
        **fields,
    )


def traces(shape: Shape, tokens: int, *, site: ours.Site = "output", size: int = 1, **fields: Any) -> Task:
    """Causal trace of block outputs or of windows of updates, against one batch of a clean and ten noised rows."""
    ids = shape.ids(tokens, seed=tokens)
    target, _ = top(shape, ids)
    rows, cells = torch.tensor([ids]), grid(shape, tokens)
    values = ours.noise_values(SAMPLES, len(NOISED), shape.handle.info.d_model, NOISE)
    noise: dict[str, Any] = {"values": values, "noised": NOISED, "site": site, "size": size}
    unrestored = references.trace_cell(shape.plain, rows, (0, 0), target, **noise)  # position 0 carries no noise

    def slow(model: Any, cells: Sequence[Cell]) -> dict[Cell, float]:
        return {cell: references.trace_cell(model, rows, cell, target, **noise) for cell in cells}

    what = "block outputs" if site == "output" else f"{'MLP' if site == 'mlp' else site} updates, window {size}"
    return Task(
        experiment=f"causal trace, {what}, {SAMPLES} samples",
        reference=f"one forward of {1 + SAMPLES} rows per cell, as in ROME",
        shape=shape,
        tokens=tokens,
        cells=cells,
        fast=lambda cells: ours.trace(shape.handle, ids, cells, target, **noise),
        slow=lambda cells: slow(shape.plain, cells),
        exact=lambda cells: slow(shape.exact(), cells),
        p_base=unrestored,
        seed=tokens,
        **fields,
    )


def zeros(shape: Shape, tokens: int, *, site: Any = "mlp", size: int = 10, **fields: Any) -> Task:
    """Updates of a window of layers set to zero at each position of the clean run, against one forward per cell."""
    ids = shape.ids(tokens, seed=tokens)
    target, p_base = top(shape, ids)
    rows = torch.tensor([ids])

    def cell_by_cell(model: Any, cells: Sequence[Cell]) -> dict[Cell, float]:
        return {cell: references.zero_cell(model, rows, cell, target, site=site, size=size) for cell in cells}

    return Task(
        experiment=f"zeroed {'MLP' if site == 'mlp' else site} updates, window {size}",
        reference="one forward per cell",
        shape=shape,
        tokens=tokens,
        cells=grid(shape, tokens),
        fast=lambda cells: ours.zero(shape.handle, ids, cells, target, site=site, size=size),
        slow=lambda cells: cell_by_cell(shape.plain, cells),
        exact=lambda cells: cell_by_cell(shape.exact(), cells),
        p_base=p_base,
        seed=tokens,
        **fields,
    )


def lenses(shape: Shape, tokens: int, *, top_k: int = 10, **fields: Any) -> Task:
    """The lens, all positions and layers and the embedding, against a loop over layers with the same outputs."""
    ids = shape.ids(tokens, seed=tokens)
    target, p_base = top(shape, ids)
    rows, n = torch.tensor([ids]), shape.handle.info.n_layers

    def fast(cells: Sequence[Cell]) -> dict[Cell, np.ndarray]:
        found = ours.lens(shape.handle, ids, top_k, target)
        return _by_cell(cells, found.top_probability, found.probability[:, 0], tokens)

    def slow(model: Any, cells: Sequence[Cell]) -> dict[Cell, np.ndarray]:
        found = references.lens(model, rows, top_k, target)
        return _by_cell(cells, found["top_probability"].flatten(0, 1), found["probability"].flatten(), tokens)

    return Task(
        experiment=f"lens, top {top_k}",
        reference="final norm and head, layer by layer",
        shape=shape,
        tokens=tokens,
        cells=[(position, layer) for layer in range(-1, n) for position in range(tokens)],
        fast=fast,
        slow=lambda cells: slow(shape.plain, cells),
        exact=lambda cells: slow(shape.exact(), cells),
        p_base=p_base,
        flat=True,
        **fields,
    )


def values(shape: Shape, tokens: int, *, steps: int = 20, layer: int | None = None, **fields: Any) -> Task:
    """Steps of ROME's search for v* on 21 contexts and the subject's essence, against full forwards of all rows.

    Cells are (0, step). Both ways are given the same changes, those of a search with large steps, so that rounding does
    not add up; the gradient is computed in each and compared by the tests of the editors. The search itself goes our
    way, which is the quicker one.

    Args:
        layer: whose MLP writes something else; None takes as deep a one as ROME's of GPT-2 XL.
    """
    asked, target = _contexts(shape, tokens)
    layer = shape.handle.info.n_layers * 17 // 48 if layer is None else layer
    at, read = asked.at, [int(place) for place in asked.read[:, 0]]
    changes = ours.value_search(shape.handle, asked, target, layer, steps)
    p_base = float(references.value_step(shape.plain, asked.ids, at, read, target, layer, changes[0])[0][0])

    def fast(cells: Sequence[Cell]) -> dict[Cell, float]:
        found = ours.value_steps(shape.handle, asked, target, layer, [changes[step] for _, step in cells])
        return {cell: float(p[0]) for cell, (p, _) in zip(cells, found, strict=True)}

    def step_by_step(model: Any, cells: Sequence[Cell]) -> dict[Cell, float]:
        double = next(model.parameters()).dtype == torch.float64
        given = [changes[step].double() if double else changes[step] for _, step in cells]
        found = [references.value_step(model, asked.ids, at, read, target, layer, change) for change in given]
        return {cell: float(p[0]) for cell, (p, _) in zip(cells, found, strict=True)}

    return Task(
        experiment=f"v* of ROME, {len(at)} rows of up to {max(asked.lengths)} tokens, a step",
        reference="a full forward and backward a step, as in ROME",
        shape=shape,
        tokens=tokens,
        cells=[(0, step) for step in range(steps)],
        fast=fast,
        slow=lambda cells: step_by_step(shape.plain, cells),
        exact=lambda cells: step_by_step(shape.exact(), cells),
        p_base=p_base,
        seed=tokens,
        **fields,
    )


def _contexts(shape: Shape, tokens: int) -> tuple[Rows, int]:
    """The prompt, ten times behind five tokens and ten times behind ten; the subject is its tokens 1..4.

    The target is the model's first choice.
    """
    ids = shape.ids(tokens, seed=tokens)
    generator = torch.Generator().manual_seed(tokens)
    fronts = [0] + [5] * 10 + [10] * 10
    given = [
        [*torch.randint(1, shape.plain.config.vocab_size, (n,), generator=generator).tolist(), *ids] for n in fronts
    ]
    given.append([*ids[1:5], ids[0], ids[-1]])
    longest = max(map(len, given))
    with torch.no_grad():
        order = shape.plain(torch.tensor([ids]), use_cache=False).logits[0, -1].argsort(descending=True)
    return Rows(
        ids=torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in given]),
        lengths=tuple(map(len, given)),
        subjects=tuple([(n + 1, n + 5) for n in fronts] + [(0, 4)]),
        at=tuple([n + 4 for n in fronts] + [3]),
        read=torch.tensor([[n + tokens - 1] for n in fronts] + [[3]]),
        essence=True,
    ), int(order[0])


def bundled_knockouts(shape: Shape, tokens: int, *, size: int, **fields: Any) -> Task:
    """The experiment as the pages run it, on the bundled model, against one forward per cell."""
    ids, query = shape.prompt(tokens)
    spec = KnockoutSpec(sources=("each",), window=size)
    target, p_base = top(shape, ids[0].tolist())

    def fast(cells: Sequence[Cell]) -> dict[Cell, float]:
        p = knockout(shape.handle, query, spec).p_knockout
        return {cell: float(p[cell]) for cell in cells}

    def slow(model: Any, cells: Sequence[Cell]) -> dict[Cell, float]:
        return references.knockout_batched(model, ids, cells, size, target, 1)

    return Task(
        experiment=f"knockout map, window {size}",
        reference="one forward per cell",
        shape=shape,
        tokens=tokens,
        cells=grid(shape, tokens),
        fast=fast,
        slow=lambda cells: slow(shape.plain, cells),
        exact=lambda cells: slow(shape.exact(), cells),
        p_base=p_base,
        **fields,
    )


def bundled_lens(shape: Shape, tokens: int, *, top_k: int = 10, **fields: Any) -> Task:
    """The experiment as the pages run it, on the bundled model, against a loop over layers."""
    _, query = shape.prompt(tokens)
    task = lenses(shape, tokens, top_k=top_k, **fields)

    def fast(cells: Sequence[Cell]) -> dict[Cell, np.ndarray]:
        found = lens(shape.handle, query, LensSpec(top_k=top_k))
        tops = torch.from_numpy(found.top_probability).flatten(0, 1)
        return _by_cell(cells, tops, torch.from_numpy(found.target_probability).flatten(), tokens)

    return replace(task, fast=fast)


def _by_cell(cells: Sequence[Cell], tops: torch.Tensor, p: torch.Tensor, tokens: int) -> dict[Cell, np.ndarray]:
    """Probabilities of the first choices and of the target; rows are layer after layer."""
    numbers = torch.cat([tops, p[:, None]], dim=1).numpy()
    return {(position, layer): numbers[(layer + 1) * tokens + position] for position, layer in cells}

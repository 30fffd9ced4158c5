"""Any runs on any family: the engine, on each of its paths, against whole forwards of a copy (``tests/oracle/whole``).

What is drawn is a prompt, noise, edits of weights and a few runs with cuts and patches from several sources. The same
runs go through every path that the family has. ``HYPOTHESIS_PROFILE=thorough`` draws ten times as many.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from factscope.errors import SpecError
from factscope.interventions import engine
from factscope.interventions.attention import Cut
from factscope.interventions.base import Base, Noise
from factscope.interventions.intervention import Intervention, Patch
from factscope.interventions.weights import WeightDelta
from factscope.models.handle import ModelHandle
from tests.oracle.laboratory import handle_of
from tests.oracle.questions import Path, Setting, answered, expected, on_path, paths_of
from tests.oracle.whole import Seen, Whole
from tests.tiny_models import FAMILIES, N_LAYERS, VOCAB_SIZE, build

ROUNDING = 1e-5
"""How far a probability may be from the one computed in float64, over the whole vocabulary."""
MOVES = 1e-3
SCALES = {"gpt_neo": 1.0, "mamba": 1.0}
"""These two amplify rounding (GPT-Neo does not divide scores by the root of the head's size, Mamba multiplies along the
sequence): drawn at 1.5, their plain float32 forwards themselves are more than 1e-5 off."""
CHECKS = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
PHASES = (Phase.generate, Phase.shrink)
EXAMPLES, MOVING = {"dev": (3, 0), "thorough": (200, 130)}.get(os.environ.get("HYPOTHESIS_PROFILE", "ci"), (20, 13))
"""Examples for each family, and how many of them have to move some probability by more than ``MOVES``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """One family: its handles, one for each path, its whole forwards, and examples that amplify rounding."""

    name: str
    amplified: list[Plans] = field(default_factory=list)

    @cached_property
    def model(self) -> Any:
        return build(self.name, 0, scale=SCALES.get(self.name, 1.5))

    @cached_property
    def handles(self) -> dict[Path, ModelHandle]:
        verified = handle_of(self.model, self.name)
        return {path: on_path(verified, path) for path in paths_of(verified)}

    @cached_property
    def whole(self) -> Whole:
        return Whole(self.model)

    @property
    def any(self) -> ModelHandle:
        return next(iter(self.handles.values()))

    def can(self, capability: str) -> bool:
        return self.any.capabilities[capability].ok

    @property
    def embedding_width(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[1])


@lru_cache(maxsize=1)
def known(name: str) -> Known:
    return Known(name=name)


# ---------------------------------------------------------------------------- what is drawn


@dataclass(frozen=True, kw_only=True)
class NoisePlan:
    positions: tuple[int, ...]
    samples: int
    replace: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class EditPlan:
    layer: int
    place: Any
    rank: int | None
    bias: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class PatchPlan:
    layer: int
    site: Any
    positions: tuple[int, ...]
    source: str
    source_positions: tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    cuts: tuple[Cut, ...]
    patches: tuple[PatchPlan, ...]


@dataclass(frozen=True, kw_only=True)
class Plans:
    """One example.

    Attributes:
        recorded: whether the base keeps its own updates; it need not where only other runs' are put in.
    """

    ids: tuple[int, ...]
    other_ids: tuple[int, ...]
    n_readout: int
    noise: NoisePlan | None
    edits: tuple[EditPlan, ...]
    recorded: bool
    runs: tuple[RunPlan, ...]


SOURCES = ("zeros", "clean", "unedited", "own", "noisy", "other")
_SEEDS = st.integers(0, 10_000)


def _positions(length: int, most: int = 3) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(0, length - 1), min_size=1, max_size=most, unique=True).map(tuple)


def _cuts(family: Known, length: int) -> st.SearchStrategy[Cut]:
    heads: st.SearchStrategy[Any] = st.none()
    if family.can("head_knockout"):
        heads |= st.lists(st.integers(0, family.any.info.n_heads - 1), max_size=3, unique=True).map(tuple)
    late = st.integers(max(0, length - 2), length - 1).map(lambda q: (q,))
    return st.builds(
        Cut,
        layer=st.integers(0, N_LAYERS - 1),
        queries=late | _positions(length),
        keys=_positions(length),
        heads=heads,
    )


@st.composite
def _patches(draw: st.DrawFn, family: Known, length: int, other_length: int) -> PatchPlan:
    site = draw(st.sampled_from(("output", "attention", "mlp") if family.can("additive") else ("output",)))
    positions = draw(_positions(length))
    source = draw(st.sampled_from(SOURCES))
    there = other_length if source == "other" else length
    moved = st.lists(st.integers(0, there - 1), min_size=len(positions), max_size=len(positions)).map(tuple)
    where = draw(moved if source == "other" else st.none() | moved)
    return PatchPlan(
        layer=draw(st.integers(-1 if site == "output" else 0, N_LAYERS - 1)),
        site=site,
        positions=positions,
        source=source,
        source_positions=where,
    )


@st.composite
def _ids(draw: st.DrawFn, least: int) -> tuple[int, ...]:
    length, generator = draw(st.integers(least, 9)), torch.Generator().manual_seed(draw(_SEEDS))
    return tuple(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist())


@st.composite
def plans(draw: st.DrawFn, family: Known) -> Plans:
    ids, other_ids = draw(_ids(4)), draw(_ids(2))
    length = len(ids)
    noise = st.builds(
        NoisePlan, positions=_positions(length), samples=st.integers(1, 3), replace=st.booleans(), seed=_SEEDS
    )
    places = ["output_projection"] if family.name != "mamba" else []
    places += ["down_projection"] if family.can("dense_mlp") else []
    edit = st.builds(
        EditPlan,
        layer=st.integers(0, N_LAYERS - 1),
        place=st.sampled_from(places or [None]),
        rank=st.none() | st.integers(1, 2),
        bias=st.booleans(),
        seed=_SEEDS,
    )
    patch = _patches(family, length, len(other_ids))
    run = st.builds(RunPlan, cuts=st.just(()), patches=st.lists(patch, min_size=1, max_size=3).map(tuple))
    if family.can("knockout"):
        cuts = st.lists(_cuts(family, length), min_size=1, max_size=3).map(tuple)
        both = st.builds(RunPlan, cuts=cuts, patches=st.lists(patch, min_size=1, max_size=3).map(tuple))
        run |= both | st.builds(RunPlan, cuts=cuts, patches=st.just(()))
    return Plans(
        ids=ids,
        other_ids=other_ids,
        n_readout=draw(st.integers(1, 3)),
        noise=draw(st.none() | noise),
        edits=draw(st.just(()) | st.lists(edit, min_size=1, max_size=2).map(tuple)) if places else (),
        recorded=draw(st.booleans()),
        runs=tuple(draw(st.lists(run, min_size=2, max_size=4))),
    )


# ---------------------------------------------------------------------------- what it stands for


def _randn(number: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(number))


def _noise(family: Known, plan: NoisePlan, also: int = 0) -> Noise:
    values = _randn(plan.seed + also, plan.samples, len(plan.positions), family.embedding_width).double()
    return Noise(positions=plan.positions, values=values, replace=plan.replace)


def _delta(family: Known, plan: EditPlan) -> WeightDelta:
    d_in, d_out = family.whole.shape(plan.place, plan.layer)
    if plan.rank is None:
        left, right = None, _randn(plan.seed, d_in, d_out) * (0.5 * d_in**-0.5)
    else:
        left = _randn(plan.seed, d_in, plan.rank) * d_in**-0.5
        right = _randn(plan.seed + 1, plan.rank, d_out) * 0.7
    bias = _randn(plan.seed + 2, d_out) * 0.3 if plan.bias else None
    return WeightDelta(layer=plan.layer, place=plan.place, left=left, right=right, bias=bias)


def _settings(family: Known, plan: Plans) -> dict[str, Setting]:
    """The runs that patches are taken from, by name; ``own`` is the one that everything happens on."""
    noise = None if plan.noise is None else _noise(family, plan.noise)
    another = None if plan.noise is None else _noise(family, plan.noise, also=77)
    deltas = tuple(_delta(family, one) for one in plan.edits)
    return {
        "own": Setting(ids=plan.ids, n_readout=plan.n_readout, noise=noise, deltas=deltas),
        "clean": Setting(ids=plan.ids, n_readout=plan.n_readout, deltas=deltas),
        "unedited": Setting(ids=plan.ids),
        "noisy": Setting(ids=plan.ids, n_readout=plan.n_readout, noise=another, deltas=deltas),
        "other": Setting(ids=plan.other_ids),
    }


def _run(plan: RunPlan, bases: dict[str, Base]) -> Intervention:
    patches = tuple(
        Patch(
            layer=one.layer,
            site=one.site,
            positions=one.positions,
            source=bases.get(one.source),
            source_positions=one.source_positions,
        )
        for one in plan.patches
    )
    return Intervention(cuts=plan.cuts, patches=patches)


def _used(plan: Plans) -> set[str]:
    return {patch.source for run in plan.runs for patch in run.patches} - {"zeros"}


def _refused(base: Base, run: Intervention) -> bool:
    try:
        engine.refuse_empty_rows(base, [run])
    except SpecError:
        return True
    return False


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """The engine's side of one example: its bases and runs on one path."""

    path: Path
    handle: ModelHandle
    bases: dict[str, Base]
    runs: list[Intervention]

    def answers(self) -> Tensor:
        return answered(self.handle, self.bases["own"], self.runs, self.path)


def _asked(family: Known, plan: Plans, named: dict[str, Setting], path: Path) -> Asked:
    handle = family.handles[path]
    needed = plan.recorded or "own" in _used(plan)
    bases = {name: named[name].base(handle) for name in sorted(_used(plan) - {"own"})}
    bases["own"] = named["own"].base(handle, updates=None if needed else False)
    runs = [run for run in (_run(one, bases) for one in plan.runs) if not _refused(bases["own"], run)]
    return Asked(path=path, handle=handle, bases=bases, runs=runs)


def _seen(whole: Whole, named: dict[str, Setting], asked: Asked) -> dict[int, Sequence[Seen]]:
    return {id(base): named[name].forwards(whole) for name, base in asked.bases.items()}


def _rounding(family: Known, named: dict[str, Setting], asked: Asked, answers: Tensor) -> float:
    """How far the plain float32 model is from float64 on these runs."""
    narrow = Whole(family.model, wide=False)
    plain = expected(narrow, named["own"], asked.runs, _seen(narrow, named, asked))
    return float((plain - answers).abs().max())


def compare(family: Known, plan: Plans) -> float:
    """Ask both sides; return how far the runs moved any probability.

    An example that the plain float32 model itself gets wrong by about as much, by float64, is set aside.

    Raises:
        AssertionError: a path's answers differ from the whole forwards.
    """
    named = _settings(family, plan)
    answers = base_p = None
    for path in family.handles:
        asked = _asked(family, plan, named, path)
        if not asked.runs:
            return 0.0
        if answers is None or base_p is None:
            seen = _seen(family.whole, named, asked)
            answers = expected(family.whole, named["own"], asked.runs, seen)
            base_p = torch.stack([one.logits[-plan.n_readout :] for one in seen[id(asked.bases["own"])]]).softmax(-1)
            assert bool(torch.isfinite(answers).all())
        off = float((asked.answers() - answers).abs().max())
        if not off <= ROUNDING:
            float32 = _rounding(family, named, asked, answers)
            note(f"{path}: {off:.1e} away, float32 itself {float32:.1e}")
            assert off <= 3 * float32 <= 1e-4, f"{family.name}, {path}"
            family.amplified.append(plan)
    assert answers is not None
    assert base_p is not None
    return float((answers - base_p).abs().max())


@pytest.mark.parametrize("name", list(FAMILIES))
def test_any_runs_equal_whole_forwards(name: str) -> None:
    family = known(name)
    moved: list[float] = []

    @seed(zlib.crc32(name.encode()))
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=CHECKS, phases=PHASES)
    @given(plans(family))
    def check(plan: Plans) -> None:
        moved.append(compare(family, plan))

    check()
    assert len(family.amplified) <= EXAMPLES // 20
    assert sum(change > MOVES for change in moved) >= MOVING, sorted(moved)


def test_enough_examples_are_asked_for() -> None:
    assert MOVING == 0 or MOVING * len(FAMILIES) >= 500

"""Which states carry the fact? Causal tracing: corrupt the subject, restore one state, see whether the answer returns.

Source: Meng et al. 2022 (arXiv 2202.05262), section 2 and appendix B; Hase et al. 2023 (arXiv 2301.04213), section 3;
symmetric replacement of the subject: Zhang and Nanda 2023 (arXiv 2309.16042).

1. Run the plain model; p_clean is the target's probability, and every state is kept.
2. Corrupt the subject: add noise to the embedding module's output at its tokens, in several samples; p_corrupted is the
   mean of their probabilities (never of logarithms). Or run the prompt with another subject of as many tokens.
3. For every position and layer run the corrupted prompt again, with the block's output there (or the updates of its MLP
   or attention in a window of layers) put back to the plain run's; p_restored is the mean. The draws are the same in
   every cell and in step 2.
4. Severed: at the restored position the MLP's (or the attention's) updates of all layers stay as they were in step 2,
   so that the state acts by other ways alone.

Where this differs from the released code: with noise in the embeddings' place (``replace``), p_corrupted is measured
under it as well, not under added noise; a severed trace takes the same noise in both of its runs unless ``compat`` is
asked for. A window is ``range(l - k // 2, l + ceil(k / 2))``, as in that code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from factscope import measures
from factscope.editors.edit import put_in
from factscope.errors import SpecError, SubjectError
from factscope.experiments.replaced_subject import with_subject
from factscope.experiments.results import (
    BUNDLED,
    Progress,
    Timed,
    answer_logits,
    coarse_to_fine,
    foil_target,
    is_first_choice,
    named_target,
    resolve_target,
    scored_ids,
    silent,
    target_warnings,
    tokenized,
)
from factscope.experiments.traces import Cell, TraceResult, TraceSite, TraceSpec
from factscope.interventions import engine
from factscope.interventions.attention import window
from factscope.interventions.base import Base, Noise, Update, record_base
from factscope.interventions.engine import Readout
from factscope.interventions.intervention import Intervention, Patch, PatchSite
from factscope.interventions.noise import NoiseSource, noise_source
from factscope.models.handle import ModelHandle
from factscope.models.head import Scores, scores_of_logits
from factscope.queries import Query
from factscope.tokens import Target, TokenizedQuery

__all__ = ["Cell", "TraceResult", "TraceSpec", "default_trace_window", "run"]

ALL = "all"
MAX_SAMPLES = 1000
MAX_SEEDS = 100
SITES: dict[TraceSite, PatchSite] = {"hidden": "output", "mlp": "mlp", "attention": "attention"}


def default_trace_window(n_layers: int) -> int:
    """Ten layers of 48, scaled, at least one: 10 of 48, 6 of 28, 2 of 8."""
    return max(1, round(10 * n_layers / 48))


def run(
    model: ModelHandle, query: Query | TokenizedQuery, spec: TraceSpec | None = None, *, progress: Progress = silent
) -> TraceResult:
    """Corrupt the subject and restore single states.

    Raises:
        InputError: the query or the spec cannot be used, or the query has no subject.
        CapabilityError: updates are to be restored or severed in a model without an additive split.
    """
    spec = spec or TraceSpec()
    _check(model, spec)
    timed = Timed(progress)
    seen = tokenized(model, query)
    plan = _plan(model, seen, spec)
    timed(0, plan.n_runs, None)
    named = named_target(model, seen)
    scored = () if named is None else scored_ids(seen, named)
    ids, n_scored = [*seen.ids, *scored[:-1]], max(1, len(scored))
    clean = record_base(model, ids, n_readout=n_scored, updates=_updates(spec.site))
    target = named or resolve_target(model, seen, clean.logits[0, 0])
    score = _Score(target=target, foil=foil_target(model, seen, target), ids=scored or scored_ids(seen, target))
    corruption = _corruption(model, seen, spec, plan, ids[len(seen.ids) :], n_scored)
    timed.step()
    grid = _Grid(plan)
    done, warnings = 0, seen.warnings + target_warnings(model, seen, target) + plan.warnings
    clean_values = score.of_logits(clean)[:, 0]
    known = None if named is None else _known(model, seen, named, clean)

    def snapshot() -> TraceResult:
        return TraceResult(
            spec=spec, query=seen, model=model.info, target=target, window=plan.window, positions=plan.positions,
            layers=plan.layers, corrupted=plan.corrupted, noise_std=corruption.std, provenance=corruption.provenance,
            seeds=plan.seeds, p_clean=float(clean_values[0]), log_odds_clean=float(clean_values[1]),
            logit_difference_clean=float(clean_values[2]),
            rank=int(measures.rank(clean.logits[0, 0], target.id)), known=known, taught=_taught(model, seen),
            **grid.arrays(), warnings=warnings, seconds=timed.seconds, passes=done,
        )  # fmt: skip

    for number, (base, frozen) in enumerate(corruption.runs(plan.seeds)):
        grid.corrupted[:, number] = score.of_logits(frozen)[:, 0]
        timed(done, plan.n_runs, snapshot())
        restorations = _restorations(plan, spec, clean, frozen)
        for indices, readout in engine.run(model, base, restorations, step=timed.step):
            for index, values in zip(indices, score.of_runs(readout).T, strict=True):
                grid.restored[(slice(None), number, *plan.cells[index])] = values
            done += len(indices)
            timed(done, plan.n_runs, snapshot())
    return snapshot()


def _known(model: ModelHandle, query: TokenizedQuery, answer: Target, clean: Base) -> bool:
    """Of the whole answer, also where its first token alone is scored and the plain run ends before the others."""
    logits = clean.logits[0]
    whole = logits if len(logits) == answer.n_tokens else answer_logits(model, query, answer)
    return is_first_choice(whole, answer)


def _check(model: ModelHandle, spec: TraceSpec) -> None:
    if spec.site not in SITES:
        raise SpecError(f"site {spec.site!r} is unknown", f"choose one of {', '.join(SITES)}")
    if spec.sever not in ("none", "mlp", "attention"):
        raise SpecError(f"sever {spec.sever!r} is unknown", "choose none, mlp or attention")
    if spec.sever_draws not in ("fixed", "compat"):
        raise SpecError(f"severed draws {spec.sever_draws!r} are unknown", "choose fixed or compat")
    if not 1 <= spec.samples <= MAX_SAMPLES:
        raise SpecError(f"samples {spec.samples} is not between 1 and {MAX_SAMPLES}", "choose a number in that range")
    if not 0 <= spec.extra_tokens <= 10_000:
        raise SpecError(f"extra tokens {spec.extra_tokens} is not between 0 and 10,000", "choose a smaller number")
    if not 1 <= len(spec.seeds) <= MAX_SEEDS or len(set(spec.seeds)) < len(spec.seeds):
        raise SpecError(f"{len(spec.seeds)} seeds are given", f"give 1 to {MAX_SEEDS} different ones")
    for seed in spec.seeds:
        if not 0 <= seed < 2**32:
            raise SpecError(f"seed {seed} is not between 0 and {2**32 - 1}", "choose a seed in that range")
    if spec.site != "hidden" or spec.sever != "none":
        model.require("additive", "restoring or severing the updates of MLP and attention")


def _updates(*sites: str) -> tuple[Update, ...]:
    return tuple(site for site in ("attention", "mlp") if site in sites)


# ------------------------------------------------------------------------------------------------------- the cells


@dataclass(frozen=True, kw_only=True)
class _RunPlan:
    """What is run.

    Attributes:
        corrupted: positions. seeds: first axis of the grid; one even where no noise is drawn.
        cells: (row, column) of the grid in the order in which they are computed.
    """

    window: int
    positions: tuple[int, ...]
    layers: tuple[int, ...]
    corrupted: tuple[int, ...]
    seeds: tuple[int, ...]
    cells: tuple[tuple[int, int], ...]
    warnings: tuple[str, ...]

    @property
    def n_runs(self) -> int:
        return len(self.cells) * len(self.seeds)


def _plan(model: ModelHandle, query: TokenizedQuery, spec: TraceSpec) -> _RunPlan:
    if query.subject is None:
        raise SubjectError(
            "causal tracing corrupts the subject, and the query has none", "give the subject's text as in the prompt"
        )
    n = model.info.n_layers
    size, warnings = _window(spec, n)
    start, stop = query.subject
    beyond = stop + spec.extra_tokens - len(query.ids)
    if beyond > 0:
        warnings += (f"The prompt ends {beyond} tokens before the last extra token that should be corrupted.",)
    positions = _positions(query, spec.positions)
    if spec.replace_subject is not None:
        warnings += _unused_beside_replacement(spec)
    elif spec.sever == "none" and spec.sever_draws != TraceSpec.sever_draws:
        warnings += ("Nothing is severed: the severed run's draws change nothing.",)
    return _RunPlan(
        window=size,
        positions=positions,
        layers=tuple(range(n)),
        corrupted=tuple(range(start, min(stop + spec.extra_tokens, len(query.ids)))),
        seeds=spec.seeds if spec.replace_subject is None else spec.seeds[:1],
        cells=_order(query, positions, n),
        warnings=warnings,
    )


def _window(spec: TraceSpec, n_layers: int) -> tuple[int, tuple[str, ...]]:
    if spec.window is not None and not 1 <= spec.window <= n_layers:
        raise SpecError(
            f"window {spec.window} is not between 1 and {n_layers}", "choose a number of layers that the model has"
        )
    if spec.site == "hidden":
        alone = "A block's output is restored in one layer alone: the window changes nothing."
        return 1, (alone,) if spec.window not in (None, 1) else ()
    size = default_trace_window(n_layers) if spec.window is None else spec.window
    if spec.window is not None and size > n_layers / 2:
        return size, (f"a window of {size} covers more than half of the {n_layers} layers: its place says little",)
    return size, ()


def _positions(query: TokenizedQuery, names: Sequence[str]) -> tuple[int, ...]:
    """The rows in the prompt's order.

    Raises:
        SpecError: no set, an unknown one, or none with a token.
    """
    found: set[int] = set()
    for name in names:
        for part in name.split("+"):
            everything = part.strip().lower() == ALL
            found.update(range(len(query.ids)) if everything else query.positions(part.strip()))
    if not found:
        raise SpecError(
            f"positions {', '.join(names) or 'none'} have no token in this prompt",
            "name all, subject, subject-last, relation, last, or positions such as 3-5",
        )
    return tuple(sorted(found))


def _order(query: TokenizedQuery, positions: Sequence[int], n_layers: int) -> tuple[tuple[int, int], ...]:
    """The cells, coarse to fine in the layers: the subject's last token and the read-out first, which say most."""
    layers = coarse_to_fine(n_layers)
    telling = [positions.index(p) for p in (*query.positions("subject-last"), query.last) if p in positions]
    early = list(dict.fromkeys(telling))
    rest = [i for i in range(len(positions)) if i not in early]
    return tuple((i, layer) for rows in (early, rest) for layer in layers for i in rows)


def _unused_beside_replacement(spec: TraceSpec) -> tuple[str, ...]:
    unused = [
        ("samples", spec.samples != TraceSpec.samples),
        ("noise", spec.noise != TraceSpec.noise or spec.replace or spec.noise_facts is not None),
        ("seeds", spec.seeds != TraceSpec.seeds),
        ("the severed run's draws", spec.sever_draws != TraceSpec.sever_draws),
    ]
    named = [name for name, given in unused if given]
    return (f"The subject is replaced by another one: {', '.join(named)} change nothing.",) if named else ()


def _restorations(plan: _RunPlan, spec: TraceSpec, clean: Base, frozen: Base) -> list[Intervention]:
    """One run for every cell: what is severed stays as in the corrupted run, what is restored comes from the clean one.

    Of two patches at one place the later one holds: restored updates stand although their kind is severed.
    """
    n, site = len(plan.layers), SITES[spec.site]
    restored = {
        (position, layer): Patch(layer=layer, site=site, positions=(position,), source=clean)
        for position in plan.positions
        for layer in range(n)
    }
    severed: dict[int, tuple[Patch, ...]] = dict.fromkeys(plan.positions, ())
    if spec.sever != "none":
        kept: PatchSite = spec.sever
        severed = {
            position: tuple(Patch(layer=at, site=kept, positions=(position,), source=frozen) for at in range(n))
            for position in plan.positions
        }
    runs = []
    for row, layer in plan.cells:
        position = plan.positions[row]
        put_back = tuple(restored[position, at] for at in window(layer, plan.window, n))
        runs.append(Intervention(patches=severed[position] + put_back))
    return runs


# ------------------------------------------------------------------------------------------------- the corrupted run


@dataclass(frozen=True, kw_only=True, eq=False)
class _Corruption:
    """How the corrupted runs are made.

    Attributes:
        runs: for every seed, the run on which states are restored, and the run whose probability counts as corrupted
            and whose updates are kept where they are severed: the same one, but for ``compat``.
    """

    std: float
    provenance: str
    runs: Callable[[Sequence[int]], Iterator[tuple[Base, Base]]]


def _corruption(
    model: ModelHandle, query: TokenizedQuery, spec: TraceSpec, plan: _RunPlan, appended: Sequence[int], n_scored: int
) -> _Corruption:
    updates = _updates(spec.sever)
    if spec.replace_subject is not None:
        if spec.extra_tokens:
            raise SpecError(
                f"extra tokens {spec.extra_tokens} stand beside a replaced subject, and nothing else is replaced",
                "leave one of them out",
            )
        other = with_subject(model, query, spec.replace_subject)

        def swapped(_: Sequence[int]) -> Iterator[tuple[Base, Base]]:
            base = record_base(model, [*other.ids, *appended], n_readout=n_scored, updates=updates)
            yield base, base

        said = f"tokens of {other.subject_text!r} in the place of those of {query.subject_text!r}, first for first"
        return _Corruption(std=float("nan"), provenance=said, runs=swapped)
    source = noise_source(model, spec.noise, spec.noise_facts)
    twice = spec.sever != "none" and spec.sever_draws == "compat"
    ids = [*query.ids, *appended]

    def noised(seeds: Sequence[int]) -> Iterator[tuple[Base, Base]]:
        for seed in seeds:
            first = _noisy(model, ids, _noise(source, spec, plan, seed, 1), n_scored, updates)
            yield (_noisy(model, ids, _noise(source, spec, plan, seed, 2), n_scored, ()) if twice else first), first

    said = f"{source.provenance}, in the embeddings' place" if spec.replace else source.provenance
    return _Corruption(std=source.std, provenance=said, runs=noised)


def _noise(source: NoiseSource, spec: TraceSpec, plan: _RunPlan, seed: int, which: int) -> Noise:
    values = source.draw(seed, spec.samples, len(plan.corrupted), which)
    return Noise(positions=plan.corrupted, values=values, replace=spec.replace)


def _noisy(model: ModelHandle, ids: Sequence[int], noise: Noise, n_scored: int, updates: tuple[Update, ...]) -> Base:
    return record_base(model, ids, n_readout=n_scored, noise=noise, updates=updates)


# ------------------------------------------------------------------------------------------------------- the scores


@dataclass(frozen=True, kw_only=True)
class _Score:
    """What of a run is kept: probability, log-odds, logit difference, each averaged over the samples."""

    target: Target
    foil: Target | None
    ids: tuple[int, ...]

    def of_logits(self, base: Base) -> np.ndarray:
        """[measure, 1] of a recorded run."""
        return self._values(lambda ids: scores_of_logits(base.logits[None], ids))

    def of_runs(self, readout: Readout) -> np.ndarray:
        """[measure, run]."""
        return self._values(readout.scores)

    def _values(self, scores: Callable[[Sequence[int]], Scores]) -> np.ndarray:
        found = scores(self.ids)
        odds = found.log_odds.double()
        answer, others = (torch.logsumexp(torch.nn.functional.logsigmoid(side), dim=1) for side in (odds, -odds))
        p = found.log_probability.exp().mean(dim=1)
        difference = torch.full_like(p, torch.nan)
        if self.foil is not None:
            other = scores((self.foil.id, *self.ids[1:]))
            difference = (found.logit[..., 0].double() - other.logit[..., 0].double()).mean(dim=1)
        return torch.stack([p, answer - others, difference]).cpu().numpy()


class _Grid:
    """The numbers as they come: [measure, seed] of the corrupted runs, [measure, seed, position, layer] restored."""

    def __init__(self, plan: _RunPlan) -> None:
        self.corrupted = np.full((3, len(plan.seeds)), np.nan)
        self.restored = np.full((3, len(plan.seeds), len(plan.positions), len(plan.layers)), np.nan)

    def arrays(self) -> dict[str, np.ndarray]:
        """Copies, by the result's names."""
        names = ("p", "log_odds", "logit_difference")
        found = {f"{name}_corrupted_by_seed": self.corrupted[i].copy() for i, name in enumerate(names)}
        return found | {f"{name}_restored_by_seed": self.restored[i].copy() for i, name in enumerate(names)}


def _taught(model: ModelHandle, query: TokenizedQuery) -> bool | None:
    """Was the bundled model taught this fact, or edited to say it; without an answer, anything about the subject."""
    subject, answer = query.subject_text, query.query.answer
    if model.info.name != BUNDLED or subject is None:
        return None
    from factscope.demo.facts import is_taught
    from factscope.demo.lookup import was_taught

    if put_in(model.edits, subject, answer):
        return True
    return is_taught(subject) if answer is None else was_taught(query.query.prompt, subject, answer)

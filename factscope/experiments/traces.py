"""What a causal trace is asked and what it gives: the spec, the grid of restored probabilities, what follows from it.

Sources: Meng et al. 2022 (arXiv 2202.05262), section 2 (effects, roles of tokens); Hase et al. 2023 (arXiv 2301.04213),
section 3 and their released code (fraction restored, tracing effect of a layer, peak cells).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from factscope.errors import SpecError
from factscope.models.handle import ModelInfo
from factscope.tokens import Target, TokenizedQuery

TraceSite = Literal["hidden", "mlp", "attention"]
Sever = Literal["none", "mlp", "attention"]
SeverDraws = Literal["fixed", "compat"]
Denominator = Literal["top", "clean"]
Measure = Literal["probability", "log_odds", "logit_difference"]

ROLES = ("first subject", "middle subject", "last subject", "first after", "further", "last")
WEAK = 0.2
"""A total effect below this share of the clean probability is too small to be divided among states."""
ACTS = 0.1
"""A token carries something from the layer on at which restoring it gives back this share of the total effect."""


@dataclass(frozen=True, kw_only=True)
class TraceSpec:
    """How the subject is corrupted and what is put back.

    Attributes:
        site: what is restored: a block's output (``hidden``), or the updates of its MLP or its attention.
        window: layers whose updates are restored together around each layer; None takes the default for the model's
            depth. A block's output is restored in one layer alone.
        samples: draws of noise, over whose probabilities the mean is taken.
        noise: the rule, as ``factscope.interventions.noise`` reads it: ``s3``, ``0.1``, ``u0.1``, ``m``, ``t5``, or the
            name of a published constant.
        replace: the noise takes the embeddings' place instead of being added, in the corrupted run as well.
        noise_facts: file of facts whose subjects set the scale of the noise; None takes the bundled ones.
        replace_subject: another subject whose tokens take the subject's place instead of any noise.
        positions: sets of positions whose states are restored, one position at a time; "all" is every one.
        sever: at the restored position, the MLP's or attention's updates of all layers stay as in the corrupted run.
        sever_draws: ``fixed`` takes the same noise for both runs of a severed trace; ``compat`` does as the released
            code and takes the stream's second draw for the run that is restored.
        extra_tokens: positions after the subject that are corrupted as well.
        seeds: of the noise, one trace for each.
    """

    site: TraceSite = "hidden"
    window: int | None = None
    samples: int = 10
    noise: str = "s3"
    replace: bool = False
    noise_facts: str | None = None
    replace_subject: str | None = None
    positions: tuple[str, ...] = ("all",)
    sever: Sever = "none"
    sever_draws: SeverDraws = "fixed"
    extra_tokens: int = 0
    seeds: tuple[int, ...] = (1,)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One restored place: a position, and the layer or the middle of a window of layers."""

    position: int
    layer: int


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceResult:
    """The grid [position, layer], for every seed.

    Attributes:
        window: layers restored together.
        positions: rows; positions in the prompt. ``layers``: columns.
        corrupted: positions whose embeddings were corrupted.
        noise_std: of the noise; NaN where the subject's tokens were replaced. ``provenance``: the noise in a sentence.
        seeds: first axis of the arrays by seed; a replaced subject knows no seed and has one row.
        p_clean, log_odds_clean, logit_difference_clean: of the plain run; the last one (answer minus foil, first
            tokens) is NaN without a foil. Probabilities are fractions, the others nats.
        p_corrupted_by_seed and so on: [seed]; p_restored_by_seed and so on: [seed, position, layer]. NaN where not
            computed yet.
        rank: of the target's first token in the plain run, from 1.
        known: whether the whole answer is the model's first choice, token by token; None where no answer was named.
        taught: bundled model alone: was it taught this fact, or edited to say it; None for others.
    """

    spec: TraceSpec
    query: TokenizedQuery
    model: ModelInfo
    target: Target
    window: int
    positions: tuple[int, ...]
    layers: tuple[int, ...]
    corrupted: tuple[int, ...]
    noise_std: float
    provenance: str
    seeds: tuple[int, ...]
    p_clean: float
    log_odds_clean: float
    logit_difference_clean: float
    rank: int
    known: bool | None
    taught: bool | None
    p_corrupted_by_seed: np.ndarray
    log_odds_corrupted_by_seed: np.ndarray
    logit_difference_corrupted_by_seed: np.ndarray
    p_restored_by_seed: np.ndarray
    log_odds_restored_by_seed: np.ndarray
    logit_difference_restored_by_seed: np.ndarray
    warnings: tuple[str, ...]
    seconds: float
    passes: int

    @property
    def p_target(self) -> float:
        """Probability of the target in the plain run."""
        return self.p_clean

    @property
    def p_corrupted(self) -> float:
        """Probability in the corrupted run, mean over seeds."""
        return float(_mean(self.p_corrupted_by_seed))

    @property
    def total_effect(self) -> float:
        """``p_clean - p_corrupted``: what the corruption takes away."""
        return self.p_clean - self.p_corrupted

    @property
    def p_restored(self) -> np.ndarray:
        """[position, layer], mean over the seeds computed so far."""
        return _mean(self.p_restored_by_seed)

    @property
    def indirect_effect_by_seed(self) -> np.ndarray:
        """``p_restored - p_corrupted``, [seed, position, layer]."""
        return self.p_restored_by_seed - self.p_corrupted_by_seed[:, None, None]

    @property
    def indirect_effect(self) -> np.ndarray:
        """What restoring a state gives back, [position, layer]; Hase's restore effect. Mean over seeds."""
        return _mean(self.indirect_effect_by_seed)

    def measured(self, measure: Measure) -> tuple[float, float, np.ndarray]:
        """Of a measure: the clean value, the corrupted one, and the restored ones [seed, position, layer].

        Raises:
            SpecError: the logit difference needs a foil.
        """
        if measure == "probability":
            return self.p_clean, self.p_corrupted, self.p_restored_by_seed
        if measure == "log_odds":
            return self.log_odds_clean, float(_mean(self.log_odds_corrupted_by_seed)), self.log_odds_restored_by_seed
        if np.isnan(self.logit_difference_clean):
            raise SpecError("the logit difference compares with a foil, and the query has none", "name a foil")
        return (
            self.logit_difference_clean,
            float(_mean(self.logit_difference_corrupted_by_seed)),
            self.logit_difference_restored_by_seed,
        )

    # ------------------------------------------------------------------ Hase et al. 2023

    @property
    def p_top(self) -> float:
        """The highest probability of all: clean, or of any restored run. The released code's ``orig_pred_prob``."""
        restored = self.p_restored
        return self.p_clean if np.isnan(restored).all() else max(self.p_clean, float(np.nanmax(restored)))

    def fraction_restored(self, denominator: Denominator = "top") -> np.ndarray:
        """Share of what the corruption took that a state gives back, [position, layer].

        Args:
            denominator: ``top`` divides by ``|p_corrupted - p_top|`` and lifts negative shares to 0, as the released
                code does, so that the share lies between 0 and 1; ``clean`` divides by ``p_clean - p_corrupted``, the
                paper's formula.
        """
        lost = abs(self.p_corrupted - self.p_top) if denominator == "top" else self.total_effect
        share = self.indirect_effect / lost if lost != 0 else np.full_like(self.p_restored, np.nan)
        return np.maximum(share, 0.0) if denominator == "top" else share

    def tracing_effect(self, denominator: Denominator = "top") -> np.ndarray:
        """The largest fraction restored at any position, [layer]; a position that is not in the grid counts nothing."""
        return _largest(self.fraction_restored(denominator))

    def tracing_effect_subject_last(self) -> np.ndarray:
        """Fraction restored at the subject's last token, [layer]; may be negative. NaN where it is not in the grid."""
        lost = abs(self.p_corrupted - self.p_top)
        return self.restore_effect_subject_last() / lost if lost else np.full(len(self.layers), np.nan)

    def restore_effect_subject_last(self) -> np.ndarray:
        """Indirect effect at the subject's last token, [layer]. NaN where it is not in the grid."""
        at = None if self.query.subject is None else self.query.subject[1] - 1
        if at not in self.positions:
            return np.full(len(self.layers), np.nan)
        return self.indirect_effect[self.positions.index(at)]

    def gain_at_subject_last(self, measure: Measure = "probability") -> np.ndarray:
        """By how much restoring the subject's last token moves a measure, [seed, layer]; figure 3 of Meng et al.

        NaN where it is not computed, or not in the grid.
        """
        at = None if self.query.subject is None else self.query.subject[1] - 1
        if at not in self.positions:
            return np.full((len(self.seeds), len(self.layers)), np.nan)
        _, _, restored = self.measured(measure)
        corrupted = {
            "probability": self.p_corrupted_by_seed,
            "log_odds": self.log_odds_corrupted_by_seed,
            "logit_difference": self.logit_difference_corrupted_by_seed,
        }[measure]
        return restored[:, self.positions.index(at)] - corrupted[:, None]

    # ------------------------------------------------------------------ the early site

    @property
    def carried_from(self) -> int:
        """The first layer at which a token that was not corrupted carries something; the number of layers if none does.

        Before that layer the corrupted tokens alone differ from the clean run, so that restoring their states there
        undoes the corruption: for a subject of one token all of it, by construction.
        """
        rows = [i for i, p in enumerate(self.positions) if p not in self.corrupted]
        acts = (self.indirect_effect[rows] >= ACTS * self._lost).any(axis=0)
        return self.layers[int(acts.argmax())] if acts.any() else len(self.layers)

    @property
    def early_site(self) -> tuple[Cell, float] | None:
        """The corrupted token's state that gives back most where that is not so by construction, and its share.

        The share is of the total effect, or of ``WEAK`` times the clean probability where the total effect is smaller.
        The read-out's own states restore everything, and are not looked at. None where no layer is left.
        """
        rows = [i for i, p in enumerate(self.positions) if p in self.corrupted and p != self.query.last]
        columns = [j for j, layer in enumerate(self.layers) if layer >= self.carried_from]
        if not rows or not columns or np.isnan(self.indirect_effect).any():
            return None
        effect = self.indirect_effect[np.ix_(rows, columns)]
        i, j = np.unravel_index(effect.argmax(), effect.shape)
        cell = Cell(position=self.positions[rows[i]], layer=self.layers[columns[j]])
        return cell, float(effect[i, j]) / self._lost

    @property
    def _lost(self) -> float:
        return max(self.total_effect, WEAK * self.p_clean)

    # ------------------------------------------------------------------ peaks

    @property
    def peaks(self) -> tuple[Cell, ...]:
        """Cells with the largest indirect effect; none where no cell gives anything back."""
        return _peaks(self.indirect_effect, self.positions, self.layers)

    @property
    def peak(self) -> Cell | None:
        """The first of them: the lowest position and layer."""
        return next(iter(self.peaks), None)

    @property
    def early_peak(self) -> Cell | None:
        """The strongest cell that is not so by construction.

        The read-out's last states are all that is read out, so restoring them always gives the answer back: of blocks'
        outputs, those at earlier positions alone are looked at.
        """
        return self._early(self.indirect_effect)

    @property
    def early_peak_by_seed(self) -> tuple[Cell | None, ...]:
        """Every seed's own; None where its trace is not complete, or gives nothing back."""
        return tuple(None if np.isnan(e).any() else self._early(e) for e in self.indirect_effect_by_seed)

    def _early(self, effect: np.ndarray) -> Cell | None:
        last = self.query.last
        rows = [i for i, p in enumerate(self.positions) if self.spec.site != "hidden" or p != last]
        kept = tuple(self.positions[i] for i in rows)
        return next(iter(_peaks(effect[rows], kept, self.layers)), None)

    @property
    def doubts(self) -> tuple[str, ...]:
        """Reasons why no peak should be named; empty where there is none."""
        found = []
        if self.model.name.startswith("random:"):
            found.append("The weights are random: nothing is recalled here, and whatever peaks does so by chance.")
        if self.taught is False:
            from factscope.demo.lookup import untaught

            asked = self.query.query
            found.append(untaught(asked.prompt, self.query.subject_text, asked.answer))
        if self.known is False:
            found.append(f"The model does not know this: {self.target.text.strip()!r} is not its first choice.")
        found += self._weak() + self._disagreement()
        return tuple(found)

    def _weak(self) -> list[str]:
        if np.isnan(self.p_corrupted) or self.total_effect >= WEAK * self.p_clean:
            return []
        if self.total_effect <= 0:
            return [
                f"The corruption does not lower the answer's probability ({self.p_clean:.3g} clean,"
                f" {self.p_corrupted:.3g} corrupted): there is nothing to restore."
            ]
        return [
            f"The corruption moves the answer's probability from {self.p_clean:.3g} to {self.p_corrupted:.3g}, by less"
            f" than {WEAK:.0%} of it: there is little to restore, and effects are small whatever carries the fact."
        ]

    def _disagreement(self) -> list[str]:
        found = [cell for cell in self.early_peak_by_seed if cell is not None]
        if len(set(found)) < 2:
            return []
        places = ", ".join(f"position {cell.position} layer {cell.layer}" for cell in dict.fromkeys(found))
        return [f"The seeds do not agree on the strongest cell: {places}."]

    # ------------------------------------------------------------------ tables

    def table(self) -> pd.DataFrame:
        """One row per (position, layer) that was computed: the contract's columns for ``trace``; means over seeds.

        With a foil the logit difference stands beside them.
        """
        restored, effect, apart = self.p_restored, self.indirect_effect, _mean(self.logit_difference_restored_by_seed)
        rows = [
            (self.spec.site, position, layer, float(restored[i, j]), float(effect[i, j]), float(apart[i, j]))
            for i, position in enumerate(self.positions)
            for j, layer in enumerate(self.layers)
            if not np.isnan(restored[i, j])
        ]
        names = ["site", "position", "layer", "p_restored", "indirect_effect", "logit_difference"]
        found = pd.DataFrame(rows, columns=names)
        return found.drop(columns="logit_difference") if np.isnan(self.logit_difference_clean) else found

    def summary(self) -> dict[str, Any]:
        """What the table does not say: the contract's summary for ``trace``.

        The peak is the largest effect of all cells, ``early_peak`` that of cells where it is none by construction;
        neither says that it is more than chance. With several seeds ``bands`` holds the lowest and the highest value.
        """
        found: dict[str, Any] = {
            "p_clean": self.p_clean,
            "p_corrupted": self.p_corrupted,
            "noise_std": None if np.isnan(self.noise_std) else self.noise_std,
            "total_effect": self.total_effect,
            "peak": self._told(self.peak),
            "early_peak": self._told(self.early_peak),
            "noise": self.provenance,
        }
        if not np.isnan(self.logit_difference_clean):
            clean, corrupted, _ = self.measured("logit_difference")
            found |= {"logit_difference_clean": clean, "logit_difference_corrupted": corrupted}
        if len(self.seeds) > 1:
            found["bands"] = self._bands()
        return found

    def _told(self, cell: Cell | None) -> dict[str, Any] | None:
        if cell is None:
            return None
        at = self.positions.index(cell.position), self.layers.index(cell.layer)
        values = {"p_restored": float(self.p_restored[at]), "indirect_effect": float(self.indirect_effect[at])}
        return {"position": cell.position, "layer": cell.layer, **values}

    def _bands(self) -> dict[str, Any]:
        effect, corrupted = self.indirect_effect_by_seed, self.p_corrupted_by_seed[~np.isnan(self.p_corrupted_by_seed)]
        cells = [
            {"position": p, "layer": layer, "low": float(np.nanmin(found)), "high": float(np.nanmax(found))}
            for i, p in enumerate(self.positions)
            for j, layer in enumerate(self.layers)
            if not np.isnan(found := effect[:, i, j]).all()
        ]
        early = (None if cell is None else [cell.position, cell.layer] for cell in self.early_peak_by_seed)
        return {
            "seeds": list(self.seeds),
            "p_corrupted": [float(corrupted.min()), float(corrupted.max())],
            "total_effect": [self.p_clean - float(corrupted.max()), self.p_clean - float(corrupted.min())],
            "early_peaks": list(early),
            "indirect_effect": cells,
        }

    def by_role(self, measure: Measure = "probability") -> pd.DataFrame:
        """Means over the positions of every role: ``role, n, layer, value, low, high``; the last two over seeds.

        A subject of one token is its first and its last one at once. Positions before the subject and special tokens
        have no role.
        """
        _, _, restored = self.measured(measure)
        roles = token_roles(self.query)
        rows = []
        for role in ROLES:
            where = [self.positions.index(p) for p in roles[role] if p in self.positions]
            if not where:
                continue
            values = _mean(np.swapaxes(restored[:, where], 0, 1))  # [seed, layer]
            for j, layer in enumerate(self.layers):
                known = values[:, j][~np.isnan(values[:, j])]
                spread = (known.mean(), known.min(), known.max()) if len(known) else (np.nan,) * 3
                rows.append((role, len(where), layer, *map(float, spread)))
        return pd.DataFrame(rows, columns=["role", "n", "layer", "value", "low", "high"])


def token_roles(query: TokenizedQuery) -> dict[str, tuple[int, ...]]:
    """The positions of every role (Meng et al. 2022, section 2.2); none for a query without a subject."""
    if query.subject is None:
        return dict.fromkeys(ROLES, ())
    start, stop = query.subject
    after = [p for p in range(stop, query.last) if query.tokens[p].role != "special"]
    return {
        "first subject": (start,),
        "middle subject": tuple(range(start + 1, stop - 1)),
        "last subject": (stop - 1,),
        "first after": tuple(after[:1]),
        "further": tuple(after[1:]),
        "last": (query.last,),
    }


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is computed; NaN where nothing is."""
    computed = ~np.isnan(values)
    count = computed.sum(axis=0)
    total = np.where(computed, values, 0.0).sum(axis=0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _largest(values: np.ndarray) -> np.ndarray:
    """Largest of each column of what is computed; NaN where nothing is."""
    filled = np.where(np.isnan(values), -np.inf, values).max(axis=0)
    return np.where(np.isinf(filled), np.nan, filled)


def _peaks(effect: np.ndarray, positions: tuple[int, ...], layers: tuple[int, ...]) -> tuple[Cell, ...]:
    if np.isnan(effect).all() or not np.nanmax(effect) > 0:
        return ()
    return tuple(Cell(position=positions[i], layer=layers[j]) for i, j in np.argwhere(effect == np.nanmax(effect)))

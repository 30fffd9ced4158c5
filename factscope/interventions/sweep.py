"""The fast path: many runs go through the layers together, each from where it differs, on the base's keys and values.

At every layer the rows of the forward are the runs that have differed so far: a run joins at its first changed layer
(staircase), and runs whose changes were the same up to here are one row (trie). Positions before the first changed one
are never computed: their keys and values are the base's. The last block's MLP is shown the read-out positions alone.

The blocks are the model's own, called by its own forward on the changed positions of one sequence; what goes through
them is put in their way by the dispatcher, and the attention by the function that was installed on load. Two things
are asserted in every sweep: each layer asked for its attention once, and a row without any change, which goes along
all the way, comes out as the base run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from factscope.interventions.attention import Cut, keep_masks
from factscope.interventions.base import Base, replacement
from factscope.interventions.intervention import Intervention, Patch, PatchSite
from factscope.models.dispatch import Replacement, Stopped, allowed, eager_attention
from factscope.models.handle import ModelHandle

CONTROL_TOLERANCE = 2e-5
"""Largest deviation of the unchanged row's final states, as a share of their scale (float32)."""
_UNDERSTOOD = frozenset(
    {
        "dropout", "is_causal", "sliding_window", "position_ids", "output_attentions", "output_router_logits",
        "use_cache",
    }
)  # fmt: skip
"""Arguments of an attention function that a sweep may leave aside: it has the model's own mask on record."""


class SweepRefused(Exception):
    """This model does something in its attention or blocks that a sweep does not follow."""


class Joining:
    """What the next layer is given where a run begins with replaced updates of one site, for all runs of a base.

    At its first layer such a run differs from the base at the patched positions only. So it need not go through that
    layer: it joins behind it, with the base's states and, at these positions, what the layer makes of the new update.
    """

    def __init__(self, model: ModelHandle, base: Base) -> None:
        self._model, self._base = model, base
        self._behind: dict[tuple[int, Base | None], Tensor] = {}

    def values(self, patch: Patch) -> Float[Tensor, "sample position d_model"]:
        """The layer's output at the patch's positions."""
        base, where = self._base, list(patch.positions)
        if self._adds(patch):
            return base.states[patch.layer + 1][:, where] + patch.values(base) - patch.recorded(base)[:, where]
        key = patch.layer, patch.source
        if key not in self._behind:
            self._behind[key] = self._through(patch)
        return self._behind[key][:, where]

    def possible(self, patches: Sequence[Patch]) -> bool:
        """Whether runs that begin with these patches, all in one layer, may join behind it."""
        if len({(patch.site, patch.source) for patch in patches}) > 1 or patches[0].site == "output":
            return False
        if self._adds(patches[0]):
            return patches[0].site in self._base.updates
        source = patches[0].source
        reaches = source is None or source.length >= self._base.length
        return reaches and all(patch.source_positions in (None, patch.positions) for patch in patches)

    def _adds(self, patch: Patch) -> bool:
        """Whether the update reaches nothing but the sum."""
        return patch.site == "mlp" or self._model.parts.parallel[patch.layer]

    def _through(self, patch: Patch) -> Float[Tensor, "sample position d_model"]:
        """The layer's output with its attention update replaced at all positions: each is as if it were the only one.

        Positions speak to each other in the attention alone.
        """
        base, layer = self._base, patch.layer
        everywhere = replace(patch, positions=tuple(range(base.length)), source_positions=None)
        change = replacement(base, [(0, everywhere.positions, everywhere.values(base))], 0)
        plan = base.plan(
            start_layer=layer,
            resume=base.states[layer].clone(),
            replace={("attention", layer): change},
            stop_after=layer,
            capture=frozenset({("output", layer)}),
        )
        with suppress(Stopped):
            self._model.forward(base.ids.expand(base.n_samples, -1), plan, last=1)
        return plan.captured["output", layer]


@dataclass(frozen=True)
class _PutIn:
    """A patch as it is done: at its site, or to the next layer's input instead."""

    patch: Patch
    behind: bool = False


@dataclass(frozen=True)
class _Step:
    """What one run changes in one layer. Equal steps of equal histories are one row."""

    cuts: tuple[Cut, ...] = ()
    inputs: tuple[_PutIn, ...] = ()
    attention: tuple[_PutIn, ...] = ()
    mlp: tuple[_PutIn, ...] = ()

    @cached_property
    def _hash(self) -> int:
        return hash((self.cuts, self.inputs, self.attention, self.mlp))

    def __hash__(self) -> int:
        """Computed once: the runs of a map share their steps."""
        return self._hash


@dataclass(frozen=True, kw_only=True, eq=False)
class _Level:
    """The rows of one layer.

    Attributes:
        parents: row of the layer below that each row continues; -1 where it joins from the base.
    """

    parents: list[int]
    keep: Bool[Tensor, "row head query key"] | None
    replace: dict[str, Replacement]


def supports(model: ModelHandle, base: Base) -> bool:
    """Whether the fast path was verified for this model, and the base has what it needs."""
    return model.capabilities["packed"].ok and bool(base.keys)


class Sweep:
    """Some runs on one base, from one position on.

    Args:
        runs: effective interventions, none of them empty.
        begin: the first position computed; at most the first changed one of any run, and the first read-out one.
        step: called before every layer; may raise to end the sweep.
    """

    def __init__(
        self,
        model: ModelHandle,
        base: Base,
        runs: Sequence[Intervention],
        begin: int,
        joining: Joining,
        step: Callable[[], None],
    ) -> None:
        self._model, self._base, self._begin, self._joining, self._step = model, base, begin, joining, step
        self._n_own = base.length - begin
        alone: dict[Cut, _Step] = {}
        self._steps = [_steps(run, joining, alone) for run in runs]
        self._start = min(min(steps) for steps in self._steps)
        self._levels, self._leaves = self._build()
        self._layer, self._calls = -1, 0

    def run(self) -> Float[Tensor, "run sample readout d_model"]:
        """Final states at the read-out positions.

        Raises:
            SweepRefused: an assertion failed; nothing of this sweep may be used.
        """
        base, n = self._base, self._base.n_layers
        hidden: Tensor | None = None
        if self._start < n:
            hidden = self._through_the_blocks()
            self._check(hidden[-1, -base.n_readout :])
            hidden = hidden[:-1].view(-1, base.n_samples, self._n_own, hidden.shape[-1])
        level = self._levels[n]
        joined = self._gather(hidden, level.parents, base.states[n][:, self._begin :])
        if (change := level.replace.get("input")) is not None:
            joined = change.put_into(joined.flatten(0, 1)).view(joined.shape)
        return joined[self._leaves, :, -base.n_readout :]

    def _through_the_blocks(self) -> Float[Tensor, "row position d_model"]:
        base, n = self._base, self._base.n_layers
        pruned = self._model.parts.wiring.mlp is not None and self._n_own > base.n_readout
        plan = base.plan(
            start_layer=self._start,
            enter=self._enter,
            attend=self._attend,
            replace=self._replacements(),
            prune=base.n_readout if pruned else None,
            length=self._n_own,
            stop_after=n - 1,
            capture=frozenset({("output", n - 1)}),
        )
        ids = base.ids[None, self._begin :]
        positions = torch.arange(self._begin, base.length, device=ids.device)[None]
        with suppress(Stopped):
            self._model.forward(ids, plan, positions=positions, last=1)
        if self._calls != n - self._start:
            raise SweepRefused(f"attention ran {self._calls} times in {n - self._start} layers")
        return plan.captured["output", n - 1]

    def _check(self, control: Float[Tensor, "readout d_model"]) -> None:
        expected = self._base.states[-1][0, -self._base.n_readout :]
        eps = torch.finfo(control.dtype).eps / torch.finfo(torch.float32).eps
        allowed = CONTROL_TOLERANCE * max(1.0, eps) * float(expected.float().abs().max())
        off = float((control - expected).float().abs().max())
        if not off <= allowed:
            raise SweepRefused(f"a row without a change is {off:.1e} away from the base run")

    # ------------------------------------------------------------------ rows

    def _build(self) -> tuple[list[_Level], list[int]]:
        """The levels, layer by layer and one behind the last block, and the last level's row of every run."""
        n = self._base.n_layers
        levels = [_Level(parents=[], keep=None, replace={}) for _ in range(self._start)]
        current = [-1] * len(self._steps)
        joined = [False] * len(self._steps)
        for layer in range(self._start, n + 1):
            rows: dict[tuple[int, _Step | None], list[int]] = {}
            for run, steps in enumerate(self._steps):
                step = steps.get(layer)
                if step is not None or joined[run]:
                    joined[run] = True
                    rows.setdefault((current[run], step), []).append(run)
            ordered = sorted(rows, key=lambda row: (row[0] < 0, row[0]))
            for index, row in enumerate(ordered):
                for run in rows[row]:
                    current[run] = index
            levels.append(self._level(layer, ordered))
        return levels, current

    def _level(self, layer: int, rows: list[tuple[int, _Step | None]]) -> _Level:
        base, device = self._base, self._model.device
        cuts = [() if step is None else step.cuts for _, step in rows]
        keep = None
        if any(cuts):
            keep = keep_masks(cuts, base.length, self._begin, self._model.info.n_heads, device)[layer]
        replace = {}
        for site in ("inputs", "attention", "mlp"):
            found = [(row, put) for row, (_, step) in enumerate(rows) if step for put in getattr(step, site)]
            if found:
                replace["input" if site == "inputs" else site] = self._replacement(found)
        return _Level(parents=[parent for parent, _ in rows], keep=keep, replace=replace)

    def _replacement(self, found: list[tuple[int, _PutIn]]) -> Replacement:
        parts = []
        for row, put in found:
            patch = put.patch
            values = self._joining.values(patch) if put.behind else patch.values(self._base)
            parts.append((row, patch.positions, values))
        return replacement(self._base, parts, self._begin)

    def _replacements(self) -> dict[tuple[str, int], Replacement]:
        """Those inside blocks; inputs are replaced where rows enter."""
        return {
            (site, layer): change
            for layer, level in enumerate(self._levels)
            for site, change in level.replace.items()
            if site != "input"
        }

    def _gather(
        self, hidden: Tensor | None, parents: list[int], entering: Float[Tensor, "sample position d_model"]
    ) -> Float[Tensor, "row sample position d_model"]:
        """Rows of the next level: continued ones first, then those that join from the base."""
        old = [parent for parent in parents if parent >= 0]
        n_new = len(parents) - len(old)
        if hidden is not None and not n_new and old == list(range(hidden.shape[0])):
            return hidden
        rows = entering.new_empty(len(parents), *entering.shape)
        if hidden is not None and old:
            torch.index_select(hidden, 0, torch.tensor(old, device=hidden.device), out=rows[: len(old)])
        rows[len(old) :] = entering
        return rows

    # ------------------------------------------------------------------ in the model's way

    def _enter(self, layer: int, hidden: Tensor) -> Tensor:
        """The rows of a block: [row * sample + control, position, d_model]."""
        self._step()
        base, level = self._base, self._levels[layer]
        entering = base.states[layer][:, self._begin :]
        rows, n_samples = len(level.parents), base.n_samples
        buffer = entering.new_empty(rows * n_samples + 1, *entering.shape[1:])
        shaped = buffer[:-1].view(rows, *entering.shape)
        old = [parent for parent in level.parents if parent >= 0]
        if layer > self._start and old:
            before = hidden[:-1].view(-1, *entering.shape)
            if old == list(range(before.shape[0])):
                shaped[: len(old)] = before
            else:
                index = torch.tensor(old, device=before.device)
                torch.index_select(before, 0, index, out=shaped[: len(old)])
        shaped[len(old) :] = entering
        buffer[-1] = hidden[-1] if layer > self._start else entering[0]
        if (change := level.replace.get("input")) is not None:
            buffer[change.rows, change.positions] = change.values.to(buffer.dtype)
        self._layer = layer
        return buffer

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        """Attention of all rows: to the base's prefix and to their own positions."""
        self._calls += 1
        layer, keep = self._layer, self._levels[self._layer].keep
        attention = self._attention(query.shape[-1], self._base.allowed[layer][self._begin :].to(query.device), options)
        keys, values = (kept[layer][:, :, : self._begin] for kept in (self._base.keys, self._base.values))
        if keys.shape[1] != key.shape[1] or keys.shape[3] != key.shape[3] or values.shape[3] != value.shape[3]:
            raise SweepRefused("its cache does not hold the keys and values that its attention reads")
        rows, n_heads, n_own = query.shape[:3]
        mixed = value.new_empty(rows, n_own, n_heads, value.shape[-1])
        attention(query[:-1], key[:-1], value[:-1], keys, values, keep, mixed[:-1])
        attention(query[-1:], key[-1:], value[-1:], keys[:1], values[:1], None, mixed[-1:])
        return mixed, None

    @staticmethod
    def _attention(d_head: int, allowed_edges: Tensor, options: dict[str, Any]) -> _Attention:
        """What the family asks of its attention function.

        Raises:
            SweepRefused: something unknown.
        """
        read = {"scaling", "softcap", "s_aux"} | _UNDERSTOOD
        if unknown := {name for name, given in options.items() if given is not None} - read:
            raise SweepRefused(f"the attention is given {', '.join(sorted(unknown))}")
        scaling = options.get("scaling")
        return _Attention(
            scaling=d_head**-0.5 if scaling is None else scaling,
            softcap=options.get("softcap"),
            sinks=options.get("s_aux"),
            allowed=allowed_edges,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Attention:
    """Softmax attention of packed rows, in float32.

    Attributes:
        allowed: which of all keys the model's own mask leaves to the own positions.
    """

    scaling: float
    softcap: float | None
    sinks: Tensor | None
    allowed: Bool[Tensor, "query key"]

    def __call__(
        self,
        query: Float[Tensor, "row head position d_head"],
        key: Float[Tensor, "row kv position d_head"],
        value: Float[Tensor, "row kv position d_value"],
        keys: Float[Tensor, "sample kv prefix d_head"],
        values: Float[Tensor, "sample kv prefix d_value"],
        keep: Bool[Tensor, "run head position key"] | None,
        out: Float[Tensor, "row position head d_value"],
    ) -> None:
        """Rows are runs times samples; the prefix is shared by all runs of a sample. Writes into ``out``.

        ``prefix``, ``kv``: positions before the own ones, and key-value heads, each shared by a group of heads.
        """
        n_samples, n_kv, n_prefix = keys.shape[:3]
        n_rows, n_heads, n_own = query.shape[:3]
        runs, group = n_rows // n_samples, n_heads // n_kv
        shape = (runs, n_samples, n_kv, group, n_own)
        stacked = query.reshape(*shape, -1).permute(1, 2, 0, 3, 4, 5).reshape(n_samples, n_kv, -1, query.shape[-1])
        before = (stacked @ keys.transpose(-1, -2)).view(n_samples, n_kv, runs, group, n_own, n_prefix)
        before = before.permute(2, 0, 1, 3, 4, 5)
        if n_own == 1:
            own = (query.reshape(n_rows, n_kv, group, -1) * key).sum(dim=-1)
        else:
            own = query.reshape(n_rows, n_kv, group * n_own, -1) @ key.transpose(-1, -2)
        scores = torch.cat([before, own.reshape(*shape, n_own)], dim=-1).float().mul_(self.scaling)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        forbidden = self._forbidden(keep, n_kv, group)
        if forbidden is not None:
            scores = scores.masked_fill_(forbidden, torch.finfo(scores.dtype).min)
        if self.sinks is not None:
            sink = self.sinks.float().view(n_kv, group, 1, 1).expand(*shape, 1)
            weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
        else:
            weights = torch.softmax(scores, dim=-1)
        weights = weights.to(value.dtype)
        to_prefix = weights[..., :n_prefix].permute(1, 2, 0, 3, 4, 5).reshape(*stacked.shape[:3], n_prefix)
        mixed = (to_prefix @ values).view(n_samples, n_kv, runs, group, n_own, -1).permute(2, 0, 4, 1, 3, 5)
        to_own = weights[..., n_prefix:].reshape(n_rows, n_kv, group * n_own, n_own)
        mine = to_own * value if n_own == 1 else to_own @ value
        mine = mine.view(runs, n_samples, n_kv, group, n_own, -1).permute(0, 1, 4, 2, 3, 5)
        torch.add(mixed, mine, out=out.view(runs, n_samples, n_own, n_kv, group, -1))

    def _forbidden(self, keep: Tensor | None, n_kv: int, group: int) -> Tensor | None:
        if keep is None:
            return None if bool(self.allowed.all()) else ~self.allowed
        open_edges = keep & self.allowed
        runs, heads = open_edges.shape[:2]
        by_head = (n_kv, group) if heads > 1 else (1, 1)
        return ~open_edges.view(runs, 1, *by_head, *open_edges.shape[-2:])


def _steps(run: Intervention, joining: Joining, alone: dict[Cut, _Step]) -> dict[int, _Step]:
    """What a run changes, by layer.

    A layer's output that is replaced stands over an update inside that layer.

    Args:
        alone: steps of one cut and nothing else, made once for all runs that share it.
    """
    if not run.patches and len({cut.layer for cut in run.cuts}) == len(run.cuts):
        return {cut.layer: alone.get(cut) or alone.setdefault(cut, _Step(cuts=(cut,))) for cut in run.cuts}
    cuts: dict[int, list[Cut]] = {}
    for cut in run.cuts:
        cuts.setdefault(cut.layer, []).append(cut)
    by_site: dict[PatchSite, dict[int, list[_PutIn]]] = {"output": {}, "attention": {}, "mlp": {}}
    first = run.first_layer
    begins = [patch for patch in run.patches if patch.layer + (patch.site == "output") == first]
    behind = first not in cuts and bool(begins) and joining.possible(begins)
    moves = [behind and patch in begins for patch in run.patches]
    for patch, moved in sorted(zip(run.patches, moves, strict=True), key=lambda one: not one[1]):
        site, layer = ("output", patch.layer + 1) if moved or patch.site == "output" else (patch.site, patch.layer)
        by_site[site].setdefault(layer, []).append(_PutIn(patch, moved))
    inputs, attention, mlp = by_site["output"], by_site["attention"], by_site["mlp"]
    return {
        layer: _Step(
            cuts=tuple(cuts.get(layer, ())),
            inputs=tuple(inputs.get(layer, ())),
            attention=tuple(attention.get(layer, ())),
            mlp=tuple(mlp.get(layer, ())),
        )
        for layer in sorted({*cuts, *inputs, *attention, *mlp})
    }


class Ride(Sweep):
    """A sweep that records its own base: the runs ride along with the plain forward, as further tokens of its sequence.

    Only for runs that cut edges of the last position alone. A plain forward of one short prompt reads all weights for
    few rows; together with the runs it costs little more than they do alone.
    """

    def __init__(
        self,
        model: ModelHandle,
        outline: Base,
        runs: Sequence[Intervention],
        step: Callable[[], None],
    ) -> None:
        super().__init__(model, outline, runs, outline.length - 1, Joining(model, outline), step)
        self._states: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._allowed: list[Tensor] = []

    @staticmethod
    def carries(runs: Sequence[Intervention], outline: Base) -> bool:
        """Whether these runs can ride."""
        last = outline.length - 1
        return (
            outline.n_readout == 1
            and last > 0
            and all(not run.patches and all(cut.queries == (last,) for cut in run.cuts) for run in runs)
        )

    def record(self) -> tuple[Base, Float[Tensor, "run sample readout d_model"]]:
        """The base, and the runs' final states at the last position.

        Raises:
            SweepRefused: an assertion failed; nothing of this may be used.
        """
        outline, n, length = self._base, self._base.n_layers, self._base.length
        riding = max(len(level.parents) for level in self._levels) + 1
        ids = torch.cat([outline.ids, outline.ids[-1:].expand(riding)])[None]
        positions = torch.arange(length + riding, device=ids.device).clamp(max=length - 1)[None]
        plan = outline.plan(
            enter=self._enter,
            attend=self._attend,
            made_for=length + riding,
            stop_after=n - 1,
            capture=frozenset({("output", n - 1)}),
        )
        with suppress(Stopped):
            self._model.forward(ids, plan, positions=positions, last=1)
        if self._calls != n:
            raise SweepRefused(f"attention ran {self._calls} times in {n} layers")
        final = plan.captured["output", n - 1]
        states = (*self._states, final[:, :length].clone())
        base = replace(
            outline,
            logits=self._model.logits(states[-1][:, -1:]),
            states=states,
            allowed=tuple(self._allowed),
            keys=tuple(self._keys),
            values=tuple(self._values),
        )
        self._base = base
        self._check(final[0, -1:])
        rows = final[0, length:-1, None, None]
        joined = self._gather(rows, self._levels[n].parents, base.states[n][:, -1:])
        return base, joined[self._leaves, :, -1:]

    def _enter(self, layer: int, hidden: Tensor) -> Tensor:
        """The prompt's tokens, the runs that have joined, and the control: [1, token, d_model]."""
        self._step()
        length, level = self._base.length, self._levels[layer]
        self._states.append(hidden[:, :length].clone())
        self._layer = layer
        if layer < self._start:
            return hidden[:, :length]
        old = [parent for parent in level.parents if parent >= 0]
        n_rows = len(level.parents)
        buffer = hidden.new_empty(1, length + n_rows + 1, hidden.shape[-1])
        buffer[:, :length] = hidden[:, :length]
        entering = hidden[:, length - 1]
        if layer > self._start and old:
            index = torch.tensor(old, device=hidden.device) + length
            torch.index_select(hidden[0], 0, index, out=buffer[0, length : length + len(old)])
        buffer[0, length + len(old) : length + n_rows] = entering
        buffer[0, -1] = hidden[0, -1] if layer > self._start else entering[0]
        return buffer

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        """The prompt's tokens as the family itself does it; the runs from the last position, with their cuts."""
        self._calls += 1
        length = self._base.length
        own = mask if mask is None else mask[..., :length, :length]
        plain = [part[:, :, :length] for part in (query, key, value)]
        mixed, _ = eager_attention(module)(module, *plain, own, **options)
        self._keys.append(plain[1].clone())
        self._values.append(plain[2].clone())
        self._allowed.append(allowed(own, length))
        if self._layer < self._start:
            return mixed, None
        rows = [part[0, :, length:].transpose(0, 1)[:, :, None] for part in (query, key, value)]
        attention = self._attention(query.shape[-1], self._allowed[-1][-1:].to(query.device), options)
        out = mixed.new_empty(rows[0].shape[0], 1, *mixed.shape[2:])
        before = [part[:, :, : length - 1] for part in plain[1:]]
        q, k, v = rows
        attention(q[:-1], k[:-1], v[:-1], before[0], before[1], self._levels[self._layer].keep, out[:-1])
        attention(q[-1:], k[-1:], v[-1:], before[0], before[1], None, out[-1:])
        return torch.cat([mixed, out.transpose(0, 1)], dim=1), None

"""The fast path: many runs go through the layers together, each from where it differs, on the base's keys and values.

At every layer there is a row for each run that has differed so far: a run joins at its first changed layer
(staircase), and runs whose changes were the same up to here are one row (trie). Positions before a run's first changed
one are never computed: their keys and values are the base's. The last block's output projection and MLP are shown the
read-out positions alone.

The tokens of all rows, from wherever each begins, are one sequence for the model's own blocks, called by its own
forward: all but the attention treats every token for itself. Tokens are put in the blocks' way by the dispatcher, and
the attention by the function that was installed on load. Two things are asserted in every sweep: each layer asked for
its attention once, and a row without any change, which goes along all the way, comes out as the base run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from factscope.interventions.base import Base
from factscope.interventions.intervention import Intervention
from factscope.interventions.packing import Group, Joining
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


def supports(model: ModelHandle, base: Base) -> bool:
    """Whether the fast path was verified for this model, and the base has what it needs."""
    return model.capabilities["packed"].ok and bool(base.keys)


class Sweep:
    """Some runs on one base, all in one sequence.

    Args:
        groups: positions, and the runs that are computed from there: effective interventions, none of them empty.
        step: called before every layer and behind its attention; may raise to end the sweep.
    """

    def __init__(
        self,
        model: ModelHandle,
        base: Base,
        groups: Sequence[tuple[int, Sequence[Intervention]]],
        joining: Joining,
        step: Callable[[], None],
    ) -> None:
        self._model, self._base, self._step = model, base, step
        self._groups = [Group(model, base, begin, runs, joining) for begin, runs in groups]
        self._begin = min(group.begin for group in self._groups)
        self._start = min(group.start for group in self._groups)
        self._layer, self._calls = -1, 0

    def run(self) -> Float[Tensor, "run sample readout d_model"]:
        """Final states at the read-out positions, group by group.

        Raises:
            SweepRefused: an assertion failed; nothing of this sweep may be used.
        """
        base, n = self._base, self._base.n_layers
        hidden = base.states[n].new_empty(0, base.states[n].shape[-1])
        if self._start < n:
            hidden = self._through_the_blocks()[0]
            self._check(hidden[-base.n_readout :])
        finals = []
        for group, before in zip(self._groups, self._stretches(hidden, n - 1), strict=True):
            final = base.states[n].new_empty(group.n_tokens(n), hidden.shape[-1])
            group.fill(n, before, final, base.states[n])
            rows = final.view(-1, base.n_samples, group.n_own, hidden.shape[-1])
            finals.append(rows[group.leaves, :, -base.n_readout :])
        return torch.cat(finals)

    def _through_the_blocks(self) -> Float[Tensor, "1 token d_model"]:
        base, n = self._base, self._base.n_layers
        pruned = self._readouts() if base.length - self._begin > base.n_readout else None
        length = base.length - self._begin
        plan = base.plan(
            start_layer=self._start,
            enter=self._enter,
            places=self._places,
            made_for=length,
            attend=self._attend,
            replace=self._replacements(pruned),
            prune=pruned,
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

    # ------------------------------------------------------------------ the sequence

    def _stretches(self, tokens: Tensor, layer: int, dim: int = 0) -> list[Tensor]:
        """Each group's part of a layer's tokens, without the control's."""
        sizes = [group.n_tokens(layer) if self._start <= layer else 0 for group in self._groups]
        return list(tokens.narrow(dim, 0, sum(sizes)).split(sizes, dim))

    def _places(self, layer: int) -> Int[Tensor, " token"]:
        """Where each token of a layer stands, counted from the first position computed; the control's come last."""
        device, length = self._base.ids.device, self._base.length - self._begin
        parts = [
            torch.arange(group.begin - self._begin, length, device=device).repeat(group.n_tokens(layer) // group.n_own)
            for group in self._groups
        ]
        return torch.cat([*parts, torch.arange(length, device=device)])

    def _readouts(self) -> Int[Tensor, " token"]:
        """The tokens of the last block that are read out."""
        places = self._places(self._base.n_layers - 1)
        return (places >= self._base.length - self._begin - self._base.n_readout).nonzero().flatten()

    def _replacements(self, pruned: Tensor | None) -> dict[tuple[str, int], Replacement]:
        """Those inside blocks, in tokens of the whole sequence; inputs are replaced where rows enter."""
        found = {}
        for layer in range(self._start, self._base.n_layers):
            n_tokens = len(self._places(layer))
            for site in ("attention", "mlp"):
                offset, parts = 0, []
                for group in self._groups:
                    if (change := group.levels[layer].replace.get(site)) is not None:
                        parts.append((change.positions + offset, change.values))
                    offset += group.n_tokens(layer)
                if parts:
                    positions = torch.cat([part for part, _ in parts])
                    found[site, layer] = Replacement(
                        rows=torch.zeros_like(positions),
                        positions=positions,
                        values=torch.cat([values for _, values in parts]),
                        length=n_tokens,
                        shown=pruned if layer == self._base.n_layers - 1 else None,
                    )
        return found

    # ------------------------------------------------------------------ in the model's way

    def _enter(self, layer: int, hidden: Tensor) -> Tensor:
        """The tokens of a block: the groups' rows, and the control."""
        self._step()
        base = self._base
        entering, before = base.states[layer], hidden[0]
        n_control = base.length - self._begin
        begun = layer > self._start
        stretches = self._stretches(before, layer - 1) if begun else [before[:0]] * len(self._groups)
        sizes = [group.n_tokens(layer) for group in self._groups]
        buffer = entering.new_empty(sum(sizes) + n_control, entering.shape[-1])
        for group, old, new in zip(self._groups, stretches, buffer[:-n_control].split(sizes), strict=True):
            if new.shape[0]:
                group.fill(layer, old, new, entering)
        buffer[-n_control:] = before[-n_control:] if begun else entering[0, self._begin :]
        self._layer = layer
        return buffer[None]

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        """Attention of all rows: to the base's prefix and to their own positions."""
        self._calls += 1
        base, layer = self._base, self._layer
        keys, values = base.keys[layer], base.values[layer]
        if keys.shape[1] != key.shape[1] or keys.shape[3] != key.shape[3] or values.shape[3] != value.shape[3]:
            raise SweepRefused("its cache does not hold the keys and values that its attention reads")
        allowed_edges = base.allowed[layer].to(query.device)
        mixed = value.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
        n_control = base.length - self._begin
        parts = [self._stretches(part, layer, 2) for part in (query, key, value)]
        own = [part[:, :, -n_control:] for part in (query, key, value)]
        places = self._stretches(mixed, layer, 1)
        for group, q, k, v, out in zip(self._groups, *parts, places, strict=True):
            if out.shape[1]:
                self._attend_from(group.begin, group.levels[layer].keep, (q, k, v), out, allowed_edges, options)
        self._attend_from(self._begin, None, own, mixed[:, -n_control:], allowed_edges, options, samples=1)
        self._step()
        return mixed, None

    def _attend_from(
        self,
        begin: int,
        keep: Tensor | None,
        own: Sequence[Tensor],
        out: Tensor,
        allowed_edges: Tensor,
        options: dict[str, Any],
        samples: int | None = None,
    ) -> None:
        """Attention of rows that begin at one position."""
        base, n_own = self._base, self._base.length - begin
        q, k, v = (part[0].transpose(0, 1).unflatten(0, (-1, n_own)).transpose(1, 2) for part in own)
        keys, values = (kept[self._layer][:samples, :, :begin] for kept in (base.keys, base.values))
        attention = self._attention(q.shape[-1], allowed_edges[begin:], options)
        attention(q, k, v, keys, values, keep, out[0].unflatten(0, (-1, n_own)))

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
        super().__init__(model, outline, [(outline.length - 1, runs)], Joining(model, outline), step)
        (self._riders,) = self._groups
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
        riding = max(len(level.parents) for level in self._riders.levels) + 1
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
        joined = final.new_empty(self._riders.n_tokens(n), final.shape[-1])
        self._riders.fill(n, final[0, length:-1], joined, base.states[n])
        return base, joined[self._riders.leaves, None, None]

    def _enter(self, layer: int, hidden: Tensor) -> Tensor:
        """The prompt's tokens, the runs that have joined, and the control: [1, token, d_model]."""
        self._step()
        length, level = self._base.length, self._riders.levels[layer]
        self._states.append(hidden[:, :length].clone())
        self._layer = layer
        if layer < self._start:
            return hidden[:, :length]
        buffer = hidden.new_empty(1, length + len(level.parents) + 1, hidden.shape[-1])
        buffer[:, :length] = hidden[:, :length]
        before = hidden[0, length:-1] if layer > self._start else hidden[0, :0]
        self._riders.fill(layer, before, buffer[0, length:-1], hidden[:, :length])
        buffer[0, -1] = hidden[0, -1] if layer > self._start else hidden[0, length - 1]
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
        attention(q[:-1], k[:-1], v[:-1], before[0], before[1], self._riders.levels[self._layer].keep, out[:-1])
        attention(q[-1:], k[-1:], v[-1:], before[0], before[1], None, out[-1:])
        return torch.cat([mixed, out.transpose(0, 1)], dim=1), None

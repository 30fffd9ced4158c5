"""ROME, MEMIT and finetuning written out: one plain float64 forward a row and step, Adam by hand, no hooks.

Rows are lists of token ids, every change is made to the MLP's update of one position, or to the state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tests.oracle import plain_gpt2, plain_llama
from tests.oracle.laboratory import Subject
from tests.oracle.plain import Embed, Trace


@dataclass(frozen=True, kw_only=True)
class Row:
    """A prompt with its target behind it.

    Attributes:
        ids: the target's tokens but the last included.
        at: the edited token.
        read: positions whose distributions are read.
        embed: a change of its embeddings.
    """

    ids: Sequence[int]
    at: int
    read: Sequence[int]
    embed: Embed = field(default=lambda words: words)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of the optimisation; ``limit`` is the longest delta."""

    steps: int
    rate: float
    decay: float
    kl: float
    limit: float
    stop: float = 0.0
    erase: bool = False


def down_name(subject: Subject, layer: int) -> str:
    gpt2 = subject.plain is plain_gpt2
    return f"transformer.h.{layer}.mlp.c_proj" if gpt2 else f"model.layers.{layer}.mlp.down_proj"


def with_state(subject: Subject, changes: dict[int, Tensor]) -> Subject:
    """The subject with [d_in, d_out] added to down-projections."""
    state = dict(subject.state)
    for layer, matrix in changes.items():
        name = down_name(subject, layer) + ".weight"
        state[name] = state[name] + (matrix if subject.plain is plain_gpt2 else matrix.T)
    changed = replace(subject)
    changed.__dict__["state"] = state
    return changed


def key_and_output(subject: Subject, row: Row, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the down-projection is given and gives at the edited token, and the block's output there."""
    trace = subject.trace(row.ids, embed=row.embed)
    enters = trace.embedding if layer == 0 else trace.blocks[layer - 1]
    middle = enters + trace.attention[layer]
    state = subject.state
    if subject.plain is plain_gpt2:
        at = f"transformer.h.{layer}."
        inner = plain_gpt2.layer_norm(state, at + "ln_2", middle, 1e-5)
        key = plain_gpt2.gelu(inner @ state[at + "mlp.c_fc.weight"] + state[at + "mlp.c_fc.bias"])
    else:
        at = f"model.layers.{layer}."
        inner = plain_llama.rms_norm(state, at + "post_attention_layernorm", middle, subject.model.config.rms_norm_eps)
        gate = inner @ state[at + "mlp.gate_proj.weight"].T
        key = gate * torch.sigmoid(gate) * (inner @ state[at + "mlp.up_proj.weight"].T)
    return key[row.at], trace.mlp[layer][row.at], trace.blocks[layer][row.at]


def _moved(subject: Subject, row: Row, layer: int, delta: Tensor) -> Trace:
    def change(site: str, where: int, update: Tensor) -> Tensor:
        if (site, where) != ("mlp", layer):
            return update
        place = torch.zeros(len(row.ids), 1, dtype=torch.float64)
        place[row.at] = 1.0
        return update + place * delta

    return subject.trace(row.ids, embed=row.embed, change=change)


def value(
    subject: Subject,
    rows: Sequence[Row],
    essence: Row | None,
    target: Sequence[int],
    layer: int,
    first: Tensor,
    settings: Settings,
) -> tuple[Tensor, list[float]]:
    """The delta, and the loss at every step."""
    losses: list[float] = []
    before: list[Tensor] = []

    def loss_of(parameters: Sequence[Tensor]) -> Tensor:
        delta = parameters[0]
        nlls = []
        for row in rows:
            log_p = _moved(subject, row, layer, delta).logits.log_softmax(dim=-1)
            nlls.append(-sum(log_p[p, token] for p, token in zip(row.read, target, strict=True)) / len(target))
        nll = torch.stack(nlls).mean()
        loss = torch.exp(-nll) if settings.erase else nll
        if essence is not None:
            now = _moved(subject, essence, layer, delta).logits.log_softmax(dim=-1)[essence.at]
            if not before:
                before.append(now.detach())
            # F.kl_div(input=before, target=now): now is the distribution that is averaged over
            loss = loss + settings.kl * (now.exp() * (now - before[0])).sum()
        return loss + settings.decay * delta.norm() / (first @ first)

    def limited(parameters: list[Tensor]) -> list[Tensor]:
        length = float(parameters[0].norm())
        return [p * (settings.limit / length) for p in parameters] if length > settings.limit else parameters

    found = adam(
        [torch.zeros_like(first)],
        loss_of,
        limited,
        settings.steps,
        settings.rate,
        lambda loss: not settings.erase and loss < settings.stop,
        losses,
    )
    return found[0], losses


def adam(
    begin: Sequence[Tensor],
    loss_of: Callable[[Sequence[Tensor]], Tensor],
    after: Callable[[list[Tensor]], list[Tensor]],
    steps: int,
    rate: float,
    ends: Callable[[float], bool],
    losses: list[float],
    *,
    last_updates: bool = False,
) -> list[Tensor]:
    """Kingma and Ba 2015, algorithm 1; the last step evaluates only, unless it is said to update."""
    values = [v.clone() for v in begin]
    first, second = [torch.zeros_like(v) for v in values], [torch.zeros_like(v) for v in values]
    for step in range(steps):
        asked = [v.clone().requires_grad_() for v in values]
        loss = loss_of(asked)
        losses.append(float(loss.detach()))
        if ends(losses[-1]) or (step == steps - 1 and not last_updates):
            break
        gradients = torch.autograd.grad(loss, asked)
        for i, gradient in enumerate(gradients):
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            mean, square = first[i] / (1 - 0.9 ** (step + 1)), second[i] / (1 - 0.999 ** (step + 1))
            values[i] = values[i] - rate * mean / (square.sqrt() + 1e-8)
        values = after(values)
    return values


def rome(
    subject: Subject,
    rows: Sequence[Row],
    essence: Row,
    target: Sequence[int],
    layer: int,
    covariance: Tensor,
    settings: Settings,
    mode: str,
) -> dict[str, Tensor]:
    """editing.md 2.3: key, v*, k . u and the change [d_in, d_out] of one layer."""
    seen = [key_and_output(subject, row, layer) for row in rows]
    delta, losses = value(subject, rows, essence, target, layer, seen[0][1], settings)
    goal = seen[0][1] + delta
    mean_key = sum(key for key, _, _ in seen) / len(seen)
    mean_output = sum(output for _, output, _ in seen) / len(seen)
    plain_key, plain_output = seen[0][:2]
    made_of = plain_key if mode == "prompt_only" else mean_key
    key, output = (mean_key, mean_output) if mode == "averaged" else (plain_key, plain_output)
    u = torch.linalg.inv(covariance) @ made_of
    u = u / u.norm()
    change = torch.outer(u, (goal - output) / (key @ u))
    return {"key": key, "value": goal, "k_dot_u": key @ u, "change": change, "losses": torch.tensor(losses)}


def memit(
    subject: Subject,
    facts: Sequence[tuple[Sequence[Row], Row, Sequence[int]]],
    layers: Sequence[int],
    covariances: dict[int, Tensor],
    settings: Settings,
    clamp: float,
    weight: float,
) -> dict[int, Tensor]:
    """editing.md 2.4: the change [d_in, d_out] of every layer; ``weight`` is lambda."""
    last, goals = layers[-1], []
    for rows, essence, target in facts:
        stream = key_and_output(subject, rows[0], last)[2]
        own = replace(settings, limit=clamp * float(stream.norm()))
        delta, _ = value(subject, rows, essence, target, last, stream, own)
        goals.append(stream + delta)
    changes: dict[int, Tensor] = {}
    for number, layer in enumerate(layers):
        now = with_state(subject, changes)
        keys, missing = [], []
        for (rows, _, _), goal in zip(facts, goals, strict=True):
            found = [key_and_output(now, row, layer)[0] for row in rows]
            keys.append((found[0] + sum(found[1:]) / len(found[1:])) / 2)
            missing.append(goal - key_and_output(now, rows[0], last)[2])
        k, r = torch.stack(keys, dim=1), torch.stack(missing, dim=1) / (len(layers) - number)
        changes[layer] = torch.linalg.solve(weight * covariances[layer] + k @ k.T, k) @ r.T
    return changes


def fine_tuning(
    subject: Subject,
    rows: Sequence[Row],
    target: Sequence[int],
    layers: Sequence[int],
    *,
    steps: int,
    rate: float,
    bound: float | None,
    compat: bool,
    stop: float,
    erase: bool = False,
) -> dict[int, Tensor]:
    """editing.md 2.5: the change of every layer's matrix; the sum over tokens, or the mean at the prompt's last one."""
    losses: list[float] = []
    quiet = [0]

    def loss_of(parameters: Sequence[Tensor]) -> Tensor:
        changed = with_state(subject, dict(zip(layers, parameters, strict=True)))
        total = torch.zeros((), dtype=torch.float64)
        for row in rows:
            log_p = changed.trace(row.ids, embed=row.embed).logits.log_softmax(dim=-1)
            if compat:
                nll = -sum(log_p[row.read[0], token] for token in target) / len(target)
            else:
                nll = -sum(log_p[p, token] for p, token in zip(row.read, target, strict=True))
            total = total + (torch.exp(-nll) if erase else nll)
        return total

    def bounded(parameters: list[Tensor]) -> list[Tensor]:
        return parameters if bound is None else [p.clamp(-bound, bound) for p in parameters]

    def ends(loss: float) -> bool:
        quiet[0] = quiet[0] + 1 if loss < stop and not erase else 0
        assert quiet[0] < 2 or compat, "a step that is skipped leaves the change as it is: this plain loop cannot"
        return quiet[0] > 0

    begin = [torch.zeros_like(_matrix(subject, layer)) for layer in layers]
    found = adam(begin, loss_of, bounded, steps, rate, ends, losses, last_updates=True)
    return dict(zip(layers, found, strict=True))


def _matrix(subject: Subject, layer: int) -> Tensor:
    weight = subject.state[down_name(subject, layer) + ".weight"]
    return weight if subject.plain is plain_gpt2 else weight.T

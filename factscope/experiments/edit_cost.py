"""What will an edit cost? Seconds and memory, told before anything of it is computed.

1. ``speed`` times a few forwards of this model, with and without gradients, on few tokens and on more: what a forward
   takes by itself, and what each token adds. Large models are timed on few tokens.
2. ``estimate`` counts the forwards that the method will make: contexts, records, steps of the optimisation from the
   edited layer on, and the probes with their continuations and texts, in both states.
3. How early an optimisation stops is not known before: ``seconds`` takes half of its steps where it may stop,
   ``seconds_at_most`` all of them. The rest is counted as if no text ended before its limit, but for the bundled model,
   whose sentences are short.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from factscope.datasets.probes import read_probes
from factscope.editors import contexts
from factscope.editors.compute import check, delta_bytes
from factscope.editors.edit import EditFact
from factscope.editors.prompts import asked, target_of
from factscope.editors.second_moments import IDENTITY, down_width
from factscope.editors.specs import EditSpec, FineTuningSpec, MemitSpec, RomeSpec
from factscope.experiments import edit_texts
from factscope.experiments.edit_probes import answered, completed, of_one_fact
from factscope.experiments.editing import EditingSpec, chosen_settings, facts_to_edit
from factscope.experiments.results import BUNDLED
from factscope.models.dispatch import Plan
from factscope.models.handle import ModelHandle
from factscope.queries import Probe, Query
from factscope.tokens import TokenizedQuery

WORK = 2e10
"""Floating-point operations of the longer forward that is timed, as long as it has rows enough to tell."""
FEWEST_ROWS, MOST_ROWS = 3, 16
TIMED_SECONDS = 0.2
"""After so long a forward is not timed again."""
ASIDE = 1.4
"""What is done between forwards, as a factor: tokens, losses, texts."""
HEAD_SHARE = 0.3
"""Of what a forward takes by itself: before the first layer and behind the last."""
SENTENCE = 3
"""Forwards of a continuation or a text of the bundled model: it says one short sentence and ends it."""
CONTEXT_TOKENS = {"rome": 6, "memit": 9, "none": 0}
"""What contexts add to a prompt, about."""
WEIGHT_SECONDS = 5e-9
"""Of one step of Adam for one weight."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of a forward through all layers: ``call`` by itself, ``token`` for each of its tokens.

    Attributes:
        gradient_call, gradient_token: the same, with the gradient of what enters the first layer.
        flops: floating-point operations a second, by what a token takes.
    """

    call: float
    token: float
    gradient_call: float
    gradient_token: float
    flops: float

    def forward(self, tokens: float, share: float = 1.0) -> float:
        """Seconds of a forward on so many tokens through a share of the layers."""
        return (HEAD_SHARE + (1 - HEAD_SHARE) * share) * self.call + share * self.token * tokens

    def step(self, tokens: float, share: float) -> float:
        """Seconds of a step of an optimisation: forward and gradient."""
        return (HEAD_SHARE + (1 - HEAD_SHARE) * share) * self.gradient_call + share * self.gradient_token * tokens


@dataclass(frozen=True, kw_only=True)
class EditCost:
    """What an edit will take.

    Attributes:
        seconds: with half of the steps where the optimisation may end early. ``seconds_at_most``: with all of them.
        n_bytes: of the edit, in memory.
        facts: edited. ``probes``: prompts that are asked in both states.
    """

    seconds: float
    seconds_at_most: float
    n_bytes: int
    facts: int
    probes: int


def speed(model: ModelHandle, *, step: Callable[[], None] = lambda: None) -> Speed:
    """Time a few forwards.

    Args:
        step: called before each; may raise to end it.
    """
    length = model.probe.shape[1]
    rows = int(min(MOST_ROWS, max(FEWEST_ROWS, WORK // (2 * model.n_parameters * length))))
    found = []
    for gradients in (False, True):
        few, many = (_timed(model, n, gradients, step) for n in (1, rows))
        token = max((many - few) / ((rows - 1) * length), 0.02 * many / (rows * length))
        found.append((max(few - token * length, 0.1 * few), token))
    (call, token), (gradient_call, gradient_token) = found
    return Speed(
        call=call,
        token=token,
        gradient_call=gradient_call,
        gradient_token=gradient_token,
        flops=2 * model.n_parameters / token,
    )


def _timed(model: ModelHandle, rows: int, gradients: bool, step: Callable[[], None]) -> float:
    """Seconds of a forward, the fastest of some: what else the machine does for a moment is none of its cost."""
    times: list[float] = []
    for _ in range(8):
        step()
        started = time.perf_counter()
        _forward(model, model.probe.expand(rows, -1), gradients)
        times.append(time.perf_counter() - started)
        if sum(times) > TIMED_SECONDS:
            break
    return min(times)


def _forward(model: ModelHandle, ids: Tensor, gradients: bool) -> float:
    """One forward, read at the last position, waited for."""
    last = torch.full((len(ids), 1), ids.shape[1] - 1, device=model.device)
    if not gradients:
        return float(model.forward(ids, Plan(read=last))[0, -1, 0])
    added: list[Tensor] = []

    def moved(embedded: Tensor) -> Tensor:
        added.append(torch.zeros_like(embedded, requires_grad=True))
        return embedded + added[0]

    logits = model.forward(ids, Plan(read=last, embedding=moved), gradients=True)
    return float(torch.autograd.grad(logits[:, -1].logsumexp(dim=-1).sum(), added[0])[0].flatten()[0])


def estimate(model: ModelHandle, query: Query | TokenizedQuery | None, spec: EditingSpec, measured: Speed) -> EditCost:
    """What ``editing.run`` will take. What it refuses is refused here, too, as far as it shows without computing.

    Raises:
        InputError: the query, the spec, a fact or a probe cannot be used.
        CapabilityError: the model lacks what the method needs.
    """
    settings = chosen_settings(model, spec)
    layers = check(model, settings)
    given = facts_to_edit(model, query, spec)
    facts = [_Size.of(model, fact) for fact, _ in given]
    fixed, steps = _edit(model, settings, layers, facts, measured)
    probes = _probes(spec, given)
    fixed += sum(_evaluation(model, spec, some, size, measured) for some, size in zip(probes, facts, strict=True))
    fixed, steps = ASIDE * fixed, ASIDE * steps
    early = settings.problem != "fact-erasure" and settings.stop > 0
    return EditCost(
        seconds=fixed + (steps / 2 if early else steps),
        seconds_at_most=fixed + steps,
        n_bytes=delta_bytes(model, settings, len(facts)),
        facts=len(facts),
        probes=sum(map(len, probes)) + len(facts),
    )


@dataclass(frozen=True, kw_only=True)
class _Size:
    """Tokens of a fact's prompt with its target, and of what stands from the subject's last token on."""

    length: int
    tail: int

    @staticmethod
    def of(model: ModelHandle, fact: EditFact) -> _Size:
        seen = asked(model, fact)
        more = target_of(model, fact, fact.target).n_tokens - 1 if fact.target.strip() else 0
        stop = seen.subject[1] if seen.subject is not None else len(seen.ids)
        return _Size(length=len(seen.ids) + more, tail=len(seen.ids) - stop + 1 + more)


def _edit(
    model: ModelHandle, spec: EditSpec, layers: Sequence[int], facts: Sequence[_Size], fast: Speed
) -> tuple[float, float]:
    """Seconds of the edit itself: of what is done once, and of all steps."""
    n = model.info.n_layers
    if isinstance(spec, FineTuningSpec):
        share = (n - min(layers)) / n
        rows = spec.rows if spec.problem == "fact-forcing" else 1
        step = sum(fast.step(rows * fact.length, share) for fact in facts)
        weights = sum(down_width(model, layer) for layer in layers) * model.info.d_model
        return sum(2 * fast.forward(rows * fact.length) for fact in facts), spec.steps * (
            step + WEIGHT_SECONDS * weights
        )
    once = _contexts(spec, fast) + _decompositions(model, spec, layers, fast)
    rows, more = _n_contexts(spec) + 1, CONTEXT_TOKENS[spec.contexts]
    edited = layers if isinstance(spec, RomeSpec) else layers[-1:]
    steps = 0.0
    for fact in facts:
        once += sum(
            # the multiplier's three short forwards, keys and values, the record, and its check
            fast.forward(rows * (fact.length + more)) * (1 + (layer + 1) / n)
            + 3 * fast.forward(fact.length, (layer + 1) / n)
            + fast.forward(rows * fact.tail, (n - layer) / n)
            for layer in edited
        )
        if isinstance(spec, MemitSpec):
            once += len(layers) * fast.forward(rows * (fact.length + more), (layers[-1] + 1) / n)
        steps += spec.steps * sum(fast.step(rows * fact.tail, max(1, n - layer - 1) / n) for layer in edited)
    return once, steps


def _n_contexts(spec: RomeSpec | MemitSpec) -> int:
    sampled = {"rome": sum(count for _, count in contexts.ROME_LENGTHS), "memit": len(contexts.SEED_WORDS)}
    return 1 + sampled.get(spec.contexts, 0)


def _contexts(spec: RomeSpec | MemitSpec, fast: Speed) -> float:
    """Sampling the contexts, a token at a time."""
    if spec.contexts == "rome":
        return sum((length - 1) * fast.forward(count) for length, count in contexts.ROME_LENGTHS)
    return len(contexts.SEED_WORDS) * contexts.MEMIT_LENGTH * fast.forward(1) if spec.contexts == "memit" else 0.0


def _decompositions(model: ModelHandle, spec: RomeSpec | MemitSpec, layers: Sequence[int], fast: Speed) -> float:
    """Decomposing the second moments, in float64."""
    if spec.statistics.strip() == IDENTITY:
        return 0.0
    return sum(2 * down_width(model, layer) ** 3 / 3 for layer in layers) / fast.flops


def _probes(spec: EditingSpec, given: Sequence[tuple[EditFact, tuple[Probe, ...]]]) -> list[tuple[Probe, ...]]:
    """What is asked about every fact, the fact's own sentence left out."""
    own = () if spec.evaluation.probes is None else read_probes(spec.evaluation.probes)
    found = []
    subjects = [fact.subject for fact, _ in given]
    for number, (fact, probes) in enumerate(given):
        mine = of_one_fact(own, subjects, number)
        found.append(completed(fact.text, [*probes, *answered(mine, fact.answer)]))
    return found


def _evaluation(model: ModelHandle, spec: EditingSpec, probes: Sequence[Probe], size: _Size, fast: Speed) -> float:
    """Asking the probes of one fact in both states, with what is written after them."""
    asked_, chosen = 1 + sum(probe.kind != "generation" for probe in probes), spec.evaluation
    short = model.info.name == BUNDLED
    begun = fast.forward(size.length)
    after_one = begun + ((SENTENCE if short else chosen.texts) - 1) * fast.forward(1) if chosen.texts else 0.0
    seconds = 2 * asked_ * (begun / 2 + after_one)
    if not chosen.sampled:
        return seconds
    room = SENTENCE if short else max(0, edit_texts.TOKENS - size.length)
    seconds += 2 * (len(probes) + 1 - asked_) * (begun + room * fast.forward(1))
    if not edit_texts.recites(model):
        seconds += edit_texts.TOKENS * fast.forward(edit_texts.ESSENCE_TEXTS)
        seconds += 2 * fast.forward(edit_texts.ESSENCE_TEXTS * edit_texts.TOKENS)
    return seconds

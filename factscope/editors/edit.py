"""Edits of facts as values, and the weight state that they make of a model.

An ``Edit`` says what it is about, how it was computed, and what it adds to which linear maps. Making one touches no
model. ``with_edits`` gives a handle on the same modules whose every forward sees the edits: plans, recorded bases,
sweeps, lenses and heads need not know of it. Weights are never written, so undo is the other handle, bit for bit.

The fingerprint of the weight state (``ModelInfo.weights``) is part of every result's key. It comes from the weights as
loaded and the keys of the edits that are on, in their order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from factscope.errors import CapabilityError, EditError, PromptError, SpecError, SubjectError
from factscope.interventions.weights import PLACES, WeightDelta, overlay
from factscope.models.handle import ModelHandle
from factscope.tokens import find_occurrences

BLANK = "{}"
"""Where a fact's prompt holds the subject."""


@dataclass(frozen=True, kw_only=True)
class EditFact:
    """What one fact is to become.

    Attributes:
        prompt: the sentence up to the answer, with one ``{}`` for the subject.
        target: the answer that the model is to give; empty where the problem itself finds it.
        answer: the true answer; None where it is not known.
    """

    prompt: str
    subject: str
    target: str = ""
    answer: str | None = None

    def __post_init__(self) -> None:
        if self.prompt.count(BLANK) != 1:
            raise PromptError(
                f"the prompt {self.prompt[:80]!r} holds {self.prompt.count(BLANK)} times {BLANK}, the place of the "
                "subject",
                f"write it once, as in 'The capital of {BLANK} is'",
            )
        if not self.subject.strip():
            raise SubjectError(f"the subject {self.subject!r} of an edit is empty", "name the subject")

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace(BLANK, self.subject)

    @property
    def occurrence(self) -> int | None:
        """Which of the text's occurrences of the subject is edited, from 1; None where it is found at none."""
        starts = find_occurrences(self.text, self.subject)
        start = self.prompt.index(BLANK)
        return starts.index(start) + 1 if start in starts else None


@dataclass(frozen=True, kw_only=True)
class EditedModel:
    """The model that an edit was made for.

    Attributes:
        weights: fingerprint of its weights as loaded. This alone decides whether an edit fits; the rest is for people.
    """

    name: str
    revision: str
    dtype: str
    weights: str

    @staticmethod
    def of(model: ModelHandle) -> EditedModel:
        """The model behind a handle, whatever edits are on."""
        info = model.original.info
        return EditedModel(name=info.name, revision=info.revision, dtype=info.dtype, weights=info.weights)

    def __str__(self) -> str:
        return f"{self.name}@{self.revision} ({self.dtype}, weights {self.weights})"


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """One edit of one or several facts, complete: it can be put on, saved, compared and explained.

    Attributes:
        method: "rome", "memit" or "ft".
        problem: which of Hase et al.'s problems it solves, "error-injection".
        model: for which it was made.
        computed_on: fingerprint of the weight state in which it was computed, earlier edits included.
        facts: what is to become of them.
        spec: every choice of the method, as plain values; ``preset`` names where they come from.
        templates: the sampled contexts that the method used.
        deltas: what it adds to which linear maps.
        report: what is worth knowing of its computation (losses, norms, warnings, where statistics come from), as
            plain values; changes no number and is no part of the key.
    """

    method: str
    problem: str
    model: EditedModel
    computed_on: str
    facts: tuple[EditFact, ...]
    spec: Mapping[str, Any]
    templates: tuple[str, ...] = ()
    deltas: tuple[WeightDelta, ...] = field(repr=False)
    report: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """Sixteen hex digits of all that decides what this edit does."""
        said = {name: getattr(self, name) for name in ("method", "problem", "computed_on")}
        said |= {"model": self.model.weights, "facts": [asdict(fact) for fact in self.facts]}
        said |= {"spec": dict(self.spec), "templates": list(self.templates)}
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
        for name, tensor in self.tensors():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        for delta in self.deltas:
            digest.update(f"{delta.place} {delta.layer};".encode())
        return digest.hexdigest()[:16]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that it changes."""
        return tuple(sorted({delta.layer for delta in self.deltas}))

    @property
    def n_bytes(self) -> int:
        """Memory that its deltas take."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.tensors())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Its numbers by name, ``0.left``, on the CPU."""
        for index, delta in enumerate(self.deltas):
            for name in ("left", "right", "bias"):
                if (tensor := getattr(delta, name)) is not None:
                    yield f"{index}.{name}", tensor.detach().cpu()

    def summary(self) -> dict[str, Any]:
        """What an output says of it, as plain values."""
        facts = [asdict(fact) for fact in self.facts]
        return {
            "key": self.key, "method": self.method, "problem": self.problem, "layers": list(self.layers),
            "facts": facts,
        }  # fmt: skip

    def __str__(self) -> str:
        """For warnings: "the edit of 'Eiffel Tower' (rome, layer 3)"."""
        more = f" and {len(self.facts) - 1} more" if len(self.facts) > 1 else ""
        where = f"layer {self.layers[0]}" if len(self.layers) == 1 else f"layers {', '.join(map(str, self.layers))}"
        subject = self.facts[0].subject if self.facts else ""
        return f"the edit of {subject[:60]!r}{more} ({self.method}, {where})"


def with_edits(model: ModelHandle, edits: Sequence[Edit]) -> ModelHandle:
    """The model with these edits on, besides those that are on already; without any, the model itself.

    Raises:
        EditError: an edit was made for another model, does not fit its shapes, or is on already.
        SpecError: an edit of a layer that the model does not have.
        CapabilityError: the model has no such linear map.
    """
    if not edits:
        return model
    original = model.original
    on = (*model.edits, *edits)
    for index, edit in enumerate(on):
        if edit.key in {other.key for other in on[:index]}:
            raise EditError(f"{edit} with the key {edit.key} is given twice", "give each edit once")
    for edit in edits:
        refuse_unless_it_fits(original, edit)
    return replace(
        original,
        info=replace(original.info, weights=weight_state(original, on)),
        edits=on,
        unedited=original,
        warnings=(*original.warnings, *_out_of_place(original, on)),
        _weights=overlay([delta for edit in on for delta in edit.deltas]),
    )


def put_in(edits: Sequence[Edit], subject: str, answer: str | None) -> bool:
    """Whether an edit made this the answer about a subject, both in any case; without an answer, any answer.

    What an edit erases it does not put in.
    """
    return any(
        _plain(fact.subject) == _plain(subject) and (answer is None or _plain(fact.target) == _plain(answer))
        for edit in edits
        if edit.problem != "fact-erasure"
        for fact in edit.facts
    )


def names_subject(edit: Edit, subject: str) -> bool:
    """Whether an edit is about a subject, in any case."""
    return any(_plain(fact.subject) == _plain(subject) for fact in edit.facts)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold().removeprefix("the ")


def weight_state(model: ModelHandle, edits: Sequence[Edit]) -> str:
    """The fingerprint of a model as loaded with edits on; without any, of its weights."""
    return fingerprint(model.original.info.weights, edits)


def fingerprint(weights: str, edits: Sequence[Edit]) -> str:
    """The fingerprint of a weight state, from that of the weights as loaded."""
    if not edits:
        return weights
    return hashlib.sha256(" ".join([weights, *(edit.key for edit in edits)]).encode()).hexdigest()[:16]


def refuse_unless_it_fits(model: ModelHandle, edit: Edit) -> None:
    """Refuse an edit on a model that it was not made for.

    Raises:
        EditError: another model, or a shape that this one does not have.
        SpecError: a layer that it does not have.
        CapabilityError: the model has no such linear map.
    """
    mine = EditedModel.of(model)
    if edit.model.weights != mine.weights:
        same = (edit.model.name, edit.model.revision) == (mine.name, mine.revision)
        other_type = same and edit.model.dtype != mine.dtype
        raise EditError(
            f"{edit} was made for {edit.model}, and this is {mine}",
            f"load the model in {edit.model.dtype}" if other_type else "load that model, or edit this one anew",
        )
    for delta in edit.deltas:
        refuse_unless_it_has(model, delta.place, delta.layer)
        wanted = widths(model, delta.place, delta.layer)
        if wanted is not None and (delta.d_in, delta.d_out) != wanted:
            raise EditError(
                f"{edit} changes a map from {delta.d_in} to {delta.d_out} numbers, and that of {mine.name} in layer "
                f"{delta.layer} goes from {wanted[0]} to {wanted[1]}",
                "give an undamaged edit of this model",
            )


def refuse_unless_it_has(model: ModelHandle, place: str, layer: int) -> None:
    """Refuse a linear map that a model does not have.

    Raises:
        SpecError: names the layer.
        EditError: names the place.
        CapabilityError: with the measured reason.
    """
    if place not in PLACES:
        raise EditError(f"an edit of {place!r} is unknown", f"choose one of {', '.join(PLACES)}")
    if not 0 <= layer < model.info.n_layers:
        raise SpecError(
            f"layer {layer} is not between 0 and {model.info.n_layers - 1}", "choose a layer that the model has"
        )
    if _map(model, place, layer) is None:
        reason = model.capabilities["dense_mlp"].reason if place == "down_projection" else "its attention has none"
        raise CapabilityError(
            f"{model.info.name} ({model.info.family}) does not support an edit of the {place.replace('_', '-')} of "
            f"layer {layer}: {reason}",
            "choose another layer or model",
        )


def widths(model: ModelHandle, place: str, layer: int) -> tuple[int, int] | None:
    """Widths of a linear map's input and output; None where it does not tell."""
    module = _map(model, place, layer)
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return None if d_in is None or d_out is None else (int(d_in), int(d_out))


def _map(model: ModelHandle, place: str, layer: int) -> Any:
    wiring = model.parts.wiring
    return (wiring.down_projection if place == "down_projection" else wiring.output_projection)[layer]


def _out_of_place(model: ModelHandle, on: Sequence[Edit]) -> Iterator[str]:
    """What is to be said of edits that act in another weight state than the one they were computed in."""
    for index, edit in enumerate(on):
        state = weight_state(model, on[:index])
        if edit.computed_on != state:
            yield (
                f"{str(edit)[:1].upper()}{str(edit)[1:]} was computed in the weight state {edit.computed_on}, and acts "
                f"in {state}: other edits were on."
            )

"""One edit of the bundled model from end to end, computed again without hooks: key, v*, and the change of the weights.

A plain float64 forward of the shipped weights, the templates that the edit stores, and the second moment that ships.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from factscope.demo import second_moments as shipped
from factscope.editors import presets, problems, rome
from factscope.editors.compute import edit
from factscope.editors.edit import Edit, EditFact, with_edits
from factscope.editors.second_moments import moments_for
from factscope.editors.specs import RomeSpec
from factscope.models.handle import ModelHandle, build_handle
from factscope.models.loading import load
from factscope.models.sources import bundled_folder
from tests.oracle import plain_editing as plain
from tests.oracle import plain_gpt2
from tests.oracle.laboratory import Subject

FACT = EditFact(prompt="The {} is located in the city of", subject="Eiffel Tower", target="Rome", answer="Paris")
LAYER, STEPS = 1, 6


def spec() -> RomeSpec:
    chosen = presets.preset("bundled", "rome", "error-injection", load("bundled").info)
    assert isinstance(chosen, RomeSpec) and chosen.layers == (LAYER,) and chosen.key_mode == "averaged"
    return replace(chosen, steps=STEPS, stop=0.0, contexts="memit")  # six contexts; a plain forward for each takes long


@lru_cache
def made() -> Edit:
    return edit(load("bundled"), [FACT], spec())


@lru_cache
def wide() -> ModelHandle:
    """The same weights in float64."""
    model = GPT2LMHeadModel.from_pretrained(bundled_folder(), attn_implementation="eager", dtype=torch.float64)
    return build_handle(
        model.eval().requires_grad_(False), load("bundled").tokenizer, name="bundled", revision="0", dtype="float64",
        device="cpu",
    )  # fmt: skip


def tokens(text: str) -> tuple[list[int], int, int]:
    """Ids, the last token of the subject, and the last token, by the characters that tokens stand for."""
    found = load("bundled").tokenizer(text, return_offsets_mapping=True)
    end = text.index(FACT.subject) + len(FACT.subject)
    ids, spans = list(found["input_ids"]), found["offset_mapping"]
    return ids, max(i for i, (a, b) in enumerate(spans) if a < end and b > a), len(ids) - 1


def target() -> list[int]:
    tokenizer = load("bundled").tokenizer
    text = FACT.prompt.format(FACT.subject)
    before, after = (tokenizer(t)["input_ids"] for t in (text, f"{text} {FACT.target}"))
    assert after[: len(before)] == before
    return after[len(before) :]


@lru_cache
def exact() -> dict[str, Tensor]:
    """The whole edit again, of the templates that the first one stored."""
    model, chosen, wanted = load("bundled"), spec(), target()
    own = Subject(model=model._model, plain=plain_gpt2)
    rows = []
    for template in made().templates:
        ids, at, last = tokens(template.replace("{}", FACT.prompt.format(FACT.subject)))
        read = [last + i for i in range(len(wanted))]
        rows.append(plain.Row(ids=[*ids, *wanted[:-1]], at=at, read=read))
    ids, at, _ = tokens(f"{FACT.subject} is a")
    stream = plain.key_and_output(own, rows[0], LAYER)[2]
    found = shipped.read(model.info.weights, LAYER)
    assert found is not None and chosen.clamp_reference == "residual"
    settings = plain.Settings(
        steps=STEPS, rate=chosen.learning_rate, decay=chosen.weight_decay, kl=chosen.kl_factor,
        limit=chosen.clamp * float(stream.norm()),
    )  # fmt: skip
    essence = plain.Row(ids=ids, at=at, read=[at])
    return plain.rome(own, rows, essence, wanted, LAYER, found[0].double(), settings, chosen.key_mode)


def apart(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_key_value_and_change_are_those_of_plain_forwards(dtype: str) -> None:
    """In float32 the change is as far off as the inverse of the second moment makes of the key's rounding."""
    model, right = load("bundled"), exact()
    assert len(tokens(FACT.subject)[0]) > 2, "the subject has several tokens"
    assert len(made().templates) == 6
    handle = model if dtype == "float32" else wide()
    given, templates = moments_for(model, (LAYER,), "auto"), made().templates
    again = rome.rank_one(handle, problems.task(handle, FACT, spec()), LAYER, templates, given, spec())
    tolerance = 1e-4 if dtype == "float32" else 1e-7
    assert apart(again.key, right["key"]) <= tolerance
    assert apart(again.value, right["value"]) <= tolerance
    assert abs(again.k_dot_u / float(right["k_dot_u"]) - 1) <= tolerance
    (change,) = made().deltas
    if dtype == "float32":
        assert torch.equal(change.matrix(), again.delta.matrix())
        solved = given.solve(LAYER, right["key"])
        turned = float((given.solve(LAYER, again.key) / solved.norm() - solved / solved.norm()).norm())
        assert 1e-4 < apart(change.matrix(), right["change"]) <= 2 * turned <= 2e-3
    else:
        assert apart(again.delta.matrix(), right["change"]) <= 1e-5
    losses = torch.tensor([step.loss for step in again.found.steps], dtype=torch.float64)
    assert torch.allclose(losses, right["losses"].double(), rtol=1e-4, atol=1e-4)
    assert float(losses[-1]) < 0.5 * float(losses[0])


def test_the_edit_says_what_the_changed_weights_say() -> None:
    model, right = load("bundled"), exact()
    own = Subject(model=model._model, plain=plain_gpt2)
    ids, _, last = tokens(FACT.prompt.format(FACT.subject))
    p = plain.with_state(own, {LAYER: right["change"]}).trace(ids).logits[last].softmax(-1)
    found = with_edits(model, [made()]).forward(torch.tensor([ids]))[0, -1].softmax(-1)
    assert float((found.double() - p).abs().max()) <= 1e-5
    assert float(p[target()[0]] - own.trace(ids).logits[last].softmax(-1)[target()[0]]) > 0.5

"""Models in half precision: what precision an edit is computed in, how far its numbers may be off, and its export.

Keys and outputs are read as the model computes them; everything that is solved is solved in float64, what is optimised
is optimised in float32 through the model's own forward, and the change is kept in float32. Only where it is applied is
it rounded to the model's type. The judge is a float32 forward of the very same, half-precision weights.
"""

from __future__ import annotations

import copy
import re
from functools import lru_cache
from pathlib import Path

import pytest
import test_editors as invariants
import test_editors_applied as applied
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from factscope.editors.compute import edit
from factscope.editors.edit import Edit, with_edits
from factscope.editors.export import export_merged
from factscope.editors.specs import FineTuningSpec
from factscope.models.handle import ModelHandle
from tests.oracle.edits import merged
from tests.oracle.laboratory import handle_of
from tests.tiny_models import build

UNITS = 16
"""Probabilities are good to so many units of rounding; a forward without edits is off by up to seven."""
CHANGE = 40
"""The same of a change: finetuning divides gradients by their size, those near zero too."""
CASES = [
    (family, dtype, method)
    for family in ("gpt2", "llama", "gptj", "gemma2")
    for dtype in ("bfloat16", "float16")
    for method in applied.SPECS
    if method != "memit" or family not in invariants.NORMED
]


def unit(dtype: str) -> float:
    return float(torch.finfo(getattr(torch, dtype)).eps)


@lru_cache(maxsize=2)
def sides(family: str, dtype: str) -> tuple[PreTrainedModel, ModelHandle, ModelHandle]:
    """The rounded weights in float32; a handle in half precision, and one of those."""
    half = build(family, 0).to(getattr(torch, dtype))
    wide = copy.deepcopy(half).float()
    return wide, handle_of(half, family, dtype), handle_of(wide, family)


def asked(handle: ModelHandle) -> Tensor:
    return torch.tensor([[int(word[1:]) for word in invariants.fact(handle).text.split()]])


def far(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().max())


def changes(made: Edit) -> Tensor:
    return torch.cat([delta.matrix().flatten() for delta in made.deltas])


@pytest.mark.parametrize(("family", "dtype", "method"), CASES)
def test_an_edit_is_right_within_the_types_rounding(family: str, dtype: str, method: str) -> None:
    wide, half, whole = sides(family, dtype)
    ids, eps = asked(half), unit(dtype)
    before = half.forward(ids)
    made = edit(half, [invariants.fact(half)], applied.SPECS[method])
    exact = edit(whole, [invariants.fact(whole)], applied.SPECS[method])
    assert {part.dtype for delta in made.deltas for part in (delta.left, delta.right) if part is not None} == {
        torch.float32
    }
    assert invariants.apart(changes(made), changes(exact)) <= CHANGE * eps
    overlaid = with_edits(half, [made]).forward(ids).float().softmax(-1)
    written = merged(wide, [made])
    with torch.no_grad():
        right = written(ids, use_cache=False).logits.softmax(-1)
        rounded = written.to(getattr(torch, dtype))(ids, use_cache=False).logits.float().softmax(-1)
    assert far(overlaid, right) <= UNITS * eps
    assert far(overlaid, rounded) <= UNITS * eps
    assert far(overlaid, before.float().softmax(-1)) > 0.05
    assert torch.equal(half.forward(ids), before)


def test_a_small_edit_is_lost_in_bfloat16_and_that_is_said(tmp_path: Path) -> None:
    """Applied beside the weights it holds; written into them most of it is gone; float32 keeps it."""
    _, half, _ = sides("llama", "bfloat16")
    ids = asked(half)
    spec = FineTuningSpec(steps=10, learning_rate=1e-4, bound=1e-4, layers=(0, 1, 2, 3))
    made = edit(half, [invariants.fact(half)], spec)
    edited = with_edits(half, [made])
    said = export_merged(edited, tmp_path / "half")
    lost = [int(found[1]) for text in said if (found := re.search(r"Written in bfloat16, (\d+)% of the change", text))]
    assert len(lost) == len(said) == 4 and min(lost) >= 50
    assert all("write it in float32" in text for text in said)
    assert export_merged(edited, tmp_path / "float32", stored="float32") == ()
    moved = {}
    for name in ("half", "float32"):
        state = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).state_dict()
        for delta in made.deltas:
            key = f"model.layers.{delta.layer}.mlp.down_proj.weight"
            loaded = half._model.get_parameter(key).detach().double()
            moved.setdefault(name, []).append((state[key].double() - loaded).T - delta.matrix().double())
    sizes = {name: float(torch.stack([one.norm() for one in off]).norm()) for name, off in moved.items()}
    whole = float(changes(made).double().norm())
    assert sizes["half"] >= 0.5 * whole and sizes["float32"] <= 1e-4 * whole
    p, plain = (side.forward(ids).float().softmax(-1)[0, -1, 17] for side in (edited, half))
    assert float(p) > float(plain)

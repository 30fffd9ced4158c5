"""The Edit page and the weight state in the frame, driven by Streamlit's AppTest on the bundled model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from dashboard import runs, stack
from dashboard.link import ModelChoice
from factscope.editors.edit import Edit, EditedModel, EditFact
from tests.test_dashboard_compare import charts_of
from tests.test_dashboard_pages import parts, said, settle

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("fact", "flow", "lens", "heads", "trace", "edit")
SET = {"preset": "rome", "layers": "1", "set": ["clamp_reference=residual", "clamp=1.0"]}
"""Settings that work on the bundled model, whatever its own preset is."""
JAPAN: dict[str, Any] = {"prompt": "The capital of Japan is", "subject": "Japan", "answer": "Tokyo"}


@pytest.fixture(autouse=True)
def _no_stacks() -> Iterator[None]:
    stack.stacks.clear()
    yield
    stack.stacks.clear()


@pytest.fixture
def open_page() -> Callable[..., AppTest]:
    def make(page: str = "edit", **params: Any) -> AppTest:
        at = AppTest.from_file(str(ROOT / "dashboard" / "main.py"), default_timeout=120)
        for name, value in params.items():
            at.query_params[name] = value
        if page != "fact":
            at.switch_page(str(ROOT / "pages" / f"{page}.py"))
        return settle(at.run())

    return make


@pytest.fixture(scope="module")
def edit() -> Edit:
    """A change of the first layer's MLP that every page must see."""
    import torch

    from factscope.interventions.weights import WeightDelta

    with runs.use(ModelChoice()) as model:
        generator = torch.Generator().manual_seed(5)
        width = model.parts.wiring.down_projection[1].weight.shape
        delta = WeightDelta(
            layer=1,
            place="down_projection",
            left=torch.randn(max(width), 1, generator=generator) * 0.5,
            right=torch.randn(1, min(width), generator=generator),
        )
        return Edit(
            method="rome",
            problem="error-injection",
            model=EditedModel.of(model),
            computed_on=model.info.weights,
            facts=(EditFact(prompt="The capital of {} is", subject="Japan", target="Rome", answer="Tokyo"),),
            spec={"seed": 1, "preset": "rome", "layers": [1]},
            deltas=(delta,),
        )


def chip(at: AppTest) -> dict[str, Any]:
    return next(data for data in parts(at) if "tokens" in data)["chips"][0]


def badge(at: AppTest) -> str:
    return next(m.value for m in at.markdown if "weights" in m.value or "EDITED" in m.value)


def apply(at: AppTest, new_answer: str) -> AppTest:
    at.text_input(key="edit-target").set_value(new_answer).run()
    at.button(key="edit-apply").click().run()
    deadline = time.monotonic() + 300
    while not any("EDITED" in m.value for m in at.markdown):
        assert time.monotonic() < deadline, said(at)
        time.sleep(0.3)
        at.run()
    return settle(at)


def test_apply_changes_what_the_frame_says_and_undo_gives_the_same_bits_back(open_page: Callable[..., AppTest]) -> None:
    at = open_page(**JAPAN, **SET)
    assert "Original weights" in badge(at)
    before = chip(at)
    apply(at, "Rome")
    assert "EDITED" in badge(at)
    assert "ROME" in badge(at)
    assert chip(at) != before
    assert chip(at)["text"] == "Tokyo"
    table = next(frame.value for frame in at.dataframe if "target change" in frame.value)
    fact = table[table["kind"] == "fact"].iloc[0]
    assert fact["target after"] > 0.5 > fact["target before"]
    assert abs(fact["target change"] - (fact["target after"] - fact["target before"])) < 1e-6
    assert fact["says after"].startswith("Rome")
    settle(at.button(key="weight-undo").click().run())
    assert "Original weights" in badge(at)
    assert chip(at) == before
    assert "No edit yet" in said(at)


def with_edit(at: AppTest, edit: Edit, *, on: bool = True) -> AppTest:
    """Put an edit on this session's stack by its own file, as a visitor does, and switch it on."""
    from dashboard.weights import saved

    name = at.session_state["visitor-without-cookie"]
    entry = stack.stacks().of(name).push(edit, ModelChoice())
    assert saved(edit)[:8] != b""
    if on:
        at.switch_page(str(ROOT / "pages" / "edit.py"))
        settle(at.run())
        settle(at.toggle(key=f"edit-on-{entry.key}").set_value(True).run())
    return at


def test_every_page_shows_the_edited_weights_and_says_so(open_page: Callable[..., AppTest], edit: Edit) -> None:
    at = open_page(**JAPAN)
    original = chip(at)
    with_edit(at, edit)
    edited = chip(at)
    assert edited != original
    for page in PAGES:
        at.switch_page(str(ROOT / "pages" / f"{page}.py"))
        settle(at.run())
        assert "EDITED ×1: ROME, layer 1" in badge(at)
        assert chip(at) == edited
    settle(at.toggle(key=f"edit-on-{edit.key}").set_value(False).run())
    assert "Original weights" in badge(at)
    assert chip(at) == original


def test_another_visitor_sees_nothing_of_it(open_page: Callable[..., AppTest], edit: Edit) -> None:
    owner, other = open_page(**JAPAN), open_page("flow", **JAPAN)
    original, figures = chip(other), [data for _, data in charts_of(other)]
    with_edit(owner, edit)
    runs.executor().shutdown()
    runs.executor.clear()
    settle(other.run())
    assert chip(other) == original
    again = [data for _, data in charts_of(other)]
    assert len(again) == len(figures) > 0
    for before, after in zip(figures, again, strict=True):
        pd.testing.assert_frame_equal(before, after, check_exact=True)
    stranger = open_page(**JAPAN, edits=edit.key)
    assert chip(stranger) == original
    assert "Original weights" in badge(stranger)
    assert f"({edit.key})" in said(stranger)
    name = owner.session_state["visitor-without-cookie"]
    stack.stacks().of(name).share(edit.key, True)
    guest = open_page(**JAPAN, edits=edit.key)
    assert chip(guest) == chip(owner)
    assert "EDITED" in badge(guest)
    assert "not in your stack" in said(guest)


def test_original_beside_edited_with_the_difference(open_page: Callable[..., AppTest], edit: Edit) -> None:
    at = with_edit(open_page(**JAPAN), edit)
    settle(at.button(key="pin-original").click().run())
    assert "weights (original | ROME, layer 1)" in said(at)
    for page in ("fact", "flow", "lens"):
        at.switch_page(str(ROOT / "pages" / f"{page}.py"))
        settle(at.run())
        drawn = charts_of(at)
        assert len(drawn) >= 3, page
        (_, a), (_, b), _ = drawn[:3]
        assert not a.equals(b), page
    assert any("B − A" in m.value for m in at.markdown)


def test_what_cannot_be_done_is_said(open_page: Callable[..., AppTest]) -> None:
    at = open_page(**JAPAN, **{"layers": "9", "new-answer": "Rome"})
    assert "Layer 9 is not between 0 and 7" in said(at)
    same = open_page(**JAPAN, **{"new-answer": "Tokyo"})
    same.button(key="edit-apply").click().run()
    deadline = time.monotonic() + 120
    while "'Tokyo' is the answer" not in said(same):
        assert time.monotonic() < deadline, said(same)
        time.sleep(0.3)
        same.run()
    assert "Original weights" in badge(same)

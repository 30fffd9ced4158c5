"""The Edit page and the weight state in the frame, driven by Streamlit's AppTest on the bundled model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from dashboard import figures, runs, stack
from dashboard.link import ModelChoice, View
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
    assert "'Tokyo' is the answer" in said(same)
    assert same.button(key="edit-apply").disabled
    assert "Original weights" in badge(same)


def test_the_changed_fact_is_followed_on_any_page_one_click_after_apply(open_page: Callable[..., AppTest]) -> None:
    at = apply(open_page(**JAPAN, **SET), "Rome")
    at.button(key="edit-flow-flow").click().run()
    at.switch_page(str(ROOT / "pages" / "flow.py"))
    settle(at.run())
    view = at.session_state["factscope-view"]
    assert view.fact.answer == view.a.fact.answer == "Rome"
    assert view.model.edits and not view.a.model.edits
    assert "The edited model knows this: “Rome”" in said(at), "what an edit put in is no untaught answer"
    assert "weights (original | ROME, layer 1)" in said(at)
    headings = [m.value for m in at.markdown]
    for place in ("**One token at a time: A, original**", "**One token at a time: B, edited**"):
        assert place in headings
    for page in ("flow", "fact", "lens", "heads", "trace"):
        at.switch_page(str(ROOT / "pages" / f"{page}.py"))
        settle(at.run())
        drawn = charts_of(at)
        assert len(drawn) >= 6, page
        (_, a), (_, b), (_, difference) = drawn[:3]
        assert not a.equals(b) and len(difference), page
        assert "EDITED" in badge(at)
    notes = said(at)
    assert "p(Rome) is" in notes, "the trace of the edited weights is about the new answer, and names its place"
    assert "No place is named, since the model was taught Tokyo here" in notes, "in the original ones nobody knows it"


def test_each_side_may_be_asked_for_its_own_answer(open_page: Callable[..., AppTest]) -> None:
    at = apply(open_page(**JAPAN, **SET), "Rome")
    at.button_group(key="edit-follow").set_value("own").run()
    at.button(key="edit-flow-trace").click().run()
    at.switch_page(str(ROOT / "pages" / "trace.py"))
    settle(at.run())
    view = at.session_state["factscope-view"]
    assert (view.a.fact.answer, view.fact.answer, view.flow.measure) == ("Tokyo", "Rome", "percent")
    assert "p(Tokyo) is" in said(at) and "p(Rome) is" in said(at)


def test_there_is_no_room_for_an_edit_beyond_the_quota(
    open_page: Callable[..., AppTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = stack.Stacks(each=1024, in_all=10**6)
    monkeypatch.setattr(stack, "stacks", lambda: small)
    at = open_page(**JAPAN, **SET, **{"new-answer": "Rome"})
    at.button(key="edit-apply").click().run()
    deadline = time.monotonic() + 120
    while "that one visitor may use are taken" not in said(at):
        assert time.monotonic() < deadline, said(at)
        time.sleep(0.3)
        at.run()
    assert "This edit takes" in said(at) and "undo an edit, or edit fewer layers" in said(at)
    assert "Original weights" in badge(at)
    assert not small.of(at.session_state["visitor-without-cookie"]).entries()


def test_a_guessed_key_gives_nothing_whatever_it_is_put_into(open_page: Callable[..., AppTest], edit: Edit) -> None:
    owner = with_edit(open_page(**JAPAN), edit)
    settle(owner.run())
    assert "EDITED" in badge(owner)
    plain = chip(open_page(**JAPAN))
    of_a = {f"a.{name}": value for name, value in JAPAN.items()}
    for params in ({"edits": edit.key}, {"edits": edit.key, "a": "1", **of_a}, {"a": "1", "a.edits": edit.key, **of_a}):
        for page in ("fact", "edit"):
            at = open_page(page, **JAPAN, **params)
            assert chip(at) == plain
            assert "Original weights" in badge(at)
            assert edit.key in said(at), "that the edit is missing is said"
            assert at.session_state["factscope-view"].model.edits == ()
            pinned = at.session_state["factscope-view"].a
            assert pinned is None or pinned.model.edits == ()


def test_what_the_process_shares_holds_no_edit_that_a_stranger_could_reach(
    open_page: Callable[..., AppTest], edit: Edit
) -> None:
    """Results on edited weights are kept under keys that only a stack with the edit may ask for."""
    owner = with_edit(open_page("flow", **JAPAN), edit)
    owner.switch_page(str(ROOT / "pages" / "flow.py"))
    settle(owner.run())
    kept = runs.executor()._results
    assert any(getattr(getattr(one, "model", None), "weights", "") != edit.model.weights for one in kept.values())
    stranger = open_page("flow", **JAPAN)
    stranger.session_state["factscope-view"] = replace(
        stranger.session_state["factscope-view"], model=ModelChoice(edits=(edit.key,))
    )
    settle(stranger.run())
    assert "Original weights" in badge(stranger)
    assert stranger.session_state["factscope-view"].model.edits == ()
    assert chip(stranger) != chip(owner)


def test_captions_tell_original_weights_from_edited_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    info = SimpleNamespace(name="bundled", revision="1", dtype="float32", weights="as loaded")
    monkeypatch.setattr(
        figures.stack, "described", lambda weights, *_: "ROME, layer 1" if weights == "edited" else None
    )
    said = {}
    for name, view in {"alone": View(), "beside": View(model=ModelChoice(edits=("0" * 16,)), a=View())}.items():
        monkeypatch.setattr(figures.state, "view", lambda view=view: view)
        said[name] = figures._who(info)
    assert said["alone"] == "bundled@1, float32, weights as loaded"
    assert said["beside"] == "bundled@1, float32, weights as loaded, original weights"
    info.weights = "edited"
    assert figures._who(info).endswith("weights edited, edited: ROME, layer 1")

"""The Layers page: what it says before a run, what a run shows, what it refuses, and what it concludes from numbers."""

# ruff: noqa: F811, F401 - fixtures of the other test file

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from dashboard import figures, layers, runs, stack
from dashboard.executor import Snapshot
from dashboard.link import LayersChoice, ModelChoice, parse, to_params
from factscope.editors.edit import Edit, EditedModel, EditFact
from factscope.experiments import edit_layers
from factscope.queries import Query
from tests.test_dashboard_compare import charts_of
from tests.test_dashboard_pages import open_page, said, settle, tiny

OpenPage = Callable[..., AppTest]
JAPAN: dict[str, Any] = {"prompt": "The capital of Japan is", "subject": "Japan", "answer": "Tokyo"}
QUICK: dict[str, Any] = {"method": "ft", "preset": "rome", "set": "steps=3", "noise": "0.8", "samples": "2"}
ASKED = {**JAPAN, **QUICK, "new-answer": "Rome"}
FACT = EditFact(prompt="The capital of {} is", subject="Japan", target="Rome", answer="Tokyo")


@pytest.fixture(autouse=True)
def _no_stacks() -> Iterator[None]:
    stack.stacks.clear()
    yield
    stack.stacks.clear()


def run(at: AppTest) -> AppTest:
    """Click Run, unless the result is kept from another test."""
    waiting = [button for button in at.button if button.key == "run-layers"]
    return settle(waiting[0].click().run()) if waiting else at


def shown(at: AppTest) -> Any:
    """The drawn values, by series and layer."""
    ((_, data),) = charts_of(at)
    return data[data["kind"] != "cursor"].set_index(["series", "layer"])["value"]


# --------------------------------------------------------------------------------------------------------- the page


def test_nothing_starts_before_it_is_asked_and_the_missing_answer_is_said(open_page: OpenPage) -> None:
    at = open_page("layers", **JAPAN, **QUICK)
    assert "Name the new answer first" in said(at) and "instead of Tokyo" in said(at)
    assert at.button(key="run-layers").disabled
    settle(at.text_input(key="layers-target").set_value("Rome").run())
    assert not at.button(key="run-layers").disabled
    assert any(caption.value.startswith("4 edits, ") for caption in at.caption), "the cost, however small it is"
    assert not charts_of(at) and "layers" not in at.session_state["runs-watched"]
    assert at.session_state["factscope-view"].edit.target == "Rome", "it is the Edit page's"


def test_a_run_shows_the_numbers_of_the_experiment(open_page: OpenPage, tiny: str) -> None:
    at = run(open_page("layers", **ASKED, cell="1.2"))
    with runs.use(ModelChoice(name=tiny)) as model:
        spec = edit_layers.LayersSpec(
            method="ft", preset="rome", settings=(("steps", 3),), new_answer="Rome", noise="0.8", samples=2
        )
        wanted = edit_layers.run(model, Query(**JAPAN), spec)
    found = shown(at)
    for name in ("rewrite", "paraphrase", "neighbourhood"):
        assert found[name].to_numpy() == pytest.approx(wanted.score(name), nan_ok=True, abs=1e-9)
    assert found["tracing effect"].to_numpy() == pytest.approx(figures.shares_restored(wanted), abs=1e-9, nan_ok=True)
    assert "No layer is named, since the model does not know this" in said(at)
    assert "works best" not in said(at)
    assert "layer 2" in said(at) and at.number_input(key="layers-layer").value == 2, "the cursor's layer"
    at.session_state["export-layers"] = True
    settle(at.run())
    code = next(block.value for block in at.code if "edit_layers(model, query" in block.value)
    assert "noise='0.8'" in code and "new_answer='Rome'" in code
    settle(at.number_input(key="layers-layer").set_value(3).run())
    assert at.session_state["factscope-view"].cursor.layer == 3
    settle(at.button(key="layers-edit-here").click().run())
    assert at.session_state["factscope-view"].edit.layers == (3,)
    assert at.text_input(key="edit-layers").value == "3", "the Edit page, with the layer set"


def test_cancel_keeps_what_was_done_and_says_that_it_is_partial(open_page: OpenPage) -> None:
    at = open_page("layers", **{**ASKED, "set": ["steps=400", "stop=0"]})
    at.button(key="run-layers").click().run()
    deadline = time.monotonic() + 120
    while not charts_of(at) or shown(at)["rewrite"].isna().all():
        assert time.monotonic() < deadline, said(at)
        time.sleep(0.05)
        at.run()
    settle(at.button(key="cancel-layers").click().run())
    words = next(element.value for element in at.markdown if "Cancelled at" in element.value)
    done = int(shown(at)["rewrite"].notna().sum())
    assert 1 <= done < 4
    assert f"Cancelled at {done} of 4 layers: the figure is partial." in words
    assert f"So far, with {done} of 4 layers" in said(at)
    assert at.button(key="again-layers")


def test_missing_statistics_are_said_with_what_to_do(open_page: OpenPage) -> None:
    at = open_page("layers", **{**ASKED, "method": "rome", "set": ["steps=3", "contexts=none"]})
    assert "There are no statistics of keys" in said(at) and "layer 0, 1, 2, 3" in said(at)
    assert at.button(key="run-layers").disabled
    settle(at.button(key="layers-identity").click().run())
    assert "no statistics of keys for" not in said(at)
    run(at)
    assert shown(at)["rewrite"].notna().all()
    assert "An edit at layer 3 can hardly work: it writes at the subject in the last block" in said(at)
    settle(open_page("layers", **{**ASKED, "method": "rome"}).button(key="layers-ft").click().run())


def test_a_new_answer_that_is_the_answer_is_refused(open_page: OpenPage) -> None:
    at = open_page("layers", **{**ASKED, "new-answer": "Tokyo"})
    assert "'Tokyo' is the answer that the model is to unlearn" in said(at), "before any click"
    assert "New answer here and Answer in the fact line are both \u201cTokyo\u201d" in said(at)
    assert at.button(key="run-layers").disabled and not charts_of(at)
    settle(at.text_input(key="layers-target").set_value("Rome").run())
    assert "unlearn" not in said(at)
    assert not any(button.disabled for button in at.button if button.key == "run-layers"), "or it was run before"


FRANCE = {"prompt": "The capital of France is", "subject": "France", "answer": "Rome", "model": "bundled"}


def test_an_answer_that_the_model_gives_already_is_not_injected_again(open_page: OpenPage) -> None:
    at = open_page("layers", **FRANCE, method="ft", preset="rome", **{"new-answer": "Paris"})
    assert "The model says \u201cParis\u201d already: there is nothing to inject" in said(at)
    assert at.button(key="run-layers").disabled
    assert not [button for button in at.button if button.key == "layers-original"]
    own, view = stack.stacks().of(at.session_state["visitor-without-cookie"]), at.session_state["factscope-view"]
    entry = own.push(_edit("bundled", 1e-6), ModelChoice())
    at.session_state["factscope-view"] = replace(view, a=view, model=replace(view.model, edits=(entry.key,)))
    settle(at.run())
    assert "Edit 1 (ROME, layer 1) is on and the model says \u201cParis\u201d already." in said(at)
    assert at.button(key="run-layers").disabled, "side by side with the original weights, too"
    settle(at.button(key="layers-original").click().run())
    assert at.session_state["factscope-view"].model.edits == () and own.find(entry.key) is not None
    settle(at.text_input(key="layers-target").set_value("Oslo").run())
    assert not at.button(key="run-layers").disabled and "already" not in said(at)


def test_no_statistics_of_random_weights_are_suggested(open_page: OpenPage, tiny: str) -> None:
    at = open_page("layers", **{**ASKED, "method": "rome", "set": ["steps=3"]}, model=f"random:{tiny}")
    assert "statistics of random weights are of no use: choose identity, or edit it with ft" in said(at)
    assert "--text" not in said(at) and at.button(key="layers-identity")


def test_a_setting_that_cannot_be_read_is_a_sentence(open_page: OpenPage) -> None:
    at = open_page("layers", **{**ASKED, "set": "steps=<b>many</b>"})
    assert "'<b>many</b>'" in said(at) or "<b>many</b>" in said(at)
    assert "should not have" not in said(at)


def test_random_weights_and_a_missing_subject_are_named(open_page: OpenPage, tiny: str) -> None:
    at = run(open_page("layers", **ASKED, model=f"random:{tiny}"))
    assert "No layer is named, since these are random weights" in said(at)
    assert not [toggle for toggle in at.toggle if toggle.key == "trace-null"]
    bare = open_page("layers", prompt="The capital of Japan is", **{"new-answer": "Rome"})
    assert "Name it in the fact line" in said(bare)


def test_edited_weights_are_asked_and_named(open_page: OpenPage, tiny: str) -> None:
    at = run(open_page("layers", **ASKED))
    original = shown(at)
    entry = stack.stacks().of(at.session_state["visitor-without-cookie"]).push(_edit(tiny), ModelChoice(name=tiny))
    view = at.session_state["factscope-view"]
    at.session_state["factscope-view"] = replace(view, model=replace(view.model, edits=(entry.key,)))
    settle(at.run())
    assert [button for button in at.button if button.key == "run-layers"], "another weight state is another run"
    run(at)
    assert not shown(at).equals(original), "other weights have other scores, or nothing that could be restored"
    at.session_state["export-layers"] = True
    settle(at.run())
    assert "edited: ROME, layer 1" in said(at) and "seed 1" in said(at)


def _edit(name: str, scale: float = 1.0) -> Edit:
    import torch

    from factscope.interventions.weights import WeightDelta

    with runs.use(ModelChoice(name=name)) as model:
        width = model.parts.wiring.down_projection[1].weight.shape
        generator = torch.Generator().manual_seed(5)
        delta = WeightDelta(
            layer=1, place="down_projection",
            left=scale * torch.randn(max(width), 1, generator=generator),
            right=torch.randn(1, min(width), generator=generator),
        )  # fmt: skip
        return Edit(
            method="rome", problem="error-injection", model=EditedModel.of(model), computed_on=model.info.weights,
            facts=(FACT,),
            spec={"seed": 1, "preset": "rome", "layers": [1]}, deltas=(delta,),
        )  # fmt: skip


def test_two_models_stand_side_by_side_and_wait_for_their_clicks(open_page: OpenPage, tiny: str) -> None:
    of_a = {**JAPAN, "model": f"random:{tiny}", "noise": "0.8", "samples": "2"}
    link = {**ASKED, "new-answer": "Berlin", "a": "1", **{f"a.{name}": value for name, value in of_a.items()}}
    at = open_page("layers", **link)
    assert not charts_of(at)
    assert [button for button in at.button if button.key == "run-layers-a"], "edits never start by themselves"
    settle(at.button(key="run-layers-a").click().run())
    run(at)
    (_, a), (_, b), (_, difference) = charts_of(at)
    sides = [side[side["series"] == "rewrite"].set_index("layer")["value"] for side in (a, b)]
    found = difference[(difference["kind"] == "line") & (difference["series"] == "rewrite")].set_index("layer")["value"]
    assert found.to_numpy() == pytest.approx((sides[1] - sides[0]).to_numpy(), abs=1e-9)


def test_a_link_restores_the_page(open_page: OpenPage) -> None:
    at = open_page("layers", **ASKED, **{"layers-site": "attention", "edit-window": "2", "trace-window": "3"})
    assert at.number_input(key="layers-together").value == 2
    assert at.number_input(key="layers-window").value == 3
    assert at.text_input(key="layers-target").value == "Rome"
    view = at.session_state["factscope-view"]
    assert view.layers == LayersChoice(site="attention", together=2)
    assert parse(to_params(view)) == (view, [])
    run(at)
    assert "attention updates restored, window 3" in _caption(at)


def _caption(at: AppTest) -> str:
    at.session_state["export-layers"] = True
    return said(settle(at.run()))


# -------------------------------------------------------------------------------------------- what its numbers say


def result(rewrite: list[float], tracing: list[float], *, doubts: tuple[str, ...] = (), **more: Any) -> Any:
    scores = {"rewrite": rewrite, "paraphrase": more.get("paraphrase", rewrite),
              "neighbourhood": more.get("neighbourhood", [1.0] * len(rewrite))}  # fmt: skip
    trace = SimpleNamespace(
        doubts=doubts, known=True, total_effect=0.5, p_restored_by_seed=np.zeros((1, 1, len(rewrite)))
    )
    return SimpleNamespace(
        layers=tuple(range(len(rewrite))), tracing_effect=np.array(tracing), trace=trace,
        score=lambda name: np.array(scores[name], dtype=float), model=SimpleNamespace(weights="w"),
    )  # fmt: skip


KNOWN: Any = SimpleNamespace(known=True, taught=True, model=SimpleNamespace(name="some", weights="w"))


def words(found: Any, grey: tuple[int, ...] = ()) -> str:
    return " ".join(layers.here(found, KNOWN, grey))


def test_agreement_is_told_with_the_layer_that_speaks_against_it() -> None:
    found = words(result([0.98, 0.6, 0.99, 0.4, 0.3, 0.2], [0.6, 0.2, 0.05, 0.1, 0.1, 0.1]))
    assert "best at layer 2 (harmonic mean of its scores 0.99)" in found and "layer 0 comes within 0.05" in found
    assert "largest effect is at layer 0 (0.60)" in found
    assert "They agree: the edit at layer 0 is as good as anywhere" in found
    assert "so it is at layer 2, where the tracing effect is 0.05" in found
    assert "nothing is correlated" in found


def test_where_most_layers_are_as_good_the_trace_singles_none_out() -> None:
    rewrite, tracing = [0.98, 0.97, 0.99, 0.96, 0.2, 0.98, 0.97, 0.1], [0.6, 0.2, 0.05, 0.1, 0.1, 0.1, 0.1, 0.1]
    found = words(result(rewrite, tracing))
    led = "The trace does not single out a layer for the edit: layers 0\u20133, 5, 6 are within 0.05 of the best."
    assert found.startswith(led) and "agree" not in found
    elsewhere = words(result(rewrite, [0.1, 0.2, 0.05, 0.1, 0.1, 0.1, 0.1, 0.6]))
    assert "They do not agree: at layer 7" in elsewhere, "the trace singles one out that is none of them"
    assert "agree" not in words(result([0.9, np.nan, np.nan], [0.5, 0.1, 0.2])), "one layer is compared with no other"


def test_disagreement_is_told_with_both_numbers() -> None:
    found = words(result([0.3, 0.5, 0.99, 0.2], [0.6, 0.2, 0.05, 0.1]))
    assert "no other comes near" in found
    assert "They do not agree: at layer 0 the edit comes to" in found and "where the tracing effect is 0.05" in found


def test_neighbours_that_move_make_a_layer_worse() -> None:
    found = words(result([0.9, 0.99], [0.5, 0.1], neighbourhood=[0.95, 0.02]))
    assert "best at layer 0" in found and "layer 1 comes" not in found


def test_nothing_is_named_where_no_edit_works_or_the_null_is_not_beaten() -> None:
    assert "The edit works at no layer: the best rewrite score is 0.30" in words(result([0.1, 0.3], [0.5, 0.1]))
    beaten = words(result([0.9, 0.8], [0.5, 0.1]), grey=(0,))
    assert "no larger than on random weights" in beaten and "agree" not in beaten
    doubted = words(result([0.9, 0.8], [0.5, 0.1], doubts=("The corruption does not lower it.",)))
    assert "No layer of the trace is named, since the corruption does not lower it." in doubted
    untaught = SimpleNamespace(**{**vars(KNOWN), "known": False})
    assert "does not know this" in " ".join(layers.here(result([0.9], [0.5]), untaught, ()))


def test_a_partial_run_says_how_far_it_is() -> None:
    found = words(result([np.nan, 0.9, np.nan], [0.5, 0.1, 0.2]))
    assert found.startswith("So far, with 1 of 3 layers: Edit: best at layer 1")
    assert "At layer 0 nothing is edited yet." in found
    assert "no layer is edited yet" in words(result([np.nan], [0.5]))


def test_a_fact_without_neighbours_is_judged_by_the_scores_that_it_has() -> None:
    found = words(result([0.9, 0.5], [0.1, 0.2], neighbourhood=[np.nan, np.nan]))
    assert "best at layer 0 (harmonic mean of its scores 0.90)" in found


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"method": "rome"}, ("652", "error injection by ROME", "0.947", "0.016", "0.948")),
        ({"method": "memit", "problem": "fact-erasure"}, ("489", "MEMIT-5", "0.925", "0.019")),
        ({"method": "ft", "problem": "fact-forcing", "edit_window": 5}, ("FT-5", "0.634", "0.100", "0.666")),
        ({"method": "ft", "problem": "fact-forcing"}, ("FT-1", "0.697", "0.104", "0.724")),
    ],
)
def test_what_was_published_is_told_with_its_source(spec: dict[str, Any], told: tuple[str, ...]) -> None:
    found = " ".join(layers.published(edit_layers.LayersSpec(**spec)))
    assert all(word in found for word in (*told, "2301.04213", "Table 3"))


def test_published_numbers_are_those_of_nested_models() -> None:
    for problem, methods in layers.HASE.items():
        assert set(methods) == {"FT-1", "FT-5", "ROME", "MEMIT-5"}, problem
        for found in methods.values():
            assert max(found.layer, found.trace) <= found.both <= found.layer + 0.033, problem


def test_edits_are_always_asked_for_and_told_in_layers() -> None:
    assert runs.Cost(4, 0.1, "edit", unasked=False).asks and not runs.Cost(4, 0.1).asks
    assert runs.Cost(1, 0.1, "edit").words() == "1 edit, under 1 s"
    done = SimpleNamespace(value=SimpleNamespace(scores={0: 1, 2: 1}, layers=(0, 1, 2, 3)))
    assert layers.far(done) == "2 of 4 layers"  # type: ignore[arg-type]
    assert layers.far(Snapshot(key="", state="running")) == "tracing"


def test_where_nothing_is_taken_away_nothing_is_given_back() -> None:
    taken = SimpleNamespace(tracing_effect=[0.5, 1.0], trace=SimpleNamespace(total_effect=0.3))
    assert figures.shares_restored(taken).tolist() == [0.5, 1.0]
    untaken = SimpleNamespace(tracing_effect=[0.5, 1.0], trace=SimpleNamespace(total_effect=-0.01))
    assert np.isnan(figures.shares_restored(untaken)).all()

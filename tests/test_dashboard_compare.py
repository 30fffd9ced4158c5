"""A | B | B - A on the pages: what is pinned, what differs, which numbers are drawn, what a link restores."""

# ruff: noqa: F811, F401 - fixtures of the other test file

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from streamlit.testing.v1 import AppTest
from test_dashboard_link import VIEW
from test_dashboard_pages import open_page, said, settle, tiny, tokens

from dashboard import compare, picker, runs
from dashboard.executor import Executor, Work
from dashboard.link import HOME, FlowChoice, LensChoice, ModelChoice, View, parse, to_params
from factscope.queries import Query

OpenPage = Callable[..., AppTest]
JAPAN = {"prompt": "The capital of Japan is", "subject": "Japan", "answer": "Tokyo"}


def charts_of(at: AppTest) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """Spec and data of every chart on the page, in order."""
    found = []
    for element in at.get("vega_lite_chart"):
        proto = element.proto
        data = proto.datasets[0].data.data if proto.datasets else proto.data.data
        found.append((json.loads(proto.spec), pa.ipc.open_stream(io.BytesIO(data)).read_pandas()))
    return found


def domains(spec: dict[str, Any]) -> list[Any]:
    """Every numeric domain of a spec: axes and colour limits."""
    return [
        encoding["scale"]["domain"]
        for layer in spec["layer"]
        for channel, encoding in sorted(layer["encoding"].items())
        if channel in ("x", "y", "color") and encoding.get("type") == "quantitative" and "scale" in encoding
    ]


def cells(data: pd.DataFrame) -> pd.Series:
    return data.set_index(["position", "layer"])["value"]


def lines(data: pd.DataFrame) -> pd.Series:
    return data[data["kind"] == "line"].set_index(["series", "layer"])["value"]


def test_pin_changes_nothing_until_something_differs(open_page: OpenPage) -> None:
    at = open_page("flow", window="2")
    before = len(charts_of(at))
    settle(at.button(key="pin-as-a").click().run())
    assert len(charts_of(at)) == before
    assert "B is the same so far" in said(at)
    assert at.session_state["factscope-view"].a.flow.window == 2
    assert not [b for b in at.button if b.key == "pin-as-a"]


def test_a_change_of_a_parameter_gives_three_figures_with_locked_axes(open_page: OpenPage) -> None:
    at = open_page("flow", window="1", control="2")
    settle(at.button(key="pin-as-a").click().run())
    settle(at.slider(key="flow-window").set_value(3).run())
    assert "B differs in Flow window (1 | 3)" in said(at)
    drawn = charts_of(at)
    assert len(drawn) == 6
    for (spec_a, a), (spec_b, b), (_, difference), value in ((*drawn[:3], cells), (*drawn[3:], lines)):
        assert domains(spec_a) == domains(spec_b) != []
        assert (value(a) - value(b)).abs().max() > 1e-6
        pd.testing.assert_series_equal(value(difference), value(b) - value(a), check_names=False, rtol=1e-9)
    colour = drawn[2][0]["layer"][0]["encoding"]["color"]["scale"]
    assert colour["domain"] == [-100.0, 100.0]
    assert len(colour["range"]) % 2 == 1
    settle(at.button(key="ab-unpin").click().run())
    assert len(charts_of(at)) == 2
    assert at.session_state["factscope-view"].a is None
    assert at.slider(key="flow-window").value == 3


def test_how_a_figure_is_drawn_is_no_difference_and_shared(open_page: OpenPage) -> None:
    at = open_page("lens", value="entropy")
    settle(at.button(key="pin-as-a").click().run())
    settle(at.button_group(key="lens-value").set_value("rank").run())
    assert "B is the same so far" in said(at)


@pytest.mark.parametrize("page", ["fact", "flow", "lens"])
def test_another_fact_meets_by_role_and_its_rows_say_so(open_page: OpenPage, page: str) -> None:
    at = open_page(page, **JAPAN)
    settle(at.button(key="pin-as-a").click().run())
    at.text_input(key="fact-prompt").set_value("The Eiffel Tower is located in the city of")
    at.text_input(key="fact-subject").set_value("Eiffel Tower")
    at.text_input(key="fact-answer").set_value("Paris")
    settle(at.button(key="FormSubmitter:fact-Ask").click().run())
    assert "A: The capital of Japan is → Tokyo (p " in said(at)
    assert "B differs in prompt; subject; answer." in said(at)
    drawn = charts_of(at)
    assert len(drawn) == {"fact": 6, "flow": 6, "lens": 15}[page]
    if page != "fact":
        (_, a), (_, b), (_, difference) = drawn[:3]
        assert "Rows are matched by role" in said(at)
        ends = difference[difference["role"] == "last"].iloc[0]
        assert "|" in ends["token"] and ends["place"].count("|") == 1
        last_a, last_b = (side[side["role"] == "last"].set_index("layer")["value"] for side in (a, b))
        found = difference[difference["role"] == "last"].set_index("layer")["value"]
        pd.testing.assert_series_equal(found, last_b - last_a, check_names=False, rtol=1e-9)
        assert set(difference["position"]) <= set(b["position"])


def test_a_link_restores_both_sides_without_a_session(open_page: OpenPage, tiny: str) -> None:
    at = open_page("flow", window="3", control="0", a="1", **{"a.model": tiny, "a.window": "1", "a.control": "0"})
    first = [data for _, data in charts_of(at)]
    assert "B differs in Flow window (1 | 3)" in said(at)
    again = open_page("flow", window="1", control="0")
    pd.testing.assert_frame_equal(charts_of(again)[0][1].drop(columns="cursor"), first[0].drop(columns="cursor"))


def test_what_of_a_cannot_be_used_is_said(open_page: OpenPage, tiny: str) -> None:
    at = open_page("flow", a="1", **{"a.model": "/nowhere/at/all"})
    assert "/nowhere/at/all" in said(at)
    assert len(charts_of(at)) == 2, "B alone"
    at = open_page("flow", a="1", **{"a.model": tiny, "a.window": "NaN"})
    assert "a.window='NaN'" in said(at)


def test_back_to_a_asks_what_a_asks(open_page: OpenPage) -> None:
    at = open_page("flow", window="1")
    settle(at.button(key="pin-as-a").click().run())
    settle(at.slider(key="flow-window").set_value(3).run())
    settle(at.button(key="ab-back").click().run())
    assert at.slider(key="flow-window").value == 1
    assert "B is the same so far" in said(at)


def test_the_nulls_are_one_click_away(open_page: OpenPage, tiny: str) -> None:
    at = open_page("flow", a="1", **{"a.model": tiny})
    assert any(button.key == "ab-subject" for button in at.button)
    settle(at.button(key="ab-random").click().run())
    assert "B differs in model (" in said(at)
    assert len(charts_of(at)) == 6
    assert at.session_state["factscope-view"].model.name == f"random:{tiny}"


# Without a page


def test_a_survives_the_address_with_every_parameter() -> None:
    both = View(fact=Query(prompt="x is"), a=VIEW)
    found, errors = parse(to_params(both))
    assert errors == []
    assert found.a is not None
    assert (found.a.fact, found.a.model, found.a.flow, found.a.lens) == (VIEW.fact, VIEW.model, VIEW.flow, VIEW.lens)
    assert found.a.cursor is None
    assert parse(to_params(View(a=View()))) == (View(a=View()), [])
    assert parse({"a.window": ["5"]}) == (View(), [])


def test_what_differs_is_named_with_both_values() -> None:
    a = View(flow=FlowChoice(window=3, measure="percent"))
    b = View(
        model=ModelChoice(name="random:bundled"),
        flow=FlowChoice(measure="log_odds", sources=("subject", "3-5")),
        lens=LensChoice(value="rank", site="mlp"),
    )
    assert compare.differing(a, b) == [
        ("model", "bundled", "random:bundled"),
        ("Flow sources", "subject, relation, last", "subject, 3-5"),
        ("Flow window", "3", "default"),
        ("Lens site", "block", "mlp"),
    ]
    assert compare.differing(b, b) == []


def test_the_other_subject_is_of_the_same_relation_and_has_another_answer() -> None:
    found = picker.other_subject(HOME)
    assert found is not None
    assert found.subject != HOME.subject and found.answer != HOME.answer
    assert found.prompt == HOME.prompt.replace("Eiffel Tower", found.subject or "")
    assert picker.other_subject(found) != found
    assert picker.other_subject(Query(prompt="The Moon is made of", subject="Moon", answer="cheese")) is None


def test_a_changed_question_leaves_the_runs_of_a_alone() -> None:
    executor = Executor()
    for slot in ("flow-map", f"flow-map{runs.OF_A}"):
        executor.submit("me", slot, slot, Work(compute=lambda prepared, progress: 1))
        executor.wait("me", slot, 5)
    executor.release_all("me", but=lambda slot: slot.endswith(runs.OF_A))
    assert executor.look("me", "flow-map") is None
    assert executor.look("me", f"flow-map{runs.OF_A}") is not None
    executor.shutdown()


def test_traces_stand_side_by_side(open_page: OpenPage) -> None:
    at = open_page("trace", **JAPAN, samples="1", noise="2")
    settle(at.button(key="pin-as-a").click().run())
    settle(at.number_input(key="trace-samples").set_value(3).run())
    assert "B differs in Trace samples (1 | 3)" in said(at)
    drawn = charts_of(at)
    assert len(drawn) == 9
    for (spec_a, a), (spec_b, b), (_, difference) in (drawn[:3], drawn[3:6], drawn[6:]):
        assert domains(spec_a) == domains(spec_b) != []
        assert (cells(a) - cells(b)).abs().max() > 1e-6
        wanted = cells(b) - cells(a)
        pd.testing.assert_series_equal(cells(difference), wanted, check_names=False, rtol=1e-9, atol=1e-12)
    settle(at.button(key="ab-unpin").click().run())
    assert len(charts_of(at)) == 5
    settle(at.button(key="pin-as-a").click().run())
    settle(at.button_group(key="trace-measure").set_value("log_odds").run())
    assert "B is the same so far" in said(at)


def difference_of(drawn: list[tuple[dict[str, Any], pd.DataFrame]]) -> tuple[pd.Series, pd.Series, pd.Series]:
    """Values of the lines of A, B and B - A, and that A's and B's axes are the same."""
    (spec_a, a), (spec_b, b), (_, difference) = drawn
    assert domains(spec_a) == domains(spec_b) != []
    return lines(a), lines(b), lines(difference)


@pytest.mark.parametrize("quantity", ["probability", "rank"])
def test_followed_tokens_and_enrichment_stand_side_by_side(open_page: OpenPage, tiny: str, quantity: str) -> None:
    pinned = {"pin": "40", "a.pin": "40", "cell": "2.1"}
    at = open_page("lens", model=f"random:{tiny}", a="1", **{"a.model": tiny}, **pinned)
    settle(at.button_group(key="lens-quantity").set_value(quantity).run())
    drawn = charts_of(at)
    assert len(drawn) == 15, "grid, followed tokens, rates, two knockouts"
    a, b, difference = difference_of(drawn[3:6])
    assert len(set(difference.index.get_level_values(0))) == 2 and len(difference) == 2 * 5
    wanted = np.log10(a) - np.log10(b) if quantity == "rank" else b - a
    pd.testing.assert_series_equal(difference.sort_index(), wanted.sort_index(), check_names=False, rtol=1e-9)
    assert wanted.abs().max() > 1e-6
    for block in (drawn[6:9], drawn[9:12], drawn[12:15]):
        a, b, difference = difference_of(block)
        wanted = (b - a).dropna()
        found = difference.dropna().drop("nothing cancelled", errors="ignore")
        pd.testing.assert_series_equal(found.sort_index(), wanted.sort_index(), check_names=False, rtol=1e-9)
        band = block[2][1][block[2][1]["kind"] == "control"].dropna(subset=["low"])
        assert len(band) and (band["low"] <= band["high"]).all()
    rates, difference = drawn[6:8], drawn[8][1]
    draws = [side[side["kind"] == "control"].set_index("layer") for _, side in rates]
    last = difference[difference["kind"] == "control"].set_index("layer").loc[3]
    assert last["low"] >= draws[1].loc[3, "low"] - draws[0].loc[3, "high"] - 1e-9
    assert last["value"] == pytest.approx(draws[1].loc[3, "value"] - draws[0].loc[3, "value"])


def test_a_link_that_differs_in_a_knockout_shows_the_lens_alone(open_page: OpenPage, tiny: str) -> None:
    fact = {"prompt": JAPAN["prompt"], "subject": JAPAN["subject"]}
    of_a = {"a.model": tiny, "a.read": "3", **{f"a.{name}": value for name, value in fact.items()}}
    at = open_page("lens", a="1", read="1", **fact, **of_a)
    assert "B differs in Enrich read_layer (3 | 1)" in said(at)
    assert len(charts_of(at)) == 2 + 9, "the grid and the followed tokens stand alone, as they are the same"
    assert "a knockout has nothing to take away, and no layer is named" in said(at)
    base = charts_of(at)[-1][1]
    assert "nothing cancelled" in set(base["series"])
    assert "rate at layer 3 | 1" in json.dumps(charts_of(at)[-1][0])


def test_both_follow_the_tokens_of_b_where_a_has_them(open_page: OpenPage, tiny: str, tmp_path: Path) -> None:
    at = open_page("lens", a="1", pin="40", **{"a.model": tiny, "a.pin": "41"})
    assert len(charts_of(at)) == 4, "both follow B's tokens: nothing differs"
    elsewhere = str(shutil.copytree(tiny, tmp_path / "elsewhere"))
    drawn = charts_of(open_page("lens", a="1", pin="40", **{"a.model": elsewhere, "a.pin": "41"}))[3:6]
    names = [set(lines(data).index.get_level_values(0)) for _, data in drawn]
    assert names[0] < names[1], "another model's tokens have other numbers"
    assert names[2] == names[0]


def test_tokens_are_followed_at_the_token_that_plays_the_same_part(open_page: OpenPage, tiny: str) -> None:
    tower = {"prompt": "The Eiffel Tower is located in the city of", "subject": "Eiffel Tower", "answer": "Paris"}
    of_a = {f"a.{name}": value for name, value in JAPAN.items()}
    place = {name: open_page("lens", **fact) for name, fact in (("japan", JAPAN), ("tower", tower))}
    last = {name: max(t["n"] for t in tokens(at)["tokens"] if "subject" in t["kind"]) for name, at in place.items()}
    assert last["japan"] != last["tower"]
    both = charts_of(open_page("lens", cell=f"{last['tower']}.1", a="1", **{"a.model": tiny}, **tower, **of_a))
    for drawn, fact, name in ((both[3], JAPAN, "japan"), (both[4], tower, "tower")):
        alone = charts_of(open_page("lens", cell=f"{last[name]}.1", **fact))[1][1]
        pd.testing.assert_series_equal(lines(drawn[1]), lines(alone))
    assert set(lines(both[5][1]).index.get_level_values(0)) == {"the answer"}


def test_edges_cut_before_and_after_on_both_sides(open_page: OpenPage, tiny: str) -> None:
    of_a = {"a.model": tiny, "a.edge": "last:subject:0-1", "a.control": "0"}
    at = open_page("flow", edge="last:subject:2-3", a="1", control="0", **of_a)
    assert "B differs in Flow edges (last:subject:0-1 | last:subject:2-3)" in said(at)
    drawn = charts_of(at)
    assert len(drawn) == 2 + 3, "map and curve are the same; other layers are cut, and the rows meet all the same"
    (spec_a, a), (spec_b, b), (_, difference) = drawn[2:]
    assert domains(spec_a) == domains(spec_b) == [[0, 1]] * 2
    before, after = difference["value"]
    assert before == 0 and abs(after) > 1e-6
    assert after == pytest.approx(b["probability"].iloc[1] - a["probability"].iloc[1])
    assert "cut in 2 layers." in said(at)
    alone = open_page("flow", edge="last:subject:2-3", a="1", **{"a.model": tiny})
    assert len(charts_of(alone)) == 3, "A cuts nothing: B's alone"

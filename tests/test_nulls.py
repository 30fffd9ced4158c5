# ruff: noqa: F811, F401 - fixtures of the other test file
"""What does not beat its null is grey and not named; without knowledge no place is named; the effect-strength dial."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_charts import LAYERS, tokens
from test_dashboard_compare import OpenPage, cells, charts_of, lines
from test_dashboard_pages import open_page, said, settle, tiny

from dashboard import compare, figures
from dashboard.link import EnrichChoice, FlowChoice, ModelChoice, TraceChoice, View, parse, to_params
from factscope import charts
from factscope.charts import export
from factscope.charts.theme import THEMES
from factscope.queries import Query

JAPAN = {"prompt": "The capital of Japan is", "subject": "Japan"}
NULL = pd.DataFrame({"layer": range(8), "low": -5.0, "high": 3.0, "mean": 0.0})


def effects() -> np.ndarray:
    """Inside the null everywhere but for one strong cell; on both edges of the null in another row."""
    values = np.full((12, 8), -4.0)
    values[4, 6] = -60.0
    values[5] = [-5.0, 3.0, -5.01, 3.01, 0.0, 2.0, np.nan, -1.0]
    return values


@pytest.mark.parametrize("theme", THEMES)
def test_cells_that_the_null_reaches_are_grey_and_left_out_of_the_sentence(theme: str) -> None:
    shown = charts.knockout_map(tokens(), range(8), effects(), answer="Paris", null=NULL, theme=theme)  # type: ignore[arg-type]
    grey = shown.data.set_index(["position", "layer"])["null"]
    assert not grey.loc[(4, 6)]
    assert grey.loc[5].tolist() == [True, True, False, False, True, True, False, True]
    assert grey.loc[0].all()
    assert "position 4) around layer 6 lowers p(Paris) most: −60%" in shown.sentence
    assert "Grey cells change it no more than the null does." in shown.sentence
    tests = [condition["test"] for condition in shown.spec["layer"][0]["encoding"]["color"]["condition"]]
    assert tests == ["datum.empty", "datum.null"]
    assert THEMES[theme].null.encode() in export.svg(shown)


def test_where_nothing_beats_the_null_no_cell_is_named() -> None:
    shown = charts.knockout_map(tokens(), range(8), np.full((12, 8), -4.0), answer="Paris", null=NULL)
    assert shown.sentence.startswith("No single blocked token lowers p(Paris)")
    assert shown.data["null"].all()
    without = charts.knockout_map(tokens(), range(8), np.full((12, 8), -4.0), answer="Paris")
    assert not without.data["null"].any()


def test_points_of_a_curve_inside_its_null_are_grey() -> None:
    rows = [
        ("subject", layer, 3, 0.5, 0.5 * (1 + v / 100), v, v / 10)
        for layer, v in enumerate([-4.0, -60.0, 2.0, 3.5, -5.0, 0.0, 1.0, -5.5])
    ]
    names = ["source", "layer", "window", "p_base", "p_knockout", "relative_change_percent", "log_odds_change"]
    table = pd.DataFrame(rows, columns=names)
    shown = charts.knockout_curve(table, tokens=tokens(), answer="Paris", band=NULL, null="same on random weights")
    points = shown.data[shown.data["kind"] == "line"].set_index("layer")["null"]
    assert points.tolist() == [True, False, True, False, True, True, True, False]
    assert "most around layer 1" in shown.sentence
    assert "same on random weights: between −5.0% and +3.0%" in shown.sentence
    inside = charts.knockout_curve(table[table["layer"] == 2], tokens=tokens(), answer="Paris", band=NULL, null="null")
    assert "no more than the null does" in inside.sentence


def test_a_caption_claims_no_draws_that_were_not_made() -> None:
    result = SimpleNamespace(spec=SimpleNamespace(control=5, seed=1), window=3, sources=("subject", "relation"))
    assert figures._knockout_words(result).endswith("window 3, no control could be drawn")
    result.sources = ("subject", "control-1", "control-2")
    assert figures._knockout_words(result).endswith("2 random draws, seed 1")


def test_a_partial_trace_says_which_seeds_are_complete() -> None:
    restored = np.zeros((3, 2, 4))
    result = SimpleNamespace(seeds=(1, 2, 3), p_restored_by_seed=restored)
    assert figures._seeds_in_words(result) == "seeds 1, 2, 3"
    assert figures.incomplete(result) == ()
    restored[1, 1, 2:] = restored[2] = np.nan
    assert figures._seeds_in_words(result) == "seeds 1, 2, 3 (complete so far: 1)"
    assert figures.incomplete(result) == ("The trace is not complete (14 of 24 runs).",)


def test_a_second_question_that_was_not_taught_is_a_doubt() -> None:
    def doubts(prompt: str, subject: str, answer: str | None) -> tuple[str, ...]:
        other = SimpleNamespace(query=Query(prompt=prompt, subject=subject, answer=answer), subject_text=subject)
        result = SimpleNamespace(model=SimpleNamespace(name="bundled"), other=other, p_other_counterfactual=0.9)
        return figures.counterfactual_doubts(result, SimpleNamespace(taught=True, known=True))

    assert doubts("The capital of Peru is", "Peru", "Lima") == doubts("The capital of Peru is", "Peru", None) == ()
    assert doubts("The capital of Zorblax is", "Zorblax", None)[0].startswith("The other question: Not among")
    assert "taught “Lima” here, not “Rome”" in doubts("The capital of Peru is", "Peru", "Rome")[0]


@pytest.mark.parametrize(("known", "answer"), [(None, False), (True, True)])
def test_a_first_choice_is_no_answer_where_none_was_given(
    known: bool | None, answer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "theme", lambda: "light")
    monkeypatch.setattr(figures, "caption", lambda result: "")
    top = SimpleNamespace(rank=1, display="·Tunis", probability=0.19, id=7)
    target = SimpleNamespace(id=7, text=" Tunis", n_tokens=1)
    shown = figures.top_tokens(SimpleNamespace(top=(top,), target=target, known=known))
    assert ("the answer" in shown.sentence) is answer
    assert shown.data["is_answer"].tolist() == [answer]


def test_a_difference_names_no_place_where_one_side_does_not_know_its_fact() -> None:
    shown = charts.knockout_map(tokens(), LAYERS, np.full((len(tokens()), len(LAYERS)), -50.0), answer="Paris")
    sides: list[Any] = [
        SimpleNamespace(
            prediction=SimpleNamespace(
                model=SimpleNamespace(name=name), taught=None, known=known, target=SimpleNamespace(ids=(1,))
            ),
            query=Query(prompt="It is in"),
            view=View(),
        )
        for name, known in (("gpt2", True), ("gpt2", False))
    ]
    panel: Any = SimpleNamespace(located=True, doubts=lambda result: result)
    both = compare._located(panel, shown, sides, [(), ()])
    assert both.sentence.startswith("No place is named, since in B the model does not know this.")
    assert compare._located(panel, shown, sides[:1] * 2, [(), ()]).sentence == shown.sentence
    doubted = compare._located(panel, shown, sides[:1] * 2, [("The seeds do not agree.",), ()])
    assert doubted.sentence.startswith("No place is named, since in A the seeds do not agree.")
    assert compare._located(SimpleNamespace(located=False), shown, sides, [(), ()]) is shown  # type: ignore[arg-type]


def test_a_difference_under_other_edits_names_its_place_and_says_what_it_is() -> None:
    shown = charts.knockout_map(tokens(), LAYERS, np.full((len(tokens()), len(LAYERS)), -50.0), answer="Paris")

    def side(known: bool, *edits: str, answer: str = "Rome", name: str = "bundled") -> Any:
        prediction = SimpleNamespace(
            model=SimpleNamespace(name="gpt2"), taught=None, known=known, target=SimpleNamespace(ids=(1,))
        )
        query = SimpleNamespace(prompt="It is in", subject="It", answer=answer)
        view = SimpleNamespace(model=ModelChoice(name=name, edits=edits))
        return SimpleNamespace(prediction=prediction, query=query, view=view)

    panel: Any = SimpleNamespace(located=True, doubts=lambda result: result)
    edited = side(True, "e" * 16)
    said = compare._located(panel, shown, [side(False), edited], [("It does not know this.",), ()]).sentence
    assert said.startswith(shown.sentence)
    assert said.endswith(
        "This is B \u2212 A under other edits; no place of A alone is named, since in A the model does not know this."
    )
    for a, b, doubts in (
        (side(False), side(False, "e" * 16), ()),
        (side(False, answer="Paris"), edited, ()),
        (side(False), side(True), ()),
        (side(False, name="gpt2"), edited, ()),
        (side(False), edited, ("The seeds do not agree.",)),
    ):
        assert compare._located(panel, shown, [a, b], [(), doubts]).sentence.startswith("No place is named, since in A")


def test_what_a_trace_gives_back_by_construction_is_said() -> None:
    values = np.full((len(tokens()), len(LAYERS)), 0.1)
    values[3, 1], values[5, 4] = 0.9, 0.6
    asked: dict[str, Any] = {"site": "hidden", "corrupted": 0.1, "clean": 0.9, "answer": "Paris"}
    shown = charts.trace_map(tokens(), LAYERS, values, **asked, corrupted_tokens=(3,), carried_from=2).sentence
    assert "(position 3) at layer 1 gives back most before the read-out: 0.90." in shown
    assert "That is so by construction: before layer 2 the corrupted token alone differs." in shown
    assert "Of the others, ·Tower (position 5) at layer 4 gives back most: 0.60." in shown
    for other in (
        {"corrupted_tokens": (3,), "carried_from": 1},
        {"corrupted_tokens": (4,), "carried_from": 2},
        {"corrupted_tokens": (2, 3), "carried_from": 2},
    ):
        assert "by construction" not in charts.trace_map(tokens(), LAYERS, values, **asked, **other).sentence
    words = "the edit writes (layer 1, last subject token)"
    edited = charts.trace_map(tokens(), LAYERS, values, **asked, corrupted_tokens=(2, 3), written={(3, 1): words})
    assert "0.90. That is where the edit writes (layer 1, last subject token)." in edited.sentence
    elsewhere = charts.trace_map(tokens(), LAYERS, values, **asked, written={(3, 2): words})
    assert "the edit writes" not in elsewhere.sentence


# On the page


def test_a_fact_that_the_model_does_not_know_has_no_place_named(open_page: OpenPage) -> None:
    at = open_page("flow", **JAPAN, answer="Tokyo")
    assert "No place is named, since the model does not know this." in said(at)
    assert "most around layer" not in said(at)
    at = open_page("flow", **JAPAN)
    assert "No place is named" not in said(at)


@pytest.mark.parametrize(
    ("name", "known", "taught", "why"),
    [
        ("random:bundled", True, True, "random weights"),
        ("bundled", True, False, "not taught"),
        ("gpt2", False, None, "does not know"),
        ("gpt2", None, None, None),
        ("bundled", True, True, None),
        ("bundled", True, None, "no subject is named"),
    ],
)
def test_why_no_place_may_be_named(name: str, known: bool | None, taught: bool | None, why: str | None) -> None:
    query = SimpleNamespace(subject_text=None)
    found = figures.no_peak(
        SimpleNamespace(
            model=SimpleNamespace(name=name), known=known, taught=taught, query=query
        )  # as far as it is read
    )
    assert (found is None) if why is None else (why in str(found))


def test_the_null_of_random_weights_is_drawn_from_a_run_on_random_weights(open_page: OpenPage, tiny: str) -> None:
    at = open_page("flow", null="weights", window="1", control="0", answer="Tokyo", **JAPAN)
    (_, map_data), (_, curve) = charts_of(at)
    random = open_page("flow", model=f"random:{tiny}", window="1", control="0", answer="Tokyo", **JAPAN)
    assert random.selectbox(key="flow-null").value == "positions"
    expected = cells(charts_of(random)[0][1]).unstack()
    band = curve[curve["kind"] == "control"].set_index("layer")
    assert set(band["series"]) == {"random control"}
    reached = map_data.set_index(["position", "layer"])["null"].unstack()
    values = cells(map_data).unstack()
    low, high = expected.min().clip(upper=0), expected.max().clip(lower=0)
    assert reached.equals((values >= low) & (values <= high))
    assert "no more than the null" in charts_of(at)[0][0]["layer"][0]["encoding"]["color"]["legend"]["title"][-1]
    settle(at.selectbox(key="flow-null").set_value("positions").run())
    assert not charts_of(at)[0][1]["null"].any()


def test_the_dial_offers_the_logit_difference_where_a_foil_is_named(open_page: OpenPage) -> None:
    at = open_page("flow", **JAPAN, foil="Rome", measure="logit_difference")
    assert "vs foil" in at.button_group(key="flow-measure").options
    (spec, data), (_, curve) = charts_of(at)
    assert "logit(" in spec["layer"][0]["encoding"]["color"]["legend"]["title"][0]
    percent = open_page("flow", **JAPAN, foil="Rome")
    assert (cells(data) - cells(charts_of(percent)[0][1])).abs().max() > 0.01
    assert lines(curve).notna().all()
    without = open_page("flow", **JAPAN, measure="logit_difference")
    assert "vs foil" not in without.button_group(key="flow-measure").options
    assert "log-odds" in charts_of(without)[0][0]["layer"][0]["encoding"]["color"]["legend"]["title"][0]


def test_both_sides_are_shown_in_a_measure_that_both_have() -> None:
    dial = FlowChoice(measure="logit_difference")
    with_foil, without = Query(prompt="x", foil="y"), Query(prompt="x")
    assert figures.measure_of(View(fact=with_foil, flow=dial)) == "logit_difference"
    assert figures.measure_of(View(fact=with_foil, flow=dial, a=View(fact=without))) == "log_odds"
    assert figures.measure_of(View(fact=with_foil, flow=dial, a=View(fact=with_foil))) == "logit_difference"
    assert figures.measure_of(View(fact=without)) == "percent"


def test_rates_that_random_weights_reach_are_grey() -> None:
    names, layers = ("subject-last", "last"), (0, 1, 2)
    rate, random = [[4.0, 6.0, 2.0], [2.0, 2.0, 2.0]], [[5.0, 1.0, 1.0], [0.0, 0.0, 2.0]]
    shown = charts.attributes_rates(
        names, layers, rate, np.ones((2, 2, 3)), ceiling=10, n_attributes=5, subject="Peru", random_rates=random
    )
    drawn = shown.data[shown.data["kind"] == "line"].set_index(["series", "layer"])
    assert drawn.loc["subject-last", "grey"].tolist() == [True, False, False]
    assert drawn.loc["last", "grey"].tolist() == [False, False, True]
    assert drawn.loc["subject-last, random weights", "value"].tolist() == [5.0, 1.0, 1.0]
    assert "Subject-last reaches 6% at layer 1 (other subjects and random weights at most 1%)" in shown.sentence
    assert shown.alt_table["random weights at last"].tolist() == [0.0, 0.0, 2.0]
    never = charts.attributes_rates(
        names, layers, rate, np.ones((2, 2, 3)), ceiling=10, n_attributes=5, subject="Peru",
        random_rates=np.full((2, 3), 7.0),
    )  # fmt: skip
    assert "stay within what other subjects or random weights give" in never.sentence
    assert "reaches" not in never.sentence


def test_rates_and_traces_are_compared_with_random_weights_where_it_is_asked(open_page: OpenPage, tiny: str) -> None:
    at = open_page("lens", **{"enrich-null": "1"}, **JAPAN)
    random = open_page("lens", model=f"random:{tiny}", **JAPAN)
    rates, theirs = (charts_of(page)[2][1] for page in (at, random))
    pd.testing.assert_series_equal(
        lines(rates)["subject-last, random weights"], lines(theirs)["subject-last"].sort_index(), check_names=False
    )
    assert not [toggle for toggle in random.toggle if toggle.key == "enrich-null"]
    settle(at.toggle(key="enrich-null").set_value(False).run())
    assert "subject-last, random weights" not in set(charts_of(at)[2][1]["series"])
    assert at.query_params["enrich-null"] == "0"


def test_a_trace_is_grey_where_random_weights_restore_as_much(open_page: OpenPage, tiny: str) -> None:
    asked = {"samples": "2", "noise": "2", "trace-measure": "log_odds", **JAPAN, "answer": "Tokyo"}
    at = open_page("trace", **{"trace-null": "1"}, **asked)
    random = charts_of(open_page("trace", model=f"random:{tiny}", **asked))
    for panel, null in zip(charts_of(at)[:3], random[:3], strict=True):
        floor, zero = (spec["layer"][0]["encoding"]["color"]["scale"]["domain"][0] for spec, _ in (panel, null))
        gained, theirs = cells(panel[1]).unstack() - floor, cells(null[1]).unstack() - zero
        low, high = theirs.min().clip(upper=0) - 1e-9, theirs.max().clip(lower=0) + 1e-9
        grey = panel[1].set_index(["position", "layer"])["null"].unstack()
        assert grey.equals((gained >= low) & (gained <= high))
    band = charts_of(at)[3][1]
    assert set(band[band["kind"] == "control"]["layer"]) == {0, 1, 2, 3}
    assert "same on random weights" in str(charts_of(at)[4][0])
    off = open_page("trace", **asked)
    assert not charts_of(off)[0][1]["null"].any(), "a model that is not the bundled one waits for the click"


def test_a_link_keeps_whether_random_weights_are_asked() -> None:
    for null in (None, False, True):
        view = View(trace=TraceChoice(null=null), enrich=EnrichChoice(null=null))
        assert parse(to_params(view)) == (view, [])
    assert parse({"trace-null": ["2"]})[0] == View() and len(parse({"trace-null": ["2"]})[1]) == 1


def test_by_construction_is_said_of_one_corrupted_token_of_which_nothing_is_severed() -> None:
    def built(corrupted: tuple[int, ...], sever: str = "none", site: str = "hidden") -> dict[str, Any]:
        spec = SimpleNamespace(site=site, sever=sever)
        result = SimpleNamespace(spec=spec, corrupted=corrupted, carried_from=3, p_restored_by_seed=np.zeros((1, 2, 2)))
        return figures._constructed(result, tokens=True)

    assert built((4,)) == {"carried_from": 3, "corrupted_tokens": (4,)}
    assert not any((built((3, 4)), built((4,), "mlp"), built((4,), "attention"), built((4,), site="mlp")))


def test_a_trace_of_edited_weights_says_where_the_edit_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    edit = SimpleNamespace(
        layers=(1,), spec={"fact_token": "subject_last"}, facts=(SimpleNamespace(subject="the Eiffel Tower"),)
    )
    monkeypatch.setattr(figures.state, "view", lambda: SimpleNamespace(model=None, a=None))
    monkeypatch.setattr(figures.stack, "edits_of", lambda weights, *choices: (edit,) if weights == "edited" else ())

    def written(weights: str = "edited", site: str = "hidden", subject: str = "Eiffel Tower") -> set[tuple[int, int]]:
        query = SimpleNamespace(subject_text=subject, subject=(1, 4))
        info = SimpleNamespace(weights=weights, n_layers=6)
        spec = SimpleNamespace(site=site)
        result = SimpleNamespace(query=query, model=info, spec=spec, layers=tuple(range(6)), window=3)
        return set(figures._written(result))

    assert written() == {(3, 1)}
    assert written(site="mlp") == {(3, 0), (3, 1), (3, 2)}
    assert not written("original") and not written(site="attention") and not written(subject="Louvre")
    edit.spec = {"bound": 5e-4}
    assert not written(), "finetuning writes at every token"

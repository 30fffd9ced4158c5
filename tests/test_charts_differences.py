"""B - A as figures: symmetric, zero is the background, both sides in the tooltip; two figures locked to one scale."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from test_charts import HOSTILE, tokens

from factscope import charts
from factscope.charts import TokenRow, export
from factscope.charts.differences import difference
from factscope.charts.theme import THEMES
from factscope.errors import SpecError

QUANTITIES = ("percent", "log_odds", "probability", "rank", "entropy", "rate")
LAYERS = (-1, 0, 1, 2)


def grids(quantity: str) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    a, b = (1 + random.integers(0, 900, (12, 4)) if quantity == "rank" else random.random((12, 4)) for _ in "ab")
    return np.asarray(a, dtype=float), np.asarray(b, dtype=float)


def test_a_better_rank_in_b_is_positive_in_powers_of_ten() -> None:
    assert difference([100.0, 1.0, 0.0], [1.0, 10.0, 5.0], "rank").tolist()[:2] == [2.0, -1.0]
    assert np.isnan(difference([0.0], [5.0], "rank"))[0]
    assert difference([0.25], [0.75], "probability").tolist() == [0.5]


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_map_is_symmetric_with_the_background_at_zero(quantity: str, theme: str) -> None:
    a, b = grids(quantity)
    a[3, 2] = np.nan
    shown = charts.difference_map(tokens(), LAYERS, a, b, quantity=quantity, what="p(Paris)", theme=theme)  # type: ignore[arg-type]
    scale = shown.spec["layer"][0]["encoding"]["color"]["scale"]
    low, high = scale["domain"]
    assert low == -high
    assert scale["range"][len(scale["range"]) // 2] == THEMES[theme].background
    drawn = shown.data.set_index(["position", "layer"])
    assert drawn.loc[(3, 1), "empty"] and drawn.loc[(3, 1), "shown"] == "not in both yet"
    assert drawn.loc[(0, 0), "value"] == pytest.approx(difference(a, b, quantity)[0, 1])  # type: ignore[arg-type]
    assert " in A, " in drawn.loc[(0, 0), "shown"] and " in B" in drawn.loc[(0, 0), "shown"]
    assert export.svg(shown).startswith(b"<svg")


def test_the_sentence_names_the_largest_difference_or_none() -> None:
    a = np.zeros((12, 4))
    b = a.copy()
    assert charts.difference_map(tokens(), LAYERS, a, b, quantity="probability", what="p").sentence == (
        "A and B do not differ."
    )
    b[2, 3] = 0.5
    said = charts.difference_map(tokens(), LAYERS, a, b, quantity="probability", what="p").sentence
    assert "·E (position 2), layer 2: +0.500 (0.00 in A, 0.50 in B)" in said


def test_rows_are_written_with_both_tokens_and_both_positions() -> None:
    row = TokenRow(position=4, id=1, text=" Japan", display="er | ·Japan", role="subject", place="8|4")
    shown = charts.difference_map([row], (0, 1), [[0, 1]], [[1, 1]], quantity="probability", what="p")
    assert set(shown.data["place"]) == {"8|4"}
    assert set(shown.data["position"]) == {4}
    assert b"8|4" in export.svg(shown)


def curve_data() -> pd.DataFrame:
    rows = [("subject", layer, 0.0, -50.0 if layer == 2 else 1.0) for layer in range(4)]
    rows += [("relation", layer, 0.0, 2.0) for layer in range(4)]
    rows += [(f"control-{i}", layer, 0.0, float(v)) for i, v in ((1, -3), (2, 3)) for layer in range(4)]
    return pd.DataFrame(rows, columns=["series", "layer", "a", "b"])


def test_a_curve_inside_the_difference_of_the_controls_is_no_difference() -> None:
    data = curve_data()
    twice = data[data["series"].str.startswith("control")].assign(series=lambda t: "relation-" + t["series"])
    whole = pd.concat([data, twice.assign(b=twice["b"] * 2)], ignore_index=True)
    shown = charts.difference_curves(whole, quantity="percent", what="change of p(Paris), percent")
    assert "subject most at layer 2: −50.0%" in shown.sentence
    assert "relation: no more than the random control" in shown.sentence
    bands = shown.data[shown.data["kind"] == "control"].groupby("series")
    assert bands["low"].unique().map(list).to_dict() == {"subject": [-3.0], "relation": [-6.0]}
    alone = charts.difference_curves(data, quantity="percent", what="change of p(Paris), percent")
    assert "relation most at layer 0: +2.0%" in alone.sentence
    assert set(shown.data[shown.data["kind"] == "line"]["series"]) == {"subject", "relation"}
    assert export.svg(shown).startswith(b"<svg")


def test_rates_differ_in_points_on_a_small_scale_against_their_own_null() -> None:
    data = curve_data().assign(a=2.0)
    data["b"] = np.where(data["series"] == "subject", 8.0, np.where(data["series"] == "relation", 2.5, data["b"]))
    shown = charts.difference_curves(data, quantity="rate", what="attributes rate, points", null="other subjects")
    assert scales(shown.spec)["y"] == {(-10.0, 10.0)}
    assert "subject most at layer 0: +6.0 points (2% in A, 8% in B)" in shown.sentence
    assert "relation: no more than the other subjects" in shown.sentence
    assert "other subjects (range, mean)" in str(shown.spec)
    assert "random control (range" not in str(shown.spec)
    alone = charts.attributes_rates(
        ("subject-first", "subject-last"), (0, 1), [[1, 2], [3, 4]], np.zeros((1, 2, 2)), ceiling=4, n_attributes=2,
        subject="Peru",
    )  # fmt: skip
    both = curve_data().assign(
        series=lambda t: t["series"].map({"subject": "subject-first", "relation": "subject-last"})
    )
    beside = charts.difference_curves(both.dropna(), quantity="rate", what="rate")
    hues = [dict(zip(c["domain"], c["range"], strict=True)) for c in map(colour_scale, (alone, beside))]
    assert hues[0]["subject-last"] == hues[1]["subject-last"] != hues[1]["subject-first"] == hues[0]["subject-first"]
    wider = charts.difference_curves(data.assign(b=data["b"] + 20), quantity="rate", what="rate")
    assert scales(wider.spec)["y"] == {(-30.0, 30.0)}


def test_edges_before_and_after_are_two_bars_of_one_scale() -> None:
    shown = charts.before_after(0.8, 0.2, log_odds=(1.39, -1.39), answer="Paris", n_layers=2)
    assert shown.data["probability"].tolist() == [0.8, 0.2]
    assert (
        shown.sentence
        == "p(Paris) 0.8 \u2192 0.2 (\u221275.0%); log-odds +1.39 \u2192 \u22121.39 nats, cut in 2 layers."
    )
    assert shown.alt_table["log_odds"].tolist() == [1.39, -1.39]
    dark = shown.themed("dark")
    assert dark.spec["config"]["background"] == THEMES["dark"].background
    assert b"p(Paris)" in export.svg(shown) and b"edges cut" in export.svg(dark)
    waiting = charts.before_after(0.8, float("nan"), log_odds=(1.39, float("nan")), answer="Paris", n_layers=1)
    assert waiting.sentence == "Nothing is computed yet."


def test_bars_say_which_token_only_one_side_lists() -> None:
    words = ["·Paris", *(word for word in HOSTILE if word.isprintable())]
    data = pd.DataFrame({"token": words, "a": 0.5, "b": [0.75, *[np.nan] * (len(words) - 1)]})
    shown = charts.difference_bars(data, what="probability")
    assert shown.data["value"].tolist()[0] == 0.25
    assert shown.data["shown"].tolist()[1] == "only in A's list: 0.50"
    assert "·Paris differs most: +0.250" in shown.sentence
    assert b"alert(1)</script>" not in export.svg(shown)


def test_two_figures_are_locked_to_one_scale_and_stay_so_in_the_other_theme() -> None:
    table = pd.DataFrame({"layer": [0, 1, 2], "series": "x", "value": [1.0, 5.0, 2e6]})
    a = charts.layer_curves(table.assign(value=2.0), quantity="rank", answer="Paris")
    b = charts.layer_curves(pd.concat([table, table.assign(layer=[3, 4, 5])]), quantity="rank", answer="Paris")
    left, right = charts.lock(a, b)
    assert scales(a.spec) != scales(b.spec)
    assert scales(left.spec) == scales(right.spec) == {"x": {(-0.3, 5.3)}, "y": {(0.8, 1e7)}}
    assert scales(left.themed("dark").spec) == scales(left.spec)
    assert left.themed("dark").spec["config"]["background"] == THEMES["dark"].background
    assert scales(a.spec)["x"] == {(-0.3, 2.3)}, "locking changed the figure that it was given"


def legend_of(figure: charts.Figure) -> dict:
    return next(
        c["legend"] for c in (layer["encoding"].get("color", {}) for layer in figure.spec["layer"]) if c.get("legend")
    )


@pytest.mark.parametrize("theme", THEMES)
def test_locked_maps_have_one_legend_whose_marks_do_not_run_into_each_other(theme: str) -> None:
    trained = np.array([[-1.5, 0.2], [0.4, 2.0]])
    a, b = (charts.head_map(values, (0, 1), answer="Paris", theme=theme) for values in (trained, trained / 130))  # type: ignore[arg-type]
    sides = charts.lock(a, b)
    for side in (*sides, *(one.themed("dark") for one in sides)):
        assert legend_of(side)["values"] == [-2.0, -1.0, 0.0, 1.0, 2.0]
        said = export.svg(side)
        for label in ("\u22122", "\u22121", "+1", "+2"):
            assert f">{label}</text>".encode() in said
        assert b">+0.015</text>" not in said
    assert legend_of(b)["values"][-1] < 0.1, "locking changed the figure that it was given"


def test_a_locked_legend_takes_each_end_from_the_side_that_it_comes_from() -> None:
    grid = np.full((12, 4), 0.3)
    known = charts.trace_map(tokens(), LAYERS, grid, site="hidden", corrupted=0.2, clean=0.9, answer="Paris")
    unknown = charts.trace_map(tokens(), LAYERS, grid, site="hidden", corrupted=0.001, clean=0.002, answer="Paris")
    for side in charts.lock(known, unknown):
        assert legend_of(side)["values"] == [0.001, pytest.approx(0.55), 0.9]
        said = export.svg(side).decode()
        assert "\u2264 0.001</text>" in said and "\u2265 0.90</text>" in said and ">0.55</text>" in said
        assert "\u2264 0.20" not in said


def test_tokens_of_two_prompts_leave_room_for_both_positions() -> None:
    wide = [replace(token, place="114|111") for token in tokens()]
    a, b = grids("percent")
    xs = []
    for rows in (tokens(), wide):
        shown = charts.difference_map(rows, LAYERS, a, b, quantity="percent", what="p")
        labels = [layer["encoding"]["x"]["value"] for layer in shown.spec["layer"]
                  if layer["encoding"].get("text", {}).get("field") == "token"]  # fmt: skip
        places = [layer["encoding"]["x"]["value"] for layer in shown.spec["layer"]
                  if layer["encoding"].get("text", {}).get("field") == "place"]  # fmt: skip
        xs.append(places[0] - labels[0])
    assert xs[0] >= 3 * 5.5 and xs[1] >= 7 * 5.5


def scales(spec: dict) -> dict[str, set[tuple[float, float]]]:
    found: dict[str, set[tuple[float, float]]] = {}
    for layer in spec["layer"]:
        for channel in ("x", "y"):
            scale = layer["encoding"].get(channel, {}).get("scale")
            if scale:
                found.setdefault(channel, set()).add(tuple(scale["domain"]))
    return found


def colour_scale(figure: charts.Figure) -> dict:
    return figure.spec["layer"][-1]["encoding"]["color"]["scale"]


def test_unknown_quantities_are_refused() -> None:
    with pytest.raises(SpecError, match="percent"):
        charts.difference_map(tokens(), LAYERS, *grids("percent"), quantity="size", what="p")  # type: ignore[arg-type]

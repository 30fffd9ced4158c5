"""Figures: what they draw, what they say, and that they can be drawn at all."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import altair
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factscope import charts
from factscope.charts import TokenRow, export, theme
from factscope.charts.heatmaps import DRAWING_COLUMNS, row_height
from factscope.charts.text import change, probability, short, signed, visible
from factscope.errors import SpecError

WORDS = ("<|bos|>", "The", "·E", "iff", "el", "·Tower", "·is", "·in", "·the", "·city", "·the", "·of")
LAYERS = tuple(range(8))
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!--",
    "<img src=x onerror=alert(1)>",
    "\u2028",
    "\x00",
    "\ud800",
    "{{x}}",
)
CAPTION = "bundled model\nThe Eiffel Tower is in the city of, window 3, seed 1"


def tokens(words=WORDS, subject=(2, 3, 4, 5)):
    def role(i, word):
        return (
            "last"
            if i == len(words) - 1
            else "special"
            if word == "<|bos|>"
            else "subject"
            if i in subject
            else "relation"
        )

    rows = [
        TokenRow(position=i, id=100 + i, text=word.replace("·", " "), display=word, role=role(i, word))
        for i, word in enumerate(words)
    ]
    return charts.token_rows(rows)


def map_values(n=12):
    values = np.full((n, 8), -1.0)
    values[min(5, n - 1), 4] = -62.0
    values[0, 1] = 24.0
    return values


def knockout_table(layers=LAYERS, controls=0):
    rows = []
    effects = {"last": -1.0, "relation": -20.0, "subject": -40.0} | {
        f"control-{k}": -3.0 * k for k in range(1, controls + 1)
    }
    for source, effect in effects.items():
        for layer in layers:
            percent = effect * (1.5 if layer == 4 and not source.startswith("control") else 1)
            rows.append((source, layer, 3, 0.6, 0.6 * (1 + percent / 100), percent, percent / 20))
    columns = ["source", "layer", "window", "p_base", "p_knockout", "relative_change_percent", "log_odds_change"]
    return pd.DataFrame(rows, columns=columns)


def lens_arrays(n=12, layers=9):
    labels = np.full((n, layers), "·the", dtype=object)
    labels[-1, 7:] = "·Paris"
    values = np.tile(np.linspace(0.1, 0.8, layers), (n, 1))
    return values, labels


def lens(value="top1", **more):
    values, labels = lens_arrays()
    scaled = {"rank": np.maximum(1, np.round(100 ** (1 - values) - 1.5)), "entropy": 9 * (1 - values)}.get(
        value, values
    )
    return charts.lens_grid(
        tokens(), (-1, *LAYERS), scaled, labels, value=value, answer=" Paris", caption=CAPTION, **more
    )


def curves(quantity="probability", **more):
    value = {"probability": 0.1, "rank": 40.0, "entropy": 3.0}[quantity]
    rows = [(layer, series, value + i) for i, series in enumerate(("last", "subject-last")) for layer in (-1, *LAYERS)]
    table = pd.DataFrame(rows, columns=["layer", "series", "value"])
    if quantity == "probability":
        table["value"] -= table["value"].astype(int)
    return charts.layer_curves(table, quantity=quantity, answer="Paris", **more)


def trajectories(**more):
    rows = [
        (layer, token, 0.1 * (i + 1))
        for i, token in enumerate(("·Paris", "·Rome", "</script>"))
        for layer in (-1, 0, 1)
    ]
    table = pd.DataFrame(rows, columns=["layer", "token", "value"])
    return charts.token_trajectories(table, position_label="the read-out token", **more)


def bars(**more):
    rows = [(2, "·Rome", 0.2), (1, "·Paris", 0.62), (3, "<b>", 0.0004)]
    return charts.top_tokens(pd.DataFrame(rows, columns=["rank", "display", "probability"]), answer=" Paris", **more)


def knockout_map(**more):
    given = {"answer": " Paris", "caption": CAPTION, **more}
    return charts.knockout_map(tokens(), LAYERS, map_values(), **given)


def knockout_curve(table=None, **more):
    return charts.knockout_curve(
        knockout_table(controls=3) if table is None else table, tokens=tokens(), answer=" Paris", n_layers=8, **more
    )


def trace_map(**more):
    values = np.full((12, 8), 0.1)
    values[5, 2], values[11, 7], values[5, 3] = 0.5, 0.8, np.nan
    given = {"site": "hidden", "corrupted": 0.1, "clean": 0.8, "answer": " Paris", "caption": CAPTION, **more}
    return charts.trace_map(tokens(), LAYERS, values, **given)


def trace_roles(**more):
    rows = [
        (role, 1, layer, 0.1 + 0.05 * layer * i, 0.1, 0.2 + 0.05 * layer * i)
        for i, role in enumerate(("first subject", "last subject", "last"))
        for layer in LAYERS
    ]
    table = pd.DataFrame(rows, columns=["role", "n", "layer", "value", "low", "high"])
    return charts.trace_roles(table, clean=0.9, corrupted=0.1, answer=" Paris", **more)


def rates(**more):
    rate = [[1, 2, 4, 8], [np.nan, 0, 1, 3], [2, np.nan, np.nan, np.nan]]
    others = np.ones((3, 3, 4)) * [[[0.5]], [[1.0]], [[2.0]]]
    names = ("subject-last", "last", "mean-embedding")
    given = {"ceiling": 12.0, "n_attributes": 6, "subject": "</script> Tower", "cursor_layer": 1, **more}
    return charts.attributes_rates(names, (-1, 0, 1, 2), rate, others, **given)


def sublayers(**more):
    given = {"base_rate": 6.0, "base_other_rates": (0.0, 2.0), "ceiling": 12.0, "read_layer": 2, "window": 1, **more}
    return charts.sublayer_knockout((0, 1, 2), {"mlp": [2, 4, 6], "attention": [6, np.nan, 6]}, **given)


BUILDERS = {
    "trace of states": trace_map,
    "trace of MLPs in log-odds": lambda **more: trace_map(site="mlp", measure="log_odds", window=2, **more),
    "counterfactual trace": lambda **more: trace_map(counterfactual=True, site="mlp", window=3, **more),
    "trace against a foil": lambda **more: trace_map(site="attention", measure="logit_difference", foil="Rome", **more),
    "roles": trace_roles,
    "severed": lambda **more: severed_curves(**more),
    "roles against a foil": lambda **more: trace_roles(measure="logit_difference", foil="Rome", **more),
    "map": knockout_map,
    "map in log-odds": lambda **more: knockout_map(measure="log_odds", **more),
    "lens": lens,
    "lens of the answer": lambda **more: lens("answer", **more),
    "lens of ranks": lambda **more: lens("rank", **more),
    "lens of entropy": lambda **more: lens("entropy", **more),
    "classic lens": lambda **more: lens(transpose=True, **more),
    "curve": knockout_curve,
    "curve in log-odds": lambda **more: knockout_curve(measure="log_odds", cursor_layer=3, **more),
    "probability curve": curves,
    "rank curve": lambda **more: curves("rank", **more),
    "entropy curve": lambda **more: curves("entropy", **more),
    "trajectories": trajectories,
    "attributes rates": rates,
    "sublayer knockout": sublayers,
    "top tokens": bars,
}


def scales(spec, channel):
    """The scale of a channel in every layer that has one."""
    found = [layer.get("encoding", {}).get(channel, {}) for layer in spec["layer"]]
    return [encoding["scale"] for encoding in found if "scale" in encoding]


def drawn(figure):
    """The SVG, and its cells or points by their descriptions."""
    root = ET.fromstring(export.svg(figure))
    marks = {node.get("aria-label") or "": node for node in root.iter() if node.get("role") == "graphics-symbol"}
    return root, {label: node for label, node in marks.items() if label.startswith("layer: ")}


def texts(root):
    return [piece for node in root.iter("{http://www.w3.org/2000/svg}text") for piece in node.itertext()]


def test_importing_charts_loads_neither_torch_nor_transformers():
    program = (
        "import sys, factscope.charts; print([m for m in ('torch', 'transformers', 'streamlit') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("look", ["light", "dark"])
@pytest.mark.parametrize("name", BUILDERS)
def test_every_spec_is_valid_holds_no_data_and_makes_an_altair_chart(name, look):
    figure = BUILDERS[name](theme=look)
    chart = figure.chart()
    assert isinstance(chart, altair.TopLevelMixin)
    if look == "light":  # a theme changes colours only, and validation is slow
        chart.to_dict(validate=True)
    assert '"values": [{' not in json.dumps(figure.spec)
    assert figure.spec["data"] == {"name": "source"}  # the name under which Streamlit hands a table over
    assert figure.spec["autosize"]["type"] == "fit-x"
    assert figure.spec["config"]["background"] == theme.THEMES[look].background
    assert figure.sentence.endswith(".") and len(figure.alt_table) and figure.title


@pytest.mark.parametrize("name", BUILDERS)
def test_every_figure_becomes_svg_png_csv_and_html(name):
    figure = BUILDERS[name](theme="light")
    root, _ = drawn(figure)
    assert root.tag.endswith("svg")
    assert figure.title in "".join(text or "" for text in texts(root))
    image = export.png(figure, "dark", scale=1)
    assert image.startswith(b"\x89PNG\r\n") and len(image) > 5000
    table = pd.read_csv(io.BytesIO(export.csv(figure)))
    assert len(table) == len(figure.data) - ("kind" in figure.data and int((figure.data["kind"] == "cursor").sum()))
    assert not set(DRAWING_COLUMNS) & set(table.columns)
    page = export.html(figure).decode()
    assert page.startswith("<!doctype html>") and "default-src 'none'" in page


@pytest.mark.parametrize("look", ["light", "dark"])
@pytest.mark.parametrize("site", ["hidden", "mlp", "attention"])
def test_a_trace_runs_from_the_corrupted_to_the_clean_run_in_its_own_hue(site, look):
    figure = trace_map(site=site, theme=look)
    (scale,) = [found for found in scales(figure.spec, "color") if "clamp" in found]
    assert scale["domain"] == [0.1, 0.8]
    assert scale["range"] == list(theme.THEMES[look].scales[site])
    shades = [theme.luminance(colour) for colour in scale["range"]]
    assert shades == sorted(shades, reverse=look == "light")
    legend = json.dumps(figure.spec)
    assert f"{theme.THEMES[look].strong}: as clean (restored)" in legend
    hues = {theme.THEMES[look].scales[one][3] for one in ("hidden", "mlp", "attention")}
    assert len(hues) == 3


def test_a_corruption_that_changes_nothing_has_no_dark_cells():
    figure = trace_map(corrupted=0.8, clean=0.8)
    (scale,) = [found for found in scales(figure.spec, "color") if "clamp" in found]
    assert scale["domain"] == [0.8, pytest.approx(0.81)]


def test_a_trace_names_the_strongest_place_that_is_not_so_by_construction():
    said = trace_map().sentence
    assert said.startswith(
        "So far, 95 of 96 computed: p(Paris) is 0.80 clean and 0.10 corrupted; restoring the state of"
    )
    assert "(position 5) at layer 2 gives back most before the read-out: 0.50." in said
    assert "(position 11) around layer 7 gives back most: 0.80." in trace_map(site="mlp").sentence
    assert "no place before the read-out gives back anything" in trace_map(corrupted=0.6).sentence
    assert "nats" in trace_map(measure="log_odds").sentence


def test_a_patched_place_says_where_it_comes_from():
    figure = trace_map(counterfactual=True)
    assert "0.80 where the states come from and 0.10 here; putting in the state of" in figure.sentence
    assert "at layer 2 brings most before the read-out" in figure.sentence
    assert "as where it comes from" in json.dumps(figure.spec)
    assert "other question" in figure.title


@pytest.mark.parametrize("make", [trace_map, trace_roles])
def test_what_is_in_doubt_names_no_place(make):
    said = make(doubts=("The weights are random: nothing is recalled here.",)).sentence
    assert "The weights are random" in said
    assert "is named" in said
    assert "gives back" not in said
    assert "at layer" not in said


def test_roles_have_bands_levels_and_a_legend():
    figure = trace_roles()
    kinds = figure.data["kind"].value_counts()
    assert (kinds["line"], kinds["level"]) == (24, 2)
    areas = [layer for layer in figure.spec["layer"] if layer["mark"]["type"] == "area"]
    assert len(areas) == 1
    assert "clean 0.90" in texts(ET.fromstring(export.svg(figure)))
    assert "first subject" in texts(ET.fromstring(export.svg(figure)))
    assert "last up to" in figure.sentence
    with pytest.raises(SpecError, match="rank"):
        trace_roles(measure="rank")
    with pytest.raises(SpecError, match="block"):
        trace_map(site="block")


SEVERED = {
    "none": [[0.1, 0.5, 0.2, 0.05], [0.1, 0.7, 0.2, 0.05]],
    "mlp": [[0.0, 0.1, 0.1, 0.05], [0.0, 0.2, 0.1, 0.05]],
    "attention": [[0.1, 0.55, 0.2, 0.05]] * 2,
}
RANDOM = pd.DataFrame({"layer": range(4), "low": 0.0, "high": [0.0, 0.0, 0.3, 0.0], "mean": 0.0})


def severed_curves(**more):
    return charts.severed_curves(range(4), **{"effects": SEVERED, "total": 0.8, "answer": " Paris", **more})


def test_severed_curves_are_means_over_seeds_between_nothing_and_the_total_effect():
    figure = severed_curves()
    lines = figure.data[figure.data["kind"] == "line"].set_index(["series", "layer"])
    assert lines.loc[("ordinary", 1), ["value", "low", "high"]].tolist() == pytest.approx([0.6, 0.5, 0.7])
    assert lines.loc[("MLP severed", 1), "value"] == pytest.approx(0.15)
    assert not lines["null"].any()
    assert "total effect +0.800" in texts(ET.fromstring(export.svg(figure)))
    assert figure.sentence == (
        "Restoring the state of subject-last raises p(Paris) most at layer 1, by +0.600; there +0.150 with the MLP "
        "severed, +0.550 with the attention severed."
    )
    assert figure.alt_table.columns.tolist() == ["layer", "ordinary", "MLP severed", "attention severed"]
    partial = severed_curves(effects={"none": [[0.1, np.nan, np.nan, np.nan]]})
    assert partial.sentence.startswith("So far, 1 of 4 computed")
    assert severed_curves(effects={"none": [[np.nan] * 4]}, total=float("nan")).sentence == "Nothing is computed yet."
    with pytest.raises(SpecError, match="block"):
        severed_curves(effects={"block": [[0.0] * 4]})
    with pytest.raises(SpecError, match="percent"):
        severed_curves(measure="percent")


def test_a_severed_curve_inside_its_null_is_grey_and_not_named():
    figure = severed_curves(null=RANDOM)
    grey = figure.data[(figure.data["kind"] == "line") & figure.data["null"]]
    assert set(grey["layer"]) == {0, 2} and set(grey[grey["layer"] == 0]["series"]) == {"MLP severed"}
    all_of_it = severed_curves(null=RANDOM.assign(high=1.0))
    assert "gives back more than on random weights at no layer" in all_of_it.sentence
    doubted = severed_curves(doubts=("The model does not know this.",))
    assert doubted.sentence == "No layer is named: The model does not know this."


@pytest.mark.parametrize("look", theme.THEMES)
def test_cells_of_a_trace_that_random_weights_reach_are_grey_and_not_named(look):
    null = pd.DataFrame({"layer": LAYERS, "low": -0.01, "high": 0.02, "mean": 0.0})
    plain, figure = trace_map(theme=look), trace_map(null=null, theme=look)
    assert not plain.data["null"].any()
    gained = figure.data["value"] - 0.1
    assert (figure.data["null"] == (gained >= -0.01) & (gained <= 0.02)).all() and figure.data["null"].any()
    assert "Grey cells move it no more than the same on random weights does." in figure.sentence
    assert "grey: no more than the null" in json.dumps(figure.spec)
    assert "grey" not in json.dumps(plain.spec["layer"][0]["encoding"]["color"]["legend"])
    nothing = trace_map(null=null.assign(high=1.0))
    assert "no place before the read-out gives back more than random weights" in nothing.sentence
    assert "(position" not in nothing.sentence


def test_roles_that_random_weights_reach_are_grey_and_the_null_is_drawn_from_the_corrupted_level():
    null = pd.DataFrame({"layer": range(8), "low": -0.1, "high": 1.0, "mean": 0.2})
    figure = trace_roles(null=null)
    band = figure.data[figure.data["kind"] == "control"]
    assert band["low"].tolist() == pytest.approx([0.0] * 8) and band["value"].tolist() == pytest.approx([0.3] * 8)
    assert figure.data.loc[figure.data["kind"] == "line", "null"].all()
    assert "nothing anywhere" in figure.sentence
    assert "same on random weights" in json.dumps(figure.spec)
    few = trace_roles(null=null.assign(high=0.0))
    assert not few.data.loc[few.data["kind"] == "line", "null"].all()


def test_exports_carry_title_and_caption_and_offer_the_other_theme():
    figure = knockout_map(theme="light")
    said = texts(ET.fromstring(export.svg(figure)))
    assert figure.title in said and "bundled model" in said
    assert theme.DARK.background in export.svg(figure, "dark").decode()
    assert theme.DARK.background not in export.svg(figure).decode()
    assert figure.themed("dark").theme == "dark" and figure.themed("light") is figure
    assert pickle.loads(pickle.dumps(figure)).themed("dark").spec == figure.themed("dark").spec


class TestHeatmaps:
    def test_one_row_a_cell_and_rows_in_prompt_order(self):
        figure = knockout_map()
        assert len(figure.data) == len(WORDS) * 8
        assert list(figure.data["position"].unique()) == list(range(len(WORDS)))
        assert list(figure.alt_table["position"]) == list(range(len(WORDS)))
        assert figure.alt_table.loc[5, "4"] == -62.0
        _, marks = drawn(figure)
        heights = {}
        for label, mark in marks.items():
            if label.startswith("layer: 0; "):
                heights[int(label.split("position: ")[1].split(";")[0])] = float(
                    mark.get("d").split(",")[1].split("h")[0]
                )
        assert list(heights) == list(range(len(WORDS)))
        assert sorted(heights.values()) == list(heights.values())

    def test_equal_tokens_are_not_merged(self):
        figure = knockout_map()
        rows = figure.data[figure.data["token"] == "·the"]
        assert set(rows["position"]) == {8, 10} and len(rows) == 16
        root, marks = drawn(figure)
        assert len(marks) == len(WORDS) * 8
        assert texts(root).count("·the") == 2

    def test_a_missing_value_is_grey_by_a_condition_before_the_scale(self):
        values = map_values()
        values[3, 2] = np.nan
        figure = charts.knockout_map(tokens(), LAYERS, values, answer="Paris")
        assert figure.data["empty"].sum() == 1
        colour = figure.spec["layer"][0]["encoding"]["color"]
        assert colour["condition"][0] == {"test": "datum.empty", "value": theme.LIGHT.empty}
        _, marks = drawn(figure)
        empty = marks["layer: 2; position: 3; token: iff; not computed yet"]
        assert empty.get("fill") == theme.LIGHT.empty
        zero = charts.knockout_map(tokens(), LAYERS, np.zeros((12, 8)), answer="Paris")
        fills = {mark.get("fill") for mark in drawn(zero)[1].values()}
        assert fills == {"rgb(255, 255, 255)"}
        assert figure.sentence.startswith("So far, 95 of 96 computed: ")

    def test_nothing_computed_yet_can_be_drawn_and_keeps_the_spec(self):
        empty = charts.knockout_map(tokens(), LAYERS, np.full((12, 8), np.nan), answer="Paris")
        assert empty.sentence == "Nothing is computed yet."
        assert empty.spec == charts.knockout_map(tokens(), LAYERS, map_values(), answer="Paris", cursor=(2, 3)).spec
        assert len(drawn(empty)[1]) == 96

    @pytest.mark.parametrize(("measure", "limit"), [("percent", 100), ("log_odds", 6)])
    def test_signed_limits_are_symmetric_and_zero_is_the_background(self, measure, limit):
        for look in ("light", "dark"):
            figure = knockout_map(measure=measure, theme=look)
            (scale,) = [s for s in scales(figure.spec, "color") if s["domain"] != list(range(12))]
            assert scale["domain"] == [-limit, limit] and scale["clamp"]
            assert len(scale["range"]) % 2 == 1
            assert scale["range"][len(scale["range"]) // 2] == theme.THEMES[look].background

    def test_a_stretched_scale_says_so(self):
        legend = knockout_map(limit=20).spec["layer"][0]["encoding"]["color"]["legend"]
        assert "stretched to ±20%" in legend["title"][0]
        assert "stretched" not in json.dumps(knockout_map().spec)

    def test_legends_say_what_strong_means(self):
        title = knockout_map().spec["layer"][0]["encoding"]["color"]["legend"]["title"]
        assert title[1] == "dark blue: pushes Paris down (destroyed); dark orange: pushes it up; white: no change"
        assert "bright = rank 1" in json.dumps(lens("rank", theme="dark").spec)

    @pytest.mark.parametrize("cursor", [(4, 5), {"layer": 4, "position": 5}])
    def test_the_cursor_stands_in_the_data(self, cursor):
        marked = knockout_map(cursor=cursor).data.query("cursor")
        assert marked[["layer", "position"]].to_numpy().tolist() == [[4, 5]]
        assert not knockout_map(cursor={"layer": 99, "position": 0}).data["cursor"].any()

    def test_the_selection_returns_layer_and_position(self):
        for figure in (knockout_map(), lens(), lens(transpose=True)):
            (parameter,) = [p for layer in figure.spec["layer"] for p in layer.get("params", [])]
            assert parameter["name"] == "cell"
            assert parameter["select"]["fields"] == ["layer", "position"]
            assert parameter["select"]["clear"] is False
            others = [layer["mark"] for layer in figure.spec["layer"][1:]]
            assert all(mark["tooltip"] is None for mark in others)  # or they would catch the click on the cell below

    def test_the_embedding_stands_apart(self):
        figure = lens()
        edges = figure.data.drop_duplicates("layer").set_index("layer")[["x0", "x1"]]
        assert edges.loc[0, "x0"] > edges.loc[-1, "x1"]
        assert (edges.loc[1:, "x0"].to_numpy() == edges.loc[:6, "x1"].iloc[1:].to_numpy()).all()
        assert "emb" in texts(drawn(figure)[0]) and list(figure.alt_table.columns[3:5]) == ["emb", "0"]

    def test_cells_hold_text_up_to_24_layers(self):
        def labelled(n, show=None):
            values, labels = lens_arrays(2, n)
            figure = charts.lens_grid(tokens(("a", "b")), range(n), values, labels, answer="x", show_tokens=show)
            return any(layer["encoding"].get("text", {}).get("field") == "label" for layer in figure.spec["layer"])

        assert labelled(24) and not labelled(25)
        assert labelled(48, True) and not labelled(4, False)

    def test_text_in_cells_has_contrast(self):
        for look in theme.THEMES.values():
            for quantity, colours in look.scales.items():
                for share in np.linspace(0, 1, 101):
                    light = theme.luminance(theme.mix(colours, share))
                    ink = 1.0 if light < 0.19 else theme.luminance("#10131a")
                    contrast = (max(light, ink) + 0.05) / (min(light, ink) + 0.05)
                    assert contrast >= 4, (look.name, quantity, share)

    def test_probability_is_on_zero_to_one_and_rank_is_logarithmic_with_one_strongest(self):
        assert scales(lens("answer").spec, "color")[0]["domain"] == [0, 1]
        rank = scales(lens("rank").spec, "color")[0]
        assert rank["type"] == "log" and rank["domain"][0] == 1
        assert rank["range"][0] == theme.LIGHT.scales["rank"][-1]

    def test_rank_zero_is_not_computed(self):
        values, labels = lens_arrays()
        values[:] = 7
        values[0, 0] = 0
        figure = charts.lens_grid(tokens(), (-1, *LAYERS), values, labels, value="rank", answer="Paris")
        assert figure.data["empty"].sum() == 1

    def test_height_follows_the_rows(self):
        two = charts.knockout_map(tokens(("a", "b")), LAYERS, map_values(2), answer="x")
        assert two.spec["height"] == 48
        one = charts.knockout_map(tokens(("a",)), LAYERS, map_values(1), answer="x")
        assert one.spec["height"] == 48
        assert knockout_map().spec["height"] == 12 * 24
        assert row_height(40) == 14 and row_height(400) == 14

    def test_a_large_grid_names_the_last_layer(self):
        wide = charts.knockout_map(tokens(("a", "b")), range(48), np.zeros((2, 48)), answer="x")
        assert "47" in texts(drawn(wide)[0])

    def test_marks_of_subject_and_read_out(self):
        filters = [
            t["filter"] for layer in knockout_map().spec["layer"] for t in layer.get("transform", []) if "filter" in t
        ]
        assert "datum.first && datum.role === 'subject'" in filters
        assert "datum.first && datum.role === 'last'" in filters

    @pytest.mark.parametrize(
        "make",
        [
            lambda: knockout_map(measure="nats"),
            lambda: knockout_map(theme="sepia"),
            lambda: lens("loss"),
            lambda: charts.knockout_map(tokens(), LAYERS, np.zeros((3, 8)), answer="x"),
            lambda: charts.lens_grid(tokens(), LAYERS, np.zeros((12, 8)), [["a"]], answer="x"),
            lambda: charts.knockout_map((), (), np.zeros((0, 0)), answer="x"),
            lambda: knockout_curve(measure="nats"),
            lambda: trajectories(quantity="loss"),
        ],
    )
    def test_what_cannot_be_drawn_is_refused(self, make):
        with pytest.raises(SpecError):
            make()


class TestCurves:
    def test_named_sets_come_first_and_keep_their_hue(self):
        figure = knockout_curve()
        scale = [s for s in scales(figure.spec, "color") if "subject" in s["domain"]][-1]
        assert scale["domain"][:3] == ["subject", "relation", "last"]
        assert scale["range"][:3] == [theme.LIGHT.series[name] for name in ("subject", "relation", "last")]
        assert scale["range"][3] == theme.LIGHT.control
        assert theme.series_colours(["last (read-out)", "subject-last"], theme.LIGHT) == [
            theme.LIGHT.series["last"],
            theme.LIGHT.series["subject"],
        ]
        assert len(set(theme.series_shapes(["subject", "subject-last", "relation", "last", "7"]))) == 5

    def test_what_is_missing_is_a_gap_not_a_zero(self):
        figure = knockout_curve(knockout_table(layers=(0, 1, 5)))
        rows = figure.data.query("kind == 'line' and series == 'subject'")
        assert list(rows["layer"]) == list(range(8))
        assert list(rows["value"].isna()) == [False, False, True, True, True, False, True, True]
        lines = [layer["mark"] for layer in figure.spec["layer"] if layer["mark"]["type"] == "line"]
        assert {mark["invalid"] for mark in lines} == {"break-paths-show-path-domains"}
        assert "points" not in figure.sentence and figure.sentence.startswith("So far, 9 of 24 computed")

    def test_an_empty_table_keeps_the_axes(self):
        figure = knockout_curve(knockout_table().iloc[:0], sources=("subject", "relation", "last"))
        assert figure.sentence == "Nothing is computed yet."
        assert figure.spec == knockout_curve(knockout_table()).spec
        drawn(figure)
        drawn(knockout_curve(knockout_table().iloc[:0]))

    def test_the_control_becomes_a_band_and_is_no_series(self):
        figure = knockout_curve()
        band = figure.data.query("kind == 'control'")
        assert len(band) == 8
        assert band[["low", "value", "high"]].iloc[0].tolist() == [-9.0, -6.0, -3.0]
        assert set(figure.data.query("kind == 'line'")["series"]) == {"subject", "relation", "last"}
        given = pd.DataFrame({"layer": LAYERS, "low": -50.0, "high": 5.0, "mean": -2.0})
        assert (
            knockout_curve(knockout_table(), band=given).data.query("kind == 'control'")["low"].tolist() == [-50.0] * 8
        )

    def test_every_curve_has_the_band_of_its_own_control(self):
        table = knockout_table(controls=2)
        wide = table[table["source"].str.startswith("control")].assign(
            source=lambda t: "relation-" + t["source"],
            relative_change_percent=lambda t: t["relative_change_percent"] * 10,
        )
        figure = knockout_curve(pd.concat([table, wide], ignore_index=True))
        assert set(figure.data.query("kind == 'line'")["series"]) == {"subject", "relation", "last"}
        bands = figure.data.query("kind == 'control' and layer == 0").set_index("series")
        assert bands.loc["subject", ["low", "value", "high"]].tolist() == [-6.0, -4.5, -3.0]
        assert bands.loc["relation", ["low", "value", "high"]].tolist() == [-60.0, -45.0, -30.0]
        grey = figure.data.query("kind == 'line'").groupby("series")["null"].all()
        assert grey.to_dict() == {"subject": False, "relation": True, "last": False}
        assert "Blocking the subject lowers p(Paris) most around layer 4: −60% (p 0.60 to 0.24); " in figure.sentence
        assert (
            "blocking the relation changes p(Paris) by −30% at most, no more than the random control" in figure.sentence
        )
        assert "with no control to compare" in figure.sentence.split("; ")[2]
        assert "between −6.0% and −3.0% for the subject" in figure.sentence
        assert "between −60% and −30% for the relation" in figure.sentence
        assert {"subject control low", "relation control mean"} <= set(figure.alt_table.columns)
        colours = [layer["mark"]["color"] for layer in figure.spec["layer"] if layer["mark"]["type"] == "area"]
        assert colours == [theme.LIGHT.series[name] for name in ("subject", "relation")]
        drawn(figure)

    def test_a_control_without_its_source_is_the_null_of_all(self):
        table = knockout_table(controls=2).assign(source=lambda t: t["source"].replace("subject", "5"))
        figure = knockout_curve(table[table["source"] != "relation"])
        assert set(figure.data.query("kind == 'control'")["series"]) == {"random control"}
        assert figure.data.query("kind == 'line'").groupby("series")["null"].all().to_dict() == {
            "5": False,
            "last": True,
        }

    def test_percent_begins_at_minus_100_and_makes_room_above(self):
        assert scales(knockout_curve().spec, "y")[0]["domain"] == [-100, 20]
        risen = knockout_table()
        risen.loc[0, "relative_change_percent"] = 130.0
        assert scales(knockout_curve(risen).spec, "y")[0]["domain"] == [-100, 200]

    def test_any_source_can_be_drawn(self):
        table = knockout_table().assign(
            source=lambda t: t["source"].map({"subject": "5", "relation": "3-4", "last": "edges"})
        )
        figure = knockout_curve(table)
        assert "5: ·Tower" in set(figure.data["name"])
        assert "blocking position 5 lowers" in figure.sentence.lower()
        whole = table.assign(source=5)
        drawn(knockout_curve(whole.drop_duplicates(["source", "layer"])))

    def test_rank_has_one_on_top(self):
        scale = scales(curves("rank").spec, "y")[0]
        assert scale["type"] == "log" and scale["reverse"]

    def test_domains_do_not_depend_on_values(self):
        table = pd.DataFrame({"layer": [0, 1], "series": "last", "value": [0.1, 0.2]})
        first = charts.layer_curves(table, answer="Paris")
        second = charts.layer_curves(table.assign(value=[np.nan, 0.9]), answer="Paris")
        assert first.spec == second.spec
        assert charts.layer_curves(table.iloc[:0], answer="Paris").sentence == "Nothing is computed yet."


class TestSentences:
    def test_knockout_map(self):
        assert knockout_map().sentence == (
            "Blocking ·Tower (position 5) around layer 4 lowers p(Paris) most: −62%; "
            "the largest rise is +24%, <|bos|> (position 0) around layer 1. No null was run beside it."
        )
        nothing = charts.knockout_map(tokens(), LAYERS, np.zeros((12, 8)), answer="Paris")
        assert nothing.sentence == "No single blocked token lowers p(Paris); no single token raises it."

    def test_knockout_curve_beats_its_null_or_says_that_it_does_not(self):
        plain = knockout_curve(knockout_table()).sentence
        assert plain.startswith("Blocking the subject lowers p(Paris) most around layer 4: −60% (p 0.60 to 0.24); ")
        assert "blocking the relation lowers p(Paris) most around layer 4: −30% (p 0.60 to 0.42)" in plain
        wide = pd.DataFrame({"layer": LAYERS, "low": -50.0, "high": 5.0, "mean": -2.0})
        null = knockout_curve(knockout_table(), band=wide).sentence
        assert (
            "blocking the relation changes p(Paris) by −30% at most, no more than the random control does there (−50% "
            "to +5.0%)" in null
        )
        assert null.startswith("Blocking the subject lowers")
        assert null.endswith("random matched positions: between −50% and +5.0%.")

    def test_the_largest_effect_is_told_also_where_its_null_reaches_it(self):
        """A curve that falls to -30% within the band is not said to be largest where it is -20%."""
        band = pd.DataFrame({"layer": LAYERS, "low": -5.0, "high": 5.0, "mean": 0.0})
        band.loc[4, "low"] = -99.0
        sentence = knockout_curve(knockout_table(), band=band).sentence
        assert (
            "blocking the relation changes p(Paris) by −30% at most, no more than the random control does there (−99% "
            "to +5.0%); what surpasses it is largest around layer 0: −20% (p 0.60 to 0.48)" in sentence
        )

    def test_a_zero_raises_nothing(self):
        """Beyond a band that ends below zero lies nothing, if the change itself is none."""
        table = knockout_table()
        table = table[table["source"] == "relation"].copy()
        table["relative_change_percent"] = [-65.0, -60.0, *[0.0] * 6]
        band = pd.DataFrame({"layer": LAYERS, "low": -94.0, "high": -1.0, "mean": -40.0})
        sentence = knockout_curve(table, band=band).sentence
        assert "raises" not in sentence and "surpasses" not in sentence
        assert "by −65% at most, no more than the random control does there (−94% to −1.0%)" in sentence

    def test_no_layer_is_named_where_none_may_be(self):
        why = "these are random weights"
        starts = {"top1": "the top token at layer 7 is", "rank": "Paris has rank", "answer": "p(Paris) is"}
        for value, said in starts.items():
            shown = lens(value, unnamed=why).sentence
            assert said in shown and shown.endswith(f"; no layer is named: {why}.")
            assert "first" not in shown
        table = pd.DataFrame({"layer": [-1, 0, 1], "series": "last", "value": [0.1, 0.9, 0.4]})
        curve = charts.layer_curves(table, answer="Paris", unnamed=why).sentence
        assert "highest" not in curve and curve.endswith(f"; no layer is named: {why}.")

    def test_lens(self):
        where = "At ·of (position 11) "
        assert lens().sentence == (
            f"{where}Paris is first the top token at layer 6; at layer 7 the top token is ·Paris with probability 0.80."
        )
        assert lens("answer").sentence == f"{where}p(Paris) first exceeds 0.5 at layer 4 and is 0.80 at layer 7."
        assert lens("entropy").sentence == (
            f"{where}the entropy goes from 8.10 nats at the embedding to 1.80 nats at layer 7."
        )
        assert lens("rank").sentence == f"{where}Paris reaches rank 1 first at layer 7 and ends at rank 1 at layer 7."
        values, labels = lens_arrays()
        part = charts.lens_grid(tokens(), (-1, *LAYERS), values, labels, answer="Parisian", answer_token="·Paris")
        assert "Parisian is first the top token at layer 6" in part.sentence

    def test_curves_and_bars(self):
        assert bars().sentence == "The model's first choice is ·Paris with probability 0.62, the answer."
        rome = pd.DataFrame({"rank": [1, 2], "display": ["·Paris", "·Rome"], "probability": [0.6, 0.08]})
        assert "Rome is number 2 with 0.08." in charts.top_tokens(rome, answer="Rome").sentence
        assert "Lyon is not among the first 2." in charts.top_tokens(rome, answer="Lyon").sentence
        table = pd.DataFrame({"layer": [-1, 0, 1], "series": "last", "value": [0.1, 0.9, 0.4]})
        assert charts.layer_curves(table, answer="Paris").sentence == (
            "p(Paris): last goes from 0.10 at the embedding to 0.40 at layer 1, highest 0.90 at layer 0."
        )

    def test_numbers(self):
        assert [signed(v) for v in (-62.4, 8, 0.2, -0.4)] == ["−62", "+8", "0", "0"]
        assert change(-3.14159, "log_odds") == "−3.14 nats" and change(float("nan"), "percent") == "not computed yet"
        assert [probability(p) for p in (0, 0.00004, 0.004, 0.5, 0.9995, 0.99999, 1)] == [
            "0.00", "4e−5", "0.004", "0.50", "0.9995", ">0.9999", "1.00",
        ]  # fmt: skip


class _Scripts(HTMLParser):
    """What a browser would take for scripts, handlers and images."""

    def __init__(self):
        super().__init__()
        self.scripts, self.other, self.inside = [], [], False

    def handle_starttag(self, tag, attrs):
        self.inside = tag == "script"
        if tag == "script":
            self.scripts.append([dict(attrs), ""])
        if tag == "img" or any(name.startswith("on") for name, _ in attrs):
            self.other.append((tag, attrs))

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "script"

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1][1] += data


class TestHostileText:
    def figure(self):
        rows = tokens((*HOSTILE, "·of"), subject=(0, 1))
        values, labels = lens_arrays(len(rows), 8)
        labels[:, 3] = HOSTILE[0]
        return charts.lens_grid(rows, LAYERS, values, labels, answer=HOSTILE[0], caption="\n".join(HOSTILE))

    def test_a_page_runs_only_its_own_scripts(self):
        page = export.html(self.figure()).decode()
        parser = _Scripts()
        parser.feed(page)
        assert len(parser.scripts) == 3 and not parser.other
        attributes, spec = parser.scripts[0]
        assert attributes["type"] == "application/json"
        assert "<" not in spec and "\u2028" not in spec and "\u2029" not in spec
        assert json.loads(spec)["layer"]
        assert page.count("</script>") == 3
        policy = page.split('http-equiv="Content-Security-Policy" content="')[1].split('"')[0]
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        assert "unsafe-eval" not in policy and "unsafe-inline" not in policy.split("style-src")[0]
        assert "http:" not in policy and "https:" not in policy

    def test_images_and_tables_take_it_as_text(self):
        figure = self.figure()
        root, _ = drawn(figure)
        tags = {node.tag.split("}")[1] for node in root.iter()}
        assert not tags & {"script", "img", "image", "foreignObject"}
        assert export.png(figure, scale=1).startswith(b"\x89PNG")
        table = pd.read_csv(io.BytesIO(export.csv(figure)), keep_default_na=False)
        assert table["token"].iloc[0] == HOSTILE[0]

    def test_titles_and_legends_stay_short(self):
        assert short("x" * 500) == "x" * 23 + "…"
        assert len(charts.knockout_map(tokens(), LAYERS, map_values(), answer="x" * 500).title) < 80

    @settings(max_examples=60, deadline=None)
    @given(st.text(max_size=30))
    def test_visible_text_is_valid_xml_and_keeps_what_can_be_seen(self, text):
        shown = visible(text)
        shown.encode()
        ET.fromstring(f"<a>{shown.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')}</a>")
        assert visible(shown) == shown

    @settings(max_examples=8, deadline=None)
    @given(st.lists(st.text(max_size=12), min_size=2, max_size=4), st.text(max_size=20))
    def test_any_text_can_be_drawn(self, words, answer):
        rows = tokens(words, subject=(0,))
        figure = charts.knockout_map(rows, (0, 1), np.zeros((len(rows), 2)), answer=answer, caption=answer)
        ET.fromstring(export.svg(figure))
        assert json.loads(export.script_safe(figure.complete_spec()))["layer"]

"""Figures of heads: what they draw, what they say, and that they can be drawn at all."""

from __future__ import annotations

import json

import altair
import numpy as np
import pandas as pd
import pytest

from factscope import charts
from factscope.charts import Figure, export
from factscope.charts.heads import limit_of
from factscope.errors import SpecError
from tests.test_charts import HOSTILE, WORDS, tokens

LAYERS = tuple(range(4))


def effects(layers: int = 4, heads: int = 3) -> np.ndarray:
    values = np.full((layers, heads), 0.02)
    values[3, 1], values[2, 0], values[0, 2] = 1.7, -0.9, 0.3
    return values


def extraction_table(sites: tuple[str, ...] = ("attention", "mlp")) -> pd.DataFrame:
    ranks = {"attention": [30, 4, 1, 1], "mlp": [9, 8, 7, 6], "contribution": [3, 2, 5, 4]}
    rows = [(s, j, r == 1, r, -float(r)) for s in sites for j, r in enumerate(ranks[s])]
    return pd.DataFrame(rows, columns=["site", "layer", "extracted", "target_rank", "target_score"])


def pattern(n: int = 12) -> np.ndarray:
    weights = np.tril(np.ones((n, n)))
    weights[-1, 3] = 5.0
    return weights / weights.sum(axis=1, keepdims=True)


def figures(theme: str = "light") -> dict[str, Figure]:
    named = {"theme": theme, "caption": "tiny"}
    return {
        "map": charts.head_map(effects(), LAYERS, answer="Paris", cursor=(3, 1), null=0.1, **named),  # type: ignore[arg-type]
        "pattern": charts.attention_pattern(tokens(), pattern(), head="layer 2, head 1", **named),  # type: ignore[arg-type]
        "sources": charts.head_sources(
            tokens(), np.linspace(-1, 2, 12), pattern()[-1], head="layer 2, head 1", answer="Paris", **named
        ),  # type: ignore[arg-type]
        "extraction": charts.extraction_events(extraction_table(), answer="Paris", **named),  # type: ignore[arg-type]
    }


@pytest.mark.parametrize("name", ["map", "pattern", "sources", "extraction"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_figure_can_be_drawn_and_exported(name: str, theme: str) -> None:
    figure = figures(theme)[name]
    altair.Chart.from_dict(figure.complete_spec())
    assert export.svg(figure).startswith(b"<svg")
    assert figure.sentence[0].isupper() and figure.sentence.endswith(".")
    assert len(figure.alt_table)
    other = figure.themed("dark" if theme == "light" else "light")
    assert other.sentence == figure.sentence
    assert json.dumps(other.spec) != json.dumps(figure.spec)


def test_the_map_draws_each_value_in_its_place() -> None:
    figure = figures()["map"]
    values = figure.data.set_index(["layer", "head"])["value"]
    assert all(values[layer, head] == effects()[layer, head] for layer in range(4) for head in range(3))
    assert figure.data[figure.data["cursor"]][["layer", "head"]].to_numpy().tolist() == [[3, 1]]
    assert figure.data["null"].sum() == 9
    assert figure.sentence.startswith("Layer 3, head 1 pushes Paris up most (+1.70 nats)")
    assert "layer 2, head 0 pushes Paris down most" in figure.sentence
    assert figure.alt_table.loc[1, "3"] == 1.7


def test_colours_are_symmetric_around_nothing() -> None:
    scale = figures()["map"].spec["layer"][0]["encoding"]["color"]["scale"]
    assert scale["domain"] == [-2.0, 2.0]
    legend = " ".join(figures()["map"].spec["layer"][0]["encoding"]["color"]["legend"]["title"])
    assert "pushes Paris up" in legend and "pushes Paris down" in legend
    assert "random weights" in legend
    foil = charts.head_map(effects(), LAYERS, answer="Paris", foil="Rome")
    assert "Paris minus Rome" in foil.sentence


def test_a_difference_is_b_minus_a() -> None:
    figure = charts.head_difference(effects(), effects() * 3, LAYERS, answer="Paris")
    values = figure.data.set_index(["layer", "head"])["value"]
    assert values[3, 1] == pytest.approx(3.4)
    assert "layer 3, head 1: +3.40 nats (+1.70 nats in A, +5.10 nats in B)" in figure.sentence
    altair.Chart.from_dict(figure.complete_spec())
    with pytest.raises(SpecError):
        charts.head_difference(effects(), effects(4, 4), LAYERS, answer="Paris")


@pytest.mark.parametrize(
    ("highest", "limit"), [(0.0, 1.0), (1.0, 1.0), (1.01, 1.5), (2.04, 3.0), (0.28, 0.3), (7.0, 8.0), (95.0, 100.0)]
)
def test_limits_are_round(highest: float, limit: float) -> None:
    assert limit_of([[highest, -highest / 2]]) == pytest.approx(limit)
    assert limit_of([np.nan]) == 1.0


def test_what_is_not_computed_is_said_and_marked() -> None:
    values = effects()
    values[0] = np.nan
    figure = charts.head_map(values, LAYERS, answer="Paris")
    assert figure.data["empty"].sum() == 3
    assert figure.sentence.startswith("So far, 9 of 12 computed")
    assert charts.head_map(values * np.nan, LAYERS, answer="Paris").sentence == "Nothing is computed yet."


def test_no_head_is_named_where_none_may_be() -> None:
    for more in ({"unnamed": "the model does not know this"}, {"null": 5.0}):
        sentence = charts.head_map(effects(), LAYERS, answer="Paris", **more).sentence  # type: ignore[arg-type]
        assert "most" not in sentence
        assert "layer 3" not in sentence
    assert "no null was run" in charts.head_map(effects(), LAYERS, answer="Paris").sentence
    named = charts.extraction_events(extraction_table(), answer="Paris")
    assert named.sentence.startswith("Attention (MHSA) extracts Paris in layers 2, 3;")
    assert "MLP extracts Paris in no layer (best rank 6)" in named.sentence
    unnamed = charts.extraction_events(extraction_table(), answer="Paris", unnamed="these weights are random")
    assert "2, 3" not in unnamed.sentence
    assert "these weights are random" in unnamed.sentence


def test_kept_tokens_have_a_line_of_their_own() -> None:
    table = extraction_table(("attention", "mlp", "contribution"))
    figure = charts.extraction_events(table, answer="Paris", edges="keep:last")
    assert "keep:last" in figure.title
    assert "kept tokens, weights as they were" in figure.sentence


def test_the_pattern_leaves_the_future_out() -> None:
    figure = figures()["pattern"]
    assert len(figure.data) == 12 * 13 / 2
    assert (figure.data["source"] <= figure.data["position"]).all()
    assert "·Tower" not in figure.sentence
    assert "iff (position 3)" in figure.sentence


def test_large_maps_stay_readable() -> None:
    """48 layers of 25 heads, 47 tokens: rows of at least 11 pixels, no more marks than a browser draws at once."""
    figure = charts.head_map(np.random.default_rng(0).normal(size=(48, 25)), range(48), answer="Paris")
    assert figure.spec["height"] >= 12 * 25
    assert len(figure.data) == 1200
    words = tuple(f"·w{i}" for i in range(47))
    long = charts.attention_pattern(tokens(words), pattern(47), head="layer 0, head 0")
    assert long.spec["height"] >= 11 * 47


def test_hostile_tokens_stay_text() -> None:
    words = (*WORDS[: 12 - len(HOSTILE)], *HOSTILE)
    for figure in (
        charts.attention_pattern(tokens(words), pattern(), head="layer 0, head 0"),
        charts.head_sources(tokens(words), np.ones(12), np.ones(12) / 12, head="h", answer=HOSTILE[0]),
    ):
        assert b"<script>alert" not in export.html(figure)


@pytest.mark.parametrize(
    "build",
    [
        lambda: charts.head_map(np.zeros((3, 2)), LAYERS, answer="x"),
        lambda: charts.head_map(np.zeros(4), LAYERS, answer="x"),
        lambda: charts.attention_pattern(tokens(), np.zeros((3, 3)), head="h"),
        lambda: charts.head_sources(tokens(), np.zeros(3), np.zeros(3), head="h", answer="x"),
        lambda: charts.head_map(effects(), LAYERS, answer="x", theme="sepia"),  # type: ignore[arg-type]
    ],
)
def test_shapes_and_themes_that_do_not_fit_are_refused(build) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SpecError):
        build()

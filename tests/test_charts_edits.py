"""Figures of edits: they compile, draw what the tables say, fill in on an unchanged spec, and tell it in a sentence."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from factscope.charts import export, layer_scores, loss_curve, probe_bars
from factscope.charts.figure import Figure
from factscope.charts.layers import best_layers, together
from factscope.columns import COLUMNS
from factscope.errors import SpecError

PROBES = pd.DataFrame(
    [
        ("fact", "The tower is in", 0.001, 0.97, 0.99, 0.002, "Paris", "Rome", "Paris.", "Rome."),
        ("paraphrase", "Find the tower in", 0.01, 0.5, 0.9, 0.4, "Paris", "Rome", "Paris.", "Rome."),
        ("neighbour", "The <b>Louvre</b> is in", 0.0, 0.1, 0.98, 0.8, "Paris", "Paris", "Paris.", "Paris."),
        ("own", "I say", 0.2, 0.3, np.nan, np.nan, "x", "y", "", ""),
        ("generation", "The tower", np.nan, np.nan, np.nan, np.nan, None, None, "a", "b"),
    ],
    columns=["kind", "prompt", "p_target_before", "p_target_after", "p_true_before", "p_true_after", "top_before",
             "top_after", "text_before", "text_after"],
)  # fmt: skip
LOSS = pd.DataFrame({"step": [0, 1, 2], "loss": [9.0, 3.5, 0.25]})
LAYERS = pd.DataFrame(
    {"layer": [0, 2], "rewrite": [0.9, 0.4], "paraphrase": [0.5, np.nan], "neighbourhood": [0.8, 1.0],
     "tracing_effect": [0.2, 0.7]}
)  # fmt: skip


def figures(theme: str = "light") -> list[Figure]:
    return [
        probe_bars(PROBES, target="Rome", answer="Paris", theme=theme),  # type: ignore[arg-type]
        loss_curve(LOSS, theme=theme),  # type: ignore[arg-type]
        layer_scores(LAYERS, n_layers=4, theme=theme),  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("which", range(3))
def test_a_figure_compiles_and_is_remade_in_the_other_theme(which: int, theme: str) -> None:
    figure = figures(theme)[which]
    assert export.svg(figure, theme=theme).lstrip().startswith(b"<svg")  # type: ignore[arg-type]
    other = "dark" if theme == "light" else "light"
    assert figure.themed(other).spec != figure.spec  # type: ignore[arg-type]
    assert figure.sentence.endswith(".") and len(figure.alt_table)


@pytest.mark.parametrize("which", range(3))
def test_an_unknown_theme_is_refused(which: int) -> None:
    with pytest.raises(SpecError, match="pink"):
        figures("pink")[which]


def test_probes_are_drawn_before_and_after() -> None:
    figure = figures()[0]
    drawn = figure.data
    assert len(drawn) == 7, "four probes with a target, three with a true answer; the text has no probability"
    fact = drawn[(drawn["row"] == 0) & (drawn["series"] == "new answer")].iloc[0]
    assert (fact["before"], fact["after"]) == (0.001, 0.97)
    assert "p(Rome) went from" in figure.sentence and "0.97" in figure.sentence
    assert "generation" not in set(figure.alt_table["kind"])
    assert probe_bars(PROBES.assign(p_target_after=0.5), target="Rome").spec == figure.spec


def test_losses_of_several_layers_are_lines_apart() -> None:
    several = pd.concat([LOSS.assign(fact=0, layer=1), LOSS.assign(fact=0, layer=2, loss=1.0)])
    figure = loss_curve(several)
    assert set(figure.data["series"]) == {"layer 1", "layer 2"} and "layer 2: 1 to 1" in figure.sentence
    assert loss_curve(LOSS.iloc[:1], steps=3).spec == loss_curve(LOSS, steps=3).spec, "it fills in on one axis"
    assert loss_curve(LOSS.iloc[:0]).sentence == "No step is done yet."


def test_layers_fill_in_on_an_unchanged_spec() -> None:
    tracing = pd.DataFrame({"layer": range(4), "tracing_effect": [0.1, 0.2, 0.9, 0.3]})
    figure = layer_scores(LAYERS, n_layers=4, tracing=tracing)
    partial = layer_scores(LAYERS.iloc[:0], n_layers=4, tracing=tracing)
    assert partial.spec == figure.spec and len(partial.data) == len(figure.data)
    assert "best at layer 0 (rewrite 0.90, paraphrase 0.50" in figure.sentence
    assert "largest at layer 2 (0.90)" in figure.sentence and partial.sentence == "No layer is edited yet."
    rows = figure.data.set_index(["series", "layer"])["shown"]
    assert (rows["paraphrase", 2], rows["paraphrase", 1]) == ("nothing to score", "not done yet")
    assert set(figure.data["means"]) == {COLUMNS[name].meaning for name in (*LAYERS.columns[1:],)}
    done = figure.data[(figure.data["series"] == "rewrite")].set_index("layer")["value"]
    assert done[0] == 0.9 and np.isnan(done[1])


def test_no_layer_is_named_against_the_null_or_without_knowledge() -> None:
    tracing = pd.DataFrame({"layer": range(4), "tracing_effect": [0.1, 0.2, 0.9, 0.3]})
    beaten = layer_scores(LAYERS, n_layers=4, tracing=tracing, grey=(2,))
    assert beaten.data[beaten.data["null"]][["layer", "kind"]].to_numpy().tolist() == [[2, "trace"]]
    assert "no larger than on random weights" in beaten.sentence and "layer 2" not in beaten.sentence
    doubted = layer_scores(LAYERS, n_layers=4, tracing=tracing, untraced="the noise does nothing")
    assert "no layer of the trace is named, since the noise does nothing" in doubted.sentence
    unknown = layer_scores(LAYERS, n_layers=4, tracing=tracing, unnamed="these are random weights")
    assert unknown.sentence == (
        "No layer is named, since these are random weights. Of 2 layers the rewrite score lies between 0.40 and 0.90."
    )
    dull = layer_scores(LAYERS.assign(rewrite=[0.1, 0.2]), n_layers=4, tracing=tracing)
    assert "none lets the edit work: the best rewrite score is 0.20" in dull.sentence


def test_scores_together_are_their_harmonic_mean() -> None:
    table = pd.DataFrame(
        {"layer": range(4), "rewrite": [0.9, 0.6, 0.99, np.nan], "paraphrase": [0.6, 0.6, 0.0, np.nan],
         "neighbourhood": [np.nan] * 4}
    )  # fmt: skip
    found = together(table)
    assert found[0] == pytest.approx(2 / (1 / 0.9 + 1 / 0.6)) and found[1] == pytest.approx(0.6)
    assert found[2] == 0.0 and np.isnan(found[3])
    assert best_layers(table) == (0, (0,))
    assert best_layers(table.assign(paraphrase=[0.6, 0.78, 0.6, 0.6])) == (2, (0, 2))
    assert best_layers(table.assign(rewrite=0.1)) == (None, ())


def test_a_layer_is_pointed_at_and_the_cursor_is_no_number() -> None:
    figure = layer_scores(LAYERS, n_layers=4, cursor_layer=3)
    (pointed,) = [layer for layer in figure.spec["layer"] if "params" in layer]
    assert pointed["params"][0]["name"] == "cell" and pointed["params"][0]["select"]["fields"] == ["layer"]
    assert list(figure.data["kind"]).count("cursor") == 1
    written = export.csv(figure).decode()
    assert "cursor" not in written and written.splitlines()[0] == "layer,series,value,kind"
    with pytest.raises(SpecError, match="block"):
        layer_scores(LAYERS, n_layers=4, site="block")  # type: ignore[arg-type]

"""Subject enrichment on the Lens page: sources, links, what it says without attributes, figures that do not boast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from dashboard import figures, link, requests, uploads
from dashboard.link import EnrichChoice, View
from factscope import charts
from factscope.charts import export
from factscope.experiments.subject_enrichment import MEAN_EMBEDDING, EnrichmentSpec
from factscope.store import from_json, to_json
from tests.test_dashboard_pages import open_page, said, settle, tiny  # noqa: F401  # two are fixtures

CSV = b'subject,paragraphs\nEiffel Tower,"Paris is the capital of France, a river city."\nJapan,Tokyo and mountains\n'


def test_rates_knockouts_attributes_and_neurons_stand_under_the_lens(open_page: Callable[..., AppTest]) -> None:  # noqa: F811
    at = open_page("lens")
    assert "known, so that no rate can exceed" in said(at)
    assert "attribute tokens are among the 50 that count" in said(at)
    assert "the largest parts of its update first" in said(at)
    headings = [element.value for element in at.markdown]
    assert all(any(name in value for value in headings) for name in ("Attributes rate", "Updates cancelled", "neurons"))
    assert at.number_input(key="enrich-window").value == 1
    assert at.number_input(key="enrich-read_layer").value == 3
    tables = [frame.value for frame in at.dataframe]
    listed = next(table for table in tables if "found" in table.columns)
    assert len(listed) > 0 and listed["found"].dtype == bool
    assert any("neuron" in table.columns for table in tables)


def test_a_subject_without_attributes_says_so_and_what_to_do(open_page: Callable[..., AppTest]) -> None:  # noqa: F811
    at = open_page("lens", prompt="The city of Nowhereville is in", subject="Nowhereville", answer="Peru")
    text = said(at)
    assert "No attributes of 'Nowhereville' are known" in text
    assert "choose a CSV file with columns subject and paragraphs" in text
    assert "reaches" not in text and "should not have" not in text


def test_a_prompt_without_a_subject_is_asked_for_one(open_page: Callable[..., AppTest]) -> None:  # noqa: F811
    at = open_page("lens", prompt="the quick brown fox jumps over the", answer="dog")
    assert "Name a subject above" in said(at)


def test_a_link_restores_the_choices_and_asks_for_the_file_again(open_page: Callable[..., AppTest]) -> None:  # noqa: F811
    at = open_page("lens", attributes="table", cancel="3", read="2", notebook="1", position0="1")
    assert at.number_input(key="enrich-window").value == 3
    assert at.number_input(key="enrich-read_layer").value == 2
    assert at.toggle(key="enrich-notebook").value and at.toggle(key="enrich-first").value
    assert "Give a CSV file with the columns subject and paragraphs" in said(at)
    assert "A link does not carry it" in said(at)
    settle(at.file_uploader(key="attributes-table").upload("bad<attr>.csv", b"name,about\nPeru,Lima").run())
    assert "bad_attr.csv has no column subject" in said(at)
    settle(at.file_uploader(key="attributes-table").upload("about.csv", CSV).run())
    text = said(at)
    assert "From about.csv." in text
    assert "attribute tokens are among the 50 that count" in text
    assert uploads._TEXTS + "/" not in text and "factscope-upload" not in text


def test_texts_are_searched(open_page: Callable[..., AppTest]) -> None:  # noqa: F811
    at = open_page("lens", attributes="texts")
    assert "found with BM25" in said(at)
    text = b"The Eiffel Tower stands in Paris.\n\nA river flows by the city."
    settle(at.file_uploader(key="attributes-texts").upload("one.txt", text).run())
    assert "From your texts." in said(at)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a,b\n1,2\n", "no column subject"),
        (b"\xff\xfe\x00", "about.csv is encoded in UTF-16"),
        (b"subject,paragraphs\nX,\n", "no row"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_sentence(
    open_page: Callable[..., AppTest],  # noqa: F811
    content: bytes,
    says: str,
) -> None:
    at = open_page("lens", attributes="table")
    settle(at.file_uploader(key="attributes-table").upload("about.csv", content).run())
    assert says in said(at)
    assert "should not have" not in said(at)


def test_choices_are_kept_in_the_address(open_page: Callable[..., AppTest]) -> None:  # noqa: F811
    at = open_page("lens")
    settle(at.toggle(key="enrich-first").set_value(True).run())
    settle(at.number_input(key="enrich-window").set_value(2).run())
    choice = at.session_state["factscope-view"].enrich
    assert choice == EnrichChoice(first=True, window=2)
    assert (at.query_params["position0"], at.query_params["cancel"]) == ("1", "2")


@pytest.mark.parametrize(
    "choice",
    [EnrichChoice(), EnrichChoice(source="texts", first=True, window=4, read_layer=0, notebook=True)],
)
def test_an_address_gives_the_choice_back(choice: EnrichChoice) -> None:
    view = replace(View(), enrich=choice)
    found, errors = link.parse(link.to_params(view))
    assert (found.enrich, errors) == (choice, [])


@pytest.mark.parametrize(
    ("name", "value"), [("attributes", "/etc/passwd"), ("cancel", "0"), ("read", "-1"), ("notebook", "2")]
)
def test_hostile_choices_are_refused(name: str, value: str) -> None:
    found, errors = link.parse({name: [value]})
    assert found.enrich == EnrichChoice()
    assert len(errors) == 1 and name in str(errors[0])


def test_what_is_shared_names_no_place_on_the_server() -> None:
    spec = requests.enrichment(EnrichChoice(), "/tmp/factscope-upload-x/ab12/your texts/your table.csv")
    assert requests.shareable(spec).attributes == "about.csv"
    assert requests.shareable(replace(spec, attributes="/tmp/x/your texts")).attributes == "texts"
    assert requests.shareable(requests.enrichment(EnrichChoice(), "bundled")).attributes == "bundled"


# ---------------------------------------------------------------------------------------------------- figures


def rates_figure(rate: list[float], highest: float) -> charts.Figure:
    names, layers = ("subject-last", MEAN_EMBEDDING), (-1, 0, 1, 2)
    others = np.full((2, 2, 4), highest)
    table = [[np.nan, *rate], [0.0, np.nan, np.nan, np.nan]]
    return charts.attributes_rates(names, layers, table, others, ceiling=10, n_attributes=5, subject="Peru")


def test_only_what_beats_every_other_subject_has_a_colour_and_a_peak() -> None:
    figure = rates_figure([2.0, 6.0, 4.0], 3.0)
    lines = figure.data[figure.data.kind == "line"]
    grey = dict(
        zip(lines[lines.series == "subject-last"].layer, lines[lines.series == "subject-last"].grey, strict=True)
    )
    assert grey == {0: True, 1: False, 2: False}
    assert "Subject-last reaches 6% at layer 1 (other subjects at most 3%)" in figure.sentence
    assert "mean-embedding stays within" in figure.sentence


def test_a_subject_that_does_not_beat_its_null_has_no_peak() -> None:
    figure = rates_figure([2.0, 6.0, 4.0], 6.0)
    lines = figure.data[figure.data.kind == "line"]
    assert lines.grey.all() and lines.grey_line.all()
    assert "reaches" not in figure.sentence
    assert "subject-last, mean-embedding stay within" in figure.sentence.lower()


def test_series_that_do_not_beat_their_null_can_still_be_told_apart() -> None:
    figure = charts.sublayer_knockout(
        (0, 1), {"mlp": [0.0, 1.0], "attention": [1.0, 1.0]},
        base_rate=1.0, base_other_rates=(0.0, 2.0), ceiling=10, read_layer=1, window=1,
    )  # fmt: skip
    drawn = export.svg(figure).decode()
    for layer in figure.spec["layer"][-2:]:
        colour = layer["encoding"]["color"]
        dull = [one["value"] for one in colour["condition"]]
        assert len(set(dull)) == 2 and not set(dull) & {*colour["scale"]["range"]}, "a dull tint of the own hue"
        assert all(f'"{tint}"' in drawn for tint in dull), "in the drawn figure, not only in the spec"


def test_without_any_null_nothing_is_within_one() -> None:
    """A table about one subject leaves no other subject to draw."""
    rates = [[2.0, 6.0, 4.0]]
    made = charts.attributes_rates(
        ("subject-last",), (0, 1, 2), rates, np.zeros((0, 1, 3)), ceiling=10, n_attributes=5, subject="Peru"
    )
    assert "within" not in made.sentence and "reaches" not in made.sentence
    assert "no layer is named: no other subject could be drawn" in made.sentence
    alone = charts.attributes_rates(
        ("subject-last",), (0, 1, 2), rates, np.zeros((0, 1, 3)), ceiling=10, n_attributes=5, subject="Peru",
        random_rates=[[3.0, 3.0, 3.0]],
    )  # fmt: skip
    assert alone.sentence.startswith("Subject-last reaches 6% at layer 1 (random weights at most 3%)")


def test_no_layer_is_named_for_what_the_model_does_not_know() -> None:
    rates = charts.attributes_rates(
        ("subject-last",), (0, 1, 2), [[2.0, 6.0, 4.0]], np.ones((2, 1, 3)), ceiling=10, n_attributes=5,
        subject="Peru", unnamed="the model was not taught this",
    )  # fmt: skip
    cancelled = charts.sublayer_knockout(
        (0, 1), {"mlp": [0.0, 5.0]}, base_rate=6.0, base_other_rates=(0.0, 2.0), ceiling=10, read_layer=1, window=1,
        beyond={0: 6.0}, unnamed="the model was not taught this",
    )  # fmt: skip
    for figure in (rates, cancelled):
        assert "no layer is named: the model was not taught this" in figure.sentence
        assert "reaches" not in figure.sentence and "lowest" not in figure.sentence


@pytest.mark.parametrize(("base", "grey"), [(6.0, False), (2.0, True), (1.0, True)])
def test_a_knockout_of_nothing_has_no_effect_to_name(base: float, grey: bool) -> None:
    figure = charts.sublayer_knockout(
        (0, 1), {"mlp": [0.0, base], "attention": [base, base]},
        base_rate=base, base_other_rates=(0.0, 2.0), ceiling=10, read_layer=1, window=1,
    )  # fmt: skip
    lines = figure.data[figure.data.kind == "line"]
    assert (lines.grey == grey).all()
    assert ("lowest around layer 0" in figure.sentence) == (not grey)
    assert ("nothing that a knockout could take away" in figure.sentence) == grey
    assert ("MHSA cancelled: lowers the rate nowhere" in figure.sentence) == (not grey)


@pytest.mark.parametrize(
    ("beyond", "says"),
    [
        ({1: 4.0, 2: 6.0}, "Read at layer 2, where the rate is 6%, there would be something to lose."),
        ({}, "Nor is there at any other layer."),
        (None, "there is nothing that a knockout could take away."),
    ],
)
def test_where_nothing_is_to_lose_another_layer_is_named(beyond: dict[int, float] | None, says: str) -> None:
    given = {"base_other_rates": (0.0, 2.0), "ceiling": 10, "read_layer": 0, "window": 1, "beyond": beyond}
    figure = charts.sublayer_knockout((0, 1), {"mlp": [0.0, 2.0]}, base_rate=2.0, **given)
    assert figure.sentence.endswith(says)
    something = charts.sublayer_knockout((0, 1), {"mlp": [0.0, 2.0]}, base_rate=6.0, **given)
    assert "Read at layer" not in something.sentence


def test_the_layer_with_the_highest_rate_is_one_click_away(
    open_page: Callable[..., AppTest],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dashboard.figures.rates_beyond", lambda rates, null=None: {0: 101.0, 1: 102.0})
    at = open_page("lens", prompt="The capital of Japan is", subject="Japan")
    assert at.number_input(key="enrich-read_layer").value == 3
    assert "This subject's rate is highest at layer 1 (102%); layer 3 is the paper's, 0.83 of the depth." in said(at)
    settle(at.button(key="enrich-read-best").click().run())
    assert at.session_state["factscope-view"].enrich.read_layer == 1
    assert at.number_input(key="enrich-read_layer").value == 1
    assert not [button for button in at.button if button.key == "enrich-read-best"]
    assert at.query_params["read"] == "1"


def test_layers_beyond_the_nulls_are_those_of_subject_last() -> None:
    from dashboard import figures
    from factscope.store import stored_result

    kind, query, spec = requests.home_enrichment(requests.BUNDLED_LAYERS)[0]
    result = stored_result(kind, query, spec)
    i = result.positions.index("subject-last")
    wanted = {layer: float(result.rate[i, j]) for j, layer in enumerate(result.layers)
              if layer >= 0 and result.rate[i, j] > result.other_rates[:, i, j].max()}  # fmt: skip
    assert figures.rates_beyond(result) == wanted
    high = replace(result, rate=np.full(result.rate.shape, 50.0), other_rates=np.zeros_like(result.other_rates))
    assert set(figures.rates_beyond(high)) == set(range(8))
    assert figures.rates_beyond(high, replace(high, rate=np.full(result.rate.shape, 50.0))) == {}


def test_without_other_subjects_nothing_is_claimed() -> None:
    figure = charts.sublayer_knockout(
        (0,), {"mlp": [1.0]}, base_rate=5.0, base_other_rates=(), ceiling=10, read_layer=0, window=1
    )
    assert "Nothing to compare with" in figure.sentence
    alone = charts.attributes_rates(
        ("last",), (0,), [[5.0]], np.zeros((0, 1, 1)), ceiling=10, n_attributes=5, subject="Peru"
    )
    assert alone.data[alone.data.kind == "line"].grey.all()
    assert "reaches" not in alone.sentence


def test_the_home_figures_are_the_stored_results() -> None:
    from factscope.store import stored_result

    for kind, query, spec in requests.home_enrichment(requests.BUNDLED_LAYERS):
        stored = stored_result(kind, query, spec)
        assert stored is not None
        again = from_json(to_json(stored))
        assert again.table().equals(stored.table())


def test_too_large_uploads_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class File:
        name = "one.txt"

        def getvalue(self) -> bytes:
            return b"x" * 11

    monkeypatch.setattr(uploads, "MAX_BYTES", 10)
    with pytest.raises(uploads.DatasetError, match="more than 10 bytes"):
        uploads._kept([File()], True)


def test_the_notebooks_window_is_offered_only_as_far_as_the_model_has_layers(open_page: Callable[..., AppTest]) -> None:  # noqa: F811
    window = open_page("lens", notebook="1").number_input(key="enrich-window")
    assert window.value == window.max == 4


def test_the_caption_of_a_knockout_says_what_was_done() -> None:
    plain = EnrichmentSpec(knockout="mlp")
    assert figures.cancelled(plain) == "zeros at the subject"
    assert "all positions" in figures.cancelled(replace(plain, notebook=True))

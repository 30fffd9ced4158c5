"""The Heads page without a browser: what it computes, says and links to, driven by Streamlit's AppTest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from dashboard import runs
from dashboard.link import Cursor, HeadsChoice, View, parse, to_params
from factscope.experiments import heads
from factscope.queries import Query
from factscope.tokens import tokenize
from tests.test_dashboard_pages import ROOT, open_page, said, settle, tiny  # noqa: F401

JAPAN = {"prompt": "The capital of Japan is", "subject": "Japan", "answer": "Tokyo"}


@pytest.fixture
def loaded(tiny: str) -> Any:  # noqa: F811
    from dashboard.link import ModelChoice

    with runs.use(ModelChoice(name=tiny)) as handle:
        return handle


def test_the_page_shows_the_map_the_events_and_one_head(open_page: Callable[..., AppTest], loaded: Any) -> None:  # noqa: F811
    at = open_page("heads", cell="3.2.1", **JAPAN)
    assert at.number_input(key="heads-cursor-layer").value == 2
    assert at.number_input(key="heads-cursor-head").value == 1
    result = heads.run(loaded, Query(**JAPAN))
    assert f"layer 2, head 1:  {result.direct_effect[2, 1]:+.2f} nats of" in said(at)
    assert f"{result.attention_to_subject[2, 1]:.0%} of its attention goes to the subject" in said(at)
    assert f"rank {int(result.mapping_rank[2, 1]):,} of its weights alone" in said(at)
    table = next(d.value for d in at.dataframe if "suppressed" in d.value)
    assert table["promoted"].tolist() == [result.texts[int(t)][1] for t in result.promoted_ids[2, 1]]
    assert np.allclose(table["suppressed by"], result.suppressed[2, 1])
    charts = at.get("vega_lite_chart")
    assert len(charts) == 4
    assert "MHSA" in said(at)


def test_without_a_cursor_the_largest_effect_is_near(open_page: Callable[..., AppTest], loaded: Any) -> None:  # noqa: F811
    own = {"prompt": JAPAN["prompt"], "subject": JAPAN["subject"]}
    at = open_page("heads", **own)
    effect = np.abs(heads.run(loaded, Query(**own)).direct_effect)
    layer, head = np.unravel_index(effect.argmax(), effect.shape)
    assert (at.number_input(key="heads-cursor-layer").value, at.number_input(key="heads-cursor-head").value) == (
        layer,
        head,
    )


def test_a_click_on_a_cell_moves_the_cursor(open_page: Callable[..., AppTest], loaded: Any) -> None:  # noqa: F811
    at = open_page("heads", **JAPAN)
    last = tokenize(Query(**JAPAN), loaded.tokenizer).last
    at.session_state["point-at-head"] = (1, 3)
    settle(at.run())
    assert at.session_state["factscope-view"].cursor == Cursor(position=last, layer=1, head=3)
    assert "layer 1, head 3:" in said(at)
    settle(at.number_input(key="heads-cursor-head").set_value(2).run())
    assert at.session_state["factscope-view"].cursor.head == 2


def test_a_fact_that_is_not_known_names_no_head(open_page: Callable[..., AppTest]) -> None:  # noqa: F811
    at = open_page("heads", **JAPAN)
    assert "No head and no layer is named below: the model does not know this." in said(at)
    assert "no head is named: the model does not know this" in said(at)
    assert "up most" not in said(at)


def test_random_weights_name_no_head(open_page: Callable[..., AppTest], tiny: str) -> None:  # noqa: F811
    at = open_page("heads", model=f"random:{tiny}", **JAPAN)
    assert "these are random weights" in said(at)
    assert "up most" not in said(at)
    assert not any(toggle.key == "heads-null" for toggle in at.toggle)


def test_a_subject_that_was_never_taught_names_no_head(open_page: Callable[..., AppTest]) -> None:  # noqa: F811
    at = open_page("heads", model="bundled", prompt="The capital of Atlantis is", subject="Atlantis")
    assert "Not among the facts this model was taught" in said(at)
    assert "the model was not taught this" in said(at)
    assert "up most" not in said(at)
    assert "takes most of its effect" not in said(at)
    assert [at.number_input(key=f"heads-cursor-{name}").value for name in ("layer", "head")] == [0, 0]
    assert at.session_state["factscope-view"].cursor is None


def test_a_known_fact_names_its_heads_and_their_null(open_page: Callable[..., AppTest]) -> None:  # noqa: F811
    at = open_page("heads", model="bundled", **JAPAN)
    assert "pushes Tokyo up most" in said(at)
    assert "random weights give up to" in said(at)
    settle(at.toggle(key="heads-null").set_value(False).run())
    assert "pushes Tokyo up most" in said(at)
    assert "no null was run beside it" in said(at)


def test_knocking_a_head_out_leads_to_flow(open_page: Callable[..., AppTest], loaded: Any) -> None:  # noqa: F811
    at = open_page("heads", cell="2.1.3", **JAPAN)
    settle(at.button(key="knock-out").click().run())
    last = tokenize(Query(**JAPAN), loaded.tokenizer).last
    assert at.session_state["factscope-view"].flow.edges == (f"last:0-{last - 1}:1:3",)
    settle(at.switch_page(str(ROOT / "pages" / "flow.py")).run())
    assert at.text_area(key="flow-edges").value == f"last:0-{last - 1}:1:3"
    assert "log-odds" in said(at)


@pytest.mark.parametrize("page", ["flow", "lens"])
def test_a_cell_leads_to_the_heads_of_its_layer(open_page: Callable[..., AppTest], page: str) -> None:  # noqa: F811
    at = open_page(page, cell="3.2", **JAPAN)
    settle(at.button(key="heads-here").click().run())
    settle(at.switch_page(str(ROOT / "pages" / "heads.py")).run())
    assert at.number_input(key="heads-cursor-layer").value == 2


def test_two_sides_and_their_difference(open_page: Callable[..., AppTest], loaded: Any) -> None:  # noqa: F811
    at = open_page("heads", **JAPAN)
    settle(at.button(key="pin-as-a").click().run())
    settle(at.selectbox(key="heads-edges").set_value("block:subject").run())
    assert len(at.get("vega_lite_chart")) == 6
    other = {"prompt": "The capital of Peru is", "subject": "Peru", "answer": "Tokyo"}
    for name, value in other.items():
        at.text_input(key=f"fact-{name}").set_value(value)
    settle(at.button(key="FormSubmitter:fact-Ask").click().run())
    a, b = (heads.run(loaded, Query(**fact)).direct_effect for fact in (JAPAN, other))
    layer, head = np.unravel_index(np.abs(b - a).argmax(), a.shape)
    assert "No place is named, since the model does not know this" in said(at)
    assert "No head and no layer is named below" not in said(at), "A may know its fact: each side says its own"
    assert f"layer {layer}, head {head}" not in said(at)


def test_a_foil_offers_the_difference(open_page: Callable[..., AppTest], loaded: Any) -> None:  # noqa: F811
    at = open_page("heads", cell="2.1.3", foil="Paris", effect="foil", **JAPAN)
    result = heads.run(loaded, Query(**JAPAN, foil="Paris"))
    assert f"{result.direct_effect_foil[1, 3]:+.2f} of " in said(at)
    assert "minus Paris" in said(at)


def test_the_edge_variant_is_run(open_page: Callable[..., AppTest]) -> None:  # noqa: F811
    at = open_page("heads", variant="keep:subject-last", **JAPAN)
    assert "kept tokens, weights as they were" in said(at)
    settle(at.selectbox(key="heads-edges").set_value("block:all").run())
    assert at.session_state["factscope-view"].heads.edges == "block:all"
    assert "kept tokens, weights as they were" not in said(at)
    assert "'cut:x'" in said(open_page("heads", variant="cut:x", **JAPAN))


@pytest.mark.parametrize(
    "view",
    [
        View(cursor=Cursor(position=3, layer=2, head=1), heads=HeadsChoice(effect="foil", null=True)),
        View(cursor=Cursor(position=3, layer=-1)),
        View(heads=HeadsChoice(mapping="state", null=False, edges="keep:subject-last+last")),
    ],
)
def test_the_link_restores_the_page(view: View) -> None:
    found, problems = parse(to_params(view))
    assert found == view
    assert problems == []


@pytest.mark.parametrize(
    "address", ["cell=1.2.x", "cell=1.2.-1", "effect=none", "heads-null=7", "mapping=x", "variant=\x07"]
)
def test_unusable_addresses_are_said(address: str) -> None:
    view, problems = parse(parse_qs(address))
    assert view == View()
    assert len(problems) == 1

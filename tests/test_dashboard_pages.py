"""The pages without a browser: what they compute and say, driven by Streamlit's AppTest."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import streamlit as st
import torch
from streamlit.testing.v1 import AppTest
from transformers import GPT2Config, GPT2LMHeadModel

from dashboard import panels, runs, state
from dashboard.link import Cursor
from tests.tiny_models import redraw, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = tiny_tokenizer("byte")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(tokenizer), n_embd=36, n_layer=4, n_head=4, n_positions=96, bos_token_id=0, eos_token_id=1
        )
        model = GPT2LMHeadModel(config).eval()
    redraw(model, 3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def open_page(tiny: str) -> Iterator[Callable[..., AppTest]]:
    def make(page: str = "fact", **params: str) -> AppTest:
        at = AppTest.from_file(str(ROOT / "dashboard" / "main.py"), default_timeout=60)
        for name, value in {"model": tiny, **params}.items():
            at.query_params[name] = value
        if page != "fact":
            at.switch_page(str(ROOT / "pages" / f"{page}.py"))
        return settle(at.run())

    yield make


def settle(at: AppTest) -> AppTest:
    """Run until nothing is under way: what the fragment's timer does in a browser."""
    deadline = time.monotonic() + 60
    while any(state in ("waiting", "running") for state in at.session_state["runs-watched"].values()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
        at.run()
    assert not at.exception
    return at


def parts(at: AppTest) -> list[dict[str, Any]]:
    """The data of our own components on the page."""
    found = []
    for element in at.get("bidi_component"):
        data = element.proto.json or "{}"
        found.append(json.loads(data))
    return found


def said(at: AppTest) -> str:
    """Every line of every note."""
    return "\n".join(line for data in parts(at) for line in data.get("lines", []))


def tokens(at: AppTest) -> dict[str, Any]:
    return next(data for data in parts(at) if "tokens" in data)


def test_the_fact_page_shows_tokens_chips_and_a_verdict(open_page: Callable[..., AppTest]) -> None:
    at = open_page()
    line = tokens(at)
    assert line["chips"][0]["text"] == "Paris"
    assert (
        "".join(t["text"].replace("·", " ") for t in line["tokens"] if "subject" in t["kind"]).strip() == "Eiffel Tower"
    )
    assert line["tokens"][-1]["kind"] == "last"
    assert "The model does not know this" in said(at)


@pytest.mark.parametrize("page", ["flow", "lens", "trace"])
def test_a_deep_link_opens_each_page(open_page: Callable[..., AppTest], page: str) -> None:
    at = open_page(page, cell="3.2", prompt="The capital of Japan is", subject="Japan", answer="Tokyo")
    assert at.number_input(key="cursor-position").value == 3
    assert at.number_input(key="cursor-layer").value == 2
    assert "at layer 2" in said(at)


def test_asking_suggests_the_subject_and_changes_the_fact(open_page: Callable[..., AppTest]) -> None:
    at = open_page()
    at.text_input(key="fact-prompt").set_value("The capital of Japan is")
    at.text_input(key="fact-answer").set_value("Tokyo")
    settle(at.button(key="FormSubmitter:fact-Ask").click().run())
    assert at.text_input(key="fact-subject").value == "Japan"
    assert tokens(at)["chips"][0]["text"] == "Tokyo"


def test_a_wrong_subject_is_a_sentence_and_the_tokens_stay(open_page: Callable[..., AppTest]) -> None:
    at = open_page("flow", prompt="The capital of Japan is", subject="Korea", answer="Tokyo")
    assert "Korea" in said(at)
    assert "needs a subject" not in said(at)
    assert tokens(at)["tokens"]
    assert not at.exception


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"prompt": "\u0007bell"}, "not text"),
        ({"prompt": "Japan", "subject": "Japan"}, "Japan"),
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"model": "no such name!"}, "no such name!"),
        ({"device": "abacus"}, "abacus"),
        ({"window": "NaN"}, "window='NaN'"),
        ({"span": "90-95"}, "90"),
    ],
)
def test_unusable_links_are_sentences(open_page: Callable[..., AppTest], params: dict[str, str], says: str) -> None:
    at = open_page(**params)
    assert says in said(at)
    assert "should not have" not in said(at)


def test_hostile_text_reaches_the_page_only_as_data(open_page: Callable[..., AppTest]) -> None:
    hostile = "<img src=x> $x$ :smile: [a](http://b.c) Japan is"
    at = open_page("lens", prompt=hostile, subject="Japan", answer="**x**")
    for element in [*at.markdown, *at.caption]:
        assert "img" not in element.value
        assert "http" not in element.value
    assert any("**x**" in chip["text"] for chip in tokens(at)["chips"])


def test_the_edge_builder_says_before_and_after(open_page: Callable[..., AppTest]) -> None:
    at = open_page("flow", edge="last:subject:0-1")
    assert "log-odds" in said(at)
    settle(at.text_area(key="flow-edges").set_value("last:subject:9").run())
    assert "'9' is not between 0 and 3" in said(at)


def test_parameters_survive_other_pages(open_page: Callable[..., AppTest]) -> None:
    at = open_page("flow", window="2", measure="log_odds")
    assert at.slider(key="flow-window").value == 2
    settle(at.switch_page(str(ROOT / "pages" / "lens.py")).run())
    settle(at.switch_page(str(ROOT / "pages" / "flow.py")).run())
    assert at.slider(key="flow-window").value == 2
    assert at.session_state["factscope-view"].flow.measure == "log_odds"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("facts.csv", b"prompt,subject,answer\nThe capital of Peru is,Peru,Lima\n", "1 facts"),
        ("facts.csv", b"prompt,subject,answer\nThe capital of Peru is,Peru,Lima\nx,,\n", "1 of 2 records gave no fact"),
        ("facts.csv", b"a,b\n1,2\n", "facts.csv"),
        ("facts.json", b"{broken", "facts.json"),
        ("facts.csv", b"\xff\xfe\x00bad", "facts.csv"),
    ],
)
def test_an_uploaded_file_gives_facts_or_a_sentence(
    open_page: Callable[..., AppTest], name: str, content: bytes, says: str
) -> None:
    at = open_page()
    at.session_state["facts-drawer"] = True
    at.run()
    at.file_uploader(key="picker-file").upload(name, content).run()
    assert says in said(at)
    assert "should not have" not in said(at)
    assert not at.exception


def test_the_model_drawer_tells_what_a_model_takes_and_supports(open_page: Callable[..., AppTest], tiny: str) -> None:
    at = open_page()
    at.session_state["model-drawer"] = True
    at.run()
    assert f"In use: {tiny}" in said(at)
    assert "gpt2, 4 layers" in said(at)
    at.text_input(key="model-name-folder").set_value("/nowhere/at/all").run()
    next(b for b in at.button if b.label == "What will it take?").click().run()
    settle(at)
    assert "/nowhere/at/all" in said(at)


def test_the_body_lets_the_frame_show_the_answer_first(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, drawn = iter(["running", "done", "done", "done"]), []

    def reading() -> str:
        st.session_state["runs-watched"]["reading"] = next(answers)
        return st.session_state["runs-watched"]["reading"]

    def script() -> None:
        from dashboard import runs

        runs.begin()
        above: Any = runs.reading()
        runs.live(lambda: runs.drawn(above))

    monkeypatch.setattr(runs, "reading", reading)
    monkeypatch.setattr(runs, "drawn", drawn.append)
    assert not AppTest.from_function(script).run().exception
    assert drawn == ["done"]


JAPAN = {"prompt": "The capital of Japan is", "subject": "Japan"}


def test_a_link_restores_the_trace_page(open_page: Callable[..., AppTest]) -> None:
    at = open_page("trace", **JAPAN, samples="2", seeds="3,1", noise="0.8", sever="mlp", draws="compat", extra="1",
                   replace="1", roles="mlp", **{"trace-window": "3", "trace-measure": "log_odds"})  # fmt: skip
    assert at.slider(key="trace-window").value == 3
    assert at.number_input(key="trace-samples").value == 2
    assert at.text_input(key="trace-seeds").value == "3, 1"
    assert at.selectbox(key="trace-noise").value == "0.8"
    view = at.session_state["factscope-view"].trace
    assert (view.sever, view.draws, view.extra, view.replace) == ("mlp", "compat", 1, True)
    assert "clean" in said(at)
    assert "2 samples, seeds 3, 1" in said(at)
    assert "nats" in said(at)
    assert "restored: p" in said(at)


def test_the_trace_page_says_what_it_cannot_name(open_page: Callable[..., AppTest]) -> None:
    at = open_page("trace", **JAPAN, answer="Tokyo", samples="2")
    words = said(at)
    assert "The model does not know this" in words
    assert "No place is named as the strongest." in words
    assert "gives back most" not in words


def test_the_trace_page_names_no_place_of_random_weights(open_page: Callable[..., AppTest], tiny: str) -> None:
    at = open_page("trace", **JAPAN, samples="2", model=f"random:{tiny}")
    assert "The weights are random" in said(at)
    assert "gives back most" not in said(at)


def test_the_trace_page_names_the_strongest_place_of_a_known_answer(open_page: Callable[..., AppTest]) -> None:
    at = open_page("trace", **JAPAN, samples="4", noise="2")
    assert "No place is named" not in said(at)
    assert said(at).count("gives back most") == 3


def test_the_trace_page_needs_a_subject_and_a_rule_that_can_be_read(open_page: Callable[..., AppTest]) -> None:
    at = open_page("trace", prompt="The capital of Japan is")
    assert "Name it in the fact line" in said(at)
    at = open_page("trace", **JAPAN, noise="<b>loud</b>")
    assert said(at).count("<b>loud</b>") == 1
    assert "write 0.1, s3" in said(at)


def test_another_subject_takes_the_place_of_noise(open_page: Callable[..., AppTest]) -> None:
    at = open_page("trace", **JAPAN, other="Tokyo Tower of Seattle")
    assert "takes" in said(at) and "tokens here" in said(at)
    assert at.text_input(key="trace-seeds").disabled


def test_a_foil_offers_the_logit_difference(open_page: Callable[..., AppTest]) -> None:
    link = {**JAPAN, "samples": "2", "trace-measure": "logit_difference"}
    assert "minus Rome is" in said(open_page("trace", **link, foil="Rome"))
    assert "minus" not in said(open_page("trace", **link))


def test_seeds_are_typed(open_page: Callable[..., AppTest]) -> None:
    at = open_page("trace", **JAPAN, samples="1")
    settle(at.text_input(key="trace-seeds").set_value("2, 5").run())
    assert at.session_state["factscope-view"].trace.seeds == (2, 5)
    assert "cannot be used" not in said(at)
    settle(at.text_input(key="trace-seeds").set_value("1,x").run())
    assert at.session_state["factscope-view"].trace.seeds == (2, 5)
    assert "Seeds '1,x' cannot be used" in said(at) and "the figures are those of 2, 5" in said(at)
    settle(at.text_input(key="trace-seeds").set_value("7").run())
    assert at.session_state["factscope-view"].trace.seeds == (7,)
    assert "cannot be used" not in said(at)


SECOND = {"cf-subject": "Peru", "cf-site": "mlp", "cf-measure": "probability", "cf-direction": "into_other"}


def test_a_link_restores_a_counterfactual_patch(open_page: Callable[..., AppTest]) -> None:
    at = open_page("trace", **JAPAN, samples="1", **SECOND)
    assert at.text_input(key="cf-subject").value == "Peru"
    assert at.session_state["factscope-view"].patch.direction == "into_other"
    assert "The capital of Peru is" in said(at) or "nothing tells them apart" in said(at)


def test_a_second_question_is_typed(open_page: Callable[..., AppTest]) -> None:
    at = open_page("trace", **JAPAN, samples="1")
    at.session_state["counterfactual-drawer"] = True
    settle(at.run())
    assert "Name another subject" in said(at)
    settle(at.text_input(key="cf-prompt").set_value("Japan was known for the trumpet of").run())
    assert "where the states come from" in said(at)
    settle(at.text_input(key="cf-subject").set_value("Korea").run())
    assert "Korea" in said(at) and "not in the prompt" in said(at)


def test_what_a_widget_showed_before_a_click_does_not_undo_the_click(
    open_page: Callable[..., AppTest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A browser that lags sends the old numbers with its next message: they are no choice of the user's."""
    monkeypatch.setattr(state, "_RESEND_SECONDS", 60.0)
    at = open_page("lens", cell="3.2")
    view = at.session_state["factscope-view"]
    at.session_state["factscope-view"] = replace(view, cursor=Cursor(position=5, layer=1))  # as a click does
    settle(at.run())
    assert (at.number_input(key="cursor-position").value, at.number_input(key="cursor-layer").value) == (5, 1)
    at.number_input(key="cursor-position").set_value(3)
    settle(at.number_input(key="cursor-layer").set_value(2).run())
    assert at.session_state["factscope-view"].cursor == Cursor(position=5, layer=1)
    assert (at.number_input(key="cursor-position").value, at.number_input(key="cursor-layer").value) == (5, 1)
    settle(at.number_input(key="cursor-layer").set_value(3).run())
    assert at.session_state["factscope-view"].cursor == Cursor(position=5, layer=3), "another number is a choice"
    monkeypatch.setattr(state, "_RESEND_SECONDS", 0.0)
    settle(at.number_input(key="cursor-layer").set_value(2).run())
    assert at.session_state["factscope-view"].cursor == Cursor(position=5, layer=2), "later the old number is, too"


def test_a_second_click_on_a_cell_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The browser reports it as a selection that is gone."""
    moved: list[tuple[int, int]] = []
    kept: dict[str, Any] = {}
    monkeypatch.setattr(panels.st, "session_state", kept)
    monkeypatch.setattr(panels.state, "point_at", lambda position, layer: moved.append((position, layer)))
    for chosen in ([{"layer": 2, "position": 3}], [], [{"layer": 1, "position": 4}], []):
        kept["chart-x"] = SimpleNamespace(selection={"cell": chosen})
        panels._point("chart-x")
    assert moved == [(3, 2), (3, 2), (4, 1), (4, 1)]
    kept["chart-y"] = SimpleNamespace(selection={"cell": []})
    panels._point("chart-y")
    assert len(moved) == 4, "nothing was ever clicked there"


def test_a_short_prompt_is_told_which_null_it_can_have(open_page: Callable[..., AppTest]) -> None:
    at = open_page("flow", prompt="Tokyo Tower of Seattle is", subject="Tokyo Tower of Seattle")
    assert "too few to match" in said(at) and "choose random weights as the null (top right)" in said(at)
    assert "too few to match" not in said(open_page("flow", prompt="The capital of Japan is", subject="Japan",
                                                    null="weights"))  # fmt: skip


@pytest.mark.parametrize(("subject", "way"), [("Japan", "Options, top right"), ("Peru", "Or click the subject")])
def test_a_refused_subject_comes_with_the_way_out(open_page: Callable[..., AppTest], subject: str, way: str) -> None:
    at = open_page(prompt="Japan and the capital of Japan is", subject=subject)
    assert way in said(at)
    assert f"“{subject}” was not found in the prompt" in said(at) or subject == "Japan"


def test_long_traces_are_started_together(open_page: Callable[..., AppTest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "ASK_ABOVE_SECONDS", -1.0)
    at = open_page("trace", **JAPAN, samples="1", seeds="2,3")
    names = ("hidden", "mlp", "attention")
    assert {f"run-trace-{name}" for name in names} <= {button.key for button in at.button}
    settle(at.button(key="trace-run-all").click().run())
    assert not {"trace-run-all", *(f"run-trace-{name}" for name in names)} & {button.key for button in at.button}
    assert "1 sample, seeds 2, 3" in said(at) or "1 samples, seeds 2, 3" in said(at)

"""Several visitors on one server: their facts, their runs, the processor."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.conftest import Server, answer_chip
from tests.browser.test_main_flow import ask

LONG = "one two three four five six seven eight nine ten eleven twelve " * 4 + "The capital of Japan is"
FACTS = (
    ("The capital of Japan is", "Japan", "Tokyo"),
    ("Miles Davis plays the", "Miles Davis", "trumpet"),
    ("Beats Music is owned by", "Beats Music", "Apple"),
)
OTHER_FACTS = (
    ("The capital of Italy is", "Italy", "Rome"),
    ("The capital of Spain is", "Spain", "Madrid"),
    ("The capital of Greece is", "Greece", "Athens"),
)
LOADING = 150_000
"""Milliseconds for loading and measuring the deep model, once, on a machine that is busy with other things."""
SLOW_PRESS = 800
"""Milliseconds from mouse down to up: a button that moves meanwhile, as the page is drawn again, misses the click."""
WITHIN_SECONDS = 1.0
TIMES_ALONE = 2.0
"""On a machine that is busy with other things, an answer may take so many times what it takes without the long run."""


@pytest.fixture
def started(new_context: Callable[..., BrowserContext], server: Server, deep_model: str) -> Page:
    """A page whose map, which takes a while, was started this moment."""
    page = new_context().new_page()
    page.goto(server.url("flow", model=deep_model, prompt=LONG, subject="Japan", control="0"))
    cancel, run = page.locator(".st-key-cancel-flow-map button"), page.locator(".st-key-run-flow-map button")
    expect(cancel.or_(run).first).to_be_visible(timeout=LOADING)
    if run.is_visible():
        run.click()
    return page


@pytest.fixture
def long_run(started: Page) -> Page:
    """A page whose map is being computed and takes a while; its first part is drawn."""
    expect(started.locator('[class*="st-key-chart-map-"]').first).to_be_visible()
    expect(started.locator(".st-key-cancel-flow-map button")).to_be_visible()
    return started


def test_two_browsers_ask_different_facts_at_once(
    new_context: Callable[..., BrowserContext], server: Server, model: dict[str, str]
) -> None:
    first, second = new_context().new_page(), new_context().new_page()
    first.goto(server.url(**model))
    second.goto(server.url(prompt="The capital of Japan is", subject="Japan", answer="Tokyo", **model))
    expect(answer_chip(second)).to_contain_text("Tokyo")
    expect(answer_chip(first)).to_contain_text("Paris")
    ask(first, "Miles Davis plays the", "Miles Davis", "trumpet")
    expect(answer_chip(first)).to_contain_text("trumpet")
    expect(answer_chip(second)).to_contain_text("Tokyo")
    expect(second.get_by_role("textbox", name="Subject")).to_have_value("Japan")


def test_cancel_keeps_the_part_and_leaves_the_processor_idle(long_run: Page, server: Server) -> None:
    expect(long_run.get_by_text("Cancel", exact=True).first).to_be_visible()
    long_run.locator(".st-key-cancel-flow-map button").click()
    expect(long_run.get_by_text("Cancelled at").first).to_be_visible()
    expect(long_run.get_by_text("the figure is partial").first).to_be_visible()
    deadline = time.monotonic() + 30
    while (share := server.processor_share(0.5)) > 0.3:
        assert time.monotonic() < deadline, f"the server still uses {share:.0%} of a core"
    expect(long_run.get_by_role("button", name="Run again").first).to_be_visible()


def test_nothing_moves_a_button_of_the_run_bar_while_it_is_pressed(started: Page) -> None:
    bar = started.locator(".st-key-head-one-token-at-a-time")
    bar.get_by_role("button", name="Cancel").click(delay=SLOW_PRESS)
    expect(bar.get_by_text("Cancelled")).to_be_visible()
    bar.get_by_role("button", name="Run again").click(delay=SLOW_PRESS)
    bar.get_by_role("button", name="Cancel").click(delay=SLOW_PRESS)
    expect(bar.get_by_text("Cancelled")).to_be_visible()


def test_a_short_question_is_answered_while_a_long_map_runs(
    long_run: Page, new_context: Callable[..., BrowserContext], server: Server, model: dict[str, str]
) -> None:
    other = new_context().new_page()
    other.goto(server.url(**model))
    expect(answer_chip(other)).to_contain_text("Paris")
    took = [seconds_to_answer(other, *fact) for fact in FACTS]
    assert long_run.locator(".st-key-cancel-flow-map button").is_visible(), "the long run ended too early to tell"
    long_run.locator(".st-key-cancel-flow-map button").click()
    expect(long_run.get_by_text("Cancelled at").first).to_be_visible()
    alone = [seconds_to_answer(other, *fact) for fact in OTHER_FACTS]
    assert min(took) < max(WITHIN_SECONDS, TIMES_ALONE * min(alone)), (took, alone)


def seconds_to_answer(page: Page, prompt: str, subject: str, answer: str) -> float:
    page.get_by_role("textbox", name="Prompt, up to the answer").fill(prompt)
    page.get_by_role("textbox", name="Subject").fill(subject)
    page.get_by_role("textbox", name="Answer", exact=True).fill(answer)
    chip = page.locator(".chip").filter(has_text=answer).first
    began = time.monotonic()
    page.get_by_role("button", name="Ask").click()
    chip.wait_for()
    return time.monotonic() - began


def test_a_closed_tab_ends_its_run(long_run: Page, server: Server) -> None:
    long_run.context.close()
    deadline = time.monotonic() + 30
    while (share := server.processor_share(0.5)) > 0.3:
        assert time.monotonic() < deadline, f"the server still uses {share:.0%} of a core"

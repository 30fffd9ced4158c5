"""The evidence strip leaves the first screen to the figures, and every step can be read and followed."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import BrowserContext, expect

from dashboard.evidence import STEPS
from tests.browser.conftest import Server

TALLEST = 130


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_strip_is_low_and_complete(
    new_context: Callable[..., BrowserContext], server: Server, model: dict[str, str], scheme: str
) -> None:
    page = new_context(color_scheme=scheme).new_page()
    page.goto(server.url(**model))
    strip = page.locator(".st-key-evidence")
    expect(strip.locator(".note")).to_have_count(len(STEPS))
    expect(strip.get_by_text("being computed")).to_have_count(0)
    for i, step in enumerate(STEPS):
        expect(strip.locator(".note").nth(i)).to_contain_text(re.compile(rf"{re.escape(step.name)}.*\d", re.DOTALL))
    box = strip.bounding_box()
    assert box is not None and box["height"] <= TALLEST, box
    for column in strip.locator(".stColumn").all():
        note, link = column.locator(".note").bounding_box(), column.locator("a").first
        if note is None or not link.count():
            continue
        below = link.bounding_box()
        assert below is not None and below["y"] >= note["y"] + note["height"] - 1, (note, below)
        assert below["y"] + below["height"] <= box["y"] + box["height"] + 8
    strip.get_by_role("link", name="See Trace").click()
    expect(page.get_by_text("State restored", exact=True)).to_be_visible()


def test_the_strip_fits_a_page_at_twice_its_size(
    new_context: Callable[..., BrowserContext], server: Server, model: dict[str, str]
) -> None:
    page = new_context(viewport={"width": 640, "height": 360}).new_page()
    page.goto(server.url(**model))
    expect(page.locator(".st-key-evidence .note")).to_have_count(len(STEPS))
    assert page.evaluate("document.documentElement.scrollWidth") <= 640

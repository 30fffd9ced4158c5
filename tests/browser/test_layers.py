"""The Layers page: a run that fills in, a layer that is clicked, and the way to the Edit page."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import BUNDLED, Server

ASKED = {"new-answer": "Rome", "method": "ft", "samples": "3"}
pytestmark = pytest.mark.skipif(not BUNDLED.exists(), reason="the bundled model is not there")


def test_layers_fill_in_and_a_click_leads_to_the_edit(page: Page, server: Server) -> None:
    page.goto(server.url("layers", **ASKED))
    run = page.locator(".st-key-run-layers").get_by_role("button")
    expect(run).to_be_visible()
    expect(page.get_by_text(re.compile(r"^8 edits, "))).to_be_visible()
    assert page.locator(".st-key-chart-layers").count() == 0
    run.click()
    expect(page.get_by_text(re.compile(r"^[1-7] of 8 layers"))).to_be_visible()
    layer = page.locator('path[aria-label^="layer: 5;"]').first
    expect(layer).to_be_visible()  # the trace is there before the edits are
    expect(page.locator(".st-key-cancel-layers")).to_have_count(0)
    expect(page.locator('path[aria-label^="layer: 5;"]').first).not_to_have_attribute(
        "aria-label", re.compile("not done yet")
    )
    expect(page.get_by_text("nothing is correlated").first).to_be_visible()
    expect(page.get_by_text("Hase et al. 2023 edited 652 facts").first).to_be_visible()
    layer.hover()
    expect(page.locator("#vg-tooltip-element")).to_contain_text("Largest share, over tokens")
    layer.click()
    expect(page.get_by_label("Layer", exact=True)).to_have_value("5")
    expect(page).to_have_url(re.compile(r"cell=\d+\.5"))
    page.get_by_role("button", name="Edit at this layer").click()
    expect(page.get_by_label("Layers", exact=True)).to_have_value("5")
    expect(page.get_by_label("New answer")).to_have_value("Rome")


def test_pages_and_tools_share_the_bar(page: Page, server: Server) -> None:
    page.goto(server.url("layers"))
    expect(page.locator(".st-key-layers-missing")).to_be_visible()
    for width in (1280, 1400, 1600):  # room for the words of an edit, which are longer
        page.set_viewport_size({"width": width, "height": 720})
        page.wait_for_function(
            f"() => {{ {ENDS}; return pages.right + 100 < tools.left && tools.top < header.bottom; }}"
        )
    for width in (1279, 1000):  # a line of their own
        page.set_viewport_size({"width": width, "height": 720})
        page.wait_for_function(f"() => {{ {ENDS}; return pages.right < innerWidth && tools.top >= header.bottom; }}")
    page.set_viewport_size({"width": 640, "height": 360})  # 1280 at 200%: the pages are in the sidebar
    page.wait_for_function(f"() => {{ {ENDS}; return tools.top >= header.bottom && tools.right <= innerWidth; }}")


ENDS = """const [header, tools, pages] = ['[data-testid="stHeader"]', '.st-key-tools', 'a[href$="/layers"]']
  .map((name) => document.querySelector(name)?.getBoundingClientRect())"""

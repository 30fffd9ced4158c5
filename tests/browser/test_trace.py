"""The Trace page in a real browser: from a cell to it, a click in a panel, its link on a server that knows nothing."""

from __future__ import annotations

import re
from collections.abc import Callable

from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.conftest import Server, cell

LINK = {"prompt": "The capital of Japan is", "subject": "Japan", "answer": "Tokyo"}


def panel(page: Page, site: str) -> str:
    return f"[class*='st-key-chart-trace-{site}-']"


def test_from_a_cell_to_its_trace_and_on_with_a_click(page: Page, server: Server, model: dict[str, str]) -> None:
    page.goto(server.url("lens", cell="2.1", **LINK, **model))
    page.get_by_role("button", name="Trace here").click()
    expect(page.get_by_text("State restored", exact=True)).to_be_visible()
    expect(page).to_have_url(re.compile(r"/trace\?.*cell=2\.1"))
    for site in ("hidden", "mlp", "attention"):
        expect(page.locator(panel(page, site)).first).to_be_visible()
    expect(page.locator("[class*='st-key-cancel-']")).to_have_count(0)
    cell(page, 3, 2).click()
    expect(page).to_have_url(re.compile(r"cell=3\.2"))
    head = page.locator(".st-key-detail-head, .note").filter(has_text="at layer 2").first
    expect(head).to_contain_text("hidden state restored: p")
    expect(head).to_contain_text("attention updates restored: p")


def test_the_link_of_a_trace_opens_on_a_cold_server(
    new_context: Callable[..., BrowserContext], server: Server, model: dict[str, str]
) -> None:
    page = new_context().new_page()
    page.goto(server.url("trace", samples="3", **LINK, **model))
    page.get_by_role("radio", name="log-odds").click()
    page.get_by_role("textbox", name="Seeds").fill("4, 5")
    page.get_by_role("textbox", name="Seeds").press("Enter")
    expect(page).to_have_url(re.compile("seeds=4%2C5"))
    link = page.url
    server.restart()
    elsewhere = new_context().new_page()
    elsewhere.goto(link)
    expect(elsewhere.get_by_text("3 samples, seeds 4, 5")).to_be_visible()
    expect(elsewhere.get_by_role("radio", name="log-odds")).to_be_checked()
    expect(elsewhere.get_by_role("textbox", name="Seeds")).to_have_value("4, 5")
    expect(elsewhere).to_have_url(link)
